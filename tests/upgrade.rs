//! The process that serves a mount hands over, in order, to one of the program that is installed now, while disks are in use:
//! nobody notices more than a pause, and if that program is no good the one of before goes on.
//!
//! The daemon runs a copy of this test program, which the tests replace. What they write at its end says in what way it is
//! no good, see [`Fault`]. `COWDISK_UPGRADES` says how often under load (8 unless told, every third time with a kill besides),
//! `COWDISK_SEED` with which seed. With `COWDISK_TRANSPORT=io_uring` requests travel by io_uring; nobody is killed then, but where
//! that is the test.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failed step fails the test")]
#![allow(clippy::disallowed_methods, reason = "tests change files in place")]
#![allow(clippy::cast_possible_truncation, reason = "tests run on 64 bits")]

#[path = "full/host.rs"]
#[allow(dead_code, reason = "it knows more kinds of hosts")]
mod host;
#[path = "common/load.rs"]
mod load;
#[path = "common/mount.rs"]
mod mount;

use std::fs::{File, Permissions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowdisk::daemon::{self, Upgraded};
use cowdisk::{ErrorKind, Result};
use host::{Kind, SmallHost};
use load::{kept, kill_worker, number, read_cold, status, under_load};
use mount::{Aligned, MIB, TestMount, image_bytes, open, open_with, read_at};
use power_cut::random::Random;
use rustix::process::Signal;

/// How often the host's disk may be too busy for an upgrade.
const PUT_OFF_MAX: u32 = 10;

/// What is wrong with a program.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// It ends at once.
    Ends,
    /// It speaks another protocol.
    Speaks,
    /// It ends when it has begun to read requests; by io_uring, just before that.
    EndsLate,
    /// It goes no further then.
    HangsLate,
}

impl Fault {
    const ALL: [Self; 4] = [Self::Ends, Self::Speaks, Self::EndsLate, Self::HangsLate];

    fn note(self) -> String {
        format!("cowdisk-test-fault: {self:?}")
    }

    /// That of this very program, if it is one that takes over.
    fn own() -> Option<Self> {
        std::env::var_os("COWDISK_KEPT")?;
        let mut end = Vec::new();
        let mut file = File::open("/proc/self/exe").ok()?;
        file.seek(SeekFrom::End(-40)).ok()?;
        file.read_to_end(&mut end).ok()?;
        Self::ALL.into_iter().find(|fault| end.ends_with(fault.note().as_bytes()))
    }
}

/// Not a test: the daemon of all others, see [`mount`].
#[test]
fn daemon_process() {
    match Fault::own() {
        None => mount::daemon_process(),
        Some(Fault::Ends) => std::process::exit(7),
        Some(Fault::Speaks) => {
            let hello = br#"{"hello":{"protocol":999,"version":"9.9.9"}}"#;
            rustix::net::send(rustix::stdio::stdin(), hello, rustix::net::SendFlags::empty()).unwrap();
            std::thread::sleep(Duration::from_secs(60));
        }
        Some(Fault::EndsLate) => mount::daemon_process_that(|line| {
            if is_late(line) {
                std::process::exit(7);
            }
        }),
        Some(Fault::HangsLate) => mount::daemon_process_that(|line| {
            if is_late(line) {
                std::thread::sleep(Duration::from_secs(60));
            }
        }),
    }
}

/// Whether a program that logs that is as far as it may get without harm if it goes no further.
fn is_late(line: &str) -> bool {
    line.contains(if by_rings() { " rings for " } else { ": serving " })
}

/// Whether requests travel by io_uring.
fn by_rings() -> bool {
    std::env::var("COWDISK_TRANSPORT").is_ok_and(|transport| transport == "io_uring")
}

/// Mounted, by a copy of this program.
fn copied(options: &str) -> TestMount {
    copied_at(&std::env::temp_dir(), options)
}

fn copied_at(parent: &std::path::Path, options: &str) -> TestMount {
    let transport = if by_rings() { "io_uring" } else { "dev_fuse" };
    let options = format!("transport={transport},flush=0,{options}");
    let mut mount = TestMount::unmounted(&options, parent).copied();
    mount.mount().unwrap();
    mount
}

