//! Processes that make the changes of a script, and say what they ask for and what they were answered.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cowdisk::format::BaseId;
use cowdisk::store::{
    Disk, DiskName, FileRef, FlavorFs, FlavorSpec, ImportRequest, Instance, InstanceSpec, NoProgress,
    ObjectName, Progress, Store,
};
use cowdisk::{Context, ErrorKind, Result};
use parking_lot::Mutex;

use crate::common::host::{Fate, RecordingHost};
use crate::common::record::{Content, SECTOR, content};
use crate::oracle::{ABSENT, DiskKey, DiskMark, Key, Mark, shown, version_of};
use crate::script::{
    DiskOp, FLAVOR_BYTES, FLAVORS, IMAGE_SECTORS, IMAGES, INSTANCES, LOCAL_SECTORS, Op, filled, source_sector,
};

/// A process: a store that is open, and its disks by instance and name.
#[derive(Debug, Default)]
struct Process {
    store: Option<Arc<Store>>,
    disks: BTreeMap<(usize, DiskName), (DiskKey, Disk)>,
}

/// Two processes that work on `folder/store`.
pub struct Run {
    pub host: RecordingHost<Mark>,
    folder: PathBuf,
    /// Where the sources of images are.
    sources: PathBuf,
    /// Each guards one process; held for one change at a time.
    processes: [Mutex<Process>; 2],
    turn: AtomicU64,
    /// Versions and sectors written so far: each has a number of its own.
    pub count: AtomicU64,
    /// Disks of which a request has failed since they were opened.
    failed: Mutex<BTreeSet<DiskKey>>,
    /// The kinds of errors of the host that reached a caller.
    pub errors: Mutex<Vec<ErrorKind>>,
}

/// Another change, made when the first copy begins.
struct Meanwhile<'a> {
    run: &'a Run,
    process: usize,
    /// Taken when its time has come.
    op: Mutex<Option<Op>>,
}

impl Progress for Meanwhile<'_> {
    fn begin(&self, _what: &str, _total_bytes: Option<u64>) {
        let op = self.op.lock().take();
        if let Some(op) = op {
            self.run.apply_in(self.process, &op, &NoProgress);
        }
    }
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
    fn cancelled(&self) -> bool {
        false
    }
}

fn name(text: &str) -> ObjectName {
    text.parse().expect("a valid name")
}

/// Whether an error comes from the host: what was asked for may be done or not.
fn is_hosts(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Io | ErrorKind::NoSpace)
}

impl Run {
    pub fn new(folder: &Path, sources: &Path, count: u64) -> Self {
        Self {
            host: RecordingHost::new(folder, "store"),
            folder: folder.to_owned(),
            sources: sources.to_owned(),
            processes: Default::default(),
            turn: AtomicU64::new(0),
            count: AtomicU64::new(count),
            failed: Mutex::default(),
            errors: Mutex::default(),
        }
    }

    /// Makes a store.
    pub fn init(&self) -> Result<()> {
        self.change(Key::Store, "there", || {
            let store = Store::init_on(Arc::new(self.host.clone()), &self.folder.join("store"))?;
            self.processes[0].lock().store = Some(Arc::new(self.with_run_dir(store)));
            Ok(())
        })
    }

    fn with_run_dir(&self, store: Store) -> Store {
        store.with_run_dir(self.folder.join("run"))
    }

    /// The store as a process has it open.
    pub fn store(&self, process: usize) -> Result<Arc<Store>> {
        let mut process = self.processes[process].lock();
        if let Some(store) = &process.store {
            return Ok(store.clone());
        }
        let store = Store::open_on(Arc::new(self.host.clone()), &self.folder.join("store"))?;
        Ok(process.store.insert(Arc::new(self.with_run_dir(store))).clone())
    }

    /// Both processes die.
    pub fn end(&self) {
        (0..2).for_each(|process| self.end_process(process));
    }

    fn end_process(&self, process: usize) {
        *self.processes[process].lock() = Process::default();
    }

    fn mark_disk(&self, key: &DiskKey, mark: DiskMark) {
        self.host.mark(Mark::Disk(key.clone(), mark));
    }

