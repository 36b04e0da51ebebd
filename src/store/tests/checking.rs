//! What a check of a store finds, and what a repair does about it.

use super::*;
use crate::finding::{Finding, Outcome, Severity};
use crate::format::BaseId;

fn check_with(t: &TestStore, request: &CheckRequest) -> CheckReport {
    let store = Store::open_as_it_is(t.folder.path()).unwrap().with_run_dir(t.run.path());
    store.check(request, &NoProgress).unwrap()
}

/// A check changes nothing.
#[track_caller]
pub(super) fn check(t: &TestStore) -> Vec<Finding> {
    let before = t.snapshot();
    let report = check_with(t, &CheckRequest::default());
    assert_eq!(t.snapshot(), before);
    report.findings
}

fn full(t: &TestStore) -> CheckReport {
    check_with(t, &CheckRequest { full: true, ..CheckRequest::default() })
}

pub(super) fn repair(t: &TestStore) -> CheckReport {
    check_with(t, &CheckRequest { repair: true, ..CheckRequest::default() })
}

/// The one finding that there is.
#[track_caller]
pub(super) fn only(findings: &[Finding], kind: &str, severity: Severity) -> Finding {
    let [finding] = findings else { panic!("not one finding: {findings:#?}") };
    assert_eq!((finding.kind, finding.severity), (kind, severity), "{finding:#?}");
    finding.clone()
}

fn base_of(t: &TestStore) -> (BaseId, PathBuf) {
    let base = t.store.image(&name("debian")).unwrap().base;
    (base, t.path(&format!("bases/{base}/base.raw")))
}

pub(super) fn put(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all(bytes).unwrap();
}

#[test]
fn a_store_that_was_only_used_is_clean() {
    let t = store_with_image();
    let spec = InstanceSpec { no_cow: true, ..InstanceSpec::of(name("debian")) };
    t.store.create_instance(&name("full"), &spec, &NoProgress).unwrap();
    let file = FileRef::Image(name("debian"), t.store.image(&name("debian")).unwrap().base);
    t.store.set_attributes(&file, &t.store.attributes(&file).unwrap()).unwrap();
    let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
    disk.write_at(0, &[1; 100]).unwrap();
    assert_eq!(check(&t), [], "while a disk is in use");
    let report = full(&t);
    assert_eq!((report.disks, report.disks_in_use, report.bases), (3, 1, 1));
    disk.close().unwrap();
    assert_eq!(full(&t).findings, []);
    assert_eq!(repair(&t).findings, []);
    assert_eq!(check(&empty_store()), []);
}

#[test]
fn what_nothing_refers_to_is_noted_and_removed() {
    let t = store_with_image();
    let orphan = "ab".repeat(32);
    std::fs::create_dir(t.path("bases").join(&orphan)).unwrap();
    put(&t.path("bases").join(&orphan).join("base.raw"), b"x");
    put(&t.path("boot").join(&orphan), b"x");
    put(&t.path("attrs/image-gone.json"), b"{}");
    put(&t.path("tmp/image-0123"), b"");
    put(&t.path("notes.txt"), b"mine");
    put(&t.path("bases/README"), b"mine");
    put(&t.path("instances/web-3/backup"), b"mine");
    let found = check(&t);
    assert!(found.iter().all(|finding| finding.severity == Severity::Note), "{found:#?}");
    let kinds: Vec<_> = found.iter().map(|finding| (finding.kind, finding.object.as_str())).collect();
    let expected = [
        ("attributes-orphan", "attrs/image-gone.json"),
        ("base-unreferenced", &format!("base {orphan}")),
        ("unknown-file", "bases/README"),
        ("boot-unreferenced", &format!("boot file {orphan}")),
        ("unknown-file", "instances/web-3/backup"),
        ("unknown-file", "notes.txt"),
        ("leftover", "tmp/image-0123"),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(repair(&t).findings.iter().filter(|finding| finding.outcome == Outcome::Mended).count(), 4);
    let left: Vec<_> = check(&t).into_iter().map(|finding| finding.kind).collect();
    assert_eq!(left, ["unknown-file"; 3], "what the store does not know is left alone");
    assert_eq!((t.names("bases").len(), t.names("tmp").len()), (2, 0));
}

#[test]
fn nothing_counts_as_unreferenced_while_a_record_cannot_be_read() {
    let t = store_with_image();
    let orphan = "ab".repeat(32);
    std::fs::create_dir(t.path("bases").join(&orphan)).unwrap();
    put(&t.path("instances/web-3/instance.json"), b"{");
    put(&t.path("tmp/image-0123"), b"");
    let found = check(&t);
    let kinds: Vec<_> = found.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, ["instance-record", "base-unreferenced", "leftover"]);
    assert!(found[0].remedy.text().contains("cowdisk instance remove web-3"), "{found:?}");
    assert!(found[1].remedy.text().contains("it is kept"), "{found:?}");
    assert!(!repair(&t).is_clean());
    assert_eq!((t.names("bases").len(), t.names("tmp").len()), (2, 1));
}

