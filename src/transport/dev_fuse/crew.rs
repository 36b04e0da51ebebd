//! Who of the threads that read requests waits for one, who sleeps, and who is away at the host's disk.
//!
//! At queue depth 1 one thread that waits in the kernel is the fastest: it stays on its processor, and no other is woken
//! in vain. So all but the first sleep until there is more than it can do: more requests than it keeps up with, or one
//! that has to wait for the host's disk. Whoever reads such a request waits itself, for handing it to another thread would
//! cost a second waking; first it sees to it that somebody else waits for requests. Back from the disk it waits for
//! requests in the kernel as well, so that where many requests go to the disk each finds a thread waiting.
//!
//! A thread with direct requests under way goes round: it reads, puts to the kernel, and answers what has ended. It does not
//! leave meanwhile.
//!
//! For what memory answers, at most half of the host's processors read: the other half is for those who ask. (On two
//! processors a second reader made 4 KiB reads at QD32 0.77 × as many.)
//!
//! A watch looks every [`WATCH`] whether any thread waits for requests. If all of those that are awake are held up (by the
//! host writing back, say), it wakes a sleeper, so that nobody's guest waits for another's. It sleeps when nothing is
//! asked for.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

/// How often the watch looks whether anybody waits for requests.
const WATCH: Duration = Duration::from_millis(2);

/// After so many looks at a session that is asked for nothing the watch sleeps.
const IDLE_LOOKS: u32 = 50;

/// Most threads that wait for requests though one would do.
const WAITING_MAX: usize = 8;

/// The threads of a session that read requests.
#[derive(Debug)]
pub struct Crew {
    /// Most of them that are away at once: some stay for what memory answers.
    away_max: usize,
    threads: usize,
    /// Most threads that read because there is more than one can do.
    readers_max: usize,
    /// Threads that wait for a request.
    waiting: AtomicUsize,
    /// Threads that go round.
    rounding: AtomicUsize,
    /// Whether one of these may be held up.
    may_be_stuck: AtomicBool,
    /// Whether no more requests are to be read.
    stopped: AtomicBool,
    /// Whether a request came since the watch last looked.
    active: AtomicBool,
    /// Whether the watch sleeps.
    watch_sleeps: AtomicBool,
    /// Guards who sleeps and how many were called; held for an instant.
    sleepers: Mutex<Sleepers>,
    /// Somebody was called, or the session has ended.
    called: Condvar,
    /// The watch has something to do again, or the session has ended.
    watch_called: Condvar,
    /// Guards how many are away for each file, by inode number, at least 1; held for an instant.
    away: Mutex<HashMap<u64, usize>>,
    /// How many are away. Changed by whoever holds `away`.
    away_count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Sleepers {
    asleep: usize,
    calls: usize,
    ended: bool,
}

impl Crew {
    /// A crew of so many threads, at least one, on a host of so many processors.
    pub fn new(threads: usize, processors: usize) -> Self {
        Self {
            away_max: threads - threads.div_ceil(4),
            threads,
            readers_max: (processors / 2).max(1),
            waiting: AtomicUsize::new(0),
            rounding: AtomicUsize::new(0),
            may_be_stuck: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            active: AtomicBool::new(false),
            watch_sleeps: AtomicBool::new(false),
            sleepers: Mutex::default(),
            called: Condvar::new(),
            watch_called: Condvar::new(),
            away: Mutex::default(),
            away_count: AtomicUsize::new(0),
        }
    }

    /// Counts the caller as waiting for a request while `wait` lasts.
    pub fn waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(self);
        wait()
    }

    /// Counts the caller as going round while `go` lasts.
    pub fn rounding<T>(&self, go: impl FnOnce() -> T) -> T {
        self.rounding.fetch_add(1, Ordering::Relaxed);
        let _rounding = Rounding(self);
        go()
    }

    /// Whether more threads read than are called for what memory answers.
    pub fn is_crowded(&self) -> bool {
        self.reading(&self.sleepers.lock()) > self.readers_max
    }

    fn reading(&self, sleepers: &Sleepers) -> usize {
        let away = self.away_count.load(Ordering::Relaxed);
        self.threads.saturating_sub(sleepers.asleep - sleepers.calls + away)
    }

    /// Notes that a thread that goes round is not held up.
    pub fn note_round(&self) {
        if self.may_be_stuck.load(Ordering::Relaxed) {
            self.may_be_stuck.store(false, Ordering::Relaxed);
        }
    }

    /// Whether some thread will read the next request.
    fn is_attended(&self) -> bool {
        let is_rounding =
            || self.rounding.load(Ordering::Relaxed) > 0 && !self.may_be_stuck.load(Ordering::Relaxed);
        self.waiting.load(Ordering::Relaxed) > 0 || is_rounding()
    }

    /// Wakes a sleeper to read beside the caller, unless as many do as may.
    pub fn call_help(&self) {
        let mut sleepers = self.sleepers.lock();
        if self.reading(&sleepers) < self.readers_max {
            self.wake_one(&mut sleepers);
        }
    }

