//! Every state that a power cut may leave of a store, opened and held against the oracle: each change that was
//! acknowledged is there, each that was under way is done or not begun, nothing half-made is left, every disk holds what
//! its last flush had covered or later writes, and a check finds nothing.
//!
//! A random script of changes (images, flavors, instances, owners, disks) is made by two processes on a recorded folder;
//! now and then one of them dies in the middle of a change, or the other makes one while the first copies. After each
//! operation on the host's disk the host loses power, and any part of what is not durable reaches the disk
//! (`common/tree.rs` says which parts there are). Each state is made in a folder in memory, opened in another boot, looked
//! at, changed again, and cut again.
//!
//! `COWDISK_CRASH_STATES=20000 cargo nextest run --test store_power` tries that many states; `COWDISK_CRASH_SEED` begins
//! elsewhere. A failure says with which seed it comes back alone. Needs root: see `common/boot.rs`.
#![allow(clippy::cast_possible_truncation)] // sizes that the test made itself

mod common;
#[path = "store_power/faults.rs"]
mod faults;
#[path = "store_power/oracle.rs"]
mod oracle;
#[path = "store_power/repairs.rs"]
mod repairs;
#[path = "store_power/run.rs"]
mod run;
#[path = "store_power/script.rs"]
mod script;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use common::boot::Boots;
use common::host::Event;
use common::record::Choice;
use common::sim::Rng;
use common::tree::{Cut, Left, Tree};
use cowdisk::store::{DiskName, NoProgress};
use oracle::{Key, Mark, Oracle, check_as_it_is};
use parking_lot::RwLock;
use run::Run;
use script::{DiskOp, Op, random_op, random_script};

/// States of a run without `COWDISK_CRASH_STATES`, which tries one in `SAMPLE` of each script's; one with it tries one in
/// `SAMPLE_LONG`, and all of the one script if it asks for one state.
const STATES: u64 = 1_500;
const SAMPLE: u64 = 40;
const SAMPLE_LONG: u64 = 10;
/// Held shared while a state is tried, and alone while a script is recorded: a script runs a program, and until that has
/// begun it holds all that this process has open, with the locks that are on it.
static PROGRAMS: RwLock<()> = RwLock::new(());
/// How many of the events before a power cut a message has.
const EVENTS_SHOWN: usize = 40;

/// Does something of which, should it fail, is told what it was.
fn telling<T>(what: impl FnOnce() -> String, work: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| panic!("so failed: {}", what()))
}

/// Events for a message.
fn lines(events: &[Event<Mark>]) -> String {
    events.iter().map(|event| format!("  {event:?}")).collect::<Vec<_>>().join("\n")
}

fn scratch() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    std::fs::create_dir(folder.path().join("run")).expect("a run directory");
    folder
}

/// A moment of a run.
struct Moment {
    tree: Tree,
    oracle: Oracle,
}

impl Moment {
    fn step(&mut self, number: usize, event: &Event<Mark>) {
        self.tree.step(number, event);
        if let Event::Mark(mark) = event {
            self.oracle.apply(mark);
        }
    }

    /// What to try at this moment: names and contents alike, and each without the other.
    fn cuts(&self, rng: &mut Rng) -> Vec<Cut> {
        let names = self.tree.pending_names();
        let Some(last) = self.tree.last_pending() else {
            return vec![Cut { names: Choice::Lost, contents: Choice::Lost }];
        };
        let alike = Choice::at(Some(last), 0, 2, rng).into_iter();
        let mut cuts: Vec<Cut> = alike.map(|both| Cut { names: both.clone(), contents: both }).collect();
        cuts.push(Cut { names: Choice::All, contents: Choice::Lost });
        cuts.push(Cut { names: Choice::Lost, contents: Choice::All });
        cuts.push(Cut { names: Choice::All, contents: Choice::Parts(Rng(rng.next())) });
        if names.len() > 1 {
            let one = names[rng.below(names.len() as u64) as usize];
            cuts.push(Cut { names: Choice::AllBut(one), contents: Choice::All });
            cuts.push(Cut { names: Choice::Only(one), contents: Choice::All });
            for contents in [Choice::Lost, Choice::All] {
                cuts.push(Cut { names: Choice::Changes(Rng(rng.next())), contents });
            }
        }
        cuts
    }
}

