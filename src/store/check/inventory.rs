//! What there is in a store and what refers to what, read under its lock.

use std::collections::BTreeMap;

use super::super::attrs::FileRef;
use super::super::dir::Dir;
use super::super::instances::Instance;
use super::super::layout::{self, DiskPart, disk_file};
use super::super::lock::StoreLock;
use super::super::names::{DiskName, ObjectName};
use super::super::record::BootFileId;
use super::super::references::{STRANGE_INSTANCE_HINT, base_of_overlay};
use super::super::{Store, host_fs, superblock};
use super::live_maps::layer_of_overlay;
use super::{CheckReport, CheckRequest, hint_or, is_gone, note_outcome, said};
use crate::error::{Error, ErrorKind, Result};
use crate::finding::{Remedy, Severity};
use crate::format::{BaseId, LayerId};

/// What a check goes through.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    /// The instances whose records can be read.
    pub(super) instances: Vec<Instance>,
    /// The disks to be checked, with the place of the instance in `instances`.
    pub(super) disks: Vec<(usize, DiskName)>,
    /// What refers to each base, in words: `image debian`, `disk web-1/disk`.
    pub(super) base_users: BTreeMap<BaseId, Vec<String>>,
    /// What refers to each kernel and ramdisk.
    pub(super) boot_users: BTreeMap<BootFileId, Vec<String>>,
    /// The layers of all disks.
    pub(super) layers: Vec<LayerId>,
    /// Whether every disk's own superblock could be read; else `layers` is not all.
    pub(super) layers_known: bool,
    /// Whether every record could be read; else nothing can be called unreferenced.
    pub(super) complete: bool,
}

impl Inventory {
    fn base_is_used(&mut self, id: BaseId, by: String) {
        let users = self.base_users.entry(id).or_default();
        if !users.contains(&by) {
            users.push(by);
        }
    }

    fn boot_files_are_used(&mut self, ids: [Option<BootFileId>; 2], by: &str) {
        for id in ids.into_iter().flatten() {
            self.boot_users.entry(id).or_default().push(by.to_owned());
        }
    }

    /// Who is over or refers to a base.
    pub(super) fn users_of(&self, id: &BaseId) -> &[String] {
        self.base_users.get(id).map_or(&[], Vec::as_slice)
    }
}

impl Store {
    /// Reads all records, or those of the instances that are asked for, and says what is wrong with them and with the
    /// files beside them.
    pub(super) fn take_inventory(
        &self,
        request: &CheckRequest,
        report: &mut CheckReport,
    ) -> Result<Inventory> {
        // Without the right to write, on a read-only filesystem say, there is no lock to be had, and nobody who changes
        // anything either.
        let take = if request.repair { StoreLock::wait } else { StoreLock::wait_shared };
        let lock = match take(&self.root) {
            Err(error) if matches!(error.kind(), ErrorKind::ReadOnly | ErrorKind::Denied) => None,
            other => Some(other?),
        };
        let mut inventory = Inventory { complete: true, layers_known: true, ..Inventory::default() };
        self.look_at_superblock(request, lock.as_ref(), report);
        if request.only.is_empty() {
            self.look_at_root(report)?;
            self.look_at_images(request, &mut inventory, report)?;
            self.look_at_flavors(&mut inventory, report)?;
            self.look_at_instances(request, &mut inventory, report)?;
            inventory.disks = (0..)
                .zip(&inventory.instances)
                .flat_map(|(at, instance)| instance.disks().map(move |(disk, _)| (at, disk)))
                .collect();
            self.look_at_objects(&inventory, request, report)?;
            self.look_at_live_maps(&inventory, report)?;
        } else {
            self.look_at_targets(request, &mut inventory, report)?;
        }
        Ok(inventory)
    }

    fn look_at_targets(
        &self,
        request: &CheckRequest,
        inventory: &mut Inventory,
        report: &mut CheckReport,
    ) -> Result<()> {
        for target in &request.only {
            // One that does not exist is the caller's mistake, not a finding.
            let folder = self.instance_dir(&target.instance)?;
            let known = inventory.instances.iter().position(|found| found.name == target.instance);
            let at = known.unwrap_or(inventory.instances.len());
            if known.is_none() {
                self.look_at_instance(&target.instance, request, inventory, report)?;
            }
            let Some(instance) = inventory.instances.get(at) else { continue };
            let wanted = |disk: DiskName| target.disk.is_none_or(|only| only == disk);
            let disks: Vec<DiskName> =
                instance.disks().map(|(disk, _)| disk).filter(|disk| wanted(*disk)).collect();
            if disks.is_empty() {
                let shown = target.disk.map_or_else(String::new, |disk| format!("/{disk}"));
                let message = format!("disk {}{shown}: not found", target.instance);
                return Err(Error::new(ErrorKind::NotFound, message));
            }
            drop(folder);
            for disk in disks {
                if !inventory.disks.contains(&(at, disk)) {
                    inventory.disks.push((at, disk));
                }
            }
        }
        for id in inventory.base_users.keys() {
            self.look_at_base(id, inventory, report);
        }
        Ok(())
    }

