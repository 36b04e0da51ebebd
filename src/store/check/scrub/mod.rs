//! Reading everything in a store at a bounded rate, so that what the host's disk has lost is found while there is still
//! something to bring it back from.
//!
//! Bases, kernels and ramdisks are named by their hashes, so any changed bit of them is found. What instances have
//! written has no checksum: of it, only what the disk refuses to read is found, and what a check of its map finds.
//!
//! Works on a mounted store. Nothing is kept waiting: a base is held with a shared lock as by every reader, disks are not
//! locked at all, and `reader.rs` says how their files are read. The one change is the mark on a base that has other bytes
//! than its name says, upon which nothing opens over it.

mod pace;
mod reader;

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;

use super::super::Store;
use super::super::instances::Instance;
use super::super::layout::disk_file;
use super::super::names::DiskName;
use super::super::progress::{Progress, Work};
use super::contents::ContentCheck;
use super::disks::open_to_read;
use super::inventory::Inventory;
use super::{CheckReport, CheckRequest, CheckTarget, is_gone, said};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::finding::{Remedy, Severity};
use crate::storage::Storage;
use crate::units::HumanBytes;
use pace::Pace;
use reader::{Piece, Reader, Sharing};

/// Bytes a second that a scrub reads unless told otherwise.
pub const SCRUB_RATE_DEFAULT: u64 = 100 << 20;
/// The lowest rate, in bytes a second.
pub const SCRUB_RATE_MIN: u64 = 64 << 10;

/// Bytes of a hole that are hashed at once.
const ZEROES_BYTES: usize = 1 << 20;

/// What to scrub.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubRequest {
    /// Only these disks, and the bases that they are over; empty: the whole store.
    pub only: Vec<CheckTarget>,
    /// Bytes a second, at least [`SCRUB_RATE_MIN`]; `None`: as fast as the disk reads.
    pub rate: Option<NonZeroU64>,
}

/// What a scrub has done and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// What there is, and what is not as it should be.
    pub check: CheckReport,
    /// Whether all was read: false if the user stopped it.
    pub complete: bool,
    /// How many bases were read.
    pub bases_read: u64,
    /// How many kernels and ramdisks were read.
    pub boot_files_read: u64,
    /// How many disks were read.
    pub disks_read: u64,
    /// Bytes that were read from the host's disk.
    pub bytes_read: u64,
    /// How many files were read through the host's cache, because its file system has no direct reads: what the cache
    /// held of them says nothing about the disk.
    pub through_cache: u64,
    /// Whether the kernel refused a lower priority, so that the scrub's reads were as urgent as anybody's.
    pub usual_priority: bool,
}

impl Store {
    /// Reads bases, kernels, ramdisks and disks, and says what is not as it should be. When `progress` cancels it, what
    /// was found by then is returned.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if a disk that was asked for does not exist; those of the host where nothing can be said
    /// without it. What is wrong with the store is a finding, not an error.
    pub fn scrub(&self, request: &ScrubRequest, progress: &dyn Progress) -> Result<ScrubReport> {
        let records = CheckRequest { only: request.only.clone(), full: false, repair: false };
        let mut report = ScrubReport::default();
        let inventory = self.take_inventory(&records, &mut report.check)?;
        let work = Work::begin(progress, "scrub", Some(self.bytes_to_scrub(&inventory)));
        let mut reader = Reader::new(Pace::new(request.rate), &work);
        let ended = self
            .check_disks(&inventory, &records, progress, &mut report.check)
            .and_then(|()| self.scrub_contents(&inventory, &mut reader, &mut report))
            .and_then(|()| self.scrub_disks(&inventory, &mut reader, &mut report));
        match ended {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => {
                other?;
                report.complete = true;
            }
        }
        report.bytes_read = reader.bytes_read;
        report.through_cache = reader.through_cache;
        report.usual_priority = reader.usual_priority;
        report.check.sort();
        Ok(report)
    }

    /// What a scrub will read, as far as that can be told: for a progress bar.
    fn bytes_to_scrub(&self, inventory: &Inventory) -> u64 {
        let bases =
            inventory.base_users.keys().filter_map(|id| self.base_usage(id).ok()).map(|(_, taken)| taken);
        let boot_files =
            inventory.boot_users.keys().filter_map(|id| self.open_boot_file(id).ok()?.metadata().ok());
        let disks = inventory.disks.iter().filter_map(|&(at, disk)| {
            let instance = inventory.instances.get(at)?;
            let folder = self.instance_dir_of(&instance.name, instance.id).ok()?;
            let status = self.disk_status_in(&folder, &instance.name, disk).ok()?;
            Some(status.data_allocated + status.map_allocated)
        });
        bases.chain(boot_files.map(|metadata| metadata.len())).chain(disks).sum()
    }

