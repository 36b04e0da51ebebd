//! The host's disk: [`Host`] is the seam through which everything changes it, [`Storage`] one file of it as an array of
//! bytes, and the only way in which the engine touches it.
//!
//! Crash and fault tests replace either. [`Storage`] promises what a Linux file promises: a write may be
//! lost or torn at 512 bytes until a later [`Storage::sync`] of the same storage has returned; writes that are not
//! synced reach the disk in any order.

pub mod aio;
mod cached;
mod extents;
mod file;
pub mod gate;
mod host;
mod io_priority;
mod latch;
mod lost_writes;
mod mem;
mod room;

use std::fmt::Debug;
use std::os::fd::BorrowedFd;

use crate::error::{Error, ErrorKind, Result};

pub use file::FileStorage;
pub use host::{Host, RealHost, open_beneath};
pub use io_priority::{IoPriority, Urgency};
pub use latch::{Latch, LatchedStorage};
pub use mem::MemStorage;
pub use room::{HostSpace, Room, Taken};

/// See [`Storage::direct_file`].
#[derive(Clone, Copy, Debug)]
pub struct DirectFile<'a> {
    /// Opened with O_DIRECT.
    pub file: BorrowedFd<'a>,
    /// What keeps writes through the host's cache away from those under way.
    pub gate: &'a gate::Gate,
}

/// How bytes travel between memory and the host's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through the host's page cache.
    Cached,
    /// Past it, where the host's file system and the alignment of the request allow that; else through it. Both ways show
    /// the same bytes: what is cached of a range is written back before, and forgotten after.
    Direct,
}

/// An array of bytes that several threads may read and write at the same time. All offsets and lengths are in bytes,
/// at any alignment; a length of 0 does nothing.
pub trait Storage: Send + Sync + Debug {
    /// Bytes of the array: its end, one past the last byte.
    fn size(&self) -> Result<u64>;

    /// Bytes that the array takes of the host's disk.
    fn allocated(&self) -> Result<u64>;

