//! A host that does what is asked of it, in a scratch folder, and remembers it: for what a power cut may leave, see
//! `tree.rs`. It can let the n-th operation fail, or the process die before it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt::Debug;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use cowdisk::storage::{Host, RealHost};
use parking_lot::{Mutex, MutexGuard};
use rustix::fs::{AtFlags, RenameFlags, Timestamps};
use rustix::io::{Errno, Result};

use super::record::{Change, Choice, Content, Image, SECTOR};
use super::sim::Rng;
use super::tree::{Born, Meta, Names, Node, Tree, read_image};

/// What happened, in order.
#[derive(Clone, Debug)]
pub enum Event<M> {
    /// A file or a folder was made: it gets the next number.
    Born(Born),
    Names(Names),
    SyncDir(Node),
    /// A file's contents or its end were changed, not durably.
    Change(Node, Arc<Change>),
    /// The last change of a file became durable alone: it was a durable write.
    Through(Node),
    /// Contents and end of a file became durable.
    SyncData(Node),
    /// And mode and time.
    SyncAll(Node),
    /// A sync of a file failed: this is what is on the disk, and nothing else will be written.
    FailedSync(Node, Image),
    Meta(Node, Meta),
    /// Something that does not matter to what is left, such as a reservation of space.
    Other(&'static str),
    /// What the caller was told, or asked for.
    Mark(M),
}

/// What happens to the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All succeed.
    Fine,
    /// So many more succeed; then the process is gone: whatever it still asks for is not done.
    DeadAfter(u64),
    /// So many more succeed; the next one fails, once.
    FailAfter(u64, Errno),
}

/// What was done to a folder, from when it was first looked at.
#[derive(Debug)]
pub struct Recording<M> {
    pub start: Tree,
    pub events: Vec<Event<M>>,
    /// By inode number. A number that is used again means the newest.
    nodes: HashMap<u64, Node>,
    /// Contents of each node, as the cache shows them.
    cache: Vec<Image>,
    fate: Fate,
    operations: u64,
}

/// The host; clones are the same.
#[derive(Clone, Debug)]
pub struct RecordingHost<M>(Arc<Mutex<Recording<M>>>);

impl<M> RecordingHost<M> {
    /// Begins to record what happens in `folder`, under the name `wanted` in it.
    pub fn new(folder: &Path, wanted: &str) -> Self {
        let start = Tree::read(folder, wanted);
        let nodes = (0..).zip(start.nodes()).map(|(node, (inode, _))| (inode, node)).collect();
        let cache = start.nodes().map(|(_, image)| image.clone()).collect();
        let (events, fate, operations) = (Vec::new(), Fate::Fine, 0);
        Self(Arc::new(Mutex::new(Recording { start, events, nodes, cache, fate, operations })))
    }

    pub fn set_fate(&self, fate: Fate) {
        self.0.lock().fate = fate;
    }

    /// Whether the process is dead.
    pub fn is_dead(&self) -> bool {
        matches!(self.0.lock().fate, Fate::DeadAfter(0))
    }

    /// Operations that were asked for so far.
    pub fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    pub fn mark(&self, mark: M) {
        self.0.lock().events.push(Event::Mark(mark));
    }

    pub fn lock(&self) -> MutexGuard<'_, Recording<M>> {
        self.0.lock()
    }

    /// One more operation: whether it is done, fails, or finds the process dead.
    fn step(&self) -> Result<MutexGuard<'_, Recording<M>>> {
        let mut recording = self.0.lock();
        recording.operations += 1;
        match &mut recording.fate {
            Fate::Fine => Ok(recording),
            Fate::DeadAfter(0) => Err(Errno::IO),
            Fate::FailAfter(0, errno) => {
                let errno = *errno;
                recording.fate = Fate::Fine;
                Err(errno)
            }
            Fate::DeadAfter(left) | Fate::FailAfter(left, _) => {
                *left -= 1;
                Ok(recording)
            }
        }
    }

    /// [`RecordingHost::step`] of a sync of a file: where it fails, what it was to write is on the disk or not, part by
    /// part, and the cache forgets it.
    fn step_sync(&self, file: BorrowedFd<'_>) -> Result<MutexGuard<'_, Recording<M>>> {
        let dead = self.is_dead();
        self.step().inspect_err(|_| {
            if !dead {
                self.0.lock().fail_sync(file);
            }
        })
    }
}

