//! Guests that write until nothing is left.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cowdisk::store::{DiskName, Store};
use rustix::fs::{FallocateFlags, fallocate};

use crate::host::{Kind, SmallHost};
use crate::mount::{Aligned, KIB, MIB, QUIET, TestMount, errno, errno_of, name, open, open_with};

const BLOCK: u64 = 4096;

/// A block that only filling up reaches.
const FAR: u64 = 16 * 1024;

/// A disk in the mount and what was acknowledged of it.
struct Written {
    file: File,
    /// What each block was filled with last.
    blocks: BTreeMap<u64, u8>,
}

impl Written {
    fn open(path: &Path, flags: i32) -> Self {
        Self { file: open_with(path, flags).unwrap(), blocks: BTreeMap::new() }
    }

    /// Fills `count` blocks from `block` on with `byte`.
    fn write(&mut self, block: u64, count: u64, byte: u8) -> Result<(), i32> {
        let bytes = Aligned::filled((count * BLOCK) as usize, byte);
        match self.file.write_all_at(&bytes, block * BLOCK) {
            Ok(()) => {
                self.blocks.extend((block..block + count).map(|block| (block, byte)));
                Ok(())
            }
            Err(error) => Err(error.raw_os_error().expect("an error of the system")),
        }
    }

    /// Writes runs of `count` blocks from `block` on, each `stride` from the last, until one fails, which must be for want
    /// of room; returns how many did not.
    fn fill(&mut self, block: u64, count: u64, stride: u64, byte: u8) -> u64 {
        let mut runs = 0;
        while self
            .write(block + runs * stride, count, byte)
            .inspect_err(|errno| assert_eq!(*errno, libc::ENOSPC))
            .is_ok()
        {
            runs += 1;
        }
        runs
    }

    /// Fills the host to its last block that may be had.
    fn fill_up(&mut self, byte: u8) {
        self.fill(FAR, 16, 16, byte);
        self.fill(2 * FAR, 1, 1, byte);
    }

    /// Lets go of the file, so that a dead mount can be taken away.
    fn close(&mut self) {
        self.file = File::open("/dev/null").unwrap();
    }

    fn check(&self, what: &str, read: impl Fn(u64, &mut [u8])) {
        let mut found = Aligned::new(BLOCK as usize);
        for (block, byte) in &self.blocks {
            read(block * BLOCK, &mut found);
            assert!(found.iter().all(|found| found == byte), "{what}: block {block} is not what was written");
        }
    }

    fn check_mounted(&self, what: &str) {
        self.check(what, |offset, bytes| self.file.read_exact_at(bytes, offset).unwrap());
    }
}

/// A store with the instances `web` and `other` on a host of that kind, their local disks, which are overlays, grown to 1 GiB.
fn mounted(kind: Kind, options: &str) -> (SmallHost, TestMount) {
    let host = SmallHost::new(kind);
    let mut mount = TestMount::unmounted_of_version_1(options, &host.path());
    mount.create("other");
    mount.create("idle");
    mount.mount().unwrap();
    for instance in ["web", "other"] {
        open(&mount.path(&format!("instances/{instance}/disk.local"))).set_len(1 << 30).unwrap();
    }
    (host, mount)
}

/// How often a daemon has warned that the host is nearly full.
fn warnings(mount: &TestMount) -> usize {
    mount.log().matches("WARN cowdisk::daemon::background: the host's filesystem is ").count()
}

