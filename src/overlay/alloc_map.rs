//! The allocation map of an open overlay: the live map, the durable map, and what the first has that the second lacks.
//!
//! Reading states takes no lock. Changing them takes that of the list of uncommitted runs, for a moment; the caller holds
//! the block locks that make a change of state and of data one step.

use std::collections::BTreeSet;

use parking_lot::{Mutex, MutexGuard};

use super::durable_map::DurableMap;
use super::live_map::{Binding, LiveMap};
use super::page_bits::PageBits;
use super::states::{Extent, PageWords};
use crate::error::{Context, Result};
use crate::format::{BLOCKS_PER_PAGE, BlockState, Change, page_count};
use crate::storage::{LatchedStorage, Room};
use crate::units::BlockSpan;

/// So many uncommitted runs make the next writer flush: it bounds the memory that they take (1 MiB).
pub const UNCOMMITTED_RUNS_MAX: usize = 65_536;

/// Longest run of one journal change, in blocks.
const CHANGE_BLOCKS_MAX: u64 = u32::MAX as u64;

/// The map of one open overlay.
#[derive(Debug)]
pub struct AllocMap {
    live: LiveMap,
    /// What the live map is bound to; the session is entered into the superblock before the first change.
    binding: Binding,
    /// Pages whose memory and whose slots in the map file are reserved, in a session that has begun.
    prepared: PageBits,
    /// Guards the map file. Held across its I/O: by commits, and once per page by the first change to it.
    durable: Mutex<DurableMap<LatchedStorage>>,
    /// Guards the runs of blocks that changed since the last commit, together with the change itself. Never held across
    /// I/O.
    uncommitted: Mutex<Vec<BlockSpan>>,
}

impl AllocMap {
    /// Joins the two maps; `uncommitted` is where they differ.
    pub fn new(
        live: LiveMap,
        binding: Binding,
        durable: DurableMap<LatchedStorage>,
        uncommitted: Vec<BlockSpan>,
    ) -> Self {
        let prepared = PageBits::new(page_count(durable.superblock().geometry));
        live.note_durable(durable.position());
        Self { live, binding, prepared, durable: Mutex::new(durable), uncommitted: Mutex::new(uncommitted) }
    }

    /// The longest run from block `start` on, up to `end` exclusive.
    pub fn extent(&self, start: u64, end: u64) -> Extent {
        self.live.extent(start, end)
    }

    /// The runs of `span`, in order, as the map is while they are asked for.
    pub fn extents(&self, span: BlockSpan) -> impl Iterator<Item = Extent> {
        let mut block = span.start;
        std::iter::from_fn(move || {
            (block < span.end).then(|| {
                let extent = self.extent(block, span.end);
                block = extent.span.end;
                extent
            })
        })
    }

    /// Reserves whatever a later [`AllocMap::set`] of these blocks, and the commit of it, may need. What that takes of the
    /// host's disk comes from `room`; without one, for what gives space back, from the reserve.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NoSpace`] if the host's disk or the tmpfs is full; no state has changed then.
    pub fn prepare(&self, span: BlockSpan, room: Option<&Room>) -> Result<()> {
        if span.is_empty() {
            return Ok(());
        }
        for page in pages_of(span) {
            if !self.prepared.get(page) {
                self.prepare_page(page, room)?;
            }
        }
        Ok(())
    }

    #[cold]
    fn prepare_page(&self, page: u64, room: Option<&Room>) -> Result<()> {
        let mut durable = self.durable.lock();
        let _taken = room.map(|room| durable.take_room(room, page)).transpose()?;
        if durable.superblock().session != self.binding.session {
            durable.begin_session(self.binding.session, self.binding.boot).context(|| "begin writing")?;
            self.note_durable(&durable);
        }
        durable.reserve_page(page)?;
        self.live.reserve(page)?;
        self.prepared.set(page);
        Ok(())
    }

