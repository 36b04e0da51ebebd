//! Instances: folders of disks. Create, list, remove.
//!
//! An instance is made in a folder in `tmp/` and appears whole by one rename. Overlays take a few system calls and as
//! many syncs, so all of it happens under the store's lock; a full copy (`no_cow`) takes long, so there only the
//! rename does, and a shared lock of each base keeps the sources from being removed meanwhile.
//!
//! All files of overlays are written before the first of them is synced: what the host's file system commits for the
//! first sync holds most of what the others would wait for.

use std::time::{Duration, Instant};

use rustix::fs::Timestamps;
use serde::{Deserialize, Serialize};

use super::atomic::{DraftDir, Removal};
use super::dir::{Access, Dir, MODE_PRIVATE};
use super::flavors::Flavor;
use super::images::Image;
use super::layout::{self, DiskPart, disk_file};
use super::lock::{Share, StoreLock, try_lock};
use super::names::{DiskName, ObjectName};
use super::progress::{Progress, Work, check_cancelled};
use super::record::{self, BootFileId, RECORD_BYTES_MAX};
use super::references::Except;
use super::timestamp::Timestamp;
use super::{Store, copy};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{BaseId, BaseRef, LayerId};
use crate::overlay::{LayerFiles, Overlay, live_map_name, read_superblock};
use crate::storage::{FileStorage, Storage};
use crate::units::{BLOCK_BYTES_MIN, Geometry, HumanBytes, check_block_bytes, check_disk_bytes};

/// How long the removal of an instance waits for its disks: the daemon learns that a file was closed, and closes the
/// disk, only after `close` has returned to whoever had it open.
const CLOSING: Duration = Duration::from_secs(2);
const CLOSING_PAUSE: Duration = Duration::from_millis(10);