/// Folders whose names are none of an instance were passed over, and the bases of the overlays in them removed.
#[test]
fn an_instance_that_was_moved_aside_keeps_its_base() {
    use std::os::unix::ffi::OsStrExt;
    for aside in [&b"web-3~"[..], b".web-3", b"web-3\xff"] {
        let t = store_with_image();
        let (base, path) = base_of(&t);
        let aside = t.path("instances").join(std::ffi::OsStr::from_bytes(aside));
        mv(&t.path("instances/web-3"), &aside);
        t.refuses(ErrorKind::Corrupt, "no name of an instance", |store| store.remove_image(&name("debian")));
        // As if a backup of the records, older than the image, had been brought back.
        std::fs::remove_file(t.path("images/debian.json")).unwrap();
        put(&t.path("tmp/image-0123"), b"");
        let found = check(&t);
        let kinds: Vec<_> = found.iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds, ["instance-name", "base-unreferenced", "leftover"]);
        assert!(found[0].object.starts_with("instances/") && found[0].is_open(), "{found:?}");
        assert!(!repair(&t).is_clean());
        drop(Store::open(t.folder.path()).unwrap());
        t.import("other", &[7; 4096]).unwrap();
        t.store.remove_image(&name("other")).unwrap_err();
        assert!(path.exists());
        mv(&aside, &t.path("instances/web-3"));
        assert_eq!(first_byte(&t), 0x11);
        assert!(path.exists() && check(&t).iter().all(|finding| finding.object != format!("base {base}")));
    }
    let t = store_with_image();
    put(&t.path("instances/README~"), b"mine");
    only(&check(&t), "unknown-file", Severity::Note);
    t.import("other", &[7; 4096]).unwrap();
    t.store.remove_image(&name("other")).unwrap();
}

#[test]
fn damaged_records_are_named_each_with_what_to_do() {
    for (file, kind, object) in [
        ("images/debian.json", "image-record", "image debian"),
        ("flavors/small.json", "flavor-record", "flavor small"),
    ] {
        let t = store_with_image();
        let spec = FlavorSpec { local_size: 1 << 20, fs: FlavorFs::None };
        t.store.add_flavor(&name("small"), &spec, &NoProgress).unwrap();
        put(&t.path(file), b"{}");
        let finding = only(&check(&t), kind, Severity::Damage);
        assert_eq!(finding.object, object);
        assert!(finding.message.contains(file), "{finding:?}");
        assert!(finding.remedy.text().contains("from a backup"), "{finding:?}");
    }
    let t = store_with_image();
    put(&t.path("run.json"), b"nothing");
    only(&check(&t), "run-record", Severity::Warning);
}

