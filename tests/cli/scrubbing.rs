//! `cowdisk scrub`: what it says, its exit codes, Ctrl-C; and checks and scrubs of a mounted store that is written to.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::mounted::{Mounted, needs_mount};
use super::{Place, text};

#[test]
fn a_scrub_of_a_store_that_is_whole_says_what_it_read() {
    let place = Place::furnished();
    let shown = place.works(&["scrub", "--rate", "0"]);
    assert!(shown.starts_with("read: 1 base, 0 boot files, 3 disks; "), "{shown}");
    assert!(shown.ends_with("found: nothing\n"), "{shown}");
    let report = place.json(&["scrub", "--json", "full"]);
    assert_eq!((&report["clean"], &report["complete"]), (&true.into(), &true.into()));
    assert_eq!((&report["disks_read"], &report["findings"]), (&1.into(), &serde_json::json!([])));
    assert!(report["bytes_read"].as_u64().unwrap() >= 65536, "{report}");
}

#[test]
fn a_rotten_base_is_named_with_what_is_over_it_and_makes_the_scrub_fail() {
    let place = Place::furnished();
    let base = place.json(&["image", "show", "img", "--json"])["base"].as_str().unwrap().to_owned();
    let path = place.path(&format!("store/bases/{base}/base.raw"));
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"x", 140_000).unwrap();
    file.sync_all().unwrap();
    file.set_modified(modified).unwrap();
    let output = place.run(&["scrub"]);
    assert_eq!(output.status.code(), Some(1));
    let (shown, said) = (text(&output.stdout), text(&output.stderr));
    assert!(shown.starts_with(&format!("damage: base {base}: its bytes have changed")), "{shown}");
    assert!(shown.contains("needed by image img, disk inst/disk\n"), "{shown}");
    assert!(said.ends_with("store: 1 finding to be looked at\n"), "{said}");
    let output = place.run(&["image", "verify", "img"]);
    assert_eq!(output.status.code(), Some(1), "it stays marked");
    assert!(text(&place.run(&["check"]).stdout).contains("its bytes are not those that were stored"));
}

#[test]
fn an_interrupted_scrub_tells_how_far_it_came() {
    let place = Place::furnished();
    let big: Vec<u8> = (0..4 << 20).map(|at: u32| u8::try_from(at / 7 % 251).unwrap()).collect();
    fs::write(place.path("big.raw"), big).unwrap();
    place.works(&["image", "import", "big", &place.path("big.raw")]);
    let before = place.snapshot();
    // Takes a minute.
    let scrub = place
        .command(&["scrub", "--json", "--rate", "64K"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let pid = scrub.id();
    while !catches_sigint(pid) {
        assert!(Instant::now() < end, "it never watches for Ctrl-C");
        std::thread::sleep(Duration::from_millis(2));
    }
    let process = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    let output = scrub.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["complete"], &report["clean"]), (&false.into(), &false.into()));
    assert_eq!(report["findings"], serde_json::json!([]));
    let said = text(&output.stderr);
    assert!(said.ends_with("store: interrupted before all was read\n"), "{said}");
    assert_eq!(place.snapshot(), before);
}

/// Whether a process handles SIGINT, number 2, itself.
fn catches_sigint(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim();
    u64::from_str_radix(mask, 16).unwrap() & (1 << 1) != 0
}

/// Guests write, sync, discard and write zeroes while the store is checked and scrubbed: nothing but the guests' own doing
/// happens, so nothing may be found, and no write may fail.
#[test]
fn a_store_that_is_written_to_is_checked_and_scrubbed_without_false_alarm() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (disk, bytes) in [("inst/disk", 1u64 << 20), ("inst/disk.local", 4 << 20), ("full/disk", 1 << 20)]
        {
            let path = place.path(&format!("mnt/instances/{disk}"));
            let disk = File::options().read(true).write(true).open(path).unwrap();
            let stop = &stop;
            scope.spawn(move || write_until(stop, &disk, bytes));
        }
        let mut in_use = 0;
        for round in 0..12 {
            let command: &[&str] = match round % 3 {
                0 => &["check", "--json"],
                1 => &["check", "--full", "--json"],
                _ => &["scrub", "--rate", "0", "--json"],
            };
            let output = place.run(command);
            let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            let findings = report["findings"].as_array().unwrap();
            let alarms: Vec<_> = findings.iter().filter(|finding| finding["kind"] != "in-use").collect();
            if !alarms.is_empty() || output.status.code() != Some(0) {
                stop.store(true, Ordering::Relaxed);
                panic!("{command:?}: {report:#}\n{}", text(&output.stderr));
            }
            in_use += report["disks_in_use"].as_u64().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        assert!(in_use > 0, "no disk was open at any time");
    });
    mounted.umount();
    assert_eq!(place.json(&["check", "--full", "--json"])["findings"], serde_json::json!([]));
}

/// Overwrites, syncs, punches and zeroes a disk, here and there, and reads back what it wrote.
fn write_until(stop: &AtomicBool, disk: &File, bytes: u64) {
    use rustix::fs::FallocateFlags;
    let mut random = 1u64;
    let mut step = 0u8;
    while !stop.load(Ordering::Relaxed) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let offset = (random >> 20) % (bytes - 40_000) / 512 * 512;
        step = step.wrapping_add(1);
        let wanted = match step % 4 {
            0 => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(disk, mode, offset, 40_000).unwrap();
                0
            }
            _ => {
                disk.write_all_at(&vec![step; 40_000], offset).unwrap();
                step
            }
        };
        if step.is_multiple_of(8) {
            disk.sync_data().unwrap();
        }
        let mut found = vec![!wanted; 40_000];
        disk.read_exact_at(&mut found, offset).unwrap();
        // Discarded blocks of an overlay over a base are zero, too.
        assert!(found.iter().all(|byte| *byte == wanted), "{disk:?} at {offset}");
    }
}
