//! Locks on runs of blocks, so that a change of a block's state and of its data is one step.

use parking_lot::{Condvar, Mutex};

use crate::units::BlockSpan;

/// Who holds which blocks. Requests to different blocks go in parallel; two that share a block go one after the other.
#[derive(Debug, Default)]
pub struct BlockLocks {
    /// Guards the runs that are held: as many as requests in flight, so a short list.
    held: Mutex<Vec<BlockSpan>>,
    released: Condvar,
}

/// Blocks held until it is dropped.
#[derive(Debug)]
pub struct HeldBlocks<'a> {
    locks: &'a BlockLocks,
    span: BlockSpan,
}

impl BlockLocks {
    /// Waits until nobody holds a block of `span`, then holds them all. A thread holds one run at a time.
    pub fn hold(&self, span: BlockSpan) -> HeldBlocks<'_> {
        let mut held = self.held.lock();
        while held.iter().any(|other| other.overlaps(span)) {
            self.released.wait(&mut held);
        }
        held.push(span);
        HeldBlocks { locks: self, span }
    }
}

impl Drop for HeldBlocks<'_> {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock();
        let at = held.iter().position(|&span| span == self.span).expect("it was pushed by hold");
        held.swap_remove(at);
        self.locks.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn overlapping_runs_wait_and_others_do_not() {
        let locks = BlockLocks::default();
        let released = AtomicBool::new(false);
        let first = locks.hold(BlockSpan::new(0, 10));
        let _other = locks.hold(BlockSpan::new(10, 20));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let _held = locks.hold(BlockSpan::new(5, 6));
                assert!(released.load(Ordering::SeqCst));
            });
            released.store(true, Ordering::SeqCst);
            drop(first);
            waiter.join().expect("the waiter got its lock after the release");
        });
    }
}
