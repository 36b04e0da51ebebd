//! Whole-block operations: reading an extent, copy-up, storing and clearing blocks.
//!
//! Whoever calls what changes a block holds it (see [`super::block_locks`]). A block's data is always written before
//! its state says so, and a block that becomes `Data` is always written whole: what an earlier life of it left in the
//! data file never shows.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::alloc_map::AllocMap;
use super::base::BaseImage;
use super::states::Extent;
use crate::error::{Context, Result};
use crate::format::{BlockState, Change, data_blocks};
use crate::storage::{LatchedStorage, Room, Storage, Way};
use crate::units::{BlockSpan, Geometry};

/// Data, base and map of one overlay, in blocks.
#[derive(Debug)]
pub struct Blocks {
    /// The block grid. Its size is that of the opening: only lead and block size are used here.
    grid: Geometry,
    data: LatchedStorage,
    base: BaseImage,
    map: AllocMap,
    /// Whether the data file may have changed, since it was last synced, other than by blocks that became `Data`. Set after
    /// each such change and before it is answered, so that the next flush knows of it.
    unsynced: AtomicBool,
    /// What is written for the first time takes from it.
    room: Arc<Room>,
}

impl Blocks {
    /// Joins the parts of an overlay. `unsynced`: the data file has changes that nobody has synced.
    pub fn new(grid: Geometry, data: LatchedStorage, base: BaseImage, map: AllocMap, unsynced: bool) -> Self {
        let unsynced = AtomicBool::new(unsynced);
        Self { grid, data, base, map, unsynced, room: Arc::new(Room::unlimited()) }
    }

    /// Notes that the data file has changed, other than by a block that became `Data`: the next flush has to sync it.
    pub fn note_unsynced(&self) {
        // Mostly it is set already, and then its cache line is not taken from the others. Whoever takes it syncs afterwards,
        // and so what was written before this look.
        if !self.unsynced.load(Ordering::SeqCst) {
            self.unsynced.store(true, Ordering::SeqCst);
        }
    }

    /// Whether [`Blocks::note_unsynced`] was called since this was last asked. The caller then syncs the data file, or notes it
    /// again.
    pub fn take_unsynced(&self) -> bool {
        self.unsynced.swap(false, Ordering::SeqCst)
    }

    /// The contents of all blocks that become `Data` by `changes`, as they are now; `None` if `takes` does not take so many
    /// bytes. What is being written to them meanwhile is there in part: nobody was answered that it is.
    ///
    /// # Errors
    /// Those of the host: if it has lost any of what was written to the data file, the storage is latched.
    pub fn contents_of(
        &self,
        changes: &[Change],
        takes: impl FnOnce(u64) -> bool,
    ) -> Result<Option<Vec<u8>>> {
        let bytes = data_blocks(changes).map(BlockSpan::len).sum::<u64>() * self.block_bytes();
        if !takes(bytes) {
            return Ok(None);
        }
        let mut contents = vec![0; to_usize(bytes)];
        let mut rest = contents.as_mut_slice();
        for span in data_blocks(changes) {
            let part;
            (part, rest) = rest.split_at_mut(to_usize(span.len() * self.block_bytes()));
            self.data.read_exact_at(span.start * self.block_bytes(), part)?;
        }
        // After the reads. What could not be written may have left the cache, and then they have shown what was there before.
        self.data.check_written()?;
        Ok(Some(contents))
    }

    /// From now on blocks that are written for the first time take from `room`.
    pub fn set_room(&mut self, room: Arc<Room>) {
        self.room = room;
    }

    /// The allocation map.
    pub fn map(&self) -> &AllocMap {
        &self.map
    }

    /// The data file.
    pub fn data(&self) -> &LatchedStorage {
        &self.data
    }

    /// The base.
    pub fn base(&self) -> &BaseImage {
        &self.base
    }

    /// Gives up the parts but the map.
    pub fn into_map(self) -> AllocMap {
        self.map
    }

