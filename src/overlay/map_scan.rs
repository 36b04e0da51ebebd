//! Reading pages and journal of a map file: the states that they say, and all that is not as it should be.
//!
//! An opening refuses the layer at the first fault; a check wants to know of every one. Both read with this, so that they
//! never disagree. What is allocated: the journal (at most 1 MiB), and the contents in it once more; 4 KiB for each page that is whole, and for each end of a
//! change in the journal that lies within a page; and some 50 bytes for each page of the disk that a change covers.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;

use super::states::{PageWords, SparseStates};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    BLOCKS_PER_PAGE, Change, JOURNAL_BLOCK_BYTES, JOURNAL_OFFSET, JournalRecord, MapPage, PAGE_BYTES,
    PAGES_OFFSET, Superblock, data_blocks, page_count, slot_offset,
};
use crate::storage::Storage;
use crate::units::{BlockSpan, Geometry};

/// Most bytes read at once while the pages are loaded: a multiple of two slots.
const LOAD_BYTES_MAX: usize = 256 * PAGE_BYTES;

/// Fewest bytes read at once, so that a slot that was never written costs no seek; a multiple of two slots.
const LOAD_BYTES_MIN: usize = 16 * PAGE_BYTES;

/// Most pages that are remembered by number for a message.
const NOTED_PAGES_MAX: usize = 1024;

/// The current copy of a page.
#[derive(Clone, Copy, Debug)]
pub struct CurrentPage {
    /// 0 or 1.
    pub slot: u64,
    /// What it adds to the superblock's digest.
    pub checksum: u128,
}

/// What a record has of a run of blocks.
#[derive(Debug)]
pub struct BlockContents {
    /// The blocks.
    pub span: BlockSpan,
    /// Their contents.
    pub bytes: Vec<u8>,
}

/// What was read.
#[derive(Debug, Default)]
pub struct MapScan {
    /// Where the current copy of each page is.
    pub pages: BTreeMap<u64, CurrentPage>,
    /// Pages that the next checkpoint has to write: those with changes in the journal, and those of which an interrupted
    /// checkpoint left a copy that would otherwise seem to belong to the next one.
    pub stale: BTreeSet<u64>,
    /// What pages and journal say; nothing that can be relied upon if there is a fault.
    pub states: SparseStates,
    /// Bytes of the journal that hold records since the last checkpoint.
    pub journal_used: u64,
    /// The number that the next record gets.
    pub next_sequence: u64,
    /// Contents that may not be in the data file yet, in the order in which they were committed; of one block perhaps several.
    pub contents: Vec<BlockContents>,
    /// The number of the first record whose contents count.
    pub contents_since: u64,
    /// Why the map must not be used, if there is any reason.
    pub faults: Vec<MapFault>,
    /// Pages with a slot that holds no whole page, in order; the first ones.
    pub torn_pages: Vec<u64>,
    /// Whether an interrupted checkpoint left pages.
    pub checkpoint_cut: bool,
    /// Whether a crash cut the newest record short.
    pub record_cut: bool,
}

/// A reason not to use a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapFault {
    /// A page of a checkpoint that the superblock does not know of.
    PageNewer {
        /// The page.
        page: u64,
    },
    /// The pages are not those of the last checkpoint.
    PagesDiffer,
    /// A committed record is damaged or gone, for a later one is there.
    RecordLost {
        /// Its number.
        sequence: u64,
    },
    /// A block behind the disk's end has a state of its own.
    BehindEnd {
        /// The block.
        block: u64,
        /// Blocks of the disk.
        blocks: u64,
    },
    /// A record is whole, but says what cannot be.
    RecordInvalid {
        /// What it says.
        message: String,
    },
}

impl std::fmt::Display for MapFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PageNewer { page } => write!(f, "map page {page}: newer than the superblock"),
            Self::PagesDiffer => f.write_str(
                "map: the pages are not those of the last checkpoint (one is damaged, lost or stale)",
            ),
            Self::RecordLost { sequence } => write!(f, "journal: record {sequence} is damaged or lost"),
            Self::BehindEnd { block, blocks } => {
                write!(f, "the map names block {block} of a disk of {blocks} blocks")
            }
            Self::RecordInvalid { message } => f.write_str(message),
        }
    }
}