/// Bytes that a new instance of overlays takes at most: a record, and per disk a superblock and what the host's filesystem
/// needs to find it.
const OVERLAYS_BYTES: u64 = 64 << 10;

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
    /// Whether its disks are overlays; else they are independent files.
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
    /// Bytes of a block; `None`: 4,096.
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
struct InstanceRecord {
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
    fn checked(&self, cow: bool) -> Result<InstanceDisk> {
        check_disk_bytes(self.size)?;
        self.block_bytes.map_or(Ok(()), check_block_bytes)?;
        if cow != self.block_bytes.is_some() {
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
    fn from_record(name: ObjectName, record: &InstanceRecord) -> Result<Self> {
        Ok(Self {
            name,
            id: record.id,
            image: record.image.clone(),
            flavor: record.flavor.clone(),
            cow: record.cow,
            root: record.root.checked(record.cow)?,
            local: record.local.as_ref().map(|disk| disk.checked(record.cow)).transpose()?,
            kernel: record.kernel,
            ramdisk: record.ramdisk,
            created: record.created,
        })
    }

    fn to_record(&self) -> InstanceRecord {
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

    /// The bases that its overlays are over, as its record says.
    pub(super) fn overlaid_bases(&self) -> Vec<BaseId> {
        let disks = self.disks().filter(|_| self.cow);
        disks.filter_map(|(_, disk)| disk.base).collect()
    }
}

impl Store {
    /// Creates an instance: overlays in a few milliseconds, or full copies (`no_cow`), which share their blocks with
    /// the base where the host filesystem can and are copied with progress where not. After an error, or when
    /// cancelled, nothing is left.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the name is taken; [`ErrorKind::NotFound`] if image or flavor are not there;
    /// [`ErrorKind::Invalid`] if a disk would be smaller than what it is made over.
    pub fn create_instance(
        &self,
        name: &ObjectName,
        spec: &InstanceSpec,
        progress: &dyn Progress,
    ) -> Result<Instance> {
        let create = if spec.no_cow { Self::create_copies } else { Self::create_overlays };
        create(self, name, spec, progress).context(|| format!("create instance {name}"))
    }

    fn create_overlays(
        &self,
        name: &ObjectName,
        spec: &InstanceSpec,
        progress: &dyn Progress,
    ) -> Result<Instance> {
        let lock = self.lock()?;
        let instance = self.plan(name, spec)?;
        self.check_room("a new instance", OVERLAYS_BYTES)?;
        let draft = DraftDir::new(&self.tmp, "instance")?;
        let mut layers = Vec::new();
        for (disk, made) in instance.disks() {
            check_cancelled(progress)?;
            layers.push(self.lay_out_overlay(draft.dir(), disk, &made).context(|| disk.as_str())?);
        }
        self.publish_instance(draft, &layers, &instance, &lock)
    }

    fn create_copies(
        &self,
        name: &ObjectName,
        spec: &InstanceSpec,
        progress: &dyn Progress,
    ) -> Result<Instance> {
        let instance = self.plan(name, spec)?;
        let draft = DraftDir::new(&self.tmp, "instance")?;
        for (disk, made) in instance.disks() {
            self.create_copy(draft.dir(), disk, &made, progress).context(|| disk.as_str())?;
        }
        let lock = self.lock()?;
        self.publish_instance(draft, &[], &instance, &lock)
    }

    /// Looks up what an instance is to be made from and checks its sizes. Makes nothing.
    fn plan(&self, name: &ObjectName, spec: &InstanceSpec) -> Result<Instance> {
        self.check_instance_absent(name)?;
        let image = self.image(&spec.image)?;
        let flavor = spec.flavor.as_ref().map(|flavor| self.flavor(flavor)).transpose()?;
        let block_bytes = spec.block_bytes.unwrap_or(BLOCK_BYTES_MIN);
        check_block_bytes(block_bytes)?;
        if spec.no_cow && spec.block_bytes.is_some() {
            let message = "a block size makes no sense for disks that are no overlays";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let block_bytes = (!spec.no_cow).then_some(block_bytes);
        Ok(Instance {
            name: name.clone(),
            id: LayerId::random()?,
            image: spec.image.clone(),
            flavor: spec.flavor.clone(),
            cow: !spec.no_cow,
            root: plan_root(spec.root_size, &image, block_bytes)?,
            local: plan_local(spec.local_size, flavor.as_ref(), block_bytes)?,
            kernel: image.kernel,
            ramdisk: image.ramdisk,
            created: Timestamp::now(),
        })
    }

    /// Writes the files of an overlay, and leaves syncing them to [`Store::publish_instance`].
    fn lay_out_overlay(&self, folder: &Dir, disk: DiskName, made: &InstanceDisk) -> Result<LayerFiles> {
        let geometry = Geometry::new(made.size, made.block_bytes.unwrap_or(BLOCK_BYTES_MIN), 0)?;
        let base = match made.base {
            None => BaseRef::Blank,
            // Opening it checks that it is there and as it was stored.
            Some(id) => {
                BaseRef::Image { id, size: self.open_base(&id)?.metadata().context(|| "base")?.len() }
            }
        };
        let file = |part| Ok::<_, Error>(Box::new(folder.create_file(disk_file(disk, part), MODE_PRIVATE)?));
        let files = LayerFiles { data: file(DiskPart::Data)?, map: file(DiskPart::Map)? };
        Overlay::lay_out(&files, LayerId::random()?, geometry, base)?;
        Ok(files)
    }

    fn create_copy(
        &self,
        folder: &Dir,
        disk: DiskName,
        made: &InstanceDisk,
        progress: &dyn Progress,
    ) -> Result<()> {
        let file = folder.create_file(disk_file(disk, DiskPart::Raw), MODE_PRIVATE)?;
        if let Some(id) = made.base {
            // Held until the copy is done, so that the base is not removed meanwhile.
            let base = self.open_base(&id)?;
            if !file.clone_contents(&base) {
                let size = base.metadata().context(|| "base")?.len();
                self.check_room("a full copy", self.base_usage(&id)?.1)?;
                let work = Work::begin(progress, &format!("copy {disk}"), Some(size));
                copy::copy(&base, size, &file, self.room()?, &work)?;
            }
        }
        file.set_len(made.size)?;
        file.sync_all()
    }

    /// Writes the record, syncs it and the files of `layers`, and has the instance appear. All other files of the draft
    /// are synced.
    fn publish_instance(
        &self,
        draft: DraftDir<'_>,
        layers: &[LayerFiles],
        instance: &Instance,
        _lock: &StoreLock,
    ) -> Result<Instance> {
        self.check_instance_absent(&instance.name)?;
        for id in instance.kernel.iter().chain(&instance.ramdisk) {
            if !self.boot.has(&id.to_string())? {
                return Err(Error::new(ErrorKind::NotFound, format!("boot file {id}: not found")));
            }
        }
        let record = record::write_into_draft(draft.dir(), layout::INSTANCE_RECORD, &instance.to_record())?;
        layers.iter().try_for_each(LayerFiles::sync)?;
        record.sync_all()?;
        draft.commit(&self.instances, instance.name.as_str())?;
        Ok(instance.clone())
    }

    fn check_instance_absent(&self, name: &ObjectName) -> Result<()> {
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
        Instance::from_record(name.clone(), &record).map_err(|error| {
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
        let cow = self.instance_in(&folder, name)?.cow;
        let file = disk_file(disk, if cow { DiskPart::Data } else { DiskPart::Raw });
        folder.set_times(file, times)
    }
}

fn plan_root(size: Option<u64>, image: &Image, block_bytes: Option<u32>) -> Result<InstanceDisk> {
    let size = size.unwrap_or(image.size);
    check_disk_bytes(size).context(|| "root disk")?;
    if size < image.size {
        let (asked, needed) = (HumanBytes(size), HumanBytes(image.size));
        let message =
            format!("root disk of {asked} ({size} bytes): smaller than image {} ({needed})", image.name);
        return Err(Error::new(ErrorKind::Invalid, message)
            .with_hint(format!("ask for at least {} bytes, or leave the size away", image.size)));
    }
    Ok(InstanceDisk { base: Some(image.base), size, block_bytes })
}

fn plan_local(
    size: Option<u64>,
    flavor: Option<&Flavor>,
    block_bytes: Option<u32>,
) -> Result<Option<InstanceDisk>> {
    let Some(size) = size.or(flavor.map(|flavor| flavor.local_size)) else { return Ok(None) };
    check_disk_bytes(size).context(|| "local disk")?;
    if let Some(flavor) = flavor
        && size < flavor.local_size
    {
        let (asked, needed) = (HumanBytes(size), HumanBytes(flavor.local_size));
        let message =
            format!("local disk of {asked}: smaller than that of flavor {} ({needed})", flavor.name);
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok(Some(InstanceDisk { base: flavor.and_then(|flavor| flavor.base), size, block_bytes }))
}
