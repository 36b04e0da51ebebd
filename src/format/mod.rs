#![doc = include_str!("FORMAT.md")]

mod block_state;
mod checksum;
mod fields;
mod ids;
mod journal;
mod layout;
mod map_page;
mod superblock;

pub use block_state::{BlockState, STATES_PER_WORD, StateWord};
pub use checksum::{CHECKSUM_BYTES, Checksum};
pub use ids::{BaseId, BaseRef, BootId, LayerId, SessionId};
pub use journal::{
    Change, JOURNAL_BLOCK_BYTES, JournalRecord, changes_that_fit, data_blocks, record_bytes_for,
};
pub use layout::{JOURNAL_BYTES, JOURNAL_BYTES_MAX, JOURNAL_OFFSET, PAGES_OFFSET, page_count, slot_offset};
pub use map_page::{BLOCKS_PER_PAGE, MapPage, PAGE_BYTES, PAGE_WORDS, page_of};
pub use superblock::{FORMAT_VERSION, SUPERBLOCK_BYTES, Superblock};
