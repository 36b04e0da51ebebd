//! Names and what lies behind them, read from the store at each call.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::SystemTime;

use rustix::fs::{Timespec, Timestamps};

use super::attributes::{Attributes, FileKind, SetTime};
use super::errno::{Errno, Failure, Outcome};
use super::inodes::{LinkName, Node};
use super::open_disks::{DiskKey, OpenDisk, OpenDisks};
use crate::error::{Context, ErrorKind, Result};
use crate::store::{BootFileId, FileRef, Image, Instance, ObjectName, Store};

/// Mode of every directory: whoever runs a guest must get through to its disks, which have modes of their own.
const DIRECTORY_MODE: u32 = 0o755;

/// Mode of every symbolic link; it means nothing.
const LINK_MODE: u32 = 0o777;

/// An entry of a directory.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// What it is.
    pub(super) node: Node,
}

impl Entry {
    fn new(name: impl Into<String>, node: Node) -> Self {
        Self { name: name.into(), node }
    }
}

impl Node {
    /// Kind of the file.
    pub(super) fn kind(&self) -> FileKind {
        match self {
            Self::Root | Self::Images | Self::Boot | Self::Instances | Self::Instance { .. } => {
                FileKind::Directory
            }
            Self::Image { .. } | Self::BootFile(_) | Self::Disk { .. } => FileKind::Regular,
            Self::Link { .. } => FileKind::Symlink,
        }
    }
}

/// The tree over one store.
#[derive(Debug)]
pub struct Tree {
    store: Store,
    /// Owner and group of the directories: whoever runs the daemon.
    owner: (u32, u32),
    /// Time of the directories.
    since: SystemTime,
}

/// What a name that is not there means: no such name. Anything else stays an error.
fn or_no_entry<T>(result: Result<T>) -> Outcome<T> {
    result.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Errno::NO_ENTRY.into(),
        _ => Failure::Error(error),
    })
}

/// What a file that is not there any more means: the inode is stale.
pub(super) fn or_stale<T>(result: Result<T>) -> Outcome<T> {
    result.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Errno::STALE.into(),
        _ => Failure::Error(error),
    })
}

