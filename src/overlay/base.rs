//! The base under an overlay: read-only, zeroes past its end.

use std::os::fd::BorrowedFd;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{BaseId, BaseRef};
use crate::storage::Storage;

/// What blocks in state `Base` show. I1: nothing here writes.
#[derive(Debug)]
pub struct BaseImage {
    reference: BaseRef,
    /// `None` for a blank base.
    storage: Option<Box<dyn Storage>>,
}

impl BaseImage {
    /// All zeroes.
    pub fn blank() -> Self {
        Self { reference: BaseRef::Blank, storage: None }
    }

    /// The image `id`, whose bytes are `storage`. That they are, the caller vouches for: a hash of them was compared
    /// when they were stored.
    ///
    /// # Errors
    /// If the storage's size cannot be read; [`ErrorKind::Corrupt`] if it is empty.
    pub fn image(id: BaseId, storage: Box<dyn Storage>) -> Result<Self> {
        let size = storage.size()?;
        if size == 0 {
            return Err(Error::new(ErrorKind::Corrupt, format!("base image {id}: empty")));
        }
        Ok(Self { reference: BaseRef::Image { id, size }, storage: Some(storage) })
    }

    /// What an overlay's superblock calls this base.
    pub fn reference(&self) -> BaseRef {
        self.reference
    }

    /// Bytes of the base; 0 for a blank one. Past them it is zeroes.
    pub fn size(&self) -> u64 {
        match self.reference {
            BaseRef::Blank => 0,
            BaseRef::Image { size, .. } => size,
        }
    }

    /// Fills `buf` with what lies at `offset`, in bytes of the disk: zeroes past the base's end.
    ///
    /// # Errors
    /// Those of the host's disk; [`ErrorKind::Io`] if the base's file has been cut since it was opened.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let in_base = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let (from_base, past_end) = buf.split_at_mut(in_base.min(buf.len()));
        past_end.fill(0);
        match &self.storage {
            Some(storage) if !from_base.is_empty() => {
                storage.read_exact_at(offset, from_base).context(|| "base image")
            }
            _ => Ok(()),
        }
    }

    /// [`BaseImage::read_at`] out of the host's memory; see [`Storage::read_now`].
    ///
    /// # Errors
    /// The same.
    pub fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        let in_base = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let (from_base, past_end) = buf.split_at_mut(in_base.min(buf.len()));
        past_end.fill(0);
        match &self.storage {
            Some(storage) if !from_base.is_empty() => {
                storage.read_now(offset, from_base).context(|| "base image")
            }
            _ => Ok(true),
        }
    }

    /// See [`Storage::cached_file`].
    pub fn cached_file(&self) -> Option<BorrowedFd<'_>> {
        self.storage.as_ref()?.cached_file()
    }

    /// The first byte at or after `offset` that may not be zero, or `None`.
    ///
    /// A hole of the base's file is enough to call its bytes zero: the file's contents are fixed, and a hole reads as
    /// zeroes. (An overlay's own data file is never asked: there the map alone knows.)
    ///
    /// # Errors
    /// Those of the host's disk; [`ErrorKind::Io`] if the base's file has been cut since it was opened. What was cut off
    /// looks like a hole, and blocks that are cleared over a hole show the base again: once it is back, its old bytes.
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        match &self.storage {
            Some(storage) if offset < self.size() => {
                storage.next_data_up_to(offset, self.size()).context(|| "base image")
            }
            _ => Ok(None),
        }
    }

    /// The first byte at or after `offset`, itself not in a hole, from which on there is one.
    ///
    /// # Errors
    /// Those of the host's disk.
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        match &self.storage {
            Some(storage) if offset < self.size() => storage.next_hole(offset),
            _ => Ok(offset),
        }
    }

    /// Whether `len` bytes at `offset` are known to be zeroes without reading them.
    ///
    /// # Errors
    /// Those of the host's disk.
    pub fn is_hole(&self, offset: u64, len: u64) -> Result<bool> {
        Ok(self.next_data(offset)?.is_none_or(|data| data >= offset + len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::FileStorage;

    /// A base of two blocks of data and a hole behind them, and its file.
    fn base() -> (BaseImage, std::fs::File) {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(1 << 20).expect("size it");
        file.write_all_at(&[7; 8192], 0).expect("write");
        let storage = FileStorage::new(file.try_clone().expect("the same file"), "base");
        (BaseImage::image(BaseId([1; 32]), Box::new(storage)).expect("not empty"), file)
    }

    #[test]
    fn a_base_ends_in_zeroes() {
        let (base, _file) = base();
        let mut buf = [9; 8192];
        base.read_at((1 << 20) - 4096, &mut buf).expect("half of it past the end");
        assert_eq!(buf, [0; 8192]);
        base.read_at(u64::MAX - 8192, &mut buf).expect("all of it past the end");
        assert_eq!(base.next_data(8192).expect("seek"), None);
    }

    /// What was cut off read as zeroes, and counted as a hole.
    #[test]
    fn a_base_that_was_cut_is_an_error_and_no_hole() {
        let (base, file) = base();
        file.set_len(6000).expect("cut");
        let mut buf = [9; 4096];
        base.read_at(0, &mut buf).expect("what is left");
        assert_eq!(buf, [7; 4096]);
        let error = base.read_at(4096, &mut buf).expect_err("cut off");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().ends_with("of base: it ends at byte 6000, before them"), "{error}");
        assert_eq!(base.is_hole(8192, 4096).expect_err("unknown").kind(), ErrorKind::Io);
        base.read_at(1 << 20, &mut buf).expect("past the end that it had");
        assert_eq!(buf, [0; 4096]);
    }
}
