//! The folder of images, flavors and instances.
//!
//! A [`Store`] is a folder on the host's filesystem that holds everything: shared bases by content, the records of
//! images and flavors that name them, and for each instance a folder with its disks. `layout.rs` has every path,
//! `atomic.rs` the way in which anything appears, changes or leaves, `lock.rs` the locks. Several processes may use one
//! store at a time, whether it is mounted or not; nothing is kept in memory between calls, so what one of them changes
//! all others see at once.
//!
//! What refers to what: an image and a flavor each name a base; an instance names the bases of its overlays; images and
//! instances name boot files. A base or boot file that nothing refers to is removed together with the last record that
//! did; a crash in between leaves a sign in `tmp/`, upon which the next opening counts references.

mod atomic;
mod attrs;
mod bases;
mod boot;
mod check;
mod convert;
mod copy;
mod create;
mod dir;
mod disk;
mod disk_map;
mod flavors;
pub mod foreign;
mod hex;
mod host_fs;
mod images;
mod instances;
mod layout;
mod listing;
mod lock;
mod marks;
mod names;
mod placing;
mod plain;
mod progress;
mod record;
mod references;
mod run_dir;
mod sharing;
mod source;
mod space;
mod superblock;
mod timestamp;
mod tool;
mod usage;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

pub use attrs::{Attributes, FileRef, XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX, XATTRS_MAX};
pub use check::{
    CheckReport, CheckRequest, CheckTarget, SCRUB_RATE_DEFAULT, SCRUB_RATE_MIN, ScrubReport, ScrubRequest,
};
pub use disk::{Disk, DiskStatus};
pub use disk_map::{DiskExtent, DiskExtentKind, DiskMap};
pub use flavors::{Flavor, FlavorFs, FlavorSpec, LOCAL_LABEL};
pub use foreign::SourceFormat;
pub use host_fs::{HostFeatures, try_host};
pub use images::{Image, ImportRequest};
pub use instances::{Instance, InstanceDisk, InstanceSpec};
pub use listing::InstanceStatus;
pub use lock::{ServeLock, ServerInfo};
pub use names::{DiskName, NAME_RULE, ObjectName};
pub use placing::Place;
pub use plain::PlainDisk;
pub use progress::{NoProgress, Progress};
pub use record::BootFileId;
pub use run_dir::run_dir_to_be;
pub use space::{HIGH_WATER_PERCENT, HighWater, SpaceNow, SpacePolicy, WaterMove};
pub use timestamp::Timestamp;
pub use usage::Usage;

use rustix::process::{Gid, Uid};

use dir::Dir;
use lock::StoreLock;
use superblock::Identity;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{Host, RealHost, Room};

/// An open store. Cheap to open; may be shared by threads.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// Its uuid is empty if the superblock is lost and nothing tells what it was.
    identity: Identity,
    /// What is wrong with the superblock of a store that was opened for a check all the same.
    superblock_fault: Option<Error>,
    run_dir_wanted: Option<PathBuf>,
    accept_loss: bool,
    /// Whether this process is one of the daemon that serves the store.
    in_service: bool,
    space_policy: Option<SpacePolicy>,
    /// Made when it is first needed.
    room: OnceLock<Arc<Room>>,
    root: Dir,
    bases: Dir,
    boot: Dir,
    images: Dir,
    flavors: Dir,
    instances: Dir,
    attrs: Dir,
    tmp: Dir,
}

impl Store {
    /// Makes a store in `dir`, which does not exist or is an empty folder (a `lost+found` and what an interrupted
    /// `init` left are allowed), and opens it. The folder gets mode 0700.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if there is a store; [`ErrorKind::Invalid`] if there is something else;
    /// [`ErrorKind::Unsupported`] if the host's filesystem has no sparse files or cannot punch holes.
    pub fn init(dir: &Path) -> Result<Self> {
        Self::init_on(Arc::new(RealHost), dir)
    }

    /// [`Store::init`] by way of `host`.
    ///
    /// # Errors
    /// Those of [`Store::init`].
    pub fn init_on(host: Arc<dyn Host>, dir: &Path) -> Result<Self> {
        superblock::init(&host, dir)?;
        Self::open_on(host, dir)
    }

