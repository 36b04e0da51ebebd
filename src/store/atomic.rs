//! How anything appears in, changes in or leaves the store: the only file that renames or writes whole files.
//!
//! - *Appear*: a draft (a file or a folder) is made in `tmp/`, its contents are synced, it is renamed to its place, and
//!   the place's folder is synced. *Replace* is the same over an existing file.
//! - *Leave*: the object is renamed into `tmp/`, both folders are synced, then it is deleted.
//!
//! So a crash at any point leaves the old or the new state, and besides it at most leftovers in `tmp/`.
//!
//! **Live and dead leftovers.** Whoever has something in `tmp/` holds its flock (of the file, or of the folder itself)
//! until it is renamed or deleted. The kernel drops the flock with the process, so an entry of `tmp/` whose flock is
//! free is dead and is swept. An entry is born without a flock for a moment; [`Draft`] therefore looks, once it has the
//! flock, whether the entry is still there, and makes another one if a sweeper was faster.
//!
//! **Several steps.** A change of more than one object keeps something of its own in `tmp/` from before its first step
//! is durable until after its last one. What it leaves behind when it dies is the sign that references must be counted;
//! [`sweep`] has that done before it removes the sign. So it is where a step fails: the sign stays until a sweep, which
//! whoever failed begins at once.

use std::fs::File;

use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::dir::{Dir, MODE_PRIVATE};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{FileStorage, Storage};

/// How often a draft is made again because a sweeper took it. One is already rare.
const DRAFT_ATTEMPTS: usize = 100;

/// Something being made in `tmp/`. Deleted when dropped before it is committed, unless it is a sign.
pub(super) struct Draft<'a> {
    tmp: &'a Dir,
    name: String,
    /// Whether it is deleted when dropped.
    armed: bool,
}

impl<'a> Draft<'a> {
    /// Makes an entry of `tmp` by `make`, which opens what it has made, and takes its flock.
    fn new<T: std::os::fd::AsFd>(
        tmp: &'a Dir,
        kind: &str,
        make: impl Fn(&Dir, &str) -> Result<T>,
    ) -> Result<(Self, T)> {
        for _ in 0..DRAFT_ATTEMPTS {
            let name = temporary_name(kind)?;
            let opened = match make(tmp, &name) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                other => other?,
            };
            let draft = Self { tmp, name, armed: true };
            lock_exclusive(&opened).context(|| format!("lock {}", tmp.path_of(&draft.name).display()))?;
            let stat = rustix::fs::fstat(&opened).context(|| "look up a temporary object")?;
            if stat.st_nlink > 0 {
                return Ok((draft, opened));
            }
        }
        Err(Error::new(
            ErrorKind::Busy,
            format!("{}: temporary objects keep vanishing", tmp.path().display()),
        ))
    }

    /// Renames the draft to its place and makes that durable. The contents must be synced. After an error the place is
    /// as it was before, or the message says what may be there.
    fn publish(mut self, parent: &Dir, name: &str, flags: RenameFlags) -> Result<()> {
        let was_armed = self.armed;
        self.place(parent, name, flags)?;
        let Err(error) = parent.sync() else { return Ok(()) };
        if !flags.contains(RenameFlags::NOREPLACE) {
            return Err(error.context("replaced, but a crash may bring the old one back"));
        }
        Err(self.take_back(parent, name, was_armed, error))
    }

    /// Renames the draft to its place, which the caller makes durable.
    fn place(&mut self, parent: &Dir, name: &str, flags: RenameFlags) -> Result<()> {
        self.tmp.rename(&self.name, parent, name, flags)?;
        self.armed = false;
        Ok(())
    }

    /// Takes what was placed, and could not be made durable for `error`, out of its place and deletes it, unless it is to be
    /// a sign. Answers what to tell about it.
    fn take_back(&mut self, parent: &Dir, name: &str, delete: bool, error: Error) -> Error {
        match parent.rename(name, self.tmp, &self.name, RenameFlags::NOREPLACE) {
            Ok(()) => {
                // What a crash may bring back must not be deleted in part. The next sweep syncs first, too.
                self.armed = delete && self.tmp.sync().is_ok();
                error
            }
            Err(undo) => error.context(format!("made {name}, but a crash may undo it ({undo})")),
        }
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = self.tmp.remove_tree(&self.name)
        {
            log::warn!("{error}; it is removed when the store is next opened");
        }
    }
}