/// Enumerates the states of one script after the other.
struct Enumeration<'a> {
    boots: Boots,
    /// Sources of images, for all runs.
    sources: tempfile::TempDir,
    states: &'a AtomicU64,
    twice: &'a AtomicU64,
    rng: Rng,
    /// One in so many states is tried.
    sample: u64,
}

impl<'a> Enumeration<'a> {
    /// One that counts the states it has tried, one in `sample`, in `states`, and those of them that were cut twice in `twice`.
    fn new(states: &'a AtomicU64, twice: &'a AtomicU64, sample: u64) -> Self {
        let sources = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        Self { boots: Boots::new(), sources, states, twice, rng: Rng(0), sample }
    }

    fn script(&mut self, seed: u64) {
        self.rng = Rng(seed);
        let ops = random_script(&mut self.rng);
        let what = || {
            format!(
                "the script was {ops:?}\nit comes back with COWDISK_CRASH_STATES=1 COWDISK_CRASH_SEED={seed}"
            )
        };
        telling(what, || {
            let folder = scratch();
            let run = self.record(folder.path(), &ops);
            let first = if seed.is_multiple_of(8) { 0 } else { after_init(&run.host.lock().events) };
            self.all_moments(&run, first, seed);
        });
    }

    /// Runs a script without a power cut.
    fn record(&mut self, folder: &Path, ops: &[Op]) -> Run {
        let _alone = PROGRAMS.write();
        self.boots.next();
        let run = Run::new(folder, self.sources.path(), 0);
        run.init().expect("make a store");
        ops.iter().for_each(|op| run.apply(op));
        run.end();
        run
    }

    /// Cuts the power after each event from `first` on.
    fn all_moments(&mut self, run: &Run, first: usize, seed: u64) {
        let recording = run.host.lock();
        let mut moment = Moment { tree: recording.start.clone(), oracle: Oracle::default() };
        let mut tried = HashSet::new();
        let count = run.count.load(Ordering::Relaxed);
        for (number, event) in recording.events.iter().enumerate() {
            moment.step(number, event);
            if number < first {
                continue;
            }
            let mut rng = Rng(seed.rotate_left(32) ^ number as u64);
            for cut in moment.cuts(&mut rng) {
                // Of its own, so that a state comes back whichever others are tried.
                self.rng = Rng(rng.next());
                if self.rng.below(self.sample) != 0 {
                    continue;
                }
                let left = moment.tree.left(&cut);
                if tried.insert((left.fingerprint(), moment.oracle.epoch)) || self.sample == 1 {
                    let what = || {
                        let before = lines(&recording.events[number.saturating_sub(EVENTS_SHOWN)..=number]);
                        let left = left.names();
                        format!(
                            "power cut after event {number}, the last of\n{before}\nleaving {cut:?}:\n{left}"
                        )
                    };
                    telling(what, || self.try_state(&left, &moment.oracle, count));
                }
            }
        }
    }

    /// Opens a state in another boot, checks it, goes on with it, and cuts the power again.
    fn try_state(&mut self, left: &Left, oracle: &Oracle, count: u64) {
        let _shared = PROGRAMS.read();
        let folder = scratch();
        let (run, oracle) = self.open_state(folder.path(), left, oracle, count);
        if self.rng.below(3) > 0 {
            return;
        }
        let ops = std::iter::repeat_with(|| random_op(&mut self.rng)).filter(|op| !op.runs_a_program());
        let ops: Vec<Op> = ops.take(1 + count as usize % 4).collect();
        telling(
            || format!("then {ops:?}"),
            || {
                ops.iter().for_each(|op| run.apply(op));
                run.end();
                let recording = run.host.lock();
                let mut moment = Moment { tree: recording.start.clone(), oracle };
                let end = self.rng.below(recording.events.len() as u64 + 1) as usize;
                for (number, event) in recording.events[..end].iter().enumerate() {
                    moment.step(number, event);
                }
                let cuts = moment.cuts(&mut self.rng);
                let cut = &cuts[self.rng.below(cuts.len() as u64) as usize];
                let again = moment.tree.left(cut);
                let what = || {
                    let (before, left) = (lines(&recording.events[..end]), again.names());
                    format!("second power cut after\n{before}\nleaving {cut:?}:\n{left}")
                };
                let folder = scratch();
                let count = run.count.load(Ordering::Relaxed);
                telling(what, || self.open_state(folder.path(), &again, &moment.oracle, count));
                self.twice.fetch_add(1, Ordering::Relaxed);
            },
        );
    }

