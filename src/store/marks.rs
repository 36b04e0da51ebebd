//! Marks of the disks that a mount has open: what a disk's lock cannot say while no process of the daemon lives.
//!
//! A daemon may be replaced while guests have its disks open. Its locks end with the process that held them, and for a
//! moment nobody has them, though the disks are in use all the same. So whoever serves the store marks a disk, under its
//! lock, before it is opened, and takes the mark away after it was closed. A mark counts as long as the store is served;
//! each mount begins by clearing those of an earlier one.
//!
//! To others a marked disk is in use, with or without its lock. Which disks an earlier process of this very mount had open
//! the daemon itself knows from its ledger; such a disk is taken up whole, with its mark, or refused.
//!
//! Marks are empty files in the run directory, so they end with the host's boot; one that holds a byte is of a disk that
//! refuses writes since a sync of it failed, which a successor must go on doing.

use std::fs::OpenOptions;
use std::io::{ErrorKind as IoKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::Store;
use super::names::{DiskName, ObjectName};
use crate::error::{Context, Error, ErrorKind, Result};

/// What the names of marks begin with.
const PREFIX: &str = "in-use-";

/// The mark of a disk that this process has open.
#[derive(Debug)]
pub(super) struct Mark {
    path: PathBuf,
}

impl Mark {
    /// The disk was closed.
    pub(super) fn remove(self) {
        remove(&self.path);
    }

    /// A sync of the disk has failed: what the host's cache holds must not be taken for written, by no successor either.
    pub(super) fn note_latched(&self) {
        let write = || OpenOptions::new().write(true).open(&self.path)?.write_all(b"!");
        if let Err(error) = write() {
            log::error!("mark {} as latched: {error}", self.path.display());
        }
    }
}

fn remove(path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != IoKind::NotFound => {
            log::warn!("remove the mark {}: {error}", path.display());
        }
        _ => {}
    }
}

fn is_there(path: &Path) -> Result<bool> {
    path.try_exists().context(|| format!("look at {}", path.display()))
}

fn path_in(dir: &Path, instance: &ObjectName, disk: DiskName) -> PathBuf {
    dir.join(format!("{PREFIX}{disk}-{instance}"))
}

impl Store {
    /// Says that this process serves the store as one of a daemon that holds the serve lock: the disks that it opens are
    /// marked, and those that an earlier process had open are taken up whole or refused, whatever
    /// [`Store::accepting_loss`] says.
    #[must_use]
    pub fn in_service(mut self) -> Self {
        self.in_service = true;
        self
    }

    /// Clears the marks of an earlier mount. For whoever holds the serve lock and has not served yet.
    ///
    /// # Errors
    /// Those of the host.
    pub fn clear_marks(&self) -> Result<()> {
        let dir = self.run_dir()?;
        let what = || format!("clear the marks in {}", dir.display());
        for entry in std::fs::read_dir(&dir).context(what)? {
            let entry = entry.context(what)?;
            if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
                std::fs::remove_file(entry.path()).context(what)?;
            }
        }
        Ok(())
    }

    /// Takes away the mark of a disk that could not be taken up, once nobody has it open any more.
    pub fn give_up_disk(&self, instance: &ObjectName, disk: DiskName) {
        match self.run_dir() {
            Ok(dir) => remove(&path_in(&dir, instance, disk)),
            Err(error) => log::warn!("give up disk {instance}/{disk}: {error}"),
        }
    }

    /// Marks a disk whose lock this process has; nothing if it does not serve. A mark that is there already was left by a
    /// process that died while it opened or closed the disk.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn mark(&self, instance: &ObjectName, disk: DiskName) -> Result<Option<Mark>> {
        if !self.in_service {
            return Ok(None);
        }
        let path = path_in(&self.run_dir()?, instance, disk);
        let made = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        made.context(|| format!("mark disk {instance}/{disk} as in use"))?;
        Ok(Some(Mark { path }))
    }

    /// The mark of a disk that an earlier process of this mount had open. That it is gone says nothing: the disk may have been
    /// closed since by another handle. What was answered and is lost, the disk's live map tells.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if a sync of the disk had failed in that process; those of the host.
    pub(super) fn kept_mark(&self, instance: &ObjectName, disk: DiskName) -> Result<Mark> {
        let path = path_in(&self.run_dir()?, instance, disk);
        let what = || format!("mark disk {instance}/{disk} as in use");
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path).context(what)?;
        if file.metadata().context(what)?.len() > 0 {
            let message =
                format!("disk {instance}/{disk}: a sync of it had failed, and it was not closed since");
            return Err(Error::new(ErrorKind::Io, message)
                .with_hint("what was not flushed is lost: close the disk, and open it again"));
        }
        Ok(Mark { path })
    }

    /// Whether a disk is marked.
    pub(super) fn is_marked(&self, instance: &ObjectName, disk: DiskName) -> Result<bool> {
        is_there(&path_in(&self.run_dir()?, instance, disk))
    }

    /// Whether a disk is in use by the daemon that serves the store, though at this moment perhaps no process has it open.
    /// For whoever holds its lock.
    pub(super) fn is_kept_by_daemon(&self, instance: &ObjectName, disk: DiskName) -> Result<bool> {
        if self.in_service || self.serving()?.is_none() {
            return Ok(false);
        }
        match self.run_dir_in_use()? {
            Some(dir) => is_there(&path_in(&dir, instance, disk)),
            None => Ok(false),
        }
    }
}
