//! Whose rights are used on a store: those of the user that the store's folder belongs to.
//!
//! What a store holds decides what is opened, made and removed in it. Where root mounts the store of another user, or
//! changes it, that user could have arranged it, so root does it with that user's rights. A store then belongs to one
//! user as a whole, whoever runs the commands.

use std::path::Path;

use rustix::process::{Gid, Uid};
use rustix::thread::CapabilitySet;

use crate::error::{Context, Error, ErrorKind, Result};

/// What is left to a process that was root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// The capabilities, until the process is confined: a daemon has to mount.
    Capabilities,
}

/// Becomes the user whom `store` belongs to, if that is another one and we are root. A store that is not there changes
/// nothing.
///
/// It acts on the calling thread and on those that it starts: to be called before there are others.
///
/// # Errors
/// [`ErrorKind::Denied`] if this root may not.
pub fn become_owner(store: &Path, keep: Keep) -> Result<()> {
    let Some((uid, gid)) = other_owner(store) else { return Ok(()) };
    switch(uid, gid, keep)
        .context(|| format!("act as the owner of {} (user {uid}, group {gid})", store.display()))
}

/// Runs `work` with the rights of the user whom `store` belongs to, and nothing more, if that is another one and we are
/// root; the rest of this process stays root.
///
/// # Errors
/// Those of `work`, and those of [`become_owner`].
pub fn as_owner<T: Send>(store: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    if other_owner(store).is_none() {
        return work();
    }
    // The kernel keeps these rights for each thread.
    let result = std::thread::scope(|scope| {
        scope.spawn(|| become_owner(store, Keep::Nothing).and_then(|()| work())).join()
    });
    result.unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "a thread panicked")))
}

/// Whether this process may mount without help.
pub(super) fn may_mount() -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

fn other_owner(store: &Path) -> Option<(Uid, Gid)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let stat = rustix::fs::stat(store).ok()?;
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    (!uid.is_root()).then_some((uid, gid))
}

fn switch(uid: Uid, gid: Gid, keep: Keep) -> rustix::io::Result<()> {
    rustix::thread::set_keep_capabilities(keep == Keep::Capabilities)?;
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    rustix::thread::set_keep_capabilities(false)?;
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective = sets.permitted;
    rustix::thread::set_capabilities(None, sets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_acts_as_the_owner_of_another_users_store_and_stays_root() {
        assert!(rustix::process::geteuid().is_root(), "needs root");
        let folder = tempfile::tempdir().unwrap();
        let of_root = as_owner(folder.path(), || Ok(rustix::process::geteuid())).unwrap();
        assert!(of_root.is_root());
        std::os::unix::fs::chown(folder.path(), Some(4321), Some(1234)).unwrap();
        let path = folder.path().join("file");
        let sets = as_owner(folder.path(), || {
            std::fs::File::create(&path).context(|| "create")?;
            rustix::thread::capabilities(None).context(|| "ask")
        });
        assert!(sets.unwrap().permitted.is_empty());
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!(
            (std::os::unix::fs::MetadataExt::uid(&made), std::os::unix::fs::MetadataExt::gid(&made)),
            (4321, 1234)
        );
        let denied = as_owner(folder.path(), || std::fs::read("/etc/shadow").context(|| "read"));
        assert_eq!(denied.unwrap_err().kind(), ErrorKind::Denied);
        assert!(rustix::process::geteuid().is_root());
    }
}
