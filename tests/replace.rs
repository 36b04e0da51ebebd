//! The process that serves a mount is killed, and another takes over, while disks are in use: nobody notices more than a
//! pause, and what was answered is there.
//!
//! `COWDISK_REPLACEMENTS` says how often under load (10 unless told), `COWDISK_SEED` with which seed.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failed step fails the test")]
#![allow(clippy::disallowed_methods, reason = "tests change files in place")]
#![allow(clippy::cast_possible_truncation, reason = "tests run on 64 bits")]

#[path = "common/load.rs"]
mod load;
#[path = "common/mount.rs"]
mod mount;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowdisk::ErrorKind;
use cowdisk::daemon;
use cowdisk::store::DiskName;
use load::{kept, kill_worker, number, read_cold, status, under_load, while_nobody_serves};
use mount::{Aligned, MIB, TestMount, errno, image_bytes, kill_and_wait, name, open, open_with, read_at};
use power_cut::random::Random;

/// Not a test: the daemon of all others, see [`mount`].
#[test]
fn daemon_process() {
    // Dies of one write, wherever it comes from.
    mount::daemon_process_that(|line| {
        if line.ends_with(POISON) {
            std::process::abort();
        }
    });
}

/// What the log says of that write, which is larger than any that [`load`] makes.
const POISON: &str = " offset 5111808 size 70001\n";

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
        assert_eq!(read_at(&file, u64::from(round) * 10_000, 5000), [round; 5000]);
        direct.write_all_at(&Aligned::filled(4096, round), MIB).unwrap();
        let mut seen = Aligned::new(4096);
        direct.read_exact_at(&mut seen, MIB).unwrap();
        assert!(seen.iter().all(|byte| *byte == round));
        assert_eq!(read_at(&image, 3 * MIB, 1000), image_bytes(3 * MIB, 1000));
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
    assert_eq!(read_at(&open(&mount.disk()), 0, 6), b"before");
    mount.unmount().unwrap();
}

