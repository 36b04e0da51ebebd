//! The process that serves a mount is killed, and another takes over, while disks are in use: nobody notices more than a
//! pause, and what was answered is there.
//!
//! `COWDISK_REPLACEMENTS` says how often under load (10 unless told), `COWDISK_SEED` with which seed.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failed step fails the test")]
#![allow(clippy::disallowed_methods, reason = "tests change files in place")]
#![allow(clippy::cast_possible_truncation, reason = "tests run on 64 bits")]

#[path = "common/mount.rs"]
mod mount;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cowdisk::ErrorKind;
use cowdisk::daemon::{self, Status};
use cowdisk::store::DiskName;
use mount::{Aligned, MIB, TestMount, errno, image_bytes, kill_and_wait, name, open, open_with};
use power_cut::random::Random;
use rustix::fs::FallocateFlags;
use rustix::process::Signal;

/// Not a test: the daemon of all others, see [`mount`].
#[test]
fn daemon_process() {
    mount::daemon_process();
}

/// Mounted so that another process can take over, whatever transport the other tests run with.
fn kept(options: &str) -> TestMount {
    TestMount::with_options(&format!("transport=dev_fuse,flush=0,{options}"))
}

fn kill_worker(mount: &TestMount) {
    kill_and_wait(mount.worker());
}

fn status(mount: &TestMount) -> Status {
    // Between two processes there is nobody to answer.
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match daemon::status(&mount.store) {
            Ok(status) => return status.expect("mounted"),
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")),
        Err(_) => default,
    }
}

#[test]
fn open_files_stay_open_and_inode_numbers_the_same_when_the_daemon_is_killed() {
    let mut mount = kept("");
    let (file, direct) = (open(&mount.disk()), open_with(&mount.disk(), libc::O_DIRECT).unwrap());
    let image = File::open(mount.path("images/base")).unwrap();
    let paths = ["", "images", "images/base", "instances", "instances/web", "instances/web/disk.local"];
    let numbers = || paths.map(|path| std::fs::symlink_metadata(mount.path(path)).unwrap().ino());
    let before = numbers();
    for round in 1..=5u8 {
        file.write_all_at(&[round; 5000], u64::from(round) * 10_000).unwrap();
        // A life of a second costs no wait after its end.
        std::thread::sleep(Duration::from_millis(1050));
        kill_worker(&mount);
        let mut seen = [0; 5000];
        file.read_exact_at(&mut seen, u64::from(round) * 10_000).unwrap();
        assert_eq!(seen, [round; 5000]);
        direct.write_all_at(&Aligned::filled(4096, round), MIB).unwrap();
        let mut seen = Aligned::new(4096);
        direct.read_exact_at(&mut seen, MIB).unwrap();
        assert!(seen.iter().all(|byte| *byte == round));
        let mut seen = vec![0; 1000];
        image.read_exact_at(&mut seen, 3 * MIB).unwrap();
        assert_eq!(seen, image_bytes(3 * MIB, 1000));
        file.sync_all().unwrap();
        assert_eq!(file.metadata().unwrap().ino(), std::fs::metadata(mount.disk()).unwrap().ino());
        assert_eq!(numbers(), before);
        assert_eq!(status(&mount).keeper.unwrap().restarts, u32::from(round));
    }
    let status = status(&mount);
    assert_eq!((status.open_files, status.disks.len()), (3, 1));
    assert!(status.keeper.unwrap().last_end.unwrap().contains("signal: 9 (SIGKILL)"));
    drop((file, direct, image));
    mount.unmount().unwrap();
    let log = mount.log();
    assert_eq!(log.matches("another one takes over").count(), 5, "{log}");
}

/// A first process opens nothing by a successor's rules.
#[test]
fn a_disk_that_was_closed_before_is_opened_as_ever() {
    let mut mount = kept("");
    open(&mount.disk()).write_all_at(b"before", 0).unwrap();
    mount.wait_until("closed", || status(&mount).disks.is_empty());
    kill_worker(&mount);
    let mut seen = [0; 6];
    open(&mount.disk()).read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"before");
    mount.unmount().unwrap();
}

