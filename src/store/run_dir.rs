//! Where the live maps of a store are: a folder in memory that outlives the daemon, but not the host's boot.
//!
//! The live map of a disk holds what has been answered but not yet flushed, so whoever opens the disk next in the same
//! boot must find it, whatever its environment says. The first process of a boot that needs the folder therefore writes
//! down in the store which one it took (`run.json`), and all others of that boot take the same.
//!
//! A copy of a store has its uuid, and a copy of that note; a snapshot of its file system has its inode numbers as well.
//! So the folder's name holds the device and inode numbers of the store's own folder too, and a note that names another
//! folder is not for this store.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::dir::Dir;
use super::lock::StoreLock;
use super::{Store, atomic, host_fs, layout, record, superblock};
use crate::error::{Context, Error, ErrorKind, Result};

/// Names the folder to use instead of the usual ones.
const VARIABLE: &str = "COWDISK_RUN_DIR";

/// The usual one of root.
const RUN_DIR_OF_ROOT: &str = "/run/cowdisk";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RunRecord {
    /// The kernel's id of the boot for which `dir` holds.
    boot_id: String,
    dir: String,
}

impl Store {
    /// The folder of this boot's live maps, made if need be: 0700 and ours.
    ///
    /// It is `$COWDISK_RUN_DIR`, `/run/cowdisk`, `/dev/shm/cowdisk-UID` or `$XDG_RUNTIME_DIR/cowdisk`, the first that
    /// is in memory and that we may write to, and in it a folder with the store's uuid, device and inode number.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if `$COWDISK_RUN_DIR` names another folder than the one in use since the host's boot;
    /// [`ErrorKind::Denied`] if the folder belongs to somebody else.
    pub fn run_dir(&self) -> Result<PathBuf> {
        let boot_id = boot_id()?;
        if let Some(dir) = self.recorded_run_dir(&boot_id)? {
            return self.reuse(dir);
        }
        let _lock = StoreLock::wait(&self.root)?;
        if let Some(dir) = self.recorded_run_dir(&boot_id)? {
            return self.reuse(dir);
        }
        let dir = self.choose()?;
        let text = dir.to_str().ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("run directory {}: must be UTF-8", dir.display()))
        })?;
        let bytes = record::encode(&RunRecord { boot_id, dir: text.to_owned() })?;
        atomic::replace_file(&self.tmp, &self.root, layout::RUN, &bytes)?;
        Ok(dir)
    }

    /// A folder for what this process keeps about the store beside its live maps: the run directory, made if need be. Root
    /// takes one of its own, in `/run/cowdisk`, for a store of another user, who could put links into his.
    ///
    /// # Errors
    /// Those of [`Store::run_dir`].
    pub fn own_run_dir(&self) -> Result<PathBuf> {
        if rustix::process::geteuid().is_root() && !self.owner()?.0.is_root() {
            return self.make_in(Path::new(RUN_DIR_OF_ROOT));
        }
        self.run_dir()
    }

    /// The folder that this boot uses, if any process has needed one yet; nothing is made, and no lock awaited. Whoever
    /// is about to choose one holds the store's lock.
    ///
    /// # Errors
    /// Those of the host.
    pub fn run_dir_in_use(&self) -> Result<Option<PathBuf>> {
        self.recorded_run_dir(&boot_id()?)
    }

    fn recorded_run_dir(&self, boot_id: &str) -> Result<Option<PathBuf>> {
        match record::read::<RunRecord>(&self.root, layout::RUN, record::RECORD_BYTES_MAX) {
            Ok(record) if record.boot_id == boot_id => {
                let dir = PathBuf::from(record.dir);
                Ok((dir.ends_with(self.run_dir_name()?) && is_there(&dir)).then_some(dir))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes the folder of an earlier process of this boot.
    fn reuse(&self, dir: PathBuf) -> Result<PathBuf> {
        if let Some(wanted) = self.run_dir_wanted()?
            && wanted.join(self.run_dir_name()?) != dir
        {
            let message = format!("run directory: this store uses {} since the host's boot", dir.display());
            return Err(Error::new(ErrorKind::Busy, message).with_hint(format!("unset {VARIABLE}")));
        }
        let parent = dir.parent().unwrap_or(Path::new("/"));
        make_safe(parent, OTHERS_MAY_WRITE)?;
        make_safe(&dir, OTHERS_MAY_ENTER)?;
        Ok(dir)
    }

    /// Finds a folder for this boot.
    fn choose(&self) -> Result<PathBuf> {
        if let Some(wanted) = self.run_dir_wanted()? {
            return self.make_in(&wanted);
        }
        let mut reasons = Vec::new();
        for candidate in usual_parents() {
            let parent = candidate.parent().unwrap_or(Path::new("/"));
            match Dir::open_path(parent) {
                Ok(dir) if host_fs::is_memory(&dir) => match self.make_in(&candidate) {
                    Ok(dir) => return Ok(dir),
                    Err(error) => reasons.push(error.to_string()),
                },
                Ok(_) => reasons.push(format!("{} is not in memory", parent.display())),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        let message = format!("no folder for the live maps: {}", reasons.join("; "));
        Err(Error::new(ErrorKind::Unsupported, message)
            .with_hint(format!("name one on a tmpfs with {VARIABLE}")))
    }

    fn run_dir_name(&self) -> Result<String> {
        let (device, inode) = self.root.device_and_inode()?;
        Ok(format!("{}-{device:x}-{inode:x}", self.uuid()))
    }

    /// The folder that the caller or the environment asks for.
    fn run_dir_wanted(&self) -> Result<Option<PathBuf>> {
        let wanted = self.run_dir_wanted.clone().or_else(|| std::env::var_os(VARIABLE).map(PathBuf::from));
        match wanted {
            Some(dir) if !dir.is_absolute() => {
                let message = format!("run directory {}: must be an absolute path", dir.display());
                Err(Error::new(ErrorKind::Invalid, message))
            }
            wanted => Ok(wanted),
        }
    }

    fn make_in(&self, parent: &Path) -> Result<PathBuf> {
        make_safe(parent, OTHERS_MAY_WRITE)?;
        let dir = parent.join(self.run_dir_name()?);
        make_safe(&dir, OTHERS_MAY_ENTER)?;
        Ok(dir)
    }
}

/// Where run directories are looked for, the first choice first, unless one is asked for.
fn usual_parents() -> Vec<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let mut parents = vec![PathBuf::from(format!("/dev/shm/cowdisk-{uid}"))];
    if uid == 0 {
        parents.insert(0, PathBuf::from(RUN_DIR_OF_ROOT));
    }
    if let Some(runtime) = std::env::var_os("XDG_RUNTIME_DIR") {
        parents.push(PathBuf::from(runtime).join("cowdisk"));
    }
    parents
}

/// Where a store whose run directory is not chosen yet will have it: the first folder of which the one above is in memory, or
/// the one that the environment asks for. `None` if there is none. Makes nothing.
pub fn run_dir_to_be() -> Option<PathBuf> {
    match std::env::var_os(VARIABLE) {
        Some(wanted) => Some(PathBuf::from(wanted)),
        None => usual_parents().into_iter().find(|parent| {
            let above = parent.parent().unwrap_or(Path::new("/"));
            Dir::open_path(above).is_ok_and(|dir| host_fs::is_memory(&dir))
        }),
    }
}

/// The uuid of the store in `root`, by the note of its latest run directory; `None` if there is none, or none that can be
/// read. It outlives the boot for which it was written.
pub(super) fn noted_uuid(root: &Dir) -> Option<String> {
    let record: RunRecord = record::read(root, layout::RUN, record::RECORD_BYTES_MAX).ok()?;
    let name = Path::new(&record.dir).file_name()?.to_str()?;
    let uuid = name.split('-').next()?;
    superblock::is_uuid(uuid).then(|| uuid.to_owned())
}

/// Whether a recorded folder is one, by a path without detours. Who recorded it had made it, and memory keeps it for as
/// long as the record holds: nothing is ever made at a path only because the store names it.
fn is_there(dir: &Path) -> bool {
    let plain = dir.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    plain && dir.is_absolute() && dir.symlink_metadata().is_ok_and(|found| found.is_dir())
}

/// Permission bits that a folder must not have.
const OTHERS_MAY_WRITE: u32 = 0o022;
const OTHERS_MAY_ENTER: u32 = 0o077;

/// Makes a folder that only we may enter, or checks that the one that is there is ours and has none of `forbidden`.
fn make_safe(path: &Path, forbidden: u32) -> Result<()> {
    let shown = || format!("run directory {}", path.display());
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::io(shown(), error)),
    }
    let stat = rustix::fs::lstat(path).context(shown)?;
    let is_dir = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory;
    if !is_dir || stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & forbidden != 0 {
        let message =
            format!("{}: must be a folder of our own that is closed to others (mode 0700)", shown());
        return Err(Error::new(ErrorKind::Denied, message));
    }
    Ok(())
}

/// The kernel's id of this boot.
fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).context(|| format!("read {path}"))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::tests::store_with_image;
    use super::*;

    #[test]
    fn all_processes_of_a_boot_use_the_same_folder() {
        let t = store_with_image();
        let first = t.store.run_dir().unwrap();
        assert!(first.starts_with(t.run.path()), "{}", first.display());
        assert_eq!(Store::open(t.folder.path()).unwrap().run_dir().unwrap(), first, "without being told");
        let other = Store::open(t.folder.path()).unwrap().with_run_dir("/run/elsewhere");
        assert_eq!(other.run_dir().unwrap_err().kind(), ErrorKind::Busy);
    }

    /// A folder was made wherever the record said, and a relative path led to wherever the process stood.
    #[test]
    fn a_record_that_names_no_folder_makes_none() {
        let t = store_with_image();
        let name = t.store.run_dir().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        let outside = tempfile::tempdir().unwrap();
        let boot_id = boot_id().unwrap();
        std::os::unix::fs::symlink(t.run.path().join(&name), outside.path().join(&name)).unwrap();
        for dir in [
            outside.path().join("made").join(&name),
            outside.path().join(&name),
            t.run.path().join("..").join(t.run.path().file_name().unwrap()).join(&name),
            PathBuf::from(&name),
        ] {
            let record = RunRecord { boot_id: boot_id.clone(), dir: dir.to_str().unwrap().to_owned() };
            let bytes = record::encode(&record).unwrap();
            atomic::replace_file(&t.store.tmp, &t.store.root, layout::RUN, &bytes).unwrap();
            assert_eq!(t.store.run_dir().unwrap(), t.run.path().join(&name), "{}", dir.display());
            assert!(!outside.path().join("made").exists() && !Path::new(&name).exists());
        }
    }

    #[test]
    fn a_copy_of_a_store_has_live_maps_of_its_own() {
        let t = store_with_image();
        let original = t.store.run_dir().unwrap();
        let copy = tempfile::tempdir().unwrap();
        let status =
            std::process::Command::new("cp").arg("-aT").arg(t.folder.path()).arg(copy.path()).status();
        assert!(status.unwrap().success());
        let copy = Store::open(copy.path()).unwrap().with_run_dir(t.run.path());
        assert_eq!(copy.uuid(), t.store.uuid());
        assert_ne!(copy.run_dir().unwrap(), original);
    }

    #[test]
    fn a_folder_that_others_may_enter_is_refused() {
        let t = store_with_image();
        let dir = t.store.run_dir().unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(t.store.run_dir().unwrap_err().kind(), ErrorKind::Denied);
    }

    #[test]
    fn another_boot_chooses_anew() {
        let t = store_with_image();
        let first = t.store.run_dir().unwrap();
        let record = t.folder.path().join(layout::RUN);
        let old = std::fs::read_to_string(&record).unwrap().replace(&boot_id().unwrap(), "another boot");
        std::io::Write::write_all(&mut std::fs::File::create(&record).unwrap(), old.as_bytes()).unwrap();
        let moved = tempfile::tempdir().unwrap();
        let store = Store::open(t.folder.path()).unwrap().with_run_dir(moved.path());
        assert_ne!(store.run_dir().unwrap(), first);
    }
}
