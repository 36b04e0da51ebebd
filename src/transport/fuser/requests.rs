//! The kernel's requests, one by one: arguments out of `fuser`'s types, answers into them.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, FopenFlags, INodeNo, IoctlFlags, KernelConfig, LockOwner,
    OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::Server;
use super::convert::{GENERATION, file_flags, to_file_type, to_kernel, to_set_time};
use crate::fs::{
    AttributeChanges, Attributes, Errno, HandleId, NumberedEntry, OpenMode, Outcome, RequestId, Statistics,
};
use crate::storage::Way;
use crate::transport::about::{About, guarded};
use crate::transport::scratch::with_buffer;

fn about(operation: &'static str, ino: INodeNo) -> About {
    About::new(operation, ino.0)
}

fn about_range(operation: &'static str, ino: INodeNo, offset: u64, len: u64) -> About {
    About::range(operation, ino.0, offset, len)
}

fn errno(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.raw())
}

/// Answers with what `$outcome` holds, or with its errno.
macro_rules! answer {
    ($about:expr, $reply:ident, $outcome:expr, $ok:expr) => {
        match guarded(|| $outcome) {
            Ok(value) => $ok(value),
            Err(failure) => $reply.error(errno($about.failed(&failure))),
        }
    };
}

fn answer_xattr(about: About, size: u32, outcome: Outcome<Vec<u8>>, reply: ReplyXattr) {
    let value = match outcome {
        Ok(value) => value,
        Err(failure) => return reply.error(errno(about.failed(&failure))),
    };
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(&value),
        _ => reply.error(errno(about.failed(&Errno::RANGE.into()))),
    }
}

impl Server {
    /// Refuses what would change the tree: only the command line makes and removes instances.
    fn refuse_change() -> fuser::Errno {
        errno(Errno::NOT_PERMITTED)
    }
}

