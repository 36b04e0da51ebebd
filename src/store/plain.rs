//! A disk that is one file: of an instance made without copy-on-write, or a local disk over nothing.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use super::placing::{Place, Trials};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::overlay::CACHE_PAGE_BYTES;
use crate::storage::aio::Transfer;
use crate::storage::{DirectFile, Latch, LatchedStorage, Room, Storage, Taken, Way};
use crate::units::{SECTOR_BYTES, check_disk_bytes};

/// Bytes that a host filesystem gives to a file at least.
const HOST_BLOCK_BYTES: u64 = 4096;

/// How much later than a change of a file its time of change may be noted, as hosts' clocks tick.
const CLOCK_STEP: Duration = Duration::from_secs(1);

/// A raw file, open for service. All methods may be called by several threads, and promise what those of
/// [`crate::overlay::Overlay`] do.
#[derive(Debug)]
pub struct PlainDisk {
    name: String,
    storage: LatchedStorage,
    latch: Latch,
    /// Bytes now; changed only with `growing` held. Others may write to the file as well while `is_shared` says so, and
    /// then it is at least this.
    size: AtomicU64,
    growing: Mutex<()>,
    /// Writes take from it, for the file alone knows where it has space already.
    room: Arc<Room>,
    /// Which writes are worth a try without a thread that waits.
    trials: Trials,
    /// Whether others than we read and write the file.
    is_shared: AtomicBool,
    /// When a flush of the shared file last began, and the time of its last change then. Guards both.
    flushed: Mutex<Option<(SystemTime, (i64, u64))>>,
}

impl PlainDisk {
    /// Takes the storage of a disk; `name` is what messages call it. A file that does not end with a sector, because others
    /// wrote past its end, grows to the end of that sector.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the file's size cannot be a disk's.
    pub fn open(name: &str, inner: Box<dyn Storage>) -> Result<Self> {
        // What a failed sync of an earlier daemon left in the host's cache, and only there, must not be read as written.
        inner.sync()?;
        inner.drop_cache()?;
        let end = inner.size()?;
        if !end.is_multiple_of(SECTOR_BYTES) {
            inner.set_len(end.next_multiple_of(SECTOR_BYTES))?;
            inner.sync()?;
        }
        Self::adopt(name, inner)
    }

    /// Takes the storage of a disk that an earlier process of the same mount had open, no sync of which had failed: what is
    /// in the host's cache counts.
    ///
    /// # Errors
    /// Those of [`PlainDisk::open`].
    pub fn adopt(name: &str, inner: Box<dyn Storage>) -> Result<Self> {
        let size = inner.size()?;
        check_disk_bytes(size.next_multiple_of(SECTOR_BYTES))
            .map_err(|error| Error::caused(ErrorKind::Corrupt, format!("open disk {name}"), error))?;
        let latch = Latch::new();
        let storage = LatchedStorage::new(inner, latch.clone());
        Ok(Self {
            name: name.to_owned(),
            storage,
            latch,
            size: AtomicU64::new(size),
            growing: Mutex::new(()),
            room: Arc::new(Room::unlimited()),
            trials: Trials::default(),
            is_shared: AtomicBool::new(false),
            flushed: Mutex::new(None),
        })
    }

