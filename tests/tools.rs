//! Ordinary tools on mounted disks: they decide for themselves what a disk has to do, and check what they get back.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failed step fails the test")]
#![allow(clippy::cast_possible_truncation, reason = "tests run on 64 bits")]

#[path = "common/mount.rs"]
mod mount;

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mount::{IMAGE_BYTES, MIB, TestMount, check_output, image_bytes, open};

/// Not a test: the daemon of all others, see [`mount`].
#[test]
fn daemon_process() {
    mount::daemon_process();
}

/// Runs a tool in an empty working directory.
fn run(program: &str, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    match Command::new(program).args(arguments).current_dir(folder.path()).output() {
        Ok(output) => output,
        Err(error) => panic!("{program}: {error}; `scripts/install-deps test` installs what is missing"),
    }
}

/// Runs a tool that has to succeed, and returns what it printed.
fn done(program: &str, arguments: &[&str]) -> String {
    check_output(&format!("{program} {}", arguments.join(" ")), &run(program, arguments))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path).unwrap().write_all(content).unwrap();
        path
    }
}

/// The root disk's content as it is at first, as a plain file.
fn plain_copy(scratch: &Scratch) -> PathBuf {
    let path = scratch.file("plain.raw", &image_bytes(0, IMAGE_BYTES));
    std::fs::File::options().write(true).open(&path).unwrap().set_len(8 * MIB).unwrap();
    path
}

fn fsx(mount: &TestMount, disk: &Path, seed: u32, operations: u32, config: &str) {
    let scratch = Scratch::new();
    let config = scratch.file("fsx.toml", config.as_bytes());
    let (operations, seed) = (operations.to_string(), seed.to_string());
    let arguments =
        ["-f", text(&config), "-N", &operations, "-S", &seed, "-P", text(scratch.0.path()), text(disk)];
    let said = done("fsx", &arguments);
    assert!(said.contains("A-OK"), "{said}");
    assert!(!mount.log().contains("WARN "), "no request may fail");
}

/// All that fsx can do with a file that keeps its size.
const FSX: &str = "
    flen = 1048576
    blockmode = true
    nomsyncafterwrite = true
    [opsize]
    max = 65536
    [weights]
    truncate = 0
    invalidate = 1
    mapread = 6
    mapwrite = 6
    read = 12
    write = 12
    punch_hole = 8
    sendfile = 3
    posix_fadvise = 1
    copy_file_range = 3
    fsync = 0.1
    fdatasync = 0.1
";

/// `COWDISK_FSX_OPERATIONS` makes it longer, and `COWDISK_SEED` another. fsx keeps each mapping that it reads through, and
/// the kernel gives a process 65,530 of them: so no run is longer than 250,000 operations, and each has a seed of its own.
#[test]
fn fsx_finds_no_wrong_byte_in_100_000_operations() {
    let number = |variable: &str, default| match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")),
        Err(_) => default,
    };
    let (mut left, mut seed) = (number("COWDISK_FSX_OPERATIONS", 100_000), number("COWDISK_SEED", 1));
    while left > 0 {
        let operations = left.min(250_000);
        let mount = TestMount::with_options("flush=1");
        fsx(&mount, &mount.local(), seed, operations, FSX);
        left -= operations;
        seed += 1;
    }
}

#[test]
fn fsx_finds_no_wrong_byte_when_mappings_are_synced() {
    let mount = TestMount::with_options("flush=1");
    fsx(&mount, &mount.disk(), 2, 5_000, &FSX.replace("nomsyncafterwrite = true", ""));
}

/// Runs fio with verification, and makes sure that it did verify.
fn fio(disk: &Path, arguments: &[&str]) {
    let filename = format!("--filename={}", text(disk));
    let mut all = vec![
        "--name=verify",
        &filename,
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--output-format=json",
    ];
    all.extend(arguments);
    let said = done("fio", &all);
    // Ahead of the JSON there may be notes.
    let json = &said[said.find('{').unwrap_or(0)..];
    let report: serde_json::Value =
        serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {said}"));
    for job in report["jobs"].as_array().unwrap() {
        assert_eq!(job["error"], 0, "{said}");
        assert!(job["write"]["io_bytes"].as_u64().unwrap() > 0, "fio wrote nothing: {said}");
        assert!(job["read"]["io_bytes"].as_u64().unwrap() > 0, "fio verified nothing: {said}");
    }
}

