//! What a store may hold after a power cut.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cowdisk::ErrorKind;
use cowdisk::finding::Severity;
use cowdisk::store::{
    Attributes, CheckReport, CheckRequest, Disk, DiskName, FileRef, Image, Instance, NoProgress, Store,
};

use crate::common::record::{Content, SECTOR, content};

/// Something that a change makes, replaces or removes as a whole.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Store,
    Image(String),
    Flavor(String),
    Instance(String),
    /// Owner, mode and extended attributes of what the mount shows of an image, by the image's version.
    ImageAttributes(String),
    /// The same of a disk, by the version of its instance.
    DiskAttributes(String, DiskName),
}

/// A number or a text that tells the versions of a thing apart; `ABSENT`: it is not there.
pub type Version = String;
pub const ABSENT: &str = "";

/// A disk of the instance of that version.
pub type DiskKey = (Version, DiskName);

/// What a run tells besides what its host does.
#[derive(Clone, Debug)]
pub enum Mark {
    Asked(Key, Version),
    /// It is done, durably.
    Answered(Key, Version),
    /// It was refused, and nothing has changed.
    Refused(Key, Version),
    /// It has failed, or its process has died: it is done or not begun.
    Undecided(Key, Version),
    Disk(DiskKey, DiskMark),
}

#[derive(Clone)]
pub enum DiskMark {
    /// It will hold this as soon as it is there.
    Made(Vec<Content>),
    Asked(Vec<(usize, Content)>),
    Flushed,
    AskedToGrow(u64),
    Grown,
}

impl std::fmt::Debug for DiskMark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Made(contents) => write!(f, "made with {} sectors", contents.len()),
            Self::Asked(sectors) => {
                let sectors: Vec<usize> = sectors.iter().map(|(sector, _)| *sector).collect();
                write!(f, "asked to change {sectors:?}")
            }
            Self::Flushed => f.write_str("flushed"),
            Self::AskedToGrow(size) => write!(f, "asked to grow to {size}"),
            Self::Grown => f.write_str("grown"),
        }
    }
}

/// What a disk may hold: of each sector the content of the last completed flush, and all later ones.
#[derive(Clone, Debug, Default)]
struct DiskOracle {
    sectors: Vec<Vec<Content>>,
    sizes: Vec<u64>,
}

/// A version that may be there.
#[derive(Clone, Debug)]
struct Allowed {
    version: Version,
    /// Whether the change that makes it is still under way, so that it may be done after another one.
    under_way: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Oracle {
    allowed: BTreeMap<Key, Vec<Allowed>>,
    disks: BTreeMap<DiskKey, DiskOracle>,
    /// Grows whenever it becomes stricter.
    pub epoch: u64,
}

/// What was found in a store: one of what may be there.
#[derive(Clone, Debug, Default)]
pub struct Found {
    pub versions: BTreeMap<Key, Version>,
    pub disks: BTreeMap<DiskKey, (Vec<Content>, u64)>,
}

impl Oracle {
    pub fn of(found: &Found) -> Self {
        let allowed = found.versions.iter().map(|(key, version)| (key.clone(), vec![settled(version)]));
        let disks = found.disks.iter().map(|(key, (contents, size))| {
            let sectors = contents.iter().map(|content| vec![content.clone()]).collect();
            (key.clone(), DiskOracle { sectors, sizes: vec![*size] })
        });
        Self { allowed: allowed.collect(), disks: disks.collect(), epoch: 0 }
    }

    fn allowed_mut(&mut self, key: &Key) -> &mut Vec<Allowed> {
        self.allowed.entry(key.clone()).or_insert_with(|| vec![settled(&absent_or_default(key))])
    }

    /// Takes out the change of that version that is under way.
    fn take(&mut self, key: &Key, version: &str) {
        self.epoch += 1;
        let allowed = self.allowed_mut(key);
        let at = allowed.iter().rposition(|allowed| allowed.under_way && allowed.version == version);
        allowed.remove(at.expect("what was asked for"));
    }

    pub fn apply(&mut self, mark: &Mark) {
        match mark {
            Mark::Asked(key, version) => {
                self.allowed_mut(key).push(Allowed { version: version.clone(), under_way: true });
            }
            Mark::Answered(key, version) => {
                self.take(key, version);
                let allowed = self.allowed_mut(key);
                allowed.retain(|allowed| allowed.under_way);
                allowed.push(settled(version));
            }
            Mark::Refused(key, version) => self.take(key, version),
            Mark::Undecided(key, version) => {
                self.take(key, version);
                self.allowed_mut(key).push(settled(version));
            }
            Mark::Disk(key, mark) => self.apply_to_disk(key, mark),
        }
    }