    /// The superblock of a store that has lost it: without it no command but this one opens the store.
    fn look_at_superblock(&self, request: &CheckRequest, lock: Option<&StoreLock>, report: &mut CheckReport) {
        if self.superblock_fault.is_none() {
            return;
        }
        // Since the store was opened, somebody may have brought it back, or a newer cowdisk written it.
        let Err(fault) = superblock::read(&self.root) else { return };
        let lost = matches!(fault.kind(), ErrorKind::NotFound | ErrorKind::Corrupt);
        let gone = is_gone(&fault) && !self.root.has(layout::SUPERBLOCK).unwrap_or(true);
        let what = if gone { "missing".to_owned() } else { said(&fault) };
        let remedy = if !lost {
            hint_or(&fault, "check the host's disk; it is left as it is")
        } else if self.uuid().is_empty() {
            Remedy::Operator("bring it back from a backup of the store".to_owned())
        } else {
            Remedy::Repair(format!("writes it anew, with the store's identity from {}", layout::RUN))
        };
        let message = format!("{what}; nothing opens the store without it");
        report.add("store-superblock", Severity::Warning, layout::SUPERBLOCK, message, remedy);
        if let Some(finding) = report.findings.last_mut()
            && request.repair
            && finding.can_be_repaired()
        {
            let no_lock = || Error::new(ErrorKind::Denied, "the store cannot be locked");
            let written = lock
                .ok_or_else(no_lock)
                .and_then(|lock| superblock::rewrite(&self.tmp, &self.root, &self.identity, lock));
            note_outcome(finding, written);
        }
    }

    /// Names in the store's own folder, and the note of where this boot's live maps are.
    fn look_at_root(&self, report: &mut CheckReport) -> Result<()> {
        let files = [layout::SUPERBLOCK, layout::LOCK, layout::DAEMON_LOCK, layout::RUN, "lost+found"];
        for name in self.root.names()? {
            if !files.contains(&name.as_str())
                && !layout::FOLDERS.contains(&name.as_str())
                && !host_fs::is_probe(&name)
            {
                unknown(report, "", &name);
            }
        }
        if let Err(error) = self.run_dir_in_use() {
            let remedy = Remedy::Operator(
                "no disk opens before it is put right: after a reboot of the host remove it; before that bring it back, \
                 for it says where the live maps of disks in use are"
                    .to_owned(),
            );
            report.add("run-record", Severity::Warning, layout::RUN, said(&error), remedy);
        }
        Ok(())
    }

    fn look_at_images(
        &self,
        request: &CheckRequest,
        inventory: &mut Inventory,
        report: &mut CheckReport,
    ) -> Result<()> {
        for file in self.images.names()? {
            let Some(name) = layout::name_of_record(&file) else {
                unknown(report, layout::IMAGES, &file);
                continue;
            };
            match self.image(&name) {
                Ok(image) => {
                    let user = format!("image {name}");
                    inventory.boot_files_are_used([image.kernel, image.ramdisk], &user);
                    inventory.base_is_used(image.base, user);
                    self.look_at_attributes(
                        &FileRef::Image(name.clone(), image.base),
                        format!("image {name}"),
                        request,
                        report,
                    );
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    inventory.complete = false;
                    let remedy = hint_or(
                        &error,
                        "bring the record back from a backup, or remove it and import the image again; disks over it go on",
                    );
                    report.add(
                        "image-record",
                        Severity::Damage,
                        format!("image {name}"),
                        said(&error),
                        remedy,
                    );
                }
            }
        }
        Ok(())
    }

    fn look_at_flavors(&self, inventory: &mut Inventory, report: &mut CheckReport) -> Result<()> {
        for file in self.flavors.names()? {
            let Some(name) = layout::name_of_record(&file) else {
                unknown(report, layout::FLAVORS, &file);
                continue;
            };
            match self.flavor(&name) {
                Ok(flavor) => {
                    if let Some(base) = flavor.base {
                        inventory.base_is_used(base, format!("flavor {name}"));
                    }
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    inventory.complete = false;
                    let remedy = hint_or(
                        &error,
                        "bring the record back from a backup, or remove it and add the flavor again; disks over it go on",
                    );
                    report.add(
                        "flavor-record",
                        Severity::Damage,
                        format!("flavor {name}"),
                        said(&error),
                        remedy,
                    );
                }
            }
        }
        Ok(())
    }