#[test]
fn fio_verifies_deep_queues_of_direct_writes() {
    let mount = TestMount::new();
    for engine in ["--ioengine=libaio", "--ioengine=io_uring"] {
        let queue = [engine, "--direct=1", "--iodepth=32", "--rw=randwrite", "--bs=4k", "--size=16M"];
        fio(&mount.local(), &queue);
    }
}

#[test]
fn fio_verifies_mixed_sizes_of_direct_writes_on_a_disk_that_is_filled_already() {
    let mount = TestMount::new();
    open(&mount.disk()).write_all_at(&vec![0x5a; 8 * MIB as usize], 0).unwrap();
    // Of two overlapping writes on the way at the same time either may win, so fio must not send such.
    for sizes in ["--bssplit=4k/40:8k/20:16k/20:64k/20", "--bsrange=512-128k"] {
        let common = ["--ioengine=libaio", "--direct=1", "--iodepth=16", "--rw=randwrite", "--size=8M"];
        fio(
            &mount.disk(),
            &[&common[..], &[sizes, "--blockalign=512", "--serialize_overlap=1", "--loops=4"]].concat(),
        );
    }
}

#[test]
fn fio_verifies_several_writers_of_one_disk() {
    let mount = TestMount::new();
    let jobs = ["--numjobs=4", "--size=4M", "--offset_increment=4M", "--ioengine=libaio", "--direct=1"];
    fio(&mount.local(), &[&jobs[..], &["--iodepth=16", "--rw=randwrite", "--bs=4k", "--loops=4"]].concat());
}

#[test]
fn fio_verifies_buffered_and_mapped_writes() {
    let mount = TestMount::new();
    fio(
        &mount.disk(),
        &["--ioengine=psync", "--rw=randwrite", "--bsrange=1k-100k", "--bs_unaligned", "--size=8M"],
    );
    fio(&mount.disk(), &["--ioengine=mmap", "--rw=randwrite", "--bs=4k", "--size=8M"]);
    fio(&mount.local(), &["--ioengine=psync", "--rw=write", "--bs=1M", "--size=16M", "--fsync=4"]);
    fio(&mount.local(), &["--ioengine=psync", "--rw=randwrite", "--bs=4k", "--size=2M", "--sync=dsync"]);
}

#[test]
fn fio_verifies_several_buffered_writers_mixed_with_readers_and_synced_mappings() {
    let mount = TestMount::with_options("flush=1");
    let jobs = ["--numjobs=4", "--size=2M", "--offset_increment=2M", "--bssplit=512/20:4k/40:64k/40"];
    let mixed = ["--blockalign=512", "--rw=randrw", "--rwmixread=30", "--fdatasync=5", "--loops=2"];
    for engine in ["--ioengine=psync", "--ioengine=io_uring"] {
        fio(&mount.disk(), &[&jobs[..], &mixed, &[engine, "--iodepth=4", "--serialize_overlap=1"]].concat());
    }
    fio(&mount.local(), &["--ioengine=mmap", "--rw=randwrite", "--bs=4k", "--size=4M", "--fsync=16"]);
}

#[test]
fn fio_verifies_every_engine_unaligned_and_synced_now_and_then() {
    let mount = TestMount::with_options("flush=1");
    for engine in ["sync", "pvsync2", "posixaio", "libaio", "io_uring"] {
        let engine = format!("--ioengine={engine}");
        let common = [engine.as_str(), "--iodepth=8", "--rw=randwrite", "--serialize_overlap=1"];
        let unaligned = ["--bsrange=512-20k", "--bs_unaligned", "--fdatasync=7", "--size=3M"];
        fio(&mount.disk(), &[&common[..], &unaligned].concat());
        let sectors = ["--bs=512", "--direct=1", "--fsync=50", "--size=512k"];
        fio(&mount.disk(), &[&common[..], &sectors].concat());
        let mixed = ["--bssplit=4k/40:16k/30:64k/30", "--blockalign=4k", "--fdatasync=20", "--size=8M"];
        fio(&mount.local(), &[&common[..], &mixed].concat());
    }
}

