//! Processes that die or hand over while the kernel serves a disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowdisk::ErrorKind;
use cowdisk::daemon;

use super::load::{kill_worker, number, status, verify_by_fio, while_nobody_serves};
use super::mount::{Aligned, MIB, TestMount, errno, name, open, open_with, read_at};
use super::{local, only_disk, passing, requests, root, unmounted};

#[test]
fn reads_and_writes_go_on_while_nobody_serves_and_the_next_process_goes_on_with_the_disk() {
    let mut mount = passing();
    let (disk, direct) = (open(&root(&mount)), open_with(&root(&mount), libc::O_DIRECT).unwrap());
    for round in 1..=3u8 {
        // A life of a second costs no wait after its end.
        std::thread::sleep(Duration::from_millis(1050));
        // After a look at its attributes the kernel asks us, once, whether a file is a program with rights that a write ends.
        disk.write_all_at(b"asked", 0).unwrap();
        while_nobody_serves(&mount, || {
            disk.write_all_at(&[round; 5000], u64::from(round) * 10_000).unwrap();
            direct.write_all_at(&Aligned::filled(4096, round), MIB).unwrap();
            assert_eq!(read_at(&disk, u64::from(round) * 10_000, 5000), [round; 5000]);
            assert_eq!(read_at(&disk, MIB, 4096), [round; 4096]);
        });
        disk.sync_all().unwrap();
        let late = open(&root(&mount));
        assert_eq!(read_at(&late, MIB, 4096), [round; 4096]);
        let shown = only_disk(&mount);
        assert_eq!((shown.served_by.as_str(), shown.state.as_str()), ("kernel", "open"));
        assert_eq!(status(&mount).keeper.unwrap().restarts, u32::from(round));
    }
    assert_eq!((requests(&mount, "READ"), requests(&mount, "WRITE")), (0, 0));
    drop((disk, direct));
    mount.wait_until("closed", || status(&mount).disks.is_empty());
    // Nobody holds on to what is closed.
    mount.store.remove_instance(&name("full")).unwrap();
    mount.unmount().unwrap();
}

#[test]
fn the_installed_program_goes_on_with_the_disk_after_an_upgrade() {
    let mut mount = unmounted(&std::env::temp_dir(), "passthrough=auto").copied();
    mount.mount().unwrap();
    let (disk, direct) = (open(&root(&mount)), open_with(&root(&mount), libc::O_DIRECT).unwrap());
    for round in 1..=3u8 {
        disk.write_all_at(&[round; 5000], u64::from(round) * 10_000).unwrap();
        mount.install("");
        daemon::upgrade(&mount.store).unwrap();
        assert_eq!(read_at(&disk, u64::from(round) * 10_000, 5000), [round; 5000]);
        direct.write_all_at(&Aligned::filled(4096, round), MIB).unwrap();
        disk.sync_all().unwrap();
        let late = open(&root(&mount));
        assert_eq!(read_at(&late, MIB, 4096), [round; 4096]);
        drop(late);
        mount.wait_until("closed", || only_disk(&mount).handles == 2);
        assert_eq!(only_disk(&mount).served_by, "kernel");
        assert_eq!(status(&mount).keeper.unwrap().upgrades, u32::from(round));
    }
    assert_eq!((requests(&mount, "READ"), requests(&mount, "WRITE")), (0, 0));
    drop((disk, direct));
    mount.wait_until("closed", || status(&mount).disks.is_empty());
    mount.unmount().unwrap();
}

/// The next process opens anew what was open for writing, and would close the disk with that, though the kernel still serves
/// it to who reads.
#[test]
fn who_only_reads_keeps_a_disk_with_the_kernel_when_another_process_has_taken_over() {
    let mount = passing();
    let (reader, writer) = (File::open(root(&mount)).unwrap(), open(&root(&mount)));
    kill_worker(&mount);
    mount.wait_until("taken over", || only_disk(&mount).handles > 0);
    drop(writer);
    mount.wait_until("closed", || requests(&mount, "RELEASE") == 1);
    let writer = open(&root(&mount));
    writer.write_all_at(b"again", MIB).unwrap();
    assert_eq!(read_at(&reader, MIB, 5), b"again");
    let shown = only_disk(&mount);
    assert_eq!((shown.served_by.as_str(), shown.handles), ("kernel", 2));
    drop(writer);
    mount.wait_until("closed", || requests(&mount, "RELEASE") == 2);
    assert_eq!(mount.store.remove_instance(&name("full")).unwrap_err().kind(), ErrorKind::Busy);
    drop(reader);
    mount.wait_until("closed", || status(&mount).disks.is_empty());
    mount.store.remove_instance(&name("full")).unwrap();
}

/// The process that dies may have opened the disk and not said so, or closed it: the next one must come to the same mind as
/// the kernel.
#[test]
fn nobody_notices_that_processes_die_and_hand_over() {
    replace_under_load(&std::env::temp_dir(), number("COWDISK_REPLACEMENTS", 5));
}

