//! What POSIX asks of files that are there already: the expectations of pjdfstest's groups chmod, chown, utimensat, truncate,
//! open, posix_fallocate and errors, as far as they need no file to be made, which the mount refuses. pjdfstest itself begins
//! by making a folder, and so runs nothing.

use std::ffi::CString;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use crate::mount::{MIB, TestMount, errno, errno_of};

const OWNER: u32 = 4321;
const GROUP: u32 = 4322;
const OTHER: u32 = 65534;

/// A mounted store whose root disk belongs to [`OWNER`], and that he can reach.
fn owned() -> (TestMount, PathBuf) {
    let mount = TestMount::new();
    let folder = mount.mountpoint().parent().unwrap().to_owned();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    let disk = mount.disk();
    std::os::unix::fs::chown(&disk, Some(OWNER), Some(GROUP)).unwrap();
    (mount, disk)
}

/// Runs a command as a user, and returns what it complained about; nothing if it succeeded.
fn says(user: u32, program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .current_dir("/")
        .uid(user)
        .gid(if user == OWNER { GROUP } else { user })
        .output()
        .unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

fn assert_refused(said: Option<String>, reason: &str) {
    assert!(said.as_deref().is_some_and(|said| said.ends_with(reason)), "{said:?}, not {reason}");
}

fn changed(path: &Path) -> (i64, i64) {
    let metadata = path.metadata().unwrap();
    (metadata.ctime(), metadata.ctime_nsec())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn chmod_is_the_owners_and_roots() {
    let (_mount, disk) = owned();
    for mode in [0o000, 0o111, 0o640, 0o777] {
        let before = changed(&disk);
        std::fs::set_permissions(&disk, std::fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(disk.metadata().unwrap().mode() & 0o7777, mode);
        assert!(changed(&disk) >= before, "the time of change does not go back");
    }
    assert_eq!(says(OWNER, "chmod", &["600", text(&disk)]), None);
    let before = changed(&disk);
    assert_refused(says(OTHER, "chmod", &["666", text(&disk)]), "Operation not permitted");
    assert_eq!(disk.metadata().unwrap().mode() & 0o7777, 0o600);
    assert_eq!(changed(&disk), before, "a refused change is none");
}

#[test]
fn chown_is_roots_and_the_owner_may_give_it_to_a_group_of_his() {
    let (_mount, disk) = owned();
    let owner = || (disk.metadata().unwrap().uid(), disk.metadata().unwrap().gid());
    assert_refused(says(OWNER, "chown", &["65534", text(&disk)]), "Operation not permitted");
    assert_refused(says(OTHER, "chown", &["65534", text(&disk)]), "Operation not permitted");
    assert_refused(says(OWNER, "chgrp", &["65534", text(&disk)]), "Operation not permitted");
    assert_eq!(says(OWNER, "chgrp", &[&GROUP.to_string(), text(&disk)]), None);
    assert_eq!(owner(), (OWNER, GROUP));
    std::os::unix::fs::chown(&disk, None, Some(77)).unwrap();
    assert_eq!(owner(), (OWNER, 77), "what is not named stays");
    std::os::unix::fs::chown(&disk, Some(78), None).unwrap();
    assert_eq!(owner(), (78, 77));
}

#[test]
fn times_are_set_to_the_nanosecond_and_before_1970_and_after_2038_too() {
    let (_mount, disk) = owned();
    let set = |access: Timespec, modification: Timespec| {
        let times = Timestamps { last_access: access, last_modification: modification };
        rustix::fs::utimensat(CWD, &disk, &times, AtFlags::empty()).unwrap();
    };
    let at = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    for (second, nanosecond) in [(0, 0), (1_900_000_000, 123_456_789), (4_300_000_000, 1), (-86_400, 0)] {
        set(at(second, nanosecond), at(second + 1, nanosecond));
        let found = disk.metadata().unwrap();
        assert_eq!((found.atime(), found.atime_nsec()), (second, nanosecond));
        assert_eq!((found.mtime(), found.mtime_nsec()), (second + 1, nanosecond));
    }
    set(at(7, 0), at(0, UTIME_OMIT));
    assert_eq!((disk.metadata().unwrap().atime(), disk.metadata().unwrap().mtime()), (7, -86_399));
    set(at(0, UTIME_OMIT), at(0, UTIME_NOW));
    assert_eq!(disk.metadata().unwrap().atime(), 7);
    assert!(disk.metadata().unwrap().mtime() > 1_700_000_000, "now");
}

#[test]
fn times_are_the_owners_and_now_is_also_a_writers() {
    let (_mount, disk) = owned();
    std::fs::set_permissions(&disk, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(says(OWNER, "touch", &["-d", "@1000000000", text(&disk)]), None);
    assert_refused(says(OTHER, "touch", &["-c", text(&disk)]), "Permission denied");
    std::fs::set_permissions(&disk, std::fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(says(OTHER, "touch", &["-c", text(&disk)]), None);
    assert_refused(says(OTHER, "touch", &["-c", "-d", "@1", text(&disk)]), "Operation not permitted");
}

#[test]
fn opening_asks_for_the_permission_of_owner_group_or_others() {
    let (_mount, disk) = owned();
    // Who, which modes let him read, and which let him write.
    let cases = [(OWNER, 0o400, 0o200), (GROUP, 0o040, 0o020), (OTHER, 0o004, 0o002)];
    for mode in [0o000, 0o400, 0o200, 0o040, 0o020, 0o004, 0o002, 0o077, 0o707, 0o770, 0o777] {
        std::fs::set_permissions(&disk, std::fs::Permissions::from_mode(mode)).unwrap();
        for (user, reads, writes) in cases {
            for (permission, script) in [(reads, "exec 3<\"$0\""), (writes, "exec 3>>\"$0\"")] {
                let said = says(user, "sh", &["-c", script, text(&disk)]);
                assert_eq!(said.is_none(), mode & permission != 0, "{user} {mode:o} {script}: {said:?}");
            }
        }
    }
}

#[test]
fn opening_says_what_is_in_the_way() {
    let (mount, disk) = owned();
    let open = |path: &Path, flags| errno_of(rustix::fs::open(path, flags, Mode::RUSR));
    assert_eq!(open(&disk, OFlags::CREATE | OFlags::EXCL | OFlags::RDWR), libc::EEXIST);
    assert_eq!(open(&disk, OFlags::DIRECTORY | OFlags::RDONLY), libc::ENOTDIR);
    assert_eq!(open(&mount.path("instances"), OFlags::WRONLY), libc::EISDIR);
    assert_eq!(open(&disk.join("below"), OFlags::RDONLY), libc::ENOTDIR);
    assert_eq!(open(&mount.path(&"n".repeat(256)), OFlags::RDONLY), libc::ENAMETOOLONG);
    assert_eq!(open(&mount.path("nothing"), OFlags::RDONLY), libc::ENOENT);
    assert_eq!(open(&disk, OFlags::TRUNC | OFlags::RDWR), libc::EPERM, "disks never shrink");
    assert_eq!(disk.metadata().unwrap().size(), 8 * MIB);
    let existing =
        std::fs::OpenOptions::new().create(true).append(true).custom_flags(libc::O_NOFOLLOW).open(&disk);
    assert!(existing.is_ok(), "it is there already: {existing:?}");
}

#[test]
fn truncating_says_what_is_in_the_way() {
    let (mount, disk) = owned();
    let truncate = |path: &Path, len: i64| {
        let path = CString::new(text(path)).unwrap();
        // SAFETY: the path ends with a zero byte.
        #[allow(unsafe_code)]
        let result = unsafe { libc::truncate(path.as_ptr(), len) };
        if result == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap() }
    };
    assert_eq!(truncate(&disk, -1), libc::EINVAL);
    assert_eq!(truncate(&mount.path("instances"), 0), libc::EISDIR);
    assert_eq!(truncate(&disk.join("below"), 0), libc::ENOTDIR);
    assert_eq!(truncate(&mount.path("nothing"), 0), libc::ENOENT);
    assert_eq!(truncate(&disk, 0), libc::EPERM, "disks never shrink");
    assert_eq!(truncate(&disk, i64::MAX), libc::EFBIG);
    assert_refused(says(OTHER, "truncate", &["-c", "-s", "9M", text(&disk)]), "Permission denied");
    assert_eq!(disk.metadata().unwrap().size(), 8 * MIB);
    let before = disk.metadata().unwrap();
    assert_eq!(says(OWNER, "truncate", &["-s", "9M", text(&disk)]), None);
    let after = disk.metadata().unwrap();
    assert_eq!(after.size(), 9 * MIB);
    assert!((after.mtime(), after.mtime_nsec()) > (before.mtime(), before.mtime_nsec()));
}

#[test]
fn making_and_removing_say_what_is_in_the_way() {
    let (mount, disk) = owned();
    let instances = mount.path("instances");
    assert_eq!(errno(std::fs::create_dir(&instances)), libc::EEXIST);
    assert_eq!(errno(std::fs::create_dir(disk.join("below"))), libc::ENOTDIR);
    assert_eq!(errno(std::fs::create_dir(mount.path("nothing/below"))), libc::ENOENT);
    assert_eq!(errno(std::os::unix::fs::symlink("x", &disk)), libc::EEXIST);
    assert_eq!(errno(std::fs::hard_link(&disk, mount.local())), libc::EEXIST);
    assert_eq!(errno(std::fs::remove_file(mount.path("nothing"))), libc::ENOENT);
    assert_eq!(errno(std::fs::remove_dir(&disk)), libc::ENOTDIR);
    assert_eq!(errno(std::fs::remove_dir(disk.join("below"))), libc::ENOTDIR);
    let made = rustix::fs::mknodat(CWD, &disk, rustix::fs::FileType::Fifo, Mode::RUSR, 0);
    assert_eq!(errno_of(made), libc::EEXIST);
}
