//! Requests that are one request to the host's disk, and that no thread has to wait for.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Fs;
use super::counters::Operation;
use super::handles::HandleId;
use super::open_disks::OpenDisk;
use super::open_file::OpenFile;
use crate::storage::DirectFile;
use crate::storage::aio::Transfer;
use crate::store::Place;
use crate::units::SECTOR_BYTES;

/// A request of which all bytes lie, one after the other, in one file of the host: a direct one in that of a disk's own data,
/// or a read in that of its base. It goes back by [`Fs::landed`] or [`Fs::let_go`]. A write has passed the gate of that file.
#[derive(Debug)]
pub struct Placed {
    /// There until it goes back.
    disk: Option<Arc<OpenDisk>>,
    source: Source,
    transfer: Transfer,
    len: u64,
    /// With the room that a write has taken.
    place: Place,
    /// Whether somebody has asked for the file: then the request was put to the kernel.
    is_put: AtomicBool,
}

/// Whose bytes.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// The disk's own: the file is opened with O_DIRECT.
    Own,
    /// Those of its base: the file is read through the host's cache.
    Base,
}

impl Placed {
    /// The file, for whoever puts the request to the kernel now.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.is_put.store(true, Ordering::Relaxed);
        let disk = self.disk.as_ref().expect("there until it goes back").disk();
        let file = match self.source {
            Source::Own => disk.direct_file().map(|DirectFile { file, .. }| file),
            Source::Base => disk.base_file(),
        };
        file.expect("placed only where there is one, and it stays")
    }

    fn in_disk(disk: &Arc<OpenDisk>, source: Source, transfer: Transfer, len: u64, place: Place) -> Self {
        Self { disk: Some(Arc::clone(disk)), source, transfer, len, place, is_put: AtomicBool::new(false) }
    }

    /// Takes the disk away, which others may write to through the cache again.
    fn take(&mut self) -> Option<Arc<OpenDisk>> {
        let disk = self.disk.take()?;
        if self.transfer == Transfer::Write
            && let Some(direct) = disk.disk().direct_file()
        {
            direct.gate.leave();
        }
        Some(disk)
    }

    /// The byte of the file at which it begins.
    pub fn at(&self) -> u64 {
        self.place.at
    }

    /// Which way.
    pub fn transfer(&self) -> Transfer {
        self.transfer
    }
}

impl Drop for Placed {
    /// For a request that panicked: nobody else may wait for it.
    fn drop(&mut self) {
        drop(self.take());
    }
}

impl Fs {
    /// Where a direct request goes, if it is but one request to the host's disk: of an overlay, where all of it is data of
    /// its own; of a plain file, unless it is a write that would probably have to wait for new space. `None`, too, for a write
    /// while others write to that disk through the host's cache. What the map says of it may change while it is under way: a
    /// discard of the same blocks then comes before it or after.
    pub fn place(&self, handle: HandleId, transfer: Transfer, offset: u64, len: u64) -> Option<Placed> {
        if !(offset | len).is_multiple_of(SECTOR_BYTES) {
            return None;
        }
        let file = self.handles.get(handle).ok()?;
        let OpenFile::Disk(disk) = &*file else { return None };
        let direct = disk.disk().direct_file()?;
        let place = disk.disk().place(transfer, offset, len)?;
        if transfer == Transfer::Write && !direct.gate.enter() {
            return None;
        }
        Some(Placed::in_disk(disk, Source::Own, transfer, len, place))
    }

    /// Where a read goes, direct or not, if all of it lies in the base of an overlay. It then needs no alignment. A write of
    /// the same blocks while it is under way comes after it.
    pub fn place_in_base(&self, handle: HandleId, offset: u64, len: u64) -> Option<Placed> {
        let file = self.handles.get(handle).ok()?;
        let OpenFile::Disk(disk) = &*file else { return None };
        let place = disk.disk().place_in_base(offset, len)?;
        Some(Placed::in_disk(disk, Source::Base, Transfer::Read, len, place))
    }

    /// All of the request is done, and is to be answered.
    pub fn landed(&self, placed: Placed) {
        let operation = match placed.transfer {
            Transfer::Read => Operation::Read,
            Transfer::Write => Operation::Write,
        };
        if let (Transfer::Write, Some(disk)) = (placed.transfer, &placed.disk) {
            // Done already: what is left is that the background flushes it.
            disk.change(|disk| disk.placed_write_ended(true));
        }
        self.counters.count(operation, placed.len, &Ok(()));
        self.asynchronous.fetch_add(1, Ordering::Relaxed);
        self.give_back(placed);
    }

    /// The request is not done, or not so.
    pub fn let_go(&self, placed: Placed) {
        if let (Transfer::Write, Some(disk)) = (placed.transfer, &placed.disk)
            && placed.is_put.load(Ordering::Relaxed)
        {
            disk.disk().placed_write_ended(false);
        }
        self.give_back(placed);
    }

    fn give_back(&self, mut placed: Placed) {
        if let Some(disk) = placed.take()
            && let Err(error) = self.disks.put(disk)
        {
            log::error!("{error}");
        }
    }
}
