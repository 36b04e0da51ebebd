//! The three locks of a store. All are flocks: the kernel drops them with the process, so none is ever stale.
//!
//! - *store lock* (`lock`): held for the moment of a change (an object appears or leaves), never during long work. Whoever
//!   only looks (a check) shares it for the moment of looking.
//! - *disk lock* (`disk.map` or `disk.raw`): held by whoever has the disk open.
//! - *serve lock* (`daemon.lock`): held by the daemon for its life; the file says who it is.
//!
//! Besides, whoever reads a base holds a shared flock of it, and whoever makes something holds the flock of its draft
//! (`atomic.rs`). A boot file is not locked: who has it open keeps its bytes when it is removed. Order: store lock, then any of the others, and those never waiting.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Store;
use super::atomic;
use super::dir::{Access, Dir};
use super::layout;
use super::names::{DiskName, ObjectName};
use super::record;
use super::space::SpacePolicy;
use super::timestamp::Timestamp;
use crate::error::{Context, Error, ErrorKind, Result};

/// How often the serve lock is tried: [`serving`] takes it for an instant to see whether it is free.
const SERVE_ATTEMPTS: u32 = 20;
const SERVE_PAUSE: Duration = Duration::from_millis(5);

/// The store is being changed by the holder, or, if the lock is shared, by nobody.
#[derive(Debug)]
pub(super) struct StoreLock {
    _file: File,
}

impl StoreLock {
    /// Waits for the lock. Two threads of one process exclude each other too.
    pub(super) fn wait(root: &Dir) -> Result<Self> {
        let file = root.open_lock_file(layout::LOCK)?;
        atomic::lock_exclusive(&file).context(|| format!("lock {}", root.path_of(layout::LOCK).display()))?;
        Ok(Self { _file: file })
    }

    /// Waits for the lock and shares it with others who only look: nothing appears or leaves meanwhile.
    pub(super) fn wait_shared(root: &Dir) -> Result<Self> {
        let file = root.open_lock_file(layout::LOCK)?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockShared))
            .context(|| format!("lock {}", root.path_of(layout::LOCK).display()))?;
        Ok(Self { _file: file })
    }

    /// Takes the lock if it is free.
    pub(super) fn try_take(root: &Dir) -> Result<Option<Self>> {
        let file = root.open_lock_file(layout::LOCK)?;
        let taken = try_lock(&file, Share::Exclusive)
            .context(|| format!("lock {}", root.path_of(layout::LOCK).display()))?;
        Ok(taken.then_some(Self { _file: file }))
    }
}

/// Who else may hold a lock at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// Others that share.
    Shared,
    /// Nobody.
    Exclusive,
}

/// Takes a flock if it is free.
pub(super) fn try_lock(file: &File, share: Share) -> rustix::io::Result<bool> {
    let operation = match share {
        Share::Shared => FlockOperation::NonBlockingLockShared,
        Share::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::io::retry_on_intr(|| rustix::fs::flock(file, operation)) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The daemon that serves a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerInfo {
    /// Its process id; 0 while it is only starting.
    pub pid: u32,
    /// Where the store is mounted; empty while the daemon is only starting.
    pub mountpoint: PathBuf,
    /// When it began to serve; `None` while it is only starting.
    pub started: Option<Timestamp>,
    /// What it was told about the host's space, if it says.
    pub space_policy: Option<SpacePolicy>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerRecord {
    pid: u32,
    mountpoint: String,
    started: Timestamp,
    /// Bytes kept free; absent for the default.
    #[serde(default)]
    reserve: Option<u64>,
    #[serde(default)]
    high_water_percent: Option<u8>,
}

/// The right to serve the store, held until dropped.
#[derive(Debug)]
pub struct ServeLock {
    file: File,
    /// Whether the file speaks of this process.
    is_ours: bool,
}

impl ServeLock {
    pub(super) fn take(root: &Dir, mountpoint: &Path, space: SpacePolicy) -> Result<Self> {
        let file = root.open_lock_file(layout::DAEMON_LOCK)?;
        let shown = || format!("lock {}", root.path_of(layout::DAEMON_LOCK).display());
        let mut attempts = 1;
        while !try_lock(&file, Share::Exclusive).context(shown)? {
            if attempts == SERVE_ATTEMPTS {
                return Err(busy(root));
            }
            attempts += 1;
            std::thread::sleep(SERVE_PAUSE);
        }
        let lock = Self { file, is_ours: true };
        lock.sign(mountpoint, space)?;
        Ok(lock)
    }

    /// The lock that another process of the same daemon holds as well: it is held as long as one of them lives.
    pub fn shared(descriptor: OwnedFd) -> Self {
        Self { file: descriptor.into(), is_ours: false }
    }

    /// Whether this is the lock of `store`, and not of another that lies in its place now.
    ///
    /// # Errors
    /// Those of the host.
    pub fn is_of(&self, store: &Store) -> Result<bool> {
        let held = rustix::fs::fstat(&self.file).context(|| "look at the lock")?;
        let there = store.root.stat(layout::DAEMON_LOCK)?;
        Ok(there.is_some_and(|there| (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)))
    }

    /// That other process has died: the lock's file speaks of this one from now on.
    ///
    /// # Errors
    /// Those of the host.
    pub fn inherit(&mut self, mountpoint: &Path, space: SpacePolicy) -> Result<()> {
        self.is_ours = true;
        self.sign(mountpoint, space)
    }

    /// Its descriptor, to be shared with another process.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Writes down that this process is the one that serves.
    fn sign(&self, mountpoint: &Path, space: SpacePolicy) -> Result<()> {
        let mountpoint = mountpoint.to_str().ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("mountpoint {}: must be UTF-8", mountpoint.display()))
        })?;
        let contents = ServerRecord {
            pid: std::process::id(),
            mountpoint: mountpoint.to_owned(),
            started: Timestamp::now(),
            reserve: space.reserve,
            high_water_percent: Some(space.high_water_percent),
        };
        write_contents(&self.file, &record::encode(&contents)?)
    }
}

