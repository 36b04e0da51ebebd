//! A folder with all that is in it, at each moment of a run, and what a power cut may leave of it.
//!
//! A change of names (something appears, leaves, or moves) is durable once the folder in which the name is, or the new one
//! of a move, was synced. Until then it may be lost or not, each for itself, but for this: of changes of one name a later
//! one is never there without the earlier ones, a folder is never gone without what was taken out of it before, and a move
//! is one step. Contents, and mode and time of change, are lost on their own, whatever becomes of the names: a file whose
//! contents were not synced is empty, or has its length and zeroes, or the first part, or any sectors of it.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, SeekFrom, Timespec, Timestamps};

use super::host::Event;
use super::record::{Choice, FileState, Image, SECTOR, content};

/// The number of a file or a folder in a run; the first folder is 0.
pub type Node = usize;

/// The names in a folder.
type Entries = BTreeMap<String, Node>;

/// What `stat` tells of a file that survives on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    pub mode: u32,
    pub modified: Timespec,
}

impl Meta {
    pub fn of(file: impl AsFd) -> Self {
        let stat = rustix::fs::fstat(file).expect("look up a file of the scratch folder");
        let modified = Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec.cast_signed() };
        Self { mode: stat.st_mode & 0o7777, modified }
    }
}

/// A file or a folder that has just been made.
#[derive(Clone, Debug)]
pub struct Born {
    pub inode: u64,
    pub is_dir: bool,
    pub meta: Meta,
}

/// A change of names.
#[derive(Clone, Debug)]
pub enum Names {
    Add(Node, String, Node),
    Remove(Node, String, Node),
    Move { from: (Node, String), to: (Node, String) },
}

impl Names {
    /// The folder that makes it durable when it is synced.
    fn folder(&self) -> Node {
        match self {
            Self::Add(dir, ..) | Self::Remove(dir, ..) => *dir,
            Self::Move { to, .. } => to.0,
        }
    }

    fn entries(&self) -> [(Node, &str); 2] {
        match self {
            Self::Add(dir, name, _) | Self::Remove(dir, name, _) => [(*dir, name), (*dir, name)],
            Self::Move { from, to } => [(from.0, &from.1), (to.0, &to.1)],
        }
    }

    /// Whether it can only be there if an earlier one is.
    fn needs(&self, earlier: &Self) -> bool {
        let shared = self.entries().iter().any(|entry| earlier.entries().contains(entry));
        // A folder that is gone was emptied first.
        let emptied = |gone: Node| earlier.entries().iter().any(|(dir, _)| *dir == gone);
        shared || matches!(self, Self::Remove(_, _, node) if emptied(*node))
    }

    fn apply(&self, folders: &mut [Entries]) {
        match self {
            Self::Add(dir, name, node) => drop(folders[*dir].insert(name.clone(), *node)),
            Self::Remove(dir, name, _) => drop(folders[*dir].remove(name)),
            Self::Move { from, to } => {
                let node = folders[from.0].remove(&from.1).expect("what is moved is there");
                folders[to.0].insert(to.1.clone(), node);
            }
        }
    }
}

#[derive(Clone, Debug)]
struct NodeState {
    born: Born,
    /// Mode and time that are durable, and the later ones.
    meta: Meta,
    metas: Vec<(usize, Meta)>,
    /// Of a file.
    file: FileState,
}

impl NodeState {
    fn new(born: &Born) -> Self {
        let (born, meta) = (born.clone(), born.meta);
        Self { born, meta, metas: Vec::new(), file: FileState::default() }
    }

    fn sync_meta(&mut self) {
        if let Some((_, meta)) = self.metas.drain(..).next_back() {
            self.meta = meta;
        }
    }
}

/// Which of the changes that are not durable reach the disk.
#[derive(Clone, Debug)]
pub struct Cut {
    pub names: Choice,
    pub contents: Choice,
}

/// A folder at one moment of a run.
#[derive(Clone, Debug)]
pub struct Tree {
    nodes: Vec<NodeState>,
    /// Of each node that is a folder: the names in it that are durable.
    folders: Vec<Entries>,
    /// Changes of names that are not durable, with their numbers in the run, oldest first.
    pending: Vec<(usize, Names)>,
}

impl Tree {
    /// The folder as it is, all of it durable, but only `wanted` of the names in the first one.
    pub fn read(path: &Path, wanted: &str) -> Self {
        let mut tree = Self { nodes: Vec::new(), folders: Vec::new(), pending: Vec::new() };
        tree.read_dir(path, Some(wanted));
        tree
    }