    /// Has one process die within `first`, and another one, which had the store open all the time, do `then`; cuts the
    /// power once that is answered.
    fn death(&mut self, first: &Op, then: &Op, after: u64) -> bool {
        let folder = scratch();
        self.boots.next();
        let run = Run::new(folder.path(), self.sources.path(), 0);
        run.init().expect("make a store");
        for op in setup(matches!(first, Op::RemoveImage(_))) {
            run.apply_in(0, &op, &NoProgress);
        }
        run.store(1).expect("another process opens the store");
        let died = run.kill_in(0, first, after);
        run.apply_in(1, then, &NoProgress);
        run.end();
        let recording = run.host.lock();
        let mut moment = Moment { tree: recording.start.clone(), oracle: Oracle::default() };
        recording.events.iter().enumerate().for_each(|(number, event)| moment.step(number, event));
        let mut rng = Rng(after);
        for cut in moment.cuts(&mut rng) {
            self.rng = Rng(rng.next());
            if self.rng.below(self.sample) != 0 {
                continue;
            }
            let left = moment.tree.left(&cut);
            let what = || {
                let (events, left) = (lines(&recording.events), left.names());
                format!(
                    "{first:?}, dead after {after} operations, then {then:?}, and a power cut after\n{events}\nleaving {cut:?}:\n{left}"
                )
            };
            let folder = scratch();
            telling(what, || drop(self.open_state(folder.path(), &left, &moment.oracle, 0)));
        }
        died
    }

    /// Makes a state in `folder`, opens its store, or makes one where it was being made, and looks at all of it. Returns
    /// what must be there from then on.
    fn open_state(&mut self, folder: &Path, left: &Left, oracle: &Oracle, count: u64) -> (Run, Oracle) {
        left.make(folder);
        self.boots.next();
        let store = folder.join("store");
        if self.rng.below(2) == 0 && store.exists() {
            check_as_it_is(&store);
        }
        let run = Run::new(folder, self.sources.path(), count);
        let durable = match run.store(0) {
            Ok(store) => Oracle::of(&oracle.check(&store)),
            Err(error) => {
                assert!(!oracle.needs_store(), "{error}");
                assert_eq!(error.kind(), cowdisk::ErrorKind::NotFound, "{error}");
                run.init().expect("make the store that was being made");
                oracle.check(&run.store(0).expect("the new store"));
                oracle.clone()
            }
        };
        self.states.fetch_add(1, Ordering::Relaxed);
        (run, durable)
    }
}

/// What there is before a process dies: an image with attributes, and an instance that does not need it.
fn setup(twin: bool) -> [Op; 3] {
    [
        Op::Import { image: 0, twin, kernel: twin },
        Op::Create { instance: 0, image: 0, flavor: None, local: true, no_cow: true },
        Op::ChangeImage(0),
    ]
}