impl fuser::Filesystem for Server {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        super::init::negotiate(config)
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let about = about("lookup", parent);
        answer!(about, reply, self.fs.lookup(parent.0, name), |attributes: Attributes| {
            let trusted = attributes.trusted_for();
            reply.entry(&trusted, &to_kernel(&attributes), GENERATION);
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        self.fs.forget(ino.0, lookups);
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let about = about("getattr", ino);
        answer!(about, reply, self.fs.attributes(ino.0), |attributes: Attributes| {
            reply.attr(&attributes.trusted_for(), &to_kernel(&attributes));
        });
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (atime, mtime) = (atime.map(to_set_time), mtime.map(to_set_time));
        let changes = AttributeChanges { mode, uid, gid, size, atime, mtime };
        let fs = Arc::clone(&self.fs);
        self.slow.run(ino.0, move || {
            let about = about("setattr", ino);
            answer!(about, reply, fs.change(ino.0, &changes), |attributes: Attributes| {
                reply.attr(&attributes.trusted_for(), &to_kernel(&attributes));
            });
        });
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        let about = about("readlink", ino);
        answer!(about, reply, self.fs.link_target(ino.0), |target: String| reply.data(target.as_bytes()));
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        let mode = OpenMode { write, truncate: flags.0 & libc::O_TRUNC != 0 };
        let fs = Arc::clone(&self.fs);
        self.slow.run(ino.0, move || {
            let about = about("open", ino);
            answer!(about, reply, fs.open(ino.0, mode, RequestId::default()), |opened: crate::fs::Opened| {
                reply.opened(FileHandle(opened.handle.0), file_flags());
            });
        });
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let about = about_range("read", ino, offset, size.into());
        let direct = flags.0 & libc::O_DIRECT != 0;
        with_buffer(size, |buffer| {
            answer!(
                about,
                reply,
                self.fs.read(HandleId(handle.0), offset, buffer, direct, Way::Cached),
                |read: usize| {
                    reply.data(&buffer[..read]);
                }
            );
        });
    }

    fn write(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let about = about_range("write", ino, offset, data.len() as u64);
        let handle = HandleId(handle.0);
        // A page of a mapping is written in the name of some open file, whose flags say nothing about it.
        let cached = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let direct = !cached && flags.0 & libc::O_DIRECT != 0;
        let durable = flags.0 & libc::O_DSYNC != 0;
        let written = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let outcome = guarded(|| self.fs.write(handle, offset, data, direct, Way::Cached));
        if !durable || outcome.is_err() {
            return answer!(about, reply, outcome, |()| reply.written(written));
        }
        // Written here, so that no copy of the data waits in a queue; only the sync is waited for elsewhere.
        let fs = Arc::clone(&self.fs);
        self.slow.run(ino.0, move || {
            answer!(about, reply, fs.sync(handle), |()| reply.written(written));
        });
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let fs = Arc::clone(&self.fs);
        self.slow.run(ino.0, move || {
            let about = about("release", ino);
            answer!(about, reply, fs.close(HandleId(handle.0), RequestId::default()), |()| reply.ok());
        });
    }

    fn fsync(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        // Attributes are durable as soon as they are changed, so data is all there is to sync.
        let fs = Arc::clone(&self.fs);
        self.slow.run(ino.0, move || {
            let about = about("fsync", ino);
            answer!(about, reply, fs.sync(HandleId(handle.0)), |()| reply.ok());
        });
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let about = about("opendir", ino);
        answer!(about, reply, self.fs.open_directory(ino.0, RequestId::default()), |handle: HandleId| {
            reply.opened(FileHandle(handle.0), FopenFlags::empty());
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let about = about("readdir", ino);
        let mut add = |entry: &NumberedEntry, next| {
            reply.add(INodeNo(entry.ino), next, to_file_type(entry.kind), &entry.name)
        };
        let outcome = guarded(|| self.fs.read_directory(HandleId(handle.0), offset, &mut add));
        answer!(about, reply, outcome, |()| reply.ok());
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let about = about("readdirplus", ino);
        let mut add = |name: &str, attributes: &Attributes, next| {
            let (trusted, file) = (attributes.trusted_for(), to_kernel(attributes));
            reply.add(file.ino, next, name, &trusted, &file, GENERATION)
        };
        let outcome =
            guarded(|| self.fs.read_directory_with_attributes(HandleId(handle.0), offset, &mut add));
        answer!(about, reply, outcome, |()| reply.ok());
    }

    fn releasedir(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let about = about("releasedir", ino);
        answer!(about, reply, self.fs.close(HandleId(handle.0), RequestId::default()), |()| reply.ok());
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _data: bool,
        reply: ReplyEmpty,
    ) {
        // Whatever stands in a directory was durable before it appeared.
        reply.ok();
    }

    fn statfs(&self, _request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let about = about("statfs", ino);
        answer!(about, reply, self.fs.statistics(), |s: Statistics| {
            reply.statfs(
                s.blocks,
                s.blocks_free,
                s.blocks_available,
                s.files,
                s.files_free,
                s.block_bytes,
                s.name_bytes_max,
                s.block_bytes,
            );
        });
    }

    fn setxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (fs, name, value) = (Arc::clone(&self.fs), name.to_owned(), value.to_vec());
        self.slow.run(ino.0, move || {
            let about = about("setxattr", ino);
            answer!(about, reply, fs.set_xattr(ino.0, &name, value, flags, RequestId::default()), |()| reply
                .ok());
        });
    }

    fn getxattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        answer_xattr(about("getxattr", ino), size, guarded(|| self.fs.xattr(ino.0, name)), reply);
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        answer_xattr(about("listxattr", ino), size, guarded(|| self.fs.xattr_names(ino.0)), reply);
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (fs, name) = (Arc::clone(&self.fs), name.to_owned());
        self.slow.run(ino.0, move || {
            let about = about("removexattr", ino);
            answer!(about, reply, fs.remove_xattr(ino.0, &name, RequestId::default()), |()| reply.ok());
        });
    }

    fn ioctl(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _flags: IoctlFlags,
        command: u32,
        _input: &[u8],
        _output_bytes: u32,
        reply: ReplyIoctl,
    ) {
        let about = about("ioctl", ino);
        answer!(about, reply, self.fs.control(HandleId(handle.0), command), |data: Vec<u8>| {
            reply.ioctl(0, &data);
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let fs = Arc::clone(&self.fs);
        self.slow.run(ino.0, move || {
            let about = about_range("fallocate", ino, offset, len);
            answer!(about, reply, fs.allocate(HandleId(handle.0), mode, offset, len), |()| reply.ok());
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let about = about_range("lseek", ino, u64::try_from(offset).unwrap_or(0), 0);
        answer!(about, reply, self.fs.seek(HandleId(handle.0), offset, whence), |at: i64| reply.offset(at));
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _ino_in: INodeNo,
        _handle_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _handle_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then copies by reading and writing, and does not ask again.
        reply.error(errno(Errno::NOT_IMPLEMENTED));
    }

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // The kernel then calls every file ready, and does not ask again.
        reply.error(errno(Errno::NOT_IMPLEMENTED));
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Self::refuse_change());
    }

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Self::refuse_change());
    }

    fn mkdir(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Self::refuse_change());
    }

    fn symlink(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Self::refuse_change());
    }

    fn link(&self, _request: &Request, _ino: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Self::refuse_change());
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Self::refuse_change());
    }

    fn rmdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Self::refuse_change());
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Self::refuse_change());
    }
}