    /// Gives all blocks of `span` a new state. It is in the live map, and so survives the daemon, on return.
    ///
    /// # Panics
    /// If the span was not prepared.
    pub fn set(&self, span: BlockSpan, state: BlockState) {
        let mut start = span.start;
        while start < span.end {
            // One page at a time, so that the lock is held for a moment only.
            let end = span.end.min((start / BLOCKS_PER_PAGE + 1) * BLOCKS_PER_PAGE);
            let mut runs = self.uncommitted.lock();
            // Under the lock: whoever sees the new state, overwrites the block without a lock and flushes must find the
            // run in the list, or his flush would not commit the block.
            self.live.set(BlockSpan::new(start, end), state);
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(BlockSpan::new(start, end)),
            }
            start = end;
        }
    }

    /// How many runs wait for a commit.
    pub fn uncommitted_runs(&self) -> usize {
        self.uncommitted.lock().len()
    }

    /// Whether so many changes wait for a commit that the writer should make one.
    pub fn commit_overdue(&self) -> bool {
        self.uncommitted.lock().len() >= UNCOMMITTED_RUNS_MAX
    }

    /// Takes the runs that changed since the last commit, sorted and merged.
    pub fn take_uncommitted(&self) -> Vec<BlockSpan> {
        let mut runs = std::mem::take(&mut *self.uncommitted.lock());
        runs.sort_unstable_by_key(|run| run.start);
        runs.dedup_by(|next, run| {
            let joins = next.start <= run.end;
            if joins {
                run.end = run.end.max(next.end);
            }
            joins
        });
        runs
    }

    /// Gives back runs whose commit failed.
    pub fn put_back(&self, runs: Vec<BlockSpan>) {
        self.uncommitted.lock().extend(runs);
    }

    /// The states of `runs` as journal changes; `None` if they are more than `most`.
    pub fn changes_in(&self, runs: &[BlockSpan], most: usize) -> Option<Vec<Change>> {
        let mut changes = Vec::new();
        for extent in runs.iter().flat_map(|&run| self.extents(run)) {
            let mut start = extent.span.start;
            while start < extent.span.end {
                if changes.len() == most {
                    return None;
                }
                let end = extent.span.end.min(start + CHANGE_BLOCKS_MAX);
                changes.push(Change { span: BlockSpan::new(start, end), state: extent.state });
                start = end;
            }
        }
        Some(changes)
    }

    /// A copy of the words of `page`.
    pub fn snapshot(&self, page: u64) -> Box<PageWords> {
        self.live.snapshot(page)
    }

    /// The map file, for the flush protocol.
    pub fn durable(&self) -> MutexGuard<'_, DurableMap<LatchedStorage>> {
        self.durable.lock()
    }

    /// Whether this opening has entered its session into the superblock.
    pub fn session_begun(&self, durable: &DurableMap<LatchedStorage>) -> bool {
        durable.superblock().session == self.binding.session
    }

    /// Notes in the live map how far the durable map has come: an older one is not what this live map belongs to.
    pub fn note_durable(&self, durable: &DurableMap<LatchedStorage>) {
        self.live.note_durable(durable.position());
    }

    /// Makes the next opening use the durable map.
    pub fn distrust_live_map(&self) {
        self.live.distrust();
    }

    /// Removes the live map: both maps say the same.
    pub fn remove_live_map(self) -> Result<()> {
        self.live.remove()
    }
}

/// The pages that describe the blocks of `span`, which is not empty.
fn pages_of(span: BlockSpan) -> std::ops::RangeInclusive<u64> {
    span.start / BLOCKS_PER_PAGE..=(span.end - 1) / BLOCKS_PER_PAGE
}

/// The pages that describe the blocks of `runs`, none of them empty.
pub fn pages_of_runs(runs: &[BlockSpan]) -> BTreeSet<u64> {
    runs.iter().flat_map(|&run| pages_of(run)).collect()
}