    fn add(&mut self, file: &File, is_dir: bool) -> Node {
        let inode = file.metadata().expect("look up a file").ino();
        self.born(&Born { inode, is_dir, meta: Meta::of(file) });
        self.nodes.len() - 1
    }

    fn born(&mut self, born: &Born) {
        self.nodes.push(NodeState::new(born));
        self.folders.push(Entries::new());
    }

    fn read_dir(&mut self, path: &Path, wanted: Option<&str>) -> Node {
        let node = self.add(&File::open(path).expect("open a folder"), true);
        for entry in std::fs::read_dir(path).expect("read a folder") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("UTF-8");
            if wanted.is_some_and(|wanted| wanted != name) {
                continue;
            }
            let inner = if entry.file_type().expect("a type").is_dir() {
                self.read_dir(&entry.path(), None)
            } else {
                let file = File::open(entry.path()).expect("open a file");
                let inner = self.add(&file, false);
                self.nodes[inner].file.durable = read_image(&file);
                inner
            };
            self.folders[node].insert(name, inner);
        }
        node
    }

    /// Inode numbers and contents of all nodes.
    pub fn nodes(&self) -> impl Iterator<Item = (u64, &Image)> {
        self.nodes.iter().map(|node| (node.born.inode, &node.file.durable))
    }

    /// Goes on by the event of that number.
    pub fn step<M>(&mut self, number: usize, event: &Event<M>) {
        match event {
            Event::Born(born) => self.born(born),
            Event::Names(names) => self.pending.push((number, names.clone())),
            Event::SyncDir(dir) => {
                self.nodes[*dir].sync_meta();
                self.settle_names(*dir);
            }
            Event::Change(node, change) => self.nodes[*node].file.change(number, change),
            Event::Meta(node, meta) => self.nodes[*node].metas.push((number, *meta)),
            Event::Through(node) => self.nodes[*node].file.through(),
            Event::SyncData(node) => self.nodes[*node].file.sync(),
            Event::SyncAll(node) => {
                self.nodes[*node].file.sync();
                self.nodes[*node].sync_meta();
            }
            Event::FailedSync(node, image) => {
                self.nodes[*node].file = FileState { durable: image.clone(), pending: Vec::new() };
            }
            Event::Other(_) | Event::Mark(_) => {}
        }
    }

    /// Makes the names in a folder durable, with all that they need.
    fn settle_names(&mut self, dir: Node) {
        let mut settled: BTreeSet<usize> = BTreeSet::new();
        for at in (0..self.pending.len()).rev() {
            let names = &self.pending[at].1;
            let needed = || settled.iter().any(|later| self.pending[*later].1.needs(names));
            if names.folder() == dir || needed() {
                settled.insert(at);
            }
        }
        for at in &settled {
            let names = self.pending[*at].1.clone();
            names.apply(&mut self.folders);
        }
        let mut at = 0;
        self.pending.retain(|_| {
            at += 1;
            !settled.contains(&(at - 1))
        });
    }

    /// The last change that is not durable, and the number of its parts.
    pub fn last_pending(&self) -> Option<(usize, usize)> {
        let names = self.pending.last().map(|(number, _)| (*number, 1));
        let contents = self.nodes.iter().filter_map(|node| node.file.pending.last());
        let contents = contents.map(|(number, change)| (*number, change.sectors.len()));
        contents.chain(names).max_by_key(|(number, _)| *number)
    }

    /// Changes of names that are not durable, by their numbers.
    pub fn pending_names(&self) -> Vec<usize> {
        self.pending.iter().map(|(number, _)| *number).collect()
    }

    /// What a power cut leaves of the contents of a file.
    pub fn contents(&self, node: Node, choice: &mut Choice) -> Image {
        self.nodes[node].file.left(node, choice)
    }

    /// What a power cut leaves.
    pub fn left(&self, cut: &Cut) -> Left {
        let mut cut = cut.clone();
        // Only names: contents are looked at where a name leads to them.
        let mut folders = self.folders.clone();
        let mut lost: Vec<&Names> = Vec::new();
        for (number, names) in &self.pending {
            if lost.iter().any(|earlier| names.needs(earlier))
                || !cut.names.takes(names.folder(), *number, 0, 1)
            {
                lost.push(names);
            } else {
                names.apply(&mut folders);
            }
        }
        let mut left = Left(Vec::new());
        self.collect(0, PathBuf::new(), &folders, &mut cut.contents, &mut left);
        left
    }

    fn collect(&self, node: Node, path: PathBuf, names: &[Entries], choice: &mut Choice, left: &mut Left) {
        let state = &self.nodes[node];
        let mut meta = state.meta;
        for (number, later) in &state.metas {
            if choice.takes(node, *number, 0, 1) {
                meta = *later;
            }
        }
        let image = (!state.born.is_dir).then(|| state.file.left(node, choice));
        left.0.push(LeftNode { path: path.clone(), inode: state.born.inode, meta, image });
        for (name, inner) in &names[node] {
            self.collect(*inner, path.join(name), names, choice, left);
        }
    }
}

