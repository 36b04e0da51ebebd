//! File systems in loop devices over mounted disks: ext4 over an overlay of an image, XFS over a blank one, both mounted
//! with discard and kept busy, and the daemon killed in the middle.
//!
//! Writers create, replace, punch and remove files, and remember which they had synced. After the kill the disks are
//! served anew and the file systems mounted again, which replays their journals: every file that was synced has every
//! byte, and their own checks find nothing. The writers go on from there.
//!
//! `COWDISK_INNER_ROUNDS` says how often (2 unless told), `COWDISK_SEED` with which seed.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failed step fails the test")]
#![allow(clippy::disallowed_methods, reason = "the files are not a store's")]
#![allow(clippy::cast_possible_truncation, reason = "tests run on 64 bits")]

#[path = "common/mount.rs"]
mod mount;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowdisk::store::{InstanceSpec, NoProgress};
use mount::{IMAGE, MIB, TestMount, check_output, name};
use power_cut::random::Random;

/// XFS is not made smaller than 300 MiB.
const DISK_BYTES: u64 = 320 * MIB;
const WRITERS: u64 = 3;
/// Files of a writer; each is replaced again and again.
const FILES: u64 = 40;

/// Not a test: the daemon of all others, see [`mount`].
#[test]
fn daemon_process() {
    mount::daemon_process();
}

#[test]
fn file_systems_on_disks_survive_kills_of_the_daemon_under_load() {
    let number = |variable: &str, default| match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")),
        Err(_) => default,
    };
    let (rounds, seed) = (number("COWDISK_INNER_ROUNDS", 2), number("COWDISK_SEED", 1));
    eprintln!("{rounds} rounds with seed {seed}");
    let mut random = Random::new(seed);
    let mut mount = store_with_disks();
    mount.mount().unwrap();
    let mut places =
        [("ext4", mount.disk()), ("xfs", mount.local())].map(|(kind, disk)| Place::new(kind, disk));
    for place in &places {
        place.format();
    }
    for round in 0..rounds {
        let patience = Duration::from_millis(random.between(1500, 4000));
        let round_seed = random.number();
        let mounted = places.each_ref().map(Mounted::new);
        let killed = AtomicBool::new(false);
        let logs = std::thread::scope(|scope| {
            let killed = &killed;
            let writers = places.each_ref().map(|place| {
                let begin =
                    |writer| scope.spawn(move || write_until_it_fails(place, writer, round_seed, killed));
                (0..WRITERS).map(begin).collect::<Vec<_>>()
            });
            std::thread::sleep(patience);
            killed.store(true, Ordering::SeqCst);
            mount.kill();
            writers
                .map(|writers| writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>())
        });
        drop(mounted);
        assert!(mount.log().contains("FALLOCATE"), "round {round}: nothing was discarded");
        std::fs::remove_file(mount.log_path()).unwrap();
        mount.mount().unwrap();
        for (place, logs) in places.iter_mut().zip(logs) {
            place.files.extend(logs.into_iter().flatten());
            place.judge(round);
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    for place in &places {
        let copy = scratch.path().join(place.kind);
        tool("qemu-img", &["convert", "-f", "raw", "-O", "raw", text(&place.disk), text(&copy)]);
        mount.remount();
        tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&place.disk), text(&copy)]);
    }
}

fn store_with_disks() -> TestMount {
    let mount = TestMount::unmounted("flush=1", &std::env::temp_dir());
    mount.store.remove_instance(&name("web")).unwrap();
    let spec = InstanceSpec {
        root_size: Some(DISK_BYTES),
        local_size: Some(DISK_BYTES),
        ..InstanceSpec::of(name(IMAGE))
    };
    mount.store.create_instance(&name("web"), &spec, &NoProgress).unwrap();
    mount
}

/// What a file may hold: contents by their number. None means that it may be missing.
#[derive(Clone, Debug, Default)]
struct Versions {
    allowed: Vec<Option<u64>>,
}

/// One disk and the file system on it.
struct Place {
    kind: &'static str,
    disk: PathBuf,
    target: tempfile::TempDir,
    /// Of every file that was ever written, what it may hold.
    files: BTreeMap<PathBuf, Versions>,
}

impl Place {
    fn new(kind: &'static str, disk: PathBuf) -> Self {
        Self { kind, disk, target: tempfile::tempdir().unwrap(), files: BTreeMap::new() }
    }

    fn format(&self) {
        match self.kind {
            "ext4" => tool("mkfs.ext4", &["-q", "-F", text(&self.disk)]),
            _ => tool("mkfs.xfs", &["-q", "-f", text(&self.disk)]),
        };
        let mounted = Mounted::new(self);
        for writer in 0..WRITERS {
            std::fs::create_dir(self.target.path().join(format!("writer-{writer}"))).unwrap();
        }
        drop(mounted);
    }

