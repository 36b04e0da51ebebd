//! Open files by number.
//!
//! A number names a slot and says which of the slot's successive users it belongs to, so a number that has been closed
//! is never taken for a later one. Slots come in chunks that are made once and never moved: finding one takes no lock.
//!
//! With a [`Ledger`] the numbers outlive this process: its successor knows them, and opens their files anew when they are
//! asked for.

use std::collections::HashMap;
use std::sync::OnceLock;

use parking_lot::{MappedRwLockReadGuard, Mutex, RwLock, RwLockReadGuard};

use super::errno::{Errno, Failure, Outcome};
use super::ledger::{Entry, Kept, Ledger, SLOTS};
use crate::error::Result;

/// Slots of a chunk.
const CHUNK: usize = 256;

/// Chunks; with [`CHUNK`] that is about a million open files.
const CHUNKS: usize = SLOTS as usize / CHUNK;

/// Number of an open file, as the kernel keeps it: the slot in the lower half, the use of the slot in the upper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

#[derive(Debug)]
enum Content<T> {
    /// Nothing: free, or being closed.
    Nothing,
    /// A file that an earlier process had open, and that this one has not opened yet.
    Kept(Kept),
    Open(T),
}

#[derive(Debug)]
struct Use<T> {
    /// Counts the users that the slot has had, so that an old number does not name a new file.
    count: u32,
    content: Content<T>,
}

/// Lies in a cache line of its own, so that reading from one disk does not slow another down.
#[derive(Debug)]
#[repr(align(64))]
struct Slot<T> {
    /// Guards the slot's value: held shared during each operation on the open file, exclusively to open and close it.
    used: RwLock<Use<T>>,
}

/// Slots that are made together, when the first of them is needed.
type Chunk<T> = OnceLock<Box<[Slot<T>]>>;

/// All open files.
#[derive(Debug)]
pub struct Handles<T> {
    chunks: Box<[Chunk<T>]>,
    /// Guards which slots are free. Taken only to open and to close.
    free: Mutex<Free>,
    ledger: Option<Ledger>,
    /// What requests of earlier processes have opened, by their numbers.
    opened_before: HashMap<u64, HandleId>,
}

#[derive(Debug, Default)]
struct Free {
    returned: Vec<u32>,
    /// First slot that was never used.
    fresh: u32,
}

impl<T> Handles<T> {
    /// No open files, and no memory of them.
    pub fn new() -> Self {
        Self {
            chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
            free: Mutex::new(Free::default()),
            ledger: None,
            opened_before: HashMap::new(),
        }
    }

    /// The open files of a ledger, none of them opened yet.
    ///
    /// # Errors
    /// Those of reading the ledger.
    pub fn adopt(ledger: Ledger) -> Result<Self> {
        let mut handles = Self::new();
        let mut free = Free::default();
        for (index, Entry { count, kept, request }) in ledger.entries()? {
            free.returned.extend(free.fresh..index);
            free.fresh = index + 1;
            let mut used = handles.slot_or_new(index).used.write();
            used.count = count;
            match kept {
                Some(kept) => used.content = Content::Kept(kept),
                None => free.returned.push(index),
            }
            drop(used);
            if kept.is_some() && request != 0 {
                handles.opened_before.insert(request, join(index, count));
            }
        }
        handles.free = Mutex::new(free);
        handles.ledger = Some(ledger);
        Ok(handles)
    }

    /// Gives an open file a number. `kept` says what of it is to be remembered, and `request` which request opened it.
    ///
    /// # Errors
    /// [`Errno::TOO_MANY`] with about a million open files, and those of the ledger; the value comes back then.
    pub fn insert(&self, value: T, kept: Kept, request: u64) -> std::result::Result<HandleId, (T, Failure)> {
        let Some(index) = self.take_free() else { return Err((value, Errno::TOO_MANY.into())) };
        let mut used = self.slot_or_new(index).used.write();
        let count = used.count.wrapping_add(1).max(1);
        let entry = Entry { count, kept: Some(kept), request };
        if let Err(error) = self.note(index, &entry) {
            drop(used);
            self.free.lock().returned.push(index);
            return Err((value, error.into()));
        }
        *used = Use { count, content: Content::Open(value) };
        Ok(join(index, count))
    }

    fn note(&self, index: u32, entry: &Entry) -> Result<()> {
        self.ledger.as_ref().map_or(Ok(()), |ledger| ledger.write(index, entry))
    }

    /// What an earlier process opened for the request of that number, if it is still open: its answer may not have
    /// reached the kernel.
    pub fn opened_before(&self, request: u64) -> Option<HandleId> {
        let id = *self.opened_before.get(&request)?;
        self.with(id, |content| (!matches!(content, Content::Nothing)).then_some(id))?
    }