    /// The file, for others to read and write beside us: at any alignment through the host's cache, with O_DIRECT in sectors.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the host's file system does not allow that; [`ErrorKind::NoSpace`] if the room does not
    /// hold all that the file may still take: others do not ask it.
    pub fn whole_file(&self) -> Result<BorrowedFd<'_>> {
        self.room.check_for(&self.storage, self.size())?;
        self.storage.whole_file().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "its file cannot be read directly in sectors of 512 bytes")
        })
    }

    /// Notes that others write to the [file](Self::whole_file) from now on: it is asked for its size each time, for it may
    /// grow, and for what has to be flushed.
    pub fn share(&self) {
        self.is_shared.store(true, Ordering::Release);
    }

    /// Whether others, of whose writes we know nothing, may have written since a flush last began.
    pub fn was_changed_by_others(&self) -> bool {
        if !self.is_shared.load(Ordering::Acquire) {
            return false;
        }
        let (Some((begun, then)), Ok(now)) = (*self.flushed.lock(), self.changed()) else { return true };
        let last = u64::try_from(then.0)
            .map_or(SystemTime::UNIX_EPOCH, |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        // A change in the very moment of the flush may carry the time of one before it.
        now != then || last + CLOCK_STEP >= begun
    }

    /// When the file was last changed, in seconds and nanoseconds. No user can set that time.
    fn changed(&self) -> Result<(i64, u64)> {
        let file = self.storage.whole_file();
        let file = file.ok_or_else(|| Error::new(ErrorKind::Unsupported, "not a file of the host"))?;
        let stat = rustix::fs::fstat(file).context(|| format!("stat disk {}", self.name))?;
        Ok((stat.st_ctime, stat.st_ctime_nsec))
    }

    /// Has writes take from `room`; without that the host's disk alone is the limit.
    #[must_use]
    pub fn within(self, room: Arc<Room>) -> Self {
        Self { room, ..self }
    }

    /// Bytes of the disk now.
    pub fn size(&self) -> u64 {
        let known = self.size.load(Ordering::Acquire);
        if self.is_shared.load(Ordering::Acquire) {
            self.storage.size().map_or(known, |end| end.max(known))
        } else {
            known
        }
    }

    /// Whether a sync has failed, so that writes are refused until the disk is opened again.
    pub fn is_latched(&self) -> bool {
        self.latch.is_closed()
    }

    /// Bytes of the host's disk that it takes.
    ///
    /// # Errors
    /// Those of the host.
    pub fn allocated(&self) -> Result<u64> {
        self.storage.allocated()
    }

    /// Fills `buf` with what lies at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] beyond the end; [`ErrorKind::Io`] if somebody has cut the file; those of the host.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_by(Way::Cached, offset, buf)
    }

    /// [`PlainDisk::read_at`] by `way`.
    ///
    /// # Errors
    /// The same.
    pub fn read_by(&self, way: Way, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        self.storage.read_by(way, offset, buf)
    }

    /// See [`crate::overlay::Overlay::read_now`].
    ///
    /// # Errors
    /// Those of [`PlainDisk::read_at`].
    pub fn read_now(&self, way: Way, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.check_range(offset, buf.len() as u64)?;
        if way == Way::Direct && self.storage.goes_direct() {
            return Ok(false);
        }
        self.storage.read_now(offset, buf)
    }

    /// See [`crate::overlay::Overlay::place`]. Whether a write takes new space the host alone knows. So each takes room
    /// here, as in [`PlainDisk::write_by`], and has it until its end, whatever the host's file system does of what it was
    /// asked not to do; and only where there is plenty. What becomes of it is told to its `trials`.
    pub fn place(&self, transfer: Transfer, offset: u64, len: u64) -> Option<Place> {
        self.check_range(offset, len).ok()?;
        if len == 0 {
            return None;
        }
        if transfer == Transfer::Read {
            return Some(Place::at(offset));
        }
        self.latch.check().ok()?;
        // Others who write through the host's cache pass no gate.
        if self.is_shared.load(Ordering::Acquire) || !self.trials.may_try() {
            return None;
        }
        let room = self.room.take_at_once(host_bytes_touched(offset, len).1)?;
        Some(Place::with_room(offset, room))
    }

    /// To be told what has become of each write that [`PlainDisk::place`] has offered.
    pub(super) fn trials(&self) -> &Trials {
        &self.trials
    }

    /// See [`Storage::direct_file`].
    pub fn direct_file(&self) -> Option<DirectFile<'_>> {
        self.storage.direct_file()
    }

    /// See [`crate::overlay::Overlay::writes_to_memory`]; here the host alone knows what is an overwrite.
    pub fn writes_to_memory(&self, way: Way, offset: u64, len: u64) -> bool {
        (way == Way::Cached || !self.storage.goes_direct())
            && (offset | len).is_multiple_of(CACHE_PAGE_BYTES)
            && !self.direct_file().is_some_and(|direct| direct.gate.is_in_use())
    }

    /// Writes all of `buf` at `offset`; survives the host after a later [`PlainDisk::flush`].
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] beyond the end (nothing is written then); [`ErrorKind::NoSpace`]; [`ErrorKind::Io`]
    /// if the host's disk fails, or has failed to sync.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_by(Way::Cached, offset, buf)
    }

    /// [`PlainDisk::write_at`] by `way`.
    ///
    /// # Errors
    /// The same.
    pub fn write_by(&self, way: Way, offset: u64, buf: &[u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.latch.check()?;
        self.check_range(offset, len)?;
        let _taken = self.take_room(offset, len)?;
        let fills = self.trials.are_refused() && self.fills(offset, len);
        self.storage.write_by(if fills { Way::Cached } else { way }, offset, buf)
    }

    /// Whether a write fills a hole, by whole pages. Directly, each such would wait for the host to find space for the one before.
    /// An overwrite is better done directly, though the host may have refused it: then its cache has these pages, and loses them.
    fn fills(&self, offset: u64, len: u64) -> bool {
        let has_hole = || self.storage.next_hole(offset).is_ok_and(|hole| hole < offset + len);
        (offset | len).is_multiple_of(CACHE_PAGE_BYTES) && has_hole()
    }

    /// Makes `len` bytes at `offset` zeroes and gives their space back to the host.
    ///
    /// # Errors
    /// Those of [`PlainDisk::write_at`].
    pub fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.latch.check()?;
        self.check_range(offset, len)?;
        self.storage.punch(offset, len)
    }

    /// Reserves space on the host's disk for later writes.
    ///
    /// # Errors
    /// Those of [`PlainDisk::write_at`].
    pub fn preallocate(&self, offset: u64, len: u64) -> Result<()> {
        self.latch.check()?;
        self.check_range(offset, len)?;
        let _taken = self.take_room(offset, len)?;
        self.storage.allocate(offset, len)
    }

    /// Makes every write that was completed before the call durable.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the host's disk fails to sync: from then on writes are refused until the disk is opened
    /// again.
    pub fn flush(&self) -> Result<()> {
        if self.is_shared.load(Ordering::Acquire) {
            *self.flushed.lock() = self.changed().ok().map(|changed| (SystemTime::now(), changed));
        }
        self.storage.sync().context(|| format!("flush disk {}", self.name))
    }

    /// Grows the disk; what is new reads as zeroes. Durable on return.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if `size` is smaller than now, no multiple of 512, or above 16 TiB.
    pub fn grow(&self, size: u64) -> Result<()> {
        check_disk_bytes(size)?;
        let _held = self.growing.lock();
        let now = self.size();
        if size < now {
            let message = format!("a disk cannot shrink, from {now} to {size} bytes");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if size > now {
            self.storage.set_len(size)?;
            self.flush()?;
            self.size.store(size, Ordering::Release);
        }
        Ok(())
    }

    /// The first byte at or after `offset` that does not lie in a hole, or `None`.
    ///
    /// # Errors
    /// Those of the host.
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        let size = self.size();
        if offset >= size {
            return Ok(None);
        }
        self.storage.next_data_up_to(offset, size).context(|| self.name.clone())
    }

    /// The first byte at or after `offset` that lies in a hole; the end counts as one.
    ///
    /// # Errors
    /// Those of the host.
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        if offset >= self.size() {
            return Ok(offset);
        }
        self.storage.next_hole(offset)
    }

    /// Room for a write.
    fn take_room(&self, offset: u64, len: u64) -> Result<Taken<&Room>> {
        let (start, len) = host_bytes_touched(offset, len);
        let taken = self.room.take_for(&self.storage, start, len);
        taken.context(|| format!("write at {offset} of disk {}", self.name))
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!("{len} bytes at {offset} reach beyond the end of disk {} ({size} bytes)", self.name),
            )),
        }
    }
}

