//! Files of the store that change, or cannot be read, under open disks: the request that needs them fails, nothing else.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use cowdisk::store::{InstanceSpec, NoProgress};

use crate::mount::{
    IMAGE, IMAGE_BYTES, KIB, MIB, QUIET, TestMount, errno, image_byte, image_bytes, name, open,
};

fn base_file(mount: &TestMount) -> PathBuf {
    let base = mount.store.image(&name(IMAGE)).unwrap().base;
    mount.store.dir().join(format!("bases/{base}/base.raw"))
}

fn put(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all_at(bytes, 0).unwrap();
}

fn writable(path: &Path) -> File {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    File::options().write(true).open(path).unwrap()
}

#[track_caller]
fn reads(file: &File, offset: u64, expected: &[u8]) {
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, offset).unwrap();
    assert!(found == expected, "{} bytes at {offset}", found.len());
}

#[track_caller]
fn fails(file: &File, offset: u64) {
    assert_eq!(errno(file.read_at(&mut [0; 4096], offset)), libc_eio());
}

fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

/// What was cut off used to read as zeroes.
#[test]
fn a_base_cut_under_an_open_disk_fails_the_reads_that_need_it() {
    let mount = TestMount::new();
    mount.create("other");
    let (disk, other) = (open(&mount.disk()), open(&mount.path("instances/other/disk")));
    disk.write_all_at(&[9; 4096], MIB).unwrap();
    let image = File::open(mount.path("images/base")).unwrap();
    writable(&base_file(&mount)).set_len(512 * KIB).unwrap();

    reads(&disk, 0, &image_bytes(0, 512 * KIB));
    for file in [&disk, &other, &image] {
        fails(file, MIB + 4096);
        fails(file, 512 * KIB - 512);
    }
    assert_eq!(errno(disk.write_at(&[1], MIB + 4096)), libc_eio(), "nothing to copy up");
    // What was cut off must not pass for a hole: the blocks would show the base again once it is back.
    assert_eq!(errno(disk.write_at(&[0; 4096], MIB + 8192)), libc_eio());
    assert!(rustix::fs::seek(&disk, rustix::fs::SeekFrom::Data(2 * MIB)).is_err());
    reads(&disk, MIB, &[9; 4096]);
    reads(&disk, IMAGE_BYTES, &[0; 8192]);
    disk.write_all_at(&[8; 4096], MIB + 4096).unwrap();
    disk.sync_all().unwrap();
    reads(&disk, MIB + 4096, &[8; 4096]);
    let log = mount.log();
    assert!(log.contains("it ends at byte 524288"), "{log}");
}

#[test]
fn a_data_file_cut_under_an_open_disk_fails_the_reads_that_need_it() {
    let mount = TestMount::new();
    let disk = open(&mount.disk());
    disk.write_all_at(&[9; 8192], MIB).unwrap();
    File::options().write(true).open(mount.host_file("disk.data")).unwrap().set_len(MIB + 4096).unwrap();
    reads(&disk, MIB, &[9; 4096]);
    fails(&disk, MIB + 4096);
    reads(&disk, 0, &image_bytes(0, MIB));
    reads(&disk, MIB + 8192, &image_bytes(MIB + 8192, 4096));
}

#[test]
fn an_independent_disk_cut_while_it_is_open_fails_the_reads_that_need_it() {
    let mount = TestMount::new();
    let spec = InstanceSpec { no_cow: true, ..InstanceSpec::of(name(IMAGE)) };
    mount.store.create_instance(&name("full"), &spec, &NoProgress).unwrap();
    let disk = open(&mount.path("instances/full/disk"));
    let file = File::options().write(true).open(mount.store.dir().join("instances/full/disk.raw")).unwrap();
    file.set_len(MIB).unwrap();
    reads(&disk, 0, &image_bytes(0, MIB));
    fails(&disk, MIB);
    assert_eq!(
        rustix::fs::seek(&disk, rustix::fs::SeekFrom::Data(MIB)).unwrap_err(),
        rustix::io::Errno::IO,
        "what was cut off is no hole"
    );
}

#[test]
fn a_base_replaced_under_an_open_disk_is_noticed_at_the_next_opening() {
    let mut mount = TestMount::new();
    let path = base_file(&mount);
    let stored = std::fs::metadata(&path).unwrap();
    let disk = open(&mount.disk());
    let copy = path.with_file_name("copy");
    let mut bytes = image_bytes(0, IMAGE_BYTES);
    bytes[5000] ^= 1;
    put(&copy, &bytes);
    File::open(&copy).unwrap().set_modified(stored.modified().unwrap()).unwrap();
    rustix::fs::renameat(rustix::fs::CWD, &copy, rustix::fs::CWD, &path).unwrap();
    // An open disk goes on with the file that it has open.
    reads(&disk, 0, &image_bytes(0, 8192));
    drop(disk);
    mount.remount();
    assert_eq!(errno(File::open(mount.disk())), libc_eio());
    let changed = format!("its inode number was {}, is ", stored.ino());
    assert!(mount.log().contains(&changed), "{}", mount.log());
    let error = mount.store.verify_image(&name(IMAGE), &NoProgress).unwrap_err();
    assert!(error.to_string().contains("its bytes have changed"), "{error}");
    assert_eq!(errno(File::open(mount.disk())), libc_eio());
}