    /// The open file of a number, which cannot be closed before the guard is dropped.
    ///
    /// # Errors
    /// [`Errno::BAD_HANDLE`] if there is none, or if it is only [kept](Self::kept).
    pub fn get(&self, id: HandleId) -> Outcome<MappedRwLockReadGuard<'_, T>> {
        let (index, count) = split(id);
        let slot = self.slot(index).ok_or(Errno::BAD_HANDLE)?;
        let used = slot.used.read();
        if used.count != count {
            return Err(Errno::BAD_HANDLE.into());
        }
        RwLockReadGuard::try_map(used, |used| match &used.content {
            Content::Open(value) => Some(value),
            Content::Kept(_) | Content::Nothing => None,
        })
        .map_err(|_closed| Errno::BAD_HANDLE.into())
    }

    /// Calls `look` with what lies behind a number, if that was ever given out and not to another since.
    fn with<R>(&self, id: HandleId, look: impl FnOnce(&Content<T>) -> R) -> Option<R> {
        let (index, count) = split(id);
        let used = self.slot(index)?.used.read();
        (used.count == count).then(|| look(&used.content))
    }

    /// The file of a number that an earlier process had open and this one has not opened yet.
    pub fn kept(&self, id: HandleId) -> Option<Kept> {
        self.with(id, |content| match content {
            Content::Kept(kept) => Some(*kept),
            Content::Open(_) | Content::Nothing => None,
        })?
    }

    /// All those that are kept.
    pub fn all_kept(&self) -> Vec<(HandleId, Kept)> {
        let mut found = Vec::new();
        for (index, slot) in (0..).zip(self.slots()) {
            let used = slot.used.read();
            if let Content::Kept(kept) = used.content {
                found.push((join(index, used.count), kept));
            }
        }
        found
    }

    /// Puts the open file into the place of one that is kept.
    ///
    /// # Errors
    /// The value comes back if another thread was first.
    pub fn fill(&self, id: HandleId, value: T) -> std::result::Result<(), T> {
        let (index, count) = split(id);
        let Some(slot) = self.slot(index) else { return Err(value) };
        let mut used = slot.used.write();
        match used.content {
            Content::Kept(_) if used.count == count => {
                used.content = Content::Open(value);
                Ok(())
            }
            _ => Err(value),
        }
    }

    /// Takes an open file away from its number, after every operation on it that goes on has ended, and has `close` close
    /// it. The ledger knows of it until that has returned. `None` if there is no such file, or it is only kept.
    pub fn close<R>(&self, id: HandleId, close: impl FnOnce(T) -> R) -> Option<R> {
        let (index, count) = split(id);
        let mut used = self.slot(index)?.used.write();
        if used.count != count || !matches!(used.content, Content::Open(_)) {
            return None;
        }
        let Content::Open(value) = std::mem::replace(&mut used.content, Content::Nothing) else {
            return None;
        };
        drop(used);
        let result = close(value);
        self.give_back(index, count);
        Some(result)
    }

    /// Forgets a file that is kept, without opening it. Says whether there was one.
    pub fn forget(&self, id: HandleId) -> bool {
        let (index, count) = split(id);
        let Some(slot) = self.slot(index) else { return false };
        let mut used = slot.used.write();
        if used.count != count || !matches!(used.content, Content::Kept(_)) {
            return false;
        }
        used.content = Content::Nothing;
        drop(used);
        self.give_back(index, count);
        true
    }

    fn give_back(&self, index: u32, count: u32) {
        // Without memory for it the file counts as open to a successor, which is told to close it by nobody; at the end of
        // the mount it does.
        if let Err(error) = self.note(index, &Entry { count, kept: None, request: 0 }) {
            log::error!("{error}");
        }
        self.free.lock().returned.push(index);
    }

    /// How many files are open.
    pub fn count(&self) -> usize {
        let free = self.free.lock();
        usize::try_from(free.fresh).unwrap_or(usize::MAX) - free.returned.len()
    }

    /// The numbers of all open files but those that are kept.
    pub fn all_open(&self) -> Vec<HandleId> {
        let mut found = Vec::new();
        for (index, slot) in (0..).zip(self.slots()) {
            let used = slot.used.read();
            if let Content::Open(_) = used.content {
                found.push(join(index, used.count));
            }
        }
        found
    }

    /// Every slot up to the last one that was ever used, and perhaps some more.
    fn slots(&self) -> impl Iterator<Item = &Slot<T>> {
        let used = usize::try_from(self.free.lock().fresh).unwrap_or(usize::MAX).div_ceil(CHUNK);
        (0..used.min(CHUNKS)).flat_map(move |chunk| self.chunk_or_new(chunk).iter())
    }

    fn take_free(&self) -> Option<u32> {
        let mut free = self.free.lock();
        if let Some(index) = free.returned.pop() {
            return Some(index);
        }
        let index = free.fresh;
        if index >= SLOTS {
            return None;
        }
        free.fresh += 1;
        Some(index)
    }

    fn slot(&self, index: u32) -> Option<&Slot<T>> {
        let index = usize::try_from(index).ok()?;
        self.chunks.get(index / CHUNK)?.get()?.get(index % CHUNK)
    }

    fn slot_or_new(&self, index: u32) -> &Slot<T> {
        let index = usize::try_from(index).expect("a slot's number fits an address");
        &self.chunk_or_new(index / CHUNK)[index % CHUNK]
    }

    fn chunk_or_new(&self, chunk: usize) -> &[Slot<T>] {
        self.chunks[chunk].get_or_init(|| {
            let slot = |_| Slot { used: RwLock::new(Use { count: 0, content: Content::Nothing }) };
            (0..CHUNK).map(slot).collect()
        })
    }
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self::new()
    }
}

