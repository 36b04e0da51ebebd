//! The record that makes a folder a store, and how a folder becomes one.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::dir::Dir;
use super::lock::StoreLock;
use super::timestamp::Timestamp;
use super::{atomic, hex, host_fs, layout, record};
use crate::error::{Context, Error, ErrorKind, Result};

const MAGIC: &str = "cowdisk-store";
/// The version that this code writes, and the newest that it reads.
const VERSION: u32 = 1;
const UUID_BYTES: usize = 16;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SuperblockRecord {
    magic: String,
    version: u32,
    uuid: String,
    created: Timestamp,
}

/// What the superblock of every version has: read first, so that a newer store is told from a damaged one.
#[derive(Deserialize)]
struct AnyVersion {
    magic: String,
    version: u32,
}

/// Reads and checks the superblock; returns the store's uuid.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is none.
pub(super) fn read(root: &Dir) -> Result<String> {
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
    let uuid_ok = hex::decode(&superblock.uuid).is_some_and(|bytes| bytes.len() == UUID_BYTES);
    if superblock.version == 0 || !uuid_ok {
        return Err(Error::new(ErrorKind::Corrupt, format!("{file}: not a valid superblock")));
    }
    Ok(superblock.uuid)
}

/// Makes a store in a folder that is absent or empty. The superblock comes last: before it there is no store.
pub(super) fn init(path: &Path) -> Result<()> {
    let shown = || format!("make a store in {}", path.display());
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.exists()) {
        std::fs::DirBuilder::new().recursive(true).create(parent).context(shown)?;
    }
    let made = match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => true,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(Error::io(shown(), error)),
    };
    let root = Dir::open_path(path).context(shown)?;
    check_empty(&root)?;
    if let Err(error) = host_fs::check(&root) {
        if made {
            // Of an empty folder of our own; nothing is lost if it stays.
            let _ = std::fs::remove_dir(path);
        }
        return Err(error.context(shown()));
    }
    let _lock = StoreLock::wait(&root)?;
    if root.has(layout::SUPERBLOCK)? {
        return Err(exists(&root));
    }
    rustix::fs::fchmod(&root, rustix::fs::Mode::from_raw_mode(0o700)).context(shown)?;
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
    sync_parent(path)
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
fn sync_parent(path: &Path) -> Result<()> {
    let path = path.canonicalize().context(|| format!("find {}", path.display()))?;
    match path.parent() {
        Some(parent) => Dir::open_path(parent)?.sync(),
        None => Ok(()),
    }
}
