//! Whose rights are used on a store: those of the user that the store's folder belongs to.
//!
//! What a store holds decides what is opened, made and removed in it. Where root mounts the store of another user, or
//! changes it, that user could have arranged it, so root does it with that user's rights. A store then belongs to one
//! user as a whole, whoever runs the commands.

use std::path::Path;

use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::Store;

/// What is left to a process that was root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// The capabilities, until the process is confined: a daemon has to mount. Those that would open files to us that are
    /// closed to the owner are in effect only within `with_capabilities`: what lies in the store is the owner's choice.
    Capabilities,
}

/// What stays in effect of capabilities that were kept: to mount, to be spared, to raise limits, to give up the rest.
const IN_EFFECT: CapabilitySet =
    CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_RESOURCE).union(CapabilitySet::SETPCAP);

/// Becomes the user whom `store` belongs to, if that is another one and we are root. A store that is not there changes
/// nothing.
///
/// It acts on the calling thread and on those that it starts: to be called before there are others. The path could lead
/// to another folder by the time that the store is opened; [`Store::open`](crate::store::Store::open) therefore refuses
/// root another user's.
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
    in_thread(|| become_owner(store, Keep::Nothing).and_then(|()| work()))
}

/// [`as_owner`] of a store that is open, whatever its path leads to by now.
///
/// # Errors
/// Those of `work`, and those of [`become_owner`].
pub fn as_owner_of<T: Send>(store: &Store, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let (uid, gid) = store.owner()?;
    if !rustix::process::geteuid().is_root() || uid.is_root() {
        return work();
    }
    in_thread(|| {
        let what = || format!("act as the owner of {} (user {uid}, group {gid})", store.dir().display());
        switch(uid, gid, Keep::Nothing).context(what).and_then(|()| work())
    })
}

/// The kernel keeps rights for each thread, so what is done in one of its own leaves ours alone.
fn in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "a thread panicked")))
}

/// Whether this process may mount without help.
pub fn may_mount() -> bool {
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
    // Said outright: a process may have been told (by its securebits) to keep them.
    let none = CapabilitySet::empty();
    let had = match keep {
        Keep::Nothing => none,
        Keep::Capabilities => rustix::thread::capabilities(None)?.permitted,
    };
    let sets = CapabilitySets { effective: had & IN_EFFECT, permitted: had, inheritable: none };
    rustix::thread::set_capabilities(None, sets)
}

/// Runs `work` with all capabilities that this thread has kept in effect.
///
/// # Errors
/// Those of `work`.
pub(super) fn with_capabilities<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let what = || "use the capabilities that were kept";
    let before = rustix::thread::capabilities(None).context(what)?;
    let raised = CapabilitySets { effective: before.permitted, ..before };
    rustix::thread::set_capabilities(None, raised).context(what)?;
    let result = work();
    rustix::thread::set_capabilities(None, before).context(what)?;
    result
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
        let sets = sets.unwrap();
        assert!(sets.permitted.is_empty() && sets.inheritable.is_empty());
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!(
            (std::os::unix::fs::MetadataExt::uid(&made), std::os::unix::fs::MetadataExt::gid(&made)),
            (4321, 1234)
        );
        let denied = as_owner(folder.path(), || std::fs::read("/etc/shadow").context(|| "read"));
        assert_eq!(denied.unwrap_err().kind(), ErrorKind::Denied);
        assert!(rustix::process::geteuid().is_root());
    }

    /// A daemon that had become the owner opened his store with root's right to read and write every file.
    #[test]
    fn capabilities_that_open_files_are_in_effect_for_a_moment_only() {
        assert!(rustix::process::geteuid().is_root(), "needs root");
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(folder.path(), Some(4321), Some(1234)).unwrap();
        let path = folder.path().to_owned();
        let thread = std::thread::spawn(move || {
            become_owner(&path, Keep::Capabilities).unwrap();
            assert!(may_mount());
            let read = || std::fs::read("/etc/shadow").context(|| "read");
            assert_eq!(read().unwrap_err().kind(), ErrorKind::Denied);
            assert!(with_capabilities(read).is_ok());
            assert_eq!(read().unwrap_err().kind(), ErrorKind::Denied);
        });
        thread.join().unwrap();
    }

    /// The path of a store could be made to lead to a folder of root's by the time that its owner was asked for.
    #[test]
    fn the_owner_of_an_open_store_is_the_one_of_its_folder_and_not_of_its_path() {
        assert!(rustix::process::geteuid().is_root(), "needs root");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let store = Store::init(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(4321), Some(1234)).unwrap();
        rustix::fs::rename(&path, folder.path().join("moved")).unwrap();
        std::os::unix::fs::symlink("/", &path).unwrap();
        let whoami = || Ok(rustix::process::geteuid().as_raw());
        assert_eq!(as_owner(&path, whoami).unwrap(), 0, "what the path says");
        assert_eq!(as_owner_of(&store, whoami).unwrap(), 4321);
    }

    /// Between the look at the owner and the opening the folder may become another one.
    #[test]
    fn root_does_not_open_another_users_store_as_root() {
        assert!(rustix::process::geteuid().is_root(), "needs root");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        Store::init(&path).unwrap();
        assert!(Store::open(&path).is_ok());
        let chown = |path: &Path| std::os::unix::fs::chown(path, Some(4321), Some(1234)).unwrap();
        chown(&path);
        let error = Store::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.to_string().contains("belongs to user 4321"), "{error}");
    }
}
