//! Bases: the bytes of images and of flavors' blank disks, each stored once under the BLAKE3 of its content.
//!
//! A base is `bases/HASH/base.raw`, read-only and sparse, and a record of its size, modification time and inode number. A
//! base whose file no longer agrees with its record is not opened, for an overlay over changed bytes is a damaged disk:
//! only reading it all (`verify`) tells a copy of the right bytes from others.
//!
//! Whoever reads a base holds a shared flock of its file, so that it is not removed meanwhile.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{Gid, Uid};
use serde::{Deserialize, Serialize};

use super::atomic::{DraftDir, Removal, commit_all};
use super::check::hash_from_disk;
use super::dir::{Access, Dir, MODE_FOLDER, MODE_PRIVATE, MODE_READ_ONLY};
use super::lock::{Share, StoreLock, try_lock};
use super::progress::Progress;
use super::record::{self, RECORD_BYTES_MAX};
use super::timestamp::Timestamp;
use super::{Store, atomic, layout};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::BaseId;
use crate::storage::FileStorage;
use crate::units::check_disk_bytes;

/// Access mode of a folder in which others may look up a name that they know.
const MODE_FOLDER_LENT: u32 = 0o711;
/// What to do about a base whose bytes are wrong. A filesystem made anew has another UUID, so a flavor's is lost.
pub(super) const DAMAGED_HINT: &str =
    "importing the same image again repairs it; what a flavor made must come from a backup of the store";
/// What is said of contents that one of two readings has shown to be right.
pub(super) const READ_TWICE: &str = "its bytes are right, but one reading of them was wrong or failed";
/// What to do about that.
pub(super) const READ_TWICE_HINT: &str =
    "check the host's memory, its disk and what connects them; the base is left as it is";
/// What to do about a base whose bytes may be right, because the store was copied, say.
const TOUCHED_HINT: &str =
    "if its bytes are right, this repairs it: cowdisk image verify, or cowdisk flavor verify";

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BaseRecord {
    /// Bytes, a multiple of 512.
    size: u64,
    /// Modification time of `base.raw`, in nanoseconds since 1970.
    mtime_ns: i128,
    /// Inode number of `base.raw`: another one is another file, be it a copy.
    inode: u64,
    created: Timestamp,
    /// Whether `verify` has found other bytes than the name says.
    damaged: bool,
}

/// What can be told of a base without reading it.
#[derive(Debug)]
pub(super) enum BaseCondition {
    /// As it was stored.
    AsStored,
    /// Another file, or modified since: what has changed, and what to do. Its bytes may be right.
    Changed { what: String, hint: &'static str },
    /// Of another size, or found to have other bytes.
    Damaged { what: String, hint: &'static str },
    /// Its record is missing or damaged.
    NoRecord(Error),
}

/// A base being made: its folder in `tmp/`, and its file.
pub(super) struct BaseDraft<'a> {
    folder: DraftDir<'a>,
    file: FileStorage,
}

impl<'a> BaseDraft<'a> {
    /// An empty base.
    pub(super) fn new(tmp: &'a Dir) -> Result<Self> {
        let folder = DraftDir::new(tmp, "base")?;
        let file = folder.dir().create_file(layout::BASE_RAW, MODE_PRIVATE)?;
        Ok(Self { folder, file })
    }

    /// The file for the bytes.
    pub(super) fn file(&self) -> &FileStorage {
        &self.file
    }

    /// The folder, for tools to work in. The file's name there is [`layout::BASE_RAW`].
    pub(super) fn folder(&self) -> &Dir {
        self.folder.dir()
    }

    /// Lets an unprivileged user write the file and look it up, but do nothing else in the folder; `None`: no longer. The
    /// store's folder keeps everybody else out.
    pub(super) fn lend(&self, to: Option<(Uid, Gid)>) -> Result<()> {
        let (uid, gid) = to.unwrap_or_else(|| (rustix::process::geteuid(), rustix::process::getegid()));
        let mode = if to.is_some() { MODE_FOLDER_LENT } else { MODE_FOLDER };
        rustix::fs::fchown(&self.file, Some(uid), Some(gid))
            .context(|| format!("lend {}", self.folder().path_of(layout::BASE_RAW).display()))?;
        self.folder().set_mode(mode)
    }

