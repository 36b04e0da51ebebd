//! Records of the journal: what one commit changed in the map.

use super::block_state::BlockState;
use super::checksum::{CHECKSUM_BYTES, Checksum};
use super::fields::{u32_at, u64_at};
use super::ids::LayerId;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockSpan, Geometry};

/// A record is a whole number of these, in bytes, so that no two records share a page of the host.
pub const JOURNAL_BLOCK_BYTES: usize = 4096;

const MAGIC_VALUE: [u8; 8] = *b"COWJRNL1";

const MAGIC: usize = 0;
const SEQUENCE: usize = MAGIC + 8;
const BYTES: usize = SEQUENCE + 8;
const COUNT: usize = BYTES + 4;
const CONTENTS_SINCE: usize = COUNT + 4;
const CONTENTS_BYTES: usize = CONTENTS_SINCE + 8;
const RESERVED: usize = CONTENTS_BYTES + 4;
const CHANGES: usize = RESERVED + 12;
const _: () = assert!(CHANGES == 48);

const CHANGE_BYTES: usize = 16;
const CHANGE_FIRST: usize = 0;
const CHANGE_BLOCKS: usize = CHANGE_FIRST + 8;
const CHANGE_STATE: usize = CHANGE_BLOCKS + 4;
const CHANGE_RESERVED: usize = CHANGE_STATE + 1;
const _: () = assert!(CHANGE_RESERVED + 3 == CHANGE_BYTES);

/// A run of blocks that got a new state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The blocks: 1 to 2³² − 1 of them.
    pub span: BlockSpan,
    /// Their state from now on.
    pub state: BlockState,
}

/// One commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalRecord {
    /// Grows by 1 with each record of the layer's life, from 1 on.
    pub sequence: u64,
    /// The number of the first record whose contents may not be in the data file yet, this one's included: those of
    /// earlier ones are there, durably, and may have been overwritten since.
    pub contents_since: u64,
    /// What changed, in the order in which it is to be applied. None if the record says no more than `contents_since`.
    pub changes: Vec<Change>,
    /// The contents of all blocks that become [`BlockState::Data`], one after the other; or none of them, if the data file
    /// had them before.
    pub contents: Vec<u8>,
}

/// Bytes that a record of `changes` changes and `contents` bytes of contents takes.
pub fn record_bytes_for(changes: usize, contents: usize) -> u64 {
    let bytes = CHANGES + changes * CHANGE_BYTES + contents + CHECKSUM_BYTES;
    bytes.next_multiple_of(JOURNAL_BLOCK_BYTES) as u64
}

/// How many changes without contents a record of at most `bytes` bytes, a multiple of [`JOURNAL_BLOCK_BYTES`], can hold.
pub fn changes_that_fit(bytes: u64) -> usize {
    let bytes = usize::try_from(bytes).expect("a record fits memory");
    bytes.saturating_sub(CHANGES + CHECKSUM_BYTES) / CHANGE_BYTES
}

/// Blocks that become `Data` by `changes`: those of which a record may have the contents.
pub fn data_blocks(changes: &[Change]) -> impl Iterator<Item = BlockSpan> + '_ {
    changes.iter().filter(|change| change.state == BlockState::Data).map(|change| change.span)
}

impl JournalRecord {
    /// Bytes of the record, a multiple of [`JOURNAL_BLOCK_BYTES`].
    pub fn encoded_bytes(&self) -> u64 {
        record_bytes_for(self.changes.len(), self.contents.len())
    }