#[test]
fn attributes_that_cannot_be_read_are_forgotten() {
    let t = store_with_image();
    for file in ["instances/web-3/disk.attr", "attrs/image-debian.json"] {
        put(&t.path(file), b"{");
        assert!(only(&check(&t), "attributes", Severity::Warning).can_be_repaired());
        assert!(repair(&t).is_clean());
        assert!(!t.path(file).exists());
        assert_eq!(check(&t), []);
    }
}

#[test]
fn a_missing_base_names_all_that_need_it() {
    let t = store_with_image();
    let (base, path) = base_of(&t);
    t.store.create_instance(&name("web-4"), &InstanceSpec::of(name("debian")), &NoProgress).unwrap();
    let kept = t.run.path().join("kept");
    let folder = path.parent().unwrap();
    rustix::fs::renameat(rustix::fs::CWD, folder, rustix::fs::CWD, &kept).unwrap();
    let finding = only(&check(&t), "base-missing", Severity::Damage);
    assert_eq!(finding.object, format!("base {base}"));
    assert_eq!(finding.message, "missing; needed by image debian, disk web-3/disk, disk web-4/disk");
    assert!(!repair(&t).is_clean());
    t.import("again", &image_bytes()).unwrap();
    assert_eq!(check(&t), []);

    std::fs::remove_file(&path).unwrap();
    assert!(only(&check(&t), "base-missing", Severity::Damage).message.contains("base.raw"));
}

#[test]
fn a_changed_base_is_accepted_only_if_its_bytes_are_right() {
    let t = store_with_image();
    let (base, path) = base_of(&t);
    File::open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let finding = only(&check(&t), "base-changed", Severity::Damage);
    assert!(finding.message.contains("is 1970-01-01"), "{finding:?}");
    assert!(!finding.can_be_repaired() && !repair(&t).is_clean());
    let finding = only(&full(&t).findings, "base-changed", Severity::Warning);
    assert!(finding.message.ends_with("; its bytes are right"), "{finding:?}");
    t.store.open_base(&base).unwrap_err();
    let mend = CheckRequest { full: true, repair: true, ..CheckRequest::default() };
    assert!(check_with(&t, &mend).is_clean());
    assert_eq!(check(&t), []);
    t.store.open_base(&base).unwrap();

    std::fs::remove_file(path.with_file_name("base.json")).unwrap();
    only(&check(&t), "base-changed", Severity::Damage);
    assert!(check_with(&t, &mend).is_clean());
    assert_eq!(full(&t).findings, []);

    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&[0xff], 70_000).unwrap();
    file.set_modified(modified).unwrap();
    assert_eq!(check(&t), [], "only reading tells");
    let finding = only(&full(&t).findings, "base-damaged", Severity::Damage);
    assert!(finding.message.ends_with("needed by image debian, disk web-3/disk"), "{finding:?}");
    t.store.open_base(&base).unwrap();
    assert!(!check_with(&t, &mend).is_clean());
    t.store.open_base(&base).unwrap_err();
    only(&check(&t), "base-damaged", Severity::Damage);
    t.import("again", &image_bytes()).unwrap();
    assert_eq!(full(&t).findings, []);
}

/// Between opening and locking a base could be replaced; the damaged file was then read, and the new one judged by it.
#[test]
fn a_base_that_was_replaced_between_opening_and_locking_is_not_held() {
    let t = store_with_image();
    let (base, path) = base_of(&t);
    let opened = File::open(&path).unwrap();
    t.store.mark_base_damaged(&base).unwrap();
    t.import("again", &image_bytes()).unwrap();
    let error = super::super::bases::share(&base, opened).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    super::super::bases::share(&base, File::open(&path).unwrap()).unwrap();
}