/// A range filled up to blocks of the usual host filesystems: its start and its length.
fn host_bytes_touched(offset: u64, len: u64) -> (u64, u64) {
    let start = offset - offset % HOST_BLOCK_BYTES;
    (start, (offset + len).next_multiple_of(HOST_BLOCK_BYTES) - start)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt;

    use rustix::fs::OFlags;

    use super::*;
    use crate::storage::{FileStorage, HostSpace};

    fn disk() -> PlainDisk {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        PlainDisk::open("web-3/disk", Box::new(FileStorage::new(file, "disk.raw"))).unwrap()
    }

    #[test]
    fn bytes_come_back_and_zeroed_ones_take_no_space() {
        let disk = disk();
        disk.write_at(1000, &[7; 100_000]).unwrap();
        disk.flush().unwrap();
        let allocated = disk.allocated().unwrap();
        disk.zero(4000, 90_000).unwrap();
        assert!(disk.allocated().unwrap() < allocated);
        let mut buf = [1; 3];
        for (offset, expected) in [(999, [0, 7, 7]), (3998, [7, 7, 0]), (93_999, [0, 7, 7])] {
            disk.read_at(offset, &mut buf).unwrap();
            assert_eq!(buf, expected);
        }
        assert_eq!(disk.next_data(0).unwrap(), Some(0));
        assert_eq!(disk.next_data(200_000).unwrap(), None);
        assert_eq!(disk.next_hole(1 << 20).unwrap(), 1 << 20);
    }

    /// A file on a disk, of which a twentieth of 256 KiB is kept, and what is free of these.
    fn on_disk() -> (PlainDisk, Arc<AtomicU64>) {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let direct = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(file.path())
            .unwrap();
        let storage = FileStorage::new(file.into_file(), "disk.raw").with_direct(Some(direct));
        let free = Arc::new(AtomicU64::new(256 << 10));
        let available = Arc::clone(&free);
        let space = move || {
            let free = available.load(Ordering::Relaxed);
            Ok(HostSpace { total: 256 << 10, free, available: free })
        };
        let room = Arc::new(Room::new(space, Some(16 << 10)));
        (PlainDisk::open("web-3/disk.local", Box::new(storage)).unwrap().within(room), free)
    }

    #[test]
    fn a_write_is_offered_only_with_room_for_all_of_it_which_it_keeps_until_its_end() {
        let (disk, free) = on_disk();
        assert!(disk.direct_file().is_some(), "/var/tmp is on no local disk");
        let offered = |offset, len| disk.place(Transfer::Write, offset, len);
        assert!(offered(0, 4096).is_none(), "nobody has looked at the host's file system yet");
        disk.write_by(Way::Direct, 0, &[1; 4096]).unwrap();
        for (offset, len) in [(0, 4096), (512, 512), ((1 << 20) - 512, 512)] {
            assert_eq!(offered(offset, len).unwrap().at, offset);
        }
        assert!(offered((1 << 20) - 512, 1024).is_none() && offered(0, 0).is_none());
        let held = offered(0, 128 << 10).unwrap();
        disk.room.look().unwrap();
        assert!(offered(128 << 10, 128 << 10).is_none(), "there is less than that above the reserve");
        drop(held);
        disk.room.look().unwrap();
        drop(offered(128 << 10, 128 << 10).unwrap());
        // A write by a thread that waits needs no room where it has space.
        free.store(16 << 10, Ordering::Relaxed);
        disk.room.look().unwrap();
        assert!(offered(0, 4096).is_none());
        disk.write_by(Way::Direct, 0, &[2; 4096]).unwrap();
        assert_eq!(disk.write_by(Way::Direct, 8192, &[2; 4096]).unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(disk.place(Transfer::Read, 0, 4096).unwrap().at, 0);
    }

    /// A file that is being filled took a fifth of what one took that was filled through the cache.
    #[test]
    fn what_fills_a_file_goes_through_the_cache_and_lands_before_what_goes_directly() {
        let (disk, _) = on_disk();
        disk.trials.failed();
        disk.write_by(Way::Direct, 0, &[1; 8192]).unwrap();
        disk.write_by(Way::Direct, 512, &[2; 512]).unwrap();
        let mut seen = [0; 8192];
        disk.read_by(Way::Direct, 0, &mut seen).unwrap();
        assert!(seen[..512] == [1; 512] && seen[512..1024] == [2; 512] && seen[1024..] == [1; 7168]);
    }

    #[test]
    fn no_write_is_offered_while_others_write_to_the_file_or_a_sync_has_failed() {
        let (disk, _) = on_disk();
        disk.write_at(0, &[1; 4096]).unwrap();
        assert!(disk.place(Transfer::Write, 0, 4096).is_some());
        disk.latch.close();
        assert!(disk.place(Transfer::Write, 0, 4096).is_none());
        let (disk, _) = on_disk();
        disk.write_at(0, &[1; 4096]).unwrap();
        disk.share();
        assert!(disk.place(Transfer::Write, 0, 4096).is_none());
    }

    #[test]
    fn only_whole_pages_through_the_cache_count_as_memory_and_only_while_no_direct_write_is_under_way() {
        let (disk, _) = on_disk();
        let to_memory = |way, offset, len| disk.writes_to_memory(way, offset, len);
        assert!(to_memory(Way::Cached, 4096, 8192));
        for (way, offset, len) in [(Way::Direct, 0, 4096), (Way::Cached, 512, 4096), (Way::Cached, 0, 100)] {
            assert!(!to_memory(way, offset, len), "{way:?} {len} at {offset}");
        }
        let direct = disk.direct_file().unwrap();
        assert!(direct.gate.enter());
        assert!(!to_memory(Way::Cached, 4096, 8192));
        direct.gate.leave();
        assert!(to_memory(Way::Cached, 4096, 8192));
    }

    #[test]
    fn nothing_reaches_beyond_the_end_and_only_growing_moves_it() {
        let disk = disk();
        for (offset, len) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 1)] {
            assert_eq!(disk.zero(offset, len).unwrap_err().kind(), ErrorKind::OutOfRange);
            assert_eq!(disk.preallocate(offset, len).unwrap_err().kind(), ErrorKind::OutOfRange);
        }
        assert_eq!(disk.write_at((1 << 20) - 1, &[1, 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(disk.read_at((1 << 20) - 1, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
        for bad in [0, 512, (1 << 20) + 1, u64::MAX] {
            assert_eq!(disk.grow(bad).unwrap_err().kind(), ErrorKind::Invalid);
        }
        assert_eq!(disk.size(), 1 << 20);
        disk.grow(2 << 20).unwrap();
        disk.write_at((2 << 20) - 1, &[9]).unwrap();
    }
}
