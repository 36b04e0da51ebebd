//! The mounted tree in plain types: names, inodes, attributes, and the operations on them.
//!
//! ```text
//! /images/NAME                              an image, read-only
//! /boot/ID                                  a kernel or a ramdisk by content, read-only
//! /instances/NAME/disk, disk.local          the disks
//! /instances/NAME/kernel, ramdisk           links to /boot/ID
//! ```
//!
//! A transport calls [`Fs`] from as many threads as it likes. What the tree holds is read from the store at each call, so
//! whatever a command changes there is seen at once. Reading and writing an open file takes no lock that two files share;
//! nothing but the kernel's own checks of modes keeps anybody out.

mod adoption;
mod attributes;
mod counters;
mod errno;
mod handles;
mod inodes;
mod ledger;
mod metadata;
mod open_disks;
mod open_file;
mod passthrough;
mod placed;
mod tree;

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

pub use attributes::{AttributeChanges, Attributes, FileKind, MODE_BITS, SetTime};
pub use counters::{Ending, Operation, RequestCounts};
pub use errno::{Errno, Failure, Outcome};
pub use handles::HandleId;
pub use ledger::{AGREED_BYTES, Ledger};
pub use open_disks::{DiskFigures, DiskKey, DiskState};
pub use open_file::OpenMode;
pub use passthrough::{BackingId, Opened, Passthrough, ServedBy};
pub use placed::Placed;
pub use tree::Entry;

use adoption::Numbers;
use counters::Counters;
use handles::Handles;
use inodes::Inodes;
use ledger::Kept;
use open_disks::OpenDisks;
use open_file::OpenFile;
use tree::Tree;

use crate::error::{Context, Error, Result};
use crate::overlay::CommitCounts;
use crate::storage::Way;
use crate::store::{SpaceNow, Store};

/// Longest name of a file, in bytes.
const NAME_BYTES_MAX: u32 = 255;

/// What `statfs` shows: the host's filesystem under the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes of a block; the unit of the counts of blocks.
    pub block_bytes: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Blocks that are free.
    pub blocks_free: u64,
    /// Blocks that guests may still fill: what others than root may take, less the reserve.
    pub blocks_available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Inodes that are free.
    pub files_free: u64,
    /// Longest name in this tree, in bytes.
    pub name_bytes_max: u32,
}

/// The filesystem over one store.
#[derive(Debug)]
pub struct Fs {
    tree: Tree,
    inodes: Inodes,
    handles: Handles<OpenFile>,
    disks: OpenDisks,
    counters: Counters,
    /// Requests that the host's disk did while no thread waited. One thread counts them.
    asynchronous: AtomicU64,
    /// Guards whether the table of inode numbers is complete; held while the store is read to complete it.
    numbers: Mutex<Numbers>,
    /// Guards the records of owners, modes and extended attributes from reading one to writing it back.
    records: Mutex<()>,
}

/// Which request of the kernel something is done for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestId {
    /// Its number, which no other request of the same mount has; 0 if it is not known.
    pub number: u64,
    /// The kernel has sent it to a process before this one, which may have done it, and whose answer never came.
    pub resent: bool,
}

/// Tells [`Fs::read_directory`] about an entry and the offset after it; says whether it did *not* fit any more.
pub type EntrySink<'a> = dyn FnMut(&NumberedEntry, u64) -> bool + 'a;

/// Tells [`Fs::read_directory_with_attributes`] about a name, its attributes and the offset after it; says whether it
/// did *not* fit any more.
pub type AttributesSink<'a> = dyn FnMut(&str, &Attributes, u64) -> bool + 'a;

/// An entry of a directory as `readdir` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumberedEntry {
    /// Inode number.
    pub ino: u64,
    /// Kind of the file.
    pub kind: FileKind,
    /// Its name.
    pub name: String,
}

impl Fs {
    /// The filesystem over `store`, with no file open.
    ///
    /// # Errors
    /// If the store's folder cannot be looked at.
    pub fn new(store: Store) -> Result<Self> {
        Ok(Self {
            tree: Tree::new(store)?,
            inodes: Inodes::default(),
            handles: Handles::new(),
            disks: OpenDisks::default(),
            counters: Counters::default(),
            asynchronous: AtomicU64::new(0),
            numbers: Mutex::default(),
            records: Mutex::new(()),
        })
    }

