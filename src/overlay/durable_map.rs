//! The durable map: what the map file says of the layer, and how it is changed so that a crash at any point leaves the
//! old or the new.
//!
//! A commit appends one record to the journal. A checkpoint writes whole pages, each into the slot that does not hold
//! its current copy, and then the superblock, which makes them current and the journal empty. [`crate::format`] has the
//! bytes and the invariants.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;

use super::map_scan::{BlockContents, CurrentPage, MapScan, pages_of};
use super::states::{PageWords, SparseStates};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{
    BootId, Change, JOURNAL_BYTES, JOURNAL_OFFSET, JournalRecord, MapPage, PAGE_BYTES, SUPERBLOCK_BYTES,
    SessionId, Superblock, changes_that_fit, record_bytes_for, slot_offset,
};
use crate::storage::{Room, Storage, Taken};
use crate::units::Geometry;

/// No record's contents take more than this part of the journal: above it a sync of the data file costs less than what
/// is written twice.
const CONTENTS_SHARE: u64 = 16;

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
    /// Records that a program which knows of no contents would take for damage lie before this byte of the journal, if there are
    /// any, be they in use or not.
    journal_marked: u64,
    /// The number that the next record gets.
    next_sequence: u64,
    /// The number of the first record whose contents may not be in the data file, or of a later record without contents.
    contents_since: u64,
    /// Whether a record from that one on has contents.
    has_contents: bool,
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