/// fio trims devices only, so this goes through a loop device. (Its `trim_percentage` fails an assertion of its own and
/// still exits with 0.)
#[test]
fn fio_verifies_writes_to_what_it_has_trimmed() {
    let mount = TestMount::new();
    let local = mount.local();
    open(&local).write_all_at(&vec![0x5a; 16 * MIB as usize], 0).unwrap();
    let device = Loop::over(&local);
    for pattern in ["--rw=trimwrite", "--rw=randtrimwrite"] {
        let trims = [pattern, "--ioengine=libaio", "--direct=1", "--iodepth=8", "--size=16M"];
        fio(Path::new(&device.0), &[&trims[..], &["--bssplit=4k/50:16k/50", "--blockalign=4k"]].concat());
    }
    drop(device);
    assert!(mount.log().contains("FALLOCATE"), "nothing was trimmed");
}

#[test]
fn fio_verifies_writes_between_discards() {
    let mount = TestMount::new();
    let local = mount.local();
    fio(
        &local,
        &["--ioengine=libaio", "--direct=1", "--iodepth=8", "--rw=randwrite", "--bs=4k", "--size=8M"],
    );
    done("fallocate", &["--punch-hole", "--offset=8M", "--length=8M", text(&local)]);
    fio(
        &local,
        &["--ioengine=libaio", "--direct=1", "--iodepth=8", "--rw=randwrite", "--bs=4k", "--size=16M"],
    );
}

#[test]
fn qemu_img_compares_and_converts_a_disk() {
    let (mount, scratch) = (TestMount::new(), Scratch::new());
    let (disk, plain) = (mount.disk(), plain_copy(&scratch));
    let compare = |other: &Path, format: &str| {
        done("qemu-img", &["compare", "-f", "raw", "-F", format, text(&disk), text(other)]);
    };
    compare(&plain, "raw");
    for file in [&disk, &plain] {
        open(file).write_all_at(&[0xc3; 100_000], 123_456).unwrap();
    }
    compare(&plain, "raw");
    let converted = scratch.path("converted.qcow2");
    done("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&disk), text(&converted)]);
    compare(&converted, "qcow2");
    let back = mount.path("instances/web/disk.local");
    done("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", text(&converted), text(&back)]);
    let said = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&back), text(&disk)]);
    assert!(said.status.success(), "the larger disk ends in zeroes: {said:?}");
    open(&disk).write_all_at(b"x", 0).unwrap();
    let said = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&disk), text(&plain)]);
    assert_eq!(said.status.code(), Some(1), "a difference is seen: {said:?}");
}

#[test]
fn qemu_img_map_shows_holes_and_data() {
    let mount = TestMount::new();
    open(&mount.local()).write_all_at(&[1; 65_536], MIB).unwrap();
    let said = done("qemu-img", &["map", "--output=json", "-f", "raw", text(&mount.local())]);
    let map: serde_json::Value = serde_json::from_str(&said).unwrap();
    let data: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["data"] == true)
        .map(|extent| (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap()))
        .collect();
    assert_eq!(data, [(MIB, 65_536)], "{said}");
}

