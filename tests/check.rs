//! The verifier of a layer: every kind of damage, made on purpose, is found and named; what can be mended is, and the
//! disk shows the same bytes afterwards; a layer that was only used or only crashed is clean.
#![allow(clippy::cast_possible_truncation)] // sizes that the test made itself

mod common;

use std::sync::atomic::Ordering;

use common::layer::{DISK, LAYER, Layer};
use common::sim::{SimFile, SimHost};
use cowdisk::ErrorKind;
use cowdisk::finding::{Finding, Outcome, Severity};
use cowdisk::format::{BlockState, Change, JournalRecord, PAGES_OFFSET, SUPERBLOCK_BYTES, Superblock};
use cowdisk::overlay::{
    BaseImage, LayerFiles, LayerReport, Overlay, Usage, check_layer, read_superblock, repair_layer,
};
use cowdisk::storage::{FileStorage, MemStorage, Storage};
use cowdisk::units::{BlockSpan, Geometry};

/// What is done to a layer here besides using it.
trait Examined {
    fn check(&self) -> LayerReport;
    fn repair(&self) -> Vec<Finding>;
    fn corrupt(&self, offset: u64, mask: u8);
    fn superblock(&self) -> Superblock;
    fn put_superblock(&self, copy: u64, superblock: &Superblock);
}

impl Examined for Layer {
    fn check(&self) -> LayerReport {
        check_layer("test", &self.files(), Some(&self.live_map()), Usage::Free)
    }

    fn repair(&self) -> Vec<Finding> {
        let report = repair_layer("test", &self.files(), Some(&self.live_map()));
        self.data.sync().expect("a simulated sync");
        report.expect("a repair").findings
    }

    /// Flips bits where the host's disk holds the map.
    fn corrupt(&self, offset: u64, mask: u8) {
        self.map.corrupt(offset, mask);
    }

    fn superblock(&self) -> Superblock {
        read_superblock(&self.map).expect("a whole superblock")
    }

    /// Writes one copy of the superblock, whatever it says.
    fn put_superblock(&self, copy: u64, superblock: &Superblock) {
        self.map.write_durable_at(copy * SUPERBLOCK_BYTES as u64, &superblock.encode()).expect("write");
    }
}

fn kinds(findings: &[Finding]) -> Vec<(&'static str, Severity)> {
    findings.iter().map(|finding| (finding.kind, finding.severity)).collect()
}

/// The one finding that there is.
#[track_caller]
fn only(report: &LayerReport, kind: &str, severity: Severity) -> Finding {
    let [finding] = &report.findings[..] else { panic!("not one finding: {:#?}", report.findings) };
    assert_eq!((finding.kind, finding.severity), (kind, severity), "{finding:#?}");
    assert_eq!(finding.object, "disk test");
    finding.clone()
}

#[test]
fn a_new_a_used_and_a_closed_layer_are_clean() {
    let host = SimHost::new(0);
    let files = || LayerFiles { data: Box::new(SimFile::new(&host)), map: Box::new(SimFile::new(&host)) };
    let new = files();
    let geometry = Geometry::new(DISK, 65536, 512).expect("valid");
    Overlay::create(&new, LAYER, geometry, BaseImage::blank().reference()).expect("create");
    assert_eq!(check_layer("new", &new, None, Usage::Free).findings, []);

    let (layer, overlay) = Layer::open_one();
    let in_use = || check_layer("test", &layer.files(), Some(&layer.live_map()), Usage::InUse).findings;
    assert_eq!(in_use(), []);
    overlay.write_at(12_345, &[9; 100_000]).expect("write");
    overlay.zero(16_384, 65_536).expect("zero");
    layer.data.sync().expect("as the host does now and then");
    assert_eq!(in_use(), [], "what is not flushed is in the live map");
    overlay.close().expect("close");
    let report = layer.check();
    assert_eq!(report.findings, []);
    assert_eq!(report.superblock.map(|superblock| superblock.layer), Some(LAYER));
    assert_eq!(Layer::after_a_crash().check().findings, []);
}