fn full_host_refuses_new_blocks_only(kind: Kind) {
    let (host, mut mount) = mounted(kind, "flush=0,high_water=80");
    let other_path = mount.path("instances/other/disk.local");
    let mut other = Written::open(&other_path, 0);
    other.write(0, 256, 1).unwrap();
    other.file.sync_all().unwrap();
    let prepared = mount.path("instances/other/disk");
    fallocate(open(&prepared), FallocateFlags::empty(), 5 * MIB, MIB).unwrap();

    let mut web = Written::open(&mount.local(), libc::O_DIRECT);
    web.write(0, 2048, 2).unwrap();
    web.fill_up(2);
    web.file.sync_all().unwrap();
    let (left, reserve) = (host.available(), host.reserve());
    assert!(left.abs_diff(reserve) < MIB, "{left} are left, and {reserve} are to be kept");
    let ours = rustix::fs::statvfs(mount.mountpoint()).unwrap();
    assert!(ours.f_bavail * ours.f_frsize < MIB && ours.f_blocks > 0);

    // Everything that needs no new space goes on, for everybody.
    web.write(0, 64, 3).unwrap();
    other.write(16, 64, 4).unwrap();
    other.file.sync_all().unwrap();
    web.file.sync_all().unwrap();
    // Preallocated space needs none either, though nothing was ever written there.
    open(&prepared).write_all_at(&[5; 8192], 5 * MIB + 8192).unwrap();
    // What needs some is refused: whole blocks, parts of blocks over the image, preallocation, an untouched disk. (Writing
    // back has returned some of the space that the host had set aside for it.)
    web.fill_up(2);
    other.fill(4096, 1, 1, 9);
    assert_eq!(errno(open(&mount.disk()).write_all_at(&[9; 512], 512)), libc::ENOSPC);
    let reserved = fallocate(&other.file, FallocateFlags::empty(), 64 * MIB, 64 * MIB);
    assert_eq!(errno_of(reserved), libc::ENOSPC);
    let idle = open(&mount.path("instances/idle/disk"));
    assert_eq!(errno(idle.write_all_at(&[9; 4096], 0)), libc::ENOSPC);
    let mut seen = [0; 512];
    idle.read_exact_at(&mut seen, 512).unwrap();
    assert_eq!(seen[..], crate::mount::image_bytes(512, 512)[..]);
    drop(idle);
    web.check_mounted("full");
    mount.wait_until("a warning", || warnings(&mount) == 1);

    // The daemon dies; all that was answered is there.
    web.write(1, 4, 6).unwrap();
    mount.kill();
    web.close();
    other.close();
    mount.mount().unwrap();
    (web.file, other.file) = (open(&mount.local()), open(&other_path));
    web.check_mounted("after a kill");
    other.check_mounted("after a kill");
    mount.wait_until("the new daemon's warning", || warnings(&mount) == 2);

    // A discard makes room, and so do the removal of another instance and a larger filesystem.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&web.file, punch, 0, 4 * MIB).unwrap();
    web.blocks.retain(|block, _| *block >= 1024);
    web.file.sync_all().unwrap();
    web.check_mounted("after a discard");
    other.write(8192, 512, 7).unwrap();
    other.fill_up(8);
    drop(web);
    mount.wait_until_closed(DiskName::Local);
    mount.store.remove_instance(&name("web")).unwrap();
    // XFS gives the space of removed files back some time later.
    mount.wait_until("room", || host.available() > host.reserve() + 2 * MIB);
    other.write(8192 + 1024, 256, 9).unwrap();
    other.fill(9 * 1024, 64, 64, 10);
    host.make_room();
    other.write(60 * 1024, 256, 11).unwrap();
    other.file.sync_all().unwrap();
    mount.wait_until("the warning is taken back", || mount.log().contains("no longer nearly full"));
    assert_eq!(warnings(&mount), 2, "each daemon warns once");
    other.check_mounted("at the end");
    drop(other);
    mount.unmount().unwrap();
}

#[test]
fn a_full_ext4_refuses_new_blocks_only() {
    full_host_refuses_new_blocks_only(Kind::Ext4);
}

#[test]
fn a_full_xfs_refuses_new_blocks_only() {
    full_host_refuses_new_blocks_only(Kind::Xfs);
}