    fn apply_to_disk(&mut self, key: &DiskKey, mark: &DiskMark) {
        let disk = self.disks.entry(key.clone()).or_default();
        match mark {
            DiskMark::Made(contents) => {
                disk.sectors = contents.iter().map(|content| vec![content.clone()]).collect();
                disk.sizes = vec![contents.len() as u64 * SECTOR];
            }
            DiskMark::Asked(sectors) => {
                for (sector, content) in sectors {
                    disk.sectors[*sector].push(content.clone());
                }
            }
            DiskMark::Flushed => {
                self.epoch += 1;
                for allowed in &mut disk.sectors {
                    allowed.drain(..allowed.len() - 1);
                }
            }
            DiskMark::AskedToGrow(size) => disk.sizes.push(*size),
            DiskMark::Grown => {
                self.epoch += 1;
                disk.sizes.drain(..disk.sizes.len() - 1);
            }
        }
    }

    /// Whether a store must be there; before `init` has returned there may be none.
    pub fn needs_store(&self) -> bool {
        !self.allows(&Key::Store, ABSENT)
    }

    fn allows(&self, key: &Key, version: &str) -> bool {
        match self.allowed.get(key) {
            Some(allowed) => allowed.iter().any(|allowed| allowed.version == version),
            None => version == absent_or_default(key),
        }
    }

    /// Looks at everything in the store, which was swept when it was opened.
    pub fn check(&self, store: &Store) -> Found {
        let mut found = Found::default();
        found.versions.insert(Key::Store, "there".to_owned());
        let images = store.images().expect("list the images");
        let flavors = store.flavors().expect("list the flavors");
        let instances = store.instances().expect("list the instances");
        for image in &images {
            store.verify_image(&image.name, &NoProgress).expect("an image is whole");
            found.versions.insert(Key::Image(image.name.to_string()), image.source_name.clone());
            let file = FileRef::Image(image.name.clone(), image.base);
            let attributes = store.attributes(&file).expect("attributes");
            found.versions.insert(Key::ImageAttributes(image.source_name.clone()), shown(&attributes));
        }
        for flavor in &flavors {
            store.verify_flavor(&flavor.name, &NoProgress).expect("a flavor is whole");
            found.versions.insert(Key::Flavor(flavor.name.to_string()), flavor.local_size.to_string());
        }
        for instance in &instances {
            self.look_at_instance(store, instance, &mut found);
        }
        for (key, version) in &found.versions {
            assert!(self.allows(key, version), "{key:?} is {version:?}, not {:?}", self.allowed.get(key));
        }
        for (key, allowed) in &self.allowed {
            // Attributes go with their object.
            let object = !matches!(key, Key::ImageAttributes(_) | Key::DiskAttributes(..));
            if object && !found.versions.contains_key(key) {
                assert!(self.allows(key, ABSENT), "{key:?} is gone, and should be {allowed:?}");
            }
        }
        check_tidiness(store, &images, &instances, flavors.iter().filter_map(|flavor| flavor.base));
        let report = store.check(&CheckRequest { full: true, ..CheckRequest::default() }, &NoProgress);
        assert_clean(&report.expect("check the store"), &LEFTOVERS);
        found
    }

    fn look_at_instance(&self, store: &Store, instance: &Instance, found: &mut Found) {
        let version = version_of(instance);
        found.versions.insert(Key::Instance(instance.name.to_string()), version.clone());
        for (disk, made) in instance.disks() {
            // An overlay of something, or a plain file.
            assert_eq!(made.is_overlay(), instance.cow && made.base.is_some(), "{version} {disk}");
            let map = store.disk_map(&instance.name, disk).expect("the map of a disk");
            assert_eq!(map.block_bytes, made.block_bytes, "{version} {disk}");
            let file = FileRef::Disk(instance.name.clone(), instance.id, disk);
            let attributes = store.attributes(&file).expect("attributes");
            found.versions.insert(Key::DiskAttributes(version.clone(), disk), shown(&attributes));
            let open = store.open_disk(&instance.name, disk).expect("a disk opens");
            let key = (version.clone(), disk);
            found.disks.insert(key.clone(), self.read_disk(&key, &open));
        }
    }