    /// The record as bytes.
    ///
    /// # Panics
    /// If a change has no block or 2³² or more: the caller cuts them.
    pub fn encode(&self, layer: LayerId) -> Vec<u8> {
        let total = self.encoded_bytes();
        let mut bytes = vec![0; usize::try_from(total).expect("a record fits memory")];
        let as_u32 = |value: u64| u32::try_from(value).expect("a record stays below 4 GiB");
        bytes[MAGIC..SEQUENCE].copy_from_slice(&MAGIC_VALUE);
        bytes[SEQUENCE..BYTES].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[BYTES..COUNT].copy_from_slice(&as_u32(total).to_le_bytes());
        bytes[COUNT..CONTENTS_SINCE].copy_from_slice(&as_u32(self.changes.len() as u64).to_le_bytes());
        bytes[CONTENTS_SINCE..CONTENTS_BYTES].copy_from_slice(&self.contents_since.to_le_bytes());
        bytes[CONTENTS_BYTES..RESERVED].copy_from_slice(&as_u32(self.contents.len() as u64).to_le_bytes());
        let (changes, rest) = bytes[CHANGES..].split_at_mut(self.changes.len() * CHANGE_BYTES);
        rest[..self.contents.len()].copy_from_slice(&self.contents);
        for (place, change) in changes.chunks_exact_mut(CHANGE_BYTES).zip(&self.changes) {
            assert!(!change.span.is_empty());
            let blocks = u32::try_from(change.span.len()).expect("the caller cuts longer runs");
            place[CHANGE_FIRST..CHANGE_BLOCKS].copy_from_slice(&change.span.start.to_le_bytes());
            place[CHANGE_BLOCKS..CHANGE_STATE].copy_from_slice(&blocks.to_le_bytes());
            place[CHANGE_STATE] = change.state as u8;
        }
        Checksum::seal(layer, &mut bytes);
        bytes
    }

    /// Whether the first bytes of `journal` are those of the record with this number, whole or not.
    pub fn begins(sequence: u64, journal: &[u8]) -> bool {
        journal.len() >= BYTES
            && journal[MAGIC..SEQUENCE] == MAGIC_VALUE
            && u64_at(journal, SEQUENCE) == sequence
    }

    /// Reads the record at the start of `journal`, of a disk of this geometry. `None` where there is no valid record: the end
    /// of the journal, or a record that a crash tore.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the checksum fits but a value is out of its range.
    pub fn decode(layer: LayerId, geometry: Geometry, journal: &[u8]) -> Result<Option<Self>> {
        let Some(bytes) = whole_record(layer, journal) else { return Ok(None) };
        let sequence = u64_at(bytes, SEQUENCE);
        let corrupt =
            |what: &str| Error::new(ErrorKind::Corrupt, format!("journal record {sequence}: {what}"));
        let count = u32_at(bytes, COUNT) as usize;
        let contents_since = u64_at(bytes, CONTENTS_SINCE);
        let contents_bytes = u32_at(bytes, CONTENTS_BYTES) as usize;
        let room = bytes.len() - CHANGES - CHECKSUM_BYTES;
        if count > room / CHANGE_BYTES || contents_bytes > room - count * CHANGE_BYTES {
            return Err(corrupt("more changes or contents than fit into it"));
        }
        if record_bytes_for(count, contents_bytes) != bytes.len() as u64 {
            return Err(corrupt("longer than its changes need"));
        }
        if contents_since > sequence {
            return Err(corrupt("it knows of contents in a later record"));
        }
        let (used, rest) = bytes[CHANGES..bytes.len() - CHECKSUM_BYTES].split_at(count * CHANGE_BYTES);
        let (contents, rest) = rest.split_at(contents_bytes);
        if bytes[RESERVED..CHANGES].iter().chain(rest).any(|&byte| byte != 0) {
            return Err(corrupt("reserved bytes are not zero"));
        }
        let mut changes = Vec::with_capacity(count);
        for place in used.chunks_exact(CHANGE_BYTES) {
            let change = decode_change(place, geometry.blocks());
            changes.push(change.ok_or_else(|| corrupt("a change is out of range"))?);
        }
        // Below 2⁶⁴: fewer than 2¹⁶ changes of fewer than 2³² blocks each.
        let blocks: u64 = data_blocks(&changes).map(BlockSpan::len).sum();
        let all = u128::from(blocks) * u128::from(geometry.block_bytes());
        if contents_bytes > 0 && contents_bytes as u128 != all {
            return Err(corrupt("its contents are not those of its blocks"));
        }
        Ok(Some(Self { sequence, contents_since, changes, contents: contents.to_vec() }))
    }
}

