//! Making instances: one, or many at once.
//!
//! An instance is made in a folder in `tmp/` and appears whole by one rename. Overlays, and plain disks over nothing, take
//! a few system calls and as many syncs, so all of it happens under the store's lock; a full copy (`no_cow`) takes long,
//! so there only the rename does, and a shared lock of each base keeps the sources from being removed meanwhile.
//!
//! A sync costs a commit of the host's file system, which is most of what an instance costs. So all files of a group of
//! instances are written, and are on their way to the disk, before the first of them is synced: what is committed for it
//! then holds what the others would wait for. The names of the group are made durable by one sync.

use std::thread;

use super::Store;
use super::atomic::{DraftDir, commit_all};
use super::dir::{Dir, MODE_PRIVATE};
use super::flavors::Flavor;
use super::images::Image;
use super::instances::{Instance, InstanceDisk, InstanceSpec};
use super::layout::{self, DiskPart, disk_file};
use super::lock::StoreLock;
use super::names::{DiskName, ObjectName};
use super::progress::{Progress, Work, check_cancelled};
use super::timestamp::Timestamp;
use super::{copy, record};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{BaseRef, LayerId};
use crate::overlay::{LayerFiles, Overlay};
use crate::storage::{FileStorage, Storage};
use crate::units::{BLOCK_BYTES_MIN, Geometry, HumanBytes, check_block_bytes, check_disk_bytes};

/// Bytes that a new instance of overlays takes at most: a record, and per disk a superblock and what the host's filesystem
/// needs to find it. A plain disk over nothing takes less.
const OVERLAYS_BYTES: u64 = 64 << 10;

/// Instances that are made durable together. Each has up to six files and folders open meanwhile, and the store is locked.
const GROUP: usize = 64;

/// Threads that sync a group.
const SYNC_THREADS: usize = 8;

/// An instance that is whole, but for its place.
struct Made<'a> {
    draft: DraftDir<'a>,
    files: Unsynced,
    instance: Instance,
}

/// Files of an instance that are written and not synced.
#[derive(Default)]
struct Unsynced {
    layers: Vec<LayerFiles>,
    /// Plain disks and the record.
    others: Vec<FileStorage>,
}

impl Unsynced {
    fn start_writing(&self) {
        self.others.iter().for_each(FileStorage::start_writing);
        self.layers.iter().for_each(LayerFiles::start_writing);
    }

    fn sync(&self) -> Result<()> {
        self.layers.iter().try_for_each(LayerFiles::sync)?;
        self.others.iter().try_for_each(FileStorage::sync_all)
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
        let mut made = self.create_group(&[(name.clone(), spec.clone())], progress)?;
        Ok(made.remove(0))
    }

