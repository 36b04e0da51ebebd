//! Instances: folders of disks, and the records that say what they are. Made by `create.rs`, listed by `listing.rs`.

use std::time::{Duration, Instant};

use rustix::fs::Timestamps;
use serde::{Deserialize, Serialize};

use super::Store;
use super::atomic::Removal;
use super::dir::{Access, Dir};
use super::layout::{self, DiskPart, disk_file};
use super::lock::{Share, try_lock};
use super::names::{DiskName, ObjectName};
use super::record::{self, BootFileId, RECORD_BYTES_MAX};
use super::references::Except;
use super::timestamp::Timestamp;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{BaseId, LayerId};
use crate::overlay::{live_map_name, read_superblock};
use crate::storage::FileStorage;
use crate::units::{check_block_bytes, check_disk_bytes};

/// How long the removal of an instance waits for its disks: the daemon learns that a file was closed, and closes the
/// disk, only after `close` has returned to whoever had it open.
const CLOSING: Duration = Duration::from_secs(2);
const CLOSING_PAUSE: Duration = Duration::from_millis(10);

/// An instance of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Its name.
    pub name: ObjectName,
    /// What tells it from any other that had or will have its name: random.
    pub id: LayerId,
    /// The image that its root was made from. It may be gone if `cow` is false.
    pub image: ObjectName,
    /// The flavor that its local disk was made from, if any. It may be gone unless the disk is an overlay of its base.
    pub flavor: Option<ObjectName>,
    /// Whether its root is an overlay; else all its disks are independent files.
    pub cow: bool,
    /// `disk`.
    pub root: InstanceDisk,
    /// `disk.local`, if it has one.
    pub local: Option<InstanceDisk>,
    /// The kernel that it is booted with.
    pub kernel: Option<BootFileId>,
    /// The ramdisk that it is booted with.
    pub ramdisk: Option<BootFileId>,
    /// When it was created.
    pub created: Timestamp,
}

/// A disk of an instance as it was made. Its size now: [`Store::disk_status`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstanceDisk {
    /// The content that it was made over or copied from; `None`: blank.
    pub base: Option<BaseId>,
    /// Bytes at creation, a multiple of 512.
    pub size: u64,
    /// Bytes of a block of the overlay; `None` for an independent file.
    pub block_bytes: Option<u32>,
}

impl InstanceDisk {
    /// Whether it is an overlay; else it is a file of its own.
    pub fn is_overlay(&self) -> bool {
        self.block_bytes.is_some()
    }

    /// The files that it cannot be without.
    pub(super) fn parts(&self) -> &'static [DiskPart] {
        if self.is_overlay() { &[DiskPart::Map, DiskPart::Data] } else { &[DiskPart::Raw] }
    }

    /// The file whose lock is the disk's.
    pub(super) fn locked_part(&self) -> DiskPart {
        if self.is_overlay() { DiskPart::Map } else { DiskPart::Raw }
    }
}

/// An instance to be created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceSpec {
    /// The image for its root.
    pub image: ObjectName,
    /// The flavor for its local disk.
    pub flavor: Option<ObjectName>,
    /// Bytes of its root; `None`: the image's.
    pub root_size: Option<u64>,
    /// Bytes of its local disk; `None`: the flavor's, or no local disk. Without a flavor the disk is blank.
    pub local_size: Option<u64>,
    /// Bytes of a block of its overlays, the root above all; `None`: 4,096.
    pub block_bytes: Option<u32>,
    /// Full, independent copies instead of overlays.
    pub no_cow: bool,
}