impl MapFault {
    /// As what an opening fails with.
    pub fn into_error(self) -> Error {
        Error::new(ErrorKind::Corrupt, self.to_string())
    }
}

impl MapScan {
    /// Reads the pages and the journal that belong to `superblock`.
    ///
    /// # Errors
    /// Those of the host; damage is a fault, not an error.
    pub fn read(storage: &dyn Storage, superblock: &Superblock) -> Result<Self> {
        let mut scan = Self { next_sequence: superblock.journal_sequence, ..Self::default() };
        scan.read_pages(storage, superblock)?;
        scan.read_journal(storage, superblock)?;
        Ok(scan)
    }

    /// Finds the current copy of every page: of the valid ones that the last checkpoint covers, the newest (I4). Slots
    /// that are damaged, or newer, are what an interrupted checkpoint left; that nothing else is missing is proved by
    /// the digest.
    fn read_pages(&mut self, storage: &dyn Storage, superblock: &Superblock) -> Result<()> {
        let pages = page_count(superblock.geometry);
        let end = slot_offset(pages, 0);
        let mut buffer = vec![0; LOAD_BYTES_MAX];
        let mut at = PAGES_OFFSET;
        while let Some(data) = storage.next_data(at)?.filter(|&data| data < end) {
            at = data - (data - PAGES_OFFSET) % (2 * PAGE_BYTES as u64);
            // Not more than there is: between the pages of a scattered map lie large holes.
            let run = storage.next_hole(data)?.saturating_sub(at).next_multiple_of(LOAD_BYTES_MIN as u64);
            let len = usize::try_from(run).unwrap_or(LOAD_BYTES_MAX).clamp(LOAD_BYTES_MIN, LOAD_BYTES_MAX);
            let chunk = &mut buffer[..len];
            storage.read_at(at, chunk)?;
            for (pair, bytes) in (0..).zip(chunk.chunks_exact(2 * PAGE_BYTES)) {
                let page = (at - PAGES_OFFSET) / (2 * PAGE_BYTES as u64) + pair;
                if page >= pages {
                    break;
                }
                if let Some((current, words)) = self.current_copy(superblock, page, bytes) {
                    self.pages.insert(page, current);
                    self.states.insert_page(page, words);
                }
            }
            at += len as u64;
        }
        let digest = self.pages.values().fold(0u128, |sum, page| sum.wrapping_add(page.checksum));
        if digest != superblock.pages_digest {
            self.faults.push(MapFault::PagesDiffer);
        }
        Ok(())
    }

    fn current_copy(
        &mut self,
        superblock: &Superblock,
        page: u64,
        slots: &[u8],
    ) -> Option<(CurrentPage, Box<PageWords>)> {
        let mut best: Option<(u64, CurrentPage, Box<PageWords>)> = None;
        for (slot, bytes) in (0..).zip(slots.chunks_exact(PAGE_BYTES)) {
            let bytes: &[u8; PAGE_BYTES] = bytes.try_into().expect("chunks of a page");
            if *bytes == [0; PAGE_BYTES] {
                continue;
            }
            let Ok((found, checksum)) = MapPage::decode(superblock.layer, page, bytes) else {
                if self.torn_pages.len() < NOTED_PAGES_MAX {
                    self.torn_pages.push(page);
                }
                continue;
            };
            if found.generation > superblock.checkpoint + 1 {
                if self.faults.is_empty() {
                    self.faults.push(MapFault::PageNewer { page });
                }
                continue;
            }
            if found.generation > superblock.checkpoint {
                self.checkpoint_cut = true;
                self.stale.insert(page);
                continue;
            }
            if best.as_ref().is_none_or(|(generation, ..)| found.generation > *generation) {
                let current = CurrentPage { slot, checksum: checksum.as_u128() };
                best = Some((found.generation, current, found.words));
            }
        }
        best.map(|(_, current, words)| (current, words))
    }

