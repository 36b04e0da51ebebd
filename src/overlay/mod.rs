//! The engine: one instance's changes over a base, and the whole crash story.
//!
//! [`Overlay`] cuts requests in bytes into runs of blocks in one state; `blocks.rs` knows what a block is made of;
//! `alloc_map.rs` knows the states, in shared memory and on disk; `commit.rs` makes data, then map, durable; `recover.rs`
//! opens what a crash left. Reads take no lock. Lock order, each released before the one on its left: block locks,
//! durable map, uncommitted runs.

mod alloc_map;
mod base;
mod block_locks;
mod blocks;
mod check;
mod commit;
mod durable_map;
mod live_map;
mod map_reader;
mod map_scan;
mod page_bits;
mod recover;
mod states;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use base::BaseImage;
pub use check::{LayerReport, Usage, check as check_layer, repair as repair_layer};
pub use commit::CommitCounts;
pub use durable_map::read_superblock;
pub use map_reader::MapReader;
pub use states::Extent;

use block_locks::BlockLocks;
use blocks::Blocks;
use commit::Commits;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{BaseRef, BlockState, LayerId, Superblock};
use crate::storage::aio::Transfer;
use crate::storage::{DirectFile, Latch, Room, Storage, Way};
use crate::units::{BlockSpan, Geometry};

/// Page of the cache of most hosts, in bytes.
pub const CACHE_PAGE_BYTES: u64 = 4096;

/// The two files of a layer.
#[derive(Debug)]
pub struct LayerFiles {
    /// The blocks in state `Data`: block `n` at byte `n` × block size.
    pub data: Box<dyn Storage>,
    /// Superblock, journal and map pages.
    pub map: Box<dyn Storage>,
}

impl LayerFiles {
    /// Makes all that was written to either file survive a crash.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn sync(&self) -> Result<()> {
        self.map.sync()?;
        self.data.sync()
    }

    /// See [`Storage::start_writing`].
    pub fn start_writing(&self) {
        self.map.start_writing();
        self.data.start_writing();
    }
}

/// File name, within the run directory, of the live map of `layer`.
pub fn live_map_name(layer: LayerId) -> String {
    format!("{layer}.map")
}

/// The layer whose live map has this file name; `None` for any other name.
pub fn layer_of_live_map(name: &str) -> Option<LayerId> {
    name.strip_suffix(".map")?.parse().ok()
}

/// A disk with copy-on-write blocks over a base, open for service. All methods may be called by several threads.
///
/// It behaves as a disk with a volatile write cache. What was written survives the daemon; what was written before a
/// completed [`Overlay::flush`] survives the host. Dropping it is what a crash of the daemon does: [`Overlay::close`]
/// ends it in order.
#[derive(Debug)]
pub struct Overlay {
    name: String,
    /// The geometry at opening; the size may have grown since.
    grid: Geometry,
    /// Bytes of the disk now; changed only with the durable map's lock held.
    size: AtomicU64,
    blocks: Blocks,
    locks: BlockLocks,
    latch: Latch,
    /// Flushes asked for so far.
    flush_tickets: AtomicU64,
    /// Flushes that a completed commit has covered; changed only with the durable map's lock held.
    flushed_tickets: AtomicU64,
    commits: Commits,
}

impl Overlay {
    /// [`Overlay::lay_out`], and syncs both files. The caller makes their names durable.
    ///
    /// # Errors
    /// Those of [`Overlay::lay_out`].
    pub fn create(files: &LayerFiles, layer: LayerId, geometry: Geometry, base: BaseRef) -> Result<()> {
        Self::lay_out(files, layer, geometry, base)?;
        files.sync()
    }