    /// Opens the store in `dir` and removes what processes that have died left half-made.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no store; [`ErrorKind::Unsupported`] if it is of a newer version;
    /// [`ErrorKind::Corrupt`] if its superblock is damaged; [`ErrorKind::Denied`] if we are root and its folder is another
    /// user's: he chose what is in it, so it is to be opened with his rights.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_on(Arc::new(RealHost), dir)
    }

    /// [`Store::open`] by way of `host`, through which all changes of the store go from then on.
    ///
    /// # Errors
    /// Those of [`Store::open`].
    pub fn open_on(host: Arc<dyn Host>, dir: &Path) -> Result<Self> {
        let store = Self::open_unswept(host, dir, |_, error| Err(error))?;
        // What cannot be swept (a read-only host filesystem, say) is in nobody's way.
        if let Err(error) = store.sweep() {
            log::warn!("store {}: cannot remove what is half-made: {error}", dir.display());
        }
        Ok(store)
    }

    /// `without` says what store it is whose superblock cannot be read, or that it is not opened then.
    fn open_unswept(
        host: Arc<dyn Host>,
        dir: &Path,
        without: impl FnOnce(&Dir, Error) -> Result<(Identity, Error)>,
    ) -> Result<Self> {
        let shown = dir.display();
        let hint = format!("make one: cowdisk --store {shown} init");
        let root = match Dir::open_path_on(host, dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let message = format!("store {shown}: no such folder");
                return Err(Error::new(ErrorKind::NotFound, message).with_hint(hint));
            }
            other => other.context(|| format!("open store {shown}"))?,
        };
        let owner = root.owner()?;
        if rustix::process::geteuid().is_root() && !owner.is_root() {
            let message =
                format!("store {shown}: belongs to user {owner}, and is not opened with the rights of root");
            return Err(Error::new(ErrorKind::Denied, message));
        }
        let read = match superblock::read(&root) {
            Ok(identity) => Ok((identity, None)),
            Err(error) => without(&root, error).map(|(identity, fault)| (identity, Some(fault))),
        };
        let (identity, superblock_fault) = read.map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                Error::new(ErrorKind::NotFound, format!("{shown}: not a cowdisk store")).with_hint(hint)
            }
            _ => error.context(format!("open store {shown}")),
        })?;
        let open = |name| root.open_dir(name).context(|| format!("open store {shown}"));
        Ok(Self {
            path: dir.to_owned(),
            identity,
            superblock_fault,
            run_dir_wanted: None,
            accept_loss: false,
            in_service: false,
            space_policy: None,
            room: OnceLock::new(),
            bases: open(layout::BASES)?,
            boot: open(layout::BOOT)?,
            images: open(layout::IMAGES)?,
            flavors: open(layout::FLAVORS)?,
            instances: open(layout::INSTANCES)?,
            attrs: open(layout::ATTRS)?,
            tmp: open(layout::TMP)?,
            root,
        })
    }

    /// Asks for another run directory than the usual one; see [`Store::run_dir`].
    #[must_use]
    pub fn with_run_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.run_dir_wanted = Some(dir.into());
        self
    }

    /// Says whether [`Store::open_disk`] may go back to the last completed flush of a disk whose live map is gone,
    /// instead of refusing it.
    #[must_use]
    pub fn accepting_loss(mut self, accept: bool) -> Self {
        self.accept_loss = accept;
        self
    }

    /// The path by which the store was opened.
    pub fn dir(&self) -> &Path {
        &self.path
    }

    /// The user and the group whom the store's folder belongs to: the folder that is open, wherever its path leads now.
    ///
    /// # Errors
    /// Those of the host.
    pub fn owner(&self) -> Result<(Uid, Gid)> {
        let stat = rustix::fs::fstat(&self.root).context(|| format!("{}", self.path.display()))?;
        Ok((Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid)))
    }

    /// 32 hex digits that no other store has.
    fn uuid(&self) -> &str {
        &self.identity.uuid
    }

    /// Takes the right to serve the store at `mountpoint` until the lock is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], naming process and mountpoint, if another daemon serves it.
    pub fn serve_lock(&self, mountpoint: &Path) -> Result<ServeLock> {
        ServeLock::take(&self.root, mountpoint, self.space_policy())
    }

    /// The daemon that serves the store now, if one does.
    ///
    /// # Errors
    /// Those of the host.
    pub fn serving(&self) -> Result<Option<ServerInfo>> {
        lock::serving(&self.root)
    }

    fn lock(&self) -> Result<StoreLock> {
        StoreLock::wait(&self.root)
    }

    /// Removes what is half-made. If the store is being changed right now, that is left to the next opening.
    fn sweep(&self) -> Result<()> {
        if self.tmp.names()?.is_empty() {
            return Ok(());
        }
        match StoreLock::try_take(&self.root)? {
            Some(lock) => self.sweep_locked(&lock),
            None => Ok(()),
        }
    }

    fn sweep_locked(&self, lock: &StoreLock) -> Result<()> {
        atomic::sweep(&self.tmp, || self.remove_unreferenced(lock))
    }

    /// Changes several objects. Where that fails in the middle, what it leaves is removed at once, or if that fails, too,
    /// by the next opening.
    fn in_steps<T>(&self, lock: &StoreLock, steps: impl FnOnce() -> Result<T>) -> Result<T> {
        steps().inspect_err(|_| {
            if let Err(error) = self.sweep_locked(lock) {
                log::warn!("store {}: cannot remove what is half-made: {error}", self.path.display());
            }
        })
    }
}

#[cfg(test)]
mod tests;