#[test]
fn a_base_changed_behind_its_modification_time_is_noticed_by_verify() {
    let mount = TestMount::new();
    let path = base_file(&mount);
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
    let file = writable(&path);
    file.write_all_at(&[!image_byte(5000)], 5000).unwrap();
    file.set_modified(modified).unwrap();
    open(&mount.disk());
    mount.store.verify_image(&name(IMAGE), &NoProgress).unwrap_err();
    mount.wait_until("the disk is closed, and refused", || File::open(mount.disk()).is_err());
    assert_eq!(errno(File::open(mount.disk())), libc_eio());
}

/// A filesystem whose disk is a file, on a folder.
struct LoopDisk {
    folder: PathBuf,
    backing: PathBuf,
}

impl LoopDisk {
    fn new(folder: &Path, backing: PathBuf) -> Self {
        File::create(&backing).unwrap().set_len(16 * MIB).unwrap();
        done(Command::new("mkfs.ext4").args(["-q", "-F", "-O", "^has_journal"]).arg(&backing));
        let disk = Self { folder: folder.to_owned(), backing };
        disk.attach("rw");
        disk
    }

    fn attach(&self, options: &str) {
        let options = format!("loop,{options}");
        done(Command::new("mount").args(["-o", &options]).arg(&self.backing).arg(&self.folder));
    }

    fn detach(&self) {
        done(Command::new("umount").arg(&self.folder));
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.folder).output();
    }
}

fn done(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_read_error_of_the_base_fails_that_request_only() {
    let mut mount = TestMount::unmounted(QUIET, &std::env::temp_dir());
    let base = base_file(&mount);
    let (home, bases) = (base.parent().unwrap().to_owned(), mount.store.dir().join("bases"));
    // The base moves to a disk of its own, which is then cut: the host's disk has nothing to show for its last MiB.
    let scratch = tempfile::tempdir().unwrap();
    let disk = LoopDisk::new(&bases, scratch.path().join("backing"));
    let moved = bases.join(home.file_name().unwrap());
    disk.detach();
    let kept = scratch.path().join("base");
    done(Command::new("cp").arg("-a").arg(&home).arg(&kept));
    disk.attach("rw");
    done(Command::new("cp").arg("-a").arg(&kept).arg(&moved));
    let record = std::fs::read_to_string(moved.join("base.json")).unwrap();
    let inode = std::fs::metadata(moved.join("base.raw")).unwrap().ino();
    let record: Vec<String> = record.lines().map(|line| with_inode(line, inode)).collect();
    put(&moved.join("base.json"), record.join("\n").as_bytes());
    disk.detach();
    disk.attach("ro");
    mount.create("other");
    mount.mount().unwrap();
    let (web, other) = (open(&mount.disk()), open(&mount.path("instances/other/disk")));
    web.write_all_at(&[9; 4096], 0).unwrap();

    let file = std::fs::read(&disk.backing).unwrap();
    let marker = image_bytes(3 * MIB, 4096);
    let cut = (0..file.len()).step_by(1024).find(|&at| file[at..].starts_with(&marker)).unwrap();
    File::options().write(true).open(&disk.backing).unwrap().set_len(cut as u64).unwrap();
    for file in [&web, &other] {
        fails(file, 3 * MIB + 64 * KIB);
    }
    assert_eq!(errno(web.write_at(&[1], 3 * MIB + 128 * KIB)), libc_eio(), "nothing to copy up");
    reads(&web, 0, &[9; 4096]);
    reads(&other, IMAGE_BYTES, &[0; 4096]);
    for file in [&web, &other] {
        file.write_all_at(&[7; 8192], 3 * MIB + 128 * KIB).unwrap();
        file.sync_all().unwrap();
        reads(file, 3 * MIB + 128 * KIB, &[7; 8192]);
    }
    drop((web, other));
    mount.unmount().unwrap();
}

/// A line of a base's record, with another number if it is that of the inode.
fn with_inode(line: &str, inode: u64) -> String {
    match line.trim_start().starts_with("\"inode\"") {
        true => format!("\"inode\": {inode},"),
        false => line.to_owned(),
    }
}