    /// Writes an empty overlay into two new, empty files. It must not be used before [`LayerFiles::sync`].
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the base is larger than the disk; those of the storage.
    pub fn lay_out(files: &LayerFiles, layer: LayerId, geometry: Geometry, base: BaseRef) -> Result<()> {
        if let BaseRef::Image { size, .. } = base
            && size > geometry.size()
        {
            let message = format!(
                "a disk of {} bytes over a base of {size} bytes: must not be smaller",
                geometry.size()
            );
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        files.data.set_len(geometry.data_bytes()).map_err(|error| match error.kind() {
            ErrorKind::OutOfRange => {
                error.with_hint("ext4 holds files of up to 16 TiB less 4 KiB, XFS larger ones")
            }
            _ => error,
        })?;
        durable_map::format(files.map.as_ref(), &Superblock::new(layer, geometry, base))
    }

    /// Has blocks that are written for the first time take from `room`; without that the host's disk alone is the limit.
    #[must_use]
    pub fn within(mut self, room: Arc<Room>) -> Self {
        self.blocks.set_room(room);
        self
    }

    /// Size and block grid of the disk now.
    pub fn geometry(&self) -> Geometry {
        self.grid.resized(self.size()).expect("only sizes that were checked are stored")
    }

    /// Bytes of the disk now.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Bytes of the host's disk that the overlay's data take; its map is not counted.
    ///
    /// # Errors
    /// Those of the host.
    pub fn allocated(&self) -> Result<u64> {
        self.blocks.data().allocated()
    }

    /// Fills `buf` with what lies at byte `offset` of the disk, at any alignment. Takes no lock; a write that is going
    /// on at the same time shows whole, in parts or not at all.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] beyond the end; [`ErrorKind::Io`] if the host's disk fails.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_by(Way::Cached, offset, buf)
    }

    /// [`Overlay::read_at`] by `way`. The base is read through the host's cache all the same.
    ///
    /// # Errors
    /// The same.
    pub fn read_by(&self, way: Way, offset: u64, buf: &mut [u8]) -> Result<()> {
        let geometry = self.geometry();
        geometry.check_range(offset, buf.len() as u64)?;
        let span = geometry.span_touched(offset, buf.len() as u64);
        for extent in self.blocks.map().extents(span) {
            let (at, range) = part_of(geometry, extent.span, offset, buf.len());
            self.blocks
                .read_in(way, extent.state, at, &mut buf[range])
                .context(|| self.request("read", at))?;
        }
        Ok(())
    }