    fn look_at_instances(
        &self,
        request: &CheckRequest,
        inventory: &mut Inventory,
        report: &mut CheckReport,
    ) -> Result<()> {
        let strange = self.strange_instances()?;
        for name in self.instances.names()? {
            match name.parse::<ObjectName>() {
                Ok(name) => self.look_at_instance(&name, request, inventory, report)?,
                Err(_) if strange.contains(&name) => {}
                Err(_) => unknown(report, layout::INSTANCES, &name),
            }
        }
        for name in strange {
            // What its overlays are over, and which layers they are, nobody looks for.
            (inventory.complete, inventory.layers_known) = (false, false);
            let message =
                "no name of an instance, so what it needs is not known; nothing is removed meanwhile";
            let object = format!("{}/{name}", layout::INSTANCES);
            let remedy = Remedy::Operator(STRANGE_INSTANCE_HINT.to_owned());
            report.add("instance-name", Severity::Warning, object, message, remedy);
        }
        Ok(())
    }

    fn look_at_instance(
        &self,
        name: &ObjectName,
        request: &CheckRequest,
        inventory: &mut Inventory,
        report: &mut CheckReport,
    ) -> Result<()> {
        let folder = match self.instance_dir(name) {
            // Not a folder.
            Err(error) if is_gone(&error) => {
                unknown(report, layout::INSTANCES, name.as_str());
                return Ok(());
            }
            // A link. What it leads to is not looked at, so what that refers to is not known.
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                inventory.complete = false;
                let remedy = Remedy::Operator("put the instance's own folder in its place".to_owned());
                let object = format!("instance {name}");
                report.add("instance-record", Severity::Damage, object, said(&error), remedy);
                return Ok(());
            }
            other => other?,
        };
        for disk in DiskName::ALL {
            // Whatever the record says, this is what the overlay is over.
            if let Some(base) = base_of_overlay(&folder, disk)? {
                inventory.base_is_used(base, format!("disk {name}/{disk}"));
            }
            match layer_of_overlay(&folder, disk) {
                Ok(layer) => inventory.layers.extend(layer),
                Err(_) => inventory.layers_known = false,
            }
        }
        let instance = match self.instance(name) {
            Ok(instance) => instance,
            Err(error) => {
                inventory.complete = false;
                let otherwise = format!(
                    "bring the record back from a backup, or give the instance up with its disks: cowdisk instance remove {name}"
                );
                let remedy = hint_or(&error, &otherwise);
                report.add(
                    "instance-record",
                    Severity::Damage,
                    format!("instance {name}"),
                    said(&error),
                    remedy,
                );
                return Ok(());
            }
        };
        inventory.boot_files_are_used([instance.kernel, instance.ramdisk], &format!("instance {name}"));
        for (disk, made) in instance.disks().filter(|(_, made)| made.is_overlay()) {
            if let Some(base) = made.base {
                inventory.base_is_used(base, format!("disk {name}/{disk}"));
            }
        }
        look_at_files(&folder, &instance, report)?;
        for (disk, _) in instance.disks() {
            let file = FileRef::Disk(name.clone(), instance.id, disk);
            self.look_at_attributes(&file, format!("disk {name}/{disk}"), request, report);
        }
        inventory.instances.push(instance);
        Ok(())
    }
}

/// The parts of an instance's disks: all that should be there, and nothing else.
fn look_at_files(folder: &Dir, instance: &Instance, report: &mut CheckReport) -> Result<()> {
    let names = folder.names()?;
    let mut known = vec![layout::INSTANCE_RECORD];
    for (disk, made) in instance.disks() {
        let object = format!("disk {}/{disk}", instance.name);
        for part in made.parts() {
            let file = disk_file(disk, *part);
            known.push(file);
            if !names.iter().any(|name| name == file) {
                let remedy = Remedy::Operator(
                    "bring all files of the disk back from one backup, or give the instance up".to_owned(),
                );
                report.add(
                    "disk-missing",
                    Severity::Damage,
                    object.as_str(),
                    format!("{file} is missing"),
                    remedy,
                );
            }
        }
        known.push(disk_file(disk, DiskPart::Attributes));
    }
    let parts = [DiskPart::Map, DiskPart::Data, DiskPart::Raw, DiskPart::Attributes];
    let parts: Vec<&str> =
        DiskName::ALL.iter().flat_map(|disk| parts.map(|part| disk_file(*disk, part))).collect();
    for name in names.iter().filter(|name| !known.contains(&name.as_str())) {
        if parts.contains(&name.as_str()) {
            let remedy = Remedy::Operator("move it away if it is not needed".to_owned());
            let object = format!("instance {}", instance.name);
            let message = format!("{name} belongs to none of its disks");
            report.add("disk-extra", Severity::Warning, object, message, remedy);
        } else {
            unknown(report, &format!("{}/{}", layout::INSTANCES, instance.name), name);
        }
    }
    Ok(())
}

/// A name that the store does not make.
pub(super) fn unknown(report: &mut CheckReport, folder: &str, name: &str) {
    let object = if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
    let remedy = Remedy::Nothing("it is left alone".to_owned());
    report.add("unknown-file", Severity::Note, object, "not a file of the store's", remedy);
}
