//! Disks that the kernel serves by itself: nothing of what is promised of a disk changes but who moves its bytes.
//!
//! `COWDISK_REPLACEMENTS` says how often the process that serves dies or hands over under load (5 unless told), `COWDISK_SEED` with
//! which seed.

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

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowdisk::ErrorKind;
use cowdisk::daemon::{self, DiskStatus};
use cowdisk::store::{DiskName, InstanceSpec, NoProgress};
use host::{Kind, SmallHost};
use load::{kill_worker, number, status, verify_by_fio, while_nobody_serves};
use mount::{Aligned, IMAGE, MIB, TestMount, errno, image_bytes, name, open, open_with, read_at};
use rustix::fs::{FallocateFlags, SeekFrom};

/// Not a test: the daemon of all others, see [`mount`].
#[test]
fn daemon_process() {
    mount::daemon_process();
}

/// A store with the full copy `full`: a root disk of 8 MiB over the image, a local disk of 16 MiB.
fn with_copy(options: &str) -> TestMount {
    with_copy_below(&std::env::temp_dir(), options)
}

/// The same in the folder `parent`.
fn with_copy_below(parent: &Path, options: &str) -> TestMount {
    let mut mount = unmounted(parent, options);
    mount.mount().unwrap();
    mount
}

/// The same, not mounted.
fn unmounted(parent: &Path, options: &str) -> TestMount {
    let mount = TestMount::unmounted(&format!("transport=dev_fuse,flush=0,{options}"), parent);
    let spec = InstanceSpec {
        root_size: Some(8 * MIB),
        local_size: Some(16 * MIB),
        no_cow: true,
        ..InstanceSpec::of(name(IMAGE))
    };
    mount.store.create_instance(&name("full"), &spec, &NoProgress).unwrap();
    mount
}

fn passing() -> TestMount {
    with_copy("passthrough=auto")
}

fn root(mount: &TestMount) -> PathBuf {
    mount.path("instances/full/disk")
}

fn local(mount: &TestMount) -> PathBuf {
    mount.path("instances/full/disk.local")
}

/// The store's own file that is a disk of the full copy.
fn host_file(mount: &TestMount, file: &str) -> PathBuf {
    mount.store.dir().join("instances/full").join(file)
}

/// What the daemon tells of the only disk that is in use.
fn only_disk(mount: &TestMount) -> DiskStatus {
    let mut disks = status(mount).disks;
    assert_eq!(disks.len(), 1, "{disks:?}");
    disks.remove(0)
}

/// How many requests of that name have reached the daemon.
fn requests(mount: &TestMount, operation: &str) -> usize {
    mount.log().matches(&format!(": {operation} ino ")).count()
}

#[test]
fn bytes_of_a_full_copy_do_not_pass_through_the_daemon() {
    let mut mount = passing();
    let (disk, host) = (open(&root(&mount)), open(&host_file(&mount, "disk.raw")));
    assert_eq!(read_at(&disk, 0, 5000), image_bytes(0, 5000));
    disk.write_all_at(b"buffered, unaligned", MIB + 77).unwrap();
    let direct = open_with(&root(&mount), libc::O_DIRECT).unwrap();
    direct.write_all_at(&Aligned::filled(512, 7), 3 * MIB + 512).unwrap();
    let mut seen = Aligned::new(4096);
    direct.read_exact_at(&mut seen, 3 * MIB).unwrap();
    assert_eq!(
        (seen[511], seen[512], seen[1024]),
        (image_bytes(3 * MIB + 511, 1)[0], 7, image_bytes(3 * MIB + 1024, 1)[0])
    );
    assert_eq!(
        errno(direct.read_at(&mut seen[..1], 0)),
        libc::EINVAL,
        "by this a hypervisor learns of sectors"
    );
    let durable = open_with(&root(&mount), libc::O_DSYNC).unwrap();
    durable.write_all_at(b"durable", 5 * MIB).unwrap();
    disk.sync_all().unwrap();
    for (offset, bytes) in
        [(MIB + 77, &b"buffered, unaligned"[..]), (3 * MIB + 512, &[7; 512]), (5 * MIB, b"durable")]
    {
        assert_eq!(read_at(&host, offset, bytes.len()), bytes, "at {offset}");
        assert_eq!(read_at(&disk, offset, bytes.len()), bytes, "at {offset}");
    }
    let shown = only_disk(&mount);
    assert_eq!((shown.served_by.as_str(), shown.not_kernel, shown.handles), ("kernel", None, 3));
    assert!(status(&mount).passthrough.on);
    assert_eq!((requests(&mount, "READ"), requests(&mount, "WRITE"), requests(&mount, "FSYNC")), (0, 0, 1));
    drop((disk, direct, durable));
    mount.remount();
    assert_eq!(read_at(&open(&root(&mount)), 5 * MIB, 7), b"durable");
}

