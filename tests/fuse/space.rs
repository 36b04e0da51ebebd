//! Size, space, holes, and what is durable when.

use std::os::unix::fs::{FileExt, MetadataExt};

use cowdisk::store::DiskName;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate};

use crate::mount::{IMAGE_BYTES, KIB, MIB, TestMount, errno, errno_of, image_bytes, open, open_with};

fn punch() -> FallocateFlags {
    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
}

#[test]
fn ftruncate_grows_a_disk_and_every_view_sees_it() {
    let mut mount = TestMount::new();
    let (file, other) = (open(&mount.disk()), open(&mount.disk()));
    file.set_len(12 * MIB).unwrap();
    assert_eq!(other.metadata().unwrap().size(), 12 * MIB);
    assert_eq!(rustix::fs::seek(&other, SeekFrom::End(0)).unwrap(), 12 * MIB);
    other.write_all_at(b"new", 12 * MIB - 3).unwrap();
    let mut seen = [1; 4096];
    file.read_exact_at(&mut seen, 12 * MIB - 8192).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0), "what is new reads as zeroes");
    drop((file, other));
    mount.remount();
    assert_eq!(std::fs::metadata(mount.disk()).unwrap().size(), 12 * MIB);
    let bytes = std::fs::read(mount.disk()).unwrap();
    assert_eq!(&bytes[bytes.len() - 3..], b"new");
}

#[test]
fn a_disk_grows_without_being_open() {
    let mount = TestMount::new();
    let status =
        std::process::Command::new("truncate").arg("-s").arg("9M").arg(mount.disk()).status().unwrap();
    assert!(status.success());
    assert_eq!(std::fs::metadata(mount.disk()).unwrap().size(), 9 * MIB);
}

#[test]
fn the_size_that_a_disk_has_is_accepted() {
    let mount = TestMount::new();
    open(&mount.disk()).set_len(8 * MIB).unwrap();
    assert!(std::fs::read(mount.disk()).unwrap()[..1000] == image_bytes(0, 1000));
}

#[test]
fn shrinking_is_refused_and_changes_nothing() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    file.write_all_at(b"kept", 8 * MIB - 4).unwrap();
    for size in [0, 1, 4096, 8 * MIB - 512, 8 * MIB - 1] {
        assert_eq!(errno(file.set_len(size)), libc::EPERM, "to {size}");
    }
    assert_eq!(errno(open_with(&mount.disk(), libc::O_TRUNC)), libc::EPERM);
    let bytes = std::fs::read(mount.disk()).unwrap();
    assert_eq!(bytes.len() as u64, 8 * MIB);
    assert_eq!(&bytes[bytes.len() - 4..], b"kept");
    assert!(bytes[..IMAGE_BYTES as usize] == image_bytes(0, IMAGE_BYTES));
}

#[test]
fn growing_to_an_impossible_size_is_refused_and_changes_nothing() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    assert_eq!(errno(file.set_len(8 * MIB + 1)), libc::EINVAL);
    assert_eq!(errno(file.set_len((16 << 40) + 512)), libc::EFBIG);
    assert_eq!(errno(file.set_len(i64::MAX as u64)), libc::EFBIG);
    assert_eq!(file.metadata().unwrap().size(), 8 * MIB);
}

#[test]
fn writes_beyond_the_end_are_refused_whole() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    for (offset, len) in [(8 * MIB, 1), (8 * MIB - 1, 2), (8 * MIB - 4096, 8192), (1 << 40, 512)] {
        assert_eq!(errno(file.write_at(&vec![0xee; len], offset)), libc::EFBIG, "{len} at {offset}");
    }
    let append = std::fs::File::options().append(true).open(mount.disk()).unwrap();
    assert_eq!(errno(std::io::Write::write(&mut &append, b"x")), libc::EFBIG);
    let bytes = std::fs::read(mount.disk()).unwrap();
    assert_eq!(bytes.len() as u64, 8 * MIB);
    assert!(bytes[IMAGE_BYTES as usize..].iter().all(|byte| *byte == 0));
}

#[test]
fn allocation_beyond_the_end_is_refused_and_changes_nothing() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    for mode in [FallocateFlags::empty(), FallocateFlags::KEEP_SIZE, punch(), FallocateFlags::ZERO_RANGE] {
        for (offset, len) in [(8 * MIB, 4096), (8 * MIB - 4096, 8192), (0, 9 * MIB)] {
            assert_eq!(
                errno_of(fallocate(&file, mode, offset, len)),
                libc::EFBIG,
                "{mode:?} {len} at {offset}"
            );
        }
    }
    let bytes = std::fs::read(mount.disk()).unwrap();
    assert_eq!(bytes.len() as u64, 8 * MIB);
    assert!(bytes[..IMAGE_BYTES as usize] == image_bytes(0, IMAGE_BYTES));
}