/// Somebody else fills the host to its last block, right through the reserve, before what was answered is flushed.
fn flush_succeeds_without_a_free_block(kind: Kind) {
    let (host, mut mount) = mounted(kind, QUIET);
    let mut web = Written::open(&mount.local(), 0);
    let mut other = Written::open(&mount.path("instances/other/disk.local"), 0);
    web.write(0, 1, 1).unwrap();
    other.write(0, 64, 1).unwrap();
    web.file.sync_all().unwrap();
    other.file.sync_all().unwrap();
    // Scattered, so that each block needs an extent of its own when the host writes it back.
    for run in 1..4096 {
        web.write(run * 3, 1, 2).unwrap();
    }
    let ballast = host.fill();
    assert!(host.available() < MIB, "{kind:?}: {} are left", host.available());
    web.file.sync_all().unwrap();
    for round in 0..100 {
        web.write(round * 3, 1, 3).unwrap();
        other.write(round % 64, 1, 4).unwrap();
        web.file.sync_all().unwrap();
        other.file.sync_all().unwrap();
    }
    let cut = host.after_power_cut();
    // XFS sets space aside for the extents of what is not written back yet, and has returned what it did not need.
    let more_ballast = host.fill();
    // Whoever asks how much is free has the daemon look anew.
    rustix::fs::statvfs(mount.mountpoint()).unwrap();
    assert_eq!(web.write(20_000, 1, 9), Err(libc::ENOSPC));

    // Opening a store needs a few blocks: where its live maps are is written down at each boot.
    std::fs::remove_file(cut.path().join(ballast.file_name().unwrap())).unwrap();
    let store = mount.store.dir().strip_prefix(host.path()).unwrap();
    let run = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Store::open(&cut.path().join(store)).unwrap().with_run_dir(run.path()).accepting_loss(true);
    for (written, instance) in [(&web, "web"), (&other, "other")] {
        let disk = store.open_disk(&name(instance), DiskName::Local).unwrap();
        written.check("after a power cut", |offset, bytes| disk.read_at(offset, bytes).unwrap());
    }
    drop(store);

    std::fs::remove_file(more_ballast).unwrap();
    std::fs::remove_file(ballast).unwrap();
    // XFS gives the space of removed files back some time later.
    mount.wait_until("room", || host.available() > host.reserve() + MIB);
    web.write(20_000, 16, 5).unwrap();
    web.file.sync_all().unwrap();
    web.check_mounted("with room again");
    drop((web, other));
    mount.unmount().unwrap();
}

#[test]
fn a_flush_succeeds_without_a_free_block_on_ext4() {
    flush_succeeds_without_a_free_block(Kind::Ext4);
}

#[test]
fn a_flush_succeeds_without_a_free_block_on_xfs() {
    flush_succeeds_without_a_free_block(Kind::Xfs);
}

/// A disk that is no overlay: where it has space only its file knows.
fn full_host_refuses_new_space_to_plain_disks_only(kind: Kind, flags: i32) {
    let host = SmallHost::new(kind);
    let mut mount = TestMount::unmounted(QUIET, &host.path());
    mount.mount().unwrap();
    let mut plain = Written::open(&mount.local(), flags);
    plain.file.set_len(1 << 30).unwrap();
    fallocate(&plain.file, FallocateFlags::empty(), 200 * MIB, MIB).unwrap();
    plain.write(0, 256, 1).unwrap();
    plain.fill_up(1);
    assert!(host.available() + MIB >= host.reserve(), "{} are left", host.available());
    plain.write(0, 256, 2).unwrap();
    plain.write(200 * MIB / BLOCK, 16, 3).unwrap();
    plain.fill(4096, 1, 1, 9);
    // Two sectors in blocks that are there, at an odd place.
    plain.file.write_all_at(&Aligned::filled(1024, 3), 200 * MIB + 3584).unwrap();
    plain.file.sync_all().unwrap();
    plain.check_mounted("full");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&plain.file, punch, 0, MIB).unwrap();
    plain.blocks.retain(|block, _| *block >= 256);
    plain.write(230 * MIB / BLOCK, 16, 4).unwrap();
    plain.check_mounted("with room again");
    drop(plain);
    mount.unmount().unwrap();
}

#[test]
fn a_full_ext4_refuses_new_space_to_plain_disks_only() {
    full_host_refuses_new_space_to_plain_disks_only(Kind::Ext4, 0);
}

#[test]
fn a_full_ext4_refuses_new_space_to_plain_disks_that_are_written_directly_only() {
    full_host_refuses_new_space_to_plain_disks_only(Kind::Ext4, libc::O_DIRECT);
}

#[test]
fn a_full_xfs_refuses_new_space_to_plain_disks_that_are_written_directly_only() {
    full_host_refuses_new_space_to_plain_disks_only(Kind::Xfs, libc::O_DIRECT);
}

