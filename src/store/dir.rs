//! A folder of the store by its descriptor.
//!
//! Every file and folder of the store is opened by one name relative to the descriptor of its folder, never through a
//! symbolic link ([`open_beneath`] at each step), so no link and no rename of a parent leads out of the store. Only the
//! store's own path, which the user gives, may go through links. Whatever is opened as a file is a regular file: a
//! fifo or a device is refused by name, without waiting for it. All changes go through the folder's [`Host`].

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Stat, Timestamps, Uid};
use rustix::io::Errno;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{FileStorage, Host, RealHost, open_beneath};

/// Access mode of a file that is read or written by its owner only.
pub(super) const MODE_PRIVATE: u32 = 0o600;
/// Access mode of a file that is never written again.
pub(super) const MODE_READ_ONLY: u32 = 0o400;
/// Access mode of a folder.
pub(super) const MODE_FOLDER: u32 = 0o700;

/// Most folders one in the other that are deleted, or counted, together. The store itself makes no more than two.
pub(super) const DEPTH_MAX: u32 = 16;

/// An open folder, and the host through which it is changed. `path` is only for messages.
#[derive(Debug)]
pub(super) struct Dir {
    host: Arc<dyn Host>,
    fd: OwnedFd,
    path: PathBuf,
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    ReadWrite,
}

impl Dir {
    /// Opens a folder by a path of the user's, which may go through links.
    pub(super) fn open_path(path: &Path) -> Result<Self> {
        Self::open_path_on(Arc::new(RealHost), path)
    }

    /// [`Dir::open_path`] for changes through `host`.
    pub(super) fn open_path_on(host: Arc<dyn Host>, path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .context(|| format!("open folder {}", path.display()))?;
        Ok(Self { host, fd, path: path.to_owned() })
    }