#[test]
fn every_opener_of_a_disk_has_the_same_view_of_it() {
    let mount = passing();
    // As a hypervisor does: read-only first, then again for writing, while others look.
    let reader = File::open(local(&mount)).unwrap();
    let (writer, other) = (open(&local(&mount)), open_with(&local(&mount), libc::O_DIRECT).unwrap());
    // SAFETY: nobody cuts the file while it is mapped.
    #[allow(unsafe_code, reason = "a mapping is what is tested")]
    let mut map = unsafe { memmap2::MmapMut::map_mut(&writer).unwrap() };
    writer.write_all_at(&[1; 8192], 4096).unwrap();
    other.write_all_at(&Aligned::filled(4096, 2), 4096).unwrap();
    map[100] = 3;
    let mut expected = vec![0; 3 * 4096];
    expected[100] = 3;
    expected[4096..8192].fill(2);
    expected[8192..].fill(1);
    assert_eq!(read_at(&reader, 0, expected.len()), expected);
    assert_eq!(map[..expected.len()], expected);
    let mut seen = Aligned::new(expected.len());
    other.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(*seen, expected);
    assert_eq!(errno(reader.write_at(b"x", 0)), libc::EBADF);
    assert_eq!(errno(std::fs::write(local(&mount), b"x")), libc::EPERM, "a disk is not cut off");
    mount.wait_until("the refused one closed", || only_disk(&mount).handles == 3);
    drop((reader, writer, other));
    // The kernel maps the host's file, and keeps ours open for it no longer than whoever opened it.
    mount.wait_until("closed", || status(&mount).disks.is_empty());
    map[100] = 4;
    assert_eq!(read_at(&File::open(local(&mount)).unwrap(), 100, 1), [4]);
    assert_eq!((requests(&mount, "READ"), requests(&mount, "WRITE")), (0, 0));
}

#[test]
fn holes_sizes_and_maps_are_those_of_the_file() {
    let mut mount = passing();
    let disk = open(&local(&mount));
    let blocks = || disk.metadata().unwrap().blocks();
    disk.write_all_at(&vec![5; 4 << 20], 2 * MIB).unwrap();
    disk.sync_all().unwrap();
    assert_eq!(blocks(), 4 * MIB / 512);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&disk, punch, 3 * MIB + 512, MIB).unwrap();
    rustix::fs::fallocate(&disk, FallocateFlags::ZERO_RANGE, 5 * MIB, 1024).unwrap();
    let mut expected = vec![5; 4 << 20];
    expected[(1 << 20) + 512..(2 << 20) + 512].fill(0);
    expected[3 << 20..(3 << 20) + 1024].fill(0);
    assert_eq!(read_at(&disk, 2 * MIB, 4 << 20), expected);
    assert!(blocks() <= 3 * MIB / 512 + 8, "the space of a hole is the host's again: {} sectors", blocks());
    let seek = |from| rustix::fs::seek(&disk, from).unwrap();
    assert_eq!((seek(SeekFrom::Data(0)), seek(SeekFrom::Hole(2 * MIB))), (2 * MIB, 3 * MIB + 4096));
    let data: u64 = {
        let map = mount.store.disk_map(&name("full"), DiskName::Local).unwrap();
        let data = map.extents.iter().filter(|extent| extent.kind == cowdisk::store::DiskExtentKind::Data);
        data.map(|extent| extent.len).sum()
    };
    assert_eq!(data, std::fs::metadata(host_file(&mount, "disk.local.raw")).unwrap().blocks() * 512);
    let used = mount.store.disk_status_of(
        &name("full"),
        mount.store.instance(&name("full")).unwrap().id,
        DiskName::Local,
    );
    assert_eq!(used.unwrap().data_allocated, blocks() * 512);

    disk.set_len(20 * MIB).unwrap();
    disk.write_all_at(b"the end", 20 * MIB - 7).unwrap();
    assert_eq!(errno(disk.set_len(16 * MIB)), libc::EPERM);
    assert_eq!(disk.metadata().unwrap().len(), 20 * MIB);
    assert_eq!(only_disk(&mount).size, 20 * MIB);
    drop(disk);
    mount.remount();
    assert_eq!(read_at(&open(&local(&mount)), 20 * MIB - 7, 7), b"the end");
}