    /// Makes the bytes durable and read-only and writes the record. After this the draft can be published.
    pub(super) fn seal(&self) -> Result<()> {
        self.file.set_mode(MODE_READ_ONLY)?;
        self.file.sync_all()?;
        let fingerprint = fingerprint(self.file.file())?;
        record::write_into_draft(self.folder(), layout::BASE_RECORD, &fingerprint)?.sync_all()
    }
}

impl BaseRecord {
    /// What a file looks like beside the one that was stored. What its bytes are only reading them tells.
    fn compare(&self, found: &Self) -> BaseCondition {
        let what = self.difference(found);
        if self.size != found.size || self.damaged {
            BaseCondition::Damaged { what, hint: DAMAGED_HINT }
        } else if what.is_empty() {
            BaseCondition::AsStored
        } else {
            BaseCondition::Changed { what, hint: TOUCHED_HINT }
        }
    }

    /// What is not as it was stored, for a message: each thing as it was and as it is.
    fn difference(&self, found: &Self) -> String {
        let mut changes = Vec::new();
        if self.size != found.size {
            changes.push(format!("its size was {} bytes, is {}", self.size, found.size));
        }
        if self.damaged {
            changes.push("its bytes are not those that were stored".to_owned());
        }
        if self.mtime_ns != found.mtime_ns {
            let [was, is] = [self.mtime_ns, found.mtime_ns].map(show_nanoseconds);
            changes.push(format!("its modification time was {was}, is {is}"));
        }
        if self.inode != found.inode {
            changes.push(format!("its inode number was {}, is {}", self.inode, found.inode));
        }
        changes.join("; ")
    }
}

/// Nanoseconds since 1970 as a moment, in UTC.
fn show_nanoseconds(since_1970: i128) -> String {
    let seconds = i64::try_from(since_1970.div_euclid(1_000_000_000));
    match seconds.ok().and_then(Timestamp::from_unix_seconds) {
        Some(moment) => {
            let moment = moment.to_string();
            let nanoseconds = since_1970.rem_euclid(1_000_000_000);
            format!("{}.{nanoseconds:09}Z", moment.trim_end_matches('Z'))
        }
        None => format!("{since_1970} ns after 1970"),
    }
}

/// Size, modification time and inode number of a base's file as they are now.
fn fingerprint(file: &File) -> Result<BaseRecord> {
    let metadata = file.metadata().context(|| "look up a base")?;
    let mtime_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
    let created = Timestamp::now();
    Ok(BaseRecord { size: metadata.len(), mtime_ns, inode: metadata.ino(), created, damaged: false })
}

/// What reading contents has shown.
pub(super) enum Contents {
    /// They are those of the name.
    Right,
    /// They are, but one reading has shown others, or failed.
    RightAtSecond,
    /// They are others, and their hash is this one.
    Other([u8; 32]),
}

/// Has contents hashed and compares them with the hash they are named by. Where they differ or cannot be read, they are
/// read again: what is said of a base locks out every disk over it, so it takes more than one bit that flipped on its way.
pub(super) fn compare_contents(
    name: [u8; 32],
    mut hash: impl FnMut() -> Result<[u8; 32]>,
) -> Result<Contents> {
    match hash() {
        Ok(found) if found == name => return Ok(Contents::Right),
        Err(error) if error.kind() != ErrorKind::Io => return Err(error),
        Ok(_) | Err(_) => {}
    }
    let second = hash()?;
    Ok(if second == name { Contents::RightAtSecond } else { Contents::Other(second) })
}

/// Holds a base's file, which the caller has just opened, as every reader does.
///
/// # Errors
/// [`ErrorKind::Busy`] if the base is being removed or replaced, or was between the caller's opening and now: whoever
/// replaces it holds the lock until the file has another in its place.
pub(super) fn share(id: &BaseId, file: File) -> Result<File> {
    let free = try_lock(&file, Share::Shared).context(|| format!("lock base {id}"))?;
    if !free || file.metadata().context(|| format!("look up base {id}"))?.nlink() == 0 {
        return Err(Error::new(ErrorKind::Busy, format!("base {id}: being removed or replaced")));
    }
    Ok(file)
}

impl Store {
    /// Gives a sealed draft its place, unless a base of the same content is there already; then the draft vanishes. One
    /// that is there but damaged is replaced, in an order in which there is a base at any time.
    pub(super) fn publish_base(&self, draft: BaseDraft<'_>, id: &BaseId, lock: &StoreLock) -> Result<()> {
        match self.open_base(id) {
            // Whoever gave it its place may have died before that was durable.
            Ok(_) => return self.bases.sync(),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::Corrupt => log::warn!("replacing it: {error}"),
            Err(error) => return Err(error),
        }
        if self.bases.has(&id.to_string())? {
            return self.replace_base(&draft, id, lock);
        }
        draft.folder.dir().sync()?;
        commit_all(vec![(draft.folder, &id.to_string())], &self.bases)
    }

