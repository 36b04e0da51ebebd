//! Every state that a power cut may leave of an overlay, opened and held against the oracle: each sector is the content
//! of the last completed flush or of a later write.
//!
//! A random script of requests runs over recorded files. After each change, sync and durable write of the run the host
//! loses power: of what is not durable, nothing, everything, one file's, all but the last change, only the last one, a
//! torn part of it, or any subset reaches the disk (`common/record.rs`). Each state is opened in another boot, with the
//! live map of the boot before still in its place or not, checked, written to, and cut again: while it is recovered, and
//! after it was written to.
//!
//! `COWDISK_CRASH_STATES=120000 cargo nextest run --test crash` tries that many states; `COWDISK_CRASH_SEED` begins
//! elsewhere. A failure says with which seed it comes back alone. Needs root: see `common/boot.rs`.
#![allow(clippy::cast_possible_truncation)] // sizes that the test made itself

mod common;
#[path = "crash/contents.rs"]
mod contents;
#[path = "crash/disk.rs"]
mod disk;
#[path = "crash/oracle.rs"]
mod oracle;
#[path = "crash/run.rs"]
mod run;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use common::boot::Boots;
use common::live::LiveCopy;
use common::record::{Choice, Content, Event, Image, Log, SharedLog};
use common::sim::Rng;
use cowdisk::finding::Severity;
use cowdisk::format::LayerId;
use cowdisk::overlay::{Overlay, Usage, check_layer};
use disk::Disk;
use oracle::{Mark, Moment, Oracle};
use run::{Op, Run, files, open, random_op, random_script};

const LAYER: LayerId = LayerId([0x5a; 16]);
const DATA: usize = 0;
const MAP: usize = 1;
/// States of a run without `COWDISK_CRASH_STATES`, which tries one in `SAMPLE` of each script's.
const STATES: u64 = 5_000;
const SAMPLE: u64 = 8;

/// Does something of which, should it fail, is told what it was.
fn telling<T>(what: impl FnOnce() -> String, work: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| panic!("so failed: {}", what()))
}

/// Enumerates the states of one script after the other.
struct Enumeration<'a> {
    boots: Boots,
    live: PathBuf,
    states: &'a AtomicU64,
    twice: &'a AtomicU64,
    /// Sectors written so far: each has a content of its own.
    writes: u64,
    rng: Rng,
    /// One in so many states is tried.
    sample: u64,
}

