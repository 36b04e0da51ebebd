//! Direct requests that no thread waits for: where they go, and what a plain file learns from what becomes of them.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::disk::{Disk, Kind};
use crate::storage::{Room, Taken};

/// Where in a file of the host a direct request goes. Kept until it has ended.
#[derive(Debug)]
pub struct Place {
    /// The byte of the file at which it begins.
    pub at: u64,
    /// What a write may take of the host's file system.
    _room: Option<Taken<Arc<Room>>>,
}

impl Place {
    /// Of what takes no new space.
    pub(super) fn at(at: u64) -> Self {
        Self { at, _room: None }
    }

    /// Of a write that may take new space.
    pub(super) fn with_room(at: u64, room: Taken<Arc<Room>>) -> Self {
        Self { at, _room: Some(room) }
    }
}

/// Writes not to be offered after a refusal: at first, and at most. At most one in so many pays twice where the host refuses
/// all, as in a file that is being filled; and so many overwrites go by threads after the last that it has refused.
const WITHHELD_MIN: u32 = 8;
const WITHHELD_MAX: u32 = 512;

/// Which writes to a plain file are offered to the host to be done without a thread that waits. The host refuses what has to
/// wait, for new space above all, and then a thread does it from the beginning, at twice the price. Only the host knows
/// which these are. So after one that it has refused some are not offered, and twice as many each time that the next one is
/// refused, too.
#[derive(Debug, Default)]
pub(super) struct Trials {
    /// Writes still not to be offered.
    withheld: AtomicU32,
    /// How many these were after the last refusal; 0 after a success. A guess like the other: nothing depends on them but time.
    step: AtomicU32,
}

impl Trials {
    /// Whether to offer a write. To be asked once for each.
    pub(super) fn may_try(&self) -> bool {
        let rest = |withheld: u32| withheld.checked_sub(1);
        self.withheld.load(Ordering::Relaxed) == 0
            || self.withheld.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).is_err()
    }

    /// Whether the host has refused one not long ago: then the file is probably being filled.
    pub(super) fn are_refused(&self) -> bool {
        self.withheld.load(Ordering::Relaxed) > 0
    }

    /// The host has done one.
    fn succeeded(&self) {
        if self.step.load(Ordering::Relaxed) > 0 && self.withheld.load(Ordering::Relaxed) == 0 {
            self.step.store(0, Ordering::Relaxed);
        }
    }

    /// The host has refused one.
    pub(super) fn failed(&self) {
        // Of all that were under way together the first one counts.
        if self.withheld.load(Ordering::Relaxed) == 0 {
            let step = (self.step.load(Ordering::Relaxed) * 2).clamp(WITHHELD_MIN, WITHHELD_MAX);
            self.step.store(step, Ordering::Relaxed);
            self.withheld.store(step, Ordering::Relaxed);
        }
    }
}

impl Disk {
    /// Where in its base, [`Disk::base_file`], a read of `len` bytes at `offset` shows just what lies there; see
    /// [`Storage::cached_file`](crate::storage::Storage::cached_file).
    pub fn place_in_base(&self, offset: u64, len: u64) -> Option<Place> {
        let Kind::Overlay(overlay) = self.kind() else { return None };
        (overlay.base_file().is_some() && overlay.shows_base(offset, len)).then(|| Place::at(offset))
    }

    /// The file of its base, if reads of it may be put to the kernel.
    pub fn base_file(&self) -> Option<BorrowedFd<'_>> {
        match self.kind() {
            Kind::Overlay(overlay) => overlay.base_file(),
            Kind::Plain(_) => None,
        }
    }

    /// Tells whether the host has done a write that [`Disk::place`] has offered, and that it was asked to do.
    pub fn placed_write_ended(&self, done: bool) {
        match self.kind() {
            Kind::Overlay(overlay) => overlay.placed_write_ended(),
            Kind::Plain(plain) if done => plain.trials().succeeded(),
            Kind::Plain(plain) => plain.trials().failed(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many writes are not offered until one is.
    fn withheld(trials: &Trials) -> u32 {
        let withheld = (0..).find(|_| trials.may_try()).unwrap();
        assert!(!trials.are_refused());
        withheld
    }

    #[test]
    fn where_the_host_refuses_all_ever_fewer_are_offered_and_where_it_does_them_all_are() {
        let trials = Trials::default();
        assert_eq!(withheld(&trials), 0);
        let mut seen = Vec::new();
        for _ in 0..8 {
            // More were under way.
            (0..32).for_each(|_| trials.failed());
            seen.push(withheld(&trials));
        }
        assert_eq!(seen, [8, 16, 32, 64, 128, 256, 512, 512]);
        trials.succeeded();
        assert!((0..1000).all(|_| trials.may_try()));
        trials.failed();
        // Under way since before.
        trials.succeeded();
        assert_eq!(withheld(&trials), WITHHELD_MIN);
        trials.failed();
        assert_eq!(withheld(&trials), 2 * WITHHELD_MIN);
    }
}