/// A folder being made.
pub(super) struct DraftDir<'a> {
    // Declared first, dropped first: the entry is deleted while the flock is still held.
    draft: Draft<'a>,
    dir: Dir,
}

impl<'a> DraftDir<'a> {
    /// Makes an empty folder in `tmp`. `kind` begins its name, for people who look.
    pub(super) fn new(tmp: &'a Dir, kind: &str) -> Result<Self> {
        let (draft, dir) = Draft::new(tmp, kind, |tmp, name| {
            tmp.make_dir(name)?;
            tmp.open_dir(name)
        })?;
        Ok(Self { draft, dir })
    }

    /// The folder, to make files in.
    pub(super) fn dir(&self) -> &Dir {
        &self.dir
    }
}

/// Renames each folder to its name in `parent`, none of which must exist, and makes all of that durable at once. The folders and
/// each file in them must be synced. After an error none of them is in its place, or the message says which may be.
pub(super) fn commit_all(mut drafts: Vec<(DraftDir<'_>, &str)>, parent: &Dir) -> Result<()> {
    let placed = drafts
        .iter_mut()
        .try_for_each(|(draft, name)| draft.draft.place(parent, name, RenameFlags::NOREPLACE))
        .and_then(|()| parent.sync());
    let Err(mut error) = placed else { return Ok(()) };
    for (draft, name) in drafts.iter_mut().filter(|(draft, _)| !draft.draft.armed) {
        error = draft.draft.take_back(parent, name, true, error);
    }
    Err(error)
}

/// A file being made.
pub(super) struct DraftFile<'a> {
    draft: Draft<'a>,
    file: FileStorage,
}

impl<'a> DraftFile<'a> {
    /// Makes an empty file in `tmp`. `kind` begins its name, for people who look.
    pub(super) fn new(tmp: &'a Dir, kind: &str) -> Result<Self> {
        let (draft, file) = Draft::new(tmp, kind, |tmp, name| tmp.create_file(name, MODE_PRIVATE))?;
        Ok(Self { draft, file })
    }

    /// The file, to write to.
    pub(super) fn file(&self) -> &FileStorage {
        &self.file
    }

    /// Writes the whole contents and syncs them.
    pub(super) fn write_all(&self, bytes: &[u8]) -> Result<()> {
        self.file.write_at(0, bytes)?;
        self.file.sync_all()
    }

    /// Makes the draft's name in `tmp/` durable: from now on a crash, and an error, leave it there as a sign.
    pub(super) fn make_sign(mut self) -> Result<Self> {
        self.draft.tmp.sync()?;
        self.draft.armed = false;
        Ok(self)
    }

    /// Renames the file to `name` in `parent`, which must not exist. The file must be synced.
    pub(super) fn commit(self, parent: &Dir, name: &str) -> Result<()> {
        self.draft.publish(parent, name, RenameFlags::NOREPLACE)
    }

    /// Renames the file to `name` in `parent`, in place of what is there. The file must be synced.
    pub(super) fn replace(self, parent: &Dir, name: &str) -> Result<()> {
        self.draft.publish(parent, name, RenameFlags::empty())
    }
}

/// Replaces or makes `parent/name` with exactly `bytes`.
pub(super) fn replace_file(tmp: &Dir, parent: &Dir, name: &str, bytes: &[u8]) -> Result<()> {
    let draft = DraftFile::new(tmp, "file")?;
    draft.write_all(bytes)?;
    draft.replace(parent, name)
}

/// Moves a synced file out of a draft, in place of the one of the same name in `to`, and makes that durable.
pub(super) fn move_over(draft: &Dir, to: &Dir, name: &str) -> Result<()> {
    draft.rename(name, to, name, RenameFlags::empty())?;
    to.sync()
}

/// An object on its way out: it has left its place for good and is deleted by [`Removal::finish`], or, if that does
/// not happen, by the next sweep: until then it is the sign that something is to be done.
pub(super) struct Removal<'a> {
    draft: Draft<'a>,
    _flock: Option<File>,
}