    /// Creates instances, in their order, at a fraction of what it takes to create each alone: overlays in groups, of which
    /// all or none are there after an error, copies one by one. `made` is told of each once it is there for good; after an
    /// error, or when cancelled, these are there and no others. (A crash of the host may leave any of the group that
    /// was being made.)
    ///
    /// # Errors
    /// Those of [`Store::create_instance`]; [`ErrorKind::Invalid`] if a name is given twice: then there is nothing.
    pub fn create_instances(
        &self,
        wanted: &[(ObjectName, InstanceSpec)],
        progress: &dyn Progress,
        mut made: impl FnMut(&Instance) -> Result<()>,
    ) -> Result<()> {
        let mut names: Vec<&ObjectName> = wanted.iter().map(|(name, _)| name).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::new(ErrorKind::Invalid, format!("instance {}: is named twice", twice[0])));
        }
        let mut rest = wanted;
        while let Some((_, first)) = rest.first() {
            let alike = rest.iter().take_while(|(_, spec)| !first.no_cow && !spec.no_cow);
            let (group, later) = rest.split_at(alike.count().clamp(1, GROUP));
            self.create_group(group, progress)?.iter().try_for_each(&mut made)?;
            rest = later;
        }
        Ok(())
    }

    /// Creates overlays together, or one copy.
    fn create_group(
        &self,
        wanted: &[(ObjectName, InstanceSpec)],
        progress: &dyn Progress,
    ) -> Result<Vec<Instance>> {
        let copy = match wanted {
            [(name, spec)] if spec.no_cow => Some((name, spec)),
            _ => None,
        };
        if let Some((name, spec)) = copy {
            return self.create_copies(name, spec, progress).context(|| format!("create instance {name}"));
        }
        let lock = self.lock()?;
        self.check_room("a new instance", OVERLAYS_BYTES * wanted.len() as u64)?;
        let mut made = Vec::new();
        for (name, spec) in wanted {
            check_cancelled(progress)?;
            made.push(self.make_overlays(name, spec).context(|| format!("create instance {name}"))?);
        }
        self.publish(made, &lock).context(|| match wanted {
            [(name, _)] => format!("create instance {name}"),
            more => format!("create {} instances", more.len()),
        })
    }

    fn make_overlays(&self, name: &ObjectName, spec: &InstanceSpec) -> Result<Made<'_>> {
        let instance = self.plan(name, spec)?;
        let draft = DraftDir::new(&self.tmp, "instance")?;
        let mut files = Unsynced::default();
        for (disk, made) in instance.disks() {
            if made.is_overlay() {
                files.layers.push(self.lay_out_overlay(draft.dir(), disk, &made).context(|| disk.as_str())?);
            } else {
                files.others.push(lay_out_blank(draft.dir(), disk, &made).context(|| disk.as_str())?);
            }
        }
        self.complete(draft, files, instance)
    }

    fn create_copies(
        &self,
        name: &ObjectName,
        spec: &InstanceSpec,
        progress: &dyn Progress,
    ) -> Result<Vec<Instance>> {
        let instance = self.plan(name, spec)?;
        let draft = DraftDir::new(&self.tmp, "instance")?;
        for (disk, made) in instance.disks() {
            self.create_copy(draft.dir(), disk, &made, progress).context(|| disk.as_str())?;
        }
        let lock = self.lock()?;
        self.check_instance_absent(name)?;
        let made = self.complete(draft, Unsynced::default(), instance)?;
        self.publish(vec![made], &lock)
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
            local: plan_local(
                spec.local_size,
                flavor.as_ref(),
                block_bytes,
                self.identity.has_plain_blanks(),
            )?,
            kernel: image.kernel,
            ramdisk: image.ramdisk,
            created: Timestamp::now(),
        })
    }

    /// Writes the files of an overlay, and leaves syncing them to [`Store::publish`].
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

    /// Writes the record. All files of the draft but `files` are synced.
    fn complete<'a>(&self, draft: DraftDir<'a>, mut files: Unsynced, instance: Instance) -> Result<Made<'a>> {
        for id in instance.kernel.iter().chain(&instance.ramdisk) {
            if !self.boot.has(&id.to_string())? {
                return Err(Error::new(ErrorKind::NotFound, format!("boot file {id}: not found")));
            }
        }
        let record = record::write_into_draft(draft.dir(), layout::INSTANCE_RECORD, &instance.to_record())?;
        files.others.push(record);
        files.start_writing();
        Ok(Made { draft, files, instance })
    }

    /// Syncs what is not synced, and has the instances appear. After an error none of them is there, or the message says
    /// what may be.
    fn publish(&self, made: Vec<Made<'_>>, _lock: &StoreLock) -> Result<Vec<Instance>> {
        sync_all(&made)?;
        let (drafts, instances): (Vec<_>, Vec<_>) =
            made.into_iter().map(|Made { draft, instance, .. }| (draft, instance)).unzip();
        let named = drafts.into_iter().zip(instances.iter().map(|instance| instance.name.as_str()));
        commit_all(named.collect(), &self.instances)?;
        Ok(instances)
    }
}

/// Makes the file of a plain disk over nothing, all of it a hole, and leaves syncing it to [`Store::publish`].
fn lay_out_blank(folder: &Dir, disk: DiskName, made: &InstanceDisk) -> Result<FileStorage> {
    let file = folder.create_file(disk_file(disk, DiskPart::Raw), MODE_PRIVATE)?;
    file.set_len(made.size)?;
    Ok(file)
}

/// Syncs all files and folders of instances that are not in their places yet.
fn sync_all(made: &[Made<'_>]) -> Result<()> {
    let sync = |Made { draft, files, .. }: &Made<'_>| {
        files.sync()?;
        draft.dir().sync()
    };
    if made.len() < SYNC_THREADS {
        return made.iter().try_for_each(sync);
    }
    // For the first one the host commits what it has of all. What the others then wait for, each by itself, is that the disk
    // empties its cache, and it does that for all who wait at once.
    let (first, others) = made.split_at(1);
    first.iter().try_for_each(sync)?;
    thread::scope(|scope| {
        let shares = others.chunks(others.len().div_ceil(SYNC_THREADS));
        let syncing: Vec<_> =
            shares.map(|share| scope.spawn(move || share.iter().try_for_each(sync))).collect();
        syncing
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
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

/// A local disk over nothing is a file of its own where `plain_blanks` says that such may be: all its bytes are in one file
/// anyway.
fn plan_local(
    size: Option<u64>,
    flavor: Option<&Flavor>,
    block_bytes: Option<u32>,
    plain_blanks: bool,
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
    let base = flavor.and_then(|flavor| flavor.base);
    Ok(Some(InstanceDisk {
        base,
        size,
        block_bytes: block_bytes.filter(|_| base.is_some() || !plain_blanks),
    }))
}