impl InstanceSpec {
    /// An instance of `image` with all else as usual.
    pub fn of(image: ObjectName) -> Self {
        Self { image, flavor: None, root_size: None, local_size: None, block_bytes: None, no_cow: false }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InstanceRecord {
    #[serde(with = "record::as_text")]
    id: LayerId,
    image: ObjectName,
    flavor: Option<ObjectName>,
    cow: bool,
    root: DiskRecord,
    local: Option<DiskRecord>,
    kernel: Option<BootFileId>,
    ramdisk: Option<BootFileId>,
    created: Timestamp,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskRecord {
    #[serde(with = "record::as_optional_text")]
    base: Option<BaseId>,
    size: u64,
    block_bytes: Option<u32>,
}

impl DiskRecord {
    /// `may_be_plain` of a disk of an instance with copy-on-write.
    fn checked(&self, cow: bool, may_be_plain: bool) -> Result<InstanceDisk> {
        check_disk_bytes(self.size)?;
        self.block_bytes.map_or(Ok(()), check_block_bytes)?;
        if cow != self.block_bytes.is_some() && !(may_be_plain && cow && self.base.is_none()) {
            return Err(Error::new(
                ErrorKind::Invalid,
                "a block size belongs to an overlay, and only to one",
            ));
        }
        Ok(InstanceDisk { base: self.base, size: self.size, block_bytes: self.block_bytes })
    }
}

impl From<InstanceDisk> for DiskRecord {
    fn from(disk: InstanceDisk) -> Self {
        Self { base: disk.base, size: disk.size, block_bytes: disk.block_bytes }
    }
}

impl Instance {
    /// `plain_blanks`: [`Identity::has_plain_blanks`] of its store.
    fn from_record(name: ObjectName, record: &InstanceRecord, plain_blanks: bool) -> Result<Self> {
        let local = |disk: &DiskRecord| disk.checked(record.cow, plain_blanks);
        Ok(Self {
            name,
            id: record.id,
            image: record.image.clone(),
            flavor: record.flavor.clone(),
            cow: record.cow,
            root: record.root.checked(record.cow, false)?,
            local: record.local.as_ref().map(local).transpose()?,
            kernel: record.kernel,
            ramdisk: record.ramdisk,
            created: record.created,
        })
    }

    pub(super) fn to_record(&self) -> InstanceRecord {
        InstanceRecord {
            id: self.id,
            image: self.image.clone(),
            flavor: self.flavor.clone(),
            cow: self.cow,
            root: self.root.into(),
            local: self.local.map(DiskRecord::from),
            kernel: self.kernel,
            ramdisk: self.ramdisk,
            created: self.created,
        }
    }

    /// Its disks, root first.
    pub fn disks(&self) -> impl Iterator<Item = (DiskName, InstanceDisk)> {
        [(DiskName::Root, Some(self.root)), (DiskName::Local, self.local)]
            .into_iter()
            .filter_map(|(name, disk)| disk.map(|disk| (name, disk)))
    }

    /// Its disk of that name, if it has one.
    pub fn disk(&self, name: DiskName) -> Option<InstanceDisk> {
        self.disks().find(|(other, _)| *other == name).map(|(_, disk)| disk)
    }

    /// The bases that its overlays are over, as its record says.
    pub(super) fn overlaid_bases(&self) -> Vec<BaseId> {
        let overlays = self.disks().filter(|(_, disk)| disk.is_overlay());
        overlays.filter_map(|(_, disk)| disk.base).collect()
    }
}

impl Store {
    pub(super) fn check_instance_absent(&self, name: &ObjectName) -> Result<()> {
        if self.instances.has(name.as_str())? {
            return Err(Error::new(ErrorKind::Exists, format!("instance {name}: exists already")));
        }
        Ok(())
    }

    /// Folders among the instances whose names are none of an instance: one that somebody has moved aside, say. What
    /// their overlays are over is not known, so while there is one no base or boot file counts as unreferenced.
    pub(super) fn strange_instances(&self) -> Result<Vec<String>> {
        self.instances.strange_folders(|name| name.parse::<ObjectName>().is_ok())
    }

    pub(super) fn instance_in(&self, folder: &Dir, name: &ObjectName) -> Result<Instance> {
        let record: InstanceRecord = record::read(folder, layout::INSTANCE_RECORD, RECORD_BYTES_MAX)?;
        let instance = Instance::from_record(name.clone(), &record, self.identity.has_plain_blanks());
        instance.map_err(|error| {
            let path = folder.path_of(layout::INSTANCE_RECORD);
            Error::caused(ErrorKind::Corrupt, format!("{}: not a valid record", path.display()), error)
        })
    }

    pub(super) fn instance_dir(&self, name: &ObjectName) -> Result<Dir> {
        self.instances.open_dir(name.as_str()).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("instance {name}: not found"))
                .with_hint("see what there is: cowdisk instance list"),
            _ => error,
        })
    }

