//! Disks that are one file of the host, which others read and write beside us.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, OFlags};

use super::disk::{Disk, Kind};
use super::layout::{DiskPart, disk_file};
use super::names::{DiskName, ObjectName};
use super::{PlainDisk, Store};
use crate::error::{Context, Error, ErrorKind, Result};

impl Disk {
    /// The disk, if it is no overlay.
    fn as_plain(&self) -> Option<&PlainDisk> {
        if let Kind::Plain(plain) = self.kind() { Some(plain) } else { None }
    }

    /// The file of the host that the disk is, where it is one: see [`PlainDisk::whole_file`].
    ///
    /// # Errors
    /// Those of [`PlainDisk::whole_file`]; [`ErrorKind::Unsupported`] for an overlay.
    pub fn whole_file(&self) -> Result<BorrowedFd<'_>> {
        let overlay = || Error::new(ErrorKind::Unsupported, "it is an overlay");
        self.as_plain().ok_or_else(overlay)?.whole_file()
    }

    /// See [`PlainDisk::share`]; nothing for an overlay.
    pub fn share(&self) {
        if let Some(plain) = self.as_plain() {
            plain.share();
        }
    }

    /// See [`PlainDisk::was_changed_by_others`].
    pub fn was_changed_by_others(&self) -> bool {
        self.as_plain().is_some_and(PlainDisk::was_changed_by_others)
    }
}

impl Store {
    /// Checks that `file` is the whole of a disk of this store, and open for reading and writing: whoever sends it could
    /// do to the disk itself all that it will be shared for. Nothing is opened, and no content looked at.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] if it is another file or open for less; [`ErrorKind::NotFound`] if there is no such instance.
    pub fn check_whole_file(
        &self,
        instance: &ObjectName,
        disk: DiskName,
        file: BorrowedFd<'_>,
    ) -> Result<()> {
        let what = || format!("look at the file of disk {instance}/{disk}");
        let flags = rustix::fs::fcntl_getfl(file).context(what)?;
        let found = rustix::fs::fstat(file).context(what)?;
        let wanted = self.instance_dir(instance)?.stat(disk_file(disk, DiskPart::Raw))?;
        let is_it = wanted.is_some_and(|wanted| {
            FileType::from_raw_mode(wanted.st_mode) == FileType::RegularFile
                && (wanted.st_dev, wanted.st_ino) == (found.st_dev, found.st_ino)
        });
        // One that is open as a path only says that it is open for reading.
        if is_it && flags & (OFlags::ACCMODE | OFlags::PATH) == OFlags::RDWR {
            return Ok(());
        }
        let message = format!("that is not the file of disk {instance}/{disk}, open for reading and writing");
        Err(Error::new(ErrorKind::Denied, message))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsFd;

    use rustix::fs::Mode;

    use super::*;

    #[test]
    fn only_the_very_file_of_the_disk_open_for_reading_and_writing_passes() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::init(&folder.path().join("store")).unwrap();
        let place = store.dir().join("instances/web");
        std::fs::create_dir(&place).unwrap();
        let open = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).open(place.join(name)).unwrap()
        };
        let (web, raw) = ("web".parse().unwrap(), open("disk.raw"));
        let check = |file: &dyn AsFd| store.check_whole_file(&web, DiskName::Root, file.as_fd());
        check(&raw).unwrap();
        let by_path = rustix::fs::open(place.join("disk.raw"), OFlags::PATH, Mode::empty()).unwrap();
        let write_only = OpenOptions::new().write(true).open(place.join("disk.raw")).unwrap();
        let others: [&dyn AsFd; 5] = [
            &File::open(place.join("disk.raw")).unwrap(),
            &write_only,
            &by_path,
            &open("disk.local.raw"),
            &tempfile::tempfile().unwrap(),
        ];
        for other in others {
            assert_eq!(check(other).unwrap_err().kind(), ErrorKind::Denied);
        }
        rustix::fs::rename(place.join("disk.raw"), place.join("moved")).unwrap();
        assert_eq!(check(&raw).unwrap_err().kind(), ErrorKind::Denied);
        std::os::unix::fs::symlink("moved", place.join("disk.raw")).unwrap();
        assert_eq!(check(&raw).unwrap_err().kind(), ErrorKind::Denied);
    }
}
