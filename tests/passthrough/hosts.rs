//! What the host's file system under a disk that the kernel serves can do, and cannot.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use super::host::{Kind, SmallHost};
use super::load::{number, status};
use super::mount::{MIB, errno, open, open_with, read_at};
use super::taking_over::replace_under_load;
use super::{assert_bytes_pass_the_daemon_by, host_file, local, only_disk, requests, with_copy_below};

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

/// As on ext4, on which all the other tests are where `/tmp` is.
#[test]
fn bytes_pass_the_daemon_by_on_xfs_too() {
    let host = SmallHost::on_direct_disk(Kind::Xfs);
    assert_bytes_pass_the_daemon_by(with_copy_below(&host.path(), "passthrough=auto"), Err(libc::EINVAL));
    replace_under_load(&host.path(), number("COWDISK_REPLACEMENTS", 3));
}

#[test]
fn bytes_pass_the_daemon_by_on_btrfs_too() {
    let host = SmallHost::on_direct_disk(Kind::Btrfs);
    // It takes what is not aligned through its cache, so that a hypervisor takes its blocks for larger than they are.
    assert_bytes_pass_the_daemon_by(with_copy_below(&host.path(), "passthrough=auto"), Ok(1));
    replace_under_load(&host.path(), number("COWDISK_REPLACEMENTS", 3));
}

#[test]
fn what_was_synced_survives_a_power_cut() {
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs] {
        assert_survives_power_cut(kind);
    }
}

fn assert_survives_power_cut(kind: Kind) {
    let host = SmallHost::new(kind);
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
