//! How many requests there were, of which kind, and how they ended.
//!
//! Counting must not make the threads that serve wait for each other, so each counts in a place of its own; reading adds
//! these up. The sums are exact, though not of one moment.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::errno::Outcome;

/// An operation that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading an open file.
    Read,
    /// Writing to one.
    Write,
    /// Making writes durable.
    Sync,
    /// Discarding, zeroing and preallocating.
    Allocate,
    /// Opening a file.
    Open,
    /// Closing one.
    Close,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Well.
    Done,
    /// With ENOSPC.
    NoSpace,
    /// With EIO.
    Io,
    /// With another errno.
    Other,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Read, Self::Write, Self::Sync, Self::Allocate, Self::Open, Self::Close];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Allocate => "allocate",
            Self::Open => "open",
            Self::Close => "close",
        }
    }
}

impl Ending {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Done, Self::NoSpace, Self::Io, Self::Other];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::NoSpace => "no_space",
            Self::Io => "io_error",
            Self::Other => "other_error",
        }
    }

    fn of<T>(outcome: &Outcome<T>) -> Self {
        match outcome.as_ref().err().map(|failure| failure.errno().raw()) {
            None => Self::Done,
            Some(libc::ENOSPC) => Self::NoSpace,
            Some(libc::EIO) => Self::Io,
            Some(_) => Self::Other,
        }
    }
}

/// Requests of one kind so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// How many ended how, in the order of [`Ending::ALL`].
    pub endings: [u64; Ending::ALL.len()],
    /// Bytes of those that were done.
    pub bytes: u64,
}

/// Places that threads count in. With more threads than that some share one.
const PLACES: usize = 32;

/// A thread's counters, in cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Place {
    endings: [[AtomicU64; Ending::ALL.len()]; Operation::ALL.len()],
    bytes: [AtomicU64; Operation::ALL.len()],
}

/// All requests so far.
#[derive(Debug, Default)]
pub struct Counters {
    places: [Place; PLACES],
}

impl Counters {
    /// Counts a request that has ended; `bytes` is what it was about if it ended well.
    pub fn count<T>(&self, operation: Operation, bytes: u64, outcome: &Outcome<T>) {
        let place = &self.places[own_place()];
        let ending = Ending::of(outcome);
        place.endings[operation as usize][ending as usize].fetch_add(1, Ordering::Relaxed);
        if ending == Ending::Done && bytes > 0 {
            place.bytes[operation as usize].fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// The counts of an operation.
    pub fn of(&self, operation: Operation) -> RequestCounts {
        let mut sum = RequestCounts::default();
        for place in &self.places {
            for (sum, count) in sum.endings.iter_mut().zip(&place.endings[operation as usize]) {
                *sum += count.load(Ordering::Relaxed);
            }
            sum.bytes += place.bytes[operation as usize].load(Ordering::Relaxed);
        }
        sum
    }
}

/// Where this thread counts.
fn own_place() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static PLACE: Cell<usize> = const { Cell::new(PLACES) });
    PLACE.with(|place| {
        if place.get() == PLACES {
            place.set(THREADS.fetch_add(1, Ordering::Relaxed) % PLACES);
        }
        place.get()
    })
}

#[cfg(test)]
mod tests {
    use super::super::errno::Errno;
    use super::*;

    #[test]
    fn requests_of_all_threads_are_counted_by_their_ending() {
        let counters = Counters::default();
        let full = Err(Errno::NO_ROOM.into());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        counters.count(Operation::Write, 4096, &Ok(()));
                    }
                });
            }
        });
        counters.count::<()>(Operation::Write, 4096, &full);
        counters.count::<()>(Operation::Write, 512, &Err(Errno::TOO_BIG.into()));
        assert_eq!(
            counters.of(Operation::Write),
            RequestCounts { endings: [8000, 1, 0, 1], bytes: 8000 * 4096 }
        );
        assert_eq!(counters.of(Operation::Read), RequestCounts::default());
    }
}