#[test]
fn a_disk_of_which_the_last_writes_are_gone_answers_eio_until_it_is_closed() {
    let mut mount = kept("accept_loss");
    let file = open(&mount.disk());
    file.write_all_at(b"flushed", 0).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&[0xee; 4096], MIB).unwrap();
    let keeper = mount.pid();
    mount.signal(Signal::STOP);
    kill_worker(&mount);
    for entry in std::fs::read_dir(mount.store.run_dir().unwrap()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "map") {
            std::fs::remove_file(path).unwrap();
        }
    }
    mount.signal(Signal::CONT);
    let mut seen = [0; 8];
    assert_eq!(errno(file.read_exact_at(&mut seen, 0)), libc::EIO);
    assert_eq!(errno(file.write_all_at(b"more", 0)), libc::EIO);
    assert_eq!(errno(open_with(&mount.disk(), 0)), libc::EIO, "nor does a second opener get the older state");
    let disk = status(&mount).disks.remove(0);
    assert_eq!(disk.state, "refused");
    assert!(disk.reason.unwrap().contains("is gone"));
    assert!(mount.log().contains("is gone, and with it what was written since the last flush"));
    drop(file);
    // Nobody runs on it any more: now the loss is accepted, as the options say.
    mount.wait_until("opened again", || open_with(&mount.disk(), 0).is_ok());
    let seen = std::fs::read(mount.disk()).unwrap();
    assert_eq!(&seen[..7], b"flushed");
    assert_eq!(seen[MIB as usize..][..4096], image_bytes(MIB, 4096), "what was not flushed is gone");
    assert_eq!(mount.pid(), keeper);
    mount.unmount().unwrap();
}

#[test]
fn a_disk_of_which_all_that_the_run_directory_held_is_gone_answers_eio() {
    let mut mount = kept("accept_loss");
    let file = open(&mount.disk());
    file.write_all_at(&[0xee; 4096], MIB).unwrap();
    mount.signal(Signal::STOP);
    kill_worker(&mount);
    for entry in std::fs::read_dir(mount.store.run_dir().unwrap()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("in-use-") || name.ends_with(".map") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    mount.signal(Signal::CONT);
    let mut seen = [0; 8];
    assert_eq!(errno(file.read_exact_at(&mut seen, MIB)), libc::EIO);
    drop(file);
    mount.unmount().unwrap();
}

#[test]
fn a_mark_that_nobody_left_open_is_no_reason_to_refuse_a_disk() {
    let mut mount = kept("");
    std::fs::write(mount.store.run_dir().unwrap().join("in-use-disk-web"), "!").unwrap();
    kill_worker(&mount);
    open(&mount.disk()).write_all_at(b"fresh", 0).unwrap();
    mount.unmount().unwrap();
}

#[test]
fn what_was_answered_is_flushed_in_the_background_after_a_takeover_though_nobody_asks() {
    let mut mount = kept("flush=1");
    let file = open(&mount.disk());
    file.write_all_at(&[0xee; 4096], MIB).unwrap();
    kill_worker(&mount);
    mount.wait_until("flushed", || status(&mount).disks.iter().any(|disk| disk.uncommitted_runs == 0));
    drop(file);
    mount.unmount().unwrap();
}

#[test]
fn another_store_in_the_place_of_the_one_that_is_mounted_is_not_served() {
    let mut mount = kept("");
    let file = open(&mount.disk());
    file.write_all_at(b"answered", 0).unwrap();
    let (store, aside) = (mount.store.dir().to_owned(), mount.store.dir().with_extension("aside"));
    mount.signal(Signal::STOP);
    kill_worker(&mount);
    std::fs::rename(&store, &aside).unwrap();
    let copied = std::process::Command::new("cp").arg("-a").args([&aside, &store]).status().unwrap();
    assert!(copied.success());
    mount.signal(Signal::CONT);
    mount.wait_until("refused", || mount.log().contains("not the store that is mounted"));
    std::fs::remove_dir_all(&store).unwrap();
    std::fs::rename(&aside, &store).unwrap();
    let mut seen = [0; 8];
    file.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"answered");
    drop(file);
    mount.unmount().unwrap();
}

