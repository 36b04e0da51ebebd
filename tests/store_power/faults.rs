//! The n-th operation on the host's disk fails, for every n of a run that does everything once. The error reaches the
//! caller, with its kind; what was asked for is done or not begun; all else goes on; so it is after the store was opened
//! again, and after a power cut.

use std::sync::atomic::{AtomicU64, Ordering};

use cowdisk::ErrorKind;
use cowdisk::store::DiskName;
use rustix::io::Errno;

use crate::common::host::{Event, Fate};
use crate::common::sim::Rng;
use crate::oracle::{Mark, Oracle};
use crate::run::Run;
use crate::script::{DiskOp, Op};
use crate::{Enumeration, Moment, PROGRAMS, lines, number_from, scratch, telling};

/// Of the operations, one in so many fails without `COWDISK_CRASH_STATES`.
const SAMPLE: u64 = 8;
/// Power cuts after each failure, and as many once all is done.
const CUTS: usize = 3;

/// Everything that changes a store, once.
fn everything() -> Vec<Op> {
    let root = |instance, op| Op::Disk(instance, DiskName::Root, op);
    let local = |instance, op| Op::Disk(instance, DiskName::Local, op);
    let mut ops = vec![
        Op::Import { image: 0, twin: false, kernel: true },
        Op::Import { image: 2, twin: true, kernel: false },
        Op::AddFlavor { flavor: 0, swap: false },
        Op::Create { instance: 0, image: 0, flavor: None, local: true, no_cow: false },
        Op::Create { instance: 1, image: 0, flavor: Some(0), local: true, no_cow: true },
    ];
    for instance in 0..2 {
        ops.extend([
            root(instance, DiskOp::Write(3, 7)),
            root(instance, DiskOp::Flush),
            local(instance, DiskOp::Write(1, 16)),
            root(instance, DiskOp::Discard(0, 16)),
            root(instance, DiskOp::Write(20, 3)),
            root(instance, DiskOp::Grow),
            local(instance, DiskOp::Discard(4, 3)),
            root(instance, DiskOp::Flush),
            local(instance, DiskOp::Close),
            Op::ChangeDisk(instance, DiskName::Root),
        ]);
    }
    ops.extend([
        Op::ChangeImage(2),
        Op::Import { image: 1, twin: true, kernel: true },
        Op::RemoveImage(1),
        Op::RemoveImage(2),
        Op::Reopen,
        Op::RemoveInstance(1),
        Op::RemoveFlavor(0),
        root(0, DiskOp::Close),
        Op::RemoveInstance(0),
        Op::RemoveImage(0),
        Op::Import { image: 0, twin: true, kernel: true },
        Op::Create { instance: 0, image: 0, flavor: None, local: true, no_cow: false },
        root(0, DiskOp::Write(5, 9)),
        root(0, DiskOp::Flush),
    ]);
    ops
}

impl Enumeration<'_> {
    /// Has one operation fail. Returns how many there were, and whether the caller was told.
    fn fail(&mut self, nth: u64, errno: Errno) -> (u64, bool) {
        let folder = scratch();
        self.boots.next();
        let run = Run::new(folder.path(), self.sources.path(), 0);
        run.host.set_fate(Fate::FailAfter(nth, errno));
        if let Err(error) = run.init() {
            assert_eq!(error.kind(), kind_of(errno), "{error}");
            run.errors.lock().push(error.kind());
            // Done, or not begun and done now.
            if let Err(error) = run.init() {
                assert_eq!(error.kind(), ErrorKind::Exists, "{error}");
            }
        }
        everything().iter().for_each(|op| run.apply(op));
        run.end();
        let operations = run.host.operations();
        run.host.set_fate(Fate::Fine);
        let errors = std::mem::take(&mut *run.errors.lock());
        assert!(errors.iter().all(|kind| *kind == kind_of(errno)), "not the disk's error: {errors:?}");
        let told = !errors.is_empty();
        self.after_failure(&run, Rng(nth));
        let mut oracle = Oracle::default();
        for event in &run.host.lock().events {
            if let Event::Mark(mark) = event {
                oracle.apply(mark);
            }
        }
        oracle.check(&run.store(0).expect("open the store again"));
        (operations, told)
    }

    /// Cuts the power right after what failed, and at the end.
    fn after_failure(&mut self, run: &Run, mut rng: Rng) {
        let recording = run.host.lock();
        let mut moment = Moment { tree: recording.start.clone(), oracle: Oracle::default() };
        let count = run.count.load(Ordering::Relaxed);
        for (number, event) in recording.events.iter().enumerate() {
            moment.step(number, event);
            let failed = matches!(event, Event::Mark(Mark::Undecided(..)));
            if !failed && number + 1 < recording.events.len() {
                continue;
            }
            let mut cuts = moment.cuts(&mut rng);
            for _ in 0..CUTS {
                let cut = cuts.swap_remove(rng.below(cuts.len() as u64) as usize);
                let left = moment.tree.left(&cut);
                self.rng = Rng(rng.next());
                let what = || {
                    let (events, left) = (lines(&recording.events[..=number]), left.names());
                    format!("power cut after\n{events}\nleaving {cut:?}:\n{left}")
                };
                let folder = scratch();
                telling(what, || drop(self.open_state(folder.path(), &left, &moment.oracle, count)));
                if cuts.is_empty() {
                    break;
                }
            }
        }
    }
}

fn kind_of(errno: Errno) -> ErrorKind {
    if errno == Errno::NOSPC { ErrorKind::NoSpace } else { ErrorKind::Io }
}

#[test]
fn every_failing_operation_of_the_host_leaves_each_change_of_a_store_done_or_not_begun() {
    let (states, twice) = (AtomicU64::new(0), AtomicU64::new(0));
    let _alone = PROGRAMS.write();
    let mut enumeration = Enumeration::new(&states, &twice, 1);
    let sample = if number_from("COWDISK_CRASH_STATES").is_some() { 1 } else { SAMPLE };
    let (mut failures, mut told) = (0, 0);
    for errno in [Errno::IO, Errno::NOSPC] {
        let mut nth = if errno == Errno::IO { 0 } else { sample / 2 };
        loop {
            let what = || format!("operation {nth} failed with {errno}");
            let (operations, was_told) = telling(what, || enumeration.fail(nth, errno));
            if nth >= operations {
                break;
            }
            failures += 1;
            told += u64::from(was_told);
            nth += sample;
        }
    }
    // All but what only tidies up, or is tried first where the host may not have it.
    assert!(told * 5 > failures * 4, "{told} of {failures} failures reached the caller");
    println!("{failures} failures, {told} told to the caller, {} states after them", states.into_inner());
}
