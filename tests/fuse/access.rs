//! The tree, and who may do what in it.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use rustix::fs::XattrFlags;

use crate::mount::{TestMount, errno, errno_of, name, open, open_with};

/// A user who is neither root nor ours.
const NOBODY: u32 = 65534;

fn names(path: &Path) -> BTreeSet<String> {
    std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn the_tree_shows_images_boot_files_and_instances() {
    let mount = TestMount::new();
    assert_eq!(names(&mount.mountpoint()), set(&["images", "boot", "instances"]));
    assert_eq!(names(&mount.path("images")), set(&["base"]));
    assert_eq!(names(&mount.path("instances")), set(&["web"]));
    assert_eq!(names(&mount.path("instances/web")), set(&["disk", "disk.local"]));
    assert_eq!(std::fs::metadata(mount.disk()).unwrap().size(), 8 << 20);
    assert_eq!(std::fs::metadata(mount.local()).unwrap().size(), 16 << 20);
}

#[test]
fn names_that_are_not_there_are_not_found() {
    let mount = TestMount::new();
    let long = "a".repeat(200);
    let missing = [
        "x",
        "images/x",
        "boot/x",
        "instances/x",
        "instances/web/x",
        "instances/web/kernel",
        "instances/web/disk/x",
    ];
    for path in missing.into_iter().chain([long.as_str(), "instances/.hidden", "instances/a b"]) {
        let errno = errno(std::fs::metadata(mount.path(path)));
        assert!(
            errno == libc::ENOENT || (path.ends_with("disk/x") && errno == libc::ENOTDIR),
            "{path}: {errno}"
        );
    }
}

#[test]
fn an_image_with_a_kernel_gives_its_instances_links_to_it() {
    use cowdisk::store::{ImportRequest, NoProgress, SourceFormat};
    let mount = TestMount::new();
    let file = |name: &str, bytes: &[u8]| {
        let path = mount.store.dir().parent().unwrap().join(name);
        std::io::Write::write_all(&mut std::fs::File::create(&path).unwrap(), bytes).unwrap();
        path
    };
    let request = ImportRequest {
        source: file("raw", &[1; 8192]),
        format: Some(SourceFormat::Raw),
        kernel: Some(file("vmlinuz", b"a kernel")),
        ramdisk: Some(file("initrd", b"a ramdisk")),
    };
    mount.store.import_image(&name("bootable"), &request, &NoProgress).unwrap();
    let spec = cowdisk::store::InstanceSpec::of(name("bootable"));
    mount.store.create_instance(&name("guest"), &spec, &NoProgress).unwrap();
    assert_eq!(names(&mount.path("instances/guest")), set(&["disk", "kernel", "ramdisk"]));
    assert_eq!(std::fs::read(mount.path("instances/guest/kernel")).unwrap(), b"a kernel");
    assert_eq!(std::fs::read(mount.path("instances/guest/ramdisk")).unwrap(), b"a ramdisk");
    let link = std::fs::read_link(mount.path("instances/guest/kernel")).unwrap();
    assert!(link.starts_with("../../boot"), "{}", link.display());
    assert_eq!(names(&mount.path("boot")).len(), 2);
    let kernel = mount.path("instances/guest/kernel");
    assert_eq!(errno(open_with(&kernel, 0)), libc::EROFS);
    rustix::fs::chown(&kernel, Some(rustix::fs::Uid::from_raw(1234)), None).unwrap();
    assert_eq!(std::fs::metadata(&kernel).unwrap().uid(), 1234, "libvirt changes the owner of kernels");
}

#[test]
fn directories_are_open_to_all_and_files_are_private() {
    let mount = TestMount::new();
    let mode = |path: &str| std::fs::metadata(mount.path(path)).unwrap().permissions().mode();
    for path in ["", "images", "boot", "instances", "instances/web"] {
        assert_eq!(mode(path), 0o40755, "{path}");
    }
    assert_eq!(mode("instances/web/disk"), 0o100_600);
    assert_eq!(mode("instances/web/disk.local"), 0o100_600);
    assert_eq!(mode("images/base"), 0o100_400);
}

#[test]
fn the_mount_is_nosuid_nodev_noexec_and_says_what_it_is() {
    let mount = TestMount::new();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.contains(mount.mountpoint().to_str().unwrap())).unwrap();
    let fields: Vec<_> = line.split(' ').collect();
    assert_eq!(fields[0], mount.store.dir().canonicalize().unwrap().to_str().unwrap());
    assert_eq!(fields[2], "fuse.cowdisk");
    for option in ["nosuid", "nodev", "noexec", "default_permissions", "allow_other"] {
        assert!(fields[3].split(',').any(|have| have == option), "{option} is missing in {}", fields[3]);
    }
}

