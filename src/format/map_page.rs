//! A page of the allocation map: the states of 16,128 blocks.

use super::block_state::{STATES_PER_WORD, StateWord};
use super::checksum::{CHECKSUM_BYTES, Checksum};
use super::fields::u64_at;
use super::ids::LayerId;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of an encoded page.
pub const PAGE_BYTES: usize = 4096;

/// Words of states in a page.
pub const PAGE_WORDS: usize = 504;

/// Blocks that a page describes: 63 MiB of disk in blocks of 4 KiB.
pub const BLOCKS_PER_PAGE: u64 = (PAGE_WORDS * STATES_PER_WORD) as u64;

const GENERATION: usize = 0;
const PAGE_INDEX: usize = GENERATION + 8;
const RESERVED: usize = PAGE_INDEX + 8;
const STATES: usize = RESERVED + 32;
const END: usize = STATES + PAGE_WORDS * 8;
const _: () = assert!(END + CHECKSUM_BYTES == PAGE_BYTES);

/// The page that describes `block`, and the block's index in it.
pub fn page_of(block: u64) -> (u64, usize) {
    let within = usize::try_from(block % BLOCKS_PER_PAGE).expect("below 16,128");
    (block / BLOCKS_PER_PAGE, within)
}

/// One page of the durable map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapPage {
    /// The number of the checkpoint that wrote it, at least 1. I4: of two valid copies the higher one that the
    /// superblock covers is the page.
    pub generation: u64,
    /// Which page it is; it describes blocks `index × 16,128` and on.
    pub index: u64,
    /// The states, each word valid.
    pub words: Box<[u64; PAGE_WORDS]>,
}

impl MapPage {
    /// The page as bytes, and its checksum.
    pub fn encode(&self, layer: LayerId) -> ([u8; PAGE_BYTES], Checksum) {
        let mut bytes = [0; PAGE_BYTES];
        bytes[GENERATION..PAGE_INDEX].copy_from_slice(&self.generation.to_le_bytes());
        bytes[PAGE_INDEX..RESERVED].copy_from_slice(&self.index.to_le_bytes());
        for (place, word) in bytes[STATES..END].chunks_exact_mut(8).zip(self.words.iter()) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let checksum = Checksum::seal(layer, &mut bytes);
        (bytes, checksum)
    }

    /// Reads a page, and its checksum.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the checksum does not fit, or if some value is out of its range though it does.
    pub fn decode(layer: LayerId, index: u64, bytes: &[u8; PAGE_BYTES]) -> Result<(Self, Checksum)> {
        let corrupt = |what: &str| Error::new(ErrorKind::Corrupt, format!("map page {index}: {what}"));
        let checksum = Checksum::verify(layer, bytes).ok_or_else(|| corrupt("checksum does not fit"))?;
        let mut words = Box::new([0; PAGE_WORDS]);
        for (place, at) in words.iter_mut().zip((STATES..END).step_by(8)) {
            *place = u64_at(bytes, at);
        }
        let page = Self { generation: u64_at(bytes, GENERATION), index: u64_at(bytes, PAGE_INDEX), words };
        if page.index != index {
            return Err(corrupt("belongs to another place"));
        }
        if page.generation == 0 || bytes[RESERVED..STATES].iter().any(|&byte| byte != 0) {
            return Err(corrupt("reserved bytes are not zero"));
        }
        if !page.words.iter().all(|&word| StateWord(word).is_valid()) {
            return Err(corrupt("a block has the reserved state 3"));
        }
        Ok((page, checksum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BlockState;

    const LAYER: LayerId = LayerId([7; 16]);

    fn page() -> MapPage {
        let mut words = Box::new([0; PAGE_WORDS]);
        words[503] = StateWord::filled(BlockState::Zero).0;
        MapPage { generation: 3, index: 9, words }
    }

    #[test]
    fn a_page_survives_its_encoding() {
        let (bytes, checksum) = page().encode(LAYER);
        assert_eq!(MapPage::decode(LAYER, 9, &bytes).expect("valid"), (page(), checksum));
    }

    #[test]
    fn a_page_of_another_layer_or_place_or_with_a_flipped_bit_is_refused() {
        let (bytes, _) = page().encode(LAYER);
        assert!(MapPage::decode(LayerId([8; 16]), 9, &bytes).is_err());
        assert!(MapPage::decode(LAYER, 10, &bytes).is_err());
        for at in (0..PAGE_BYTES).step_by(7) {
            let mut flipped = bytes;
            flipped[at] ^= 0x10;
            assert!(MapPage::decode(LAYER, 9, &flipped).is_err(), "bit of byte {at}");
        }
    }

    #[test]
    fn the_reserved_state_is_refused_even_with_a_right_checksum() {
        let mut bad = page();
        bad.words[0] = 3;
        let (bytes, _) = bad.encode(LAYER);
        assert!(MapPage::decode(LAYER, 9, &bytes).is_err());
    }

    #[test]
    fn blocks_are_counted_through_the_pages() {
        assert_eq!(page_of(0), (0, 0));
        assert_eq!(page_of(16_127), (0, 16_127));
        assert_eq!(page_of(16_128), (1, 0));
    }
}
