//! Open files by number.
//!
//! A number names a slot and says which of the slot's successive users it belongs to, so a number that has been closed
//! is never taken for a later one. Slots come in chunks that are made once and never moved: finding one takes no lock.

use std::sync::OnceLock;

use parking_lot::{MappedRwLockReadGuard, Mutex, RwLock, RwLockReadGuard};

use super::errno::{Errno, Failure, Outcome};

/// Slots of a chunk.
const CHUNK: usize = 256;

/// Chunks; with [`CHUNK`] that is about a million open files.
const CHUNKS: usize = 4096;

/// Number of an open file, as the kernel keeps it: the slot in the lower half, the use of the slot in the upper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

#[derive(Debug)]
struct Use<T> {
    /// Counts the users that the slot has had, so that an old number does not name a new file.
    count: u32,
    value: Option<T>,
}

/// Lies in a cache line of its own, so that reading from one disk does not slow another down.
#[derive(Debug)]
#[repr(align(64))]
struct Slot<T> {
    /// Guards the slot's value: held shared during each operation on the open file, exclusively to open and close it.
    content: RwLock<Use<T>>,
}

/// Slots that are made together, when the first of them is needed.
type Chunk<T> = OnceLock<Box<[Slot<T>]>>;

/// All open files.
#[derive(Debug)]
pub struct Handles<T> {
    chunks: Box<[Chunk<T>]>,
    /// Guards which slots are free. Taken only to open and to close.
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    returned: Vec<u32>,
    /// First slot that was never used.
    fresh: u32,
}

impl<T> Handles<T> {
    /// No open files.
    pub fn new() -> Self {
        Self { chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(), free: Mutex::new(Free::default()) }
    }

    /// Gives an open file a number.
    ///
    /// # Errors
    /// [`Errno::TOO_MANY`] with about a million open files; the value comes back then.
    pub fn insert(&self, value: T) -> std::result::Result<HandleId, (T, Failure)> {
        let Some(index) = self.take_free() else { return Err((value, Errno::TOO_MANY.into())) };
        let slot = self.slot_or_new(index);
        let mut content = slot.content.write();
        content.count = content.count.wrapping_add(1);
        content.value = Some(value);
        Ok(HandleId(u64::from(content.count) << 32 | u64::from(index)))
    }

    /// The open file of a number, which cannot be closed before the guard is dropped.
    ///
    /// # Errors
    /// [`Errno::BAD_HANDLE`] if there is none.
    pub fn get(&self, id: HandleId) -> Outcome<MappedRwLockReadGuard<'_, T>> {
        let (index, count) = split(id);
        let slot = self.slot(index).ok_or(Errno::BAD_HANDLE)?;
        let content = slot.content.read();
        if content.count != count {
            return Err(Errno::BAD_HANDLE.into());
        }
        RwLockReadGuard::try_map(content, |content| content.value.as_ref())
            .map_err(|_closed| Errno::BAD_HANDLE.into())
    }

    /// Takes an open file away from its number, after every operation on it that goes on has ended.
    pub fn remove(&self, id: HandleId) -> Option<T> {
        let (index, count) = split(id);
        let mut content = self.slot(index)?.content.write();
        if content.count != count {
            return None;
        }
        let value = content.value.take()?;
        drop(content);
        self.free.lock().returned.push(index);
        Some(value)
    }

    /// How many files are open.
    pub fn count(&self) -> usize {
        let free = self.free.lock();
        usize::try_from(free.fresh).unwrap_or(usize::MAX) - free.returned.len()
    }

    /// Takes every open file away from its number.
    pub fn drain(&self) -> Vec<T> {
        let slots = self.chunks.iter().filter_map(OnceLock::get).flat_map(|chunk| chunk.iter());
        slots.filter_map(|slot| slot.content.write().value.take()).collect()
    }

    fn take_free(&self) -> Option<u32> {
        let mut free = self.free.lock();
        if let Some(index) = free.returned.pop() {
            return Some(index);
        }
        let index = free.fresh;
        if usize::try_from(index).ok()? >= CHUNK * CHUNKS {
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
        let chunk = self.chunks[index / CHUNK].get_or_init(|| {
            (0..CHUNK).map(|_| Slot { content: RwLock::new(Use { count: 0, value: None }) }).collect()
        });
        &chunk[index % CHUNK]
    }
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self::new()
    }
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

    #[test]
    fn a_closed_number_never_names_a_later_file() {
        let handles = Handles::new();
        let first = handles.insert("first").unwrap();
        assert_eq!(handles.remove(first), Some("first"));
        let second = handles.insert("second").unwrap();
        assert_ne!(first, second);
        assert_eq!(handles.get(first).unwrap_err().errno(), Errno::BAD_HANDLE);
        assert_eq!(handles.remove(first), None);
        assert_eq!(*handles.get(second).unwrap(), "second");
    }

    #[test]
    fn numbers_that_were_never_given_out_are_refused() {
        let handles: Handles<()> = Handles::new();
        for id in [0, 1, 1 << 32, u64::MAX] {
            assert_eq!(handles.get(HandleId(id)).unwrap_err().errno(), Errno::BAD_HANDLE);
            assert_eq!(handles.remove(HandleId(id)), None);
        }
    }

    #[test]
    fn closing_waits_for_what_goes_on() {
        let handles = Handles::new();
        let id = handles.insert(7).unwrap();
        let guard = handles.get(id).unwrap();
        std::thread::scope(|scope| {
            let closer = scope.spawn(|| handles.remove(id));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!closer.is_finished());
            drop(guard);
            assert_eq!(closer.join().unwrap(), Some(7));
        });
    }

    #[test]
    fn thousands_of_files_are_open_at_once() {
        let handles = Handles::new();
        let ids: Vec<_> = (0..3 * CHUNK).map(|number| handles.insert(number).unwrap()).collect();
        assert_eq!(handles.count(), 3 * CHUNK);
        for (number, id) in ids.iter().enumerate() {
            assert_eq!(*handles.get(*id).unwrap(), number);
        }
    }
}