impl<'a> Removal<'a> {
    /// Takes `parent/name` away. The caller holds the store's lock and has checked that nobody uses the object. After an
    /// error it is in its place, or left to the next sweep.
    pub(super) fn begin(tmp: &'a Dir, parent: &Dir, name: &str) -> Result<Self> {
        let hidden = temporary_name("removed")?;
        parent.rename(name, tmp, &hidden, RenameFlags::NOREPLACE)?;
        let draft = Draft { tmp, name: hidden, armed: false };
        // Only a regular file or a folder can be held; the store has nothing else.
        let flock = match claim(tmp, &draft.name)? {
            Claim::Dead(file) => file,
            Claim::Live | Claim::Gone => None,
        };
        tmp.sync()?;
        parent.sync()?;
        Ok(Self { draft, _flock: flock })
    }

    /// Deletes the object.
    pub(super) fn finish(self) -> Result<()> {
        self.draft.tmp.remove_tree(&self.draft.name)
    }
}

/// Removes what dead processes left in `tmp`. Before that, and only if there is anything, `recount` is called to remove
/// what no record refers to; it answers whether it could. The caller holds the store's lock.
pub(super) fn sweep(tmp: &Dir, recount: impl FnOnce() -> Result<bool>) -> Result<()> {
    let mut dead = Vec::new();
    for name in tmp.names()? {
        if let Claim::Dead(flock) = claim(tmp, &name)? {
            dead.push((name, flock));
        }
    }
    if dead.is_empty() {
        return Ok(());
    }
    // A remover may have died between its rename and the sync: were what it removed deleted in part, a crash could bring
    // the rest back.
    tmp.sync()?;
    if !recount()? {
        return Ok(());
    }
    for (name, _flock) in &dead {
        log::info!("removing {}, left by a process that has died", tmp.path_of(name).display());
        tmp.remove_tree(name)?;
    }
    tmp.sync()
}

/// Whether an entry of `tmp` is what a dead process left.
pub(super) fn is_dead(tmp: &Dir, name: &str) -> Result<bool> {
    Ok(matches!(claim(tmp, name)?, Claim::Dead(_)))
}

/// Whether somebody is at work on an entry of `tmp/`.
enum Claim {
    /// Nobody was; now the caller is, for as long as the file is open (`None`: a thing that cannot be locked).
    Dead(Option<File>),
    /// Its maker lives.
    Live,
    /// It has just been renamed or deleted.
    Gone,
}

fn claim(tmp: &Dir, name: &str) -> Result<Claim> {
    let shown = || format!("look at {}", tmp.path_of(name).display());
    let fd = match tmp.open(name, OFlags::RDONLY, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(Claim::Gone),
        Err(Errno::LOOP | Errno::NXIO | Errno::NODEV) => return Ok(Claim::Dead(None)),
        Err(errno) => return Err(Error::io(shown(), errno.into())),
    };
    match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) if rustix::fs::fstat(&fd).context(shown)?.st_nlink == 0 => Ok(Claim::Gone),
        Ok(()) => Ok(Claim::Dead(Some(fd.into()))),
        Err(Errno::WOULDBLOCK) => Ok(Claim::Live),
        Err(errno) => Err(Error::io(shown(), errno.into())),
    }
}

/// Waits for an exclusive flock.
pub(super) fn lock_exclusive(file: &impl std::os::fd::AsFd) -> rustix::io::Result<()> {
    rustix::io::retry_on_intr(|| rustix::fs::flock(file, FlockOperation::LockExclusive))
}

fn temporary_name(kind: &str) -> Result<String> {
    Ok(format!("{kind}-{}", random_hex(8)?))
}

/// `bytes` random bytes as hex digits.
pub(super) fn random_hex(bytes: usize) -> Result<String> {
    let mut random = vec![0; bytes];
    getrandom::fill(&mut random)
        .map_err(|error| Error::caused(ErrorKind::Io, "get random bytes from the kernel", error))?;
    Ok(super::hex::encode(&random))
}

