//! Disks in use: opened with the first handle, shared by all handles, closed after the last.
//!
//! Opening and closing take as long as the host's disk takes, and no lock is held meanwhile: only who wants the very
//! disk that is being opened or closed waits for it.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use super::passthrough::{Passthrough, ServedBy};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::LayerId;
use crate::overlay::CommitCounts;
use crate::store::{Disk, DiskName, ObjectName};

/// What tells one disk from all others, past ones included.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DiskKey {
    /// The instance.
    pub instance: ObjectName,
    /// Which of its disks.
    pub disk: DiskName,
    /// The instance's id.
    pub id: LayerId,
}

impl std::fmt::Display for DiskKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.instance, self.disk)
    }
}

/// A disk in use.
#[derive(Debug)]
pub struct OpenDisk {
    key: DiskKey,
    disk: Disk,
    /// Whether something was written since the last flush began; only the background flush asks. It is set when a
    /// change has *ended*: set at its beginning only, a flush that runs beside the change would clear it without making
    /// the change durable. A change sees that it is clear, or the flush that clears it covers the change: each side
    /// has a fence between the flag and the disk.
    dirty: AtomicBool,
    /// Decided with the first open file.
    served_by: OnceLock<ServedBy>,
}

impl OpenDisk {
    /// Which it is.
    pub fn key(&self) -> &DiskKey {
        &self.key
    }

    /// The disk, to read from.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Changes the disk. What it changes, even if it fails, the next background flush makes durable.
    pub fn change<R>(&self, change: impl FnOnce(&Disk) -> R) -> R {
        let result = change(&self.disk);
        fence(Ordering::SeqCst);
        // Looked at first: a store to a line that every writer shares costs more than a load.
        if !self.dirty.load(Ordering::Relaxed) {
            self.dirty.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// Those of the disk; it then refuses writes until it is opened again.
    pub fn flush(&self) -> Result<()> {
        self.dirty.store(false, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.disk.flush().inspect_err(|error| {
            // A failed sync stays failed until the disk is opened again; only for want of room is it worth another try.
            if error.kind() == ErrorKind::NoSpace {
                self.dirty.store(true, Ordering::Relaxed);
            }
        })
    }

    fn flush_if_dirty(&self) -> Result<()> {
        let written = self.dirty.load(Ordering::Relaxed) || self.disk.was_changed_by_others();
        if written { self.flush() } else { Ok(()) }
    }

    fn checkpoint_if_due(&self) -> Result<()> {
        if self.disk.checkpoint_due() { self.disk.checkpoint() } else { Ok(()) }
    }
}

#[derive(Debug)]
enum State {
    /// Some thread opens it.
    Opening,
    Open {
        disk: Arc<OpenDisk>,
        /// Handles that share it: at least 1, unless the kernel cannot be told to let go of its file.
        handles: usize,
    },
    /// The last handle is gone; some thread closes it.
    Closing,
}

/// All disks in use.
#[derive(Debug, Default)]
pub struct OpenDisks {
    /// Guards which disks are open and how many handles each has. Never held while a disk is read, written, opened or
    /// closed.
    states: Mutex<HashMap<DiskKey, State>>,
    /// A disk was opened or closed.
    changed: Condvar,
    /// Guards the sum of what the disks that are closed now had done; held for an instant.
    closed: Mutex<CommitCounts>,
    /// Guards why disks could not be opened when somebody last tried; held for an instant.
    refused: Mutex<BTreeMap<String, String>>,
    /// How disks are left to the kernel, if they are.
    passthrough: OnceLock<Arc<dyn Passthrough>>,
}

/// Most disks of which is kept why they could not be opened.
const REFUSED_MAX: usize = 1000;

/// What is known of a disk in use, or of one that could not be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFigures {
    /// `INSTANCE/DISK`.
    pub name: String,
    /// What becomes of it.
    pub state: DiskState,
    /// Handles that share it.
    pub handles: usize,
    /// Bytes of the disk; 0 if it is not open.
    pub size: u64,
    /// Runs of blocks that changed since the last commit.
    pub uncommitted_runs: usize,
    /// By whom its reads and writes are served.
    pub served_by: ServedBy,
}

/// What becomes of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// It is being opened or closed.
    Changing,
    /// It serves.
    Open,
    /// A sync of the host's disk has failed: it refuses writes until it is opened again.
    Latched,
    /// It could not be opened when somebody last tried, for this reason.
    Refused(String),
}

/// A disk that this thread opens or closes. Dropped, even by a panic, it leaves the disk closed and lets others try.
struct InChange<'a> {
    disks: &'a OpenDisks,
    key: DiskKey,
}

