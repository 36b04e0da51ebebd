//! What must be true of a directory before a store is mounted on it.

use std::path::{Path, PathBuf};

use super::holders;
use super::mounts::{self, MountEntry};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::transport::mount;

/// Checks that `path` is an empty directory outside the store and not mounted on, and returns it without links. A dead
/// mount of a cowdisk daemon that nobody uses any more is taken away first.
///
/// # Errors
/// [`ErrorKind::NotFound`], [`ErrorKind::Invalid`] or [`ErrorKind::Busy`], saying which of these it is not.
pub(super) fn prepare(path: &Path, store: &Path) -> Result<PathBuf> {
    let shown = || format!("mountpoint {}", path.display());
    let path = mounts::absolute(path).map_err(|error| {
        if error.kind() == ErrorKind::NotFound {
            Error::new(ErrorKind::NotFound, format!("{}: not found", shown()))
                .with_hint(format!("make it: mkdir -m 0000 {}", path.display()))
        } else {
            error.context(shown())
        }
    })?;
    let store = mounts::absolute(store).context(|| format!("store {}", store.display()))?;
    if path.starts_with(&store) {
        return Err(Error::new(ErrorKind::Invalid, format!("{}: lies in the store itself", shown())));
    }
    if store.starts_with(&path) {
        return Err(Error::new(ErrorKind::Invalid, format!("{}: would hide the store", shown())));
    }
    let mounts = mounts::mounts()?;
    match mounts::mount_at(&mounts, &path) {
        // systemd's automount waits for us to mount on it; looking into it would wait for ourselves.
        Some(mount) if mount.fs_type == "autofs" => return Ok(path),
        Some(mount) if is_dead(&path) => clear_dead(mount)?,
        Some(mount) if mount.is_ours() => {
            let message = format!("{}: store {} is mounted there", shown(), mount.source.display());
            return Err(Error::new(ErrorKind::Busy, message));
        }
        _ => {}
    }
    check_empty_directory(&path).context(shown)?;
    Ok(path)
}

fn check_empty_directory(path: &Path) -> Result<()> {
    let metadata = std::fs::metadata(path).context(|| "look up")?;
    if !metadata.is_dir() {
        return Err(Error::new(ErrorKind::Invalid, "not a directory"));
    }
    match std::fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(Error::new(ErrorKind::Invalid, "not empty").with_hint("mount on an empty directory"))
        }
        // Only who may not read it: a directory of mode 0000, as is recommended, or another user's.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(Error::io("read", error)),
    }
}

/// Whether the daemon behind a FUSE mount has ended, even if only while it was asked. `statfs` is never answered from the
/// kernel's memory.
fn is_dead(path: &Path) -> bool {
    use rustix::io::Errno;
    matches!(rustix::fs::statvfs(path), Err(Errno::NOTCONN | Errno::CONNABORTED | Errno::CANCELED))
}

/// Takes away a mount whose daemon has ended.
fn clear_dead(entry: &MountEntry) -> Result<()> {
    let shown = entry.mountpoint.display();
    let dead = || format!("mountpoint {shown}: a dead FUSE mount ({}) is there", entry.source.display());
    if !entry.is_ours() {
        return Err(Error::new(ErrorKind::Busy, dead()).with_hint(format!("take it away: umount {shown}")));
    }
    match mount::unmount(&entry.mountpoint) {
        Ok(()) => {
            log::warn!("took away the dead mount of store {} at {shown}", entry.source.display());
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::Busy => {
            let holders = holders::holders(entry.device);
            Err(Error::new(
                ErrorKind::Busy,
                format!("{} and in use: {}", dead(), holders::describe(&holders)),
            )
            .with_hint(format!("end those processes, or detach it from them: umount --lazy {shown}")))
        }
        Err(error) => Err(error.context(dead())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(path: &Path, store: &Path) -> Error {
        prepare(path, store).unwrap_err()
    }

    #[test]
    fn an_empty_directory_outside_the_store_is_accepted() {
        let (folder, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = prepare(folder.path(), store.path()).unwrap();
        assert_eq!(path, folder.path().canonicalize().unwrap());
    }

    #[test]
    fn anything_else_is_refused_with_the_reason() {
        let (folder, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let absent = refused(&folder.path().join("absent"), store.path());
        assert_eq!(absent.kind(), ErrorKind::NotFound);
        assert!(absent.hint().unwrap().contains("mkdir -m 0000"));
        std::fs::File::create(folder.path().join("file")).unwrap();
        assert!(refused(folder.path(), store.path()).to_string().ends_with("not empty"));
        let file = folder.path().join("file");
        assert!(refused(&file, store.path()).to_string().ends_with("not a directory"));
        assert!(refused(store.path(), store.path()).to_string().contains("in the store itself"));
        let parent = store.path().parent().unwrap();
        assert!(refused(parent, store.path()).to_string().contains("would hide the store"));
    }
}
