//! How much of the host's filesystem may still be filled with what guests write.
//!
//! A host's filesystem that is filled to the last block may fail to write back what it has taken already: extents and
//! trees grow only then, and on a copy-on-write filesystem every block moves. So a [`Room`] keeps a *reserve* of the free
//! space. Whatever makes a file take more space takes that from the room first, and is refused once only the reserve is
//! left; overwrites, flushes, discards and the store's own records never ask, and live on the reserve.
//!
//! The room knows the free space as of its last look at the filesystem and counts down from there, so that a write costs
//! two additions and no system call. It looks anew when that is used up, and whenever [`Room::look`] is called because
//! others may have filled the filesystem, or freed some of it.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::Storage;
use crate::error::{Error, ErrorKind, Result};
use crate::units::HumanBytes;

/// The reserve of a filesystem, unless the user says otherwise: a twentieth of it, and no more than this. 256 MiB hold the
/// extents of five million scattered blocks, which is more than a host usually has in its cache unwritten (20 GiB).
const RESERVE_BYTES_MAX: u64 = 256 << 20;
const RESERVE_PART: u64 = 20;

/// The space of a filesystem, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSpace {
    /// All of it.
    pub total: u64,
    /// What nobody uses.
    pub free: u64,
    /// What of that is not kept for root. Root may use it too, but a room does not: it is the last resort of the host.
    pub available: u64,
}

impl HostSpace {
    /// The reserve that is kept where the user asks for none.
    pub fn default_reserve(self) -> u64 {
        (self.total / RESERVE_PART).min(RESERVE_BYTES_MAX)
    }
}

/// Space of one filesystem, shared by all that fill it.
pub struct Room {
    filesystem: Box<dyn Fn() -> Result<HostSpace> + Send + Sync>,
    /// Bytes to keep; `None`: the default for the filesystem's size.
    reserve: Option<u64>,
    /// Bytes that may still be taken, as of the last look; 0 while somebody looks.
    left: AtomicU64,
    /// Bytes taken for changes that have not ended: the filesystem may not count them yet.
    in_flight: AtomicU64,
    /// Guards looking at the filesystem; held for the time of a `statvfs`.
    looking: Mutex<()>,
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { filesystem: _, reserve, left, in_flight, looking: _ } = self;
        f.debug_struct("Room")
            .field("reserve", reserve)
            .field("left", left)
            .field("in_flight", in_flight)
            .finish_non_exhaustive()
    }
}

/// Room taken for one change. Held until the change has ended, well or not; from then on the filesystem itself counts what
/// it took.
#[derive(Debug)]
#[must_use = "held until the change has ended"]
pub struct Taken<R: Deref<Target = Room>> {
    room: R,
    bytes: u64,
}

