//! The seam of the host's disk: everything by which cowdisk changes it.
//!
//! [`Host`] has one method for each such change, in terms of open folders, names and open files; what only reads does
//! not go through it, but for [`open_beneath`], by which everything in a store is opened. [`RealHost`] makes the system
//! calls. Tests put a host in its place that records each change or
//! lets the n-th one fail. `tests/tidy.rs` refuses such calls anywhere else, but for these exceptions:
//!
//! - The live map, the run directory and the marks in it (`overlay/live_map.rs`, `store/run_dir.rs`, `store/marks.rs`, and
//!   removal in `store/disk.rs`) are in memory, and gone after a crash of the host; so is the ledger (`fs/ledger.rs`).
//! - Whether a file is open for writing (`store/sharing.rs`) changes nothing.
//! - A lock file (made in `store/dir.rs`, filled in `store/lock.rs`) matters only while the process lives that holds it.
//! - Programs that the store runs (`store/tool.rs`: `qemu-img`, `mkfs`) write into a draft. What they wrote counts for
//!   nothing until the store has synced it, through this seam.
//! - The owner of a draft's file, lent to such a program and taken back (`store/bases.rs`, `store/convert.rs`), is made
//!   durable with the file.
//! - `transport`, `daemon` and `libvirt` open devices and write logs and notes to other processes; none of that is part
//!   of a store.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::io::IoSlice;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, RenameFlags, ResolveFlags, Timestamps};
use rustix::io::{Errno, ReadWriteFlags, Result, retry_on_intr};

/// What changes the host's disk. A name is one component of a path, looked up in the open folder before it. Offsets and
/// lengths are in bytes.
///
/// A change of names is durable once its folder is synced, a change of a file once the file is; until then a crash may
/// lose any of them, in any order. A rename is atomic.
pub trait Host: Send + Sync + Debug {
    /// Whether overwrites of a disk's data may be put to the kernel beside this host ([`super::aio`]). No for one that has to
    /// see each change.
    fn may_be_bypassed(&self) -> bool {
        false
    }