#[test]
fn a_layer_that_was_not_closed_says_what_its_next_opening_does() {
    let (layer, overlay) = Layer::open_one();
    overlay.write_at(8 << 20, &[9; 4096]).expect("write");
    drop(overlay);
    let finding = only(&layer.check(), "session-open", Severity::Note);
    assert!(finding.remedy.text().contains("its live map is there"), "{finding:?}");
    // The block that only the live map knows is data, and a repair leaves it alone.
    assert_eq!(kinds(&layer.repair()), [("session-open", Severity::Note)]);
    let mut block = [0; 4096];
    layer.open().read_at(8 << 20, &mut block).expect("read");
    assert_eq!(block, [9; 4096]);

    layer.forget_live_map();
    let finding = only(&layer.check(), "live-map-lost", Severity::Damage);
    assert!(finding.remedy.text().contains("-o accept_loss"), "{finding:?}");
    layer.repair();
    let mut now = [0; 4096];
    layer.data.read_at(8 << 20, &mut now).expect("read");
    assert_eq!(now, [9; 4096], "as long as the live map may come back its data stays");

    let old_boot = Superblock { boot: cowdisk::format::BootId([1; 16]), ..layer.superblock() };
    for copy in 0..2 {
        layer.put_superblock(copy, &old_boot);
    }
    let findings = layer.check().findings;
    assert_eq!(kinds(&findings), [("session-open", Severity::Note), ("data-unmapped", Severity::Note)]);
    assert!(findings[0].remedy.text().contains("last completed flush"), "{findings:?}");
}

#[test]
fn a_distrusted_and_a_damaged_live_map_are_told_apart() {
    let (layer, overlay) = Layer::open_one();
    drop(overlay);
    let put = |at: u64, byte: u8| {
        let file = std::fs::File::options().write(true).open(layer.live_map()).expect("a live map");
        std::os::unix::fs::FileExt::write_all_at(&file, &[byte], at).expect("write");
    };
    put(56, 1);
    only(&layer.check(), "sync-failed", Severity::Warning);
    put(56, 0);
    put(4096, 3);
    let finding = only(&layer.check(), "live-map-damaged", Severity::Damage);
    assert!(finding.message.contains("reserved state 3"), "{finding:?}");
    put(8, !6);
    only(&layer.check(), "live-map-lost", Severity::Damage);
}

#[test]
fn a_lost_copy_of_the_superblock_is_written_anew() {
    for copy in 0..2u64 {
        let layer = Layer::after_a_crash();
        let (before, superblock) = (layer.contents().expect("whole"), layer.superblock());
        layer.corrupt(copy * 4096 + 700, 0xff);
        let finding = only(&layer.check(), "superblock-copy", Severity::Warning);
        assert!(finding.can_be_repaired());
        layer.corrupt(copy * 4096 + 3, 0xff);
        let mended = layer.repair();
        assert_eq!(mended[0].outcome, Outcome::Mended, "{mended:?}");
        assert_eq!(layer.check().findings, []);
        assert_eq!(layer.superblock(), superblock);
        let mut copies = [[0; 4096]; 2];
        layer.map.read_at(0, &mut copies[0]).expect("read");
        layer.map.read_at(4096, &mut copies[1]).expect("read");
        assert!(copies[0] == copies[1]);
        assert!(layer.contents().expect("whole") == before);
    }
}

#[test]
fn a_copy_that_a_crash_left_behind_or_torn_is_only_noted() {
    let layer = Layer::after_a_crash();
    let superblock = layer.superblock();
    let older = Superblock { generation: superblock.generation - 1, ..superblock.clone() };
    layer.put_superblock(1, &older);
    assert!(only(&layer.check(), "superblock-stale", Severity::Note).can_be_repaired());
    layer.repair();
    assert_eq!(layer.check().findings, []);

    let (new, old) = (superblock.encode(), older.encode());
    for torn in [[&new[..512], &old[512..]].concat(), [&old[..512], &new[512..]].concat()] {
        layer.map.write_durable_at(0, &torn).expect("write");
        only(&layer.check(), "superblock-copy", Severity::Note);
        layer.repair();
        assert_eq!((layer.check().findings, layer.superblock()), (vec![], superblock.clone()));
    }
    let far = Superblock { generation: superblock.generation - 2, ..superblock };
    layer.put_superblock(0, &far);
    only(&layer.check(), "superblock-stale", Severity::Warning);
}

