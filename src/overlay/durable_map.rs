//! The durable map: what the map file says of the layer, and how it is changed so that a crash at any point leaves the
//! old or the new.
//!
//! A commit appends one record to the journal. A checkpoint writes whole pages, each into the slot that does not hold
//! its current copy, and then the superblock, which makes them current and the journal empty. [`crate::format`] has the
//! bytes and the invariants.

use std::collections::{BTreeMap, BTreeSet};

use super::map_scan::{CurrentPage, MapScan, pages_of};
use super::states::{PageWords, SparseStates};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{
    BootId, Change, JOURNAL_BYTES, JOURNAL_OFFSET, JournalRecord, MapPage, PAGE_BYTES, SUPERBLOCK_BYTES,
    SessionId, Superblock, changes_that_fit, slot_offset,
};
use crate::storage::{Room, Storage, Taken};
use crate::units::Geometry;

/// The map file of one open layer.
#[derive(Debug)]
pub struct DurableMap<S> {
    storage: S,
    superblock: Superblock,
    /// The copy (0 or 1) that holds `superblock`; the other may hold an older one, or nothing whole.
    superblock_copy: u64,
    /// Whether that copy is durable. If not, it began the session, and until it is the other one must not be touched (I5).
    superblock_durable: bool,
    /// Bytes of the journal that hold records since the last checkpoint.
    journal_used: u64,
    /// The number that the next record gets.
    next_sequence: u64,
    /// Where the current copy of each page is.
    pages: BTreeMap<u64, CurrentPage>,
    /// Pages that the next checkpoint has to write: those with changes in the journal, and those of which an interrupted
    /// checkpoint left a copy that would otherwise seem to belong to the next one.
    stale: BTreeSet<u64>,
}

/// How far a durable map has come. It only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The superblock's generation.
    pub generation: u64,
    /// The sequence number that the next journal record gets.
    pub next_sequence: u64,
}

impl Position {
    /// Whether a durable map that has come to `position` has been here.
    pub fn is_covered_by(self, position: Self) -> bool {
        self.generation <= position.generation && self.next_sequence <= position.next_sequence
    }
}

/// Writes the superblock of a new layer into an empty map file. The caller syncs it.
///
/// # Errors
/// Those of the storage.
pub fn format(storage: &dyn Storage, superblock: &Superblock) -> Result<()> {
    let copy = superblock.encode();
    storage.write_at(0, &[copy, copy].concat())
}

/// Reads the superblock: the newer of the copies that are whole.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if no copy is; [`ErrorKind::Unsupported`] if one is, of a version that is not known.
pub fn read_superblock(storage: &dyn Storage) -> Result<Superblock> {
    read_newer_copy(storage).map(|(superblock, _)| superblock)
}

/// The newer of the copies that are whole, and which of the two it is.
fn read_newer_copy(storage: &dyn Storage) -> Result<(Superblock, u64)> {
    let mut found: Result<(Superblock, u64)> = Err(Error::new(ErrorKind::Corrupt, "superblock: missing"));
    let mut both = [[0; SUPERBLOCK_BYTES]; 2];
    storage.read_at(0, both.as_flattened_mut())?;
    // Mostly they are equal, and then one is worth the time of a checksum: there may be ten thousand disks to list.
    let different = if both[0] == both[1] { &both[..1] } else { &both[..] };
    for (copy, bytes) in (0..).zip(different) {
        found = match (found, Superblock::decode(bytes)) {
            (Ok((one, at)), Ok(two)) if two.generation <= one.generation => Ok((one, at)),
            (_, Ok(two)) => Ok((two, copy)),
            // A copy of an unknown version outranks what an older cowdisk may have left in the other one.
            (_, Err(error)) if error.kind() == ErrorKind::Unsupported => return Err(error),
            (Ok(one), Err(_)) => Ok(one),
            (Err(_), Err(error)) => Err(error),
        };
    }
    found
}

/// Where copy `copy` (0 or 1) of the superblock begins, in bytes.
fn copy_offset(copy: u64) -> u64 {
    copy * SUPERBLOCK_BYTES as u64
}