    fn next(&self) -> u64 {
        self.count.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Makes one change, and says so.
    fn change(&self, key: Key, version: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.change_all(&[(key, version.to_owned())], work)
    }

    /// Makes changes by one call, all of which are made or none, and says so.
    fn change_all(&self, changes: &[(Key, String)], work: impl FnOnce() -> Result<()>) -> Result<()> {
        let mark = |mark: fn(Key, String) -> Mark| {
            changes.iter().cloned().for_each(|(key, version)| self.host.mark(mark(key, version)));
        };
        mark(Mark::Asked);
        let result = work();
        match &result {
            Ok(()) => mark(Mark::Answered),
            Err(error) if is_hosts(error.kind()) => mark(Mark::Undecided),
            Err(error) => {
                let refusals = [ErrorKind::NotFound, ErrorKind::Exists, ErrorKind::Busy];
                assert!(refusals.contains(&error.kind()), "{changes:?}: {error:?}");
                mark(Mark::Refused);
            }
        }
        result
    }

    /// Makes a change in the process whose turn it is.
    pub fn apply(&self, op: &Op) {
        let process = (self.turn.load(Ordering::Relaxed) / 3 % 2) as usize;
        self.turn.fetch_add(1, Ordering::Relaxed);
        match op {
            Op::Killed(op, after) => {
                self.kill_in(process, op, *after);
                // The other one goes on.
                self.turn.fetch_add(3, Ordering::Relaxed);
            }
            Op::During(op, other) => {
                let other = Mutex::new(Some((**other).clone()));
                self.apply_in(process, op, &Meanwhile { run: self, process: 1 - process, op: other });
            }
            op => self.apply_in(process, op, &NoProgress),
        }
    }

    /// Has a process die within a change, after so many operations of its host. Returns whether it came to that.
    pub fn kill_in(&self, process: usize, op: &Op, after: u64) -> bool {
        self.host.set_fate(Fate::DeadAfter(after));
        self.apply_in(process, op, &NoProgress);
        let died = self.host.is_dead();
        self.end_process(process);
        self.host.set_fate(Fate::Fine);
        self.errors.lock().clear();
        died
    }

    /// Makes a change in a process.
    pub fn apply_in(&self, process: usize, op: &Op, progress: &dyn Progress) {
        let result = self.store(process).and_then(|store| match op {
            Op::Disk(instance, disk, op) => self.work_on_disk(process, &store, *instance, *disk, op),
            Op::Reopen => {
                self.end_process(process);
                self.store(process).map(drop)
            }
            op => self.make(&store, op, progress),
        });
        if let Err(error) = result
            && is_hosts(error.kind())
        {
            self.errors.lock().push(error.kind());
        }
    }

    fn make(&self, store: &Store, op: &Op, progress: &dyn Progress) -> Result<()> {
        match *op {
            Op::Import { image, twin, kernel } => self.import(store, IMAGES[image], twin, kernel, progress),
            Op::RemoveImage(image) => self.change(Key::Image(IMAGES[image].to_owned()), ABSENT, || {
                store.remove_image(&name(IMAGES[image]))
            }),
            Op::AddFlavor { flavor, swap } => {
                let local_size = FLAVOR_BYTES + self.next() * SECTOR;
                let fs = if swap { FlavorFs::Swap } else { FlavorFs::None };
                self.change(Key::Flavor(FLAVORS[flavor].to_owned()), &local_size.to_string(), || {
                    store
                        .add_flavor(&name(FLAVORS[flavor]), &FlavorSpec { local_size, fs }, progress)
                        .map(drop)
                })
            }
            Op::RemoveFlavor(flavor) => self.change(Key::Flavor(FLAVORS[flavor].to_owned()), ABSENT, || {
                store.remove_flavor(&name(FLAVORS[flavor]))
            }),
            Op::Create { instance, image, flavor, local, no_cow } => {
                let spec = InstanceSpec {
                    flavor: flavor.map(|flavor| name(FLAVORS[flavor])),
                    local_size: (local && flavor.is_none()).then_some(LOCAL_SECTORS * SECTOR),
                    no_cow,
                    root_size: Some((IMAGE_SECTORS + self.next()) * SECTOR),
                    ..InstanceSpec::of(name(IMAGES[image]))
                };
                self.create(store, &[(INSTANCES[instance], spec)], progress)
            }
            Op::CreateBoth { instance, image } => {
                let both = [instance, (instance + 1) % INSTANCES.len()].map(|instance| {
                    let root_size = Some((IMAGE_SECTORS + self.next()) * SECTOR);
                    (INSTANCES[instance], InstanceSpec { root_size, ..InstanceSpec::of(name(IMAGES[image])) })
                });
                self.create(store, &both, progress)
            }
            Op::RemoveInstance(instance) => {
                self.close_disks(instance)?;
                self.change(Key::Instance(INSTANCES[instance].to_owned()), ABSENT, || {
                    store.remove_instance(&name(INSTANCES[instance]))
                })
            }
            Op::ChangeImage(image) => {
                let image = store.image(&name(IMAGES[image]))?;
                let key = Key::ImageAttributes(image.source_name.clone());
                self.change_attributes(store, key, &FileRef::Image(image.name, image.base))
            }
            Op::ChangeDisk(instance, disk) => {
                let instance = store.instance(&name(INSTANCES[instance]))?;
                if !instance.disks().any(|(there, _)| there == disk) {
                    return Ok(());
                }
                let key = Key::DiskAttributes(version_of(&instance), disk);
                self.change_attributes(store, key, &FileRef::Disk(instance.name, instance.id, disk))
            }
            Op::Disk(..) | Op::Reopen | Op::Killed(..) | Op::During(..) => Ok(()),
        }
    }

    fn import(
        &self,
        store: &Store,
        image: &str,
        twin: bool,
        kernel: bool,
        progress: &dyn Progress,
    ) -> Result<()> {
        let number = self.next();
        // Twins are all of one content.
        let (version, number) = match twin {
            true => (format!("twin-{number}"), 0),
            false => (format!("source-{number}"), number),
        };
        let source = self.sources.join(&version);
        let sectors = (0..IMAGE_SECTORS).map(|sector| source_sector(number, sector));
        put(&source, &sectors.collect::<Vec<_>>().concat());
        let kernel_file = self.sources.join(format!("kernel-{}", number % 2));
        put(&kernel_file, &[7 + (number % 2) as u8; 700]);
        let kernel = kernel.then_some(kernel_file);
        let request = ImportRequest { source, kernel, ..ImportRequest::default() };
        self.change(Key::Image(image.to_owned()), &version, || {
            store.import_image(&name(image), &request, progress).map(drop)
        })
    }

    fn create(&self, store: &Store, wanted: &[(&str, InstanceSpec)], progress: &dyn Progress) -> Result<()> {
        let mut changes = Vec::new();
        for (instance, spec) in wanted {
            let version = spec.root_size.expect("every instance has a size of its own").to_string();
            let image = store.image(&spec.image)?;
            let flavor = spec.flavor.as_ref().map(|flavor| store.flavor(flavor)).transpose()?;
            let root = self.contents(store, Some(image.base), spec.root_size.unwrap_or(0))?;
            let local = spec.local_size.or(flavor.as_ref().map(|flavor| flavor.local_size));
            // Before the change is asked for, so that a disk that is found is known.
            self.mark_disk(&(version.clone(), DiskName::Root), DiskMark::Made(root));
            if let Some(size) = local {
                let contents = self.contents(store, flavor.and_then(|flavor| flavor.base), size)?;
                self.mark_disk(&(version.clone(), DiskName::Local), DiskMark::Made(contents));
            }
            changes.push((Key::Instance((*instance).to_owned()), version));
        }
        self.change_all(&changes, || match wanted {
            [(instance, spec)] => store.create_instance(&name(instance), spec, progress).map(drop),
            more => {
                let more: Vec<_> =
                    more.iter().map(|(instance, spec)| (name(instance), spec.clone())).collect();
                store.create_instances(&more, progress, |_| Ok(()))
            }
        })
    }

    /// What a new disk over a base holds.
    fn contents(&self, store: &Store, base: Option<BaseId>, size: u64) -> Result<Vec<Content>> {
        let mut bytes = Vec::new();
        if let Some(base) = base {
            store.open_base(&base)?.read_to_end(&mut bytes).context(|| "read a base")?;
        }
        bytes.resize(size as usize, 0);
        Ok(bytes.as_chunks::<512>().0.iter().map(content).collect())
    }

    fn change_attributes(&self, store: &Store, key: Key, file: &FileRef) -> Result<()> {
        let mut attributes = store.attributes(file)?;
        let number = self.next();
        (attributes.uid, attributes.mode) = (1000 + number as u32, 0o600 | (number as u32 % 8));
        attributes.xattrs.insert("user.note".to_owned(), number.to_le_bytes().to_vec());
        self.change(key, &shown(&attributes), || store.set_attributes(file, &attributes))
    }

    /// Closes the disks of an instance, whoever has them open.
    fn close_disks(&self, instance: usize) -> Result<()> {
        for process in &self.processes {
            for disk in DiskName::ALL {
                let open = process.lock().disks.remove(&(instance, disk));
                if let Some((key, disk)) = open {
                    disk.close()?;
                    self.mark_disk(&key, DiskMark::Flushed);
                }
            }
        }
        Ok(())
    }

    fn work_on_disk(
        &self,
        process: usize,
        store: &Store,
        number: usize,
        disk: DiskName,
        op: &DiskOp,
    ) -> Result<()> {
        let instance: Instance = store.instance(&name(INSTANCES[number]))?;
        if !instance.disks().any(|(there, _)| there == disk) {
            return Ok(());
        }
        let mut process = self.processes[process].lock();
        let (key, open) = match process.disks.remove(&(number, disk)) {
            Some(open) => open,
            // Another process may have it open.
            None => {
                let (key, open) = ((version_of(&instance), disk), store.open_disk(&instance.name, disk)?);
                if self.failed.lock().remove(&key) {
                    self.look_again(&key, &open)?;
                }
                (key, open)
            }
        };
        let result = self.ask_disk(&key, &open, op);
        match (op, &result) {
            (DiskOp::Close, Ok(())) => {
                open.close()?;
                self.mark_disk(&key, DiskMark::Flushed);
            }
            // After an error of the host it is opened anew.
            (_, Err(_)) => {
                drop(open);
                self.failed.lock().insert(key);
            }
            _ => drop(process.disks.insert((number, disk), (key, open))),
        }
        result
    }

    /// What failed is done or not: whichever it is, that is what the next flush covers.
    fn look_again(&self, key: &DiskKey, disk: &Disk) -> Result<()> {
        let end = if key.1 == DiskName::Root { IMAGE_SECTORS } else { LOCAL_SECTORS };
        let mut bytes = vec![0; (end * SECTOR) as usize];
        disk.read_at(0, &mut bytes)?;
        let found = bytes.as_chunks::<512>().0.iter().map(content).enumerate();
        self.mark_disk(key, DiskMark::Asked(found.collect()));
        Ok(())
    }

    fn ask_disk(&self, key: &DiskKey, disk: &Disk, op: &DiskOp) -> Result<()> {
        match *op {
            DiskOp::Write(sector, sectors) | DiskOp::Discard(sector, sectors) => {
                // Within what it had when it was made.
                let end = if key.1 == DiskName::Root { IMAGE_SECTORS } else { LOCAL_SECTORS };
                let sector = sector % end;
                let sectors = sectors.min(end - sector);
                let zero = matches!(op, DiskOp::Discard(..));
                let new: Vec<[u8; 512]> =
                    (0..sectors).map(|_| if zero { [0; 512] } else { filled(self.next()) }).collect();
                let asked = (sector as usize..).zip(&new).map(|(at, bytes)| (at, content(bytes)));
                self.mark_disk(key, DiskMark::Asked(asked.collect()));
                match zero {
                    true => disk.zero(sector * SECTOR, sectors * SECTOR),
                    false => disk.write_at(sector * SECTOR, &new.concat()),
                }
            }
            DiskOp::Flush => {
                disk.flush()?;
                self.mark_disk(key, DiskMark::Flushed);
                Ok(())
            }
            DiskOp::Grow => {
                let size = disk.size() + SECTOR * (1 + self.next() % 20);
                self.mark_disk(key, DiskMark::AskedToGrow(size));
                disk.grow(size)?;
                self.mark_disk(key, DiskMark::Grown);
                Ok(())
            }
            DiskOp::Close => Ok(()),
        }
    }
}

/// Makes a file outside of the store, unless it is there.
fn put(path: &Path, bytes: &[u8]) {
    if let Ok(mut file) = File::create_new(path) {
        file.write_all(bytes).expect("write a source");
    }
}
