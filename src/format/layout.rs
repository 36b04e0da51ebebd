//! Where things lie in a map file.

use super::map_page::{BLOCKS_PER_PAGE, PAGE_BYTES};
use super::superblock::SUPERBLOCK_BYTES;
use crate::units::Geometry;

/// Where the journal begins, in bytes: after the two copies of the superblock.
pub const JOURNAL_OFFSET: u64 = 2 * SUPERBLOCK_BYTES as u64;

/// Bytes that a new journal has: 128 commits of up to 252 changes each before a checkpoint is needed, or 64 of a block of
/// 4 KiB with its contents: such commits ran at 0.8 times the speed with half of it, and no faster with twice as much. The first
/// commit of a disk writes all of it.
pub const JOURNAL_BYTES: u64 = 512 << 10;

/// Largest journal, in bytes: all the room before the pages.
pub const JOURNAL_BYTES_MAX: u64 = PAGES_OFFSET - JOURNAL_OFFSET;

/// Where the first map page begins, in bytes.
pub const PAGES_OFFSET: u64 = 1 << 20;

/// Where slot `slot` (0 or 1) of page `page` begins, in bytes.
pub fn slot_offset(page: u64, slot: u64) -> u64 {
    PAGES_OFFSET + (2 * page + slot) * PAGE_BYTES as u64
}

/// How many pages describe a disk of this geometry once it has grown as far as it can.
pub fn page_count(geometry: Geometry) -> u64 {
    geometry.blocks_max().div_ceil(BLOCKS_PER_PAGE)
}
