//! The base under an overlay: read-only, zeroes past its end.

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

    /// Fills `buf` with what lies at `offset`, in bytes of the disk.
    ///
    /// # Errors
    /// Those of the host's disk.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        match &self.storage {
            Some(storage) => storage.read_at(offset, buf).context(|| "base image"),
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    /// The first byte at or after `offset` that may not be zero, or `None`.
    ///
    /// A hole of the base's file is enough to call its bytes zero: the file's contents are fixed, and a hole reads as
    /// zeroes. (An overlay's own data file is never asked: there the map alone knows.)
    ///
    /// # Errors
    /// Those of the host's disk.
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        match &self.storage {
            Some(storage) if offset < self.size() => storage.next_data(offset),
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