    /// Makes an empty folder.
    ///
    /// # Errors
    /// `EEXIST` if the name is taken.
    fn make_dir(&self, dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<()>;

    /// Makes an empty file and opens it for reading and writing.
    ///
    /// # Errors
    /// `EEXIST` if the name is taken.
    fn create_file(&self, dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<OwnedFd>;

    /// Gives a file or a folder another place.
    ///
    /// # Errors
    /// With `NOREPLACE`: `EEXIST` if the name is taken, `EINVAL` if the host filesystem does not know the flag.
    fn rename(
        &self,
        from: (BorrowedFd<'_>, &OsStr),
        to: (BorrowedFd<'_>, &OsStr),
        flags: RenameFlags,
    ) -> Result<()>;

    /// Removes the name of anything but a folder.
    fn unlink(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()>;

    /// Removes an empty folder.
    fn remove_dir(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()>;

    /// Makes the names in a folder durable.
    fn sync_dir(&self, dir: BorrowedFd<'_>) -> Result<()>;

    /// Writes all of `bytes`. After an error any part may have been written.
    fn write_at(&self, file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Writes all of `bytes`, and returns once they are durable.
    fn write_durable_at(&self, file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Makes a file's contents and its size durable.
    fn sync_data(&self, file: BorrowedFd<'_>) -> Result<()>;

    /// Makes a file's contents, size, mode and times durable.
    fn sync_all(&self, file: BorrowedFd<'_>) -> Result<()>;

    /// Sets the end of a file.
    fn set_len(&self, file: BorrowedFd<'_>, len: u64) -> Result<()>;

    /// Reserves space; contents and end stay. `len` is at least 1.
    fn allocate(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()>;

    /// Makes a hole; the end stays. `len` is at least 1.
    fn punch(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()>;

    /// Makes `file` share all contents of `source`.
    ///
    /// # Errors
    /// Where the host filesystem cannot, or not between these two; nothing has changed then.
    fn clone_contents(&self, source: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<()>;

    /// Sets the access mode of a file or a folder.
    fn set_mode(&self, file: BorrowedFd<'_>, mode: u32) -> Result<()>;

    /// Sets the times of a file, not through a link.
    fn set_times(&self, dir: BorrowedFd<'_>, name: &OsStr, times: &Timestamps) -> Result<()>;
}

/// The running kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealHost;

impl Host for RealHost {
    fn may_be_bypassed(&self) -> bool {
        true
    }

    fn make_dir(&self, dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<()> {
        rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode))
    }

    fn create_file(&self, dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        open_beneath(dir, name, flags, Mode::from_raw_mode(mode))
    }

    fn rename(
        &self,
        from: (BorrowedFd<'_>, &OsStr),
        to: (BorrowedFd<'_>, &OsStr),
        flags: RenameFlags,
    ) -> Result<()> {
        // Without flags by the call that every kernel and filesystem has.
        match flags.is_empty() {
            true => rustix::fs::renameat(from.0, from.1, to.0, to.1),
            false => rustix::fs::renameat_with(from.0, from.1, to.0, to.1, flags),
        }
    }

    fn unlink(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        rustix::fs::unlinkat(dir, name, AtFlags::empty())
    }

    fn remove_dir(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)
    }

    // No sync is retried, not even after EINTR: after one that did not end well nothing is known about what is on the
    // disk.
    fn sync_dir(&self, dir: BorrowedFd<'_>) -> Result<()> {
        rustix::fs::fsync(dir)
    }

    fn write_at(&self, file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<()> {
        write_all(offset, bytes, |at, rest| rustix::io::pwrite(file, rest, at))
    }

    fn write_durable_at(&self, file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<()> {
        write_all(offset, bytes, |at, rest| {
            rustix::io::pwritev2(file, &[IoSlice::new(rest)], at, ReadWriteFlags::DSYNC)
        })
    }

    fn sync_data(&self, file: BorrowedFd<'_>) -> Result<()> {
        rustix::fs::fdatasync(file)
    }

    fn sync_all(&self, file: BorrowedFd<'_>) -> Result<()> {
        rustix::fs::fsync(file)
    }

    fn set_len(&self, file: BorrowedFd<'_>, len: u64) -> Result<()> {
        retry_on_intr(|| rustix::fs::ftruncate(file, len))
    }

    fn allocate(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
        retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, len))
    }

    fn punch(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        retry_on_intr(|| rustix::fs::fallocate(file, flags, offset, len))
    }

    fn clone_contents(&self, source: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<()> {
        rustix::fs::ioctl_ficlone(file, source)
    }

    fn set_mode(&self, file: BorrowedFd<'_>, mode: u32) -> Result<()> {
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode))
    }

    fn set_times(&self, dir: BorrowedFd<'_>, name: &OsStr, times: &Timestamps) -> Result<()> {
        rustix::fs::utimensat(dir, name, times, AtFlags::SYMLINK_NOFOLLOW)
    }
}

/// Opens `name`, one component of a path, in the open folder `dir` and nowhere else: by openat2(2), never through a
/// symbolic link and never out of the folder. Nothing that it opens waits (a fifo for its other end) or becomes the
/// terminal of this process.
///
/// Where the kernel (before 5.6) or a sandbox around us refuses the call itself, openat(2) with `O_NOFOLLOW` does the
/// same for one component: it is neither `..` nor absolute, so there is no other step to take, and its last and only step
/// may not be a link, of which the magic links of /proc are a kind.
///
/// # Errors
/// `ELOOP` or `ENOTDIR` for a symbolic link.
pub fn open_beneath(dir: BorrowedFd<'_>, name: &OsStr, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    assert_component(name);
    // What is made anew is a file, for which there is no waiting; asynchronous requests would take the flag to heart.
    let patience = if flags.contains(OFlags::EXCL) { OFlags::empty() } else { OFlags::NONBLOCK };
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY | patience;
    // openat2 refuses a mode where nothing is made.
    let mode = if flags.contains(OFlags::CREATE) { mode } else { Mode::empty() };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match retry_on_intr(|| rustix::fs::openat2(dir, name, flags, mode, resolve)) {
        // EPERM may also be the file's own (one that is immutable); it is then said again.
        Err(Errno::NOSYS | Errno::PERM) => open_one_step(dir, name, flags, mode),
        other => other,
    }
}

/// Opens one component with flags that hold `O_NOFOLLOW`.
fn open_one_step(dir: BorrowedFd<'_>, name: &OsStr, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    retry_on_intr(|| rustix::fs::openat(dir, name, flags, mode))
}

/// Names come from `layout.rs` or are checked by `names.rs`, both of the store.
fn assert_component(name: &OsStr) {
    let bytes = name.as_encoded_bytes();
    let is_one = !bytes.is_empty() && bytes != b"." && bytes != b".." && !bytes.contains(&b'/');
    assert!(is_one, "not a file name: {name:?}");
}

/// Writes what the calls before it left over, until all is written.
fn write_all(offset: u64, bytes: &[u8], write: impl Fn(u64, &[u8]) -> Result<usize>) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match write(offset + done as u64, &bytes[done..]) {
            // Of a regular file it cannot be, but it must not loop for ever.
            Ok(0) => return Err(Errno::IO),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    /// What a kernel or a sandbox without openat2 gets is the same.
    #[test]
    fn neither_way_of_opening_follows_a_link() {
        let outside = tempfile::tempdir().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, target: &std::path::Path| {
            std::os::unix::fs::symlink(target, folder.path().join(name)).unwrap();
        };
        std::fs::File::create(folder.path().join("file")).unwrap();
        put("to_file", std::path::Path::new("file"));
        put("to_folder", outside.path());
        put("to_nothing", &outside.path().join("made"));
        put("to_magic", std::path::Path::new("/proc/self/cwd"));
        let dir = std::fs::File::open(folder.path()).unwrap();
        type Open = fn(BorrowedFd<'_>, &OsStr, OFlags, Mode) -> Result<OwnedFd>;
        let one_step: Open =
            |dir, name, flags, mode| open_one_step(dir, name, flags | OFlags::NOFOLLOW, mode);
        for open in [open_beneath as Open, one_step] {
            let open = |name: &str, flags| open(dir.as_fd(), OsStr::new(name), flags, Mode::RUSR).map(drop);
            assert!(open("file", OFlags::RDWR).is_ok());
            assert_eq!(open("absent", OFlags::RDONLY), Err(Errno::NOENT));
            for name in ["to_file", "to_folder", "to_nothing", "to_magic"] {
                for flags in [OFlags::RDONLY, OFlags::RDWR, OFlags::RDWR | OFlags::CREATE] {
                    assert_eq!(open(name, flags), Err(Errno::LOOP), "{name} {flags:?}");
                }
                let as_folder = open(name, OFlags::DIRECTORY);
                assert!(matches!(as_folder, Err(Errno::LOOP | Errno::NOTDIR)), "{name}: {as_folder:?}");
            }
        }
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0, "nothing is made through a link");
        // In /proc the links are the kernel's own, and lead anywhere.
        let own = std::fs::File::open("/proc/self").unwrap();
        for open in [open_beneath as Open, one_step] {
            let found = open(own.as_fd(), OsStr::new("cwd"), OFlags::DIRECTORY, Mode::empty());
            assert!(matches!(found, Err(Errno::LOOP | Errno::NOTDIR)));
        }
    }
}