/// Reads a whole file of at most `bytes_max` bytes.
///
/// # Errors
/// [`ErrorKind::Corrupt`], naming the file, if it is larger.
pub(super) fn read_file(parent: &Dir, name: &str, bytes_max: usize) -> Result<Vec<u8>> {
    use std::io::Read;
    let shown = || format!("read {}", parent.path_of(name).display());
    let (file, stat) = parent.open_to_look(name)?;
    let size = usize::try_from(stat.st_size).unwrap_or(usize::MAX);
    // Room for one byte more: a read that stops before it, at the size that the file had, has seen the end.
    let mut bytes = vec![0; size.min(bytes_max) + 1];
    let count = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut *bytes)).context(shown)?;
    bytes.truncate(count);
    if count != size {
        // It has changed since, or the host gives it in pieces.
        let limit = u64::try_from(bytes_max.saturating_add(1).saturating_sub(count)).unwrap_or(u64::MAX);
        file.take(limit).read_to_end(&mut bytes).context(shown)?;
    }
    if bytes.len() > bytes_max {
        return Err(Error::new(ErrorKind::Corrupt, shown())
            .context(format!("{}: larger than {bytes_max} bytes", parent.path_of(name).display())));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    struct Scratch {
        _folder: tempfile::TempDir,
        root: Dir,
        tmp: Dir,
    }

    fn scratch() -> Scratch {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_path(folder.path()).unwrap();
        root.make_dir("tmp").unwrap();
        let tmp = root.open_dir("tmp").unwrap();
        Scratch { _folder: folder, root, tmp }
    }

    #[test]
    fn a_file_appears_whole_and_is_replaced_whole() {
        let s = scratch();
        let draft = DraftFile::new(&s.tmp, "x").unwrap();
        draft.write_all(b"one").unwrap();
        assert!(!s.root.has("x").unwrap());
        draft.commit(&s.root, "x").unwrap();
        assert_eq!(read_file(&s.root, "x", 10).unwrap(), b"one");
        let draft = DraftFile::new(&s.tmp, "x").unwrap();
        assert_eq!(draft.commit(&s.root, "x").unwrap_err().kind(), ErrorKind::Exists);
        replace_file(&s.tmp, &s.root, "x", b"two").unwrap();
        assert_eq!(read_file(&s.root, "x", 10).unwrap(), b"two");
        assert!(s.tmp.names().unwrap().is_empty());
    }

    #[test]
    fn a_file_is_read_whole_up_to_its_largest_size_and_no_larger_one() {
        let s = scratch();
        for size in [0, 1, 10] {
            let bytes = vec![b'x'; size];
            replace_file(&s.tmp, &s.root, "x", &bytes).unwrap();
            assert_eq!(read_file(&s.root, "x", 10).unwrap(), bytes);
        }
        for size in [11, 12, 100_000] {
            replace_file(&s.tmp, &s.root, "x", &vec![b'x'; size]).unwrap();
            let error = read_file(&s.root, "x", 10).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains("x: larger than 10 bytes"), "{error}");
        }
    }

    /// Of such a file the host does not tell the size beforehand; one that has grown since it was opened is read so, too.
    #[test]
    fn a_file_that_has_more_than_it_says_is_read_to_its_end() {
        let status = Dir::open_path(std::path::Path::new("/proc/self")).unwrap();
        let read = read_file(&status, "status", 1 << 20).unwrap();
        assert!(read.starts_with(b"Name:") && read.ends_with(b"\n"), "{}", read.escape_ascii());
        assert_eq!(read_file(&status, "status", 20).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    /// What had been renamed to its place stayed there, though the error said that nothing was made.
    #[test]
    fn what_cannot_be_made_durable_is_taken_back() {
        let s = scratch();
        let place = Dir::open_unsyncable(s.root.path()).unwrap();
        let draft = DraftFile::new(&s.tmp, "x").unwrap();
        draft.write_all(b"one").unwrap();
        assert!(draft.commit(&place, "x").is_err());
        assert!(commit_all(vec![(DraftDir::new(&s.tmp, "y").unwrap(), "y")], &place).is_err());
        assert!(!s.root.has("x").unwrap() && !s.root.has("y").unwrap());
        s.root.create_file("x", MODE_PRIVATE).unwrap();
        let error = replace_file(&s.tmp, &place, "x", b"two").unwrap_err();
        assert!(error.to_string().starts_with("replaced, but"), "{error}");
        assert_eq!(read_file(&s.root, "x", 10).unwrap(), b"two");
        assert!(s.tmp.names().unwrap().is_empty());
    }

    #[test]
    fn of_folders_that_are_placed_together_all_or_none_appear() {
        let s = scratch();
        let drafts = |names: [&'static str; 3]| -> Vec<_> {
            names.into_iter().map(|name| (DraftDir::new(&s.tmp, "x").unwrap(), name)).collect()
        };
        s.root.make_dir("c").unwrap();
        assert_eq!(commit_all(drafts(["a", "b", "c"]), &s.root).unwrap_err().kind(), ErrorKind::Exists);
        let place = Dir::open_unsyncable(s.root.path()).unwrap();
        assert!(commit_all(drafts(["a", "b", "d"]), &place).is_err());
        assert!(["a", "b", "d"].iter().all(|name| !s.root.has(name).unwrap()));
        assert!(s.tmp.names().unwrap().is_empty());
        commit_all(drafts(["a", "b", "d"]), &s.root).unwrap();
        assert!(["a", "b", "d"].iter().all(|name| s.root.has(name).unwrap()));
    }

    #[test]
    fn a_draft_that_is_dropped_leaves_nothing() {
        let s = scratch();
        let draft = DraftDir::new(&s.tmp, "x").unwrap();
        draft.dir().create_file("inner", MODE_PRIVATE).unwrap();
        assert_eq!(s.tmp.names().unwrap().len(), 1);
        drop(draft);
        assert!(s.tmp.names().unwrap().is_empty());
    }

    #[test]
    fn a_sweep_removes_what_is_dead_and_keeps_what_is_alive() {
        let s = scratch();
        let alive_dir = DraftDir::new(&s.tmp, "alive").unwrap();
        let alive_file = DraftFile::new(&s.tmp, "alive").unwrap();
        s.tmp.make_dir("dead-dir").unwrap();
        s.tmp.open_dir("dead-dir").unwrap().create_file("inner", MODE_PRIVATE).unwrap();
        s.tmp.create_file("dead-file", MODE_PRIVATE).unwrap();
        rustix::fs::symlinkat("/etc/passwd", &s.tmp, "dead-link").unwrap();
        sweep(&s.tmp, || Ok(true)).unwrap();
        assert_eq!(s.tmp.names().unwrap().len(), 2);
        commit_all(vec![(alive_dir, "a")], &s.root).unwrap();
        alive_file.commit(&s.root, "b").unwrap();
        assert!(s.root.has("a").unwrap() && s.root.has("b").unwrap());
    }

    #[test]
    fn references_are_counted_only_after_a_death_and_before_its_sign_goes() {
        let s = scratch();
        let counted = Cell::new(0);
        let count = |done| {
            counted.set(counted.get() + 1);
            Ok(done)
        };
        let _alive = DraftFile::new(&s.tmp, "alive").unwrap();
        sweep(&s.tmp, || count(true)).unwrap();
        assert_eq!(counted.get(), 0);
        s.tmp.create_file("dead", MODE_PRIVATE).unwrap();
        sweep(&s.tmp, || count(false)).unwrap();
        assert!(s.tmp.has("dead").unwrap(), "the sign stays as long as the count could not be made");
        sweep(&s.tmp, || count(true)).unwrap();
        assert!(!s.tmp.has("dead").unwrap());
        assert_eq!(counted.get(), 2);
    }

    #[test]
    fn a_removal_that_is_cut_short_is_finished_by_the_sweep() {
        let s = scratch();
        s.root.make_dir("object").unwrap();
        s.root.open_dir("object").unwrap().create_file("inner", MODE_PRIVATE).unwrap();
        let removal = Removal::begin(&s.tmp, &s.root, "object").unwrap();
        assert!(!s.root.has("object").unwrap());
        sweep(&s.tmp, || Ok(true)).unwrap();
        assert_eq!(s.tmp.names().unwrap().len(), 1, "the remover lives");
        let name = s.tmp.names().unwrap().remove(0);
        removal.finish().unwrap();
        assert!(!s.tmp.has(&name).unwrap());
    }
}