/// Kills the process that serves a store below `parent`, and every third time upgrades it, so many times in all, while disks that
/// the kernel serves are written and verified.
pub fn replace_under_load(parent: &Path, changes: u64) {
    let seed = number("COWDISK_SEED", 1);
    let mut mount = unmounted(parent, "passthrough=auto").copied();
    mount.mount().unwrap();
    let done = AtomicBool::new(false);
    let (runs, opens) = std::thread::scope(|scope| {
        let (mount, done) = (&mount, &done);
        // Who fails here does not wait for the others for ever.
        let ends = Ends(done);
        let verifier = scope.spawn(move || verify_by_fio(&root(mount), "libaio", seed, done));
        let openers = [1, 2].map(|part| scope.spawn(move || open_write_and_close(mount, part * MIB, done)));
        for change in 0..changes {
            mount.wait_until("taken over", || changes_so_far(mount) == change);
            // A life of a second costs no wait after its end.
            std::thread::sleep(Duration::from_millis(1050));
            if change % 3 == 2 {
                mount.install("");
                mount.wait_until("handed over", || match daemon::upgrade(&mount.store) {
                    Ok(_) => true,
                    // The host's disk takes longer over a request than an upgrade waits.
                    Err(error) if error.kind() == ErrorKind::Busy => false,
                    Err(error) => panic!("{error}"),
                });
            } else {
                kill_worker(mount);
            }
        }
        std::thread::sleep(Duration::from_millis(200));
        drop(ends);
        (verifier.join().unwrap(), openers.map(|opener| opener.join().unwrap()))
    });
    eprintln!("{runs} runs of fio, opened {opens:?} times");
    assert!(runs > 0 && opens.iter().all(|opens| *opens > changes), "{runs} {opens:?}");
    assert_eq!(changes_so_far(&mount), changes);
    mount.wait_until("closed", || status(&mount).disks.is_empty());
    // Whose opening was cut short before the kernel was told was served by the daemon, until all had closed it.
    let disk = open(&local(&mount));
    assert_eq!(only_disk(&mount).served_by, "kernel");
    disk.sync_all().unwrap();
}

/// Has all others end when it is dropped, even by a panic.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How often another process has taken over.
fn changes_so_far(mount: &TestMount) -> u64 {
    let keeper = status(mount).keeper.unwrap();
    u64::from(keeper.restarts + keeper.upgrades)
}

/// Opens the local disk, writes, reads back, syncs and closes it, over and over; returns how often.
fn open_write_and_close(mount: &TestMount, offset: u64, done: &AtomicBool) -> u64 {
    let mut opens = 0u64;
    while !done.load(Ordering::Relaxed) {
        let disk = open(&local(mount));
        let bytes = [u8::try_from(opens % 251).unwrap(); 3000];
        disk.write_all_at(&bytes, offset).unwrap();
        assert_eq!(read_at(&disk, offset, 3000), bytes);
        disk.sync_all().unwrap();
        opens += 1;
    }
    opens
}

/// Only the keeper can tell the kernel to let go of a file, and until then its lock is held.
#[test]
fn without_the_keeper_a_disk_can_be_closed_and_opened_again() {
    let mut mount = passing();
    let disk = open(&root(&mount));
    mount.kill_keeper();
    mount.wait_until("it notices", || status(&mount).keeper.is_none());
    disk.write_all_at(b"after", MIB).unwrap();
    drop(disk);
    mount.wait_until("closed", || only_disk(&mount).handles == 0);
    let disk = open(&root(&mount));
    assert_eq!(read_at(&disk, MIB, 5), *b"after");
    disk.write_all_at(b"again", MIB).unwrap();
    disk.sync_all().unwrap();
    assert_eq!(mount.store.remove_instance(&name("full")).unwrap_err().kind(), ErrorKind::Busy);
    // Another one is served as ever.
    let other = open(&local(&mount));
    other.write_all_at(b"other", MIB).unwrap();
    let by = |name: &str| {
        let disks = status(&mount).disks;
        disks.into_iter().find(|disk| disk.name == name).unwrap().served_by
    };
    assert_eq!((by("full/disk").as_str(), by("full/disk.local").as_str()), ("kernel", "daemon"));
    drop((disk, other));
    daemon::unmount(&mount.mountpoint()).unwrap();
    mount.mount().unwrap();
    // The kernel may let go of its file a moment after the mount is gone.
    mount.wait_until("free", || open_with(&root(&mount), 0).is_ok());
    assert_eq!(read_at(&open(&root(&mount)), MIB, 5), *b"again");
    assert_eq!(read_at(&open(&local(&mount)), MIB, 5), *b"other");
}

/// A hypervisor whose daemon has died whole would write beside the one that opens the disk after it.
#[test]
fn who_has_a_disk_open_in_a_dead_mount_keeps_all_others_away() {
    let mut mount = passing();
    let old = open(&root(&mount));
    mount.kill();
    old.write_all_at(b"still written", MIB).unwrap();
    assert!(mount.mount().unwrap_err().contains("in use"));
    rustix::mount::unmount(mount.mountpoint(), rustix::mount::UnmountFlags::DETACH).unwrap();
    mount.mount().unwrap();
    assert_eq!(errno(open_with(&root(&mount), 0)), libc::EBUSY);
    assert_eq!(mount.store.remove_instance(&name("full")).unwrap_err().kind(), ErrorKind::Busy);
    drop(old);
    mount.wait_until("free", || open_with(&root(&mount), 0).is_ok());
    assert_eq!(read_at(&open(&root(&mount)), MIB, 13), b"still written");
}
