//! A file of the host as [`Storage`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, OnceLock};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::aio;
use super::cached::{CachedReads, Found, is_in_memory, is_on_local_disk};
use super::gate::Gate;
use super::host::{Host, RealHost};
use super::{DirectFile, Storage, Way, ends_early, extents, lost_writes};
use crate::error::{Context, Error, Result};
use crate::units::{SECTOR_BYTES, SECTOR_LEN};

/// A regular file (or, for what only reads, a block device) of the host. Its position is never used, so threads may
/// share it.
#[derive(Debug)]
pub struct FileStorage {
    host: Arc<dyn Host>,
    file: File,
    /// The same file, opened so that reads and writes go past the host's cache.
    direct: Option<File>,
    /// There if others may put requests to `direct`.
    gate: Option<Box<Gate>>,
    /// Whether it can be opened with O_DIRECT, though there may be nothing to go past.
    opens_directly: bool,
    /// Whether it takes all that a disk takes: looked up when somebody asks.
    takes_all: OnceLock<bool>,
    cached: CachedReads,
    /// Whether it lies on a local disk: looked up when somebody asks.
    is_local: OnceLock<bool>,
    name: String,
}

impl FileStorage {
    /// Takes `file`; `name` is what error messages call it.
    pub fn new(file: File, name: impl Into<String>) -> Self {
        Self::on(Arc::new(RealHost), file, name)
    }

    /// Takes `file`, and changes it through `host`.
    pub fn on(host: Arc<dyn Host>, file: File, name: impl Into<String>) -> Self {
        Self {
            host,
            file,
            direct: None,
            gate: None,
            opens_directly: false,
            takes_all: OnceLock::new(),
            cached: CachedReads::default(),
            is_local: OnceLock::new(),
            name: name.into(),
        }
    }

    /// Has [`Way::Direct`] go by `direct`, which was opened with O_DIRECT. Another file than this one is not taken.
    #[must_use]
    pub fn with_direct(self, direct: Option<File>) -> Self {
        let same = |direct: &File| match (self.file.metadata(), direct.metadata()) {
            (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
            _ => false,
        };
        let direct = direct.filter(same);
        let opens_directly = direct.is_some();
        // A file system in memory takes O_DIRECT and has nothing to go past.
        let direct = direct.filter(|_| !is_in_memory(&self.file));
        let asynchronous = direct.as_ref().is_some_and(|direct| {
            self.host.may_be_bypassed() && is_on_local_disk(direct) && aio::hold(direct).is_ok()
        });
        Self { direct, gate: asynchronous.then(Box::default), opens_directly, ..self }
    }

    /// The file itself, for what only reads: metadata, locks, other ways of reading.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes contents, size, mode and times survive a crash.
    ///
    /// # Errors
    /// Those of the host.
    pub fn sync_all(&self) -> Result<()> {
        self.host.sync_all(self.as_fd()).context(|| format!("sync {}", self.name))
    }

    /// Sets the access mode.
    ///
    /// # Errors
    /// Those of the host.
    pub fn set_mode(&self, mode: u32) -> Result<()> {
        self.host.set_mode(self.as_fd(), mode).context(|| format!("set the mode of {}", self.name))
    }

    /// Makes the file share all contents of `source`, where the host filesystem can. Answers whether it did; if not,
    /// nothing has changed.
    #[must_use]
    pub fn clone_contents(&self, source: &File) -> bool {
        self.host.clone_contents(source.as_fd(), self.as_fd()).is_ok()
    }

    /// Whether the host filesystem lets this file be read past its cache.
    pub fn can_go_direct(&self) -> bool {
        use std::os::fd::AsRawFd as _;
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::open(path, flags, rustix::fs::Mode::empty()).is_ok()
    }

    /// Whether the host filesystem tells which parts of this file have space.
    pub fn tells_extents(&self) -> bool {
        matches!(extents::missing(&self.file, 0, 1), Ok(Some(_)))
    }

    /// Reads into `buf` until it is full or the file ends; returns how many bytes were read.
    fn read_to_end(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let message = format!("read {} bytes at {offset} of {}", buf.len(), self.name);
                    return Err(Error::io(message, error));
                }
            }
        }
        Ok(done)
    }
}

/// Whether a file that was opened with O_DIRECT can be read by sectors: the second one, into memory that is aligned to no
/// more than a sector. Where disks have larger ones it cannot.
fn reads_sectors(direct: &File) -> bool {
    let mut space = [0; 4 * SECTOR_LEN];
    let to_sector = space.as_ptr().align_offset(SECTOR_LEN);
    let odd = usize::from((space.as_ptr().addr() + to_sector).is_multiple_of(2 * SECTOR_LEN));
    let start = to_sector + odd * SECTOR_LEN;
    let buf = &mut space[start..start + SECTOR_LEN];
    rustix::io::retry_on_intr(|| rustix::io::pread(direct, &mut *buf, SECTOR_BYTES)).is_ok()
}