impl<R: Deref<Target = Room>> Drop for Taken<R> {
    fn drop(&mut self) {
        self.room.in_flight.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

impl Room {
    /// The room on the filesystem that `filesystem` looks at; `reserve` bytes of it are kept, or the default for its size.
    pub fn new(
        filesystem: impl Fn() -> Result<HostSpace> + Send + Sync + 'static,
        reserve: Option<u64>,
    ) -> Self {
        Self {
            filesystem: Box::new(filesystem),
            reserve,
            left: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            looking: Mutex::new(()),
        }
    }

    /// A room that never ends, for storage that has no filesystem under it.
    pub fn unlimited() -> Self {
        let all = HostSpace { total: u64::MAX, free: u64::MAX, available: u64::MAX };
        Self::new(move || Ok(all), Some(0))
    }

    /// Bytes that are kept on a filesystem of that space.
    pub fn reserve_of(&self, space: HostSpace) -> u64 {
        self.reserve.unwrap_or_else(|| space.default_reserve())
    }

    /// Takes room for a change that makes files grow by `bytes` in all.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if only the reserve is left, or would be; those of looking at the filesystem.
    pub fn take(&self, bytes: u64) -> Result<Taken<&Self>> {
        try_take(self, bytes).map_or_else(|| self.look_and_take(bytes), Ok)
    }

    /// Takes room for a change that outlives the caller, without looking at the filesystem: `None` if as of the last look
    /// there may be too little.
    pub fn take_at_once(self: &Arc<Self>, bytes: u64) -> Option<Taken<Arc<Self>>> {
        try_take(Arc::clone(self), bytes)
    }

    /// Takes room for a write to a range of `storage` that may have its space already, because it was written to or
    /// preallocated. Whether it has is looked up only where the room would not do for all of it.
    ///
    /// # Errors
    /// Those of [`Room::take`] and [`Storage::unallocated`].
    pub fn take_for(&self, storage: &dyn Storage, offset: u64, len: u64) -> Result<Taken<&Self>> {
        let refused = match self.take(len) {
            Err(error) if error.kind() == ErrorKind::NoSpace => error,
            taken => return taken,
        };
        let missing = storage.unallocated(offset, len)?;
        if missing < len { self.take(missing) } else { Err(refused) }
    }

    /// Checks that there is room for all that `storage`, of `len` bytes, may still take. Takes none of it, so that nobody else is
    /// refused room meanwhile.
    ///
    /// # Errors
    /// Those of [`Room::take_for`].
    pub fn check_for(&self, storage: &dyn Storage, len: u64) -> Result<()> {
        let space = self.look()?;
        let left = space.available.saturating_sub(self.reserve_of(space));
        if len <= left {
            return Ok(());
        }
        let missing = storage.unallocated(0, len)?;
        if missing <= left { Ok(()) } else { Err(self.refusal(missing, space)) }
    }

    #[cold]
    fn look_and_take(&self, bytes: u64) -> Result<Taken<&Self>> {
        let looking = self.looking.lock();
        // Somebody else may have looked meanwhile.
        if let Some(taken) = try_take(self, bytes) {
            return Ok(taken);
        }
        let space = self.look_locked()?;
        drop(looking);
        try_take(self, bytes).ok_or_else(|| self.refusal(bytes, space))
    }

    fn refusal(&self, bytes: u64, space: HostSpace) -> Error {
        let reserve = self.reserve_of(space);
        let message = format!(
            "no room on the host's filesystem: {} needed, {} free, of which {} are kept in reserve",
            HumanBytes(bytes),
            HumanBytes(space.available),
            HumanBytes(reserve)
        );
        Error::new(ErrorKind::NoSpace, message).with_hint("see what takes the space: cowdisk df")
    }

    /// Looks at the filesystem, for others may have filled or freed it, and says what there is.
    ///
    /// # Errors
    /// Those of the host.
    pub fn look(&self) -> Result<HostSpace> {
        let _looking = self.looking.lock();
        self.look_locked()
    }

    fn look_locked(&self) -> Result<HostSpace> {
        // In this order nothing is missed: whoever took before this line is in flight, or has ended and is seen by the
        // filesystem; whoever comes after it waits for the result.
        self.left.store(0, Ordering::SeqCst);
        let in_flight = self.in_flight.load(Ordering::SeqCst);
        let space = (self.filesystem)()?;
        let kept = self.reserve_of(space).saturating_add(in_flight);
        self.left.store(space.available.saturating_sub(kept), Ordering::SeqCst);
        Ok(space)
    }
}

fn try_take<R: Deref<Target = Room>>(room: R, bytes: u64) -> Option<Taken<R>> {
    // In flight first: a look that comes in between counts it twice, and never not at all.
    room.in_flight.fetch_add(bytes, Ordering::AcqRel);
    let taken = Taken { room, bytes };
    let rest = |left: u64| left.checked_sub(bytes);
    taken.room.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, rest).is_ok().then_some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemStorage;

    /// A filesystem of 1,000 bytes with 100 kept for root, of which `free` says what is free.
    fn room(free: &Arc<AtomicU64>, reserve: Option<u64>) -> Room {
        let free = Arc::clone(free);
        let space = move || {
            let free = free.load(Ordering::Relaxed);
            Ok(HostSpace { total: 1000, free, available: free.saturating_sub(100) })
        };
        Room::new(space, reserve)
    }

    fn kind<T>(result: Result<T>) -> Option<ErrorKind> {
        result.err().map(|error| error.kind())
    }

    #[test]
    fn the_reserve_is_never_given_away_and_more_is_once_something_was_freed() {
        let free = Arc::new(AtomicU64::new(400));
        let room = room(&free, Some(200));
        let taken = room.take(60).unwrap();
        assert_eq!(kind(room.take(41)), Some(ErrorKind::NoSpace));
        drop(taken);
        // What was taken was not used: the next look finds it again.
        assert!(room.take(100).is_ok());
        assert_eq!(kind(room.take(101)), Some(ErrorKind::NoSpace));
        assert!(room.take(0).is_ok());
        free.store(401, Ordering::Relaxed);
        assert!(room.take(101).is_ok());
    }

    #[test]
    fn a_check_counts_what_is_missing_and_takes_nothing() {
        let room = room(&Arc::new(AtomicU64::new(8592)), Some(300));
        let storage = MemStorage::new();
        storage.set_len(16_384).unwrap();
        storage.write_at(0, &[1; 4096]).unwrap();
        assert_eq!(kind(room.check_for(&storage, 16_384)), Some(ErrorKind::NoSpace));
        storage.write_at(4096, &[1; 4096]).unwrap();
        room.check_for(&storage, 16_384).unwrap();
        assert!(room.take(8192).is_ok());
    }

    #[test]
    fn what_is_in_flight_is_counted_though_the_filesystem_does_not_know_of_it() {
        let free = Arc::new(AtomicU64::new(400));
        let room = room(&free, Some(0));
        let taken = room.take(200).unwrap();
        room.look().unwrap();
        assert_eq!(kind(room.take(101)), Some(ErrorKind::NoSpace));
        assert!(room.take(100).is_ok());
        drop(taken);
        assert!(room.take(300).is_ok());
    }

    #[test]
    fn what_is_taken_at_once_is_in_flight_until_it_is_given_back() {
        let room = Arc::new(room(&Arc::new(AtomicU64::new(400)), Some(0)));
        assert!(room.take_at_once(1).is_none(), "nobody has looked yet");
        room.look().unwrap();
        let taken = room.take_at_once(200).unwrap();
        assert!(room.take_at_once(101).is_none());
        assert_eq!(kind(room.take(101)), Some(ErrorKind::NoSpace));
        drop(taken);
        assert!(room.take(300).is_ok());
    }

    #[test]
    fn an_error_says_what_is_needed_and_what_there_is() {
        let room = room(&Arc::new(AtomicU64::new(300)), None);
        let error = room.take(512).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no room on the host's filesystem: 512 B needed, 200 B free, of which 50 B are kept in reserve"
        );
        assert!(error.hint().is_some());
    }