    /// Wakes a sleeper, if there is one that was not called yet.
    fn call(&self) {
        self.wake_one(&mut self.sleepers.lock());
    }

    fn wake_one(&self, sleepers: &mut Sleepers) {
        if sleepers.asleep > sleepers.calls {
            sleepers.calls += 1;
            self.called.notify_one();
        }
    }

    /// Sleeps until called; says whether the session goes on.
    pub fn sleep(&self) -> bool {
        let mut sleepers = self.sleepers.lock();
        sleepers.asleep += 1;
        while sleepers.calls == 0 && !sleepers.ended {
            self.called.wait(&mut sleepers);
        }
        sleepers.asleep -= 1;
        sleepers.calls = sleepers.calls.saturating_sub(1);
        !sleepers.ended
    }

    /// Has all threads end as soon as they have done what they had read, but for those that wait in the kernel.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.end();
    }

    /// Whether no more requests are to be read. Asked before each, or before the few that are gathered.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Has all sleepers wake, and the watch end.
    pub fn end(&self) {
        self.sleepers.lock().ended = true;
        self.called.notify_all();
        self.watch_called.notify_all();
    }

    /// Notes that a request came, and wakes the watch if it sleeps.
    pub fn note_request(&self) {
        // Looked at first: a store to a line that every thread shares costs more than a load.
        if self.active.load(Ordering::Relaxed) {
            return;
        }
        // In one order with the watch: it falls asleep first and looks at `active` then.
        self.active.store(true, Ordering::SeqCst);
        if self.watch_sleeps.load(Ordering::SeqCst) {
            let _held = self.sleepers.lock();
            self.watch_called.notify_one();
        }
    }

    /// The watch: looks until the session has ended. Each time it calls `on_look`, which says whether there is more to look
    /// after, and whenever it falls asleep `on_idle`.
    pub fn watch(&self, on_look: impl Fn() -> bool, on_idle: impl Fn()) {
        let mut idle = 0;
        let mut sleepers = self.sleepers.lock();
        while !sleepers.ended {
            if idle < IDLE_LOOKS {
                self.watch_called.wait_for(&mut sleepers, WATCH);
            } else {
                self.watch_sleeps.store(true, Ordering::SeqCst);
                if !self.active.load(Ordering::SeqCst) {
                    on_idle();
                    self.watch_called.wait(&mut sleepers);
                }
                self.watch_sleeps.store(false, Ordering::SeqCst);
            }
            let more = MutexGuard::unlocked(&mut sleepers, &on_look);
            let nobody = self.waiting.load(Ordering::Relaxed) == 0;
            let active = self.active.swap(false, Ordering::SeqCst);
            idle = if active || nobody || more { 0 } else { idle + 1 };
            // Who has read a request since the last look is not held up.
            if nobody && !active {
                self.may_be_stuck.store(true, Ordering::Relaxed);
                self.wake_one(&mut sleepers);
            }
        }
    }
}

/// Counts a thread as waiting until it is dropped.
struct Waiting<'a>(&'a Crew);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts a thread as going round until it is dropped.
struct Rounding<'a>(&'a Crew);

impl Drop for Rounding<'_> {
    fn drop(&mut self) {
        // One that is left may be held up: if not it says so at its next turn.
        if self.0.rounding.fetch_sub(1, Ordering::Relaxed) > 1 {
            self.0.may_be_stuck.store(true, Ordering::Relaxed);
        }
    }
}

/// One of the crew, as the requests see it that it does.
#[derive(Debug)]
pub struct Hand<'a> {
    crew: &'a Crew,
    was_away: Cell<bool>,
    is_bound: Cell<bool>,
}

impl<'a> Hand<'a> {
    /// One of `crew`.
    pub fn of(crew: &'a Crew) -> Self {
        Self { crew, was_away: Cell::new(false), is_bound: Cell::new(false) }
    }

    /// Says whether this thread goes round: then it must not [leave](Self::leave).
    pub fn bind(&self, bound: bool) {
        self.is_bound.set(bound);
    }

    /// Lets this thread wait for the host's disk, for the sake of the file with the inode number `file`, until what is
    /// returned is dropped. `None` if it goes round, or if too many are away already, half of them at most for one file: then a
    /// thread of a lane must do it.
    pub fn leave(&self, file: u64) -> Option<Away<'a>> {
        let crew = self.crew;
        if self.is_bound.get() {
            return None;
        }
        {
            let mut away = crew.away.lock();
            let of_file = away.get(&file).copied().unwrap_or(0);
            let count = crew.away_count.load(Ordering::Relaxed);
            if of_file >= crew.away_max / 2 || count >= crew.away_max {
                return None;
            }
            away.insert(file, of_file + 1);
            crew.away_count.store(count + 1, Ordering::Relaxed);
        }
        // One that waits and is about to get a request looks for itself when it leaves.
        if !crew.is_attended() {
            crew.call();
        }
        self.was_away.set(true);
        Some(Away { crew, file })
    }

    /// Has another thread read meanwhile, as this one must wait without leaving.
    pub fn call_another(&self) {
        self.crew.call();
    }

    /// Whether others are away.
    pub fn has_company(&self) -> bool {
        self.crew.away_count.load(Ordering::Relaxed) > 0
    }

    /// Whether it is to wait for a request though there may be none, rather than sleep: if nobody else waits, or if it
    /// comes from the host's disk and fewer wait than are away. Asked after each request.
    pub fn stays(&self) -> bool {
        let waiting = self.crew.waiting.load(Ordering::Relaxed);
        // One more than need be, for those that will wait in turns where one request after the other goes to the disk.
        let wanted = (self.crew.away_count.load(Ordering::Relaxed) + 2).min(WAITING_MAX);
        self.was_away.take() && waiting < wanted || !self.crew.is_attended()
    }
}