#[test]
fn kernels_and_ramdisks_are_checked_by_content() {
    let t = empty_store();
    let id = import_with_kernel(&t).kernel.unwrap();
    t.store.create_instance(&name("web-3"), &InstanceSpec::of(name("debian")), &NoProgress).unwrap();
    assert_eq!(full(&t).findings, []);
    let path = t.path(&format!("boot/{id}"));
    std::fs::remove_file(&path).unwrap();
    let finding = only(&check(&t), "boot-missing", Severity::Damage);
    assert_eq!(finding.message, "missing; needed by image debian, instance web-3");
    put(&path, b"another kernel");
    assert_eq!(check(&t), []);
    only(&full(&t).findings, "boot-damaged", Severity::Damage);
}

#[test]
fn missing_and_surplus_files_of_a_disk_are_named() {
    let t = store_with_image();
    let spec = InstanceSpec { no_cow: true, ..InstanceSpec::of(name("debian")) };
    t.store.create_instance(&name("full"), &spec, &NoProgress).unwrap();
    t.store.create_instance(&name("web-4"), &InstanceSpec::of(name("debian")), &NoProgress).unwrap();
    std::fs::remove_file(t.path("instances/web-4/disk.data")).unwrap();
    std::fs::remove_file(t.path("instances/web-3/disk.local.raw")).unwrap();
    put(&t.path("instances/web-3/disk.raw"), b"");
    put(&t.path("instances/web-3/disk.local.map"), b"");
    File::options().write(true).open(t.path("instances/full/disk.raw")).unwrap().set_len(4096).unwrap();
    let found = check(&t);
    let shown: Vec<_> = found.iter().map(|f| (f.kind, f.object.as_str(), f.message.as_str())).collect();
    let expected = [
        (
            "disk-size",
            "disk full/disk",
            "it has 4096 bytes, but 1048576 when it was made, and disks never shrink",
        ),
        ("disk-missing", "disk web-3/disk.local", "disk.local.raw is missing"),
        ("disk-missing", "disk web-4/disk", "disk.data is missing"),
        ("disk-extra", "instance web-3", "disk.local.map belongs to none of its disks"),
        ("disk-extra", "instance web-3", "disk.raw belongs to none of its disks"),
    ];
    assert_eq!(shown, expected);
}

#[test]
fn a_layer_of_the_store_is_repaired_unless_it_is_in_use() {
    let t = store_with_image();
    let map = t.path("instances/web-3/disk.map");
    let file = File::options().write(true).open(&map).unwrap();
    file.write_all_at(&[1], 700).unwrap();
    let finding = only(&check(&t), "superblock-copy", Severity::Warning);
    assert_eq!(finding.object, "disk web-3/disk");
    let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
    let report = repair(&t);
    assert_eq!((report.disks_in_use, report.is_clean()), (1, false));
    disk.close().unwrap();
    assert!(repair(&t).is_clean());
    assert_eq!(check(&t), []);
}

#[test]
fn one_disk_is_checked_with_its_base_and_no_other() {
    let t = store_with_image();
    t.store.create_instance(&name("web-4"), &InstanceSpec::of(name("debian")), &NoProgress).unwrap();
    let open = |file: &str| File::options().write(true).open(t.path("instances/web-3").join(file)).unwrap();
    open("disk.map").write_all_at(&[1], 700).unwrap();
    open("disk.local.raw").set_len(4096).unwrap();
    put(&t.path("notes.txt"), b"mine");
    let only_these = |instance: &str, disk| {
        let only = vec![CheckTarget { instance: name(instance), disk }];
        check_with(&t, &CheckRequest { only, full: true, ..CheckRequest::default() })
    };
    let report = only_these("web-4", None);
    assert_eq!((report.findings.len(), report.disks, report.bases), (0, 1, 1));
    assert_eq!(only_these("web-3", Some(DiskName::Local)).findings[0].object, "disk web-3/disk.local");
    assert_eq!(only_these("web-3", None).findings.len(), 2);
    let absent = |instance: &str, disk| {
        let only = vec![CheckTarget { instance: name(instance), disk }];
        t.store.check(&CheckRequest { only, ..CheckRequest::default() }, &NoProgress).unwrap_err().kind()
    };
    assert_eq!(absent("nobody", None), ErrorKind::NotFound);
    assert_eq!(absent("web-4", Some(DiskName::Local)), ErrorKind::NotFound);
}