impl<S: Storage> DurableMap<S> {
    /// Reads superblock, pages and journal, and the states that they say. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a page or a record that had been committed is damaged or gone.
    pub fn load(storage: S) -> Result<(Self, SparseStates)> {
        let (superblock, superblock_copy) = read_newer_copy(&storage)?;
        let scan = MapScan::read(&storage, &superblock)?;
        if let Some(fault) = scan.faults.into_iter().next() {
            return Err(fault.into_error());
        }
        let map = Self {
            storage,
            superblock,
            superblock_copy,
            // Whoever opens the layer for service has synced it before.
            superblock_durable: true,
            journal_used: scan.journal_used,
            next_sequence: scan.next_sequence,
            pages: scan.pages,
            stale: scan.stale,
        };
        Ok((map, scan.states))
    }

    /// The superblock as it is on disk.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// How far the map has come.
    pub fn position(&self) -> Position {
        Position { generation: self.superblock.generation, next_sequence: self.next_sequence }
    }

    /// Whether more than half of the journal is in use.
    pub fn checkpoint_due(&self) -> bool {
        self.journal_used * 2 > self.superblock.journal_bytes
    }

    /// Whether the pages alone do not say everything.
    pub fn has_journaled_changes(&self) -> bool {
        self.journal_used > 0
    }

    /// How many changes fit into one more record.
    pub fn room_for_changes(&self) -> usize {
        changes_that_fit(self.superblock.journal_bytes - self.journal_used)
    }

    /// Marks the layer as being written to in `session`, and gives it a journal if it has none. That survives the daemon,
    /// and the host with the session's first commit: before it there is nothing that a crash of the host must not lose,
    /// and what the journal lacks of its zeroes reads as zeroes anyway.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if the host has no room for the journal; the layer is unchanged then.
    pub fn begin_session(&mut self, session: SessionId, boot: BootId) -> Result<()> {
        let generation = self.superblock.generation + 1;
        let mut next = Superblock { session, boot, generation, ..self.superblock.clone() };
        if next.journal_bytes == 0 {
            // Written, not only reserved: a record written into an unwritten extent would cost a commit of the host
            // file system's own journal (I6).
            let zeroes = vec![0; usize::try_from(JOURNAL_BYTES).expect("256 KiB")];
            let left = self.storage.next_data(JOURNAL_OFFSET)?;
            self.storage.write_at(JOURNAL_OFFSET, &zeroes)?;
            if left.is_some_and(|at| at < JOURNAL_OFFSET + JOURNAL_BYTES) {
                // A crash cut a first commit short and left its record. No superblock may ever make it count: what it
                // names was seen to be lost since.
                self.storage.sync()?;
            }
            next.journal_bytes = JOURNAL_BYTES;
        }
        // The next checkpoint writes these pages, whatever the session changes.
        for &page in &self.stale {
            self.reserve_page(page)?;
        }
        // One copy only: the other is the durable one until this one is (I5).
        let copy = 1 - self.superblock_copy;
        self.storage.write_at(copy_offset(copy), &next.encode()).context(|| "superblock")?;
        // On its way while the data are written, and mostly there when the first commit comes.
        self.storage.start_writing();
        (self.superblock, self.superblock_copy, self.superblock_durable) = (next, copy, false);
        Ok(())
    }

    /// Marks the layer as closed cleanly.
    pub fn end_session(&mut self) -> Result<()> {
        let next = Superblock { session: SessionId::NONE, boot: BootId::NONE, ..self.superblock.clone() };
        self.write_superblock(next)
    }

    /// Records a new size.
    pub fn resize(&mut self, geometry: Geometry) -> Result<()> {
        self.write_superblock(Superblock { geometry, ..self.superblock.clone() })
    }

    /// Writes both copies, first the one that does not hold the superblock now: it may be stale or torn, and until it is
    /// whole again the other must not be touched (I5).
    fn write_superblock(&mut self, next: Superblock) -> Result<()> {
        if !self.superblock_durable {
            self.sync()?;
        }
        let next = Superblock { generation: self.superblock.generation + 1, ..next };
        let bytes = next.encode();
        for copy in [1 - self.superblock_copy, self.superblock_copy] {
            self.storage.write_durable_at(copy_offset(copy), &bytes).context(|| "superblock")?;
        }
        self.superblock = next;
        Ok(())
    }