    /// [`Overlay::read_by`] without waiting for the host's disk, if that can be: says whether it could. If not, whatever
    /// `buf` holds means nothing.
    ///
    /// # Errors
    /// The same.
    pub fn read_now(&self, way: Way, offset: u64, buf: &mut [u8]) -> Result<bool> {
        let geometry = self.geometry();
        geometry.check_range(offset, buf.len() as u64)?;
        let span = geometry.span_touched(offset, buf.len() as u64);
        for extent in self.blocks.map().extents(span) {
            let (at, range) = part_of(geometry, extent.span, offset, buf.len());
            let done = self.blocks.read_now_in(way, extent.state, at, &mut buf[range]);
            if !done.context(|| self.request("read", at))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes all of `buf` at byte `offset` of the disk, at any alignment. On return it survives the daemon; it
    /// survives the host after a later [`Overlay::flush`]. Blocks written in part are copied up from the base first.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] beyond the end (nothing is written then); [`ErrorKind::NoSpace`] if the host is full
    /// (a part may have been written; no other byte of the disk has changed); [`ErrorKind::Io`] if the host's disk
    /// fails, or has failed to sync.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_by(Way::Cached, offset, buf)
    }

    /// Whether a write of `len` bytes at `offset` by `way` goes to memory alone: an overwrite of whole pages through the
    /// host's cache (part of a page might have to be read first) that waits for no direct write. It may still wait for the
    /// host to write back what was written before.
    pub fn writes_to_memory(&self, way: Way, offset: u64, len: u64) -> bool {
        let geometry = self.geometry();
        if geometry.check_range(offset, len).is_err()
            || way == Way::Direct && self.blocks.data().goes_direct()
            || self.direct_file().is_some_and(|direct| direct.gate.is_in_use())
            || !(geometry.data_offset(offset) | len).is_multiple_of(CACHE_PAGE_BYTES)
        {
            return false;
        }
        let span = geometry.span_touched(offset, len);
        if span.is_empty() {
            return true;
        }
        let first = self.blocks.map().extent(span.start, span.end);
        first.state == BlockState::Data && first.span == span
    }

    /// Where in the file of [`Overlay::direct_file`] a direct read or write of `len` bytes at `offset` goes, if that is all that
    /// there is to it: if all of it lies in blocks of state `Data`.
    pub fn place(&self, transfer: Transfer, offset: u64, len: u64) -> Option<u64> {
        if transfer == Transfer::Write {
            self.latch.check().ok()?;
        }
        let geometry = self.geometry();
        geometry.check_range(offset, len).ok()?;
        let span = geometry.span_touched(offset, len);
        if span.is_empty() {
            return None;
        }
        let first = self.blocks.map().extent(span.start, span.end);
        (first.state == BlockState::Data && first.span == span).then(|| geometry.data_offset(offset))
    }

    /// Notes that a write which [`Overlay::place`] has placed was done, or tried: the next flush covers it. Called before
    /// it is answered.
    pub fn placed_write_ended(&self) {
        self.blocks.note_unsynced();
    }

    /// Whether a read of `len` bytes at `offset`, at least one, shows just what lies there in the base.
    pub fn shows_base(&self, offset: u64, len: u64) -> bool {
        let geometry = self.geometry();
        if geometry.check_range(offset, len).is_err() || offset + len > self.blocks.base().size() {
            return false;
        }
        let span = geometry.span_touched(offset, len);
        if span.is_empty() {
            return false;
        }
        let first = self.blocks.map().extent(span.start, span.end);
        first.state == BlockState::Base && first.span == span
    }

    /// The base's file; see [`Storage::cached_file`].
    pub fn base_file(&self) -> Option<BorrowedFd<'_>> {
        self.blocks.base().cached_file()
    }