fn join(index: u32, count: u32) -> HandleId {
    HandleId(u64::from(count) << 32 | u64::from(index))
}

/// Slot and use of the slot.
fn split(id: HandleId) -> (u32, u32) {
    let low = u32::try_from(id.0 & u64::from(u32::MAX)).expect("masked to 32 bits");
    let high = u32::try_from(id.0 >> 32).expect("shifted to 32 bits");
    (low, high)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: Kept = Kept { ino: 77, write: true, directory: false };

    fn insert<T: std::fmt::Debug>(handles: &Handles<T>, value: T) -> HandleId {
        handles.insert(value, KEPT, 0).unwrap()
    }

    fn remove<T>(handles: &Handles<T>, id: HandleId) -> Option<T> {
        handles.close(id, |value| value)
    }

    #[test]
    fn a_closed_number_never_names_a_later_file() {
        let handles = Handles::new();
        let first = insert(&handles, "first");
        assert_eq!(remove(&handles, first), Some("first"));
        let second = insert(&handles, "second");
        assert_ne!(first, second);
        assert_eq!(handles.get(first).unwrap_err().errno(), Errno::BAD_HANDLE);
        assert_eq!(remove(&handles, first), None);
        assert_eq!(*handles.get(second).unwrap(), "second");
    }

    #[test]
    fn numbers_that_were_never_given_out_are_refused() {
        let handles: Handles<()> = Handles::new();
        for id in [0, 1, 1 << 32, u64::MAX] {
            assert_eq!(handles.get(HandleId(id)).unwrap_err().errno(), Errno::BAD_HANDLE);
            assert_eq!(remove(&handles, HandleId(id)), None);
        }
    }

    #[test]
    fn closing_waits_for_what_goes_on() {
        let handles = Handles::new();
        let id = insert(&handles, 7);
        let guard = handles.get(id).unwrap();
        std::thread::scope(|scope| {
            let closer = scope.spawn(|| remove(&handles, id));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!closer.is_finished());
            drop(guard);
            assert_eq!(closer.join().unwrap(), Some(7));
        });
    }

    #[test]
    fn thousands_of_files_are_open_at_once() {
        let handles = Handles::new();
        let ids: Vec<_> = (0..3 * CHUNK).map(|number| insert(&handles, number)).collect();
        assert_eq!(handles.count(), 3 * CHUNK);
        for (number, id) in ids.iter().enumerate() {
            assert_eq!(*handles.get(*id).unwrap(), number);
        }
    }

    /// A successor of `handles`, which has died.
    fn successor<T>(handles: &Handles<T>) -> Handles<T> {
        let ledger = handles.ledger.as_ref().unwrap().descriptor().try_clone_to_owned().unwrap();
        Handles::adopt(Ledger::adopt(ledger).unwrap()).unwrap()
    }

    #[test]
    fn a_successor_knows_every_number_and_gives_none_of_them_out_again() {
        let first = Handles::adopt(Ledger::create().unwrap()).unwrap();
        let ids: Vec<_> = (0..300u64).map(|n| first.insert(n, KEPT, 1000 + n).unwrap()).collect();
        for id in &ids[100..200] {
            remove(&first, *id).unwrap();
        }
        let second = successor(&first);
        assert_eq!(second.count(), 200);
        assert_eq!(second.all_kept().len(), 200);
        assert_eq!(second.get(ids[0]).unwrap_err().errno(), Errno::BAD_HANDLE, "not opened yet");
        assert_eq!((second.kept(ids[0]), second.kept(ids[150])), (Some(KEPT), None));
        assert_eq!((second.opened_before(1000), second.opened_before(1150)), (Some(ids[0]), None));
        second.fill(ids[0], 0).unwrap();
        assert_eq!(second.fill(ids[0], 9), Err(9), "the first one stays");
        assert_eq!(*second.get(ids[0]).unwrap(), 0);
        let fresh: Vec<_> = (0..150).map(|n| insert(&second, n)).collect();
        assert!(fresh.iter().all(|id| !ids.contains(id)), "numbers are not used twice");
        assert!(second.forget(ids[1]) && !second.forget(ids[1]));
        let third = successor(&second);
        assert_eq!(third.count(), second.count());
        assert_eq!((third.kept(ids[1]), third.kept(ids[2])), (None, Some(KEPT)));
    }

    #[test]
    fn a_file_is_known_to_a_successor_until_it_has_been_closed() {
        let first = Handles::adopt(Ledger::create().unwrap()).unwrap();
        let id = insert(&first, 1);
        first.close(id, |_| assert_eq!(successor(&first).kept(id), Some(KEPT))).unwrap();
        assert_eq!(successor(&first).kept(id), None);
    }
}