impl Tree {
    /// The tree over `store`.
    ///
    /// # Errors
    /// If the store's folder cannot be looked at.
    pub fn new(store: Store) -> Result<Self> {
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Ok(Self { store, owner, since: SystemTime::now() })
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The file `name` in the directory `parent`.
    ///
    /// # Errors
    /// [`Errno::NO_ENTRY`] if there is none; [`Errno::NOT_DIRECTORY`] if `parent` is no directory.
    pub fn find(&self, parent: &Node, name: &str) -> Outcome<Node> {
        match parent {
            Node::Root => {
                let found = self.fixed_entries().into_iter().find(|entry| entry.name == name);
                found.map(|entry| entry.node).ok_or_else(|| Errno::NO_ENTRY.into())
            }
            Node::Images => {
                let name = name.parse().map_err(|_not_a_name| Errno::NO_ENTRY)?;
                Ok(image_node(&or_no_entry(self.store.image(&name))?))
            }
            Node::Boot => {
                let id = name.parse().map_err(|_not_an_id| Errno::NO_ENTRY)?;
                or_no_entry(self.store.open_boot_file(&id))?;
                Ok(Node::BootFile(id))
            }
            Node::Instances => {
                let name = name.parse().map_err(|_not_a_name| Errno::NO_ENTRY)?;
                Ok(instance_node(&or_no_entry(self.store.instance(&name))?))
            }
            Node::Instance { .. } => {
                let found = self.instance_entries(parent)?.into_iter().find(|entry| entry.name == name);
                found.map(|entry| entry.node).ok_or_else(|| Errno::NO_ENTRY.into())
            }
            Node::Image { .. } | Node::BootFile(_) | Node::Disk { .. } | Node::Link { .. } => {
                Err(Errno::NOT_DIRECTORY.into())
            }
        }
    }

    /// What a directory holds, `.` and `..` first.
    ///
    /// # Errors
    /// [`Errno::NOT_DIRECTORY`] if it is none; [`Errno::STALE`] if it has been removed.
    pub fn entries(&self, directory: &Node) -> Outcome<Vec<Entry>> {
        let (parent, entries) = match directory {
            Node::Root => (Node::Root, self.fixed_entries()),
            Node::Images => {
                let entry = |name: &ObjectName| Ok(image_node(&self.store.image(name)?));
                (Node::Root, readable("images", self.store.image_names()?, entry))
            }
            Node::Boot => {
                let ids = self.store.boot_files()?;
                (
                    Node::Root,
                    ids.into_iter().map(|id| Entry::new(id.to_string(), Node::BootFile(id))).collect(),
                )
            }
            Node::Instances => {
                let entry = |name: &ObjectName| Ok(instance_node(&self.store.instance(name)?));
                (Node::Root, readable("instances", self.store.instance_names()?, entry))
            }
            Node::Instance { .. } => (Node::Instances, self.instance_entries(directory)?),
            Node::Image { .. } | Node::BootFile(_) | Node::Disk { .. } | Node::Link { .. } => {
                return Err(Errno::NOT_DIRECTORY.into());
            }
        };
        let mut all = vec![Entry::new(".", directory.clone()), Entry::new("..", parent)];
        all.extend(entries);
        Ok(all)
    }

    fn fixed_entries(&self) -> Vec<Entry> {
        vec![
            Entry::new("images", Node::Images),
            Entry::new("boot", Node::Boot),
            Entry::new("instances", Node::Instances),
        ]
    }

    fn instance_entries(&self, node: &Node) -> Outcome<Vec<Entry>> {
        let instance = self.instance_of(node)?;
        let (name, id) = (&instance.name, instance.id);
        let disks = instance
            .disks()
            .map(|(disk, _)| Entry::new(disk.as_str(), Node::Disk { instance: name.clone(), disk, id }));
        let links = LinkName::ALL.into_iter().filter(|link| boot_file_of(&instance, *link).is_some());
        let links =
            links.map(|link| Entry::new(link.as_str(), Node::Link { instance: name.clone(), link, id }));
        Ok(disks.chain(links).collect())
    }

    /// Calls `tell` with every file and directory that has a number of its own. What cannot be read is logged and left out.
    ///
    /// # Errors
    /// If the folders of the store cannot be read.
    pub fn for_each_node(&self, tell: &mut dyn FnMut(&Node)) -> Outcome<()> {
        for parent in [Node::Images, Node::Boot, Node::Instances] {
            for entry in self.entries(&parent)?.into_iter().skip(2) {
                tell(&entry.node);
                if let Node::Instance { .. } = entry.node {
                    match self.instance_entries(&entry.node) {
                        Ok(inside) => inside.iter().for_each(|inside| tell(&inside.node)),
                        Err(failure) => log::debug!("look into instance {}: {failure}", entry.name),
                    }
                }
            }
        }
        Ok(())
    }

    /// The instance that a node belongs to, if it is still that very instance.
    fn instance_of(&self, node: &Node) -> Outcome<Instance> {
        let (name, id) = match node {
            Node::Instance { name, id } => (name, id),
            Node::Disk { instance, id, .. } | Node::Link { instance, id, .. } => (instance, id),
            Node::Root
            | Node::Images
            | Node::Boot
            | Node::Instances
            | Node::Image { .. }
            | Node::BootFile(_) => {
                return Err(Errno::INVALID.into());
            }
        };
        let instance = or_stale(self.store.instance(name))?;
        if instance.id == *id { Ok(instance) } else { Err(Errno::STALE.into()) }
    }

    fn image_of(&self, name: &ObjectName, node: &Node) -> Outcome<Image> {
        let image = or_stale(self.store.image(name))?;
        if image_node(&image) == *node { Ok(image) } else { Err(Errno::STALE.into()) }
    }

    /// What `stat` shows of a file, but for its inode number.
    ///
    /// # Errors
    /// [`Errno::STALE`] if it has been removed.
    pub fn attributes(&self, node: &Node, disks: &OpenDisks) -> Outcome<Attributes> {
        match node {
            Node::Root => Ok(Attributes { links: 5, ..self.directory(true) }),
            Node::Images | Node::Boot => Ok(Attributes { links: 2, ..self.directory(true) }),
            Node::Instances => Ok(self.directory(true)),
            Node::Instance { .. } => {
                self.instance_of(node)?;
                Ok(Attributes { links: 2, ..self.directory(false) })
            }
            Node::Link { .. } => {
                let size = self.link_target(node)?.len() as u64;
                Ok(Attributes { kind: FileKind::Symlink, mode: LINK_MODE, size, ..self.directory(false) })
            }
            Node::Image { .. } | Node::BootFile(_) => {
                let host = self.open_fixed(node)?.metadata().context(|| "look at an image")?;
                let time = |time: std::io::Result<SystemTime>| time.unwrap_or(SystemTime::UNIX_EPOCH);
                let (atime, mtime) = (time(host.accessed()), time(host.modified()));
                self.regular(node, host.len(), host.blocks() * 512, atime, mtime)
            }
            Node::Disk { .. } => self.disk_attributes(node, disks),
        }
    }

    fn disk_attributes(&self, node: &Node, disks: &OpenDisks) -> Outcome<Attributes> {
        let key = disk_key(node)?;
        let status = or_stale(self.store.disk_status_of(&key.instance, key.id, key.disk))?;
        // The size of an open disk is known without its files, and changes first there.
        let size = disks.look(&key, |open| open.disk().size()).unwrap_or(status.size);
        self.regular(node, size, status.data_allocated, status.accessed, status.modified)
    }

    /// Attributes of a file of which the store keeps a record.
    fn regular(
        &self,
        node: &Node,
        size: u64,
        allocated: u64,
        atime: SystemTime,
        mtime: SystemTime,
    ) -> Outcome<Attributes> {
        let file = self.file_ref(node)?.ok_or(Errno::INVALID)?;
        let record = or_stale(self.store.attributes(&file))?;
        Ok(Attributes {
            ino: 0,
            kind: FileKind::Regular,
            mode: record.mode & super::MODE_BITS,
            uid: record.uid,
            gid: record.gid,
            links: 1,
            size,
            allocated,
            atime,
            mtime,
            ctime: mtime,
            fixed: false,
        })
    }

    /// What is shown of a file that cannot be looked at: its name and kind, for nobody.
    pub fn unknown(&self, node: &Node) -> Attributes {
        Attributes { kind: node.kind(), mode: 0, ..self.directory(false) }
    }

    fn directory(&self, fixed: bool) -> Attributes {
        Attributes {
            ino: 0,
            kind: FileKind::Directory,
            mode: DIRECTORY_MODE,
            uid: self.owner.0,
            gid: self.owner.1,
            links: 1,
            size: 0,
            allocated: 0,
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            fixed,
        }
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// [`Errno::INVALID`] if it is none; [`Errno::STALE`] if it has been removed.
    pub fn link_target(&self, node: &Node) -> Outcome<String> {
        let Node::Link { link, .. } = node else { return Err(Errno::INVALID.into()) };
        let id = boot_file_of(&self.instance_of(node)?, *link).ok_or(Errno::STALE)?;
        Ok(format!("../../boot/{id}"))
    }

    /// The name under which the store keeps the owner, mode and extended attributes of a file, if it has them.
    ///
    /// # Errors
    /// [`Errno::STALE`] if an image has been removed.
    pub fn file_ref(&self, node: &Node) -> Outcome<Option<FileRef>> {
        Ok(match node {
            // The store itself looks at the id, and at the content.
            Node::Disk { instance, disk, id } => Some(FileRef::Disk(instance.clone(), *id, *disk)),
            Node::Image { name, base } => Some(FileRef::Image(name.clone(), *base)),
            Node::BootFile(id) => Some(FileRef::Boot(*id)),
            Node::Root | Node::Images | Node::Boot | Node::Instances => None,
            Node::Instance { .. } | Node::Link { .. } => None,
        })
    }

    /// The disk of `node` for one more handle; opens it for service if it is not open.
    ///
    /// # Errors
    /// [`Errno::STALE`] if it has been removed; those of opening it.
    pub fn acquire_disk(&self, node: &Node, disks: &OpenDisks, kept: bool) -> Outcome<Arc<OpenDisk>> {
        let key = disk_key(node)?;
        // A disk that is open cannot be removed, so who finds it open under its id need not look at the store.
        let open = |by_kernel| match kept {
            true => self.store.take_up_disk_of(&key.instance, key.id, key.disk, by_kernel),
            false => self.store.open_disk_of(&key.instance, key.id, key.disk),
        };
        let opened = disks.acquire(&key, kept, |by_kernel| open(by_kernel).context(|| format!("open {key}")));
        opened.or_else(|error| {
            // Whatever went wrong, if it is gone that is why.
            self.instance_of(node)?;
            Err(error.into())
        })
    }

    /// Nobody has the disk of `node` open any more, and it could not be opened to be closed.
    pub fn give_up_disk(&self, node: &Node, disks: &OpenDisks) {
        if let Ok(key) = disk_key(node)
            && disks.look(&key, |_| ()).is_none()
        {
            self.store.give_up_disk(&key.instance, key.disk);
            disks.give_up(&key);
        }
    }

    /// Opens an image, a kernel or a ramdisk.
    ///
    /// # Errors
    /// [`Errno::STALE`] if it has been removed; those of the store.
    pub fn open_fixed(&self, node: &Node) -> Outcome<File> {
        match node {
            Node::Image { name, .. } => Ok(self.store.open_base(&self.image_of(name, node)?.base)?),
            Node::BootFile(id) => or_stale(self.store.open_boot_file(id)),
            _ => Err(Errno::INVALID.into()),
        }
    }

    /// Sets the times of a disk.
    ///
    /// # Errors
    /// [`Errno::STALE`] if it has been removed; those of the host.
    pub fn set_times(&self, node: &Node, atime: Option<SetTime>, mtime: Option<SetTime>) -> Outcome<()> {
        let key = disk_key(node)?;
        let times = Timestamps { last_access: to_timespec(atime), last_modification: to_timespec(mtime) };
        or_stale(self.store.set_disk_times_of(&key.instance, key.id, key.disk, &times))
    }
}

/// The entries of all names whose records can be read: one damaged record must not hide all others.
fn readable(what: &str, names: Vec<ObjectName>, node: impl Fn(&ObjectName) -> Result<Node>) -> Vec<Entry> {
    let entry = |name: ObjectName| match node(&name) {
        Ok(node) => Some(Entry::new(name.as_str(), node)),
        // Removed since its name was read.
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            log::warn!("list {what}: {error}");
            None
        }
    };
    names.into_iter().filter_map(entry).collect()
}

/// What tells the disk of `node` from all others, past ones included.
pub fn disk_key(node: &Node) -> Outcome<DiskKey> {
    let Node::Disk { instance, disk, id } = node else { return Err(Errno::INVALID.into()) };
    Ok(DiskKey { instance: instance.clone(), disk: *disk, id: *id })
}

fn to_timespec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
        Some(SetTime::To(time)) => match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => Timespec {
                tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
            // Before 1970: nanoseconds count up from the second before.
            Err(error) => {
                let before = error.duration();
                let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                match before.subsec_nanos() {
                    0 => Timespec { tv_sec: -seconds, tv_nsec: 0 },
                    nanos => Timespec { tv_sec: -seconds - 1, tv_nsec: i64::from(1_000_000_000 - nanos) },
                }
            }
        },
    }
}

/// An image is another one when its name or its content is.
fn image_node(image: &Image) -> Node {
    Node::Image { name: image.name.clone(), base: image.base }
}

fn instance_node(instance: &Instance) -> Node {
    Node::Instance { name: instance.name.clone(), id: instance.id }
}

fn boot_file_of(instance: &Instance, link: LinkName) -> Option<BootFileId> {
    match link {
        LinkName::Kernel => instance.kernel,
        LinkName::Ramdisk => instance.ramdisk,
    }
}