fn upgrade(mount: &TestMount) -> Result<Upgraded> {
    daemon::upgrade(&mount.store)
}

/// The program that the worker runs.
fn running(mount: &TestMount) -> u64 {
    std::fs::metadata(format!("/proc/{}/exe", mount.worker())).unwrap().ino()
}

#[test]
fn open_files_stay_open_when_the_installed_program_takes_over() {
    let mut mount = copied("");
    let (file, direct) = (open(&mount.disk()), open_with(&mount.disk(), libc::O_DIRECT).unwrap());
    let image = File::open(mount.path("images/base")).unwrap();
    let (keeper, first) = (mount.pid(), running(&mount));
    let ino = || std::fs::metadata(mount.disk()).unwrap().ino();
    let before = ino();
    for round in 1..=5u8 {
        file.write_all_at(&[round; 5000], u64::from(round) * 10_000).unwrap();
        let worker = mount.worker();
        mount.install("");
        let version = env!("CARGO_PKG_VERSION");
        let upgraded = upgrade(&mount).unwrap();
        assert_eq!((upgraded.from.as_str(), upgraded.to.as_str()), (version, version));
        assert_ne!(mount.worker(), worker);
        assert_eq!(running(&mount), std::fs::metadata(mount.copy_path()).unwrap().ino());
        assert_eq!(read_at(&file, u64::from(round) * 10_000, 5000), [round; 5000]);
        direct.write_all_at(&Aligned::filled(4096, round), MIB).unwrap();
        assert_eq!(read_at(&image, 3 * MIB, 1000), image_bytes(3 * MIB, 1000));
        file.sync_all().unwrap();
        assert_eq!(ino(), before);
        let keeper = status(&mount).keeper.unwrap();
        assert_eq!((keeper.upgrades, keeper.restarts), (u32::from(round), 0));
    }
    assert_ne!(running(&mount), first);
    assert_eq!(status(&mount).open_files, 3);
    let (now, deaths) = (running(&mount), u64::from(!by_rings()));
    if deaths > 0 {
        kill_worker(&mount);
        assert_eq!(status(&mount).open_files, 3);
    }
    assert_eq!((running(&mount), mount.pid()), (now, keeper), "after a death the same program goes on");
    drop((file, direct, image));
    mount.unmount().unwrap();
    load::assert_only_deaths_in(&mount.log(), deaths);
}

#[test]
fn reads_of_what_the_host_has_not_in_memory_survive_an_upgrade() {
    let mut mount = copied("");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reads = scope.spawn(|| read_cold(&mount, 1, &done));
        let mut put_off = 0;
        for upgrades in 1..=3 {
            while let Err(error) = upgrade(&mount) {
                assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
                put_off += 1;
                assert!(put_off <= PUT_OFF_MAX, "{error}");
            }
            assert_eq!(status(&mount).keeper.unwrap().upgrades, upgrades);
            std::thread::sleep(Duration::from_millis(200));
        }
        done.store(true, Ordering::Relaxed);
        assert!(reads.join().unwrap() > 100);
    });
    mount.unmount().unwrap();
}

#[test]
fn a_program_that_is_no_good_is_refused_and_nobody_notices() {
    let mut mount = copied("");
    let file = open(&mount.disk());
    let worker = mount.worker();
    let program = mount.copy_path();
    let refused = |kind: ErrorKind, why: &str| {
        let error = upgrade(&mount).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(why), "{error}");
        file.write_all_at(b"served", 0).unwrap();
        assert_eq!(mount.worker(), worker, "the same process serves");
    };
    for mode in [0o775, 0o757] {
        std::fs::set_permissions(&program, Permissions::from_mode(mode)).unwrap();
        refused(ErrorKind::Denied, "others than root may write to it");
    }
    std::os::unix::fs::chown(&program, Some(4321), None).unwrap();
    refused(ErrorKind::Denied, "others than root may write to it");
    std::fs::remove_file(&program).unwrap();
    refused(ErrorKind::NotFound, program.to_str().unwrap());
    mount.install(&Fault::Ends.note());
    refused(ErrorKind::Io, "the process that serves has ended (exit status: 7)");
    mount.install(&Fault::Speaks.note());
    refused(ErrorKind::Unsupported, "it is cowdisk 9.9.9 and speaks version 999");
    let keeper = status(&mount).keeper.unwrap();
    assert_eq!((keeper.upgrades, keeper.restarts), (0, 0));
    mount.install("");
    upgrade(&mount).unwrap();
    drop(file);
    mount.unmount().unwrap();
}