    fn scrub_contents(
        &self,
        inventory: &Inventory,
        reader: &mut Reader<'_>,
        report: &mut ScrubReport,
    ) -> Result<()> {
        let mut hash = |what: &str, file: &File, len| {
            log::info!("scrub: {what}");
            hash(reader, file, len)
        };
        let mut how = ContentCheck { hash: &mut hash, mark: true, repair: false };
        for id in inventory.base_users.keys() {
            let is_read = self.check_base_content(id, inventory, &mut how, &mut report.check)?;
            report.bases_read += u64::from(is_read);
        }
        for id in inventory.boot_users.keys() {
            let is_read = self.check_boot_file_content(id, inventory, &mut how, &mut report.check)?;
            report.boot_files_read += u64::from(is_read);
        }
        Ok(())
    }

    fn scrub_disks(
        &self,
        inventory: &Inventory,
        reader: &mut Reader<'_>,
        report: &mut ScrubReport,
    ) -> Result<()> {
        for &(at, disk) in &inventory.disks {
            reader.check()?;
            let Some(instance) = inventory.instances.get(at) else { continue };
            log::info!("scrub: disk {}/{disk}", instance.name);
            match self.scrub_disk(instance, disk, reader, &mut report.check) {
                Ok(()) => report.disks_read += 1,
                Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                // It was removed meanwhile, or a file of it is missing, which is known by now.
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    let object = format!("disk {}/{disk}", instance.name);
                    add_unreadable(object, said(&error), &mut report.check);
                }
            }
        }
        Ok(())
    }

    fn scrub_disk(
        &self,
        instance: &Instance,
        disk: DiskName,
        reader: &mut Reader<'_>,
        report: &mut CheckReport,
    ) -> Result<()> {
        let folder = self.instance_dir_of(&instance.name, instance.id)?;
        for part in instance.disk(disk).map_or(&[][..], |made| made.parts()) {
            let storage = open_to_read(&folder, disk, *part)?;
            let mut bad = Bad::default();
            reader.read(storage.file(), storage.size()?, Sharing::Written, |piece| {
                if let Piece::Bad { offset, len, error } = piece {
                    bad.add(offset, len, error);
                }
                Ok(())
            })?;
            if let Some(message) = bad.message(disk_file(disk, *part)) {
                add_unreadable(format!("disk {}/{disk}", instance.name), message, report);
            }
        }
        Ok(())
    }
}

/// The parts of a file that cannot be read.
#[derive(Default)]
struct Bad {
    bytes: u64,
    first: Option<(u64, Error)>,
}

impl Bad {
    fn add(&mut self, offset: u64, len: u64, error: Error) {
        self.bytes += len;
        self.first.get_or_insert((offset, error));
    }

    fn message(self, file: &str) -> Option<String> {
        let (offset, error) = self.first?;
        let bytes = HumanBytes(self.bytes);
        Some(format!("{file}: parts of {bytes} in all cannot be read, the first at byte {offset}: {error}"))
    }
}

fn add_unreadable(object: String, message: String, report: &mut CheckReport) {
    let remedy = Remedy::Operator(
        "check the host's disk; what it cannot read must come from a backup of the guest".to_owned(),
    );
    report.add("read-error", Severity::Damage, object, message, remedy);
}

/// Hashes `len` bytes of a file that nobody writes to as a scrub does: what the disk holds, whatever the host's cache has
/// of it. The descriptor, one of the caller's alone, reads past the cache from then on. `what` is shown meanwhile.
pub(in crate::store) fn hash_from_disk(
    file: &File,
    len: u64,
    what: &str,
    progress: &dyn Progress,
) -> Result<[u8; 32]> {
    let taken = file.metadata().context(|| "look it up")?.blocks() * 512;
    let work = Work::begin(progress, what, Some(taken.min(len)));
    hash(&mut Reader::new(Pace::new(None), &work), file, len)
}

/// Hashes `len` bytes of a file that nobody writes to.
fn hash(reader: &mut Reader<'_>, file: &File, len: u64) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let zeroes = vec![0; ZEROES_BYTES];
    let (work, mut bad) = (reader.work(), Bad::default());
    reader.read(file, len, Sharing::ReadOnly, |piece| {
        match piece {
            Piece::Data(bytes) => {
                hasher.update(bytes);
            }
            Piece::Hole(mut left) => {
                while left > 0 {
                    work.check()?;
                    let part = usize::try_from(left).unwrap_or(usize::MAX).min(zeroes.len());
                    hasher.update(&zeroes[..part]);
                    left -= part as u64;
                }
            }
            Piece::Bad { offset, len, error } => bad.add(offset, len, error),
        }
        Ok(())
    })?;
    match bad.message("its file") {
        Some(message) => Err(Error::new(ErrorKind::Io, message)),
        None => Ok(*hasher.finalize().as_bytes()),
    }
}