#[test]
fn a_layer_without_a_superblock_is_lost_and_one_of_a_newer_format_is_left_alone() {
    let layer = Layer::after_a_crash();
    layer.corrupt(20, 1);
    layer.corrupt(4096 + 20, 1);
    let finding = only(&layer.check(), "superblock-lost", Severity::Damage);
    assert!(finding.remedy.text().contains("from one backup"), "{finding:?}");
    assert_eq!(layer.repair()[0].outcome, Outcome::Left);
    let empty = LayerFiles {
        data: Box::new(SimFile::new(&SimHost::new(0))),
        map: Box::new(SimFile::new(&SimHost::new(0))),
    };
    only(&check_layer("test", &empty, None, Usage::Free), "superblock-lost", Severity::Damage);
}

#[test]
fn a_damaged_page_names_the_bytes_it_stood_for() {
    let layer = Layer::after_a_crash();
    let mut current = None;
    for slot in 0..2 {
        layer.corrupt(PAGES_OFFSET + slot * 4096 + 100, 1);
        match layer.check().findings.first().map(|finding| finding.kind) {
            Some("pages") => current = Some(slot),
            _ => drop(only(&layer.check(), "page-copy", Severity::Note)),
        }
        layer.corrupt(PAGES_OFFSET + slot * 4096 + 100, 1);
    }
    layer.corrupt(PAGES_OFFSET + current.expect("one slot is current") * 4096 + 100, 1);
    let finding = only(&layer.check(), "pages", Severity::Damage);
    assert!(
        finding.message.ends_with("not whole: page 0, for bytes 0 to 66060288 of the disk"),
        "{finding:?}"
    );
    assert!(!finding.can_be_repaired());
    layer.repair();
    assert_eq!(layer.contents().expect_err("refused").kind(), ErrorKind::Corrupt);
}

#[test]
fn lost_and_cut_records_of_the_journal_are_told_apart() {
    let layer = Layer::after_a_crash();
    let next = layer.superblock().journal_sequence;
    // Each has the contents of a block.
    let at = |record: u64| 8192 + record * 8192;
    layer.corrupt(at(1) + 60, 1);
    let finding = only(&layer.check(), "journal", Severity::Damage);
    assert_eq!(finding.message, format!("journal: record {} is damaged or lost", next + 1));
    layer.corrupt(at(1) + 60, 1);
    layer.corrupt(at(2) + 60, 1);
    // The block that the record names is data without a state now.
    let found = layer.check().findings;
    assert_eq!(kinds(&found), [("record-cut", Severity::Note), ("data-unmapped", Severity::Note)]);
    layer.corrupt(at(2) + 60, 1);
    assert_eq!(layer.check().findings, []);

    let past = Change { span: BlockSpan::new(DISK / 4096 + 5, DISK / 4096 + 8), state: BlockState::Zero };
    let record =
        JournalRecord { sequence: next + 3, contents_since: 0, changes: vec![past], contents: Vec::new() };
    layer.map.write_durable_at(at(3), &record.encode(LAYER)).expect("write");
    let finding = only(&layer.check(), "journal", Severity::Damage);
    assert_eq!(finding.message, format!("journal record {}: a change is out of range", next + 3));
    assert_eq!(layer.contents().expect_err("refused").kind(), ErrorKind::Corrupt);
}

#[test]
fn data_outside_of_the_map_is_given_back_and_nothing_else() {
    let layer = Layer::after_a_crash();
    let before = layer.contents().expect("whole");
    let taken = layer.data.allocated().expect("stat");
    for at in [12 << 20, (1 << 20) + 4096, DISK - (1 << 20)] {
        layer.data.write_durable_at(at, &[0xee; 8192]).expect("write");
    }
    let finding = only(&layer.check(), "data-unmapped", Severity::Note);
    assert_eq!(finding.message, "24 KiB of data lie outside of what the map calls data");
    assert_eq!(layer.repair()[0].outcome, Outcome::Mended);
    assert_eq!(layer.check().findings, []);
    assert_eq!(layer.data.allocated().expect("stat"), taken);
    assert!(layer.contents().expect("whole") == before);
}