#[test]
fn the_program_of_before_takes_over_again_from_one_that_does_not_serve() {
    let mut mount = copied("");
    let file = open(&mount.disk());
    let good = running(&mount);
    for (round, (fault, why)) in
        [(Fault::EndsLate, "exit status: 7"), (Fault::HangsLate, "not begun to serve in time")]
            .into_iter()
            .enumerate()
    {
        mount.install(&fault.note());
        let byte = round as u8 + 1;
        file.write_all_at(&[byte; 5000], 0).unwrap();
        let error = upgrade(&mount).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("the program of before takes over again") && text.contains(why), "{error}");
        assert_eq!(read_at(&file, 0, 5000), [byte; 5000]);
        assert_eq!(running(&mount), good);
        let keeper = status(&mount).keeper.unwrap();
        assert_eq!((keeper.upgrades, keeper.restarts as usize), (0, round + 1));
        // A life of a second costs no wait after its end.
        std::thread::sleep(Duration::from_secs(2));
    }
    drop(file);
    mount.unmount().unwrap();
}

/// Thaws what [`freeze`] has frozen.
struct Frozen<'a>(&'a SmallHost);

fn freeze(host: &SmallHost) -> Frozen<'_> {
    let output = Command::new("fsfreeze").arg("--freeze").arg(host.path()).output().unwrap();
    mount::check_output("fsfreeze", &output);
    Frozen(host)
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(self.0.path()).status();
    }
}

#[test]
fn requests_that_wait_for_the_disk_are_not_cut_off_but_put_the_upgrade_off() {
    let host = SmallHost::new(Kind::Ext4);
    let mut mount = copied_at(&host.path(), "");
    let (file, direct) = (open(&mount.disk()), open_with(&mount.disk(), libc::O_DIRECT).unwrap());
    let image = File::open(mount.path("images/base")).unwrap();
    for at in 0..2 {
        file.write_all_at(&[1; 4096], at * MIB).unwrap();
    }
    let worker = mount.worker();
    std::thread::scope(|scope| {
        let frozen = freeze(&host);
        // One is done by the thread that has read it, the other one by the disk lane; by io_uring both are, for a thread that
        // waits there holds up all that comes from its processor.
        let first = if by_rings() { &direct } else { &file };
        let buffered = scope.spawn(|| first.write_all_at(&Aligned::filled(4096, 2), 0));
        let written = scope.spawn(|| direct.write_all_at(&Aligned::filled(4096, 2), MIB));
        mount.wait_until("both under way", || mount.log().matches("WRITE ino").count() >= 4);
        let error = upgrade(&mount).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.to_string().contains("some requests still wait for the host's disk"), "{error}");
        assert_eq!(read_at(&image, 3 * MIB, 1000), image_bytes(3 * MIB, 1000), "requests are read again");
        assert!(!buffered.is_finished() && !written.is_finished());
        assert_eq!(mount.worker(), worker);
        drop(frozen);
        buffered.join().unwrap().unwrap();
        written.join().unwrap().unwrap();
    });
    upgrade(&mount).unwrap();
    for at in 0..2 {
        assert_eq!(read_at(&file, at * MIB, 4096), [2; 4096]);
    }
    drop((file, direct, image));
    mount.unmount().unwrap();
}

/// A signal was forgotten with the process that had been told of it.
#[test]
fn a_signal_that_asks_the_daemon_to_end_is_heeded_by_the_next_process_too() {
    let mut mount = copied("");
    let file = open(&mount.disk());
    let asked = || mount.log().matches("SIGTERM: taking the mount").count();
    mount.signal(Signal::TERM);
    mount.wait_until("told", || asked() == 1);
    let mut times = 1;
    if !by_rings() {
        kill_worker(&mount);
        times += 1;
        mount.wait_until("told after a death", || asked() == times);
    }
    mount.install("");
    upgrade(&mount).unwrap();
    mount.wait_until("told after an upgrade", || asked() == times + 1);
    drop(file);
    assert!(mount.ends_within(Duration::from_secs(60)).expect("it ends").success());
}