#[test]
fn an_instance_in_use_is_not_removed_while_nobody_serves() {
    let mut mount = kept("");
    let file = open(&mount.disk());
    let local = open(&mount.local());
    drop(local);
    mount.wait_until("closed", || status(&mount).disks.len() == 1);
    mount.signal(Signal::STOP);
    kill_worker(&mount);
    let error = mount.store.open_disk(&name("web"), DiskName::Root).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    mount.store.open_disk(&name("web"), DiskName::Local).unwrap().close().unwrap();
    let error = mount.store.remove_instance(&name("web")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    mount.signal(Signal::CONT);
    file.write_all_at(b"alive", 0).unwrap();
    drop(file);
    mount.store.remove_instance(&name("web")).unwrap();
    mount.unmount().unwrap();
}

#[test]
fn a_process_that_keeps_dying_is_started_less_and_less_often_until_it_lives() {
    let mut mount = kept("");
    let file = open(&mount.disk());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                mount::children_of(mount.pid()).into_iter().for_each(kill_and_wait);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        mount.wait_until("three deaths", || mount.log().matches("another one takes over").count() >= 3);
        done.store(true, Ordering::Relaxed);
    });
    file.write_all_at(b"alive", 0).unwrap();
    let log = mount.log();
    for wait in ["in 0.1 s", "in 1 s"] {
        assert!(log.contains(wait), "{log}");
    }
    drop(file);
    mount.unmount().unwrap();
}

#[test]
fn without_its_keeper_the_daemon_serves_on_and_is_unmounted_as_ever() {
    let mut mount = kept("");
    let file = open(&mount.disk());
    file.write_all_at(b"before", 0).unwrap();
    let worker = mount.worker();
    mount.kill_keeper();
    mount.wait_until("it notices", || status(&mount).keeper.is_none());
    file.write_all_at(b"after!", 6).unwrap();
    let mut seen = [0; 12];
    file.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"beforeafter!");
    assert!(mount.log().contains("serving on without one"));
    mount.wait_until("it says that it serves", || mount.store.serving().unwrap().unwrap().pid == worker);
    assert_eq!(daemon::unmount(&mount.mountpoint()).unwrap_err().kind(), ErrorKind::Busy);
    drop(file);
    daemon::unmount(&mount.mountpoint()).unwrap();
    assert_eq!(mount.store.serving().unwrap(), None);
    mount.mount().unwrap();
    assert!(std::fs::read(mount.disk()).unwrap().starts_with(b"beforeafter!"));
}

#[test]
fn a_mount_that_goes_away_while_nobody_serves_is_ended_in_order() {
    let mut mount = kept("");
    open(&mount.disk()).write_all_at(b"last", 0).unwrap();
    mount.signal(Signal::STOP);
    kill_worker(&mount);
    rustix::mount::unmount(mount.mountpoint(), rustix::mount::UnmountFlags::empty()).unwrap();
    mount.signal(Signal::CONT);
    assert!(mount.ends_within(Duration::from_secs(60)).expect("it ends").success());
    let disk = mount.store.open_disk(&name("web"), DiskName::Root).unwrap();
    let mut seen = [0; 4];
    disk.read_at(0, &mut seen).unwrap();
    disk.close().unwrap();
    assert_eq!(&seen, b"last");
    assert!(!mount.log().contains("may be gone"), "it was closed, not recovered");
}

/// Runs until `done`, over and over, each time with a seed of its own: writes of 4 KiB at queue depth 32, each read back and
/// its checksum verified.
fn verify_by_fio(disk: &Path, engine: &str, seed: u64, done: &AtomicBool) -> u64 {
    let mut runs = 0;
    while !done.load(Ordering::Relaxed) {
        let output = Command::new("fio")
            .args(["--name=load", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--direct=1", "--size=8M"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=512", "--verify_state_save=0"])
            .arg("--output-format=json")
            .arg(format!("--ioengine={engine}"))
            .arg(format!("--randseed={}", seed + runs))
            .arg(format!("--filename={}", disk.display()))
            .output()
            .expect("fio is needed: scripts/install-deps");
        let said = mount::check_output("fio", &output);
        let report: serde_json::Value =
            serde_json::from_str(&said[said.find('{').expect("a report")..]).unwrap();
        let job = &report["jobs"][0];
        assert_eq!(job["error"], 0, "{said}");
        for way in ["write", "read"] {
            assert!(job[way]["io_bytes"].as_u64().unwrap() >= 8 << 20, "{way}: {said}");
        }
        runs += 1;
    }
    runs
}