    /// Puts the bytes and the record of a sealed draft in place of those of a damaged base. Overlays may be over it, so
    /// it must never be gone.
    fn replace_base(&self, draft: &BaseDraft<'_>, id: &BaseId, _lock: &StoreLock) -> Result<()> {
        let _held = self.hold_base(id)?;
        let folder = self.bases.open_dir(&id.to_string())?;
        // A crash after the first leaves good bytes with another modification time: `verify` mends that.
        for file in [layout::BASE_RAW, layout::BASE_RECORD] {
            atomic::move_over(draft.folder(), &folder, file)?;
        }
        Ok(())
    }

    /// Opens a base for reading. As long as the file, or a duplicate of its descriptor, is open, the base cannot be
    /// removed.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none; [`ErrorKind::Corrupt`] if its file was changed.
    pub fn open_base(&self, id: &BaseId) -> Result<File> {
        let (file, record) = self.open_base_unchecked(id)?;
        let (what, hint) = match record.compare(&fingerprint(&file)?) {
            BaseCondition::Changed { what, hint } | BaseCondition::Damaged { what, hint } => (what, hint),
            BaseCondition::AsStored | BaseCondition::NoRecord(_) => return Ok(file),
        };
        Err(Error::new(ErrorKind::Corrupt, format!("base {id}: {what}")).with_hint(hint))
    }

    /// What can be told of a base without reading it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none, or if its file is missing.
    pub(super) fn base_condition(&self, id: &BaseId) -> Result<BaseCondition> {
        let file = self.base_file(id)?;
        match self.open_base_unchecked(id) {
            Ok((_, record)) => Ok(record.compare(&fingerprint(&file)?)),
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(BaseCondition::NoRecord(error)),
            Err(error) => Err(error),
        }
    }

    /// Opens the file of a base, whatever its record says. It is held as by any other reader.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none; [`ErrorKind::Busy`] if it is being removed or replaced.
    pub(super) fn base_file(&self, id: &BaseId) -> Result<File> {
        share(id, self.bases.open_dir(&id.to_string())?.open_file(layout::BASE_RAW, Access::Read)?)
    }

    /// Writes a record for a base whose bytes are right as it is now.
    pub(super) fn accept_base(&self, id: &BaseId) -> Result<()> {
        let found = fingerprint(&self.base_file(id)?)?;
        let created = self.open_base_unchecked(id).map_or(found.created, |(_, record)| record.created);
        self.rewrite_record(id, &BaseRecord { created, ..found })
    }

    /// Notes that the bytes of a base are not what its name says: nothing opens over it any more.
    pub(super) fn mark_base_damaged(&self, id: &BaseId) -> Result<()> {
        let (_, record) = self.open_base_unchecked(id)?;
        self.rewrite_record(id, &BaseRecord { damaged: true, ..record })
    }