#[test]
fn a_mount_that_cannot_be_taken_over_says_so() {
    let mut mount = TestMount::with_options("transport=fuser,flush=0");
    let error = upgrade(&mount).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("the transport fuser cannot be handed over"), "{error}");
    mount.unmount().unwrap();
    assert_eq!(upgrade(&mount).unwrap_err().kind(), ErrorKind::NotFound);
    let mut mount = kept("");
    mount.kill_keeper();
    mount.wait_until("it notices", || status(&mount).keeper.is_none());
    let error = upgrade(&mount).unwrap_err();
    assert!(error.to_string().contains("the keeper of the mount has died"), "{error}");
    daemon::unmount(&mount.mountpoint()).unwrap();
}

/// Requests that a ring has fetched are not sent again: whoever waits must be told, and at once.
#[test]
fn a_process_that_dies_with_its_rings_takes_the_mount_along() {
    if !by_rings() {
        return;
    }
    let mut mount = copied("");
    let file = open(&mount.disk());
    file.write_all_at(b"answered", 0).unwrap();
    mount.install("");
    upgrade(&mount).unwrap();
    kill_worker(&mount);
    let errno = mount::errno(file.write_all_at(b"x", 0));
    assert!([libc::ENOTCONN, libc::ECONNABORTED, libc::ECANCELED].contains(&errno), "errno {errno}");
    drop(file);
    assert_eq!(mount.ends_within(Duration::from_secs(60)).expect("the keeper ends").code(), Some(1));
    let log = mount.log();
    rustix::mount::unmount(mount.mountpoint(), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(log.contains("should the process that serves crash, the mount is cut off"), "{log}");
    mount.mount().unwrap();
    let mut seen = [0; 8];
    File::open(mount.disk()).unwrap().read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"answered");
    mount.unmount().unwrap();
}

#[test]
fn nobody_notices_more_than_a_pause_when_the_daemon_is_upgraded_and_killed_under_load() {
    let (upgrades, seed) = (number("COWDISK_UPGRADES", 8), number("COWDISK_SEED", 1));
    eprintln!("{upgrades} upgrades with seed {seed}");
    let mut mount = copied("");
    mount.create("db");
    let mut random = Random::new(seed);
    let (mut kills, mut put_off, mut longest) = (0, 0, 0);
    under_load(&mount, seed, |load| {
        for round in 0..upgrades {
            // A life of a second costs no wait after its end.
            std::thread::sleep(Duration::from_millis(random.between(500, 1500)));
            if load.noticed() {
                eprintln!("somebody noticed something before upgrade {round}");
                break;
            }
            mount.install("");
            let pause = loop {
                match upgrade(&mount) {
                    Ok(upgraded) => break upgraded.pause_milliseconds,
                    // On a busy disk.
                    Err(error) if error.kind() == ErrorKind::Busy && put_off < PUT_OFF_MAX => put_off += 1,
                    Err(error) => panic!("{error}"),
                }
            };
            longest = longest.max(pause);
            if round % 3 == 2 && !by_rings() {
                std::thread::sleep(Duration::from_millis(random.between(1000, 1500)));
                kill_worker(&mount);
                kills += 1;
                mount
                    .wait_until("taken over", || u64::from(status(&mount).keeper.unwrap().restarts) == kills);
            }
        }
    });
    eprintln!(
        "{kills} kills; no request was read for at most {longest} ms in an upgrade; {put_off} were put off"
    );
    let keeper = status(&mount).keeper.unwrap();
    assert_eq!((u64::from(keeper.upgrades), u64::from(keeper.restarts)), (upgrades, kills));
    mount.unmount().unwrap();
    if put_off == 0 {
        load::assert_only_deaths_in(&mount.log(), kills);
    }
}
