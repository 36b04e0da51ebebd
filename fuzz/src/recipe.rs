//! A layer made from the fuzzer's bytes: a map file whose checksums fit, the data file and the base that it speaks of,
//! and, for as long as the recipe is honest, what each block must read as.

use std::collections::BTreeMap;
use std::sync::Arc;

use cowdisk::Result;
use cowdisk::format::{
    BLOCKS_PER_PAGE, BaseId, BaseRef, BlockState, BootId, Change, JOURNAL_BYTES_MAX, JOURNAL_OFFSET,
    JournalRecord, LayerId, MapPage, PAGE_WORDS, SessionId, StateWord, Superblock, data_blocks, page_count,
    slot_offset,
};
use cowdisk::overlay::{BaseImage, LayerFiles};
use cowdisk::storage::{MemStorage, Storage};
use cowdisk::units::{BlockSpan, Geometry};

use super::input::Input;

/// The layer's id.
pub const LAYER: LayerId = LayerId(*b"a layer of fuzz!");
/// The session that a recipe may leave open.
pub const SESSION: SessionId = SessionId(*b"session of fuzz!");
const BASE: BaseId = BaseId(*b"the content of a base under fuzz");

/// What a record has of a block, in each byte.
pub const JOURNALED: u8 = 0x77;

/// Memory that outlives an overlay over it.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<MemStorage>);

macro_rules! handed_on {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        impl Storage for Shared {
            $(fn $name(&self, $($argument: $kind),*) -> Result<$result> {
                self.0.$name($($argument),*)
            })*
        }
    };
}

handed_on! {
    size() -> u64;
    allocated() -> u64;
    read_at(offset: u64, buf: &mut [u8]) -> ();
    write_at(offset: u64, buf: &[u8]) -> ();
    write_durable_at(offset: u64, buf: &[u8]) -> ();
    sync() -> ();
    drop_cache() -> ();
    set_len(len: u64) -> ();
    allocate(offset: u64, len: u64) -> ();
    punch(offset: u64, len: u64) -> ();
    next_data(offset: u64) -> Option<u64>;
    next_hole(offset: u64) -> u64;
}

/// A layer, on no disk.
pub struct Recipe {
    /// As the superblock says.
    pub geometry: Geometry,
    /// As the superblock says.
    pub superblock: Superblock,
    /// Whether nothing in it is damaged or contradicts itself.
    pub honest: bool,
    /// What gave blocks their states, in order.
    changes: Vec<Change>,
    /// Blocks of which a record has the contents.
    journaled: Vec<BlockSpan>,
    data: Shared,
    map: Shared,
    base: Shared,
}

/// What the first and the last sector of a block hold in the file `kind`.
pub fn pattern(kind: u8, block: u64) -> [u8; 512] {
    let mut sector = [kind; 512];
    sector[..8].copy_from_slice(&block.to_le_bytes());
    sector
}

impl Recipe {
    /// Makes the layer whose session, if `session` is none, the recipe chooses itself.
    pub fn read(input: &mut Input<'_>, session: Option<(SessionId, BootId)>) -> Self {
        let geometry = read_geometry(input);
        let base = match input.count(1) {
            0 => BaseRef::Blank,
            _ => BaseRef::Image { id: BASE, size: 512 * (1 + input.below(geometry.size() / 512)) },
        };
        let mut superblock = Superblock::new(LAYER, geometry, base);
        superblock.generation = 1 + input.count(3);
        superblock.checkpoint = input.count(4);
        superblock.journal_sequence = 1 + input.count(3);
        superblock.journal_bytes = 4096 * input.count(JOURNAL_BYTES_MAX / 4096);
        (superblock.session, superblock.boot) = session.unwrap_or(match input.count(1) {
            0 => (SessionId::NONE, BootId::NONE),
            _ => (SESSION, BootId(*b"an earlier boot!")),
        });
        let (data, map, storage) = (Shared::default(), Shared::default(), Shared::default());
        let mut recipe = Self {
            geometry,
            superblock,
            honest: true,
            changes: Vec::new(),
            journaled: Vec::new(),
            data,
            map,
            base: storage,
        };
        recipe.write_pages(input);
        recipe.write_journal(input);
        recipe.write_superblocks(input);
        recipe.write_contents(input);
        recipe.damage(input);
        recipe
    }

    /// The two files, over the same memory each time.
    pub fn files(&self) -> LayerFiles {
        LayerFiles { data: Box::new(self.data.clone()), map: Box::new(self.map.clone()) }
    }

    /// The map file alone.
    pub fn map(&self) -> Shared {
        self.map.clone()
    }

