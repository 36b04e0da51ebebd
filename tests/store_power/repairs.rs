//! A repair of a damaged store is cut short by a power cut after each of its operations: then another repair mends what
//! is left, and nothing is lost.

use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use cowdisk::finding::Outcome;
use cowdisk::store::{CheckReport, CheckRequest, DiskName, NoProgress, Store};

use crate::common::boot::Boots;
use crate::common::host::{Event, RecordingHost};
use crate::common::sim::Rng;
use crate::oracle::{Mark, Oracle};
use crate::run::Run;
use crate::script::{DiskOp, Op};
use crate::{Moment, PROGRAMS, lines, scratch, telling};

/// A store with a disk that was closed, and one whose daemon died with records in its journal.
fn used_store(folder: &Path, sources: &Path) -> Oracle {
    let run = Run::new(folder, sources, 0);
    run.init().expect("make a store");
    for op in [
        Op::Import { image: 0, twin: false, kernel: true },
        Op::Create { instance: 0, image: 0, flavor: None, local: true, no_cow: false },
        Op::Disk(0, DiskName::Root, DiskOp::Write(3, 9)),
        Op::Disk(0, DiskName::Root, DiskOp::Close),
        Op::Disk(0, DiskName::Local, DiskOp::Write(8, 16)),
        Op::Disk(0, DiskName::Local, DiskOp::Flush),
    ] {
        run.apply_in(0, &op, &NoProgress);
    }
    run.end();
    let mut oracle = Oracle::default();
    for event in &run.host.lock().events {
        if let Event::Mark(mark) = event {
            oracle.apply(mark);
        }
    }
    oracle
}

fn put(path: &Path, bytes: &[u8]) {
    File::create(path).and_then(|mut file| file.write_all(bytes)).expect("write a file");
}

fn edit(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).expect("open a file of the store");
    file.write_all_at(bytes, at).expect("damage a file");
}

/// Does everything to it that a repair mends.
fn damage(store: &Path) {
    let instance = store.join("instances/web");
    // One copy of a superblock.
    edit(&instance.join("disk.map"), 4096 + 80, &[0xee; 40]);
    // Data in a block that the map calls the base's.
    edit(&instance.join("disk.data"), 5 << 12, &[0xee; 4096]);
    // Attributes that cannot be read, and such of nothing.
    put(&instance.join("disk.attr"), b"{");
    put(&store.join("attrs/image-gone.json"), b"{}");
    // What nothing refers to.
    let nothing = "ab".repeat(32);
    put(&store.join("boot").join(&nothing), b"kernel");
    DirBuilder::new().mode(0o700).create(store.join("bases").join(&nothing)).expect("make a folder");
    put(&store.join("bases").join(&nothing).join("base.raw"), &[7; 4096]);
    put(&store.join("tmp/boot-0123"), b"half a kernel");
    // A base that was touched.
    for base in std::fs::read_dir(store.join("bases")).expect("read a folder") {
        let path = base.expect("an entry").path();
        if !path.ends_with(&nothing) {
            let touched = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
            let file = File::open(path.join("base.raw")).expect("open a base");
            file.set_modified(touched).expect("touch a base");
        }
    }
}

/// Checks and repairs the store in `folder`, whose host is recorded.
fn repair(folder: &Path) -> (RecordingHost<Mark>, CheckReport) {
    let host = RecordingHost::new(folder, "store");
    let store = Store::open_as_it_is_on(Arc::new(host.clone()), &folder.join("store")).expect("open a store");
    let store = store.with_run_dir(folder.join("run"));
    let request = CheckRequest { full: true, repair: true, ..CheckRequest::default() };
    let report = store.check(&request, &NoProgress).expect("check the store");
    (host, report)
}

#[test]
fn a_repair_that_a_power_cut_has_cut_short_is_done_by_the_next_one() {
    let _alone = PROGRAMS.write();
    let mut boots = Boots::new();
    let (folder, sources) = (scratch(), scratch());
    let oracle = used_store(folder.path(), sources.path());
    boots.next();
    damage(&folder.path().join("store"));
    let (host, report) = repair(folder.path());
    let mended = report.findings.iter().filter(|finding| finding.outcome == Outcome::Mended).count();
    assert_eq!(mended, 8, "{:#?}", report.findings);
    let recording = host.lock();
    let mut moment = Moment { tree: recording.start.clone(), oracle };
    let states = AtomicU64::new(0);
    let mut rng = Rng(1);
    for number in 0..=recording.events.len() {
        for cut in moment.cuts(&mut rng) {
            let left = moment.tree.left(&cut);
            let what = || {
                let events = lines(&recording.events[..number]);
                format!("power cut after\n{events}\nleaving {cut:?}:\n{}", left.names())
            };
            telling(what, || {
                let folder = scratch();
                left.make(folder.path());
                boots.next();
                let (_, report) = repair(folder.path());
                assert!(report.is_clean(), "{:#?}", report.findings);
                let store = Store::open_as_it_is(&folder.path().join("store")).expect("open the store");
                moment.oracle.check(&store.with_run_dir(folder.path().join("run")));
                states.fetch_add(1, Ordering::Relaxed);
            });
        }
        if let Some(event) = recording.events.get(number) {
            moment.step(number, event);
        }
    }
    println!("{} states after {} events: all mended", states.into_inner(), recording.events.len());
}
