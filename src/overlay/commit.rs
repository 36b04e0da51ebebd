//! The flush protocol: data first, then map; or both by one write.
//!
//! 1. Take the runs of blocks that changed since the last commit, and read their states from the live map. Whatever
//!    they say is `Data` was written before it said so.
//! 2. If they are few, and nothing else was written: append one record to the journal that has their contents, too, by one
//!    durable write. The data file is synced some later time. What was read back counts only if the host has lost nothing of it
//!    meanwhile; if it has, the commit fails as if a sync had.
//! 3. Otherwise sync the data file.
//! 4. If there was any run: append one record to the journal by one durable write. If there was none, but records have
//!    contents: append one that says that these do not count any more. If the journal has no room for it: write the pages, sync
//!    them and switch to them by writing the superblock.
//!
//! A crash before this has ended leaves the map of the commit before (I2, I3). Contents in the journal are put into the data
//! file by an opening after a crash of the host, and only if no sync of the data file was committed after them: what they
//! would come back over is newer then (I11).

use std::sync::atomic::{AtomicU64, Ordering};

use super::Overlay;
use super::alloc_map::pages_of_runs;
use super::durable_map::DurableMap;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{LatchedStorage, Storage};
use crate::units::BlockSpan;

/// What an overlay has done to make writes durable since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitCounts {
    /// Syncs of the data file that had no change of the map to commit.
    pub syncs: u64,
    /// Records appended to the journal, each after a sync of the data file.
    pub records: u64,
    /// Records appended to the journal with the contents of all blocks that they name, without a sync of the data file.
    pub records_with_contents: u64,
    /// Checkpoints.
    pub checkpoints: u64,
}

impl CommitCounts {
    /// Adds another overlay's.
    pub fn add(&mut self, other: Self) {
        self.syncs += other.syncs;
        self.records += other.records;
        self.records_with_contents += other.records_with_contents;
        self.checkpoints += other.checkpoints;
    }
}

/// [`CommitCounts`] as they grow.
#[derive(Debug, Default)]
pub(super) struct Commits {
    syncs: AtomicU64,
    records: AtomicU64,
    records_with_contents: AtomicU64,
    checkpoints: AtomicU64,
}

impl Overlay {
    /// What was done so far to make writes durable. Takes no lock.
    pub fn commit_counts(&self) -> CommitCounts {
        let Commits { syncs, records, records_with_contents, checkpoints } = &self.commits;
        CommitCounts {
            syncs: syncs.load(Ordering::Relaxed),
            records: records.load(Ordering::Relaxed),
            records_with_contents: records_with_contents.load(Ordering::Relaxed),
            checkpoints: checkpoints.load(Ordering::Relaxed),
        }
    }

    /// How many runs of blocks have changed since the last commit. Waits for no I/O.
    pub fn uncommitted_runs(&self) -> usize {
        self.blocks.map().uncommitted_runs()
    }

    /// Whether a sync has failed, so that writes are refused until the overlay is opened again.
    pub fn is_latched(&self) -> bool {
        self.latch.is_closed()
    }

    /// Makes every write that was completed before the call durable. Callers that wait for each other share one commit.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the host's disk fails to sync: from then on the overlay refuses writes until it is opened
    /// again, and opening it shows what the flush before had covered.
    pub fn flush(&self) -> Result<()> {
        let ticket = self.flush_tickets.fetch_add(1, Ordering::AcqRel) + 1;
        let mut durable = self.blocks.map().durable();
        if self.flushed_tickets.load(Ordering::Acquire) >= ticket {
            // Another caller's commit began after this call did: it covered whatever this one has to.
            return self.latch.check();
        }
        self.commit(&mut durable, false)
    }

    /// Whether a checkpoint would be good now: half of the journal is in use.
    pub fn checkpoint_due(&self) -> bool {
        self.blocks.map().durable().checkpoint_due()
    }

    /// A flush that also empties the journal, for the background: a flush that finds it full has to.
    ///
    /// # Errors
    /// Those of [`Overlay::flush`].
    pub fn checkpoint(&self) -> Result<()> {
        self.commit(&mut self.blocks.map().durable(), true)
    }