/// The kernel asks nobody where the disk ends.
#[test]
fn a_write_past_the_end_grows_the_disk_by_whole_sectors() {
    let mut mount = passing();
    let disk = open(&local(&mount));
    disk.write_all_at(b"more", 16 * MIB + 1000).unwrap();
    assert_eq!(disk.metadata().unwrap().len(), 16 * MIB + 1004);
    assert_eq!(only_disk(&mount).size, 16 * MIB + 1004);
    rustix::fs::fallocate(&disk, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 16 * MIB, 1000)
        .unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    mount.remount();
    let disk = open(&local(&mount));
    assert_eq!(disk.metadata().unwrap().len(), 16 * MIB + 1024);
    assert_eq!(read_at(&disk, 16 * MIB + 1000, 24), *b"more\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

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
    let (changes, seed) = (number("COWDISK_REPLACEMENTS", 5), number("COWDISK_SEED", 1));
    let mut mount = unmounted(&std::env::temp_dir(), "passthrough=auto").copied();
    mount.mount().unwrap();
    let done = AtomicBool::new(false);
    let (runs, opens) = std::thread::scope(|scope| {
        let (mount, done) = (&mount, &done);
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
        done.store(true, Ordering::Relaxed);
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
    assert_eq!(read_at(&open(&root(&mount)), MIB, 5), *b"again");
    assert_eq!(read_at(&open(&local(&mount)), MIB, 5), *b"other");
}

#[test]
fn what_was_synced_survives_a_power_cut() {
    let host = SmallHost::new(Kind::Ext4);
    let mount = with_copy_below(&host.path(), "passthrough=auto");
    let (disk, durable) = (open(&local(&mount)), open_with(&local(&mount), libc::O_DSYNC).unwrap());
    for number in 0..64u64 {
        disk.write_all_at(&[u8::try_from(number).unwrap() + 1; 4096], number * 100_000).unwrap();
    }
    disk.sync_all().unwrap();
    durable.write_all_at(&[100; 5000], 7 * MIB).unwrap();
    let raw = host_file(&mount, "disk.local.raw");
    let cut = host.after_power_cut();
    let left = File::open(cut.path().join(raw.strip_prefix(host.path()).unwrap())).unwrap();
    for number in 0..64u64 {
        let wanted = [u8::try_from(number).unwrap() + 1; 4096];
        assert_eq!(read_at(&left, number * 100_000, 4096), wanted, "write {number}");
    }
    assert_eq!(read_at(&left, 7 * MIB, 5000), [100; 5000]);
    assert_eq!(only_disk(&mount).served_by, "kernel");
}

#[test]
fn after_a_failed_sync_no_later_one_succeeds_until_the_disk_is_opened_again() {
    // The disk of this host has no room for all that its file system promises.
    let below = Mounted::new("tmpfs", c"size=96m");
    let (image, folder) = (below.path().join("image"), tempfile::tempdir().unwrap());
    File::create(&image).unwrap().set_len(256 * MIB).unwrap();
    let run = |command: &mut Command| {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(output.status.success(), "{command:?}: {output:?} (this test needs root)");
    };
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "lazy_itable_init=0,nodiscard"]).arg(&image));
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(folder.path()));
    let host = Mounted(folder);
    let mount = with_copy_below(host.path(), "passthrough=auto,reserve=0");
    let disk = open(&local(&mount));
    disk.write_all_at(&[1; 8192], 0).unwrap();
    disk.sync_all().unwrap();
    let full = File::create(below.path().join("full")).unwrap();
    while full.write_at(&[0; 65536], full.metadata().unwrap().len()).is_ok_and(|count| count > 0) {}
    disk.write_all_at(&vec![2; 8 << 20], 4 * MIB).unwrap();
    // As the host's loop device has it.
    assert!([libc::EIO, libc::ENOSPC].contains(&errno(disk.sync_all())));
    assert_eq!(
        (only_disk(&mount).state.as_str(), only_disk(&mount).served_by.as_str()),
        ("latched", "kernel")
    );
    full.set_len(0).unwrap();
    disk.write_all_at(&[3; 4096], 4096).unwrap();
    assert_eq!(
        errno(disk.sync_all()),
        libc::EIO,
        "nobody knows what of the earlier writes has reached the disk"
    );
    let other = open(&local(&mount));
    assert_eq!(errno(other.sync_all()), libc::EIO);
    drop((disk, other));
    mount.wait_until("closed", || status(&mount).disks.is_empty());
    let disk = open(&local(&mount));
    assert_eq!(read_at(&disk, 0, 4096), [1; 4096]);
    disk.write_all_at(&[4; 4096], 0).unwrap();
    disk.sync_all().unwrap();
    assert_eq!(only_disk(&mount).state, "open");
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

