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
#[path = "passthrough/hosts.rs"]
mod hosts;
#[path = "common/load.rs"]
mod load;
#[path = "common/mount.rs"]
mod mount;
#[path = "passthrough/taking_over.rs"]
mod taking_over;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use cowdisk::daemon::DiskStatus;
use cowdisk::store::{CheckRequest, DiskName, InstanceSpec, NoProgress};
use load::{status, while_nobody_serves};
use mount::{Aligned, IMAGE, MIB, TestMount, errno, image_bytes, name, open, open_with, read_at};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::process::{Resource, Rlimit};

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
    assert_bytes_pass_the_daemon_by(passing(), Err(libc::EINVAL));
}

/// `one_byte` is what comes of a direct read of less than a sector, by which a hypervisor learns of sectors.
fn assert_bytes_pass_the_daemon_by(mut mount: TestMount, one_byte: Result<usize, i32>) {
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
    assert_eq!(direct.read_at(&mut seen[..1], 0).map_err(|error| error.raw_os_error().unwrap()), one_byte);
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

/// An instance with copy-on-write has both kinds of disks: its local disk, which is over nothing, is one file.
#[test]
fn a_local_disk_passes_the_daemon_by_and_its_root_goes_on_as_an_overlay() {
    let mut mount = passing();
    let (root, local) = (open(&mount.disk()), open_with(&mount.local(), libc::O_DIRECT).unwrap());
    assert_eq!(read_at(&root, 0, 5000), image_bytes(0, 5000));
    root.write_all_at(b"of its own", 12_345).unwrap();
    let reads_and_writes = (requests(&mount, "READ"), requests(&mount, "WRITE"));
    assert!(reads_and_writes.0 > 0 && reads_and_writes.1 == 1, "{reads_and_writes:?}");
    let by = |name: &str| {
        let disks = status(&mount).disks;
        let disk = disks.into_iter().find(|disk| disk.name == name).unwrap();
        (disk.served_by, disk.not_kernel)
    };
    assert_eq!(by("web/disk.local"), ("kernel".to_owned(), None));
    let (served_by, why) = by("web/disk");
    assert!(served_by == "daemon" && why.as_ref().is_some_and(|why| why.contains("overlay")), "{why:?}");
    for round in 1..=2u8 {
        // A life of a second costs no wait after its end.
        std::thread::sleep(std::time::Duration::from_millis(1050));
        local.write_all_at(&Aligned::filled(4096, 9), 0).unwrap();
        while_nobody_serves(&mount, || {
            local.write_all_at(&Aligned::filled(4096, round), MIB).unwrap();
            let mut seen = Aligned::new(4096);
            local.read_exact_at(&mut seen, MIB).unwrap();
            assert!(seen.iter().all(|byte| *byte == round), "round {round}");
        });
        assert_eq!(read_at(&root, 12_345, 10), b"of its own");
        local.sync_all().unwrap();
        root.sync_all().unwrap();
    }
    assert_eq!(requests(&mount, "WRITE"), 1);
    drop((root, local));
    mount.remount();
    assert_eq!(read_at(&open(&mount.local()), MIB, 4096), [2; 4096]);
    assert_eq!(read_at(&open(&mount.disk()), 12_345, 10), b"of its own");
    // All that was asked of the disks that are closed.
    assert!(mount.store.check(&CheckRequest::default(), &NoProgress).unwrap().findings.is_empty());
    let status = mount.store.instance_status(&name("web")).unwrap();
    assert_eq!(status.disks.iter().map(|disk| disk.cow).collect::<Vec<_>>(), [true, false]);
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
    match mount.mount() {
        Ok(()) => assert!(status(&mount).passthrough.reason.unwrap().contains("CAP_SYS_ADMIN")),
        // Where others than root may not mount.
        Err(why) => assert!(why.contains("/dev/fuse"), "{why}"),
    }
}

/// Whoever opened such a disk waited for ever: the question was lost with the file that the keeper could not take.
#[test]
fn a_disk_is_served_by_the_daemon_while_its_keeper_may_open_no_more_files() {
    let mount = passing();
    let keeper = rustix::process::Pid::from_raw(mount.pid().try_into().unwrap());
    // No more in the end than any host allows, so that nobody forbids to give them back.
    let may_open = |current| {
        let limit = Rlimit { current: Some(current), maximum: Some(256) };
        rustix::process::prlimit(keeper, Resource::Nofile, limit).unwrap();
    };
    may_open(0);
    let disk = open(&local(&mount));
    disk.write_all_at(b"written", 4096).unwrap();
    assert_eq!(read_at(&disk, 4096, 7), b"written");
    let shown = only_disk(&mount);
    assert_eq!((shown.served_by.as_str(), requests(&mount, "WRITE")), ("daemon", 1));
    assert!(shown.not_kernel.unwrap().contains("its file has not come"));
    drop(disk);
    mount.wait_until("closed", || status(&mount).disks.is_empty());
    may_open(256);
    let disk = open(&local(&mount));
    assert_eq!(read_at(&disk, 4096, 7), b"written");
    assert_eq!(only_disk(&mount).served_by, "kernel");
}