    /// Mounts the file system, reads every file, and has the file system checked.
    fn judge(&mut self, round: u64) {
        let mounted = Mounted::new(self);
        for (path, versions) in &mut self.files {
            let found = std::fs::read(self.target.path().join(path)).ok();
            let right = versions.allowed.iter().find(|version| found == version.map(Version::content));
            let Some(right) = right else {
                let len = found.map(|bytes| bytes.len());
                panic!(
                    "round {round}: {} {}: {len:?} bytes, none of {versions:?}",
                    self.kind,
                    path.display()
                );
            };
            versions.allowed = vec![*right];
        }
        drop(mounted);
        match self.kind {
            "ext4" => tool("e2fsck", &["-fn", text(&self.disk)]),
            _ => tool("xfs_repair", &["-n", "-f", text(&self.disk)]),
        };
    }
}

/// Its file system, mounted from a loop device that reads and writes the disk directly.
struct Mounted {
    target: PathBuf,
}

impl Mounted {
    fn new(place: &Place) -> Self {
        let said = tool("losetup", &["--find", "--show", "--direct-io=on", text(&place.disk)]);
        let device = said.trim();
        let target = place.target.path();
        let mounted = Command::new("mount")
            .args(["-t", place.kind, "-o", "discard", device, text(target)])
            .output()
            .unwrap();
        // From now on it goes when the file system does.
        tool("losetup", &["--detach", device]);
        check_output(&format!("mount the {} of {device}", place.kind), &mounted);
        Self { target: target.to_owned() }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // As forgiving as the dead daemon asks for: the kernel may not be done with the failed requests.
        for _ in 0..100 {
            if rustix::mount::unmount(&self.target, rustix::mount::UnmountFlags::empty()).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = rustix::mount::unmount(&self.target, rustix::mount::UnmountFlags::DETACH);
        assert!(std::thread::panicking(), "{}: does not unmount", self.target.display());
    }
}

/// A version of a file, as follows from its number.
struct Version {
    bytes: Vec<u8>,
    /// What is punched once it is written.
    hole: std::ops::Range<usize>,
}

impl Version {
    fn new(number: u64) -> Self {
        let mut random = Random::new(number);
        // Mostly small; some span many extents.
        let longest = if random.chance(1, 8) { 1 << 20 } else { 40_000 };
        let len = random.below(longest) as usize;
        let start = random.below(len as u64 + 1) as usize;
        let end = if random.chance(1, 4) { len.min(start + 20_000) } else { start };
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(random.number().to_le_bytes());
        }
        bytes.truncate(len);
        Self { bytes, hole: start..end }
    }

    /// What the file then holds.
    fn content(number: u64) -> Vec<u8> {
        let Self { mut bytes, hole } = Self::new(number);
        bytes[hole].fill(0);
        bytes
    }
}

/// Works until the first error, and returns what the files may hold then.
fn write_until_it_fails(
    place: &Place,
    writer: u64,
    seed: u64,
    killed: &AtomicBool,
) -> BTreeMap<PathBuf, Versions> {
    let mut random = Random::new(seed ^ writer);
    let folder = PathBuf::from(format!("writer-{writer}"));
    let begins = place.files.iter().filter(|(path, _)| path.starts_with(&folder));
    let mut files: BTreeMap<_, _> = begins.map(|(path, versions)| (path.clone(), versions.clone())).collect();
    let error = loop {
        let path = folder.join(format!("file-{}", random.below(FILES)));
        let versions = files.entry(path.clone()).or_insert_with(|| Versions { allowed: vec![None] });
        // From here on until all is synced the old or the new may be there.
        let version = (!random.chance(1, 5)).then(|| random.number());
        versions.allowed.push(version);
        match replace(&place.target.path().join(path), version, &mut random) {
            // A file system that gives up may answer a sync with success; only before the kill it means something.
            Ok(()) if !killed.load(Ordering::SeqCst) => versions.allowed = vec![version],
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert_ne!(error.kind(), io::ErrorKind::StorageFull, "the disks are large enough");
    files
}

/// Puts a version of a file in place of another, or removes it; synced on return.
fn replace(path: &Path, version: Option<u64>, random: &mut Random) -> io::Result<()> {
    let folder = path.parent().unwrap();
    match version {
        Some(version) => {
            let draft = path.with_extension("draft");
            write_draft(&draft, version, random)?;
            std::fs::rename(draft, path)?;
        }
        None => match std::fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        },
    }
    File::open(folder)?.sync_all()
}

fn write_draft(draft: &Path, version: u64, random: &mut Random) -> io::Result<()> {
    let mut file = File::create(draft)?;
    let Version { bytes, hole } = Version::new(version);
    for piece in bytes.chunks(random.between(500, 100_000) as usize) {
        file.write_all(piece)?;
        if random.chance(1, 10) {
            file.sync_data()?;
        }
    }
    if !hole.is_empty() {
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, punch, hole.start as u64, hole.len() as u64)?;
    }
    file.sync_all()
}

fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| {
        panic!("{program}: {error}; `scripts/install-deps test` installs what is missing")
    });
    check_output(&format!("{program} {}", arguments.join(" ")), &output)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