/// What a process dies of, and what another one does then that builds upon what is left.
fn deaths() -> Vec<(Op, Op)> {
    let import = |image, twin| Op::Import { image, twin, kernel: true };
    let create = Op::Create { instance: 1, image: 0, flavor: None, local: true, no_cow: false };
    let flavor = Op::AddFlavor { flavor: 0, swap: false };
    let anew = |instance| Op::Create { instance, image: 0, flavor: None, local: false, no_cow: false };
    vec![
        (import(1, true), import(1, true)),
        (import(1, true), import(2, true)),
        (Op::RemoveImage(0), import(0, true)),
        (Op::RemoveImage(0), import(1, true)),
        (Op::RemoveImage(0), Op::Reopen),
        (create.clone(), create),
        (Op::RemoveInstance(0), anew(0)),
        (Op::RemoveInstance(0), Op::Reopen),
        (flavor.clone(), flavor),
        (Op::ChangeImage(0), Op::ChangeImage(0)),
    ]
}

/// The event after the first answer, which is that of `init`.
fn after_init(events: &[Event<Mark>]) -> usize {
    let answer = events.iter().position(|event| matches!(event, Event::Mark(Mark::Answered(..))));
    answer.expect("init was answered")
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}: must be a number, not {text:?}")))
}

#[test]
fn every_state_that_a_power_cut_leaves_of_a_store_has_each_change_done_or_not_begun() {
    let wanted = number_from("COWDISK_CRASH_STATES");
    let seed = number_from("COWDISK_CRASH_SEED").unwrap_or(1);
    let states_wanted = wanted.unwrap_or(STATES);
    // A long run takes all cores; a short one leaves them to the other tests.
    let threads = match wanted {
        Some(2..) => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        _ => 1,
    };
    let (states, twice, scripts) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let sample = match wanted {
        None => SAMPLE,
        Some(1) => 1,
        Some(_) => SAMPLE_LONG,
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut enumeration = Enumeration::new(&states, &twice, sample);
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

/// One disk is an overlay and the other a plain file. The other enumeration makes such instances, too, but tries few of the
/// states in which they are half-made.
#[test]
fn an_instance_with_disks_of_both_kinds_is_made_whole_or_not_at_all() {
    let create = Op::Create { instance: 0, image: 0, flavor: None, local: true, no_cow: false };
    let both = |op: DiskOp| DiskName::ALL.map(|disk| Op::Disk(0, disk, op.clone()));
    let mut ops = vec![Op::Import { image: 0, twin: false, kernel: false }, create];
    for op in [DiskOp::Write(3, 9), DiskOp::Flush, DiskOp::Write(8, 16), DiskOp::Discard(0, 12), DiskOp::Grow]
    {
        ops.extend(both(op));
    }
    ops.push(Op::RemoveInstance(0));
    let (states, twice) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut enumeration = Enumeration::new(&states, &twice, 2);
    let folder = scratch();
    let run = enumeration.record(folder.path(), &ops);
    let place = |found: fn(&Event<Mark>) -> bool| {
        run.host.lock().events.iter().position(found).expect("the instance is made")
    };
    let asked = place(|event| matches!(event, Event::Mark(Mark::Asked(Key::Instance(_), _))));
    let answered = place(|event| matches!(event, Event::Mark(Mark::Answered(Key::Instance(_), _))));
    assert!(answered - asked > 10, "each file is made, filled and synced: {asked} to {answered}");
    enumeration.all_moments(&run, asked, 1);
    println!(
        "{} states, {} of them after a second power cut: all as promised",
        states.into_inner(),
        twice.into_inner()
    );
}

/// Another process may build upon what one that died had not made durable, and must not acknowledge that then.
#[test]
fn what_builds_upon_the_unfinished_work_of_a_dead_process_survives_a_power_cut() {
    let (states, twice) = (AtomicU64::new(0), AtomicU64::new(0));
    let _alone = PROGRAMS.write();
    let mut enumeration =
        Enumeration::new(&states, &twice, if number_from("COWDISK_CRASH_STATES").is_some() { 1 } else { 3 });
    let mut deaths_died = 0;
    for (first, then) in deaths() {
        let died = (0..).take_while(|after| enumeration.death(&first, &then, *after)).count();
        assert!(died > 2, "{first:?} takes more than {died} operations");
        deaths_died += died;
    }
    println!("{} states after {deaths_died} deaths: all as promised", states.into_inner());
}
