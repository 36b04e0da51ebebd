//! Live maps that belong to no disk of the store. (Those that a disk does not need any more are the overlay's matter.)

use super::super::Store;
use super::super::dir::{Access, Dir};
use super::super::layout::{DiskPart, disk_file};
use super::super::names::DiskName;
use super::inventory::Inventory;
use super::{CheckReport, is_gone};
use crate::error::{Context, Result};
use crate::finding::{Remedy, Severity};
use crate::format::LayerId;
use crate::overlay::{layer_of_live_map, read_superblock};
use crate::storage::FileStorage;

impl Store {
    /// Notes the live maps of layers that no disk has, unless there are disks of which nobody can tell.
    ///
    /// Nothing proves that they are not needed: whoever has moved the files of a disk away, after a crash of the daemon
    /// say, needs its live map when he brings them back. So they are left alone.
    pub(super) fn look_at_live_maps(&self, inventory: &Inventory, report: &mut CheckReport) -> Result<()> {
        // A note that cannot be read is a finding of its own.
        let Some(dir) = self.run_dir_in_use().unwrap_or_default() else { return Ok(()) };
        if !inventory.layers_known {
            return Ok(());
        }
        let what = || format!("list {}", dir.display());
        let mut orphans = Vec::new();
        for entry in std::fs::read_dir(&dir).context(what)? {
            let name = entry.context(what)?.file_name();
            let layer = name.to_str().and_then(layer_of_live_map);
            if layer.is_some_and(|layer| !inventory.layers.contains(&layer)) {
                orphans.push(dir.join(name).display().to_string());
            }
        }
        orphans.sort();
        for path in orphans {
            let message = "no disk of the store has a layer of that name";
            let remedy = Remedy::Nothing(
                "it is left alone, for it is needed if the disk's files were moved away and come back; \
                 the host's next boot takes it away"
                    .to_owned(),
            );
            report.add("live-map-orphan", Severity::Note, format!("live map {path}"), message, remedy);
        }
        Ok(())
    }
}

/// The layer of an overlay; `None` if there is no overlay.
pub(super) fn layer_of_overlay(folder: &Dir, disk: DiskName) -> Result<Option<LayerId>> {
    let name = disk_file(disk, DiskPart::Map);
    match folder.open_file(name, Access::Read) {
        Ok(file) => {
            let map = FileStorage::new(file, folder.path_of(name).display().to_string());
            Ok(Some(read_superblock(&map)?.layer))
        }
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}
