//! Halting the threads of rings, so that another process can take their entries over.
//!
//! While it lasts they begin with no request and hand no answer in: each entry that the kernel gives them stays with them. A
//! thread that has all of its entries halts.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

/// Whether the threads of a session are to halt, and how many have.
#[derive(Debug, Default)]
pub struct Halt {
    /// Asked for each request.
    is_on: AtomicBool,
    /// Guards which entries are waited for and who has halted; held for an instant.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queues: BTreeSet<u16>,
    halted: usize,
}

impl Halt {
    /// Whether it has begun, and not ended.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Acquire)
    }

    /// Begins. Of other queues than these the kernel may keep entries: those of processors that are switched off.
    pub fn begin(&self, queues: BTreeSet<u16>) {
        self.state.lock().queues = queues;
        self.is_on.store(true, Ordering::Release);
    }

    /// Ends: whoever has halted goes on.
    pub fn end(&self) {
        let _held = self.state.lock();
        self.is_on.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    /// The queues of which the kernel is to keep no entry.
    pub fn queues(&self) -> BTreeSet<u16> {
        self.state.lock().queues.clone()
    }

    /// Halts the calling thread until it ends.
    pub fn stand_still(&self) {
        let mut state = self.state.lock();
        state.halted += 1;
        self.changed.notify_all();
        while self.is_on() {
            self.changed.wait(&mut state);
        }
        state.halted -= 1;
    }

    /// Waits until so many threads have halted, at most until `until`, and says whether they have.
    pub fn wait(&self, threads: usize, until: Instant) -> bool {
        let mut state = self.state.lock();
        while state.halted < threads {
            if self.changed.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.halted >= threads
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_halts_is_waited_for_and_goes_on_when_it_ends() {
        let halt = Halt::default();
        assert!(!halt.is_on());
        halt.begin([0, 2].into());
        assert_eq!(halt.queues(), [0, 2].into());
        assert!(!halt.wait(1, Instant::now() + Duration::from_millis(5)));
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| halt.stand_still())).collect();
            assert!(halt.wait(2, Instant::now() + Duration::from_secs(60)));
            assert!(threads.iter().all(|thread| !thread.is_finished()));
            halt.end();
        });
        assert!(!halt.is_on() && !halt.wait(1, Instant::now()));
    }
}
