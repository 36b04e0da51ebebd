//! Looking at instances and at the space that their disks take, whether the disks are open or not. Opens no disk.
//!
//! A listing reads what it shows and no more, by as few system calls as that takes: there may be ten thousand instances.

use std::num::NonZero;
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::Stat;

use super::Store;
use super::dir::Dir;
use super::disk::DiskStatus;
use super::images;
use super::instances::Instance;
use super::layout::{self, DiskPart, disk_file};
use super::names::{DiskName, ObjectName};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::LayerId;
use crate::overlay::read_superblock;

/// Most threads that look at instances: they wait for the host's file system, not for its disk, and it has locks.
const THREADS_MAX: usize = 4;
/// Instances that are worth a thread.
const PER_THREAD: usize = 256;

/// An instance and what can be told of its disks without opening them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceStatus {
    /// As it was made.
    pub instance: Instance,
    /// Its disks as they are now, in the order of [`Instance::disks`].
    pub disks: Vec<DiskStatus>,
}

impl Store {
    /// The names of all instances, in order, whether their records can be read or not.
    ///
    /// # Errors
    /// Those of the host.
    pub fn instance_names(&self) -> Result<Vec<ObjectName>> {
        Ok(self.instances.names()?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// All instances, by name.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming the file, if a record is damaged.
    pub fn instances(&self) -> Result<Vec<Instance>> {
        images::present(self.instance_names()?.iter().map(|name| self.instance(name)))
    }

    /// An instance.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Corrupt`], naming the file, if its record is damaged or missing.
    pub fn instance(&self, name: &ObjectName) -> Result<Instance> {
        self.instance_at(&self.instance_dir(name)?, name)
    }

    fn instance_at(&self, folder: &Dir, name: &ObjectName) -> Result<Instance> {
        match self.instance_in(folder, name) {
            // An instance that is being removed leaves its name before its record goes.
            Err(error) if error.kind() == ErrorKind::NotFound && self.is_in_place(folder, name)? => {
                let message = format!("{}: missing", folder.path_of(layout::INSTANCE_RECORD).display());
                Err(Error::new(ErrorKind::Corrupt, message).with_hint(format!(
                    "bring it back, or give the instance up with its disks: cowdisk instance remove {name}"
                )))
            }
            other => other,
        }
    }

    /// Whether a folder is still the instance of that name.
    fn is_in_place(&self, folder: &Dir, name: &ObjectName) -> Result<bool> {
        let (_, inode) = folder.device_and_inode()?;
        Ok(self.instances.stat(name.as_str())?.is_some_and(|stat| stat.st_ino == inode))
    }

    /// All instances and their disks, by name. One that is removed meanwhile is left out.
    ///
    /// # Errors
    /// Of the first instance that is damaged: those of [`Store::instance_status`].
    pub fn instance_statuses(&self) -> Result<Vec<InstanceStatus>> {
        let names = self.instance_names()?;
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
        let share = names.len().div_ceil(threads).max(PER_THREAD);
        let look = |names: &[ObjectName]| -> Result<Vec<InstanceStatus>> {
            names.iter().filter_map(|name| self.status_if_present(name).transpose()).collect()
        };
        if names.len() <= share {
            return look(&names);
        }
        let shares: Result<Vec<_>> = thread::scope(|scope| {
            let looking: Vec<_> = names.chunks(share).map(|names| scope.spawn(|| look(names))).collect();
            looking
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        Ok(shares?.into_iter().flatten().collect())
    }

    /// An instance and its disks.
    ///
    /// # Errors
    /// Those of [`Store::instance`] and of [`Store::disk_status`].
    pub fn instance_status(&self, name: &ObjectName) -> Result<InstanceStatus> {
        self.status_at(&self.instance_dir(name)?, name)
    }

    /// [`Store::instance_status`]; `None` if the instance was removed, though not if a file of it is missing.
    pub(super) fn status_if_present(&self, name: &ObjectName) -> Result<Option<InstanceStatus>> {
        let folder = match self.instance_dir(name) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        match self.status_at(&folder, name) {
            Err(error) if error.kind() == ErrorKind::NotFound && !self.is_in_place(&folder, name)? => {
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    fn status_at(&self, folder: &Dir, name: &ObjectName) -> Result<InstanceStatus> {
        let instance = self.instance_at(folder, name)?;
        let disks = instance.disks().map(|(disk, made)| {
            let status = if made.is_overlay() { Self::overlay_status_in } else { Self::plain_status_in };
            status(self, folder, name, disk)
        });
        let disks = disks.collect::<Result<_>>()?;
        Ok(InstanceStatus { instance, disks })
    }

    /// Size, space and times of a disk, whether it is open or not. While it is open its size is that of the last time
    /// it grew, and what was written is counted as far as the host has placed it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such disk; [`ErrorKind::Corrupt`] if its map is damaged.
    pub fn disk_status(&self, instance: &ObjectName, disk: DiskName) -> Result<DiskStatus> {
        self.disk_status_in(&self.instance_dir(instance)?, instance, disk)
    }

    /// [`Store::disk_status`] of the very instance `id`, not of a later one under its name.
    ///
    /// # Errors
    /// Those of [`Store::disk_status`]; [`ErrorKind::NotFound`] if another instance has the name now.
    pub fn disk_status_of(&self, instance: &ObjectName, id: LayerId, disk: DiskName) -> Result<DiskStatus> {
        self.disk_status_in(&self.instance_dir_of(instance, id)?, instance, disk)
    }

    pub(super) fn disk_status_in(
        &self,
        folder: &Dir,
        instance: &ObjectName,
        disk: DiskName,
    ) -> Result<DiskStatus> {
        if let Some(raw) = folder.stat_file(disk_file(disk, DiskPart::Raw))? {
            return Ok(status_of_file(&raw));
        }
        self.overlay_status_in(folder, instance, disk)
    }

    /// [`Store::disk_status_in`] of a disk that is no overlay.
    fn plain_status_in(&self, folder: &Dir, _instance: &ObjectName, disk: DiskName) -> Result<DiskStatus> {
        let raw = disk_file(disk, DiskPart::Raw);
        folder.stat_file(raw)?.map(|raw| status_of_file(&raw)).ok_or_else(|| missing(folder, raw))
    }

    /// [`Store::disk_status_in`] of a disk that is an overlay.
    fn overlay_status_in(&self, folder: &Dir, instance: &ObjectName, disk: DiskName) -> Result<DiskStatus> {
        let (map, map_stat) = self.open_map(folder, instance, disk)?;
        let data = disk_file(disk, DiskPart::Data);
        let data = folder.stat_file(data)?.ok_or_else(|| missing(folder, data))?;
        let superblock = read_superblock(&map).context(|| format!("look up {instance}/{disk}"))?;
        let size = superblock.geometry.size();
        Ok(DiskStatus { size, map_allocated: allocated(&map_stat), cow: true, ..status_of_file(&data) })
    }
}

fn missing(folder: &Dir, file: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("{}: missing", folder.path_of(file).display()))
}

/// What the file of a disk's data tells.
fn status_of_file(stat: &Stat) -> DiskStatus {
    DiskStatus {
        size: u64::try_from(stat.st_size).unwrap_or(0),
        data_allocated: allocated(stat),
        map_allocated: 0,
        modified: time(stat.st_mtime, stat.st_mtime_nsec),
        accessed: time(stat.st_atime, stat.st_atime_nsec),
        cow: false,
    }
}

/// Bytes of the host's disk that a file takes.
fn allocated(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * 512
}

/// A time of the host's file system: seconds since 1970, or before it, and nanoseconds since then.
fn time(seconds: i64, nanoseconds: u64) -> SystemTime {
    let from_1970 = Duration::from_secs(seconds.unsigned_abs());
    let second =
        if seconds < 0 { SystemTime::UNIX_EPOCH - from_1970 } else { SystemTime::UNIX_EPOCH + from_1970 };
    second + Duration::from_nanos(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_and_after_are_those_of_the_host() {
        let nanoseconds = |time: SystemTime| match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => i128::try_from(after.as_nanos()).unwrap(),
            Err(before) => -i128::try_from(before.duration().as_nanos()).unwrap(),
        };
        assert_eq!(nanoseconds(time(3, 5)), 3_000_000_005);
        assert_eq!(nanoseconds(time(-3, 5)), -2_999_999_995);
    }
}