/// Removes some files of the run directory.
fn lose_of_run_dir(mount: &TestMount, is_lost: impl Fn(&str) -> bool) {
    for entry in std::fs::read_dir(mount.store.run_dir().unwrap()).unwrap() {
        let entry = entry.unwrap();
        if is_lost(entry.file_name().to_str().unwrap()) {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
}

#[test]
fn a_disk_of_which_the_last_writes_are_gone_answers_eio_until_it_is_closed() {
    let mut mount = kept("accept_loss");
    let file = open(&mount.disk());
    file.write_all_at(b"flushed", 0).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&[0xee; 4096], MIB).unwrap();
    let keeper = mount.pid();
    while_nobody_serves(&mount, || lose_of_run_dir(&mount, |name| name.ends_with(".map")));
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
    while_nobody_serves(&mount, || {
        lose_of_run_dir(&mount, |name| name.starts_with("in-use-") || name.ends_with(".map"));
    });
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
    while_nobody_serves(&mount, || {
        std::fs::rename(&store, &aside).unwrap();
        let copied = std::process::Command::new("cp").arg("-a").args([&aside, &store]).status().unwrap();
        assert!(copied.success());
    });
    mount.wait_until("refused", || mount.log().contains("not the store that is mounted"));
    std::fs::remove_dir_all(&store).unwrap();
    std::fs::rename(&aside, &store).unwrap();
    assert_eq!(read_at(&file, 0, 8), b"answered");
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
    while_nobody_serves(&mount, || {
        let error = mount.store.open_disk(&name("web"), DiskName::Root).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        mount.store.open_disk(&name("web"), DiskName::Local).unwrap().close().unwrap();
        let error = mount.store.remove_instance(&name("web")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    });
    file.write_all_at(b"alive", 0).unwrap();
    drop(file);
    mount.store.remove_instance(&name("web")).unwrap();
    mount.unmount().unwrap();
}

/// The next process opened anew what was open for writing alone, and closed the disk with that.
#[test]
fn a_disk_that_only_a_reader_has_open_after_a_takeover_is_in_use() {
    let mount = kept("");
    let (reader, writer) = (File::open(mount.disk()).unwrap(), open(&mount.disk()));
    writer.write_all_at(b"written", MIB).unwrap();
    kill_worker(&mount);
    mount.wait_until("taken over", || status(&mount).disks.iter().any(|disk| disk.handles > 0));
    drop(writer);
    mount.wait_until("closed", || mount.log().matches(": RELEASE ino ").count() == 1);
    mount.wait_until("one is left", || status(&mount).disks.iter().all(|disk| disk.handles == 1));
    assert_eq!(mount.store.remove_instance(&name("web")).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(read_at(&reader, MIB, 7), b"written");
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

/// It was sent to one process after the other, and all guests waited for ever.
#[test]
fn a_request_that_each_process_dies_of_is_answered_with_an_error_in_the_end() {
    let mut mount = kept("");
    let (file, other) = (open(&mount.disk()), open(&mount.local()));
    assert_eq!(errno(file.write_all_at(&[1; 70_001], 5_111_808)), libc::EIO);
    for file in [&file, &other] {
        file.write_all_at(b"alive", 0).unwrap();
        assert_eq!(read_at(file, 0, 5), b"alive");
    }
    // On a busy machine a life may last a second, which takes back one death.
    assert!(status(&mount).keeper.unwrap().restarts >= 5);
    assert!(mount.log().contains("refused, as processes died while it was under way"));
    drop((file, other));
    mount.unmount().unwrap();
}

/// What the log says of how reads of a base wait that is not in memory.
const BY_IO_URING: &str = "reads of bases that are not in memory go by io_uring";
const BY_THREADS: &str = "threads wait for reads of bases that are not in memory";

#[test]
fn reads_of_what_the_host_has_not_in_memory_survive_a_kill() {
    let mut mount = kept("");
    assert!(
        mount.log().contains(BY_IO_URING),
        "this needs Linux 6.1 and kernel.io_uring_disabled=0: {}",
        mount.log()
    );
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reads = scope.spawn(|| read_cold(&mount, 1, &done));
        for kill in 1..=3 {
            // A life of a second costs no wait after its end.
            std::thread::sleep(Duration::from_millis(1050));
            kill_worker(&mount);
            assert_eq!(status(&mount).keeper.unwrap().restarts, kill);
        }
        done.store(true, Ordering::Relaxed);
        assert!(reads.join().unwrap() > 100);
    });
    mount.unmount().unwrap();
    load::assert_only_deaths_in(&mount.log(), 3);
}

/// Refuses system calls to this thread and to whatever it starts, as many containers do.
fn refuse(calls: &[i64]) {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    let refused = calls.iter().map(|&call| (call, Vec::new())).collect();
    let errno = SeccompAction::Errno(libc::EPERM as u32);
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(refused, SeccompAction::Allow, errno, architecture).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

fn threads_wait_for_cold_reads() {
    let mut mount = kept("");
    assert!(mount.log().contains(BY_THREADS), "{}", mount.log());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reads = scope.spawn(|| read_cold(&mount, 2, &done));
        std::thread::sleep(Duration::from_millis(300));
        done.store(true, Ordering::Relaxed);
        assert!(reads.join().unwrap() > 0);
    });
    mount.unmount().unwrap();
}

#[test]
fn where_io_uring_is_refused_threads_wait_for_what_the_host_has_not_in_memory() {
    refuse(&[libc::SYS_io_uring_setup]);
    threads_wait_for_cold_reads();
}

/// A ring was made that never did anything, and the session waited for it for ever.
#[test]
fn where_rings_can_only_be_made_threads_wait_for_what_the_host_has_not_in_memory() {
    refuse(&[libc::SYS_io_uring_enter]);
    threads_wait_for_cold_reads();
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
    assert_eq!(read_at(&file, 0, 12), b"beforeafter!");
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
    while_nobody_serves(&mount, || {
        rustix::mount::unmount(mount.mountpoint(), rustix::mount::UnmountFlags::empty()).unwrap();
    });
    assert!(mount.ends_within(Duration::from_secs(60)).expect("it ends").success());
    let disk = mount.store.open_disk(&name("web"), DiskName::Root).unwrap();
    let mut seen = [0; 4];
    disk.read_at(0, &mut seen).unwrap();
    disk.close().unwrap();
    assert_eq!(&seen, b"last");
    assert!(!mount.log().contains("may be gone"), "it was closed, not recovered");
}

#[test]
fn nobody_notices_more_than_a_pause_when_the_daemon_is_killed_under_load() {
    let (kills, seed) = (number("COWDISK_REPLACEMENTS", 10), number("COWDISK_SEED", 1));
    eprintln!("{kills} kills with seed {seed}");
    let mut mount = kept("");
    mount.create("db");
    let mut random = Random::new(seed);
    under_load(&mount, seed, |load| {
        for kill in 0..kills {
            mount.wait_until("taken over", || u64::from(status(&mount).keeper.unwrap().restarts) == kill);
            // A life of a second costs no wait after its end.
            std::thread::sleep(Duration::from_millis(random.between(1000, 1700)));
            if load.noticed() {
                eprintln!("somebody noticed something before kill {kill}");
                break;
            }
            kill_worker(&mount);
        }
    });
    assert_eq!(u64::from(status(&mount).keeper.unwrap().restarts), kills);
    mount.unmount().unwrap();
    load::assert_only_deaths_in(&mount.log(), kills);
}
