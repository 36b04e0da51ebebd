//! Memory as [`Storage`], for tests and benches of the engine: sparse, and durable as soon as it is written.

use std::collections::BTreeMap;

use parking_lot::RwLock;

use super::Storage;
use crate::error::Result;

const PAGE: u64 = 4096;

/// A sparse array of bytes in memory, in pages of 4 KiB.
#[derive(Debug, Default)]
pub struct MemStorage {
    /// Guards contents and end together.
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    pages: BTreeMap<u64, Box<[u8]>>,
    len: u64,
}

impl MemStorage {
    /// An empty array.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Cuts `offset..offset + len` at page borders: (page, first byte within it, first byte within the buffer, length).
fn cut(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = usize::try_from(at % PAGE).expect("below 4,096");
        let count = (len - done).min(4096 - within);
        let piece = (at / PAGE, within, done, count);
        done += count;
        (count > 0).then_some(piece)
    })
}

impl Storage for MemStorage {
    fn size(&self) -> Result<u64> {
        Ok(self.state.read().len)
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.state.read().pages.len() as u64 * PAGE)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let state = self.state.read();
        for (page, within, at, count) in cut(offset, buf.len()) {
            match state.pages.get(&page) {
                Some(bytes) => buf[at..at + count].copy_from_slice(&bytes[within..within + count]),
                None => buf[at..at + count].fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let mut state = self.state.write();
        for (page, within, at, count) in cut(offset, buf.len()) {
            let bytes = state.pages.entry(page).or_insert_with(|| vec![0; 4096].into());
            bytes[within..within + count].copy_from_slice(&buf[at..at + count]);
        }
        if !buf.is_empty() {
            state.len = state.len.max(offset + buf.len() as u64);
        }
        Ok(())
    }

    fn write_durable_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_at(offset, buf)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut state = self.state.write();
        if len < state.len {
            drop(state.pages.split_off(&len.div_ceil(PAGE)));
            let within = usize::try_from(len % PAGE).expect("below 4,096");
            if let Some(bytes) = state.pages.get_mut(&(len / PAGE)) {
                bytes[within..].fill(0);
            }
        }
        state.len = len;
        Ok(())
    }

    fn allocate(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        let mut state = self.state.write();
        let (first_whole, end_whole) = (offset.div_ceil(PAGE), (offset + len) / PAGE);
        let len = usize::try_from(len).expect("a range in memory");
        let touched: Vec<_> = cut(offset, len).collect();
        for (page, within, _, count) in touched {
            if (first_whole..end_whole).contains(&page) {
                state.pages.remove(&page);
            } else if let Some(bytes) = state.pages.get_mut(&page) {
                bytes[within..within + count].fill(0);
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        let state = self.state.read();
        let found = state.pages.range(offset / PAGE..).next().map(|(page, _)| (page * PAGE).max(offset));
        Ok(found.filter(|&at| at < state.len))
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        let state = self.state.read();
        let mut page = offset / PAGE;
        while state.pages.contains_key(&page) {
            page += 1;
        }
        Ok((page * PAGE).max(offset).min(state.len.max(offset)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_behaves_as_a_sparse_file() {
        let storage = MemStorage::new();
        storage.write_at(5000, &[1; 10_000]).expect("write");
        storage.punch(6000, 7000).expect("punch");
        let mut buf = vec![9; 16384];
        storage.read_at(0, &mut buf).expect("read");
        let expected = |at: usize| u8::from((5000..6000).contains(&at) || (13_000..15_000).contains(&at));
        assert!(buf.iter().enumerate().all(|(at, &byte)| byte == expected(at)));
        assert_eq!(storage.next_data(0).expect("seek"), Some(4096));
        assert_eq!(storage.next_hole(4096).expect("seek"), 8192);
        assert_eq!(storage.next_hole(12288).expect("seek"), 15_000);
        storage.set_len(14_000).expect("cut");
        storage.set_len(20_000).expect("grow");
        storage.read_at(13_990, &mut buf[..20]).expect("read");
        assert_eq!(buf[..20], [[1; 10], [0; 10]].concat());
    }
}