/// Contents of a file of the scratch folder.
pub fn read_image(file: &File) -> Image {
    let mut image = Image::default();
    let len = file.metadata().expect("the size of a file").len();
    image.cut(len);
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(file, SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data)).expect("the end of data");
        let (from, to) = (data / SECTOR * SECTOR, hole.next_multiple_of(SECTOR));
        let mut bytes = vec![0; (to - from) as usize];
        file.read_exact_at(&mut bytes[..(hole - from) as usize], from).expect("read a file");
        for (index, sector) in (from / SECTOR..).zip(bytes.as_chunks::<512>().0) {
            image.set(index, content(sector));
        }
        at = hole;
    }
    image
}

/// What a power cut has left: files and folders, each after the folder that it is in.
#[derive(Debug)]
pub struct Left(Vec<LeftNode>);

#[derive(Debug)]
struct LeftNode {
    path: PathBuf,
    /// The number that it had.
    inode: u64,
    meta: Meta,
    /// `None`: a folder.
    image: Option<Image>,
}

impl Left {
    /// A number that two of them share only if they are the same.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for node in &self.0 {
            (&node.path, node.inode, node.meta.mode).hash(&mut hasher);
            (node.meta.modified.tv_sec, node.meta.modified.tv_nsec).hash(&mut hasher);
            node.image.as_ref().map(Image::fingerprint).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// What there is, for a message.
    pub fn names(&self) -> String {
        let shown = self.0.iter().map(|node| match &node.image {
            Some(image) => format!("{} ({image:?})", node.path.display()),
            None => format!("{}/", node.path.display()),
        });
        shown.collect::<Vec<_>>().join("\n")
    }

    /// Makes all of it in an empty folder. Inode numbers cannot be given; where the record of a base names that of the
    /// file beside it, it gets the new one.
    pub fn make(&self, folder: &Path) {
        let mut inodes = BTreeMap::new();
        for LeftNode { path, inode, meta, image } in
            self.0.iter().filter(|node| !node.path.as_os_str().is_empty())
        {
            let path = folder.join(path);
            let Some(image) = image else {
                DirBuilder::new().mode(meta.mode).create(&path).expect("make a folder");
                continue;
            };
            let mut options = OpenOptions::new();
            let file = options.write(true).create_new(true).mode(meta.mode).open(&path).expect("make a file");
            inodes.insert(*inode, file.metadata().expect("a new file").ino());
            file.set_len(image.len).expect("set the size of a file");
            for (index, sector) in image.sectors() {
                let len = (image.len - index * SECTOR).min(SECTOR) as usize;
                file.write_all_at(&sector[..len], index * SECTOR).expect("write a file");
            }
            let times = Timestamps { last_access: meta.modified, last_modification: meta.modified };
            rustix::fs::utimensat(rustix::fs::CWD, &path, &times, AtFlags::empty()).expect("set times");
        }
        for record in self.0.iter().filter(|node| node.path.file_name() == Some(OsStr::new("base.json"))) {
            rename_inode(&folder.join(&record.path), &inodes);
        }
    }
}

/// Puts the inode number that a file has now in place of the one that a base's record has of it.
fn rename_inode(record: &Path, inodes: &BTreeMap<u64, u64>) {
    let bytes = std::fs::read(record).expect("read a record");
    // A torn one names nothing.
    let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(&bytes) else { return };
    if let Some(now) = value["inode"].as_u64().and_then(|then| inodes.get(&then)) {
        value["inode"] = (*now).into();
        let bytes = serde_json::to_vec(&value).expect("a record as JSON");
        #[allow(clippy::disallowed_methods)] // not of the store's making
        std::fs::write(record, bytes).expect("write a record");
    }
}