impl AsFd for FileStorage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Storage for FileStorage {
    fn size(&self) -> Result<u64> {
        let end = self.file.metadata().context(|| format!("stat {}", self.name))?;
        Ok(end.len())
    }

    fn allocated(&self) -> Result<u64> {
        let metadata = self.file.metadata().context(|| format!("stat {}", self.name))?;
        Ok(metadata.blocks() * 512)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let done = self.read_to_end(offset, buf)?;
        buf[done..].fill(0);
        Ok(())
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        match self.read_to_end(offset, buf)? {
            done if done == buf.len() => Ok(()),
            _ => Err(ends_early(&self.name, offset, buf.len(), self.size()?)),
        }
    }

    fn goes_direct(&self) -> bool {
        self.direct.is_some()
    }

    fn direct_file(&self) -> Option<DirectFile<'_>> {
        Some(DirectFile { file: self.direct.as_ref()?.as_fd(), gate: self.gate.as_deref()? })
    }

    fn cached_file(&self) -> Option<BorrowedFd<'_>> {
        // Of other file systems io_uring has threads of its own wait.
        self.is_local.get_or_init(|| is_on_local_disk(&self.file)).then(|| self.as_fd())
    }

    fn whole_file(&self) -> Option<BorrowedFd<'_>> {
        let takes_all = || self.opens_directly && self.direct.as_ref().is_none_or(reads_sectors);
        self.takes_all.get_or_init(takes_all).then(|| self.as_fd())
    }

    fn read_by(&self, way: Way, offset: u64, buf: &mut [u8]) -> Result<()> {
        if let (Way::Direct, Some(direct)) = (way, &self.direct)
            && rustix::io::retry_on_intr(|| rustix::io::pread(direct, &mut *buf, offset)) == Ok(buf.len())
        {
            return Ok(());
        }
        // Not aligned enough for the host's disk, or short, or in vain: the other way knows, and says, what is wrong.
        self.read_exact_at(offset, buf)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        match self.cached.read(&self.file, offset, buf) {
            Found::All => Ok(true),
            Found::ReadIt => self.read_exact_at(offset, buf).map(|()| true),
            Found::NotAll => Ok(false),
        }
    }

    fn write_by(&self, way: Way, offset: u64, buf: &[u8]) -> Result<()> {
        let (Way::Direct, Some(direct)) = (way, &self.direct) else { return self.write_at(offset, buf) };
        match self.host.write_at(direct.as_fd(), offset, buf) {
            // Not aligned enough for the host's disk: nothing was written, or a part, which is written again.
            Err(Errno::INVAL) => self.write_at(offset, buf),
            result => {
                result.context(|| format!("write {} bytes directly at {offset} of {}", buf.len(), self.name))
            }
        }
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let write = || self.host.write_at(self.as_fd(), offset, buf);
        self.gate
            .as_ref()
            .map_or_else(write, |gate| gate.cached(write))
            .context(|| format!("write {} bytes at {offset} of {}", buf.len(), self.name))
    }

    fn write_durable_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.host
            .write_durable_at(self.as_fd(), offset, buf)
            .context(|| format!("write {} bytes through at {offset} of {}", buf.len(), self.name))
    }

    fn start_writing(&self) {
        // What is dirty is given to the disk, and nobody waits for it; what is clean is forgotten.
        let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed);
    }

    fn check_written(&self) -> Result<()> {
        lost_writes::check(self.as_fd()).context(|| format!("write what waits to {}", self.name))
    }

    fn sync(&self) -> Result<()> {
        self.host.sync_data(self.as_fd()).context(|| format!("sync {}", self.name))
    }

    fn drop_cache(&self) -> Result<()> {
        rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed)
            .context(|| format!("drop the cache of {}", self.name))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.host
            .set_len(self.as_fd(), len)
            .context(|| format!("set the size of {} to {len} bytes", self.name))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.host
            .allocate(self.as_fd(), offset, len)
            .context(|| format!("reserve {len} bytes at {offset} of {}", self.name))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.host
            .punch(self.as_fd(), offset, len)
            .context(|| format!("punch {len} bytes at {offset} of {}", self.name))
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(Error::io(format!("seek data from {offset} in {}", self.name), errno.into())),
        }
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(found) => Ok(found),
            Err(Errno::NXIO) => Ok(offset),
            Err(errno) => Err(Error::io(format!("seek a hole from {offset} in {}", self.name), errno.into())),
        }
    }

    fn unallocated(&self, offset: u64, len: u64) -> Result<u64> {
        match extents::missing(&self.file, offset, len) {
            Ok(Some(missing)) => Ok(missing),
            // A tmpfs, say. There what is written has its space, and what is reserved counts as missing.
            Ok(None) => super::unallocated_by_holes(self, offset, len),
            Err(errno) => Err(Error::io(format!("look up the space of {}", self.name), errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn storage() -> FileStorage {
        FileStorage::new(tempfile::tempfile().expect("a temporary file"), "test file")
    }

    #[test]
    fn reads_past_the_end_are_zeroes() {
        let storage = storage();
        storage.write_at(0, b"abc").expect("write");
        let mut buf = [7; 6];
        storage.read_at(1, &mut buf).expect("read");
        assert_eq!(&buf, b"bc\0\0\0\0");
        storage.read_at(1 << 40, &mut buf).expect("read far past the end");
        assert_eq!(buf, [0; 6]);
    }

    /// A file on a disk, not in memory.
    fn on_disk() -> (File, File) {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a temporary file");
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT;
        let direct = rustix::fs::open(file.path(), flags, rustix::fs::Mode::empty()).expect("open directly");
        (file.into_file(), direct.into())
    }

    #[test]
    fn both_ways_show_the_same_bytes_at_any_alignment() {
        let (file, direct) = on_disk();
        let storage = FileStorage::new(file, "test file").with_direct(Some(direct));
        assert!(storage.goes_direct());
        storage.set_len(1 << 16).expect("size it");
        let mut oracle = vec![0; 1 << 16];
        // Aligned by a page, by a sector and not at all, in memory and in the file.
        let memory: Vec<u8> = (0..1 << 15).map(|at| u8::try_from(at % 251).expect("small")).collect();
        for (round, (offset, from, len)) in
            [(0, 0, 8192), (4096, 512, 4096), (512, 0, 1024), (1, 3, 5000), (4095, 1, 2), (60_000, 7, 5536)]
                .into_iter()
                .enumerate()
        {
            let way = if round % 2 == 0 { Way::Direct } else { Way::Cached };
            for way in [way, Way::Direct] {
                storage.write_by(way, offset as u64, &memory[from..from + len]).expect("write");
            }
            oracle[offset..offset + len].copy_from_slice(&memory[from..from + len]);
            for way in [Way::Cached, Way::Direct] {
                let mut seen = vec![0; 1 << 16];
                storage.read_by(way, 0, &mut seen).expect("read");
                assert_eq!(seen, oracle, "round {round}, {way:?}");
            }
        }
        let error = storage.read_by(Way::Direct, 1 << 16, &mut [0; 512]).expect_err("past the end");
        assert_eq!(error.kind(), ErrorKind::Io);
    }

    #[test]
    fn another_file_is_not_taken_for_the_same_one_opened_directly() {
        let ((file, _), (_, other)) = (on_disk(), on_disk());
        let storage = FileStorage::new(file, "test file").with_direct(Some(other));
        assert!(!storage.goes_direct());
        storage.write_by(Way::Direct, 0, b"abc").expect("write");
        assert_eq!(storage.size().expect("stat"), 3);
    }

    #[test]
    fn bytes_that_must_be_there_are_not_made_up() {
        let storage = storage();
        storage.write_at(0, b"abc").expect("write");
        let mut buf = [7; 2];
        storage.read_exact_at(1, &mut buf).expect("read");
        assert_eq!(&buf, b"bc");
        storage.read_exact_at(3, &mut []).expect("nothing at the end");
        let error = storage.read_exact_at(2, &mut buf).expect_err("one byte is missing");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(error.to_string(), "read 2 bytes at 2 of test file: it ends at byte 3, before them");
    }

    #[test]
    fn punching_gives_space_back_and_leaves_zeroes() {
        let storage = storage();
        storage.write_durable_at(0, &[1; 65536]).expect("write");
        let before = storage.allocated().expect("stat");
        storage.punch(4096, 32768).expect("punch");
        assert!(storage.allocated().expect("stat") < before);
        assert_eq!(storage.size().expect("stat"), 65536);
        let mut buf = [7; 2];
        storage.read_at(4095, &mut buf).expect("read");
        assert_eq!(buf, [1, 0]);
    }

    #[test]
    fn holes_and_data_are_found() {
        let storage = storage();
        storage.set_len(1 << 20).expect("grow");
        storage.write_at(512 << 10, &[1; 4096]).expect("write");
        assert_eq!(storage.next_data(0).expect("seek"), Some(512 << 10));
        assert_eq!(storage.next_hole(512 << 10).expect("seek"), (512 << 10) + 4096);
        assert_eq!(storage.next_data(1 << 20).expect("seek"), None);
        assert_eq!(storage.next_hole(1 << 20).expect("seek"), 1 << 20);
    }
}
