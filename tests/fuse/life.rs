//! Mounting, instances that come and go, locks, crashes, and the end.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::Duration;

use cowdisk::ErrorKind;
use cowdisk::daemon;
use cowdisk::store::DiskName;
use rustix::process::Signal;

use crate::mount::{MIB, QUIET, TestMount, errno, image_bytes, name, open, text_of};

#[test]
fn an_instance_that_is_made_while_mounted_is_seen_at_once() {
    let mount = TestMount::new();
    assert!(!mount.path("instances/late").exists());
    mount.create("late");
    let bytes = std::fs::read(mount.path("instances/late/disk")).unwrap();
    assert!(bytes[..1000] == image_bytes(0, 1000));
    assert_eq!(std::fs::read_dir(mount.path("instances")).unwrap().count(), 2);
}

#[test]
fn an_instance_that_is_removed_while_mounted_is_gone_at_once() {
    let mount = TestMount::new();
    mount.create("gone");
    assert_eq!(std::fs::metadata(mount.path("instances/gone/disk")).unwrap().size(), 8 * MIB);
    mount.store.remove_instance(&name("gone")).unwrap();
    assert_eq!(errno(std::fs::metadata(mount.path("instances/gone/disk"))), libc::ENOENT);
    assert_eq!(errno(std::fs::metadata(mount.path("instances/gone"))), libc::ENOENT);
    assert_eq!(std::fs::read_dir(mount.path("instances")).unwrap().count(), 1);
}

/// One damaged record failed the listing of all images.
#[test]
fn an_image_with_a_damaged_record_hides_no_other() {
    let mount = TestMount::new();
    let path = mount.store.dir().join("images/damaged.json");
    std::io::Write::write_all(&mut std::fs::File::create(path).unwrap(), b"{").unwrap();
    let names: Vec<_> =
        std::fs::read_dir(mount.path("images")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["base"]);
}

#[test]
fn an_instance_made_anew_under_an_old_name_is_another_one() {
    let mount = TestMount::new();
    mount.create("again");
    let path = mount.path("instances/again/disk");
    open(&path).write_all_at(b"of the first", 0).unwrap();
    let first = std::fs::metadata(&path).unwrap().ino();
    let folder = std::fs::File::open(mount.path("instances/again")).unwrap();
    mount.store.remove_instance(&name("again")).unwrap();
    mount.create("again");
    assert_ne!(std::fs::metadata(&path).unwrap().ino(), first);
    assert!(std::fs::read(&path).unwrap()[..1000] == image_bytes(0, 1000));
    let through_old =
        rustix::fs::openat(&folder, "disk", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
    assert!(through_old.is_err(), "the folder of the first leads nowhere");
}

#[test]
fn an_open_disk_cannot_be_removed_and_a_closed_one_can() {
    let mount = TestMount::new();
    let file = std::fs::File::open(mount.disk()).unwrap();
    assert_eq!(mount.store.remove_instance(&name("web")).unwrap_err().kind(), ErrorKind::Busy);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    drop(file);
    mount.store.remove_instance(&name("web")).unwrap();
}

#[test]
fn an_open_disk_cannot_be_opened_a_second_time_beside_the_mount() {
    let mount = TestMount::new();
    let _file = open(&mount.disk());
    let error = mount.store.open_disk(&name("web"), DiskName::Root).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
}

#[test]
fn a_second_daemon_on_the_store_is_refused_and_told_of_the_first() {
    let mount = TestMount::new();
    let other = tempfile::tempdir().unwrap();
    let said = mount.start(other.path(), QUIET).unwrap_err();
    assert!(said.contains(&mount.pid().to_string()), "{said}");
    assert!(said.contains(mount.mountpoint().to_str().unwrap()), "{said}");
    assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 0);
    assert!(std::fs::metadata(mount.disk()).is_ok());
}

#[test]
fn a_mountpoint_in_use_is_refused() {
    let mut first = TestMount::new();
    let second = TestMount::unmounted(QUIET, &std::env::temp_dir());
    let said = second.start(&first.mountpoint(), QUIET).unwrap_err();
    assert!(said.contains("is mounted there"), "{said}");
    first.unmount().unwrap();
    std::fs::File::create(first.path("file")).unwrap();
    let said = second.start(&first.mountpoint(), QUIET).unwrap_err();
    assert!(said.contains("not empty"), "{said}");
}