    /// Grows the disk to `size` bytes; what is new reads as zeroes. Durable on return. The same size does nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if `size` is smaller than now, no multiple of 512, or above 16 TiB.
    pub fn grow(&self, size: u64) -> Result<()> {
        let mut durable = self.blocks.map().durable();
        let now = durable.superblock().geometry;
        if size < now.size() {
            let message = format!("a disk cannot shrink, from {} to {size} bytes", now.size());
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if size == now.size() {
            return Ok(());
        }
        let grown = now.resized(size)?;
        let result = extend(self.blocks.data(), grown.data_bytes()).and_then(|_| {
            self.blocks.data().sync()?;
            durable.resize(grown)
        });
        self.after_commit(result.context(|| format!("grow disk {} to {size} bytes", self.name)))?;
        self.blocks.map().note_durable(&durable);
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Flushes, empties the journal, marks the overlay as closed cleanly and removes the live map.
    ///
    /// # Errors
    /// Those of [`Overlay::flush`]. The live map stays then, so that opening the overlay again in this boot of the host
    /// loses nothing (but after a failed sync it is the durable map that counts).
    pub fn close(self) -> Result<()> {
        {
            let mut durable = self.blocks.map().durable();
            self.commit(&mut durable, false)?;
            if self.blocks.map().session_begun(&durable) {
                if durable.has_journaled_changes() {
                    self.commit(&mut durable, true)?;
                }
                let ended = durable.end_session().context(|| format!("close disk {}", self.name));
                self.after_commit(ended)?;
            }
        }
        self.blocks.into_map().remove_live_map()
    }

    fn commit(&self, durable: &mut DurableMap<LatchedStorage>, checkpoint: bool) -> Result<()> {
        self.latch.check()?;
        let tickets = self.flush_tickets.load(Ordering::Acquire);
        let unsynced = self.blocks.take_unsynced();
        let runs = self.blocks.map().take_uncommitted();
        let result = self.commit_runs(durable, &runs, unsynced, checkpoint);
        match &result {
            Ok(()) => {
                self.blocks.map().note_durable(durable);
                self.flushed_tickets.store(tickets, Ordering::Release);
            }
            Err(_) => {
                self.blocks.map().put_back(runs);
                self.blocks.note_unsynced();
            }
        }
        self.after_commit(result.context(|| format!("flush disk {}", self.name)))
    }

    fn commit_runs(
        &self,
        durable: &mut DurableMap<LatchedStorage>,
        runs: &[BlockSpan],
        unsynced: bool,
        checkpoint: bool,
    ) -> Result<()> {
        let map = self.blocks.map();
        let sync_data = || self.blocks.data().sync();
        // Where the journal is full it has no room even for a record without changes.
        let is_cramped = durable.has_contents() && durable.is_full();
        let changes = match checkpoint || is_cramped {
            true => None,
            false => map.changes_in(runs, durable.room_for_changes()),
        };
        match changes {
            Some(changes) => {
                if !unsynced && !changes.is_empty() {
                    let takes = |bytes| durable.takes_contents(changes.len(), bytes);
                    if let Some(contents) = self.blocks.contents_of(&changes, takes)? {
                        self.commits.records_with_contents.fetch_add(1, Ordering::Relaxed);
                        return durable.append_with_contents(changes, contents);
                    }
                }
                // Data first: a record that survives a crash must never name data that did not (I2).
                sync_data()?;
                if changes.is_empty() && !durable.has_contents() {
                    self.commits.syncs.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
                self.commits.records.fetch_add(1, Ordering::Relaxed);
                durable.append(changes)
            }
            None => {
                self.commits.checkpoints.fetch_add(1, Ordering::Relaxed);
                durable.checkpoint(&pages_of_runs(runs), |page| map.snapshot(page), sync_data)
            }
        }
    }

    /// After a failed sync the live map may name data that never reached the disk: nobody may take it up again.
    fn after_commit(&self, result: Result<()>) -> Result<()> {
        if result.is_err() && self.latch.is_closed() {
            log::error!(
                "disk {}: a sync of the host's disk failed; writes are refused from now on",
                self.name
            );
            self.blocks.map().distrust_live_map();
        }
        result
    }
}

/// Makes the data file at least `len` bytes long, and says whether it was shorter. It may be longer already: a crash fell
/// between its growing and the disk's.
pub(super) fn extend(data: &LatchedStorage, len: u64) -> Result<bool> {
    let is_shorter = data.size()? < len;
    if is_shorter {
        data.set_len(len)?;
    }
    Ok(is_shorter)
}