#[test]
fn a_disk_that_the_kernel_cannot_serve_is_served_as_ever_and_status_says_why() {
    let served = |mount: &TestMount, path: PathBuf| {
        let disk = open(&path);
        disk.write_all_at(b"written", 4096).unwrap();
        assert_eq!(read_at(&disk, 4096, 7), b"written");
        let shown = only_disk(mount);
        assert_eq!(shown.served_by, "daemon");
        assert_eq!(requests(mount, "WRITE"), 1);
        shown.not_kernel
    };
    let mount = passing();
    assert!(served(&mount, mount.disk()).unwrap().contains("overlay"));

    let mount = with_copy("");
    assert_eq!(served(&mount, root(&mount)), None);
    assert!(status(&mount).passthrough.reason.unwrap().contains("passthrough=auto"));

    // A copy that its host may not have room for asks before each write.
    let mount = with_copy("passthrough=auto,reserve=1000T");
    let disk = open(&local(&mount));
    assert_eq!(errno(disk.write_at(b"x", 0)), libc::ENOSPC);
    assert!(only_disk(&mount).not_kernel.unwrap().contains("no room"));

    let mut mount = with_copy("passthrough=auto");
    mount.unmount().unwrap();
    mount.give_to(4321);
    if mount.mount().is_ok() {
        assert!(status(&mount).passthrough.reason.unwrap().contains("CAP_SYS_ADMIN"));
    }
}

/// A file system that is gone with the test.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(kind: &str, data: &std::ffi::CStr) -> Self {
        let folder = tempfile::tempdir().unwrap();
        rustix::mount::mount(kind, folder.path(), kind, rustix::mount::MountFlags::empty(), data).unwrap();
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn where_the_host_is_full_the_write_that_does_not_fit_fails_and_others_go_on() {
    let host = Mounted::new("tmpfs", c"size=64m");
    let mount = with_copy_below(host.path(), "passthrough=auto,reserve=1M");
    let disk = open(&local(&mount));
    disk.write_all_at(&[1; 8192], 0).unwrap();
    assert_eq!(only_disk(&mount).served_by, "kernel");
    let full = File::create(host.path().join("full")).unwrap();
    while full.write_at(&[0; 65536], full.metadata().unwrap().len()).is_ok_and(|count| count > 0) {}
    assert_eq!(errno(disk.write_all_at(&[2; 65536], 4 * MIB)), libc::ENOSPC);
    disk.write_all_at(&[3; 8192], 0).unwrap();
    disk.sync_all().unwrap();
    assert_eq!(status(&mount).host.left, 0);
    assert_eq!(rustix::fs::statvfs(mount.path("")).unwrap().f_bavail, 0);
    full.set_len(0).unwrap();
    disk.write_all_at(&[2; 65536], 4 * MIB).unwrap();
    assert_eq!(read_at(&disk, 4 * MIB, 65536), [2; 65536]);
    assert_eq!(read_at(&disk, 0, 8192), [3; 8192]);
    assert_eq!(requests(&mount, "WRITE"), 0);
}

#[test]
fn a_store_on_a_file_system_upon_others_is_served_by_the_daemon() {
    let below = Mounted::new("tmpfs", c"");
    let part = |name: &str| {
        let path = below.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path.display().to_string()
    };
    let data = format!("lowerdir={},upperdir={},workdir={}", part("lower"), part("upper"), part("work"));
    let host = Mounted::new("overlay", &std::ffi::CString::new(data).unwrap());
    let mount = with_copy_below(host.path(), "passthrough=auto");
    let disk = open(&local(&mount));
    disk.write_all_at(b"written", 4096).unwrap();
    assert_eq!(read_at(&disk, 4096, 7), b"written");
    let shown = only_disk(&mount);
    assert_eq!(shown.served_by, "daemon");
    assert!(shown.not_kernel.unwrap().contains("lies upon another one"));
}
