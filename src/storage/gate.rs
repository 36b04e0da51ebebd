//! Who may write to a file: some through the host's cache, others beside it.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};

/// Keeps writes through the host's cache and direct writes under way apart, for one file.
///
/// A direct write that a thread waits for holds a lock of the file in the host, and so does one through the cache. But with AIO
/// that lock is free again once the write is under way. Who then writes into the same page through the cache first reads
/// that page as it was, and the host later writes it back over what has landed; and where the host notices such a page, it
/// fails the next sync with EIO ("Page cache invalidation failure on direct I/O", mm/filemap.c).
#[derive(Debug, Default)]
pub struct Gate {
    /// Direct writes under way.
    direct: AtomicUsize,
    /// Writes through the cache, going on or waiting.
    cached: AtomicUsize,
    /// Guards nothing but the sleep of who waits for `direct` to fall to zero.
    sleep: Mutex<()>,
    empty: Condvar,
}

impl Gate {
    /// Lets a direct write begin, unless somebody writes through the cache or waits to. Each goes with a [`Gate::leave`].
    pub fn enter(&self) -> bool {
        self.direct.fetch_add(1, Ordering::SeqCst);
        let free = self.cached.load(Ordering::SeqCst) == 0;
        if !free {
            self.leave();
        }
        free
    }

    /// A direct write has ended.
    pub fn leave(&self) {
        if self.direct.fetch_sub(1, Ordering::SeqCst) == 1 && self.cached.load(Ordering::SeqCst) > 0 {
            let _asleep = self.sleep.lock();
            self.empty.notify_all();
        }
    }

    /// Whether who writes through the cache now would have to wait.
    pub fn is_in_use(&self) -> bool {
        self.direct.load(Ordering::SeqCst) > 0
    }

    /// Writes through the cache when no direct write is under way.
    pub fn cached<R>(&self, write: impl FnOnce() -> R) -> R {
        self.cached.fetch_add(1, Ordering::SeqCst);
        if self.direct.load(Ordering::SeqCst) > 0 {
            let mut sleep = self.sleep.lock();
            while self.direct.load(Ordering::SeqCst) > 0 {
                self.empty.wait(&mut sleep);
            }
        }
        let result = write();
        self.cached.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// The page that was read for one was written back over what the other had written, or the next sync failed.
    #[test]
    fn a_write_through_the_cache_waits_for_direct_ones_and_keeps_others_out() {
        let gate = Gate::default();
        assert!(gate.enter() && gate.enter());
        let (written, word) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| gate.cached(|| written.send(()).unwrap()));
            while gate.cached.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            assert!(!gate.enter(), "one waits to write through the cache");
            gate.leave();
            assert!(word.recv_timeout(std::time::Duration::from_millis(20)).is_err());
            gate.leave();
            word.recv().unwrap();
        });
        gate.cached(|| assert!(!gate.enter()));
        assert!(gate.enter());
    }
}