    /// What a disk holds, if each sector holds what it may.
    fn read_disk(&self, key: &DiskKey, disk: &Disk) -> (Vec<Content>, u64) {
        let oracle = self.disks.get(key).unwrap_or_else(|| panic!("a disk of no instance: {key:?}"));
        let size = disk.size();
        assert!(oracle.sizes.contains(&size), "{key:?} has {size} bytes, not {:?}", oracle.sizes);
        let mut bytes = vec![0; size as usize];
        disk.read_at(0, &mut bytes).expect("read a disk");
        let found: Vec<Content> = bytes.as_chunks::<512>().0.iter().map(content).collect();
        for (sector, found) in found.iter().enumerate() {
            let allowed = oracle.sectors.get(sector).map_or(&[None][..], Vec::as_slice);
            assert!(
                allowed.contains(found),
                "sector {sector} of {key:?} holds {:#x}, not one of {:#x?}",
                tag(found),
                allowed.iter().map(tag).collect::<Vec<_>>()
            );
        }
        (found, size)
    }
}

/// What a check may say of a store that was not swept yet, but not of one that was.
const LEFTOVERS: [&str; 5] =
    ["leftover", "base-unreferenced", "boot-unreferenced", "attributes-orphan", "unknown-file"];

/// Fails if a check has found anything that asks for attention, or any of `kinds`.
pub fn assert_clean(report: &CheckReport, kinds: &[&str]) {
    for finding in &report.findings {
        assert!(
            finding.severity == Severity::Note && !kinds.contains(&finding.kind),
            "a check finds: {finding}"
        );
    }
}

/// Looks at a store before anything was swept.
pub fn check_as_it_is(folder: &Path) {
    match Store::open_as_it_is(folder) {
        Ok(store) => {
            let store = store.with_run_dir(folder.join("../run"));
            let request = CheckRequest { full: true, ..CheckRequest::default() };
            assert_clean(&store.check(&request, &NoProgress).expect("check a store as it is"), &[]);
        }
        Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{error}"),
    }
}

/// Everything that is there is named.
fn check_tidiness(
    store: &Store,
    images: &[Image],
    instances: &[Instance],
    flavor_bases: impl Iterator<Item = cowdisk::format::BaseId>,
) {
    let (mut bases, mut boot_files, mut attributes) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for image in images {
        bases.insert(image.base.to_string());
        attributes.insert(format!("image-{}.json", image.name));
        boot_files.extend(image.kernel.map(|id| id.to_string()));
    }
    bases.extend(flavor_bases.map(|base| base.to_string()));
    for instance in instances {
        boot_files.extend(instance.kernel.map(|id| id.to_string()));
        let overlaid =
            instance.disks().filter(|(_, disk)| disk.is_overlay()).filter_map(|(_, disk)| disk.base);
        bases.extend(overlaid.map(|base| base.to_string()));
    }
    assert_eq!(names(store, "tmp"), BTreeSet::new(), "nothing half-made is left");
    assert_eq!(names(store, "bases"), bases);
    assert_eq!(names(store, "boot"), boot_files);
    assert!(names(store, "attrs").is_subset(&attributes), "{:?}", names(store, "attrs"));
    let known = ["attrs", "bases", "boot", "flavors", "images", "instances", "tmp"];
    let files = ["cowdisk-store.json", "lock", "run.json"];
    let known: BTreeSet<String> = known.iter().chain(&files).map(|name| (*name).to_owned()).collect();
    assert!(names(store, "").is_subset(&known), "{:?}", names(store, ""));
}

fn names(store: &Store, part: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(store.dir().join(part)).expect("list a folder of the store");
    entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
}

fn settled(version: &str) -> Allowed {
    Allowed { version: version.to_owned(), under_way: false }
}

/// The version of an instance: each has a root of its own size.
pub fn version_of(instance: &Instance) -> Version {
    instance.root.size.to_string()
}

/// The version of attributes.
pub fn shown(attributes: &Attributes) -> Version {
    let Attributes { uid, gid, mode, xattrs } = attributes;
    format!("{uid}:{gid} {mode:o} {xattrs:?}")
}

/// What nobody has changed.
fn absent_or_default(key: &Key) -> Version {
    let owner = format!("{}:{}", rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    match key {
        Key::ImageAttributes(_) => format!("{owner} 400 {{}}"),
        Key::DiskAttributes(..) => format!("{owner} 600 {{}}"),
        _ => ABSENT.to_owned(),
    }
}

/// The number of the write that a sector's content is of.
fn tag(content: &Content) -> u64 {
    content.as_ref().map_or(0, |bytes| u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")))
}