/// What a map file says.
#[derive(Debug)]
pub struct Loaded {
    /// The state of each block.
    pub states: SparseStates,
    /// Contents of blocks that have to be put into the data file before it is read, unless what the host's cache has of it
    /// is known to be newer.
    pub contents: Vec<BlockContents>,
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
    /// Reads superblock, pages and journal, and what they say. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a page or a record that had been committed is damaged or gone.
    pub fn load(storage: S) -> Result<(Self, Loaded)> {
        let (superblock, superblock_copy) = read_newer_copy(&storage)?;
        let scan = MapScan::read(&storage, &superblock)?;
        if let Some(fault) = scan.faults.into_iter().next() {
            return Err(fault.into_error());
        }
        // One whose superblock a crash has lost may have left a record.
        let knew_none = superblock.contents_since.is_none() && scan.contents_since == 0;
        let map = Self {
            storage,
            journal_marked: if knew_none { 0 } else { superblock.journal_bytes },
            superblock,
            superblock_copy,
            // Whoever opens the layer for service has synced it before.
            superblock_durable: true,
            journal_used: scan.journal_used,
            next_sequence: scan.next_sequence,
            contents_since: scan.contents_since,
            has_contents: !scan.contents.is_empty(),
            pages: scan.pages,
            stale: scan.stale,
        };
        Ok((map, Loaded { states: scan.states, contents: scan.contents }))
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

    /// Whether the journal has no room for one more record, not even for one without changes.
    pub fn is_full(&self) -> bool {
        self.journal_left() == 0
    }

    /// How many changes without contents fit into one more record.
    pub fn room_for_changes(&self) -> usize {
        changes_that_fit(self.journal_left())
    }

    /// Whether `bytes` bytes of contents may go into one more record of `changes` changes: there is room for it, and it is
    /// small enough to leave room for others.
    pub fn takes_contents(&self, changes: usize, bytes: u64) -> bool {
        let most = (self.superblock.journal_bytes / CONTENTS_SHARE).min(self.journal_left());
        self.superblock.contents_since.is_some()
            && bytes <= most
            && record_bytes_for(changes, usize::try_from(bytes).expect("below 1 MiB")) <= most
    }

    /// Whether records have contents that may not be in the data file. A flush that syncs the data file then has to say so,
    /// by a record or by a checkpoint: otherwise a crash would bring them back over what was written later.
    pub fn has_contents(&self) -> bool {
        self.has_contents
    }

    fn journal_left(&self) -> u64 {
        self.superblock.journal_bytes - self.journal_used
    }

    /// Marks the layer as being written to in `session`, and gives it a journal if it has none. That survives the daemon,
    /// and the host with the session's first commit: before it there is nothing that a crash of the host must not lose,
    /// and what the journal lacks of its zeroes reads as zeroes anyway.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if the host has no room for the journal; the layer is unchanged then.
    pub fn begin_session(&mut self, session: SessionId, boot: BootId) -> Result<()> {
        let generation = self.superblock.generation + 1;
        let contents_since = NonZeroU64::new(self.next_sequence);
        let mut next = Superblock { session, boot, generation, contents_since, ..self.superblock.clone() };
        if next.journal_bytes == 0 {
            // Written, not only reserved: a record written into an unwritten extent would cost a commit of the host
            // file system's own journal (I6).
            let zeroes = vec![0; usize::try_from(JOURNAL_BYTES).expect("512 KiB")];
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
        self.contents_since = self.next_sequence;
        Ok(())
    }

    /// Marks the layer as closed cleanly. All contents in the journal are durable in the data file. If it is empty, programs
    /// that know of no contents can read the layer then: what it had is wiped out.
    pub fn end_session(&mut self) -> Result<()> {
        let contents_since = if self.has_journaled_changes() {
            NonZeroU64::new(self.next_sequence)
        } else {
            self.wipe_journal()?;
            None
        };
        let next = Superblock {
            session: SessionId::NONE,
            boot: BootId::NONE,
            contents_since,
            ..self.superblock.clone()
        };
        self.write_superblock(next)?;
        (self.contents_since, self.has_contents) = (self.next_sequence, false);
        Ok(())
    }

    /// Overwrites the records of an empty journal that say of contents.
    fn wipe_journal(&mut self) -> Result<()> {
        if self.journal_marked > 0 {
            let zeroes = vec![0; usize::try_from(self.journal_marked).expect("at most 1 MiB")];
            // The superblock of the checkpoint is durable. A crash leaves some of them, and the session.
            self.storage.write_durable_at(JOURNAL_OFFSET, &zeroes).context(|| "journal")?;
            self.journal_marked = 0;
        }
        Ok(())
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

    /// Commits `changes` to data that the caller has synced (I2). None, where all that there is to say is that the contents in
    /// earlier records are in the data file now.
    ///
    /// # Errors
    /// Those of the storage, which is latched then.
    ///
    /// # Panics
    /// If there are more changes than [`DurableMap::room_for_changes`], or the journal [is full](DurableMap::is_full).
    pub fn append(&mut self, changes: Vec<Change>) -> Result<()> {
        let sequence = self.next_sequence;
        // A session that an earlier version has begun knows of no contents, nor may whoever reads it.
        let contents_since = self.superblock.contents_since.map_or(0, |_| sequence);
        self.append_record(&JournalRecord { sequence, contents_since, changes, contents: Vec::new() })?;
        (self.contents_since, self.has_contents) = (sequence, false);
        Ok(())
    }

    /// Commits `changes` together with the contents of all blocks that become `Data` by them, which may be in the host's
    /// cache only: the data file needs no sync.
    ///
    /// # Errors
    /// Those of the storage, which is latched then.
    ///
    /// # Panics
    /// If the journal does not [take](DurableMap::takes_contents) so many.
    pub fn append_with_contents(&mut self, changes: Vec<Change>, contents: Vec<u8>) -> Result<()> {
        assert!(self.takes_contents(changes.len(), contents.len() as u64));
        let (sequence, contents_since) = (self.next_sequence, self.contents_since);
        let has_contents = !contents.is_empty();
        self.append_record(&JournalRecord { sequence, contents_since, changes, contents })?;
        self.has_contents |= has_contents;
        Ok(())
    }

    /// Appends `record` by one durable write, or by the sync that also makes the beginning of the session durable.
    fn append_record(&mut self, record: &JournalRecord) -> Result<()> {
        // Behind the journal lie the pages.
        assert!(record.encoded_bytes() <= self.journal_left());
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
        if record.contents_since > 0 {
            self.journal_marked = self.journal_marked.max(self.journal_used);
        }
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
        (self.contents_since, self.has_contents) = (self.next_sequence, false);
        Ok(())
    }
}