#[test]
fn punching_and_zeroing_at_any_alignment_leave_zeroes_and_nothing_else() {
    let zero = FallocateFlags::ZERO_RANGE;
    for mode in [punch(), zero, zero | FallocateFlags::KEEP_SIZE] {
        let mount = TestMount::new();
        let file = open(&mount.disk());
        let mut expected = std::fs::read(mount.disk()).unwrap();
        for (offset, len) in
            [(512, 512), (4096, 8192), (20_000, 1024), (100_001, 65_537), (MIB - 1, 2), (4 * MIB - 1, MIB)]
        {
            fallocate(&file, mode, offset, len).unwrap();
            expected[offset as usize..][..len as usize].fill(0);
        }
        assert!(std::fs::read(mount.disk()).unwrap() == expected, "{mode:?}");
    }
}

#[test]
fn other_modes_of_allocation_are_not_supported() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    for mode in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE, FallocateFlags::UNSHARE_RANGE]
    {
        assert_eq!(errno_of(fallocate(&file, mode, 0, 4096)), libc::EOPNOTSUPP, "{mode:?}");
    }
    fallocate(&file, punch(), 0, 4096).unwrap();
}

#[test]
fn the_space_that_a_disk_takes_rises_with_writing_and_falls_with_discarding() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    let taken = || std::fs::metadata(mount.disk()).unwrap().blocks() * 512;
    assert!(taken() < 64 * KIB, "a new disk takes {}", taken());
    file.write_all_at(&vec![0x3c; 4 * MIB as usize], 0).unwrap();
    file.sync_all().unwrap();
    assert!((4 * MIB..4 * MIB + 256 * KIB).contains(&taken()), "4 MiB written take {}", taken());
    fallocate(&file, punch(), MIB, 2 * MIB).unwrap();
    assert!((2 * MIB..2 * MIB + 256 * KIB).contains(&taken()), "half of it discarded leaves {}", taken());
    fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 4 * MIB).unwrap();
    assert!(taken() < 256 * KIB, "all of it zeroed leaves {}", taken());
}

#[test]
fn preallocated_space_is_taken_at_once_and_reads_as_before() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    fallocate(&file, FallocateFlags::empty(), 0, 8 * MIB).unwrap();
    assert!(file.metadata().unwrap().blocks() * 512 >= 8 * MIB);
    assert_eq!(file.metadata().unwrap().size(), 8 * MIB);
    assert!(std::fs::read(mount.disk()).unwrap()[..IMAGE_BYTES as usize] == image_bytes(0, IMAGE_BYTES));
}

#[test]
fn preallocated_space_is_given_back_by_discarding() {
    let mount = TestMount::new();
    for path in [mount.disk(), mount.local()] {
        let file = open(&path);
        fallocate(&file, FallocateFlags::empty(), 0, 8 * MIB).unwrap();
        fallocate(&file, punch(), 0, 8 * MIB).unwrap();
        let taken = file.metadata().unwrap().blocks() * 512;
        assert!(taken < 256 * KIB, "{} still takes {taken}", path.display());
    }
}

#[test]
fn holes_and_data_are_found() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    let seek = |from| rustix::fs::seek(&file, from);
    assert_eq!(seek(SeekFrom::Data(0)).unwrap(), 0);
    assert_eq!(seek(SeekFrom::Hole(0)).unwrap(), 2 * MIB, "the image's own hole");
    assert_eq!(seek(SeekFrom::Data(2 * MIB + 5)).unwrap(), 3 * MIB);
    assert_eq!(seek(SeekFrom::Hole(3 * MIB)).unwrap(), 4 * MIB, "past the image");
    assert_eq!(errno_of(seek(SeekFrom::Data(4 * MIB))), libc::ENXIO, "only a hole follows");
    file.write_all_at(&[1; 4096], 6 * MIB).unwrap();
    assert_eq!(seek(SeekFrom::Data(4 * MIB)).unwrap(), 6 * MIB);
    assert_eq!(seek(SeekFrom::Hole(6 * MIB)).unwrap(), 6 * MIB + 4096);
    fallocate(&file, punch(), 0, MIB).unwrap();
    assert_eq!(seek(SeekFrom::Data(0)).unwrap(), MIB, "a discarded part of the image is a hole");
    for whence in [SeekFrom::Data(8 * MIB), SeekFrom::Hole(8 * MIB), SeekFrom::Data(1 << 40)] {
        assert_eq!(errno_of(seek(whence)), libc::ENXIO, "{whence:?}");
    }
    assert_eq!(seek(SeekFrom::Hole(8 * MIB - 1)).unwrap(), 8 * MIB - 1);
    let image = std::fs::File::open(mount.path("images/base")).unwrap();
    assert_eq!(rustix::fs::seek(&image, SeekFrom::Hole(0)).unwrap(), 2 * MIB);
    assert_eq!(rustix::fs::seek(&image, SeekFrom::Data(2 * MIB)).unwrap(), 3 * MIB);
}