/// The stale copy was written over what was left of the newer one, the last that told of what the disk had been.
#[test]
fn a_rotten_newer_superblock_is_not_written_over_while_the_stale_one_does_not_fit() {
    let (layer, overlay) = Layer::open_one();
    // From before the next checkpoint, so its digest is not that of the pages.
    let stale = layer.superblock();
    overlay.write_at(0, &[9; 8192]).expect("write");
    overlay.checkpoint().expect("checkpoint");
    overlay.write_at(0, &[10; 8192]).expect("write");
    overlay.checkpoint().expect("checkpoint");
    overlay.close().expect("close");
    layer.put_superblock(1, &stale);
    layer.corrupt(700, 1);
    let found = layer.check().findings;
    assert!(found.iter().any(|finding| finding.severity == Severity::Damage), "{found:#?}");
    let copy = found.iter().find(|finding| finding.kind == "superblock-copy").expect("it is found");
    assert!(!copy.can_be_repaired() && copy.remedy.text().contains("left as they are"), "{copy:?}");
    let mut before = [0; SUPERBLOCK_BYTES];
    layer.map.read_at(0, &mut before).expect("read");
    layer.repair();
    let mut after = [0; SUPERBLOCK_BYTES];
    layer.map.read_at(0, &mut after).expect("read");
    assert!(after == before, "the damaged copy is as it was");
    // With the damaged bit put right, all is.
    layer.corrupt(700, 1);
    assert!(layer.check().findings.iter().all(|finding| finding.severity < Severity::Damage));
}

#[test]
fn nothing_is_given_back_of_a_layer_that_is_damaged() {
    let layer = Layer::after_a_crash();
    layer.data.write_durable_at(12 << 20, &[0xee; 8192]).expect("write");
    let before = layer.data.allocated().expect("stat");
    let wrong = Superblock {
        base: cowdisk::format::BaseRef::Image { id: cowdisk::format::BaseId([1; 32]), size: DISK + 512 },
        ..layer.superblock()
    };
    for copy in 0..2 {
        layer.put_superblock(copy, &wrong);
    }
    let found = layer.check().findings;
    assert_eq!(kinds(&found), [("base-size", Severity::Damage), ("data-unmapped", Severity::Note)]);
    assert!(!found[1].can_be_repaired());
    layer.repair();
    assert_eq!(layer.data.allocated().expect("stat"), before);
}

#[test]
fn a_cut_data_file_is_damage_only_if_data_is_missing() {
    let layer = Layer::after_a_crash();
    let short = SimFile::new(&SimHost::new(0));
    let files = || LayerFiles { data: Box::new(short.clone()), map: Box::new(layer.map.clone()) };
    let look = || check_layer("test", &files(), None, Usage::Free);
    let finding = only(&look(), "data-cut", Severity::Damage);
    assert!(finding.message.starts_with("the data file ends at byte 0, before data"), "{finding:?}");

    let host = SimHost::new(0);
    let new = LayerFiles { data: Box::new(SimFile::new(&host)), map: Box::new(SimFile::new(&host)) };
    let geometry = Geometry::new(DISK, 4096, 0).expect("valid");
    Overlay::create(&new, LAYER, geometry, BaseImage::blank().reference()).expect("create");
    let new = LayerFiles { data: Box::new(SimFile::new(&host)), ..new };
    only(&check_layer("test", &new, None, Usage::Free), "data-short", Severity::Note);
}

/// Every bit flip in what is in use is found, and whatever is not found is harmless: what the check calls whole opens, and
/// shows what it showed; what it calls damaged is refused. Every seventh byte is tried, or with COWDISK_TEST_EVERY_BYTE
/// in the environment every one.
#[test]
fn a_flipped_bit_anywhere_in_the_map_is_found_or_harmless() {
    let layer = Layer::after_a_crash();
    let before = layer.contents().expect("whole");
    let copy = LayerFiles { data: in_memory(&layer.data), map: in_memory(&layer.map) };
    let newest_record = 8192 + 2 * 8192..8192 + 3 * 8192;
    let unused = (newest_record.end..PAGES_OFFSET).step_by(997);
    // 7 is odd, so that all bits of a byte take turns.
    let step = if std::env::var_os("COWDISK_TEST_EVERY_BYTE").is_some() { 1 } else { 7 };
    let used = (0..newest_record.end).chain(PAGES_OFFSET..PAGES_OFFSET + 4 * 4096).step_by(step);
    let mut count = [0; 4];
    for (round, at) in used.chain(unused).enumerate() {
        flip(copy.map.as_ref(), at);
        let findings = check_layer("test", &copy, None, Usage::Free).findings;
        flip(copy.map.as_ref(), at);
        let worst = findings.iter().map(|finding| finding.severity).max();
        count[worst.map_or(0, |worst| 1 + worst as usize)] += 1;
        let least = match at {
            // A generation or a checksum may be that of a torn writing.
            0..8192 if (16..24).contains(&(at % 4096)) || at % 4096 >= 4080 => Some(Severity::Note),
            0..8192 => Some(Severity::Warning),
            _ if at < newest_record.start => Some(Severity::Damage),
            PAGES_OFFSET.. => Some(Severity::Note),
            // The newest record cannot be told from one that a crash cut short, the rest is not in use.
            _ => None,
        };
        assert!(worst >= least, "byte {at}: {findings:#?}");
        if round % (98 / step) == 0 && !newest_record.contains(&at) {
            layer.corrupt(at, 1 << (at % 8));
            match layer.contents() {
                Ok(found) => {
                    assert!(worst < Some(Severity::Damage) && found == before, "byte {at}: {worst:?}")
                }
                Err(error) => assert_eq!(worst, Some(Severity::Damage), "byte {at}: {error}"),
            }
            layer.corrupt(at, 1 << (at % 8));
        }
    }
    assert!(count.iter().all(|count| *count > 300), "unseen, notes, warnings, damages: {count:?}");
    assert!(layer.contents().expect("whole again") == before);
}