    /// The file `name` in the directory `parent`. The caller is told its inode number and will [forget](Self::forget)
    /// it once for each call.
    ///
    /// # Errors
    /// [`Errno::NO_ENTRY`] if there is none; [`Errno::NAME_TOO_LONG`] if there cannot be one.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Outcome<Attributes> {
        let parent = self.node(parent)?;
        if name.len() > NAME_BYTES_MAX as usize {
            return Err(Errno::NAME_TOO_LONG.into());
        }
        let name = name.to_str().ok_or(Errno::NO_ENTRY)?;
        let node = self.tree.find(&parent, name)?;
        let mut attributes = self.tree.attributes(&node, &self.disks)?;
        attributes.ino = self.inodes.remember(&node);
        Ok(attributes)
    }

    /// The caller forgets `lookups` of the times that it was told an inode number.
    pub fn forget(&self, ino: u64, lookups: u64) {
        self.inodes.forget(ino, lookups);
    }

    /// What `stat` shows of a file.
    ///
    /// # Errors
    /// [`Errno::STALE`] if it has been removed.
    pub fn attributes(&self, ino: u64) -> Outcome<Attributes> {
        let node = self.node(ino)?;
        let attributes = self.tree.attributes(&node, &self.disks)?;
        Ok(Attributes { ino, ..attributes })
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// [`Errno::INVALID`] if it is none.
    pub fn link_target(&self, ino: u64) -> Outcome<String> {
        self.tree.link_target(&self.node(ino)?)
    }

    /// Opens a file. A disk that nobody has open is opened for service first, which may take as long as the host's disk
    /// takes to recover it. A request that was sent before and had opened the file gets the same handle again.
    ///
    /// # Errors
    /// [`Errno::READ_ONLY`] for writing to an image, a kernel or a ramdisk; [`Errno::NOT_PERMITTED`] for cutting a disk
    /// off; those of opening a disk.
    pub fn open(&self, ino: u64, mode: OpenMode, request: RequestId) -> Outcome<Opened> {
        if let Some(handle) = self.opened_before(request) {
            return Ok(self.opened(handle));
        }
        self.counted(Operation::Open, 0, || {
            let node = self.node(ino)?;
            let file = OpenFile::open(&self.tree, &self.disks, &node, mode, self.is_kept(ino))?;
            let handle = self.insert(file, Kept { ino, write: mode.write, directory: false }, request)?;
            Ok(self.opened(handle))
        })
    }

    /// What an earlier process has opened for this very request.
    fn opened_before(&self, request: RequestId) -> Option<HandleId> {
        if request.resent { self.handles.opened_before(request.number) } else { None }
    }

    fn counted<T>(&self, kind: Operation, bytes: u64, operation: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        let outcome = operation();
        self.counters.count(kind, bytes, &outcome);
        outcome
    }

    /// Opens a directory for reading its entries.
    ///
    /// # Errors
    /// [`Errno::NOT_DIRECTORY`] if it is none.
    pub fn open_directory(&self, ino: u64, request: RequestId) -> Outcome<HandleId> {
        if let Some(handle) = self.opened_before(request) {
            return Ok(handle);
        }
        let node = self.node(ino)?;
        let entries = self.tree.entries(&node)?;
        let directory = OpenFile::Directory { node, entries: Mutex::new(Arc::new(entries)) };
        self.insert(directory, Kept { ino, write: false, directory: true }, request)
    }

    fn insert(&self, file: OpenFile, kept: Kept, request: RequestId) -> Outcome<HandleId> {
        self.handles.insert(file, kept, request.number).map_err(|(file, failure)| {
            if let Err(error) = self.close_file(file) {
                log::error!("{error}");
            }
            failure
        })
    }

    fn close_file(&self, file: OpenFile) -> Result<()> {
        match file {
            OpenFile::Disk(disk) => self.disks.release(disk),
            OpenFile::Fixed { .. } | OpenFile::Directory { .. } => Ok(()),
        }
    }

    /// Tells `sink` the entries of an open directory from `offset` on, until it says that one does not fit. Offset 0
    /// reads the directory anew.
    ///
    /// # Errors
    /// [`Errno::NOT_DIRECTORY`] if the handle is another file's.
    pub fn read_directory(&self, handle: HandleId, offset: u64, sink: &mut EntrySink<'_>) -> Outcome<()> {
        for (entry, next) in self.entries_from(handle, offset)?.iter_from(offset) {
            let ino = self.inodes.show(&entry.node);
            let shown = NumberedEntry { ino, kind: entry.node.kind(), name: entry.name.clone() };
            if sink(&shown, next) {
                break;
            }
        }
        Ok(())
    }

    /// Like [`Fs::read_directory`], with attributes. The caller is told the inode number of each entry that fits, but of
    /// `.` and `..`, as by [`Fs::lookup`].
    ///
    /// # Errors
    /// Those of [`Fs::read_directory`].
    pub fn read_directory_with_attributes(
        &self,
        handle: HandleId,
        offset: u64,
        sink: &mut AttributesSink<'_>,
    ) -> Outcome<()> {
        for (entry, next) in self.entries_from(handle, offset)?.iter_from(offset) {
            let attributes = match self.tree.attributes(&entry.node, &self.disks) {
                Ok(attributes) => attributes,
                // What was removed since the directory was read is passed over.
                Err(failure) if failure.errno() == Errno::STALE => continue,
                // What cannot be looked at is shown all the same, and fails when it is looked up by name.
                Err(_) => self.tree.unknown(&entry.node),
            };
            let told = !matches!(entry.name.as_str(), "." | "..");
            let ino = if told { self.inodes.remember(&entry.node) } else { self.inodes.show(&entry.node) };
            if sink(&entry.name, &Attributes { ino, ..attributes }, next) {
                if told {
                    self.inodes.forget(ino, 1);
                }
                break;
            }
        }
        Ok(())
    }

    fn entries_from(&self, handle: HandleId, offset: u64) -> Outcome<Listing> {
        let file = self.file(handle)?;
        let OpenFile::Directory { node, entries } = &*file else { return Err(Errno::NOT_DIRECTORY.into()) };
        let mut entries = entries.lock();
        if offset == 0 {
            *entries = Arc::new(self.tree.entries(node)?);
        }
        Ok(Listing(Arc::clone(&entries)))
    }

    /// Fills the beginning of `buf` with what lies at byte `offset`; returns how many bytes, fewer than asked only at
    /// the end of the file. `direct` says that the file was opened with O_DIRECT, which must be aligned to 512 bytes; `way`
    /// is how the bytes of a disk's own then travel.
    ///
    /// # Errors
    /// [`Errno::INVALID`] if `direct` and not aligned; those of the disk.
    pub fn read(
        &self,
        handle: HandleId,
        offset: u64,
        buf: &mut [u8],
        direct: bool,
        way: Way,
    ) -> Outcome<usize> {
        let outcome = self.file(handle).and_then(|file| file.read(offset, buf, direct, way));
        let read = outcome.as_ref().map_or(0, |read| *read as u64);
        self.counters.count(Operation::Read, read, &outcome);
        outcome
    }

    /// [`Fs::read`] if it need not wait for the host's disk. `None` if it must: then nothing was done, and whatever `buf`
    /// holds means nothing.
    ///
    /// # Errors
    /// Those of [`Fs::read`].
    pub fn read_now(
        &self,
        handle: HandleId,
        offset: u64,
        buf: &mut [u8],
        direct: bool,
        way: Way,
    ) -> Outcome<Option<usize>> {
        if self.handles.kept(handle).is_some() {
            // It has to be opened first.
            return Ok(None);
        }
        let outcome = self.handles.get(handle).and_then(|file| file.read_now(offset, buf, direct, way));
        match &outcome {
            Ok(None) => {}
            Ok(Some(read)) => self.counters.count(Operation::Read, *read as u64, &outcome),
            Err(_) => self.counters.count(Operation::Read, 0, &outcome),
        }
        outcome
    }

    /// Whether [`Fs::write`] of `len` bytes at `offset` only changes memory, or is refused. It need not be called then by a
    /// thread that has time to wait for the host's disk.
    pub fn writes_to_memory(&self, handle: HandleId, offset: u64, len: u64, way: Way) -> bool {
        match self.handles.get(handle) {
            Ok(file) => file.writes_to_memory(offset, len, way),
            // A kept one has to be opened first. Not asked while the file is held: whoever is about to open it waits for
            // that, and this thread would wait for him.
            Err(_) => self.handles.kept(handle).is_none(),
        }
    }

    /// Writes all of `data` at byte `offset`; durable after the next [`Fs::sync`]. `direct` and `way` as in [`Fs::read`].
    ///
    /// # Errors
    /// [`Errno::TOO_BIG`] if it reaches beyond the end of the disk (nothing is written then); [`Errno::INVALID`] if
    /// `direct` and not aligned; those of the disk.
    pub fn write(&self, handle: HandleId, offset: u64, data: &[u8], direct: bool, way: Way) -> Outcome<()> {
        let len = data.len() as u64;
        self.counted(Operation::Write, len, || self.file(handle)?.write(offset, data, direct, way))
    }

    /// Makes every completed write to the file durable.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn sync(&self, handle: HandleId) -> Outcome<()> {
        self.counted(Operation::Sync, 0, || self.file(handle)?.sync())
    }

    /// `fallocate`: punching a hole and zeroing a range make zeroes and return space; plain allocation reserves space.
    ///
    /// # Errors
    /// [`Errno::TOO_BIG`] if the range reaches beyond the end of the disk (nothing is changed then);
    /// [`Errno::NOT_SUPPORTED`] for another mode; those of the disk.
    pub fn allocate(&self, handle: HandleId, mode: i32, offset: u64, len: u64) -> Outcome<()> {
        self.counted(Operation::Allocate, len, || self.file(handle)?.allocate(mode, offset, len))
    }

    /// `lseek` with SEEK_DATA or SEEK_HOLE.
    ///
    /// # Errors
    /// [`Errno::NO_SUCH_OFFSET`] at or past the end, or if only a hole follows; [`Errno::INVALID`] for another whence.
    pub fn seek(&self, handle: HandleId, offset: i64, whence: i32) -> Outcome<i64> {
        self.file(handle)?.seek(offset, whence)
    }

    /// `ioctl`: answers the one by which QEMU asks for the alignment of direct I/O.
    ///
    /// # Errors
    /// [`Errno::NO_CONTROL`] for any other.
    pub fn control(&self, handle: HandleId, command: u32) -> Outcome<Vec<u8>> {
        self.file(handle)?.control(command)
    }

    /// Looks at the space of the host's filesystem, for others may have filled or freed it.
    ///
    /// # Errors
    /// Those of the host.
    pub fn look_at_space(&self) -> Result<SpaceNow> {
        self.tree.store().space()
    }

    /// The host's filesystem under the store.
    ///
    /// # Errors
    /// Those of the host.
    pub fn statistics(&self) -> Outcome<Statistics> {
        let stat = rustix::fs::statvfs(self.tree.store().dir()).context(|| "statfs of the store")?;
        let reserve = self.tree.store().space()?.reserve;
        Ok(Statistics {
            block_bytes: u32::try_from(stat.f_frsize).unwrap_or(4096),
            blocks: stat.f_blocks,
            blocks_free: stat.f_bfree,
            blocks_available: stat.f_bavail.saturating_sub(reserve.div_ceil(stat.f_frsize.max(1))),
            files: stat.f_files,
            files_free: stat.f_ffree,
            name_bytes_max: NAME_BYTES_MAX,
        })
    }

    /// What was asked for so far, by what it was.
    pub fn request_counts(&self, operation: Operation) -> RequestCounts {
        self.counters.of(operation)
    }

    /// How many reads and writes the host's disk did while no thread waited for them.
    pub fn asynchronous_requests(&self) -> u64 {
        self.asynchronous.load(Ordering::Relaxed)
    }

    /// Every disk in use and those that could not be opened, and what all disks have committed so far. Waits for nobody's
    /// I/O.
    pub fn disk_figures(&self) -> (Vec<DiskFigures>, CommitCounts) {
        self.disks.figures()
    }

    /// How many instances the store has.
    ///
    /// # Errors
    /// Those of the host.
    pub fn count_instances(&self) -> Result<usize> {
        Ok(self.tree.store().instance_names()?.len())
    }

    /// How many files and directories are open.
    pub fn open_files(&self) -> usize {
        self.handles.count()
    }

    /// Flushes every disk that was written since its last flush; returns what went wrong.
    pub fn flush_dirty(&self) -> Vec<Error> {
        self.disks.flush_dirty()
    }

    /// Does the housekeeping of every disk that asks for it; returns what went wrong.
    pub fn checkpoint_due(&self) -> Vec<Error> {
        self.disks.checkpoint_due()
    }
}

/// The entries of a directory as they were read.
struct Listing(Arc<Vec<Entry>>);

impl Listing {
    /// The entries from `offset` on, each with the offset after it.
    fn iter_from(&self, offset: u64) -> impl Iterator<Item = (&Entry, u64)> {
        self.0.iter().zip(1u64..).skip(usize::try_from(offset).unwrap_or(usize::MAX))
    }
}