#[test]
fn a_full_check_can_be_interrupted() {
    let t = store_with_image();
    let request = CheckRequest { full: true, ..CheckRequest::default() };
    let error = t.store.check(&request, &CancelAfter::new(4096)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Interrupted);
}

#[test]
fn an_overlay_over_another_base_than_its_record_names_is_told() {
    let t = store_with_image();
    let record = t.path("instances/web-3/instance.json");
    let other = t.import("other", &[7; 4096]).unwrap().base;
    let (base, _) = base_of(&t);
    let text = std::fs::read_to_string(&record).unwrap();
    put(&record, text.replace(&base.to_string(), &other.to_string()).as_bytes());
    let finding = only(&check(&t), "disk-base", Severity::Warning);
    assert_eq!(finding.message, format!("it is over base {base}, but its record names {other}"));
}

/// A store whose superblock is gone could be checked by nothing.
#[test]
fn a_lost_superblock_is_found_and_written_anew_with_the_same_identity() {
    for damage in [None, Some(&b"{\"magic\":"[..])] {
        let t = store_with_image();
        let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
        disk.write_at(0, &[1; 512]).unwrap();
        // The daemon dies; what was written is in the live map only, which the store's identity leads to.
        drop(disk);
        let path = t.path("cowdisk-store.json");
        match damage {
            None => std::fs::remove_file(&path).unwrap(),
            Some(bytes) => put(&path, bytes),
        }
        Store::open(t.folder.path()).unwrap_err();
        let found = check(&t);
        let kinds: Vec<_> = found.iter().map(|finding| (finding.kind, finding.severity)).collect();
        assert_eq!(
            kinds,
            [("store-superblock", Severity::Warning), ("session-open", Severity::Note)],
            "{found:#?}"
        );
        assert!(repair(&t).is_clean());
        let store = Store::open(t.folder.path()).unwrap().with_run_dir(t.run.path());
        assert_eq!(store.uuid(), t.store.uuid());
        let disk = store.open_disk(&name("web-3"), DiskName::Root).unwrap();
        let mut bytes = [0; 512];
        disk.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [1; 512]);
    }
}

/// A repair wrote over what somebody else had brought back since it opened the store.
#[test]
fn a_superblock_that_has_come_back_meanwhile_is_left_alone() {
    let t = store_with_image();
    drop(t.store.open_disk(&name("web-3"), DiskName::Root).unwrap());
    let path = t.path("cowdisk-store.json");
    let original = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let store = Store::open_as_it_is(t.folder.path()).unwrap().with_run_dir(t.run.path());
    let mend = CheckRequest { repair: true, ..CheckRequest::default() };
    // The same record in other words, so that it is seen whether it was written.
    let same = format!("{original}\n\n");
    put(&path, same.as_bytes());
    assert!(store.check(&mend, &NoProgress).unwrap().is_clean());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), same);
    let newer = "{\"magic\": \"cowdisk-store\", \"version\": 99}";
    put(&path, newer.as_bytes());
    let report = store.check(&mend, &NoProgress).unwrap();
    let finding = report.findings.iter().find(|finding| finding.kind == "store-superblock").unwrap();
    assert!(!finding.can_be_repaired() && finding.remedy.text().contains("upgrade"), "{finding:?}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), newer);
}

#[test]
fn a_superblock_is_not_made_up() {
    let t = store_with_image();
    std::fs::remove_file(t.path("cowdisk-store.json")).unwrap();
    let finding = only(&check(&t), "store-superblock", Severity::Warning);
    assert!(!finding.can_be_repaired(), "no disk was ever open, so nothing tells the identity: {finding:?}");
    assert!(!repair(&t).is_clean());
    assert!(!t.path("cowdisk-store.json").exists());
    let half_made = empty_store();
    std::fs::remove_file(half_made.path("cowdisk-store.json")).unwrap();
    assert_eq!(Store::open_as_it_is(half_made.folder.path()).unwrap_err().kind(), ErrorKind::NotFound);
    put(&t.path("cowdisk-store.json"), b"{\"magic\": \"cowdisk-store\", \"version\": 99}");
    assert_eq!(Store::open_as_it_is(t.folder.path()).unwrap_err().kind(), ErrorKind::Unsupported);
}