    /// The folder of the very instance that has this id, not of a later one under its name. What is done in the folder
    /// is done to that instance, even if another has taken its name meanwhile.
    pub(super) fn instance_dir_of(&self, name: &ObjectName, id: LayerId) -> Result<Dir> {
        let folder = self.instance_dir(name)?;
        if self.instance_in(&folder, name)?.id != id {
            return Err(Error::new(ErrorKind::NotFound, format!("instance {name} with id {id}: not found")));
        }
        Ok(folder)
    }

    /// Removes an instance and its disks for good. One whose record is damaged can be removed as well.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if one of its disks is open; nothing is changed then.
    pub fn remove_instance(&self, name: &ObjectName) -> Result<()> {
        let patience = Instant::now() + CLOSING;
        loop {
            match self.remove_instance_locked(name) {
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < patience => {
                    std::thread::sleep(CLOSING_PAUSE);
                }
                result => return result.context(|| format!("remove instance {name}")),
            }
        }
    }

    fn remove_instance_locked(&self, name: &ObjectName) -> Result<()> {
        let lock = self.lock()?;
        let folder = self.instance_dir(name)?;
        let mut held = Vec::new();
        let mut live_maps = Vec::new();
        for (disk, part) in
            DiskName::ALL.into_iter().flat_map(|disk| [(disk, DiskPart::Map), (disk, DiskPart::Raw)])
        {
            if !folder.has(disk_file(disk, part))? {
                continue;
            }
            let file = folder.open_file(disk_file(disk, part), Access::Read)?;
            let is_free = try_lock(&file, Share::Exclusive).context(|| format!("lock {disk}"))?;
            if !is_free || self.is_kept_by_daemon(name, disk)? {
                return Err(self.busy_disk(name, disk));
            }
            let storage = FileStorage::new(file, disk.as_str());
            if let (DiskPart::Map, Ok(superblock)) = (part, read_superblock(&storage)) {
                live_maps.push(live_map_name(superblock.layer));
            }
            held.push(storage);
        }
        let boot_files: Vec<BootFileId> = match self.instance_in(&folder, name) {
            Ok(instance) => instance.kernel.into_iter().chain(instance.ramdisk).collect(),
            Err(_) => Vec::new(),
        };
        let others = match boot_files.is_empty() {
            true => None,
            // With a record that cannot be read the boot files stay; the next count finds them.
            false => self
                .references(&lock, Except::Instance(name))
                .inspect_err(|error| log::warn!("keeping kernel and ramdisk: {error}"))
                .ok(),
        };
        self.in_steps(&lock, || {
            let removal = Removal::begin(&self.tmp, &self.instances, name.as_str())?;
            for id in &boot_files {
                if others.as_ref().is_some_and(|others| !others.has_boot_file(id)) {
                    self.remove_boot_file(id, &lock)?;
                }
            }
            self.remove_live_maps(&live_maps);
            removal.finish()
        })
    }

    /// Sets the times of a disk of the instance `id`, as `utimensat` does.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such disk, or another instance has the name now.
    pub fn set_disk_times_of(
        &self,
        name: &ObjectName,
        id: LayerId,
        disk: DiskName,
        times: &Timestamps,
    ) -> Result<()> {
        let folder = self.instance_dir_of(name, id)?;
        let made = self.instance_in(&folder, name)?.disk(disk);
        let is_overlay = made.ok_or_else(|| no_such_disk(name, disk))?.is_overlay();
        let file = disk_file(disk, if is_overlay { DiskPart::Data } else { DiskPart::Raw });
        folder.set_times(file, times)
    }
}

pub(super) fn no_such_disk(instance: &ObjectName, disk: DiskName) -> Error {
    Error::new(ErrorKind::NotFound, format!("disk {instance}/{disk}: not found"))
}