/// A change as it stands in a record of a disk of `disk_blocks` blocks; `None` if a value is out of its range.
fn decode_change(place: &[u8], disk_blocks: u64) -> Option<Change> {
    let (first, blocks) = (u64_at(place, CHANGE_FIRST), u64::from(u32_at(place, CHANGE_BLOCKS)));
    let state = Some(place[CHANGE_STATE]).filter(|&state| state < 3)?;
    let state = BlockState::from_bits(u64::from(state))?;
    let end = first.checked_add(blocks).filter(|&end| end <= disk_blocks && blocks > 0)?;
    let reserved_zero = place[CHANGE_RESERVED..].iter().all(|&byte| byte == 0);
    reserved_zero.then(|| Change { span: BlockSpan::new(first, end), state })
}

/// The bytes of the record at the start of `journal`, if there is one and its checksum fits.
fn whole_record(layer: LayerId, journal: &[u8]) -> Option<&[u8]> {
    if journal.len() < JOURNAL_BLOCK_BYTES || journal[MAGIC..SEQUENCE] != MAGIC_VALUE {
        return None;
    }
    let len = u32_at(journal, BYTES) as usize;
    if len == 0 || !len.is_multiple_of(JOURNAL_BLOCK_BYTES) || len > journal.len() {
        return None;
    }
    Checksum::verify(layer, &journal[..len])?;
    Some(&journal[..len])
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: LayerId = LayerId([7; 16]);

    fn geometry(blocks: u64) -> Geometry {
        Geometry::new(blocks * 4096, 4096, 0).expect("valid")
    }

    fn record(changes: u64) -> JournalRecord {
        let changes = (0..changes)
            .map(|n| Change { span: BlockSpan::new(3 * n, 3 * n + 2), state: BlockState::Zero })
            .collect();
        JournalRecord { sequence: 5, contents_since: 0, changes, contents: Vec::new() }
    }

    #[test]
    fn records_survive_their_encoding() {
        for changes in [0, 1, 252, 253, 1000] {
            let bytes = record(changes).encode(LAYER);
            assert_eq!(bytes.len() as u64, record_bytes_for(usize::try_from(changes).expect("small"), 0));
            assert_eq!(
                JournalRecord::decode(LAYER, geometry(1 << 20), &bytes).expect("valid"),
                Some(record(changes))
            );
        }
        assert_eq!(record_bytes_for(252, 0), 4096);
        assert_eq!(record_bytes_for(253, 0), 8192);
        assert_eq!((changes_that_fit(0), changes_that_fit(4096), changes_that_fit(8192)), (0, 252, 508));
    }

    #[test]
    fn a_torn_record_is_no_record() {
        let bytes = record(300).encode(LAYER);
        for sector in (0..bytes.len()).step_by(512) {
            let mut torn = bytes.clone();
            torn[sector..sector + 512].fill(0xee);
            assert_eq!(
                JournalRecord::decode(LAYER, geometry(1 << 20), &torn).expect("not corrupt"),
                None,
                "at {sector}"
            );
        }
        assert_eq!(
            JournalRecord::decode(LAYER, geometry(1 << 20), &bytes[..4096]).expect("not corrupt"),
            None
        );
        assert_eq!(JournalRecord::decode(LAYER, geometry(1 << 20), &[]).expect("not corrupt"), None);
    }

    /// Such a record was taken, and the next one looked for within it.
    #[test]
    fn a_record_longer_than_its_changes_need_is_corrupt() {
        let mut bytes = record(1).encode(LAYER);
        bytes.resize(2 * JOURNAL_BLOCK_BYTES, 0);
        bytes[JOURNAL_BLOCK_BYTES - CHECKSUM_BYTES..].fill(0);
        bytes[BYTES..COUNT].copy_from_slice(&8192u32.to_le_bytes());
        Checksum::seal(LAYER, &mut bytes);
        assert!(JournalRecord::decode(LAYER, geometry(1 << 20), &bytes).is_err());
    }

    #[test]
    fn a_change_past_the_end_of_the_disk_is_corrupt() {
        let bytes = record(10).encode(LAYER);
        assert!(JournalRecord::decode(LAYER, geometry(20), &bytes).is_err());
    }
}