    #[test]
    fn the_default_reserve_is_a_part_of_the_filesystem_and_bounded() {
        let of = |total| HostSpace { total, free: 0, available: 0 }.default_reserve();
        assert_eq!((of(0), of(1 << 30), of(1 << 40)), (0, (1 << 30) / 20, RESERVE_BYTES_MAX));
    }

    #[test]
    fn what_has_its_space_already_needs_no_room() {
        let room = room(&Arc::new(AtomicU64::new(0)), Some(0));
        let storage = MemStorage::new();
        storage.write_at(0, &[1; 8192]).unwrap();
        assert!(room.take_for(&storage, 0, 8192).is_ok());
        assert_eq!(kind(room.take_for(&storage, 4096, 8192)), Some(ErrorKind::NoSpace));
    }

    #[test]
    fn threads_never_take_more_than_there_is() {
        let free = Arc::new(AtomicU64::new(100 + (1 << 20)));
        let room = room(&free, Some(1 << 10));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while let Ok(taken) = room.take(64) {
                        free.fetch_sub(64, Ordering::Relaxed);
                        drop(taken);
                    }
                });
            }
        });
        // Some may stop early, for what is in flight may be counted twice; none may go too far.
        assert!(free.load(Ordering::Relaxed) >= 100 + (1 << 10));
        while room.take(64).is_ok() {
            free.fetch_sub(64, Ordering::Relaxed);
        }
        assert!((100 + (1 << 10)..100 + (1 << 10) + 64).contains(&free.load(Ordering::Relaxed)));
    }
}