    /// The base.
    pub fn base(&self) -> BaseImage {
        match self.superblock.base {
            BaseRef::Blank => BaseImage::blank(),
            BaseRef::Image { id, .. } => {
                BaseImage::image(id, Box::new(self.base.clone())).expect("it is not empty")
            }
        }
    }

    /// What an honest recipe makes of `block`.
    pub fn state(&self, block: u64) -> BlockState {
        let last =
            self.changes.iter().rev().find(|change| (change.span.start..change.span.end).contains(&block));
        last.map_or(BlockState::Base, |change| change.state)
    }

    /// Whether a record has contents of `block`, all bytes [`JOURNALED`].
    pub fn is_journaled(&self, block: u64) -> bool {
        self.journaled.iter().any(|span| (span.start..span.end).contains(&block))
    }

    /// Blocks at which something begins or ends.
    pub fn interesting(&self) -> Vec<u64> {
        let last = self.geometry.blocks() - 1;
        let ends = self.changes.iter().flat_map(|change| {
            let BlockSpan { start, end } = change.span;
            [start.saturating_sub(1), start, end.saturating_sub(1), end]
        });
        let mut blocks: Vec<u64> = ends.chain([0, last / 2, last]).filter(|&block| block <= last).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.truncate(100);
        blocks
    }

    /// The bytes of one sector of `block` as the recipe's files have them, if its state is `state`.
    pub fn sector(&self, state: BlockState, block: u64, offset: u64) -> [u8; 512] {
        match state {
            BlockState::Zero => [0; 512],
            BlockState::Data => pattern(b'd', block),
            BlockState::Base if offset + 512 <= self.base().size() => pattern(b'b', block),
            BlockState::Base => [0; 512],
        }
    }

    /// Pages in slots: the current ones, those that an interrupted checkpoint left, and, dishonestly, newer ones.
    fn write_pages(&mut self, input: &mut Input<'_>) {
        let mut slots: BTreeMap<(u64, u64), MapPage> = BTreeMap::new();
        let mut ops: BTreeMap<(u64, u64), Vec<Change>> = BTreeMap::new();
        let pages = self.geometry.blocks().div_ceil(BLOCKS_PER_PAGE);
        for _ in 0..input.count(6) {
            let (index, slot) = (input.below(pages), input.count(1));
            let mut page =
                MapPage { generation: 1 + input.count(5), index, words: Box::new([0; PAGE_WORDS]) };
            let mut changes = Vec::new();
            for _ in 0..input.count(5) {
                let start = input.below(BLOCKS_PER_PAGE);
                let end = (start + 1 + input.below(BLOCKS_PER_PAGE)).min(BLOCKS_PER_PAGE);
                let state = read_state(input);
                for block in start..end {
                    let (word, at) =
                        (usize::try_from(block / 32).expect("504"), usize::try_from(block % 32).expect("32"));
                    page.words[word] = StateWord(page.words[word]).with(at, at + 1, state).0;
                }
                let first = index * BLOCKS_PER_PAGE;
                changes.push(Change { span: BlockSpan::new(first + start, first + end), state });
            }
            slots.insert((index, slot), page);
            ops.insert((index, slot), changes);
        }
        let mut digest = 0u128;
        for index in 0..pages.min(1 << 16) {
            let current = (0..2)
                .filter_map(|slot| Some((slot, slots.get(&(index, slot))?)))
                .filter(|(_, page)| page.generation <= self.superblock.checkpoint)
                // Of two of one generation, which no cowdisk writes, the first.
                .max_by_key(|(slot, page)| (page.generation, 1 - slot));
            if let Some((slot, page)) = current {
                digest = digest.wrapping_add(page.encode(LAYER).1.as_u128());
                self.changes.extend(&ops[&(index, slot)]);
            }
        }
        for ((index, slot), page) in &slots {
            self.honest &= page.generation <= self.superblock.checkpoint + 1 && *index < 1 << 16;
            self.map.write_at(slot_offset(*index, *slot), &page.encode(LAYER).0).expect("memory");
        }
        assert!(pages <= page_count(self.geometry));
        self.superblock.pages_digest = digest;
        // States beyond the disk's end: no cowdisk writes them.
        let blocks = self.geometry.blocks();
        self.honest &= self.changes.iter().all(|change| change.span.end <= blocks);
    }