    /// Makes all of the map file durable.
    fn sync(&mut self) -> Result<()> {
        self.storage.sync()?;
        self.superblock_durable = true;
        Ok(())
    }

    /// Takes the room that [`DurableMap::begin_session`] and [`DurableMap::reserve_page`] of `page` need.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if there is none.
    pub fn take_room<'a>(&self, room: &'a Room, page: u64) -> Result<[Taken<&'a Room>; 2]> {
        let journal = if self.superblock.journal_bytes == 0 { JOURNAL_BYTES } else { 0 };
        let slots = room.take_for(&self.storage, slot_offset(page, 0), 2 * PAGE_BYTES as u64)?;
        Ok([slots, room.take_for(&self.storage, JOURNAL_OFFSET, journal)?])
    }

    /// Reserves the space of both slots of `page`, so that a checkpoint cannot fail for want of room.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if the host has none.
    pub fn reserve_page(&self, page: u64) -> Result<()> {
        self.storage.allocate(slot_offset(page, 0), 2 * PAGE_BYTES as u64)
    }

    /// Commits `changes` by one durable write, or by the sync that also makes the beginning of the session durable. The
    /// caller has synced the data that they name (I2).
    ///
    /// # Errors
    /// Those of the storage, which is latched then.
    ///
    /// # Panics
    /// If there are more changes than [`DurableMap::room_for_changes`], or none.
    pub fn append(&mut self, changes: Vec<Change>) -> Result<()> {
        assert!(!changes.is_empty() && changes.len() <= self.room_for_changes());
        let record = JournalRecord { sequence: self.next_sequence, changes };
        let bytes = record.encode(self.superblock.layer);
        let offset = JOURNAL_OFFSET + self.journal_used;
        let is_first = !self.superblock_durable;
        if is_first {
            // A crash may leave any of record, superblock and zeroes. The record counts once both it and a superblock that
            // has a journal are whole; without them this commit has not been.
            self.storage.write_at(offset, &bytes).context(|| "journal")?;
            self.sync().context(|| "journal")?;
        } else {
            self.storage.write_durable_at(offset, &bytes).context(|| "journal")?;
        }
        self.stale.extend(pages_of(&record.changes));
        self.journal_used += bytes.len() as u64;
        self.next_sequence += 1;
        if is_first {
            // The copies become equal again, so that damage to either loses nothing. When does not matter: the other one
            // is durable, and stays so until this one is written durably (I5).
            let copy = 1 - self.superblock_copy;
            self.storage.write_at(copy_offset(copy), &self.superblock.encode()).context(|| "superblock")?;
        }
        Ok(())
    }

    /// Writes all pages that have journaled changes, and those in `more`, as `snapshot` shows them now, and empties the
    /// journal. `sync_data` runs after the last snapshot and before the pages become current (I2).
    ///
    /// # Errors
    /// Those of the storage and of `sync_data`. The durable map is unchanged then.
    pub fn checkpoint(
        &mut self,
        more: &BTreeSet<u64>,
        snapshot: impl Fn(u64) -> Box<PageWords>,
        sync_data: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let generation = self.superblock.checkpoint + 1;
        let mut digest = self.superblock.pages_digest;
        let mut written = Vec::new();
        // Kept if this attempt fails: the next one has to overwrite what it left.
        self.stale.extend(more);
        for &page in &self.stale {
            let current = self.pages.get(&page);
            let slot = current.map_or(0, |current| 1 - current.slot);
            let image = MapPage { generation, index: page, words: snapshot(page) };
            let (bytes, checksum) = image.encode(self.superblock.layer);
            self.storage.write_at(slot_offset(page, slot), &bytes).context(|| format!("map page {page}"))?;
            let checksum = checksum.as_u128();
            digest =
                digest.wrapping_sub(current.map_or(0, |current| current.checksum)).wrapping_add(checksum);
            written.push((page, CurrentPage { slot, checksum }));
        }
        sync_data()?;
        self.sync().context(|| "map pages")?;
        self.write_superblock(Superblock {
            checkpoint: generation,
            journal_sequence: self.next_sequence,
            pages_digest: digest,
            ..self.superblock.clone()
        })?;
        self.pages.extend(written);
        self.stale.clear();
        self.journal_used = 0;
        Ok(())
    }
}
