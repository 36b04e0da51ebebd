//! The record that makes a folder a store, and how a folder becomes one.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::dir::Dir;
use super::lock::StoreLock;
use super::timestamp::Timestamp;
use super::{atomic, hex, host_fs, layout, record};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::Host;

const MAGIC: &str = "cowdisk-store";
/// The version of the stores that this code makes, and the newest that it reads. It reads all before it, too, and leaves a
/// store at the version that it has.
const VERSION: u32 = 2;
/// From this version on a new disk over nothing is a plain file; before it was an overlay in any instance with an overlay.
const VERSION_OF_PLAIN_BLANKS: u32 = 2;
const UUID_BYTES: usize = 16;
/// Access mode of the store's folder.
const MODE_STORE: u32 = 0o700;
/// Access mode of folders above it that are made for it, less what the umask forbids.
const MODE_PARENT: u32 = 0o777;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SuperblockRecord {
    magic: String,
    version: u32,
    uuid: String,
    created: Timestamp,
}

/// What the superblock tells of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// 32 hex digits that no other store has; empty if they are lost.
    pub(super) uuid: String,
    version: u32,
}

impl Identity {
    /// Of a store whose superblock is lost: as if it were of the newest version, of which all others are a part.
    pub(super) fn without_superblock(uuid: String) -> Self {
        Self { uuid, version: VERSION }
    }

    /// Whether an instance's disk over nothing may be a plain file though its root is an overlay; then a new one is. Programs
    /// that know no newer version than the one before take such an instance for damaged, and never get to see it.
    pub(super) fn has_plain_blanks(&self) -> bool {
        self.version >= VERSION_OF_PLAIN_BLANKS
    }
}

/// What the superblock of every version has: read first, so that a newer store is told from a damaged one.
#[derive(Deserialize)]
struct AnyVersion {
    magic: String,
    version: u32,
}

/// Reads and checks the superblock.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is none.
pub(super) fn read(root: &Dir) -> Result<Identity> {
    let file = root.path_of(layout::SUPERBLOCK).display().to_string();
    let any: AnyVersion = record::read(root, layout::SUPERBLOCK, record::RECORD_BYTES_MAX)?;
    if any.magic != MAGIC {
        return Err(Error::new(ErrorKind::Corrupt, format!("{file}: the magic is not {MAGIC}")));
    }
    if any.version > VERSION {
        let message = format!("{file}: store version {} is newer than this cowdisk ({VERSION})", any.version);
        return Err(Error::new(ErrorKind::Unsupported, message).with_hint("upgrade cowdisk"));
    }
    let superblock: SuperblockRecord = record::read(root, layout::SUPERBLOCK, record::RECORD_BYTES_MAX)?;
    if superblock.version == 0 || !is_uuid(&superblock.uuid) {
        return Err(Error::new(ErrorKind::Corrupt, format!("{file}: not a valid superblock")));
    }
    Ok(Identity { uuid: superblock.uuid, version: superblock.version })
}

/// Whether a folder whose superblock is missing or damaged is a store all the same: it has all folders of one, and
/// something in them. (What an interrupted `init` leaves has nothing in them.)
pub(super) fn is_store_without(root: &Dir) -> bool {
    let names = |folder: &str| root.open_dir(folder).and_then(|dir| dir.names());
    let folders: Vec<_> = layout::FOLDERS.iter().map(|folder| (*folder, names(folder))).collect();
    folders.iter().all(|(_, names)| names.is_ok())
        && folders.iter().any(|(folder, names)| {
            *folder != layout::TMP && names.as_ref().is_ok_and(|names| !names.is_empty())
        })
}

/// Writes the superblock of a store anew.
pub(super) fn rewrite(tmp: &Dir, root: &Dir, identity: &Identity, _lock: &StoreLock) -> Result<()> {
    let superblock = SuperblockRecord {
        magic: MAGIC.to_owned(),
        version: identity.version,
        uuid: identity.uuid.clone(),
        created: Timestamp::now(),
    };
    atomic::replace_file(tmp, root, layout::SUPERBLOCK, &record::encode(&superblock)?)
}

/// Whether `uuid` can be that of a store.
pub(super) fn is_uuid(uuid: &str) -> bool {
    hex::decode(uuid).is_some_and(|bytes| bytes.len() == UUID_BYTES)
}

