//! The disks: each layer by the engine's own verifier, each independent disk by its size.

use std::path::PathBuf;

use super::super::Store;
use super::super::dir::{Access, Dir};
use super::super::instances::{Instance, InstanceDisk};
use super::super::layout::{DiskPart, disk_file};
use super::super::lock::{Share, try_lock};
use super::super::names::DiskName;
use super::super::progress::{Progress, check_cancelled};
use super::inventory::Inventory;
use super::{CheckReport, CheckRequest, is_gone, said};
use crate::error::{Context, ErrorKind, Result};
use crate::finding::{Remedy, Severity};
use crate::format::BaseRef;
use crate::overlay::{
    LayerFiles, LayerReport, Usage, check_layer, live_map_name, read_superblock, repair_layer,
};
use crate::storage::{FileStorage, Storage};
use crate::units::{SECTOR_BYTES, check_disk_bytes};

impl Store {
    /// Checks the disks of the inventory, one after the other.
    pub(super) fn check_disks(
        &self,
        inventory: &Inventory,
        request: &CheckRequest,
        progress: &dyn Progress,
        report: &mut CheckReport,
    ) -> Result<()> {
        for &(at, disk) in &inventory.disks {
            check_cancelled(progress)?;
            let Some(instance) = inventory.instances.get(at) else { continue };
            match self.check_disk(instance, disk, request.repair, report) {
                Ok(()) => {}
                // It was removed meanwhile, or a file of it is missing, which is known by now.
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    let remedy = Remedy::Operator("check the host's disk and the file's place".to_owned());
                    let object = format!("disk {}/{disk}", instance.name);
                    report.add("read-error", Severity::Damage, object, said(&error), remedy);
                }
            }
        }
        Ok(())
    }

    fn check_disk(
        &self,
        instance: &Instance,
        disk: DiskName,
        repair: bool,
        report: &mut CheckReport,
    ) -> Result<()> {
        let folder = self.instance_dir_of(&instance.name, instance.id)?;
        let Some(made) = instance.disk(disk) else { return Ok(()) };
        let in_use = || -> Result<bool> {
            Ok(is_in_use(&folder, disk_file(disk, made.locked_part()))?
                || self.is_kept_by_daemon(&instance.name, disk)?)
        };
        report.disks += 1;
        let used = in_use()?;
        if used {
            report.disks_in_use += 1;
        }
        if !made.is_overlay() {
            return check_plain(&folder, instance, (disk, made), report);
        }
        let name = format!("{}/{disk}", instance.name);
        let files = LayerFiles {
            data: Box::new(open_to_read(&folder, disk, DiskPart::Data)?),
            map: Box::new(open_to_read(&folder, disk, DiskPart::Map)?),
        };
        let live_map = self.live_map_of(files.map.as_ref())?;
        let look = |usage| check_layer(&name, &files, live_map.as_deref(), usage);
        let mut found = if used {
            look(Usage::InUse)
        } else if repair {
            match self.layer_for_repair(&folder, &instance.name, disk) {
                Ok(files) => repair_layer(&name, &files, live_map.as_deref())?,
                // Opened in this very moment.
                Err(error) if error.kind() == ErrorKind::Busy => look(Usage::InUse),
                Err(error) => return Err(error),
            }
        } else {
            look(Usage::Free)
        };
        if !used && !repair && !found.findings.is_empty() && in_use()? {
            found = look(Usage::InUse);
        }
        report.findings.append(&mut found.findings);
        self.compare_bases(instance, disk, &found, report);
        Ok(())
    }

    /// What the record says of the disk's base, and what the base itself is, against what the overlay is over.
    fn compare_bases(
        &self,
        instance: &Instance,
        disk: DiskName,
        found: &LayerReport,
        report: &mut CheckReport,
    ) {
        let Some(superblock) = &found.superblock else { return };
        let object = format!("disk {}/{disk}", instance.name);
        let over = match superblock.base {
            BaseRef::Blank => None,
            BaseRef::Image { id, size } => {
                if let Ok((stored, _)) = self.base_usage(&id)
                    && stored != size
                {
                    let message = format!("it was made over {size} bytes of base {id}, which has {stored}");
                    let remedy =
                        Remedy::Operator("bring the base back from a backup of the store".to_owned());
                    report.add("disk-base", Severity::Damage, object.as_str(), message, remedy);
                }
                Some(id)
            }
        };
        let recorded = instance.disk(disk).and_then(|made| made.base);
        if recorded != over {
            let shown = |base: Option<crate::format::BaseId>| {
                base.map_or("a blank one".to_owned(), |id| id.to_string())
            };
            let message =
                format!("it is over base {}, but its record names {}", shown(over), shown(recorded));
            let remedy = Remedy::Operator("bring the instance's files back from one backup".to_owned());
            report.add("disk-base", Severity::Warning, object, message, remedy);
        }
    }

    /// Where the live map of a layer is, if any process has needed one since the host's boot.
    fn live_map_of(&self, map: &dyn Storage) -> Result<Option<PathBuf>> {
        let Ok(superblock) = read_superblock(map) else { return Ok(None) };
        // A note that cannot be read is a finding of its own.
        let dir = self.run_dir_in_use().unwrap_or_default();
        Ok(dir.map(|dir| dir.join(live_map_name(superblock.layer))))
    }
}

pub(super) fn open_to_read(folder: &Dir, disk: DiskName, part: DiskPart) -> Result<FileStorage> {
    let name = disk_file(disk, part);
    Ok(folder.storage(folder.open_file(name, Access::Read)?, folder.path_of(name).display().to_string()))
}

/// Whether somebody holds the lock of a disk. Whoever opens the disk in this very moment tries again.
fn is_in_use(folder: &Dir, file: &str) -> Result<bool> {
    let file = folder.open_file(file, Access::Read)?;
    Ok(!try_lock(&file, Share::Shared).context(|| "look at the lock of a disk")?)
}

fn check_plain(
    folder: &Dir,
    instance: &Instance,
    (disk, made): (DiskName, InstanceDisk),
    report: &mut CheckReport,
) -> Result<()> {
    let size = open_to_read(folder, disk, DiskPart::Raw)?.size()?;
    // One that does not end with a sector grows to its end when it is opened.
    if let Err(error) = check_disk_bytes(size.next_multiple_of(SECTOR_BYTES)) {
        let remedy = Remedy::Operator("bring it back from a backup, or give the instance up".to_owned());
        report.add(
            "disk-size",
            Severity::Damage,
            format!("disk {}/{disk}", instance.name),
            said(&error),
            remedy,
        );
    } else if size < made.size {
        let message =
            format!("it has {size} bytes, but {} when it was made, and disks never shrink", made.size);
        let remedy = Remedy::Operator("bring it back from a backup, or give the instance up".to_owned());
        report.add("disk-size", Severity::Damage, format!("disk {}/{disk}", instance.name), message, remedy);
    }
    Ok(())
}