#[test]
fn qemu_writes_zeroes_discards_and_flushes() {
    let (mount, scratch) = (TestMount::new(), Scratch::new());
    let (disk, plain) = (mount.disk(), plain_copy(&scratch));
    let commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 1536 1024",
        "write -z 64k 128k",
        "write -z -u 300k 100k",
        "discard 512k 256k",
        "discard 1000k 1k",
        "flush",
        "write -f -P 0x33 4M 512",
        "aio_write -P 0x44 5M 1M",
        "aio_write -P 0x55 6M 1M",
        "aio_flush",
    ];
    for cache in ["none", "writeback", "directsync"] {
        for file in [&disk, &plain] {
            let mut arguments = vec!["-f", "raw", "-t", cache, "-d", "unmap"];
            for command in commands {
                arguments.extend(["-c", command]);
            }
            arguments.push(text(file));
            done("qemu-io", &arguments);
        }
        done("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&disk), text(&plain)]);
    }
    assert!(!mount.log().contains("WARN "), "no request may fail");
}

#[test]
fn qemu_finds_sectors_of_512_bytes() {
    let mount = TestMount::new();
    let before = mount.log().len();
    done("qemu-io", &["-f", "raw", "-t", "none", "-c", "write -P 1 512 512", text(&mount.disk())]);
    let log = mount.log()[before..].to_owned();
    let writes: Vec<_> = log.lines().filter(|line| line.contains(" WRITE ")).collect();
    assert_eq!(writes.len(), 1, "{log}");
    // As the one transport's log has it, and as the other's.
    let wanted = ["offset Ok(512), size 512", "offset 512 size 512"];
    assert!(wanted.iter().any(|wanted| writes[0].contains(wanted)), "not read-modify-write: {writes:?}");
}

#[test]
fn cp_and_dd_copy_disks() {
    let (mount, scratch) = (TestMount::new(), Scratch::new());
    let (disk, plain) = (mount.disk(), plain_copy(&scratch));
    for sparse in ["--sparse=always", "--sparse=never", "--sparse=auto"] {
        let copy = scratch.path("copy.raw");
        done("cp", &[sparse, text(&disk), text(&copy)]);
        done("cmp", &[text(&copy), text(&plain)]);
    }
    let from = format!("if={}", text(&plain));
    let to = format!("of={}", text(&mount.local()));
    done("dd", &[&from, &to, "bs=100k", "conv=notrunc,fsync"]);
    done("cmp", &["-n", "8388608", text(&mount.local()), text(&plain)]);
    done("dd", &[&from, &to, "bs=1M", "conv=notrunc", "iflag=direct", "oflag=direct"]);
    done("cmp", &["-n", "8388608", text(&mount.local()), text(&plain)]);
    let between = format!("of={}", text(&disk));
    done("dd", &[&format!("if={}", text(&mount.local())), &between, "bs=64k", "count=128", "conv=notrunc"]);
    done("cmp", &[text(&disk), text(&plain)]);
}

/// A loop device over a disk; detached when dropped.
struct Loop(String);

impl Loop {
    fn over(disk: &Path) -> Self {
        Self(done("losetup", &["--find", "--show", "--direct-io=on", text(disk)]).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run("losetup", &["--detach", &self.0]);
    }
}

#[test]
fn a_file_system_on_a_disk_works_over_a_loop_device() {
    let (mut mount, scratch) = (TestMount::new(), Scratch::new());
    let local = mount.local();
    done("mkfs.ext4", &["-q", "-F", text(&local)]);
    done("e2fsck", &["-fn", text(&local)]);
    let target = scratch.path("target");
    std::fs::create_dir(&target).unwrap();
    let content: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    {
        let device = Loop::over(&local);
        done("mount", &[&device.0, text(&target)]);
        for number in 0..3 {
            let mut file = std::fs::File::create(target.join(format!("file-{number}"))).unwrap();
            file.write_all(&content).unwrap();
            file.sync_all().unwrap();
        }
        std::fs::remove_file(target.join("file-1")).unwrap();
        done("fstrim", &[text(&target)]);
        done("umount", &[text(&target)]);
    }
    done("e2fsck", &["-fn", text(&local)]);
    mount.remount();
    let device = Loop::over(&local);
    done("mount", &["-o", "ro", &device.0, text(&target)]);
    for number in [0, 2] {
        assert!(std::fs::read(target.join(format!("file-{number}"))).unwrap() == content);
    }
    done("umount", &[text(&target)]);
}
