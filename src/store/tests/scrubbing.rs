//! What a scrub reads and finds, and that it disturbs nobody.

use super::*;
use crate::finding::Severity;
use crate::format::BaseId;

fn scrub_with(t: &TestStore, progress: &dyn Progress) -> ScrubReport {
    let store = Store::open_as_it_is(t.folder.path()).unwrap().with_run_dir(t.run.path());
    store.scrub(&ScrubRequest::default(), progress).unwrap()
}

fn scrub(t: &TestStore) -> ScrubReport {
    scrub_with(t, &NoProgress)
}

/// Changes a byte of a base's file so that it looks as it was stored.
fn rot(t: &TestStore) -> BaseId {
    let base = t.store.image(&name("debian")).unwrap().base;
    let path = t.path(&format!("bases/{base}/base.raw"));
    let modified = path.metadata().unwrap().modified().unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff], 2000).unwrap();
    file.sync_all().unwrap();
    file.set_modified(modified).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
    base
}

#[test]
fn a_scrub_reads_everything_and_changes_nothing_beside_an_open_disk() {
    let t = store_with_image();
    let spec = InstanceSpec { no_cow: true, ..InstanceSpec::of(name("debian")) };
    t.store.create_instance(&name("full"), &spec, &NoProgress).unwrap();
    let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
    disk.write_at(0, &[1; 200_000]).unwrap();
    disk.flush().unwrap();
    let before = t.snapshot();
    let report = scrub(&t);
    assert_eq!(report.check.findings, []);
    assert!(report.complete);
    assert_eq!((report.bases_read, report.disks_read, report.check.disks_in_use), (1, 3, 1));
    // The base's data, the same in the independent disk, and what was written.
    assert!(report.bytes_read >= 200_000 + 2 * 10_000, "{report:?}");
    assert_eq!(t.snapshot(), before);
    disk.write_at(0, &[2; 100]).unwrap();
    disk.close().unwrap();
}

#[test]
fn a_rotten_base_is_marked_and_all_that_is_over_it_is_named() {
    let t = store_with_image();
    for number in 0..7 {
        let spec = InstanceSpec::of(name("debian"));
        t.store.create_instance(&name(&format!("vm-{number}")), &spec, &NoProgress).unwrap();
    }
    let base = rot(&t);
    t.store.open_base(&base).unwrap();
    let report = scrub(&t);
    let [finding] = &report.check.findings[..] else { panic!("{report:#?}") };
    assert_eq!((finding.kind, finding.severity), ("base-damaged", Severity::Damage));
    for user in ["image debian", "disk web-3/disk", "disk vm-0/disk", "disk vm-6/disk"] {
        assert!(finding.message.contains(user), "{user}: {}", finding.message);
    }
    let error = t.store.open_disk(&name("vm-3"), DiskName::Root).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    // It is over another base.
    t.store.open_disk(&name("web-3"), DiskName::Local).unwrap().close().unwrap();
    t.import("again", &image_bytes()).unwrap();
    assert_eq!(scrub(&t).check.findings, []);
}

#[test]
fn a_base_that_only_looks_changed_is_not_accepted_without_being_asked() {
    let t = store_with_image();
    let base = t.store.image(&name("debian")).unwrap().base;
    let path = t.path(&format!("bases/{base}/base.raw"));
    File::open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    for _ in 0..2 {
        let report = scrub(&t);
        let [finding] = &report.check.findings[..] else { panic!("{report:#?}") };
        assert_eq!((finding.kind, finding.severity), ("base-changed", Severity::Warning));
        assert!(finding.message.ends_with("its bytes are right"), "{finding:?}");
    }
}

#[test]
fn a_rotten_kernel_is_named_with_its_users() {
    let t = empty_store();
    let id = import_with_kernel(&t).kernel.unwrap();
    let report = scrub(&t);
    assert_eq!((report.check.findings.len(), report.boot_files_read), (0, 1));
    let path = t.path(&format!("boot/{id}"));
    std::fs::remove_file(&path).unwrap();
    File::create(&path).unwrap().write_all(b"another").unwrap();
    let report = scrub(&t);
    let [finding] = &report.check.findings[..] else { panic!("{report:#?}") };
    assert_eq!((finding.kind, finding.severity), ("boot-damaged", Severity::Damage));
    assert!(finding.message.ends_with("needed by image debian"), "{finding:?}");
}

#[test]
fn an_interrupted_scrub_tells_what_it_found_and_leaves_nothing() {
    let t = store_with_image();
    rot(&t);
    let progress = CancelAfter::new(1);
    let before = t.snapshot();
    let report = scrub_with(&t, &progress);
    assert!(!report.complete && report.disks_read == 0, "{report:?}");
    assert_eq!(progress.open.load(Ordering::Relaxed), 0);
    assert_eq!(t.snapshot(), before);
    // Stopped after the base, whose data are two blocks and are read twice, for they are not right.
    let report = scrub_with(&t, &CancelAfter::new(2 * 16_384 + 1));
    assert!(!report.complete && report.disks_read < 2, "{report:?}");
    assert_eq!(report.check.findings.len(), 1, "{report:?}");
}

#[test]
fn readers_of_the_store_exclude_changes_and_not_each_other() {
    let t = store_with_image();
    let first = StoreLock::wait_shared(&t.store.root).unwrap();
    let second = StoreLock::wait_shared(&t.store.root).unwrap();
    assert!(StoreLock::try_take(&t.store.root).unwrap().is_none());
    drop((first, second));
    assert!(StoreLock::try_take(&t.store.root).unwrap().is_some());
}

/// A base that could not be opened counted as read, and nothing was said.
#[test]
fn what_was_not_read_is_not_counted_and_is_told() {
    let t = empty_store();
    let image = import_with_kernel(&t);
    let path = t.path(&format!("bases/{}/base.raw", image.base));
    // As whoever replaces it does.
    let held = t.store.hold_base(&image.base).unwrap();
    let report = scrub(&t);
    let [finding] = &report.check.findings[..] else { panic!("{report:#?}") };
    assert_eq!((finding.kind, finding.severity), ("not-read", Severity::Note));
    assert_eq!((report.bases_read, report.boot_files_read), (0, 1));
    drop(held);
    std::fs::remove_file(path).unwrap();
    std::fs::remove_file(t.path(&format!("boot/{}", image.kernel.unwrap()))).unwrap();
    let report = scrub(&t);
    let kinds: Vec<_> = report.check.findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, ["base-missing", "boot-missing"]);
    assert_eq!((report.bases_read, report.boot_files_read), (0, 0));
}