impl InChange<'_> {
    /// The disk is open, with one handle.
    fn end_open(self, disk: &Arc<OpenDisk>) {
        let open = State::Open { disk: Arc::clone(disk), handles: 1 };
        self.disks.states.lock().insert(self.key.clone(), open);
    }

    /// The disk is made durable, and waits for its next handle: nobody else could open it, for its lock is held.
    fn stay_open(self, disk: OpenDisk) -> Result<()> {
        let flushed = disk.flush().context(|| format!("flush {}", self.key));
        let open = State::Open { disk: Arc::new(disk), handles: 0 };
        self.disks.states.lock().insert(self.key.clone(), open);
        flushed
    }
}

impl Drop for InChange<'_> {
    fn drop(&mut self) {
        let mut states = self.disks.states.lock();
        if let Some(State::Opening | State::Closing) = states.get(&self.key) {
            states.remove(&self.key);
        }
        drop(states);
        self.disks.changed.notify_all();
    }
}

impl OpenDisks {
    /// Has disks left to the kernel from now on. To be called once, before any is opened.
    pub fn pass_through(&self, passthrough: Arc<dyn Passthrough>) {
        // A second one would not know what the first has done.
        let _ = self.passthrough.set(passthrough);
    }

    /// Whether any disk may be left to the kernel.
    pub fn can_pass(&self) -> bool {
        self.passthrough.get().is_some()
    }