fn live_maps(t: &TestStore) -> usize {
    let names = std::fs::read_dir(t.store.run_dir().unwrap()).unwrap();
    names.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|ext| ext == "map")).count()
}

/// As somebody would who has a shell and no idea of the store's locks.
fn mv(from: &Path, to: &Path) {
    assert!(std::process::Command::new("mv").args([from, to]).status().unwrap().success());
}

fn first_byte(t: &TestStore) -> u8 {
    let mut byte = [0];
    t.store.open_disk(&name("web-3"), DiskName::Root).unwrap().read_at(0, &mut byte).unwrap();
    byte[0]
}

#[test]
fn a_live_map_that_nothing_needs_is_removed() {
    let t = store_with_image();
    // The daemon dies before anything was written.
    drop(t.store.open_disk(&name("web-3"), DiskName::Root).unwrap());
    let finding = only(&check(&t), "live-map-left", Severity::Note);
    assert!(finding.can_be_repaired());
    let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
    assert_eq!(repair(&t).findings, [], "while the disk is open it is needed");
    assert_eq!(live_maps(&t), 1);
    drop(disk);
    let report = repair(&t);
    assert_eq!(only(&report.findings, "live-map-left", Severity::Note).outcome, Outcome::Mended);
    assert_eq!((live_maps(&t), check(&t)), (0, vec![]));
}

#[test]
fn a_live_map_that_is_needed_is_never_removed() {
    let t = store_with_image();
    let folder = t.path("instances/web-3");
    let older = tempfile::tempdir().unwrap();
    for file in ["disk.map", "disk.data"] {
        std::fs::copy(folder.join(file), older.path().join(file)).unwrap();
    }
    let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
    disk.write_at(0, &[7; 100]).unwrap();
    disk.flush().unwrap();
    disk.write_at(0, &[8; 8192]).unwrap();
    drop(disk);
    only(&repair(&t).findings, "session-open", Severity::Note);
    assert_eq!(live_maps(&t), 1);

    // Older copies of the disk's files lie in their place for a while: they have no session, but have not come as far.
    let newer = tempfile::tempdir_in(t.folder.path().parent().unwrap()).unwrap();
    for file in ["disk.map", "disk.data"] {
        mv(&folder.join(file), &newer.path().join(file));
        std::fs::copy(older.path().join(file), folder.join(file)).unwrap();
    }
    assert!(repair(&t).findings.iter().all(|finding| finding.kind != "live-map-left"));
    assert_eq!(live_maps(&t), 1);
    for file in ["disk.map", "disk.data"] {
        mv(&newer.path().join(file), &folder.join(file));
    }

    // The whole instance is moved away for a while.
    mv(&folder, &newer.path().join("web-3"));
    let report = repair(&t);
    assert!(report.findings.iter().any(|finding| finding.kind == "live-map-orphan"), "{report:#?}");
    assert!(report.is_clean());
    assert_eq!(live_maps(&t), 1);
    mv(&newer.path().join("web-3"), &folder);
    assert_eq!(first_byte(&t), 8);
}

#[test]
fn no_live_map_is_called_an_orphan_while_a_disk_cannot_be_read() {
    let t = store_with_image();
    drop(t.store.open_disk(&name("web-3"), DiskName::Root).unwrap());
    put(&t.path("instances/web-3/disk.map"), b"nothing");
    let found = check(&t);
    assert!(!found.is_empty() && found.iter().all(|finding| finding.kind != "live-map-orphan"), "{found:#?}");
}