#[test]
fn the_reserve_is_as_large_as_the_option_says_and_statfs_leaves_it_out() {
    let host = SmallHost::new(Kind::Ext4);
    let mut mount = TestMount::unmounted("flush=0,reserve=30M", &host.path());
    mount.mount().unwrap();
    let ours = rustix::fs::statvfs(mount.mountpoint()).unwrap();
    let theirs = rustix::fs::statvfs(host.path()).unwrap();
    assert_eq!(
        (ours.f_frsize, ours.f_bsize, ours.f_blocks),
        (theirs.f_frsize, theirs.f_frsize, theirs.f_blocks)
    );
    let (ours, theirs) = (ours.f_bavail * ours.f_frsize, theirs.f_bavail * theirs.f_frsize);
    assert!(ours.abs_diff(theirs - 30 * MIB) < 64 * KIB, "{ours} of {theirs}");
    let mut web = Written::open(&mount.local(), 0);
    web.file.set_len(256 * MIB).unwrap();
    web.fill_up(1);
    assert!((29 * MIB..31 * MIB).contains(&host.available()), "{} are left", host.available());
    drop(web);
    mount.unmount().unwrap();
}

/// The tmpfs of the live maps is full: that is an error to the writer, and no signal to the daemon.
#[test]
fn a_full_run_directory_fails_the_write_that_needs_it_and_nothing_else() {
    let mut mount = TestMount::unmounted_of_version_1(QUIET, &std::env::temp_dir());
    let run = mount.store.run_dir().unwrap();
    let tmpfs = |options: &str| {
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&run);
        assert!(command.status().unwrap().success(), "mounting a tmpfs needs root");
    };
    tmpfs("size=96K,mode=0700");
    struct Detach<'a>(&'a Path);
    impl Drop for Detach<'_> {
        fn drop(&mut self) {
            let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
        }
    }
    let _detach = Detach(&run);
    mount.mount().unwrap();
    let mut web = Written::open(&mount.local(), 0);
    web.file.set_len(1 << 40).unwrap();
    // Each page of the map describes 16,128 blocks.
    let pages = web.fill(0, 1, 16_128, 1);
    assert!((4..24).contains(&pages), "{pages} pages fitted");
    web.write(0, 64, 2).unwrap();
    web.file.sync_all().unwrap();
    assert_eq!(web.write(pages * 16_128, 1, 9), Err(libc::ENOSPC));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&web.file, punch, 32 * BLOCK, 8 * BLOCK).unwrap();
    web.blocks.retain(|block, _| !(32..40).contains(block));
    web.check_mounted("full");
    mount.kill();
    web.close();
    mount.mount().unwrap();
    web.file = open(&mount.local());
    web.check_mounted("after a kill");
    tmpfs("size=1M,remount");
    web.write(pages * 16_128, 64, 3).unwrap();
    web.file.sync_all().unwrap();
    web.check_mounted("with room again");
    drop(web);
    mount.unmount().unwrap();
}

/// On btrfs an overwrite needs room as well, and what waits to be written back does not count as used: the reserve is no
/// promise there. A flush may fail; then it says so, and what the flush before had covered is there.
#[test]
fn a_full_btrfs_keeps_what_was_flushed_before_it_was_full() {
    let (host, mut mount) = mounted(Kind::Btrfs, QUIET);
    let mut web = Written::open(&mount.local(), 0);
    web.write(0, 2048, 1).unwrap();
    web.file.sync_all().unwrap();
    let flushed = web.blocks.clone();
    web.fill_up(2);
    let flush = web.file.sync_all();
    if flush.is_err() {
        assert_eq!(web.write(0, 1, 3), Err(libc::EIO), "writes are refused after a failed flush");
        web.blocks = flushed;
    }
    web.check_mounted("full");
    mount.kill();
    web.close();
    // Without a single free block no daemon can start: it could not even write down who it is.
    host.make_room();
    mount.mount().unwrap();
    web.file = open(&mount.local());
    web.check_mounted("after a kill");
    web.write(60 * 1024, 256, 4).unwrap();
    web.file.sync_all().unwrap();
    web.check_mounted("with room again");
    drop(web);
    mount.unmount().unwrap();
}