#[test]
fn every_write_that_was_answered_survives_a_killed_daemon() {
    let mut mount = TestMount::new();
    let file = open(&mount.disk());
    let local = open(&mount.local());
    for block in 0..200u64 {
        file.write_all_at(&[u8::try_from(block).unwrap() | 1; 3000], block * 5000).unwrap();
        local.write_all_at(&[0x99; 4096], block * 8192).unwrap();
    }
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 3 * MIB, 4096).unwrap();
    mount.kill();
    drop((file, local));
    mount.mount().unwrap();
    let mut expected = image_bytes(0, 4 * MIB);
    expected.resize(8 * MIB as usize, 0);
    for block in 0..200u64 {
        expected[block as usize * 5000..][..3000].fill(u8::try_from(block).unwrap() | 1);
    }
    expected[3 * MIB as usize..][..4096].fill(0);
    assert!(std::fs::read(mount.disk()).unwrap() == expected);
    let bytes = std::fs::read(mount.local()).unwrap();
    assert!((0..200).all(|block| bytes[block * 8192..][..4096].iter().all(|byte| *byte == 0x99)));
}

#[test]
fn a_dead_mount_is_taken_away_by_the_next_mount() {
    let mut mount = TestMount::new();
    mount.kill();
    // A ring outlives its process for a moment: who asks just then has his request cut off or taken back.
    let refused = errno(std::fs::metadata(mount.disk()));
    assert!([libc::ENOTCONN, libc::ECONNABORTED, libc::ECANCELED].contains(&refused), "{refused}");
    mount.mount().unwrap();
    assert!(std::fs::metadata(mount.disk()).is_ok());
    mount.unmount().unwrap();
    assert_eq!(std::fs::read_dir(mount.mountpoint()).unwrap().count(), 0, "no mount is left below");
}

#[test]
fn a_dead_mount_in_use_is_refused_with_who_uses_it() {
    let mut mount = TestMount::new();
    let file = open(&mount.disk());
    mount.kill();
    let said = mount.start(&mount.mountpoint(), QUIET).unwrap_err();
    assert!(said.contains("dead") && said.contains(&format!("process {}", std::process::id())), "{said}");
    assert!(said.contains("umount --lazy"), "{said}");
    drop(file);
    mount.mount().unwrap();
}

#[test]
fn unmounting_a_dead_mount_just_takes_it_away() {
    let mut mount = TestMount::new();
    mount.kill();
    daemon::unmount(&mount.mountpoint()).unwrap();
    assert_eq!(std::fs::read_dir(mount.mountpoint()).unwrap().count(), 0);
}

#[test]
fn unmounting_names_who_holds_a_disk_open_and_changes_nothing() {
    let mut mount = TestMount::new();
    let file = open(&mount.disk());
    let error = daemon::unmount(&mount.mountpoint()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let text = text_of(&error);
    assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
    assert!(text.contains(mount.disk().to_str().unwrap()), "{text}");
    file.write_all_at(b"still served", 0).unwrap();
    drop(file);
    mount.unmount().unwrap();
}

#[test]
fn unmounting_by_the_store_works_as_well() {
    let mut mount = TestMount::new();
    daemon::unmount(mount.store.dir()).unwrap();
    assert!(mount.ends_within(Duration::from_secs(20)).unwrap().success());
    let error = daemon::unmount(mount.store.dir()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn unmounting_returns_when_every_disk_is_durable_and_closed() {
    let mut mount = TestMount::new();
    open(&mount.disk()).write_all_at(&[0x31; 100_000], 1000).unwrap();
    mount.unmount().unwrap();
    let disk = mount.store.open_disk(&name("web"), DiskName::Root).unwrap();
    let mut seen = vec![0; 100_000];
    disk.read_at(1000, &mut seen).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0x31));
    disk.close().unwrap();
}

/// The lock is given up before the process ends; whoever unmounted the host's filesystem next found it busy at times.
#[test]
fn the_daemon_is_gone_when_unmounting_returns() {
    let mut mount = TestMount::new();
    for _ in 0..20 {
        open(&mount.disk()).write_all_at(b"x", 0).unwrap();
        daemon::unmount(&mount.mountpoint()).unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", mount.pid())).unwrap();
        assert!(stat.contains(") Z "), "it has ended, and only its parent has not looked yet: {stat}");
        mount.ends_within(Duration::from_secs(60)).unwrap();
        mount.mount().unwrap();
    }
}

#[test]
fn umount_8_ends_the_daemon_in_order() {
    let mut mount = TestMount::new();
    open(&mount.disk()).write_all_at(&[0x31; 100_000], 1000).unwrap();
    assert!(std::process::Command::new("umount").arg(mount.mountpoint()).status().unwrap().success());
    assert!(mount.ends_within(Duration::from_secs(20)).unwrap().success());
    mount.mount().unwrap();
    assert_eq!(std::fs::read(mount.disk()).unwrap()[1000], 0x31);
}

#[test]
fn a_signal_ends_an_idle_daemon_in_order() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut mount = TestMount::new();
        open(&mount.disk()).write_all_at(&[0x31; 4096], 0).unwrap();
        mount.signal(signal);
        let status = mount.ends_within(Duration::from_secs(20)).expect("it ends");
        assert!(status.success(), "{signal:?}: {status}");
        assert_eq!(std::fs::read_dir(mount.mountpoint()).unwrap().count(), 0);
        mount.mount().unwrap();
        assert_eq!(std::fs::read(mount.disk()).unwrap()[0], 0x31);
    }
}