/// A copy of a file that is cheap to read.
fn in_memory(file: &SimFile) -> Box<dyn Storage> {
    let memory = MemStorage::new();
    memory.set_len(file.size().expect("size")).expect("size it");
    let mut block = [0; 4096];
    let mut at = 0;
    while let Some(data) = file.next_data(at).expect("seek") {
        at = data / 4096 * 4096;
        file.read_at(at, &mut block).expect("read");
        memory.write_at(at, &block).expect("write");
        at += 4096;
    }
    memory.set_len(file.size().expect("size")).expect("size it");
    Box::new(memory)
}

fn flip(map: &dyn Storage, at: u64) {
    let mut byte = [0];
    map.read_at(at, &mut byte).expect("read");
    map.write_at(at, &[byte[0] ^ 1 << (at % 8)]).expect("write");
}

#[test]
fn garbage_is_damage_and_never_a_panic() {
    let mut rng = common::sim::Rng(7);
    let host = SimHost::new(0);
    for _ in 0..50 {
        let (map, data) = (SimFile::new(&host), SimFile::new(&host));
        let bytes: Vec<u8> = (0..65536).map(|_| rng.next() as u8).collect();
        map.write_durable_at(0, &bytes).expect("write");
        let files = LayerFiles { data: Box::new(data), map: Box::new(map) };
        only(&check_layer("test", &files, None, Usage::Free), "superblock-lost", Severity::Damage);
    }
}

/// A check of a layer that is being written to, flushed and checkpointed finds nothing.
#[test]
fn a_check_beside_a_writer_raises_no_false_alarm() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let file = |name: &str| {
        let mut options = std::fs::File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(folder.path().join(name));
        Box::new(FileStorage::new(file.expect("open"), name))
    };
    let files = || LayerFiles { data: file("data"), map: file("map") };
    let live_map = folder.path().join("live");
    let geometry = Geometry::new(DISK, 4096, 0).expect("valid");
    Overlay::create(&files(), LAYER, geometry, BaseImage::blank().reference()).expect("create");
    let overlay = Overlay::open("test", files(), BaseImage::blank(), &live_map).expect("open");
    let checks = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = common::sim::Rng(11);
            let mut round = 0;
            while checks.load(Ordering::Acquire) < 40 {
                round += 1;
                let at = rng.below(DISK / 4096 - 4) * 4096;
                overlay.write_at(at, &[rng.next() as u8 | 1; 8192]).expect("write");
                if round % 5 == 0 {
                    overlay.flush().expect("flush");
                }
                if round % 500 == 0 {
                    overlay.checkpoint().expect("checkpoint");
                }
            }
        });
        let mut unsettled = 0;
        let files = files();
        for check in 1..=40 {
            let found = check_layer("test", &files, Some(&live_map), Usage::InUse).findings;
            unsettled += found.iter().filter(|finding| finding.kind == "in-use").count();
            checks.store(check, Ordering::Release);
            assert!(found.iter().all(|finding| finding.severity == Severity::Note), "{found:#?}");
        }
        assert!(unsettled < 20, "{unsettled} of 40 checks were not done");
    });
    overlay.close().expect("close");
    assert_eq!(check_layer("test", &files(), Some(&live_map), Usage::Free).findings, []);
}