/// The leave of a thread that waits for the host's disk.
#[derive(Debug)]
pub struct Away<'a> {
    crew: &'a Crew,
    file: u64,
}

impl Drop for Away<'_> {
    fn drop(&mut self) {
        let mut away = self.crew.away.lock();
        self.crew.away_count.fetch_sub(1, Ordering::Relaxed);
        match away.get_mut(&self.file) {
            Some(of_file) if *of_file > 1 => *of_file -= 1,
            _ => drop(away.remove(&self.file)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_has_at_most_half_of_those_that_may_be_away() {
        let crew = Crew::new(11, 2);
        let hand = Hand::of(&crew);
        let of_one: Vec<_> = (0..4).map(|_| hand.leave(1).unwrap()).collect();
        assert!(hand.leave(1).is_none());
        let of_others: Vec<_> = (2..6).map(|file| hand.leave(file).unwrap()).collect();
        assert!(hand.leave(6).is_none(), "three stay");
        drop(of_others);
        assert!(hand.leave(1).is_none());
        drop(of_one);
        drop(hand.leave(1).unwrap());
        assert!(crew.away.lock().is_empty());
    }

    #[test]
    fn the_only_one_never_leaves() {
        assert!(Hand::of(&Crew::new(1, 2)).leave(1).is_none());
    }

    /// A helper would sleep again after each request, and the next wait for the watch.
    #[test]
    fn who_helps_stays_while_the_one_that_goes_round_is_held_up() {
        let crew = Crew::new(8, 2);
        let hand = Hand::of(&crew);
        crew.rounding(|| {
            assert!(!hand.stays());
            crew.may_be_stuck.store(true, Ordering::Relaxed);
            assert!(hand.stays());
            crew.note_round();
            assert!(!hand.stays());
            // Another one's rounds say nothing of this one.
            crew.rounding(|| crew.note_round());
            assert!(hand.stays());
        });
    }

    #[test]
    fn help_is_called_for_half_of_the_processors_and_who_is_bound_stays() {
        let crew = Crew::new(8, 4);
        let hand = Hand::of(&crew);
        hand.bind(true);
        assert!(hand.leave(1).is_none());
        hand.bind(false);
        let called = |asleep| {
            *crew.sleepers.lock() = Sleepers { asleep, calls: 0, ended: false };
            crew.call_help();
            crew.sleepers.lock().calls == 1
        };
        assert!(called(7), "one reads");
        assert!(!called(6), "two do");
        let _away = hand.leave(1).unwrap();
        assert!(called(6), "one of them is away");
    }

    /// Whoever leaves when nobody waits for requests calls one that sleeps.
    #[test]
    fn leaving_calls_a_sleeper_if_nobody_waits() {
        let crew = Crew::new(8, 2);
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| crew.sleep());
            while crew.sleepers.lock().asleep == 0 {
                std::thread::yield_now();
            }
            crew.waiting(|| drop(Hand::of(&crew).leave(1)));
            assert!(!sleeper.is_finished());
            assert_eq!(crew.sleepers.lock().calls, 0);
            drop(Hand::of(&crew).leave(1));
            assert!(sleeper.join().unwrap(), "the session goes on");
        });
    }

    #[test]
    fn who_comes_from_the_disk_waits_if_fewer_do_than_are_away_and_others_only_if_nobody_does() {
        let crew = Crew::new(48, 2);
        let hand = Hand::of(&crew);
        assert!(hand.stays());
        crew.waiting(|| {
            assert!(!hand.stays());
            drop(hand.leave(1).unwrap());
            assert!(hand.stays());
            assert!(!hand.stays(), "once");
            drop(hand.leave(1).unwrap());
            crew.waiting(|| assert!(!hand.stays()));
            let _others: Vec<_> = (0..7).map(|_| Hand::of(&crew).leave(2).unwrap()).collect();
            drop(hand.leave(1).unwrap());
            crew.waiting(|| assert!(hand.stays()));
        });
        let _others: Vec<_> = (0..15).map(|_| Hand::of(&crew).leave(2).unwrap()).collect();
        crew.waiting.store(WAITING_MAX, Ordering::Relaxed);
        drop(hand.leave(1).unwrap());
        assert!(!hand.stays());
    }
}