#[test]
fn a_signal_never_pulls_a_disk_from_under_its_user() {
    let mut mount = TestMount::new();
    let file = open(&mount.disk());
    mount.signal(Signal::TERM);
    assert!(mount.ends_within(Duration::from_millis(1500)).is_none(), "in use, so it stays");
    file.write_all_at(b"still served", 0).unwrap();
    assert!(mount.log().contains("is in use"), "the log says why it stays");
    drop(file);
    assert!(mount.ends_within(Duration::from_secs(20)).expect("idle now, so it ends").success());
}

#[test]
fn a_lazy_unmount_keeps_the_disk_for_its_user_and_then_ends_the_daemon() {
    let mut mount = TestMount::new();
    let file = open(&mount.disk());
    rustix::mount::unmount(mount.mountpoint(), rustix::mount::UnmountFlags::DETACH).unwrap();
    file.write_all_at(b"still served", 0).unwrap();
    mount.signal(Signal::TERM);
    assert!(mount.ends_within(Duration::from_millis(1000)).is_none());
    file.write_all_at(b"still served", 0).unwrap();
    drop(file);
    assert!(mount.ends_within(Duration::from_secs(20)).expect("idle now, so it ends").success());
}

#[test]
fn a_lock_that_two_open_files_want_goes_to_one_of_them() {
    use rustix::fs::{FlockOperation, flock};
    let mount = TestMount::new();
    let (first, second) = (open(&mount.disk()), open(&mount.disk()));
    flock(&first, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(flock(&second, FlockOperation::NonBlockingLockExclusive).is_err());
    drop(first);
    flock(&second, FlockOperation::NonBlockingLockExclusive).unwrap();
}

/// Takes byte 100 of a file as QEMU does, by a lock of the open file description.
#[allow(unsafe_code)]
fn lock_byte_100(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap(),
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: F_OFD_SETLK reads one struct flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[test]
fn qemus_locks_of_two_open_files_conflict() {
    let mount = TestMount::new();
    let (first, second) = (open(&mount.disk()), open(&mount.disk()));
    lock_byte_100(&first).unwrap();
    assert_eq!(errno(lock_byte_100(&second)), libc::EAGAIN);
    drop(first);
    lock_byte_100(&second).unwrap();
}

#[test]
fn many_files_are_opened_and_closed_at_the_same_time() {
    let mount = TestMount::new();
    std::thread::scope(|scope| {
        for thread in 0..16u64 {
            let mount = &mount;
            scope.spawn(move || {
                for round in 0..30u64 {
                    let file = open(&if thread % 2 == 0 { mount.disk() } else { mount.local() });
                    let offset = thread * 65_536 + round * 512;
                    file.write_all_at(&[u8::try_from(thread + 1).unwrap(); 512], offset).unwrap();
                    drop(file);
                    let mut seen = [0; 512];
                    open(&if thread % 2 == 0 { mount.disk() } else { mount.local() })
                        .read_exact_at(&mut seen, offset)
                        .unwrap();
                    assert!(seen.iter().all(|byte| u64::from(*byte) == thread + 1));
                }
            });
        }
    });
}

#[test]
fn a_failed_request_is_logged_once_with_what_it_was() {
    let mount = TestMount::new();
    // A map that is no map.
    std::fs::File::options()
        .write(true)
        .open(mount.host_file("disk.map"))
        .unwrap()
        .write_all_at(&[0xff; 65_536], 0)
        .unwrap();
    let before = mount.log().len();
    assert!(std::fs::File::open(mount.local()).is_ok(), "the other disk is well");
    assert_eq!(errno(std::fs::metadata(mount.disk())), libc::EIO);
    let log = mount.log()[before..].to_owned();
    let warnings: Vec<_> =
        log.lines().filter(|line| line.starts_with("WARN") || line.starts_with("ERROR")).collect();
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    assert!(warnings[0].contains("lookup inode 0x") && warnings[0].contains("web"), "{warnings:?}");
}

/// A process in a mount namespace of its own, which keeps the mounts that it saw at its start; ended when dropped.
struct OtherNamespace(std::process::Child);

impl OtherNamespace {
    fn run(script: &str) -> Self {
        let mut child = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg(format!("{script}; echo there; exec sleep 1000"))
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut word = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut word).unwrap();
        Self(child)
    }
}

impl Drop for OtherNamespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_mount_that_lives_on_unused_in_another_namespace_does_not_keep_the_daemon() {
    let mut mount = TestMount::new();
    open(&mount.disk()).write_all_at(&[0x31; 4096], 0).unwrap();
    let _other = OtherNamespace::run("true");
    mount.unmount().unwrap();
    mount.mount().unwrap();
    assert_eq!(std::fs::read(mount.disk()).unwrap()[0], 0x31);
}

#[test]
fn unmounting_names_who_holds_a_disk_in_another_namespace() {
    let mut mount = TestMount::new();
    let other = OtherNamespace::run(&format!("exec 3< {}", mount.disk().display()));
    let error = daemon::unmount(&mount.mountpoint()).unwrap_err();
    let text = text_of(&error);
    assert_eq!(error.kind(), ErrorKind::Busy, "{text}");
    assert!(text.contains(&format!("process {}", other.0.id())), "{text}");
    assert!(std::fs::metadata(mount.disk()).is_ok(), "nothing was changed");
    drop(other);
    mount.unmount().unwrap();
}

/// Lets everyone use FUSE, as distributions do, and takes that back when dropped.
struct FuseForAll(std::fs::Permissions);

impl FuseForAll {
    const DEVICE: &str = "/dev/fuse";

    fn allow() -> Self {
        let before = std::fs::metadata(Self::DEVICE).unwrap().permissions();
        std::fs::set_permissions(Self::DEVICE, std::fs::Permissions::from_mode(0o666)).unwrap();
        Self(before)
    }
}

impl Drop for FuseForAll {
    fn drop(&mut self) {
        std::fs::set_permissions(Self::DEVICE, self.0.clone()).unwrap();
    }
}

#[test]
fn a_user_without_privilege_mounts_and_unmounts_a_store_of_his_own() {
    let _fuse = FuseForAll::allow();
    let mut mount = TestMount::unmounted(QUIET, &std::env::temp_dir());
    mount.give_to(65534);
    mount.mount().unwrap();
    let mountpoint = mount.mountpoint();
    let disk = format!("{}/instances/web/disk", mountpoint.display());
    let script = format!(
        "printf hello | dd of={disk} conv=notrunc bs=5 seek=1000 && tail -c +5001 {disk} | head -c 5"
    );
    let output = mount.shell(&script);
    assert_eq!(output.stdout, b"hello", "{output:?}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.contains(mountpoint.to_str().unwrap())).unwrap();
    for option in ["fuse.cowdisk", "nosuid", "nodev", "noexec", "default_permissions", "user_id=65534"] {
        assert!(line.contains(option), "{option} is missing in {line}");
    }
    assert!(!line.contains("allow_other"), "{line}");
    // A terminal's Ctrl-C would end the shell that is to unmount, too, if it were of the daemon's group.
    let pid = mount.pid();
    let children: String = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|thread| std::fs::read_to_string(thread.unwrap().path().join("children")).unwrap())
        .collect();
    let group = |pid: &str| {
        let pid = rustix::process::Pid::from_raw(pid.parse().unwrap());
        rustix::process::getpgid(pid).unwrap()
    };
    let own = group(&pid.to_string());
    let shells = children.split_whitespace().filter(|child| group(child) != own).count();
    assert_eq!(shells, 1, "the shell that unmounts");
    mount.signal(Signal::TERM);
    assert!(mount.ends_within(Duration::from_secs(20)).expect("it ends").success());
    assert_eq!(std::fs::read_dir(&mountpoint).unwrap().count(), 0);
}