    /// Fills `buf` with what lies at `offset`. Holes and all that lies past the end read as zeroes.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Fills `buf` with what lies at `offset`, all of which must lie before the end: for bytes that have to be there, so
    /// that a file which somebody has cut does not show zeroes in their place.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the array ends earlier; whatever `buf` holds then means nothing.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = self.size()?;
        match offset.checked_add(buf.len() as u64) {
            Some(wanted) if wanted <= end => self.read_at(offset, buf),
            _ => Err(ends_early("the array", offset, buf.len(), end)),
        }
    }

    /// Whether [`Way::Direct`] goes past the host's cache, so that every request waits for the host's disk.
    fn goes_direct(&self) -> bool {
        false
    }

    /// The file by which [`Way::Direct`] goes, if requests may be put to it without a thread that waits for them
    /// ([`aio`]): it is [held](aio::hold), and nobody has to see each change. A write passes its gate.
    fn direct_file(&self) -> Option<DirectFile<'_>> {
        None
    }

    /// The file by which [`Way::Cached`] goes, if its file system can be asked for reads of it that no thread waits for,
    /// neither here nor in the kernel. It stays the same.
    fn cached_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The file of the host that the array is, if whoever opens that very file can do to it all that a disk allows: read and
    /// write at any alignment through the host's cache, and with O_DIRECT in sectors of 512 bytes. It is open for reading
    /// and writing. Asking for the first time may take a read of the host's disk.
    fn whole_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// [`Storage::read_exact_at`] by `way`.
    ///
    /// # Errors
    /// The same.
    fn read_by(&self, _way: Way, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_exact_at(offset, buf)
    }

    /// [`Storage::read_exact_at`] out of memory: says whether it could do so without waiting for the host's disk. If not,
    /// whatever `buf` holds means nothing, and the host may have begun to fetch what is missing.
    ///
    /// # Errors
    /// The same.
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.read_exact_at(offset, buf).map(|()| true)
    }

    /// [`Storage::write_at`] by `way`. Neither makes anything durable.
    ///
    /// # Errors
    /// The same.
    fn write_by(&self, _way: Way, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_at(offset, buf)
    }

    /// Writes all of `buf` at `offset`; the array grows as needed. After an error any part may have been written.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Writes all of `buf` at `offset` and returns once it, and it alone, survives a crash.
    fn write_durable_at(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Has the host begin to write to its disk what waits in its cache, so that a sync which follows soon waits less. Promises
    /// nothing and fails in nothing.
    fn start_writing(&self) {}

    /// Learns without a sync whether the host has failed to write what waited in its cache: since then a read may show what was
    /// there before.
    ///
    /// # Errors
    /// What the next sync would have failed with; it counts as one that failed.
    fn check_written(&self) -> Result<()> {
        Ok(())
    }

    /// Makes everything that was completed before the call survive a crash. After an error the state of what was not
    /// yet durable is unknown, and a second call that succeeds proves nothing: see [`LatchedStorage`].
    fn sync(&self) -> Result<()>;

    /// Forgets what the host's cache holds of the array, so that the next read shows what is on the disk. Called after
    /// [`Storage::sync`]: what a failed sync of an earlier process left in the cache, and only there, must not be taken
    /// for durable.
    fn drop_cache(&self) -> Result<()>;

    /// Sets the end. What lies beyond a smaller end is gone; a larger one adds a hole.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Reserves space on the host's disk, so that a later write there cannot fail for want of room. Contents and end
    /// stay as they are.
    fn allocate(&self, offset: u64, len: u64) -> Result<()>;

    /// Gives the space of a range back to the host's disk; it then reads as zeroes. The end stays.
    fn punch(&self, offset: u64, len: u64) -> Result<()>;

    /// The first byte at or after `offset` that does not lie in a hole, or `None`. A hint: data may be all zeroes.
    fn next_data(&self, offset: u64) -> Result<Option<u64>>;

    /// [`Storage::next_data`] of an array that reaches to `end` or beyond, so that what somebody has cut off does not pass
    /// for a hole.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if there is no data at or after `offset` and the array ends before `end`.
    fn next_data_up_to(&self, offset: u64, end: u64) -> Result<Option<u64>> {
        if let Some(found) = self.next_data(offset)? {
            return Ok(Some(found));
        }
        let found = self.size()?;
        if found < end {
            let message = format!("seek data from {offset}: the file ends at byte {found}, it had {end}");
            return Err(Error::new(ErrorKind::Io, message));
        }
        Ok(None)
    }

    /// The first byte at or after `offset` that lies in a hole; the end counts as one.
    fn next_hole(&self, offset: u64) -> Result<u64>;

    /// Bytes of a range that have no space of their own on the host's disk yet, so that a write to them needs some. What
    /// was only reserved may count as missing.
    fn unallocated(&self, offset: u64, len: u64) -> Result<u64> {
        unallocated_by_holes(self, offset, len)
    }
}

/// [`Storage::unallocated`] as far as holes tell.
fn unallocated_by_holes(storage: &(impl Storage + ?Sized), offset: u64, len: u64) -> Result<u64> {
    let end = offset.saturating_add(len);
    let (mut at, mut missing) = (offset, 0);
    while at < end {
        let data = storage.next_data(at)?.unwrap_or(end).clamp(at, end);
        missing += data - at;
        let hole = if data < end { storage.next_hole(data)? } else { end };
        // What is punched meanwhile answers with its own beginning; then the rest counts as missing.
        if hole < end && hole <= data {
            return Ok(missing + (end - data));
        }
        at = hole.min(end);
    }
    Ok(missing)
}

/// What is said of a file that was cut while it was in use.
fn ends_early(name: &str, offset: u64, len: usize, end: u64) -> Error {
    let message = format!("read {len} bytes at {offset} of {name}: it ends at byte {end}, before them");
    Error::new(ErrorKind::Io, message)
}
