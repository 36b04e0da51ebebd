//! One bit per map page, set once and read without a lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words of a chunk. A chunk has the bits of 4,096 pages, which describe 252 GiB in blocks of 4 KiB.
const CHUNK_WORDS: usize = 64;
const CHUNK_PAGES: u64 = CHUNK_WORDS as u64 * 64;

type Chunk = [AtomicU64; CHUNK_WORDS];

/// A set of map pages that only grows. It takes memory for the chunks that have a page of the set, and 16 bytes for each of
/// the others: there is one for the largest disk, however small the disk is, and a thousand disks may be open.
#[derive(Debug)]
pub struct PageBits {
    pages: u64,
    chunks: Box<[OnceLock<Box<Chunk>>]>,
}

impl PageBits {
    /// No page out of `pages`.
    pub fn new(pages: u64) -> Self {
        Self { pages, chunks: (0..pages.div_ceil(CHUNK_PAGES)).map(|_| OnceLock::new()).collect() }
    }

    fn chunk(&self, page: u64) -> &OnceLock<Box<Chunk>> {
        assert!(page < self.pages, "page {page} lies past the largest disk");
        &self.chunks[usize::try_from(page / CHUNK_PAGES).expect("the chunks were collected into memory")]
    }

    /// Whether `page` is in the set. Whoever sees it there also sees what its setter did before.
    ///
    /// # Panics
    /// If `page` is none of the pages.
    pub fn get(&self, page: u64) -> bool {
        let (word, bit) = place_in_chunk(page);
        self.chunk(page).get().is_some_and(|chunk| chunk[word].load(Ordering::Acquire) & bit != 0)
    }

    /// Puts `page` into the set.
    ///
    /// # Panics
    /// If `page` is none of the pages.
    pub fn set(&self, page: u64) {
        let (word, bit) = place_in_chunk(page);
        let chunk = self.chunk(page).get_or_init(|| Box::new([const { AtomicU64::new(0) }; CHUNK_WORDS]));
        chunk[word].fetch_or(bit, Ordering::Release);
    }
}

/// The word of its chunk that has the bit of `page`, and that bit.
fn place_in_chunk(page: u64) -> (usize, u64) {
    let within = page % CHUNK_PAGES;
    (usize::try_from(within / 64).expect("below the words of a chunk"), 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_the_pages_that_were_put_into_it_and_no_others() {
        let pages = 3 * CHUNK_PAGES + 5;
        let set = PageBits::new(pages);
        let members = [0, 63, 64, CHUNK_PAGES - 1, CHUNK_PAGES, 3 * CHUNK_PAGES, pages - 1];
        members.iter().for_each(|&page| set.set(page));
        let found: Vec<u64> = (0..pages).filter(|&page| set.get(page)).collect();
        assert_eq!(found, members);
    }

    /// Each open disk had 33 KiB for each of two sets, of which all but a few bytes were zero.
    #[test]
    fn only_the_chunks_that_have_pages_take_memory() {
        let set = PageBits::new(1 << 18);
        assert!(!set.get(5));
        set.set(CHUNK_PAGES + 5);
        let made: Vec<usize> = (0..set.chunks.len()).filter(|&at| set.chunks[at].get().is_some()).collect();
        assert_eq!(made, [1]);
    }

    #[test]
    #[should_panic(expected = "past the largest disk")]
    fn a_page_past_the_end_of_its_last_chunk_is_refused() {
        PageBits::new(CHUNK_PAGES + 5).get(CHUNK_PAGES + 5);
    }
}