#[test]
fn statfs_shows_the_host_file_system() {
    let mount = TestMount::new();
    let (ours, host) =
        (rustix::fs::statvfs(mount.mountpoint()).unwrap(), rustix::fs::statvfs(mount.store.dir()).unwrap());
    assert_eq!((ours.f_frsize, ours.f_blocks, ours.f_files), (host.f_frsize, host.f_blocks, host.f_files));
    assert!(ours.f_bavail > 0 && ours.f_bfree.abs_diff(host.f_bfree) < 1 << 20);
    assert_eq!(ours.f_namemax, 255);
}

/// What of the map is on the host's disk.
fn durable_map(mount: &TestMount) -> Vec<u8> {
    std::fs::read(mount.host_file("disk.map")).unwrap()
}

#[test]
fn fsync_makes_the_map_durable_and_a_plain_write_does_not() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    // The first write to a part of the disk reserves room in the map; those after it do not.
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.sync_data().unwrap();
    let before = durable_map(&mount);
    file.write_all_at(&[1; 4096], 8192).unwrap();
    assert!(durable_map(&mount) == before);
    file.sync_data().unwrap();
    let after_data = durable_map(&mount);
    assert!(after_data != before);
    file.write_all_at(&[1; 4096], MIB).unwrap();
    file.sync_all().unwrap();
    assert!(durable_map(&mount) != after_data);
}

#[test]
fn a_synchronous_write_is_durable_when_it_returns() {
    let mount = TestMount::new();
    for (number, flags) in
        [libc::O_DSYNC, libc::O_SYNC, libc::O_DSYNC | libc::O_DIRECT].into_iter().enumerate()
    {
        let file = open_with(&mount.disk(), flags).unwrap();
        let before = durable_map(&mount);
        let data = crate::mount::Aligned::filled(4096, 1);
        file.write_all_at(&data, number as u64 * MIB).unwrap();
        assert!(durable_map(&mount) != before, "open flags {flags:#x}");
    }
}

/// As QEMU 10 writes what a guest wants through the cache (FUA).
#[test]
fn a_write_that_asks_by_itself_is_durable_when_it_returns() {
    let mount = TestMount::new();
    let data = crate::mount::Aligned::filled(4096, 1);
    for (number, open_flags) in [0, libc::O_DIRECT].into_iter().enumerate() {
        let file = open_with(&mount.disk(), open_flags).unwrap();
        let before = durable_map(&mount);
        let (data, offset) = ([std::io::IoSlice::new(&data)], number as u64 * MIB);
        rustix::io::pwritev2(&file, &data, offset, rustix::io::ReadWriteFlags::DSYNC).unwrap();
        assert!(durable_map(&mount) != before, "open flags {open_flags:#x}");
    }
}

#[test]
fn what_nobody_syncs_is_durable_some_seconds_later() {
    let mount = TestMount::with_options("flush=1");
    let file = open(&mount.disk());
    file.write_all_at(&[1; 4096], 0).unwrap();
    let before = durable_map(&mount);
    mount.wait_until("flush in the background", || durable_map(&mount) != before);
}

#[test]
fn the_last_close_makes_a_disk_durable_and_leaves_no_live_map() {
    let mount = TestMount::new();
    open(&mount.disk()).write_all_at(&[0xab; 4096], 4096).unwrap();
    mount.wait_until_closed(DiskName::Root);
    let disk = mount.store.open_disk(&crate::mount::name("web"), DiskName::Root).unwrap();
    let mut seen = [0; 4096];
    disk.read_at(4096, &mut seen).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0xab));
}

#[test]
fn a_full_host_is_a_full_disk_until_there_is_room_again() {
    // A file system of its own that is small enough to fill.
    let small = tempfile::tempdir().unwrap();
    let tmpfs = |size: &str, extra: &str| {
        let options = format!("size={size}{extra}");
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(small.path());
        assert!(command.status().unwrap().success(), "mounting a tmpfs needs root");
    };
    tmpfs("24M", "");
    struct Detach<'a>(&'a std::path::Path);
    impl Drop for Detach<'_> {
        fn drop(&mut self) {
            let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
        }
    }
    let _detach = Detach(small.path());
    let mut mount = TestMount::unmounted(crate::mount::QUIET, small.path());
    mount.mount().unwrap();
    let file = open(&mount.local());
    file.set_len(64 * MIB).unwrap();
    let block = vec![0x42; 64 * KIB as usize];
    let mut written = 0;
    let error = loop {
        match file.write_at(&block, written) {
            Ok(len) => written += len as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!(written >= 4 * MIB, "only {written} bytes fitted");
    tmpfs("96M", ",remount");
    file.write_all_at(&block, written).unwrap();
    file.sync_all().unwrap();
    let bytes = std::fs::read(mount.local()).unwrap();
    assert!(bytes[..written as usize + block.len()].iter().all(|byte| *byte == 0x42));
    drop(file);
    mount.unmount().unwrap();
}