/// Makes a store in a folder that is absent or empty. The superblock comes last: before it there is no store.
pub(super) fn init(host: &Arc<dyn Host>, path: &Path) -> Result<()> {
    let shown = || format!("make a store in {}", path.display());
    let (root, made) = open_or_make(host, path, MODE_STORE).context(shown)?;
    check_empty(&root)?;
    if let Err(error) = host_fs::check(&root) {
        if let Some((parent, name)) = made {
            // Of an empty folder of our own; nothing is lost if it stays.
            let _ = parent.remove_dir(&name);
        }
        return Err(error.context(shown()));
    }
    let _lock = StoreLock::wait(&root)?;
    if root.has(layout::SUPERBLOCK)? {
        return Err(exists(&root));
    }
    // Of an `init` that a crash has cut short.
    for name in root.names()? {
        if host_fs::is_probe(&name) && atomic::is_dead(&root, &name)? {
            root.unlink(&name)?;
        }
    }
    root.set_mode(MODE_STORE)?;
    for folder in layout::FOLDERS {
        if !root.has(folder)? {
            root.make_dir(folder)?;
        }
    }
    root.sync()?;
    let superblock = SuperblockRecord {
        magic: MAGIC.to_owned(),
        version: VERSION,
        uuid: atomic::random_hex(UUID_BYTES)?,
        created: Timestamp::now(),
    };
    let tmp = root.open_dir(layout::TMP)?;
    record::draft(&tmp, "superblock", &superblock)?.commit(&root, layout::SUPERBLOCK)?;
    sync_parent(host, path)
}

/// Opens a folder. If it is missing, it is made first, with those above it that are missing too, all of them durably;
/// then what is returned besides says where.
fn open_or_make(host: &Arc<dyn Host>, path: &Path, mode: u32) -> Result<(Dir, Option<(Dir, String)>)> {
    let missing = match Dir::open_path_on(host.clone(), path) {
        Err(error) if error.kind() == ErrorKind::NotFound => error,
        other => return Ok((other?, None)),
    };
    // Such a path ends in `..` or is a link to nothing.
    let Some(name) = path.file_name().filter(|_| path.symlink_metadata().is_err()) else {
        return Err(missing);
    };
    let name = name.to_str().ok_or_else(|| {
        Error::new(ErrorKind::Invalid, format!("folder {}: a new one's name must be UTF-8", path.display()))
    })?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (parent, _) = open_or_make(host, parent, MODE_PARENT)?;
    match parent.make_dir_with_mode(name, mode) {
        // By somebody else in this moment.
        Err(error) if error.kind() == ErrorKind::Exists => {
            return Ok((Dir::open_path_on(host.clone(), path)?, None));
        }
        other => other?,
    }
    parent.sync()?;
    Ok((Dir::open_path_on(host.clone(), path)?, Some((parent, name.to_owned()))))
}

fn exists(root: &Dir) -> Error {
    Error::new(ErrorKind::Exists, format!("{}: a cowdisk store already", root.path().display()))
}

/// Refuses a folder that holds anything but what an interrupted `init` may have left.
fn check_empty(root: &Dir) -> Result<()> {
    let ours = |name: &str| {
        layout::FOLDERS.contains(&name)
            || [layout::LOCK, "lost+found"].contains(&name)
            || host_fs::is_probe(name)
    };
    let names = root.names()?;
    if names.iter().any(|name| name == layout::SUPERBLOCK) {
        return Err(exists(root));
    }
    let foreign = names.iter().find(|name| !ours(name));
    let filled = names.iter().filter(|name| layout::FOLDERS.contains(&name.as_str()) && *name != layout::TMP);
    let mut filled = filled.filter(|name| {
        let inner = root.open_dir(name).and_then(|dir| dir.names());
        !inner.is_ok_and(|inner| inner.is_empty())
    });
    if let Some(name) = foreign.or_else(|| filled.next()) {
        let message = format!("{}: not empty (it holds {name:?})", root.path().display());
        return Err(Error::new(ErrorKind::Invalid, message).with_hint("name a new or an empty folder"));
    }
    Ok(())
}

/// Makes the store's own name durable.
fn sync_parent(host: &Arc<dyn Host>, path: &Path) -> Result<()> {
    let path = path.canonicalize().context(|| format!("find {}", path.display()))?;
    match path.parent() {
        Some(parent) => Dir::open_path_on(host.clone(), parent)?.sync(),
        None => Ok(()),
    }
}