    fn open_base_unchecked(&self, id: &BaseId) -> Result<(File, BaseRecord)> {
        let folder = self.bases.open_dir(&id.to_string()).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("base {id}: not found")),
            _ => error,
        })?;
        // The folder appeared whole, so a file that is missing was taken away.
        let whole = |error: Error| match error.kind() {
            ErrorKind::NotFound => Error::caused(ErrorKind::Corrupt, format!("base {id}: incomplete"), error),
            _ => error,
        };
        let file = share(id, folder.open_file(layout::BASE_RAW, Access::Read).map_err(whole)?)?;
        let record: BaseRecord =
            record::read(&folder, layout::BASE_RECORD, RECORD_BYTES_MAX).map_err(whole)?;
        if check_disk_bytes(record.size).is_err() {
            let path = folder.path_of(layout::BASE_RECORD);
            return Err(Error::new(ErrorKind::Corrupt, format!("{}: not a valid record", path.display())));
        }
        Ok((file, record))
    }

    /// Bytes of a base, and bytes of the host's disk that it takes.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none.
    pub fn base_usage(&self, id: &BaseId) -> Result<(u64, u64)> {
        let (file, record) = self.open_base_unchecked(id)?;
        let metadata = file.metadata().context(|| format!("look up base {id}"))?;
        Ok((record.size, metadata.blocks() * 512))
    }

    /// Hashes a base again. If its content is what its name says, another modification time or inode number is forgiven
    /// and noted.
    pub(super) fn verify_base(&self, id: &BaseId, progress: &dyn Progress) -> Result<()> {
        let (file, record) = self.open_base_unchecked(id)?;
        let found = fingerprint(&file)?;
        if found.size != record.size {
            let message = format!("base {id}: {}", record.difference(&found));
            return Err(Error::new(ErrorKind::Corrupt, message).with_hint(DAMAGED_HINT));
        }
        // Past the host's cache: what a scrub has found on the disk must not be forgiven for what the cache still has.
        let contents = compare_contents(id.0, || hash_from_disk(&file, found.size, "verify", progress));
        match contents.context(|| format!("read base {id}"))? {
            Contents::Right => {}
            Contents::RightAtSecond => {
                let message = format!("base {id}: {READ_TWICE}");
                return Err(Error::new(ErrorKind::Io, message).with_hint(READ_TWICE_HINT));
            }
            Contents::Other(hash) => {
                self.rewrite_record(id, &BaseRecord { damaged: true, ..record })?;
                let message =
                    format!("base {id}: its bytes have changed, their hash is now {}", BaseId(hash));
                return Err(Error::new(ErrorKind::Corrupt, message)
                    .with_hint(format!("no overlay over it opens any more; {DAMAGED_HINT}")));
            }
        }
        let good = BaseRecord { created: record.created, ..found };
        if good != record {
            log::info!("base {id}: whole, but with another modification time or inode number");
            self.rewrite_record(id, &good)?;
        }
        Ok(())
    }

    fn rewrite_record(&self, id: &BaseId, record: &BaseRecord) -> Result<()> {
        let folder = self.bases.open_dir(&id.to_string())?;
        atomic::replace_file(&self.tmp, &folder, layout::BASE_RECORD, &record::encode(record)?)
    }

    /// Fails if somebody reads the base; else nobody can until the returned file is closed. `None`: it has no file.
    pub(super) fn hold_base(&self, id: &BaseId) -> Result<Option<File>> {
        let file = match self.bases.open_dir(&id.to_string()) {
            Ok(folder) => match folder.open_file(layout::BASE_RAW, Access::Read) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                other => other?,
            },
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if !try_lock(&file, Share::Exclusive).context(|| format!("lock base {id}"))? {
            return Err(Error::new(ErrorKind::Busy, format!("base {id}: open")));
        }
        Ok(Some(file))
    }

    /// Removes a base that nothing refers to and nobody reads.
    pub(super) fn remove_base(&self, id: &BaseId, lock: &StoreLock) -> Result<()> {
        let held = self.hold_base(id)?;
        self.remove_held_base(id, held, lock)
    }

    /// Removes a base that nothing refers to and that the caller holds.
    pub(super) fn remove_held_base(&self, id: &BaseId, held: Option<File>, _lock: &StoreLock) -> Result<()> {
        if !self.bases.has(&id.to_string())? {
            return Ok(());
        }
        let removed = Removal::begin(&self.tmp, &self.bases, &id.to_string())?.finish();
        drop(held);
        removed
    }
}