/// Writes records, syncs, and reads back what it had written; never sees an error. Returns how many.
fn write_and_sync(path: &Path, seed: u64, done: &AtomicBool, stall: &Stall) -> usize {
    let file = open(path);
    let mut random = Random::new(seed);
    let mut model = std::fs::read(path).unwrap();
    let size = model.len() as u64;
    let mut steps = 0;
    while !done.load(Ordering::Relaxed) {
        let len = random.between(1, 20_000).min(size);
        let at = random.below(size - len + 1);
        let range = at as usize..(at + len) as usize;
        stall.watch(|| match random.below(8) {
            0 => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&file, mode, at, len).unwrap();
                model[range.clone()].fill(0);
            }
            1 => file.sync_all().unwrap(),
            2 => file.sync_data().unwrap(),
            _ => {
                let byte = random.below(256) as u8;
                model[range.clone()].fill(byte);
                file.write_all_at(&model[range.clone()], at).unwrap();
            }
        });
        let mut seen = vec![0; range.len()];
        file.read_exact_at(&mut seen, at).unwrap();
        assert!(seen == model[range], "step {steps}, seed {seed}, byte {at}, {len} bytes");
        steps += 1;
    }
    assert!(std::fs::read(path).unwrap() == model, "at the end, seed {seed}");
    steps
}

/// Opens, looks at and closes files and directories.
fn open_and_close(mount: &Path, done: &AtomicBool) -> usize {
    let ino = |path: &PathBuf| std::fs::metadata(path).unwrap().ino();
    let disk = mount.join("instances/db/disk.local");
    let (number, mut rounds) = (ino(&disk), 0);
    while !done.load(Ordering::Relaxed) {
        let file = open(&disk);
        let at = (rounds % 4000) as u64 * 4096;
        file.write_all_at(&[rounds as u8 | 1; 512], at).unwrap();
        drop(file);
        let mut seen = [0; 512];
        File::open(&disk).unwrap().read_exact_at(&mut seen, at).unwrap();
        assert_eq!(seen, [rounds as u8 | 1; 512]);
        let names: Vec<_> = std::fs::read_dir(mount.join("instances"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert_eq!(ino(&disk), number);
        rustix::fs::setxattr(&disk, "user.round", b"x", rustix::fs::XattrFlags::empty()).unwrap();
        rustix::fs::removexattr(&disk, "user.round").unwrap();
        rounds += 1;
    }
    rounds
}

/// The longest pause that anybody noticed.
#[derive(Default)]
struct Stall(AtomicUsize);

impl Stall {
    fn watch<R>(&self, work: impl FnOnce() -> R) -> R {
        let begun = Instant::now();
        let result = work();
        self.0.fetch_max(begun.elapsed().as_millis() as usize, Ordering::Relaxed);
        result
    }
}

#[test]
fn nobody_notices_more_than_a_pause_when_the_daemon_is_killed_under_load() {
    let (kills, seed) = (number("COWDISK_REPLACEMENTS", 10), number("COWDISK_SEED", 1));
    eprintln!("{kills} kills with seed {seed}");
    let mut mount = kept("");
    mount.create("db");
    let (done, stall) = (AtomicBool::new(false), Stall::default());
    let mut random = Random::new(seed);
    let root = mount.path("instances/db/disk");
    std::thread::scope(|scope| {
        let fio = scope.spawn(|| verify_by_fio(&mount.disk(), "libaio", seed, &done));
        let uring = scope.spawn(|| verify_by_fio(&mount.local(), "io_uring", seed, &done));
        let oracle = scope.spawn(|| write_and_sync(&root, seed, &done, &stall));
        let storm = scope.spawn(|| open_and_close(&mount.mountpoint(), &done));
        for kill in 0..kills {
            mount.wait_until("taken over", || u64::from(status(&mount).keeper.unwrap().restarts) == kill);
            // A life of a second costs no wait after its end.
            std::thread::sleep(Duration::from_millis(random.between(1000, 1700)));
            if oracle.is_finished() || storm.is_finished() || fio.is_finished() || uring.is_finished() {
                eprintln!("somebody noticed something before kill {kill}");
                break;
            }
            kill_worker(&mount);
        }
        // The last one has to be survived, too.
        std::thread::sleep(Duration::from_secs(1));
        done.store(true, Ordering::Relaxed);
        let (fio, uring) = (fio.join().unwrap(), uring.join().unwrap());
        let (oracle, storm) = (oracle.join().unwrap(), storm.join().unwrap());
        eprintln!(
            "{fio} and {uring} runs of fio, {oracle} steps, {storm} rounds; longest pause {} ms",
            stall.0.load(Ordering::Relaxed)
        );
        assert!(fio > 0 && uring > 0 && oracle > 0 && storm > 0);
    });
    assert_eq!(u64::from(status(&mount).keeper.unwrap().restarts), kills);
    mount.unmount().unwrap();
    let log = mount.log();
    let complaints: Vec<_> = log.lines().filter(|line| line.starts_with("WARN ")).collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}