    /// Opens a folder so that all but syncing it works.
    #[cfg(test)]
    pub(super) fn open_unsyncable(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).context(|| "open a folder by its path")?;
        Ok(Self { host: Arc::new(RealHost), fd, path: path.to_owned() })
    }

    /// The path of `name` in this folder, for messages.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The path of this folder, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a folder in this one.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there is a symbolic link under that name; [`ErrorKind::NotFound`] if there is something
    /// else that is no folder, or nothing.
    pub(super) fn open_dir(&self, name: &str) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd = match self.open(name, flags, Mode::empty()) {
            Err(Errno::LOOP | Errno::NOTDIR) => {
                let link = matches!(self.stat(name), Ok(Some(stat)) if kind_of(&stat) == FileType::Symlink);
                let kind = if link { ErrorKind::Corrupt } else { ErrorKind::NotFound };
                return Err(self.something_else(kind, name, "a folder"));
            }
            other => other.context(|| format!("open folder {}", self.path_of(name).display()))?,
        };
        Ok(Self { host: self.host.clone(), fd, path: self.path_of(name) })
    }

    /// Opens what is under that name in this very folder.
    pub(super) fn open(&self, name: &str, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        open_beneath(self.as_fd(), component(name), flags, mode)
    }

    /// Opens a regular file in this folder.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there is something else under that name, a symbolic link included.
    pub(super) fn open_file(&self, name: &str, access: Access) -> Result<File> {
        let access = match access {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        self.open_regular(name, access, Mode::empty())
    }

    /// What [`Dir::open_file`] would open, without opening it; `None` if nothing is there.
    ///
    /// # Errors
    /// Those of [`Dir::open_file`], but for [`ErrorKind::NotFound`].
    pub(super) fn stat_file(&self, name: &str) -> Result<Option<Stat>> {
        match self.stat(name)? {
            Some(stat) if kind_of(&stat) != FileType::RegularFile => {
                Err(self.something_else(ErrorKind::Corrupt, name, "a regular file"))
            }
            found => Ok(found),
        }
    }

    /// Opens a regular file to read it here and now, by plain reads, and tells what it is. It is not fit to be kept:
    /// requests put to the kernel asynchronously would not wait.
    ///
    /// # Errors
    /// Those of [`Dir::open_file`].
    pub(super) fn open_to_look(&self, name: &str) -> Result<(File, Stat)> {
        self.open_checked(name, OFlags::RDONLY, Mode::empty())
    }

    fn open_regular(&self, name: &str, flags: OFlags, mode: Mode) -> Result<File> {
        let (file, _) = self.open_checked(name, flags, mode)?;
        // Blocks again.
        rustix::fs::fcntl_setfl(&file, flags & OFlags::ACCMODE)
            .context(|| format!("open {}", self.path_of(name).display()))?;
        Ok(file)
    }

    /// Opens a regular file, with O_NONBLOCK.
    fn open_checked(&self, name: &str, flags: OFlags, mode: Mode) -> Result<(File, Stat)> {
        let shown = || format!("open {}", self.path_of(name).display());
        let fd = match self.open(name, flags, mode) {
            // A link; a socket, or a device that is not there; a folder that would be written to.
            Err(Errno::LOOP | Errno::NXIO | Errno::NODEV | Errno::ISDIR) => {
                return Err(self.something_else(ErrorKind::Corrupt, name, "a regular file"));
            }
            other => other.context(shown)?,
        };
        let stat = rustix::fs::fstat(&fd).context(shown)?;
        if kind_of(&stat) != FileType::RegularFile {
            return Err(self.something_else(ErrorKind::Corrupt, name, "a regular file"));
        }
        Ok((fd.into(), stat))
    }

    /// Opens a file for reading and writing past the host's cache; `None` where the host's file system, or a limit of
    /// open files, does not allow that. What it is, the caller compares with the file that he has checked.
    pub(super) fn open_direct(&self, name: &str) -> Option<File> {
        let fd = self.open(name, OFlags::RDWR | OFlags::DIRECT, Mode::empty()).ok()?;
        // Blocks again.
        rustix::fs::fcntl_setfl(&fd, OFlags::DIRECT).ok()?;
        Some(fd.into())
    }

    /// What is said of a name that has something under it that no store has there.
    fn something_else(&self, kind: ErrorKind, name: &str, wanted: &str) -> Error {
        let found = match self.stat(name) {
            Ok(Some(stat)) => match kind_of(&stat) {
                FileType::Symlink => "a symbolic link",
                FileType::Directory => "a folder",
                FileType::RegularFile => "a regular file",
                FileType::Fifo => "a fifo",
                FileType::Socket => "a socket",
                FileType::BlockDevice | FileType::CharacterDevice => "a device",
                FileType::Unknown => "something",
            },
            // It has changed since.
            Ok(None) | Err(_) => "something",
        };
        Error::new(kind, format!("{}: {found}, must be {wanted}", self.path_of(name).display()))
    }

    /// Makes a new, empty file for reading and writing; fails if the name is taken.
    pub(super) fn create_file(&self, name: &str, mode: u32) -> Result<FileStorage> {
        let path = self.path_of(name);
        let fd = self
            .host
            .create_file(self.as_fd(), component(name), mode)
            .context(|| format!("create {}", path.display()))?;
        Ok(self.storage(fd.into(), path.display().to_string()))
    }

    /// An empty file of this folder without a name: it is gone when it is closed. `None` where the host filesystem has no such
    /// files, or this user may not make one.
    pub(super) fn nameless_file(&self) -> Result<Option<FileStorage>> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.fd, ".", flags, Mode::from_raw_mode(MODE_PRIVATE)) {
            Ok(fd) => Ok(Some(self.storage(fd.into(), format!("a file in {}", self.path.display())))),
            Err(
                Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::ACCESS | Errno::PERM | Errno::ROFS,
            ) => Ok(None),
            Err(errno) => Err(Error::io(format!("try {}", self.path.display()), errno.into())),
        }
    }

    /// An open file of this folder, to be changed through the folder's host; `shown` is what messages call it.
    pub(super) fn storage(&self, file: File, shown: impl Into<String>) -> FileStorage {
        FileStorage::on(self.host.clone(), file, shown)
    }

    /// Opens a file that holds a lock, making it if need be. Whether it survives a crash does not matter.
    ///
    /// # Errors
    /// Those of [`Dir::open_file`].
    pub(super) fn open_lock_file(&self, name: &str) -> Result<File> {
        self.open_regular(name, OFlags::RDWR | OFlags::CREATE, Mode::from_raw_mode(MODE_PRIVATE))
    }

    /// Makes a folder; fails if the name is taken.
    pub(super) fn make_dir(&self, name: &str) -> Result<()> {
        self.make_dir_with_mode(name, MODE_FOLDER)
    }

    /// [`Dir::make_dir`] with another mode than 0700, less what the umask forbids.
    pub(super) fn make_dir_with_mode(&self, name: &str, mode: u32) -> Result<()> {
        self.host
            .make_dir(self.as_fd(), component(name), mode)
            .context(|| format!("create folder {}", self.path_of(name).display()))
    }

    /// The numbers of this folder's device and inode.
    pub(super) fn device_and_inode(&self) -> Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.fd).context(|| format!("look up {}", self.path.display()))?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// The user whom this folder belongs to.
    pub(super) fn owner(&self) -> Result<Uid> {
        let stat = rustix::fs::fstat(&self.fd).context(|| format!("look up {}", self.path.display()))?;
        Ok(Uid::from_raw(stat.st_uid))
    }

    /// What is under that name, without following a link; `None` if nothing is.
    pub(super) fn stat(&self, name: &str) -> Result<Option<Stat>> {
        match rustix::fs::statat(&self.fd, component(name), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(Error::io(format!("look up {}", self.path_of(name).display()), errno.into())),
        }
    }

    /// Whether anything has that name.
    pub(super) fn has(&self, name: &str) -> Result<bool> {
        Ok(self.stat(name)?.is_some())
    }

    /// Removes a file. Nothing there is no error.
    pub(super) fn unlink(&self, name: &str) -> Result<()> {
        match self.host.unlink(self.as_fd(), component(name)) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::io(format!("remove {}", self.path_of(name).display()), errno.into())),
        }
    }

    /// The names in this folder, sorted, without `.` and `..`; those that are not UTF-8 are left out: the store never
    /// makes one.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        let shown = || format!("read folder {}", self.path.display());
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).context(shown)? {
            let entry = entry.context(shown)?;
            if let Some(name) = plain_name(entry.file_name()) {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Names of folders and links in this folder, for messages, that are not UTF-8 or for which `is_ours` is false: the
    /// store does not know what they hold.
    pub(super) fn strange_folders(&self, is_ours: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        let shown = || format!("read folder {}", self.path.display());
        let mut strange = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).context(shown)? {
            let entry = entry.context(shown)?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) || name.to_str().is_ok_and(&is_ours) {
                continue;
            }
            let kind = match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => kind_of(&stat),
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno).context(shown),
            };
            if matches!(kind, FileType::Directory | FileType::Symlink) {
                strange.push(name.to_string_lossy().into_owned());
            }
        }
        strange.sort_unstable();
        Ok(strange)
    }

    /// Makes the names in this folder durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.host.sync_dir(self.as_fd()).context(|| format!("sync folder {}", self.path.display()))
    }

    /// Deletes what has that name, a folder with all that is in it. Nothing there is no error. Links are not followed.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there are more folders one in the other than a store ever has.
    pub(super) fn remove_tree(&self, name: &str) -> Result<()> {
        self.remove_tree_within(name, DEPTH_MAX)
    }

    fn remove_tree_within(&self, name: &str, depth: u32) -> Result<()> {
        match self.host.unlink(self.as_fd(), component(name)) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(errno) => {
                return Err(Error::io(format!("remove {}", self.path_of(name).display()), errno.into()));
            }
        }
        let Some(depth) = depth.checked_sub(1) else {
            let message =
                format!("remove {}: too deep for a folder of a store", self.path_of(name).display());
            return Err(Error::new(ErrorKind::Corrupt, message));
        };
        let folder = self.open_dir(name)?;
        for inner in folder.names()? {
            folder.remove_tree_within(&inner, depth)?;
        }
        self.remove_dir(name)
    }

    /// Removes an empty folder. Nothing there is no error.
    pub(super) fn remove_dir(&self, name: &str) -> Result<()> {
        match self.host.remove_dir(self.as_fd(), component(name)) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::io(format!("remove {}", self.path_of(name).display()), errno.into())),
        }
    }

    /// Gives `name` of this folder another place: `to_name` in `to`.
    pub(super) fn rename(&self, name: &str, to: &Self, to_name: &str, flags: RenameFlags) -> Result<()> {
        let shown = || format!("rename to {}", to.path_of(to_name).display());
        let (from, place) = ((self.as_fd(), component(name)), (to.as_fd(), component(to_name)));
        match self.host.rename(from, place, flags) {
            // A host filesystem without the flag. The store's lock is held, so nobody takes the name in between.
            Err(Errno::INVAL | Errno::NOSYS) if !flags.is_empty() => {
                if to.has(to_name)? {
                    return Err(Error::io(shown(), Errno::EXIST.into()));
                }
                self.host.rename(from, place, RenameFlags::empty()).context(shown)
            }
            other => other.context(shown),
        }
    }

    /// Sets the mode of this folder.
    pub(super) fn set_mode(&self, mode: u32) -> Result<()> {
        self.host.set_mode(self.as_fd(), mode).context(|| format!("set the mode of {}", self.path.display()))
    }

    /// Sets the times of a file of this folder, as `utimensat` does.
    pub(super) fn set_times(&self, name: &str, times: &Timestamps) -> Result<()> {
        self.host
            .set_times(self.as_fd(), component(name), times)
            .context(|| format!("set the times of {}", self.path_of(name).display()))
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Asserts that a name is one component of a path: names come from `layout.rs` or are checked by `names.rs`.
fn component(name: &str) -> &OsStr {
    assert!(
        !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']),
        "not a file name: {name:?}"
    );
    OsStr::new(name)
}

fn kind_of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn plain_name(name: &CStr) -> Option<String> {
    let name = name.to_str().ok()?;
    (name != "." && name != "..").then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_fifos_and_folders_are_not_opened_as_files() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = Dir::open_path(scratch.path()).unwrap();
        dir.create_file("real", MODE_PRIVATE).unwrap();
        std::os::unix::fs::symlink("real", scratch.path().join("link")).unwrap();
        std::os::unix::fs::symlink(".", scratch.path().join("dirlink")).unwrap();
        let fifo = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(&dir, "fifo", FileType::Fifo, fifo, 0).unwrap();
        dir.make_dir("folder").unwrap();
        assert!(dir.open_file("real", Access::ReadWrite).is_ok());
        let _socket = std::os::unix::net::UnixListener::bind(scratch.path().join("socket")).unwrap();
        let others =
            [("link", "a symbolic link"), ("fifo", "a fifo"), ("folder", "a folder"), ("socket", "a socket")];
        for (name, what) in others {
            let refused = [
                dir.open_file(name, Access::Read).unwrap_err(),
                dir.open_file(name, Access::ReadWrite).unwrap_err(),
                dir.open_lock_file(name).unwrap_err(),
                dir.open_to_look(name).unwrap_err(),
            ];
            for error in refused {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                assert!(
                    error.to_string().ends_with(&format!("{name}: {what}, must be a regular file")),
                    "{error}"
                );
            }
        }
        for (name, what, kind) in [
            ("dirlink", "a symbolic link", ErrorKind::Corrupt),
            ("link", "a symbolic link", ErrorKind::Corrupt),
            ("fifo", "a fifo", ErrorKind::NotFound),
            ("real", "a regular file", ErrorKind::NotFound),
        ] {
            let error = dir.open_dir(name).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().ends_with(&format!("{name}: {what}, must be a folder")), "{error}");
        }
        assert_eq!(dir.open_file("absent", Access::Read).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn removing_a_tree_does_not_follow_links() {
        let outside = tempfile::tempdir().unwrap();
        let kept = outside.path().join("kept");
        File::create(&kept).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let dir = Dir::open_path(scratch.path()).unwrap();
        dir.make_dir("tree").unwrap();
        dir.open_dir("tree").unwrap().make_dir("inner").unwrap();
        std::os::unix::fs::symlink(outside.path(), scratch.path().join("tree/inner/link")).unwrap();
        dir.remove_tree("tree").unwrap();
        dir.remove_tree("tree").unwrap();
        assert!(kept.exists());
        assert!(dir.names().unwrap().is_empty());
    }

    /// Each folder took a descriptor and a piece of the stack.
    #[test]
    fn a_tree_of_any_depth_is_refused_and_not_descended() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = Dir::open_path(scratch.path()).unwrap();
        std::fs::create_dir_all(scratch.path().join("deep").join("d/".repeat(200))).unwrap();
        let error = dir.remove_tree("deep").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(scratch.path().join("deep").exists());
    }
}