#[test]
fn other_users_need_the_files_permission() {
    let mount = TestMount::new();
    for parent in mount.mountpoint().ancestors().skip(1).take(1) {
        std::fs::set_permissions(parent, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let reads =
        || Command::new("head").arg("-c1").arg(mount.disk()).uid(NOBODY).gid(NOBODY).output().unwrap();
    assert!(!reads().status.success(), "0600 of root");
    std::os::unix::fs::chown(mount.disk(), Some(NOBODY), None).unwrap();
    assert!(reads().status.success(), "{:?}", reads());
    std::fs::set_permissions(mount.disk(), std::fs::Permissions::from_mode(0o200)).unwrap();
    assert!(!reads().status.success(), "0200 of its own");
}

#[test]
fn owner_mode_and_times_survive_a_remount() {
    let mut mount = TestMount::new();
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    for path in ["instances/web/disk", "instances/web/disk.local", "images/base"] {
        std::os::unix::fs::chown(mount.path(path), Some(64055), Some(108)).unwrap();
        std::fs::set_permissions(mount.path(path), std::fs::Permissions::from_mode(0o640)).unwrap();
    }
    let times = std::fs::FileTimes::new().set_modified(time).set_accessed(time);
    open(&mount.disk()).set_times(times).unwrap();
    for remounted in [false, true] {
        if remounted {
            mount.remount();
        }
        for path in ["instances/web/disk", "instances/web/disk.local", "images/base"] {
            let metadata = std::fs::metadata(mount.path(path)).unwrap();
            let owner = (metadata.uid(), metadata.gid(), metadata.mode());
            assert_eq!(owner, (64055, 108, 0o100_640), "{path} remounted: {remounted}");
        }
        assert_eq!(std::fs::metadata(mount.disk()).unwrap().modified().unwrap(), time);
    }
}

#[test]
fn writing_changes_the_time_of_modification() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    assert!(
        file.metadata().unwrap().modified().unwrap() > SystemTime::UNIX_EPOCH + Duration::from_secs(1000)
    );
}

#[test]
fn set_user_id_bits_are_dropped() {
    let mount = TestMount::new();
    std::fs::set_permissions(mount.disk(), std::fs::Permissions::from_mode(0o7755)).unwrap();
    assert_eq!(std::fs::metadata(mount.disk()).unwrap().permissions().mode(), 0o100_755);
}

#[test]
fn extended_attributes_survive_a_remount() {
    let mut mount = TestMount::new();
    let value: Vec<u8> = (0..=255).collect();
    for path in [mount.disk(), mount.local(), mount.path("images/base")] {
        rustix::fs::setxattr(&path, "trusted.libvirt.security.dac", b"+0:+0", XattrFlags::CREATE).unwrap();
        rustix::fs::setxattr(&path, "user.note", &value, XattrFlags::empty()).unwrap();
        rustix::fs::setxattr(&path, "security.selinux", b"system_u", XattrFlags::empty()).unwrap();
    }
    mount.remount();
    for path in [mount.disk(), mount.local(), mount.path("images/base")] {
        let get = |name: &str| {
            let mut buffer = vec![0; 1000];
            let len = rustix::fs::getxattr(&path, name, &mut buffer[..]).unwrap();
            buffer.truncate(len);
            buffer
        };
        assert_eq!(get("trusted.libvirt.security.dac"), b"+0:+0");
        assert_eq!(get("user.note"), value);
        assert_eq!(get("security.selinux"), b"system_u");
        let mut list = vec![0; 1000];
        let len = rustix::fs::listxattr(&path, &mut list[..]).unwrap();
        assert_eq!(&list[..len], b"security.selinux\0trusted.libvirt.security.dac\0user.note\0");
    }
}

#[test]
fn extended_attributes_follow_their_flags_and_sizes() {
    let mount = TestMount::new();
    let path = mount.disk();
    let put = |name: &str, value: &[u8], flags| rustix::fs::setxattr(&path, name, value, flags);
    assert_eq!(errno_of(put("user.a", b"1", XattrFlags::REPLACE)), libc::ENODATA);
    put("user.a", b"12345", XattrFlags::CREATE).unwrap();
    assert_eq!(errno_of(put("user.a", b"2", XattrFlags::CREATE)), libc::EEXIST);
    put("user.a", b"123", XattrFlags::REPLACE).unwrap();
    put("user.empty", b"", XattrFlags::empty()).unwrap();
    put("user.largest", &vec![7; 65_536], XattrFlags::empty()).unwrap();
    let get = |name: &str, len: usize| rustix::fs::getxattr(&path, name, &mut vec![0; len][..]);
    assert_eq!(rustix::fs::getxattr_query(&path, "user.a").unwrap(), 3);
    assert_eq!(errno_of(get("user.a", 2)), libc::ERANGE);
    assert_eq!(get("user.a", 3).unwrap(), 3);
    assert_eq!(get("user.empty", 10).unwrap(), 0);
    assert_eq!(get("user.largest", 65_536).unwrap(), 65_536);
    assert_eq!(errno_of(get("user.absent", 10)), libc::ENODATA);
    let list = |len: usize| rustix::fs::listxattr(&path, &mut vec![0; len][..]);
    let all = "user.a\0user.empty\0user.largest\0".len();
    assert_eq!(rustix::fs::listxattr_query(&path).unwrap(), all);
    assert_eq!(errno_of(list(all - 1)), libc::ERANGE);
    rustix::fs::removexattr(&path, "user.a").unwrap();
    assert_eq!(errno_of(rustix::fs::removexattr(&path, "user.a")), libc::ENODATA);
    assert_eq!(errno_of(get("user.a", 10)), libc::ENODATA);
}

#[test]
fn too_many_extended_attributes_are_refused_and_change_nothing() {
    let mount = TestMount::new();
    let put = |number: usize| {
        rustix::fs::setxattr(mount.disk(), format!("user.{number}"), b"x", XattrFlags::empty())
    };
    let fitted = (0..).take_while(|number| put(*number).is_ok()).count();
    assert!(fitted >= 32, "only {fitted} fitted");
    assert_eq!(errno_of(put(fitted)), libc::ENOSPC);
    assert_eq!(rustix::fs::getxattr(mount.disk(), "user.0", &mut [0; 10][..]).unwrap(), 1);
}

#[test]
fn nothing_can_be_made_removed_or_renamed_in_the_mount() {
    let mount = TestMount::new();
    let at = |path: &str| mount.path(path);
    let refused = |what: &str, errno: i32| assert_eq!(errno, libc::EPERM, "{what}");
    refused("mkdir", errno(std::fs::create_dir(at("instances/new"))));
    refused("rmdir", errno(std::fs::remove_dir(at("instances/web"))));
    refused("create", errno(std::fs::File::create(at("instances/web/new"))));
    refused("unlink", errno(std::fs::remove_file(mount.disk())));
    #[allow(clippy::disallowed_methods, reason = "it must fail")]
    let renamed = std::fs::rename(mount.disk(), at("instances/web/x"));
    refused("rename", errno(renamed));
    refused("link", errno(std::fs::hard_link(mount.disk(), at("instances/web/x"))));
    refused("symlink", errno(std::os::unix::fs::symlink("x", at("instances/web/x"))));
    refused(
        "chmod of a directory",
        errno(std::fs::set_permissions(at("instances"), std::fs::Permissions::from_mode(0o700))),
    );
    assert_eq!(names(&at("instances/web")), set(&["disk", "disk.local"]));
}

#[test]
fn an_image_cannot_be_changed() {
    let mount = TestMount::new();
    let image = mount.path("images/base");
    std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(errno(open_with(&image, 0)), libc::EROFS);
    assert_eq!(errno(std::fs::File::create(&image)), libc::EROFS);
    let read_only = std::fs::File::open(&image).unwrap();
    assert_eq!(errno(read_only.write_at(b"x", 0)), libc::EBADF);
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let mount = TestMount::with_options("ro");
    assert_eq!(errno(open_with(&mount.disk(), 0)), libc::EROFS);
    assert_eq!(errno(std::os::unix::fs::chown(mount.disk(), Some(1), None)), libc::EROFS);
    assert_eq!(std::fs::read(mount.disk()).unwrap().len(), 8 << 20);
}

#[test]
fn inode_numbers_are_the_same_after_a_remount_and_all_different() {
    let mut mount = TestMount::new();
    let paths = [
        "",
        "images",
        "boot",
        "instances",
        "images/base",
        "instances/web",
        "instances/web/disk",
        "instances/web/disk.local",
    ];
    let numbers =
        |mount: &TestMount| paths.map(|path| std::fs::symlink_metadata(mount.path(path)).unwrap().ino());
    let before = numbers(&mount);
    assert_eq!(before.iter().collect::<BTreeSet<_>>().len(), paths.len());
    mount.remount();
    assert_eq!(numbers(&mount), before);
}

#[test]
fn a_directory_of_hundreds_of_instances_is_read_whole() {
    use std::os::unix::fs::DirEntryExt;
    let mount = TestMount::new();
    let expected: BTreeSet<String> = (0..300).map(|number| format!("guest-{number}")).collect();
    for name in &expected {
        mount.create(name);
    }
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(mount.path("instances")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.ino(), entry.metadata().unwrap().ino());
        assert!(found.insert(entry.file_name().into_string().unwrap()), "listed twice: {entry:?}");
    }
    assert!(found.remove("web"));
    assert_eq!(found, expected);
}