impl<M> Recording<M> {
    fn node(&self, file: impl AsFd) -> Node {
        let stat = rustix::fs::fstat(file).expect("look up what is changed");
        self.node_of(stat.st_ino)
    }

    fn node_of(&self, inode: u64) -> Node {
        *self.nodes.get(&inode).expect("a file or a folder that was seen being made")
    }

    fn named(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Option<Node> {
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        self.nodes.get(&stat.st_ino).copied()
    }

    fn born(&mut self, dir: BorrowedFd<'_>, name: &OsStr, made: impl AsFd, is_dir: bool) {
        let dir = self.node(dir);
        let inode = rustix::fs::fstat(&made).expect("look up what was made").st_ino;
        let node = self.cache.len();
        self.nodes.insert(inode, node);
        self.cache.push(Image::default());
        self.events.push(Event::Born(Born { inode, is_dir, meta: Meta::of(made) }));
        self.events.push(Event::Names(Names::Add(dir, text(name), node)));
    }

    fn change(
        &mut self,
        file: BorrowedFd<'_>,
        what: &'static str,
        sectors: Vec<(u64, Content)>,
        len: Option<u64>,
    ) -> Node {
        let node = self.node(file);
        let cache = &mut self.cache[node];
        if let Some(len) = len {
            cache.cut(len);
        }
        for (index, content) in &sectors {
            cache.set(*index, content.clone());
        }
        self.events.push(Event::Meta(node, Meta::of(file)));
        self.events.push(Event::Change(node, Arc::new(Change::new(what, sectors, len))));
        node
    }

    fn wrote(&mut self, file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Node {
        let cache = &self.cache[self.node(file)];
        let sectors = cache.written(offset, bytes.len() as u64, |at| bytes[at]);
        let end = offset + bytes.len() as u64;
        let len = (end > cache.len).then_some(end);
        self.change(file, "write", sectors, len)
    }

    fn fail_sync(&mut self, file: BorrowedFd<'_>) {
        let node = self.node(file);
        let mut tree = self.start.clone();
        self.events.iter().enumerate().for_each(|(number, event)| tree.step(number, event));
        let image = tree.contents(node, &mut Choice::Parts(Rng(self.events.len() as u64)));
        RealHost.set_len(file, 0).expect("cut a file");
        RealHost.set_len(file, image.len).expect("set the size of a file");
        for (index, sector) in image.sectors() {
            let len = (image.len - index * SECTOR).min(SECTOR) as usize;
            RealHost.write_at(file, index * SECTOR, &sector[..len]).expect("write a file");
        }
        self.cache[node] = image.clone();
        self.events.push(Event::FailedSync(node, image));
    }

    /// Takes over what others than the store have written: a program that it has run.
    fn catch_up(&mut self, file: BorrowedFd<'_>) -> Node {
        let node = self.node(file);
        let now = read_image(&File::from(file.try_clone_to_owned().expect("open a file once more")));
        let cache = &self.cache[node];
        if *cache != now {
            let len = (cache.len != now.len).then_some(now.len);
            let sectors = now.differing(cache);
            self.change(file, "write of a program", sectors, len);
        }
        node
    }
}

fn text(name: &OsStr) -> String {
    name.to_str().expect("the store's names are UTF-8").to_owned()
}

impl<M: Send + Sync + Debug> Host for RecordingHost<M> {
    fn make_dir(&self, dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<()> {
        let mut recording = self.step()?;
        RealHost.make_dir(dir, name, mode)?;
        let made = rustix::fs::openat(dir, name, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())?;
        recording.born(dir, name, made, true);
        Ok(())
    }

    fn create_file(&self, dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<OwnedFd> {
        let mut recording = self.step()?;
        let made = RealHost.create_file(dir, name, mode)?;
        recording.born(dir, name, &made, false);
        Ok(made)
    }

    fn rename(
        &self,
        from: (BorrowedFd<'_>, &OsStr),
        to: (BorrowedFd<'_>, &OsStr),
        flags: RenameFlags,
    ) -> Result<()> {
        let mut recording = self.step()?;
        RealHost.rename(from, to, flags)?;
        let [from, to] = [from, to].map(|(dir, name)| (recording.node(dir), text(name)));
        recording.events.push(Event::Names(Names::Move { from, to }));
        Ok(())
    }

    fn unlink(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let mut recording = self.step()?;
        let node = recording.named(dir, name);
        RealHost.unlink(dir, name)?;
        let names = Names::Remove(recording.node(dir), text(name), node.expect("what was there was made"));
        recording.events.push(Event::Names(names));
        Ok(())
    }

    fn remove_dir(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let mut recording = self.step()?;
        let node = recording.named(dir, name);
        RealHost.remove_dir(dir, name)?;
        let names = Names::Remove(recording.node(dir), text(name), node.expect("what was there was made"));
        recording.events.push(Event::Names(names));
        Ok(())
    }

    fn sync_dir(&self, dir: BorrowedFd<'_>) -> Result<()> {
        let mut recording = self.step()?;
        RealHost.sync_dir(dir)?;
        let node = recording.node(dir);
        recording.events.push(Event::SyncDir(node));
        Ok(())
    }

    fn write_at(&self, file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<()> {
        let dead = self.is_dead();
        let mut recording = self.step().inspect_err(|_| {
            // Some of it is written.
            let some = &bytes[..bytes.len() / 2];
            if !dead && RealHost.write_at(file, offset, some).is_ok() {
                self.0.lock().wrote(file, offset, some);
            }
        })?;
        RealHost.write_at(file, offset, bytes)?;
        recording.wrote(file, offset, bytes);
        Ok(())
    }

    fn write_durable_at(&self, file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut recording = self.step_sync(file)?;
        RealHost.write_durable_at(file, offset, bytes)?;
        let node = recording.wrote(file, offset, bytes);
        recording.events.push(Event::Through(node));
        Ok(())
    }

    fn sync_data(&self, file: BorrowedFd<'_>) -> Result<()> {
        let mut recording = self.step_sync(file)?;
        RealHost.sync_data(file)?;
        let node = recording.catch_up(file);
        recording.events.push(Event::SyncData(node));
        Ok(())
    }

    fn sync_all(&self, file: BorrowedFd<'_>) -> Result<()> {
        let mut recording = self.step_sync(file)?;
        RealHost.sync_all(file)?;
        let node = recording.catch_up(file);
        recording.events.push(Event::SyncAll(node));
        Ok(())
    }

    fn set_len(&self, file: BorrowedFd<'_>, len: u64) -> Result<()> {
        let mut recording = self.step()?;
        RealHost.set_len(file, len)?;
        recording.change(file, "set the size", Vec::new(), Some(len));
        Ok(())
    }

    fn allocate(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
        let mut recording = self.step()?;
        RealHost.allocate(file, offset, len)?;
        recording.events.push(Event::Other("allocate"));
        Ok(())
    }

    fn punch(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
        let mut recording = self.step()?;
        RealHost.punch(file, offset, len)?;
        let cache = &recording.cache[recording.node(file)];
        let len = len.min(cache.len.saturating_sub(offset));
        let sectors = cache.written(offset, len, |_| 0);
        recording.change(file, "punch", sectors, None);
        Ok(())
    }

    fn clone_contents(&self, source: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<()> {
        let mut recording = self.step()?;
        RealHost.clone_contents(source, file)?;
        recording.catch_up(file);
        Ok(())
    }

    fn set_mode(&self, file: BorrowedFd<'_>, mode: u32) -> Result<()> {
        let mut recording = self.step()?;
        RealHost.set_mode(file, mode)?;
        let node = recording.node(file);
        recording.events.push(Event::Meta(node, Meta::of(file)));
        Ok(())
    }

    fn set_times(&self, dir: BorrowedFd<'_>, name: &OsStr, times: &Timestamps) -> Result<()> {
        let mut recording = self.step()?;
        RealHost.set_times(dir, name, times)?;
        let file = rustix::fs::openat(dir, name, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())?;
        let node = recording.node(&file);
        recording.events.push(Event::Meta(node, Meta::of(file)));
        Ok(())
    }
}