impl Enumeration<'_> {
    fn script(&mut self, seed: u64) {
        self.rng = Rng(seed);
        self.writes = 0;
        let disk = Disk::random(&mut self.rng);
        let (before, ops) = random_script(&disk, &mut self.rng);
        let what = || {
            let before = before.len();
            format!(
                "the script was {ops:?}, after {before} more requests, on {disk:?}\n\
                 it comes back with COWDISK_CRASH_STATES=1 COWDISK_CRASH_SEED={seed}"
            )
        };
        telling(what, || {
            let (log, first) = self.record(&disk, &before, &ops);
            self.all_moments(&disk, &log, first, seed);
        });
    }

    /// Runs a script without a power cut. Returns what it did, and where the part to try begins.
    fn record(&mut self, disk: &Disk, before: &[Op], ops: &[Op]) -> (Log<Mark>, usize) {
        self.boots.next();
        LiveCopy::put(None, &self.live);
        let log = Log::new(vec![Image::default(), Image::default()]);
        Overlay::create(&files(&log), LAYER, disk.geometry, disk.base().reference()).expect("create");
        let (now, size) = (disk.contents(), disk.geometry.size());
        let (live, writes) = (&self.live, &mut self.writes);
        let mut run = Run { disk, live, log, overlay: None, now, size, writes };
        run.open();
        before.iter().for_each(|op| run.apply(op));
        let first = run.log.lock().events.len();
        ops.iter().for_each(|op| run.apply(op));
        (run.end(), first)
    }

    /// Cuts the power after each event from `first` on.
    fn all_moments(&mut self, disk: &Disk, log: &Log<Mark>, first: usize, seed: u64) {
        let mut moment = Moment::new(log, Oracle::new(disk.contents(), disk.geometry.size()), None);
        let mut tried = HashSet::new();
        for (number, event) in log.events.iter().enumerate() {
            moment.step(number, event);
            if number < first {
                continue;
            }
            // All of what may be left of a record of several sectors; of long scripts, mostly of scattered writes, less.
            let sample = match event {
                Event::Change(MAP, change) if change.fills_sectors() => 1,
                _ => self.sample * (1 + log.events.len() as u64 / 300),
            };
            let mut rng = Rng(seed.rotate_left(32) ^ number as u64);
            for choice in Choice::at(moment.files.last_pending(), 2, 2, &mut rng) {
                // Of its own, so that a state comes back whichever others are tried.
                self.rng = Rng(rng.next());
                if self.rng.below(sample) != 0 {
                    continue;
                }
                let left = moment.files.left(&choice);
                if tried.insert((left[DATA].fingerprint(), left[MAP].fingerprint(), moment.oracle.epoch)) {
                    let what = || format!("power cut after event {number}, {event:?}, leaving {choice:?}");
                    telling(what, || self.try_state(disk, left, &moment));
                }
            }
        }
    }

    /// Opens a state in another boot, checks it, goes on with it, and cuts the power again: once while it was recovered,
    /// if that changed anything, and once later.
    fn try_state(&mut self, disk: &Disk, state: Vec<Image>, moment: &Moment) {
        let (log, overlay, now) = self.open_state(disk, state, moment);
        let recovered = log.lock().events.len();
        let (oracle, size) = (Oracle::new(now.clone(), overlay.size()), overlay.size());
        let (live, writes) = (&self.live, &mut self.writes);
        let mut run = Run { disk, live, log, overlay: Some(overlay), now, size, writes };
        for _ in 0..1 + self.rng.below(5) {
            run.apply(&random_op(disk, &mut self.rng));
        }
        run.apply(&Op::Flush);
        if self.rng.below(2) == 0 {
            run.apply(&Op::Reopen);
        }
        let log = run.end();
        let mut ends = vec![recovered + self.rng.below((log.events.len() - recovered) as u64 + 1) as usize];
        if recovered > 0 {
            ends.push(self.rng.below(recovered as u64 + 1) as usize);
        }
        for end in ends {
            let mut moment = Moment::new(&log, oracle.clone(), moment.live.clone());
            log.events[..end].iter().enumerate().for_each(|(number, event)| moment.step(number, event));
            let choices = Choice::at(moment.files.last_pending(), 2, 2, &mut self.rng);
            let choice = &choices[self.rng.below(choices.len() as u64) as usize];
            let what = || {
                let events = &log.events;
                format!(
                    "second one before event {end} of {recovered} to recover and {events:#?}, leaving {choice:?}"
                )
            };
            telling(what, || self.open_state(disk, moment.files.left(choice), &moment));
            self.twice.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Cuts the power so that a first commit leaves one of its changes alone, or all but one: its record without the
    /// superblock, for one; and again, when the next session has begun.
    fn cut_first_commit_short(&mut self, seed: u64) {
        self.rng = Rng(seed);
        let disk = Disk::random(&mut self.rng);
        let (log, first) = self.record(&disk, &[], &[Op::Write(0, 0, 512), Op::Flush]);
        let mut moment = Moment::new(&log, Oracle::new(disk.contents(), disk.geometry.size()), None);
        for (number, event) in log.events.iter().enumerate() {
            moment.step(number, event);
            if number < first || !matches!(event, Event::Change(MAP, _)) {
                continue;
            }
            let pending: Vec<usize> = moment.files.0[MAP].pending.iter().map(|(number, _)| *number).collect();
            for choice in pending.into_iter().map(Choice::AllBut).chain([Choice::Only(number)]) {
                let what = || format!("power cut after event {number}, {event:?}, leaving {choice:?}");
                telling(what, || self.cut_again(&disk, &moment, &choice, seed));
            }
        }
    }

    /// Opens what a power cut leaves, begins the next session, and cuts the power after each of its events.
    fn cut_again(&mut self, disk: &Disk, moment: &Moment, choice: &Choice, seed: u64) {
        let (log, overlay, now) = self.open_state(disk, moment.files.left(choice), moment);
        let oracle = Oracle::new(now.clone(), overlay.size());
        let (size, live, writes) = (overlay.size(), &self.live, &mut self.writes);
        let mut run = Run { disk, live, log, overlay: Some(overlay), now, size, writes };
        run.apply(&Op::Preallocate(0, 0, 512));
        let log = run.end();
        let mut again = Moment::new(&log, oracle, None);
        for (number, event) in log.events.iter().enumerate() {
            again.step(number, event);
            for subset in 0..8 {
                let choice = Choice::Changes(Rng(seed ^ subset));
                let what = || format!("second one after {number}, {event:?}, leaving {choice:?}");
                telling(what, || self.open_state(disk, again.files.left(&choice), &again));
            }
        }
    }

    fn open_state(
        &mut self,
        disk: &Disk,
        state: Vec<Image>,
        moment: &Moment,
    ) -> (SharedLog<Mark>, Overlay, Vec<Content>) {
        self.boots.next();
        LiveCopy::put(moment.live.as_deref().filter(|_| self.rng.below(2) == 0), &self.live);
        let log = Log::new(state);
        assert_clean(&log, &self.live, Usage::Free);
        let overlay = open(disk, &log, &self.live).expect("open after a power cut");
        let found = moment.oracle.check(disk, &overlay);
        assert_clean(&log, &self.live, Usage::InUse);
        self.states.fetch_add(1, Ordering::Relaxed);
        (log, overlay, found)
    }
}

/// A check finds nothing but notes.
fn assert_clean(log: &SharedLog<Mark>, live: &Path, usage: Usage) {
    for finding in check_layer("test", &files(log), Some(live), usage).findings {
        assert_eq!(finding.severity, Severity::Note, "a check ({usage:?}) finds: {finding}");
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}: must be a number, not {text:?}")))
}

/// A record of which the superblock was lost was taken for committed once a later superblock had a journal, while that
/// journal's zeroes were lost: what the guest had seen to be gone was there again.
#[test]
fn what_a_first_commit_that_was_cut_short_has_left_never_counts() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let (states, twice) = (AtomicU64::new(0), AtomicU64::new(0));
    let (boots, live) = (Boots::new(), folder.path().join("live"));
    let mut enumeration =
        Enumeration { boots, live, states: &states, twice: &twice, writes: 0, rng: Rng(0), sample: 1 };
    for seed in 1..=8 {
        telling(|| format!("seed {seed}"), || enumeration.cut_first_commit_short(seed));
    }
}

#[test]
fn every_state_that_a_power_cut_leaves_holds_what_was_flushed_or_later() {
    let wanted = number_from("COWDISK_CRASH_STATES");
    let seed = number_from("COWDISK_CRASH_SEED").unwrap_or(1);
    // A long run takes all cores; a short one leaves them to the other tests.
    let threads = match wanted {
        Some(2..) => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        _ => 1,
    };
    let states_wanted = wanted.unwrap_or(STATES);
    let (states, twice, scripts) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let boots = Boots::new();
                let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
                let mut enumeration = Enumeration {
                    boots,
                    live: folder.path().join("live"),
                    states: &states,
                    twice: &twice,
                    writes: 0,
                    rng: Rng(0),
                    sample: if wanted.is_none() { SAMPLE } else { 1 },
                };
                while states.load(Ordering::Relaxed) < states_wanted {
                    enumeration.script(seed + scripts.fetch_add(1, Ordering::Relaxed));
                }
            });
        }
    });
    println!(
        "{} states of {} scripts from seed {seed}, {} of them after a second power cut: all as promised",
        states.into_inner(),
        scripts.into_inner(),
        twice.into_inner()
    );
}
