//! Kernels and ramdisks: small read-only files, each stored once under the BLAKE3 of its content.

use std::fs::File;
use std::path::Path;

use super::atomic::{DraftFile, Removal};
use super::check::hash_from_disk;
use super::dir::{Access, MODE_READ_ONLY};
use super::lock::StoreLock;
use super::progress::{Progress, Work};
use super::record::BootFileId;
use super::source::{Accept, Source};
use super::{Store, copy, layout};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::units::HumanBytes;

/// Largest kernel or ramdisk: far above any real one, far below what would hurt.
const BOOT_FILE_BYTES_MAX: u64 = 1 << 30;

/// A boot file being made.
pub(super) struct BootFileDraft<'a> {
    file: DraftFile<'a>,
    pub(super) id: BootFileId,
}

impl Store {
    /// Copies a kernel or ramdisk into a draft, synced and read-only.
    pub(super) fn draft_boot_file(&self, path: &Path, progress: &dyn Progress) -> Result<BootFileDraft<'_>> {
        let source = Source::open(path, Accept::RegularFile)?;
        let len = source.len();
        if len > BOOT_FILE_BYTES_MAX {
            let message = format!("{}: {}, larger than 1 GiB", source.shown(), HumanBytes(len));
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let draft = DraftFile::new(&self.tmp, "boot")?;
        let work = Work::begin(progress, "copy", Some(len));
        let copied = copy::copy_and_hash(source.file(), len, draft.file(), len, self.room()?, &work);
        let hash = copied.context(|| source.shown())?;
        source.check_unchanged()?;
        draft.file().set_mode(MODE_READ_ONLY)?;
        draft.file().sync_all()?;
        Ok(BootFileDraft { file: draft, id: BootFileId::from_bytes(hash) })
    }

    /// Gives a draft its place, unless the same content is there already.
    pub(super) fn publish_boot_file(&self, draft: BootFileDraft<'_>, _lock: &StoreLock) -> Result<()> {
        let name = draft.id.to_string();
        if self.boot.has(&name)? {
            // Whoever gave it its place may have died before that was durable.
            return self.boot.sync();
        }
        // Of an earlier one of that content, should a crash have left it.
        self.forget_attributes(&layout::boot_attributes_file(&draft.id))?;
        draft.file.commit(&self.boot, &name)
    }

    /// Opens a kernel or a ramdisk for reading.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none.
    pub fn open_boot_file(&self, id: &BootFileId) -> Result<File> {
        self.boot.open_file(&id.to_string(), Access::Read).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("boot file {id}: not found")),
            _ => error,
        })
    }

    /// Hashes a boot file again.
    pub(super) fn verify_boot_file(&self, id: &BootFileId, progress: &dyn Progress) -> Result<()> {
        let file = self.open_boot_file(id)?;
        let len = file.metadata().context(|| format!("look up boot file {id}"))?.len();
        let hash = hash_from_disk(&file, len, "verify", progress)?;
        if BootFileId::from_bytes(hash) != *id {
            let message = format!("boot file {id}: its bytes have changed");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        Ok(())
    }

    /// The kernels and ramdisks of the store, in the order of their ids.
    ///
    /// # Errors
    /// Those of the host.
    pub fn boot_files(&self) -> Result<Vec<BootFileId>> {
        Ok(self.boot.names()?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Removes a boot file that nothing refers to, and its attributes. Whoever has it open keeps what he has.
    pub(super) fn remove_boot_file(&self, id: &BootFileId, _lock: &StoreLock) -> Result<()> {
        if !self.boot.has(&id.to_string())? {
            return Ok(());
        }
        Removal::begin(&self.tmp, &self.boot, &id.to_string())?.finish()?;
        self.forget_attributes(&layout::boot_attributes_file(id))
    }
}