impl Drop for ServeLock {
    fn drop(&mut self) {
        if self.is_ours
            && let Err(error) = write_contents(&self.file, b"")
        {
            log::warn!("clear the daemon's lock file: {error}");
        }
    }
}

/// Overwrites the contents of a lock file, which must keep its inode. A reader may see it half-written.
fn write_contents(file: &File, bytes: &[u8]) -> Result<()> {
    file.set_len(0).context(|| "write a lock file")?;
    file.write_all_at(bytes, 0).context(|| "write a lock file")
}

fn busy(root: &Dir) -> Error {
    let info = read_server(root);
    let store = root.path().display();
    let message = match info.pid {
        0 => format!("store {store}: another daemon serves it already"),
        pid => format!("store {store}: process {pid} serves it already on {}", info.mountpoint.display()),
    };
    let hint = format!("use that mount, or unmount it first: cowdisk umount {}", info.mountpoint.display());
    Error::new(ErrorKind::Busy, message).with_hint(hint)
}

/// The daemon that serves the store now, if one does.
pub(super) fn serving(root: &Dir) -> Result<Option<ServerInfo>> {
    let file = match root.open_file(layout::DAEMON_LOCK, Access::Read) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let free = try_lock(&file, Share::Shared)
        .context(|| format!("look at {}", root.path_of(layout::DAEMON_LOCK).display()))?;
    Ok((!free).then(|| read_server(root)))
}

/// What the lock file says; a daemon that is only starting has not written it yet.
fn read_server(root: &Dir) -> ServerInfo {
    match record::read::<ServerRecord>(root, layout::DAEMON_LOCK, record::RECORD_BYTES_MAX) {
        Ok(ServerRecord { pid, mountpoint, started, reserve, high_water_percent }) => {
            let space_policy =
                high_water_percent.map(|percent| SpacePolicy { reserve, high_water_percent: percent });
            ServerInfo { pid, mountpoint: mountpoint.into(), started: Some(started), space_policy }
        }
        Err(_) => ServerInfo { pid: 0, mountpoint: PathBuf::new(), started: None, space_policy: None },
    }
}

impl Store {
    /// What to tell whoever wants a disk that somebody else has open.
    pub(super) fn busy_disk(&self, instance: &ObjectName, disk: DiskName) -> Error {
        let error = Error::new(ErrorKind::Busy, format!("disk {instance}/{disk}: open elsewhere"));
        match self.serving() {
            Ok(Some(server)) => error.with_hint(format!(
                "process {} serves the store on {}: who uses {} there?",
                server.pid,
                server.mountpoint.display(),
                Path::new("instances").join(instance.as_str()).join(disk.as_str()).display()
            )),
            _ => error.with_hint("another cowdisk process has it open"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_server_is_refused_and_told_who_the_first_is() {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_path(folder.path()).unwrap();
        assert_eq!(serving(&root).unwrap(), None);
        let policy = SpacePolicy { reserve: Some(7), high_water_percent: 80 };
        let lock = ServeLock::take(&root, Path::new("/mnt/vm"), policy).unwrap();
        let info = serving(&root).unwrap().unwrap();
        assert_eq!((info.pid, info.mountpoint.as_path()), (std::process::id(), Path::new("/mnt/vm")));
        assert_eq!(info.space_policy, Some(policy));
        let error = ServeLock::take(&root, Path::new("/mnt/other"), policy).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let text = error.to_string();
        assert!(text.contains(&std::process::id().to_string()) && text.contains("/mnt/vm"), "{text}");
        drop(lock);
        assert_eq!(serving(&root).unwrap(), None);
        ServeLock::take(&root, Path::new("/mnt/other"), policy).unwrap();
    }

    #[test]
    fn the_store_lock_excludes_others_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_path(folder.path()).unwrap();
        let lock = StoreLock::wait(&root).unwrap();
        assert!(StoreLock::try_take(&root).unwrap().is_none());
        drop(lock);
        assert!(StoreLock::try_take(&root).unwrap().is_some());
    }
}