    /// See [`Storage::direct_file`].
    pub fn direct_file(&self) -> Option<DirectFile<'_>> {
        self.blocks.data().direct_file()
    }

    /// [`Overlay::write_at`] by `way`. Blocks that are written for the first time travel through the host's cache all the same.
    ///
    /// # Errors
    /// The same.
    pub fn write_by(&self, way: Way, offset: u64, buf: &[u8]) -> Result<()> {
        self.latch.check()?;
        let geometry = self.geometry();
        geometry.check_range(offset, buf.len() as u64)?;
        let span = geometry.span_touched(offset, buf.len() as u64);
        if span.is_empty() {
            return Ok(());
        }
        let map = self.blocks.map();
        let first = map.extent(span.start, span.end);
        if first.state == BlockState::Data && first.span == span {
            return self.blocks.overwrite(way, offset, buf).context(|| self.request("write", offset));
        }
        {
            let _held = self.locks.hold(span);
            for extent in map.extents(span) {
                let (at, range) = part_of(geometry, extent.span, offset, buf.len());
                match extent.state {
                    BlockState::Data => self.blocks.overwrite(way, at, &buf[range]),
                    BlockState::Base | BlockState::Zero => self.blocks.write_new(extent, at, &buf[range]),
                }
                .context(|| self.request("write", at))?;
            }
        }
        self.commit_if_overdue()
    }

    /// Makes `len` bytes at `offset` zeroes, at any alignment, and gives the space of whole blocks back to the host:
    /// both discard and write-zeroes. They never show the base again. Durable as a write is.
    ///
    /// # Errors
    /// Those of [`Overlay::write_at`].
    pub fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.latch.check()?;
        let geometry = self.geometry();
        geometry.check_range(offset, len)?;
        let span = geometry.span_touched(offset, len);
        if span.is_empty() {
            return Ok(());
        }
        {
            let _held = self.locks.hold(span);
            self.zero_held(geometry, span, offset, len).context(|| self.request("zero", offset))?;
        }
        self.commit_if_overdue()
    }

    /// Clears the blocks of which all bytes of the disk are in the range, and parts of the first and the last.
    fn zero_held(&self, geometry: Geometry, span: BlockSpan, offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        let covers = |block| {
            let (at, bytes) = geometry.bytes_of(BlockSpan::new(block, block + 1));
            offset <= at && at + bytes <= end
        };
        let whole_start = if covers(span.start) { span.start } else { span.start + 1 };
        let whole_end = if covers(span.end - 1) { span.end } else { span.end - 1 };
        let edges = [(span.start, span.start < whole_start), (span.end - 1, whole_end < span.end)];
        let edges = if span.len() == 1 { &edges[..1] } else { &edges[..] };
        // Before the edges, which may need room that this gives back.
        if whole_start < whole_end {
            self.blocks.clear(BlockSpan::new(whole_start, whole_end))?;
        }
        for &(block, partial) in edges {
            if partial {
                let (at, bytes) = geometry.bytes_of(BlockSpan::new(block, block + 1));
                let (from, to) = (at.max(offset), (at + bytes).min(end));
                self.blocks.clear_part(self.blocks.map().extent(block, block + 1), from, to - from)?;
            }
        }
        Ok(())
    }

    /// Reserves space on the host's disk so that later writes to these bytes cannot fail for want of room. What they
    /// read as does not change.
    ///
    /// # Errors
    /// Those of [`Overlay::write_at`].
    pub fn preallocate(&self, offset: u64, len: u64) -> Result<()> {
        self.latch.check()?;
        let geometry = self.geometry();
        geometry.check_range(offset, len)?;
        let span = geometry.span_touched(offset, len);
        let _held = self.locks.hold(span);
        self.blocks.preallocate(span).context(|| self.request("preallocate", offset))
    }

    /// The first byte at or after `offset` that may hold something: data of the overlay, or of the base. `None` if only
    /// holes follow.
    ///
    /// # Errors
    /// Those of the host.
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        self.find(offset, false)
    }

    /// The first byte at or after `offset` that is known to be zero and to take no space; the end of the disk counts.
    ///
    /// # Errors
    /// Those of the host.
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        Ok(self.find(offset, true)?.unwrap_or(self.size().max(offset)))
    }

    fn find(&self, offset: u64, hole: bool) -> Result<Option<u64>> {
        let geometry = self.geometry();
        if offset >= geometry.size() {
            return Ok(None);
        }
        let mut block = geometry.block_of(offset).0;
        while block < geometry.blocks() {
            let extent = self.blocks.map().extent(block, geometry.blocks());
            let (is_hole, end) = match extent.state {
                BlockState::Data => (false, extent.span.end),
                BlockState::Zero => (true, extent.span.end),
                BlockState::Base => self.blocks.base_run(block, extent.span.end)?,
            };
            if is_hole == hole {
                return Ok(Some(geometry.bytes_of(BlockSpan::new(block, end)).0.max(offset)));
            }
            block = end;
        }
        Ok(None)
    }

    /// Bounds the memory for uncommitted changes of a guest that never flushes.
    fn commit_if_overdue(&self) -> Result<()> {
        if self.blocks.map().commit_overdue() { self.flush() } else { Ok(()) }
    }

    fn request(&self, what: &str, offset: u64) -> String {
        format!("{what} at {offset} of disk {}", self.name)
    }
}

/// The part of a request (`len` bytes at `offset`) that lies in the blocks of `span`: where it begins on the disk, and
/// its place in the request's buffer.
fn part_of(geometry: Geometry, span: BlockSpan, offset: u64, len: usize) -> (u64, std::ops::Range<usize>) {
    let (start, bytes) = geometry.bytes_of(span);
    let from = start.max(offset);
    let to = (start + bytes).min(offset + len as u64);
    let place = |at: u64| usize::try_from(at - offset).expect("within the request's buffer");
    (from, place(from)..place(to))
}