    /// Fills `buf` with the bytes at `offset` of the disk, all of them in blocks of one state. Those of the base always
    /// travel through the host's cache, where all instances share them.
    pub fn read_in(&self, way: Way, state: BlockState, offset: u64, buf: &mut [u8]) -> Result<()> {
        match state {
            BlockState::Data => self.data.read_by(way, self.grid.data_offset(offset), buf),
            BlockState::Base => self.base.read_at(offset, buf),
            BlockState::Zero => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    /// [`Blocks::read_in`] out of the host's memory; see [`Storage::read_now`]. What would go past the host's cache is not
    /// looked for in it: the host would begin to fetch it there, and later direct writes would have to throw it out.
    pub fn read_now_in(&self, way: Way, state: BlockState, offset: u64, buf: &mut [u8]) -> Result<bool> {
        match state {
            BlockState::Data if way == Way::Direct && self.data.goes_direct() => Ok(false),
            BlockState::Data => self.data.read_now(self.grid.data_offset(offset), buf),
            BlockState::Base => self.base.read_now(offset, buf),
            BlockState::Zero => {
                buf.fill(0);
                Ok(true)
            }
        }
    }

    /// Overwrites bytes at `offset` of the disk, all of them in blocks of state `Data`. Needs no lock: the state cannot
    /// become anything that copies the block up, and a concurrent discard may come before or after.
    pub fn overwrite(&self, way: Way, offset: u64, buf: &[u8]) -> Result<()> {
        let result = self.data.write_by(way, self.grid.data_offset(offset), buf);
        self.note_unsynced();
        result
    }

    /// Writes bytes at `offset` of the disk into the blocks of `extent`, which are not `Data` yet: whole blocks are
    /// stored, parts of blocks copied up.
    pub fn write_new(&self, extent: Extent, offset: u64, buf: &[u8]) -> Result<()> {
        let block_bytes = self.block_bytes();
        let start = self.grid.data_offset(offset);
        let end = start + buf.len() as u64;
        let mut at = start;
        while at < end {
            let block = at / block_bytes;
            let whole = end / block_bytes;
            let piece_end = if at.is_multiple_of(block_bytes) && whole > block {
                whole * block_bytes
            } else {
                end.min((block + 1) * block_bytes)
            };
            let piece = &buf[to_usize(at - start)..to_usize(piece_end - start)];
            if piece_end - at >= block_bytes {
                self.store(BlockSpan::new(block, whole), piece)?;
            } else {
                self.copy_up(block, extent.state, at % block_bytes, piece)?;
            }
            at = piece_end;
        }
        Ok(())
    }

    /// Stores whole blocks, none of them `Data`, through the host's cache, whoever writes: the host's file system then gives
    /// space to many of them at once, at the next flush, instead of to each while its writer waits. Zeroes need no room, but
    /// what was preallocated stays so.
    fn store(&self, span: BlockSpan, buf: &[u8]) -> Result<()> {
        if is_zero(buf) {
            return self.show_zeroes(span);
        }
        let offset = span.start * self.block_bytes();
        let _taken = self.room.take_for(&self.data, offset, buf.len() as u64)?;
        self.map.prepare(span, Some(&self.room))?;
        self.data.write_at(offset, buf)?;
        self.map.set(span, BlockState::Data);
        Ok(())
    }

    /// Reserves space for whole blocks. What they read as does not change.
    pub fn preallocate(&self, span: BlockSpan) -> Result<()> {
        let (offset, len) = (span.start * self.block_bytes(), span.len() * self.block_bytes());
        let _taken = self.room.take_for(&self.data, offset, len)?;
        self.map.prepare(span, Some(&self.room))?;
        let reserved = self.data.allocate(offset, len);
        self.note_unsynced();
        reserved
    }

    /// Makes `block`, in state `state` and not `Data`, hold `piece` at byte `within`, and around it what it showed.
    fn copy_up(&self, block: u64, state: BlockState, within: u64, piece: &[u8]) -> Result<()> {
        let span = BlockSpan::new(block, block + 1);
        let mut copy = vec![0; to_usize(self.block_bytes())];
        if state == BlockState::Base {
            let lead = if block == 0 { u64::from(self.grid.lead()) } else { 0 };
            let from = block * self.block_bytes() + lead - u64::from(self.grid.lead());
            self.base.read_at(from, &mut copy[to_usize(lead)..]).context(|| "copy up")?;
        }
        copy[to_usize(within)..][..piece.len()].copy_from_slice(piece);
        self.store(span, &copy)
    }

    /// Makes part of one block zeroes, where it is not anyway.
    pub fn clear_part(&self, extent: Extent, offset: u64, len: u64) -> Result<()> {
        let zeroes = || vec![0; to_usize(len)];
        match extent.state {
            BlockState::Zero => Ok(()),
            BlockState::Data => self.overwrite(Way::Cached, offset, &zeroes()),
            BlockState::Base if self.base.is_hole(offset, len)? => Ok(()),
            BlockState::Base => self.write_new(extent, offset, &zeroes()),
        }
    }

    /// Makes whole blocks zeroes and gives their space back, that of preallocated ones too: they become `Base` where the
    /// base has a hole, else `Zero`.
    pub fn clear(&self, span: BlockSpan) -> Result<()> {
        for extent in self.map.extents(span).filter(|extent| extent.state == BlockState::Data) {
            self.map.prepare(extent.span, None)?;
        }
        let punched = self.data.punch(span.start * self.block_bytes(), span.len() * self.block_bytes());
        self.note_unsynced();
        punched?;
        self.show_zeroes(span)
    }

    /// Gives all blocks of `span` a state in which they read as zeroes. What space they have they keep.
    fn show_zeroes(&self, span: BlockSpan) -> Result<()> {
        self.map
            .extents(span)
            .filter(|extent| extent.state != BlockState::Zero)
            .try_for_each(|extent| self.set_cleared(extent))
    }

    /// Gives blocks that are to read as zeroes the state for it, cutting the run where the base's holes begin and end.
    fn set_cleared(&self, extent: Extent) -> Result<()> {
        let mut block = extent.span.start;
        while block < extent.span.end {
            let (hole, end) = self.base_run(block, extent.span.end)?;
            let run = BlockSpan::new(block, end);
            let state = if hole { BlockState::Base } else { BlockState::Zero };
            if state != extent.state {
                self.map.prepare(run, None)?;
                self.map.set(run, state);
            }
            block = end;
        }
        Ok(())
    }

    /// Whether `block` lies in a hole of the base, and the end of the run of blocks, up to `end`, of which that holds.
    pub fn base_run(&self, block: u64, end: u64) -> Result<(bool, u64)> {
        let lead = u64::from(self.grid.lead());
        let at = (block * self.block_bytes()).saturating_sub(lead);
        let Some(data) = self.base.next_data(at)? else { return Ok((true, end)) };
        let first_with_data = self.grid.block_of(data).0;
        if first_with_data > block {
            return Ok((true, first_with_data.min(end)));
        }
        let hole = self.base.next_hole(data)?;
        let first_without = self.grid.data_offset(hole).div_ceil(self.block_bytes());
        Ok((false, first_without.clamp(block + 1, end)))
    }

    fn block_bytes(&self) -> u64 {
        u64::from(self.grid.block_bytes())
    }
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("within a buffer in memory")
}

/// Whether all bytes are zero: by 16 at a time, and done at the first that is not.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<16>();
    chunks.iter().all(|chunk| *chunk == [0; 16]) && rest.iter().all(|&byte| byte == 0)
}
