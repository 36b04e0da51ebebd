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

    /// Whether a write takes new space, by whole pages. Directly, each such would wait for the host to find space for the one
    /// before. An overwrite is better done directly, though the host may have refused it: then its cache has these pages, and
    /// loses them. The host is asked of that range alone, not where the next hole is: of a large disk that is full it would go
    /// through all extents up to the end.
    fn fills(&self, offset: u64, len: u64) -> bool {
        let is_new = || self.storage.unallocated(offset, len).is_ok_and(|missing| missing > 0);
        (offset | len).is_multiple_of(CACHE_PAGE_BYTES) && is_new()
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
mod tests;