    /// By whom a disk is served that a file has been opened of. Whoever may have to close it in our place already knows of
    /// that file, so no disk is left to the kernel that nobody will take back.
    pub fn served_by<'a>(&self, open: &'a OpenDisk) -> &'a ServedBy {
        open.served_by.get_or_init(|| {
            let Some(passthrough) = self.passthrough.get() else { return ServedBy::Daemon(None) };
            match open.disk.whole_file().and_then(|file| passthrough.pass(&open.key, file)) {
                Ok(backing) => {
                    open.disk.share();
                    ServedBy::Kernel(backing)
                }
                Err(error) => {
                    log::info!("{}: not left to the kernel: {error}", open.key);
                    ServedBy::Daemon(Some(error.to_string()))
                }
            }
        })
    }

    /// By whom an earlier process had a disk served.
    fn served_before(&self, key: &DiskKey) -> Result<ServedBy> {
        let Some(passthrough) = self.passthrough.get() else { return Ok(ServedBy::Daemon(None)) };
        let passed = passthrough.passed(key)?;
        let by_us = || ServedBy::Daemon(Some("it was opened by a process before this one".to_owned()));
        Ok(passed.map_or_else(by_us, ServedBy::Kernel))
    }

    /// Nobody has the disk open any more, and it could not be opened to be closed.
    pub fn give_up(&self, key: &DiskKey) {
        if let Some(passthrough) = self.passthrough.get()
            && let Err(error) = passthrough.end(key)
        {
            log::warn!("{key}: the kernel keeps its file until the end of the mount: {error}");
        }
    }

    /// The disk of `key` for one more handle; opens it with `open` if it is not open. Waits while another thread opens
    /// or closes it. `is_kept` says that an earlier process had it open: it may hold what is not flushed, and `open` is told
    /// whether the kernel serves it.
    ///
    /// # Errors
    /// Those of `open`, and if by whom it was served cannot be found out.
    pub fn acquire(
        &self,
        key: &DiskKey,
        is_kept: bool,
        open: impl FnOnce(bool) -> Result<Disk>,
    ) -> Result<Arc<OpenDisk>> {
        let mut states = self.states.lock();
        loop {
            match states.get_mut(key) {
                Some(State::Open { disk, handles }) => {
                    *handles += 1;
                    return Ok(Arc::clone(disk));
                }
                Some(State::Opening | State::Closing) => self.changed.wait(&mut states),
                None => break,
            }
        }
        states.insert(key.clone(), State::Opening);
        drop(states);
        let in_change = InChange { disks: self, key: key.clone() };
        let served_by = if is_kept { Some(self.served_before(key)?) } else { None };
        let by_kernel = served_by.as_ref().is_some_and(|served_by| served_by.backing().is_some());
        let opened = open(by_kernel).inspect_err(|error| self.note_refused(key, error))?;
        self.refused.lock().remove(&key.to_string());
        let served_by = served_by.map_or_else(OnceLock::new, OnceLock::from);
        let dirty = AtomicBool::new(is_kept);
        let disk = Arc::new(OpenDisk { key: key.clone(), disk: opened, dirty, served_by });
        in_change.end_open(&disk);
        Ok(disk)
    }

    /// Calls `look`, which must not wait for anything, with the disk of `key` if it is open.
    pub fn look<R>(&self, key: &DiskKey, look: impl FnOnce(&OpenDisk) -> R) -> Option<R> {
        match self.states.lock().get(key) {
            Some(State::Open { disk, .. }) => Some(look(disk)),
            Some(State::Opening | State::Closing) | None => None,
        }
    }

    /// Gives up one handle. The last one closes the disk, which takes as long as making it durable.
    ///
    /// # Errors
    /// Those of closing it. It is closed all the same.
    pub fn release(&self, disk: Arc<OpenDisk>) -> Result<()> {
        let mut states = self.states.lock();
        let Some(state) = states.get_mut(&disk.key) else {
            return self.put(disk);
        };
        let shared = match state {
            State::Open { handles, .. } if *handles > 1 => {
                *handles -= 1;
                None
            }
            State::Open { .. } => match std::mem::replace(state, State::Closing) {
                State::Open { disk, .. } => Some(disk),
                State::Opening | State::Closing => None,
            },
            State::Opening | State::Closing => None,
        };
        drop(states);
        if let Some(shared) = shared {
            // Not the last: the caller's is still there.
            drop(shared);
        }
        self.put(disk)
    }

    /// Lets go of a disk: whoever is the last to do so closes it.
    pub(super) fn put(&self, disk: Arc<OpenDisk>) -> Result<()> {
        let Some(last) = Arc::into_inner(disk) else { return Ok(()) };
        let closing = InChange { disks: self, key: last.key.clone() };
        if let (Some(ServedBy::Kernel(_)), Some(passthrough)) = (last.served_by.get(), self.passthrough.get())
            && let Err(error) = passthrough.end(&last.key)
        {
            log::warn!("{}: stays open, for the kernel keeps its file: {error}", last.key);
            return closing.stay_open(last);
        }
        self.closed.lock().add(last.disk.commit_counts());
        last.disk.close().context(|| format!("close {}", closing.key))
    }

    /// Calls `work` for every open disk, one after another; returns what went wrong. A disk is held only during its own
    /// turn: whoever releases another one meanwhile closes it at once, and can open it again.
    fn for_each(&self, work: impl Fn(&OpenDisk) -> Result<()>) -> Vec<Error> {
        let keys: Vec<DiskKey> = self.states.lock().keys().cloned().collect();
        let mut errors = Vec::new();
        for key in keys {
            let Some(disk) = self.open_now(&key) else { continue };
            errors.extend(work(&disk).context(|| key.to_string()).err());
            errors.extend(self.put(disk).err());
        }
        errors
    }

    /// The disk of `key` if it is open. To be [`put`](Self::put) back.
    fn open_now(&self, key: &DiskKey) -> Option<Arc<OpenDisk>> {
        match self.states.lock().get(key) {
            Some(State::Open { disk, .. }) => Some(Arc::clone(disk)),
            Some(State::Opening | State::Closing) | None => None,
        }
    }

    fn note_refused(&self, key: &DiskKey, error: &Error) {
        let mut refused = self.refused.lock();
        if refused.len() < REFUSED_MAX && error.kind() != ErrorKind::NotFound {
            refused.insert(key.to_string(), error.to_string());
        }
    }

    /// Every disk in use, and those that could not be opened, by name; and what all disks have committed so far. Waits for
    /// nobody's I/O and keeps no disk open.
    pub fn figures(&self) -> (Vec<DiskFigures>, CommitCounts) {
        let mut counts = *self.closed.lock();
        let refused = self.refused.lock().clone().into_iter().map(|(name, why)| DiskFigures {
            name,
            state: DiskState::Refused(why),
            handles: 0,
            size: 0,
            uncommitted_runs: 0,
            served_by: ServedBy::Daemon(None),
        });
        let mut disks: Vec<DiskFigures> = refused.collect();
        for (key, state) in self.states.lock().iter() {
            let mut figures = DiskFigures {
                name: key.to_string(),
                state: DiskState::Changing,
                handles: 0,
                size: 0,
                uncommitted_runs: 0,
                served_by: ServedBy::Daemon(None),
            };
            if let State::Open { disk, handles } = state {
                if let Some(served_by) = disk.served_by.get() {
                    figures.served_by = served_by.clone();
                }
                let disk = disk.disk();
                counts.add(disk.commit_counts());
                figures.state = if disk.is_latched() { DiskState::Latched } else { DiskState::Open };
                (figures.handles, figures.size) = (*handles, disk.size());
                figures.uncommitted_runs = disk.uncommitted_runs();
            }
            disks.push(figures);
        }
        disks.sort_by(|one, other| one.name.cmp(&other.name));
        (disks, counts)
    }

    /// Flushes every disk that was written since its last flush.
    pub fn flush_dirty(&self) -> Vec<Error> {
        self.for_each(OpenDisk::flush_if_dirty)
    }

    /// Does the housekeeping of every disk that asks for it.
    pub fn checkpoint_due(&self) -> Vec<Error> {
        self.for_each(OpenDisk::checkpoint_if_due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::PlainDisk;

    fn key(instance: &str) -> DiskKey {
        DiskKey { instance: instance.parse().unwrap(), disk: DiskName::Root, id: LayerId::random().unwrap() }
    }

    /// A disk of 1 MiB.
    fn disk() -> Disk {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let storage = crate::storage::FileStorage::new(file, "disk.raw");
        Disk::from(PlainDisk::open("web/disk", Box::new(storage)).unwrap())
    }

    /// The flag was set only before a write: a flush that ran beside the write cleared it, and the write waited for the
    /// next one to be made durable.
    #[test]
    fn a_write_that_ends_after_a_flush_has_begun_is_left_to_the_next_flush() {
        let disks = OpenDisks::default();
        let open = disks.acquire(&key("web"), false, |_| Ok(disk())).unwrap();
        open.change(|disk| disk.write_at(0, b"first")).unwrap();
        open.change(|disk| {
            open.flush().unwrap();
            disk.write_at(512, b"second")
        })
        .unwrap();
        assert!(open.dirty.load(Ordering::Relaxed));
        open.flush_if_dirty().unwrap();
        assert!(!open.dirty.load(Ordering::Relaxed));
        disks.release(open).unwrap();
    }

    /// The background flush held all disks from its beginning to its end, so that closing one waited for the flushes of
    /// all others.
    #[test]
    fn a_disk_is_closed_and_opened_again_while_the_background_flushes_another() {
        let disks = OpenDisks::default();
        let keys = [key("web"), key("db")];
        for key in &keys {
            disks.acquire(key, false, |_| Ok(disk())).unwrap();
        }
        let turns = std::cell::RefCell::new(Vec::new());
        let errors = disks.for_each(|open| {
            if turns.borrow().is_empty() {
                let other = keys.iter().find(|key| **key != open.key).unwrap();
                disks.release(disks.open_now(other).unwrap()).unwrap();
                let opened_anew = std::cell::Cell::new(false);
                let again = |_| {
                    opened_anew.set(true);
                    Ok(disk())
                };
                disks.acquire(other, false, again).unwrap();
                assert!(opened_anew.get(), "it was closed");
            }
            turns.borrow_mut().push(open.key.clone());
            Ok(())
        });
        assert!(errors.is_empty());
        assert_eq!(turns.borrow().len(), 2);
    }

    /// A panic left the disk in the state of being opened: whoever wanted it later waited forever.
    #[test]
    fn a_panic_while_a_disk_is_opened_leaves_it_to_the_next_who_wants_it() {
        let disks = OpenDisks::default();
        let key = key("web");
        let panicking = || disks.acquire(&key, false, |_| panic!("on purpose")).is_ok();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(panicking)).unwrap_err();
        let open = disks.acquire(&key, false, |_| Ok(disk())).unwrap();
        disks.release(open).unwrap();
        assert!(disks.states.lock().is_empty());
    }
}