    /// Applies the records since the last checkpoint. The first block without the expected record is the end; were a
    /// later record behind it, a committed one would be lost.
    fn read_journal(&mut self, storage: &dyn Storage, superblock: &Superblock) -> Result<()> {
        let len = usize::try_from(superblock.journal_bytes).expect("checked by decode: at most 1 MiB");
        let mut journal = vec![0; len];
        storage.read_at(JOURNAL_OFFSET, &mut journal)?;
        // Of the disk as it is: a larger size is durable before the first change beyond the old one.
        let geometry = superblock.geometry;
        let decode = |at: usize| JournalRecord::decode(superblock.layer, geometry, &journal[at..]);
        let mut changes = Vec::new();
        let mut contents: Vec<(u64, BlockContents)> = Vec::new();
        let mut contents_since = superblock.contents_since.map_or(0, NonZeroU64::get);
        let mut at = 0;
        while at < len {
            let record = match decode(at) {
                Ok(Some(record)) if record.sequence == self.next_sequence => record,
                Ok(_) => break,
                Err(error) => {
                    self.faults.push(MapFault::RecordInvalid { message: error.to_string() });
                    return Ok(());
                }
            };
            self.next_sequence += 1;
            at += usize::try_from(record.encoded_bytes()).expect("it was in memory");
            contents_since = contents_since.max(record.contents_since);
            contents.extend(contents_of(&record, geometry).map(|found| (record.sequence, found)));
            changes.extend(record.changes);
        }
        // Of those that were durable in the data file since, what is there now may be newer.
        let kept = contents.into_iter().filter(|&(sequence, _)| sequence >= contents_since);
        self.contents = kept.map(|(_, found)| found).collect();
        self.contents_since = contents_since;
        self.states.apply_all(&changes);
        self.stale.extend(pages_of(&changes));
        let blocks = geometry.blocks();
        if let Some(block) = self.states.block_behind(blocks) {
            self.faults.push(MapFault::BehindEnd { block, blocks });
        }
        self.journal_used = at as u64;
        self.record_cut = JournalRecord::begins(self.next_sequence, journal.get(at..).unwrap_or_default());
        for at in (at..len).step_by(JOURNAL_BLOCK_BYTES) {
            match decode(at) {
                Ok(Some(later)) if later.sequence >= self.next_sequence => {
                    self.faults.push(MapFault::RecordLost { sequence: self.next_sequence });
                    return Ok(());
                }
                Ok(_) => {}
                Err(error) => {
                    self.faults.push(MapFault::RecordInvalid { message: error.to_string() });
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// The contents in `record`, run by run.
fn contents_of(record: &JournalRecord, geometry: Geometry) -> impl Iterator<Item = BlockContents> {
    let mut rest = record.contents.as_slice();
    let block_bytes = u64::from(geometry.block_bytes());
    let with_contents = if rest.is_empty() { &[] } else { record.changes.as_slice() };
    data_blocks(with_contents).map(move |span| {
        // The decoder has seen that they are as long as all runs together.
        let bytes;
        (bytes, rest) = rest.split_at(usize::try_from(span.len() * block_bytes).expect("within the record"));
        BlockContents { span, bytes: bytes.to_vec() }
    })
}

/// The pages that describe the blocks of `changes`, each once, in order.
pub fn pages_of(changes: &[Change]) -> impl Iterator<Item = u64> {
    let page = |block: u64| block / BLOCKS_PER_PAGE;
    let mut runs: Vec<(u64, u64)> =
        changes.iter().map(|change| (page(change.span.start), page(change.span.end - 1))).collect();
    runs.sort_unstable();
    let mut next = 0;
    runs.into_iter().flat_map(move |(first, last)| {
        let pages = first.max(next)..last + 1;
        next = next.max(last + 1);
        pages
    })
}
