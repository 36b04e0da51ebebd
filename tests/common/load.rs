//! Load on a mount whose daemon is replaced, by those who notice every error and every wrong byte.

#![allow(dead_code, reason = "each test file uses another part")]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use cowdisk::daemon::{self, Status};
use power_cut::random::Random;
use rustix::fs::FallocateFlags;
use rustix::process::Signal;

use crate::mount::{self, TestMount, kill_and_wait, open};

/// Mounted so that another process can take over, whatever transport the other tests run with.
pub fn kept(options: &str) -> TestMount {
    TestMount::with_options(&format!("transport=dev_fuse,flush=0,{options}"))
}

pub fn kill_worker(mount: &TestMount) {
    kill_and_wait(mount.worker());
}

/// Kills the process that answers, and does `work` before another one takes over.
pub fn while_nobody_serves(mount: &TestMount, work: impl FnOnce()) {
    mount.signal(Signal::STOP);
    kill_worker(mount);
    work();
    mount.signal(Signal::CONT);
}

pub fn status(mount: &TestMount) -> Status {
    // Between two processes there is nobody to answer.
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match daemon::status(&mount.store) {
            Ok(status) => return status.expect("mounted"),
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")),
        Err(_) => default,
    }
}

/// Has the host forget the image of a test store.
pub fn forget_image(mount: &TestMount) {
    let base = mount.store.image(&mount::name(mount::IMAGE)).unwrap().base;
    let file = File::open(mount.store.dir().join(format!("bases/{base}/base.raw"))).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Reads the image by the root disk of `web`, of which nothing was written, until `done`: eight readers at once, each block as
/// the host has just forgotten it. Says how many reads there were.
pub fn read_cold(mount: &TestMount, seed: u64, done: &AtomicBool) -> usize {
    let disk = mount::open_with(&mount.disk(), libc::O_DIRECT).unwrap();
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let (disk, count) = (&disk, &count);
            scope.spawn(move || {
                let mut random = Random::new(seed + reader);
                let mut seen = mount::Aligned::new(8192);
                while !done.load(Ordering::Relaxed) {
                    let (at, len) = (random.below(1022) * 4096, 4096 * (1 + random.below(2) as usize));
                    disk.read_exact_at(&mut seen[..len], at).unwrap();
                    assert!(seen[..len] == mount::image_bytes(at, len as u64), "{len} bytes at {at}");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while !done.load(Ordering::Relaxed) {
            forget_image(mount);
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    count.into_inner()
}

/// Runs until `done`, over and over, each time with a seed of its own: writes of 4 KiB at queue depth 32, each read back and
/// its checksum verified.
pub fn verify_by_fio(disk: &Path, engine: &str, seed: u64, done: &AtomicBool) -> u64 {
    let mut runs = 0;
    while !done.load(Ordering::Relaxed) {
        let output = Command::new("fio")
            .args(["--name=load", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--direct=1", "--size=8M"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=512", "--verify_state_save=0"])
            .arg("--output-format=json")
            .arg(format!("--ioengine={engine}"))
            .arg(format!("--randseed={}", seed + runs))
            .arg(format!("--filename={}", disk.display()))
            .output()
            .expect("fio is needed: scripts/install-deps");
        let said = mount::check_output("fio", &output);
        let report: serde_json::Value =
            serde_json::from_str(&said[said.find('{').expect("a report")..]).unwrap();
        let job = &report["jobs"][0];
        assert_eq!(job["error"], 0, "{said}");
        for way in ["write", "read"] {
            assert!(job[way]["io_bytes"].as_u64().unwrap() >= 8 << 20, "{way}: {said}");
        }
        runs += 1;
    }
    runs
}

/// Writes records, syncs, and reads back what it had written; never sees an error. Returns how many.
pub fn write_and_sync(path: &Path, seed: u64, done: &AtomicBool, stall: &Stall) -> usize {
    let file = open(path);
    let mut random = Random::new(seed);
    let mut model = std::fs::read(path).unwrap();
    let size = model.len() as u64;
    let mut steps = 0;
    while !done.load(Ordering::Relaxed) {
        let len = random.between(1, 20_000).min(size);
        let at = random.below(size - len + 1);
        let range = at as usize..(at + len) as usize;
        stall.watch(|| match random.below(8) {
            0 => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&file, mode, at, len).unwrap();
                model[range.clone()].fill(0);
            }
            1 => file.sync_all().unwrap(),
            2 => file.sync_data().unwrap(),
            _ => {
                let byte = random.below(256) as u8;
                model[range.clone()].fill(byte);
                file.write_all_at(&model[range.clone()], at).unwrap();
            }
        });
        let mut seen = vec![0; range.len()];
        file.read_exact_at(&mut seen, at).unwrap();
        assert!(seen == model[range], "step {steps}, seed {seed}, byte {at}, {len} bytes");
        steps += 1;
    }
    assert!(std::fs::read(path).unwrap() == model, "at the end, seed {seed}");
    steps
}

/// Opens, looks at and closes files and directories.
pub fn open_and_close(mount: &Path, done: &AtomicBool) -> usize {
    let ino = |path: &PathBuf| std::fs::metadata(path).unwrap().ino();
    let disk = mount.join("instances/db/disk.local");
    let (number, mut rounds) = (ino(&disk), 0);
    while !done.load(Ordering::Relaxed) {
        let file = open(&disk);
        let at = (rounds % 4000) as u64 * 4096;
        file.write_all_at(&[rounds as u8 | 1; 512], at).unwrap();
        drop(file);
        let mut seen = [0; 512];
        File::open(&disk).unwrap().read_exact_at(&mut seen, at).unwrap();
        assert_eq!(seen, [rounds as u8 | 1; 512]);
        let names: Vec<_> = std::fs::read_dir(mount.join("instances"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert_eq!(ino(&disk), number);
        rustix::fs::setxattr(&disk, "user.round", b"x", rustix::fs::XattrFlags::empty()).unwrap();
        rustix::fs::removexattr(&disk, "user.round").unwrap();
        rounds += 1;
    }
    rounds
}

/// The longest pause that anybody noticed.
#[derive(Default)]
pub struct Stall(AtomicUsize);

impl Stall {
    pub fn watch<R>(&self, work: impl FnOnce() -> R) -> R {
        let begun = Instant::now();
        let result = work();
        self.0.fetch_max(begun.elapsed().as_millis() as usize, Ordering::Relaxed);
        result
    }
}

/// Load that goes on.
pub struct Load<'scope> {
    fio: ScopedJoinHandle<'scope, u64>,
    uring: ScopedJoinHandle<'scope, u64>,
    oracle: ScopedJoinHandle<'scope, usize>,
    storm: ScopedJoinHandle<'scope, usize>,
}

impl Load<'_> {
    /// Whether somebody has noticed an error or a wrong byte, and given up.
    pub fn noticed(&self) -> bool {
        self.fio.is_finished()
            || self.uring.is_finished()
            || self.oracle.is_finished()
            || self.storm.is_finished()
    }
}

/// Does `work` while both disks of `web`, the root disk of `db`, which must be there, and names and attributes are used. Fails if
/// anybody notices more than a pause.
pub fn under_load(mount: &TestMount, seed: u64, work: impl FnOnce(&Load<'_>)) {
    let (done, stall) = (AtomicBool::new(false), Stall::default());
    let root = mount.path("instances/db/disk");
    std::thread::scope(|scope| {
        let load = Load {
            fio: scope.spawn(|| verify_by_fio(&mount.disk(), "libaio", seed, &done)),
            uring: scope.spawn(|| verify_by_fio(&mount.local(), "io_uring", seed, &done)),
            oracle: scope.spawn(|| write_and_sync(&root, seed, &done, &stall)),
            storm: scope.spawn(|| open_and_close(&mount.mountpoint(), &done)),
        };
        work(&load);
        // The last one has to be survived, too.
        std::thread::sleep(Duration::from_secs(1));
        done.store(true, Ordering::Relaxed);
        let (fio, uring) = (load.fio.join().unwrap(), load.uring.join().unwrap());
        let (oracle, storm) = (load.oracle.join().unwrap(), load.storm.join().unwrap());
        eprintln!(
            "{fio} and {uring} runs of fio, {oracle} steps, {storm} rounds; longest pause {} ms",
            stall.0.load(Ordering::Relaxed)
        );
        assert!(fio > 0 && uring > 0 && oracle > 0 && storm > 0);
    });
}

/// The daemon has complained of nothing but its workers' deaths, of which there were so many.
pub fn assert_only_deaths_in(log: &str, deaths: u64) {
    let is_death = |line: &&str| line.starts_with("ERROR ") && line.contains("; another one takes over in ");
    assert_eq!(log.lines().filter(is_death).count() as u64, deaths, "deaths");
    let is_complaint = |line: &&str| line.starts_with("WARN ") || line.starts_with("ERROR ");
    let complaints: Vec<_> = log.lines().filter(|line| is_complaint(line) && !is_death(line)).collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}
