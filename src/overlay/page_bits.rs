//! One bit per map page, set once and read without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// A set of map pages that only grows.
#[derive(Debug)]
pub struct PageBits {
    pages: u64,
    words: Box<[AtomicU64]>,
}

impl PageBits {
    /// No page out of `pages`.
    pub fn new(pages: u64) -> Self {
        Self { pages, words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        assert!(page < self.pages, "page {page} lies past the largest disk");
        &self.words[usize::try_from(page / 64).expect("the words were collected into memory")]
    }

    /// Whether `page` is in the set. Whoever sees it there also sees what its setter did before.
    ///
    /// # Panics
    /// If `page` is none of the pages.
    pub fn get(&self, page: u64) -> bool {
        self.word(page).load(Ordering::Acquire) & (1 << (page % 64)) != 0
    }

    /// Puts `page` into the set.
    ///
    /// # Panics
    /// If `page` is none of the pages.
    pub fn set(&self, page: u64) {
        self.word(page).fetch_or(1 << (page % 64), Ordering::Release);
    }
}