    /// Records one after the other; dishonestly, with a sequence number of their own.
    fn write_journal(&mut self, input: &mut Input<'_>) {
        let (mut at, mut sequence) = (0, self.superblock.journal_sequence);
        for _ in 0..input.count(6) {
            let mut changes = Vec::new();
            for _ in 0..input.count(6) {
                let start = input.below(self.geometry.blocks());
                let len = 1 + if input.count(1) == 0 { input.below(64) } else { input.below(1 << 32) };
                let end = if input.count(15) == 0 {
                    start + len
                } else {
                    (start + len).min(self.geometry.blocks())
                };
                self.honest &= end <= self.geometry.blocks();
                let end = end.min(start + u64::from(u32::MAX));
                changes.push(Change { span: BlockSpan::new(start, end), state: read_state(input) });
            }
            let off = input.byte();
            if off & 0xf0 == 0xf0 {
                self.honest = false;
                sequence = sequence.wrapping_add(u64::from(off & 0xf)).wrapping_sub(7);
            }
            // Other contents than the data file has; which of the two is there then depends.
            let blocks: u64 = data_blocks(&changes).map(BlockSpan::len).sum();
            let with_contents = off & 0xf0 == 0xe0 && blocks <= 4;
            self.honest &= !with_contents;
            let bytes = if with_contents { blocks * u64::from(self.geometry.block_bytes()) } else { 0 };
            let contents = vec![JOURNALED; usize::try_from(bytes).expect("small")];
            let contents_since = sequence.saturating_sub(u64::from(off & 3));
            let record = JournalRecord { sequence, contents_since, changes, contents };
            let bytes = record.encode(LAYER);
            if at + bytes.len() as u64 > self.superblock.journal_bytes {
                break;
            }
            self.map.write_at(JOURNAL_OFFSET + at, &bytes).expect("memory");
            if with_contents {
                self.journaled.extend(data_blocks(&record.changes));
            }
            self.changes.extend(record.changes);
            at += bytes.len() as u64;
            sequence = sequence.wrapping_add(1);
        }
    }

    /// Two copies; one may be torn, older, or say something else.
    fn write_superblocks(&mut self, input: &mut Input<'_>) {
        let copy = self.superblock.encode();
        let other = match input.count(5) {
            0..=3 => copy,
            4 => [0x55; 4096],
            _ => {
                self.honest = false;
                let mut older = Superblock { generation: input.count(9), ..self.superblock.clone() };
                older.pages_digest = input.below(3).into();
                older.journal_sequence = input.long();
                older.encode()
            }
        };
        let copies = if input.count(1) == 0 { [copy, other] } else { [other, copy] };
        self.map.write_at(0, &copies.concat()).expect("memory");
    }

    /// Data and base with a pattern in each interesting block.
    fn write_contents(&mut self, input: &mut Input<'_>) {
        let (geometry, blocks) = (self.geometry, self.interesting());
        for &block in &blocks {
            for at in sectors(geometry, block) {
                self.data.write_at(geometry.data_offset(at), &pattern(b'd', block)).expect("memory");
                self.base.write_at(at, &pattern(b'b', block)).expect("memory");
            }
        }
        self.data.set_len(geometry.data_bytes()).expect("memory");
        if let BaseRef::Image { size, .. } = self.superblock.base {
            self.base.set_len(size).expect("memory");
        }
        if input.byte() & 0x1f == 0x1f {
            self.honest = false;
            self.data.set_len(input.below(geometry.data_bytes())).expect("memory");
        }
    }

    /// Changes bytes of the map file behind the checksums' backs.
    fn damage(&mut self, input: &mut Input<'_>) {
        for _ in 0..input.count(5) {
            let (at, byte) = (input.below(self.map.size().expect("memory")), input.byte());
            self.honest = false;
            self.map.write_at(at, &[byte]).expect("memory");
        }
    }
}

/// Where the first and the last sector of `block` lie on the disk, in bytes.
pub fn sectors(geometry: Geometry, block: u64) -> Vec<u64> {
    let (start, len) = geometry.bytes_of(BlockSpan::new(block, block + 1));
    if len == 0 { Vec::new() } else { vec![start, start + len - 512] }
}

/// A state.
pub fn read_state(input: &mut Input<'_>) -> BlockState {
    BlockState::from_bits(input.count(2)).expect("0 to 2")
}

fn read_geometry(input: &mut Input<'_>) -> Geometry {
    let block_bytes = 4096 << input.count(4);
    let lead = 512 * u32::try_from(input.below(u64::from(block_bytes) / 512)).expect("small");
    // Up to 2 GiB; mostly small.
    let sectors_max = if input.count(7) == 0 { 1 << 22 } else { 1 << 17 };
    let size = 512 * (1 + input.below(sectors_max));
    Geometry::new(size, block_bytes, lead).expect("all in range")
}
