//! The daemon killed by `kill -9` under load, over and over: everything that was answered is there afterwards.
//!
//! Five writers work on three disks as `power_cut::plan` says: with and without O_DIRECT, across blocks that they share,
//! with discards and syncs; a sixth, in a process of its own, writes through a mapping. Each remembers what was
//! answered. What was under way when the daemon died may be there or not, sector by sector; everything else must be as it
//! was. Whatever is found is what the next round begins with.
//!
//! `COWDISK_KILLS` says how often (10 unless told), `COWDISK_SEED` with which seed.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failed step fails the test")]
#![allow(clippy::cast_possible_truncation, reason = "tests run on 64 bits")]

#[path = "common/mount.rs"]
mod mount;

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cowdisk::store::{InstanceSpec, NoProgress};
use mount::{IMAGE, IMAGE_BYTES, MIB, TestMount, image_bytes, name, open, open_with};
use power_cut::aligned::Aligned;
use power_cut::plan::{self, DISK_SECTORS, Disk, STREAMS, Span, Step, Way};
use power_cut::random::Random;
use power_cut::sector::{Label, SECTOR_BYTES, describe};

/// Bytes at the end of the local disk that only the mapping is used for.
const MAPPED_BYTES: u64 = MIB;
const DISK_BYTES: u64 = DISK_SECTORS * SECTOR_BYTES as u64;
const PAGE_BYTES: u64 = 4096;
/// More than any writer does in a round.
const STEPS: usize = 5_000;
const MAPPED_FILE: &str = "TEST_MAPPED_FILE";

/// Not a test: the daemon of all others, see [`mount`].
#[test]
fn daemon_process() {
    mount::daemon_process();
}

#[test]
fn everything_answered_survives_kills_of_the_daemon_under_load() {
    let number = |variable: &str, default| match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")),
        Err(_) => default,
    };
    let (kills, seed) = (number("COWDISK_KILLS", 10), number("COWDISK_SEED", 1));
    eprintln!("{kills} kills with seed {seed}");
    let mut random = Random::new(seed);
    let mut mount = store_with_disks();
    let mut disks = Disk::ALL.map(first_content);
    let mut answered = 0;
    for round in 0..kills {
        mount.mount().unwrap();
        let round_seed = random.number();
        // Often before the disks are open, or while what the last kill left is taken up.
        let patience = if random.chance(1, 4) { random.below(20) } else { random.between(20, 400) };
        let outcome = write_until_killed(&mut mount, round_seed, Duration::from_millis(patience));
        answered += outcome.done.iter().sum::<usize>();
        mount.mount().unwrap();
        for (disk, content) in Disk::ALL.into_iter().zip(&mut disks) {
            judge(&mount, round, round_seed, disk, content, &outcome);
        }
        if random.chance(1, 4) {
            mount.remount();
            for (disk, content) in Disk::ALL.into_iter().zip(&disks) {
                assert!(read(&mount, disk) == *content, "round {round}: {disk:?} changed by a clean unmount");
            }
        }
        mount.unmount().unwrap();
        let log = mount.log();
        let failed: Vec<_> = log
            .lines()
            .filter(|line| line.starts_with("WARN "))
            // The two processes of the daemon are killed one after the other.
            .filter(|line| {
                !line.contains("took away the dead mount") && !line.contains("serving on without one")
            })
            .collect();
        assert!(failed.is_empty(), "round {round}: the daemon complains: {failed:#?}");
        // It has a line for each request.
        std::fs::remove_file(mount.log_path()).unwrap();
        if (round + 1) % 10 == 0 {
            eprintln!("killed {} times, {answered} steps answered", round + 1);
        }
    }
    assert!(answered > 0, "no writer ever got an answer");
}

/// The disks of `power_cut::plan`, not mounted.
fn store_with_disks() -> TestMount {
    let mount = TestMount::unmounted("flush=1", &std::env::temp_dir());
    mount.store.remove_instance(&name("web")).unwrap();
    let cow = InstanceSpec {
        root_size: Some(DISK_BYTES),
        local_size: Some(DISK_BYTES + MAPPED_BYTES),
        ..InstanceSpec::of(name(IMAGE))
    };
    let plain = InstanceSpec { local_size: None, no_cow: true, ..cow.clone() };
    for (instance, spec) in [("web", cow), ("plain", plain)] {
        mount.store.create_instance(&name(instance), &spec, &NoProgress).unwrap();
    }
    mount
}

fn first_content(disk: Disk) -> Vec<u8> {
    let (mut content, bytes) = match disk {
        Disk::Root | Disk::Plain => (image_bytes(0, IMAGE_BYTES), DISK_BYTES),
        Disk::Local => (Vec::new(), DISK_BYTES + MAPPED_BYTES),
    };
    content.resize(bytes as usize, 0);
    content
}

/// How far the writers had come when the daemon died.
struct Outcome {
    /// Steps of each stream that were answered without an error.
    done: Vec<usize>,
    /// Pages that were written through the mapping and synced.
    synced_pages: usize,
}

fn write_until_killed(mount: &mut TestMount, seed: u64, patience: Duration) -> Outcome {
    let mapped = start_mapped_writer(&mount.path(Disk::Local.path()), seed);
    let outcome = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..STREAMS.len())
            .map(|stream| {
                let path = mount.path(STREAMS[stream].path());
                scope.spawn(move || run_stream(&path, seed, stream))
            })
            .collect();
        std::thread::sleep(patience);
        mount.kill();
        let done = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        Outcome { done, synced_pages: end_mapped_writer(mapped) }
    });
    assert!(
        outcome.done.iter().all(|&done| done < STEPS),
        "a writer had nothing left to do: {:?}",
        outcome.done
    );
    outcome
}

/// Works until the first error, and returns how many steps were answered before.
fn run_stream(path: &Path, seed: u64, stream: usize) -> usize {
    let opened = || -> std::io::Result<_> {
        Ok((open_with(path, libc::O_DIRECT)?, open_with(path, 0)?, open_with(path, libc::O_DSYNC)?))
    };
    let Ok((direct, buffered, through)) = opened() else { return 0 };
    for (index, step) in plan::steps(seed, stream, STEPS).into_iter().enumerate() {
        let result = match step {
            Step::Write(span, way) => {
                let file = match way {
                    Way::Direct => &direct,
                    Way::Buffered => &buffered,
                    Way::Through => &through,
                };
                file.write_all_at(&plan::content(seed, stream, index, span), span.start * 512)
            }
            Step::Discard(span) => {
                let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                let (start, len) = (span.start * 512, (span.end - span.start) * 512);
                rustix::fs::fallocate(&buffered, punch, start, len).map_err(Into::into)
            }
            Step::Sync { data_only: true } => buffered.sync_data(),
            Step::Sync { data_only: false } => direct.sync_all(),
        };
        if let Err(error) = result {
            // EIO is what direct I/O gets that was cut short. That the daemon answered none is seen in its log.
            let expected = [libc::ENOTCONN, libc::ECONNABORTED, libc::ECANCELED, libc::EIO];
            assert!(
                error.raw_os_error().is_some_and(|errno| expected.contains(&errno)),
                "stream {stream}, step {index}, {step:?}: {error}"
            );
            return index;
        }
    }
    STEPS
}

/// Compares a disk with what it held before the round and what was written since, and then takes what it holds.
fn judge(mount: &TestMount, round: u64, seed: u64, disk: Disk, content: &mut Vec<u8>, outcome: &Outcome) {
    let found = read(mount, disk);
    assert_eq!(found.len(), content.len(), "round {round}: size of {disk:?}");
    let mut under_way = Vec::new();
    for stream in disk.streams() {
        let done = outcome.done[stream];
        for (index, step) in plan::steps(seed, stream, done + 1).into_iter().enumerate() {
            let (span, bytes) = match step {
                Step::Write(span, _) => (span, plan::content(seed, stream, index, span)),
                Step::Discard(span) => (span, Aligned::new((span.end - span.start) as usize * SECTOR_BYTES)),
                Step::Sync { .. } => continue,
            };
            if index < done {
                content[range(span)].copy_from_slice(&bytes);
            } else {
                under_way.push((span, bytes));
            }
        }
    }
    if disk == Disk::Local {
        apply_mapped(seed, outcome.synced_pages, &found, content);
    }
    for (sector, (found, expected)) in (0..).zip(found.chunks(SECTOR_BYTES).zip(content.chunks(SECTOR_BYTES)))
    {
        let new = under_way.iter().find(|(span, _)| (span.start..span.end).contains(&sector));
        let is_new = new.is_some_and(|(span, bytes)| {
            let at = (sector - span.start) as usize * SECTOR_BYTES;
            found == &bytes[at..at + SECTOR_BYTES]
        });
        assert!(
            found == expected || is_new,
            "round {round}, seed {seed}, {disk:?} sector {sector}: holds {}, not {}; steps answered: {:?}",
            describe(found),
            describe(expected),
            outcome.done
        );
    }
    *content = found;
}

fn range(span: Span) -> std::ops::Range<usize> {
    span.start as usize * SECTOR_BYTES..span.end as usize * SECTOR_BYTES
}

fn read(mount: &TestMount, disk: Disk) -> Vec<u8> {
    std::fs::read(mount.path(disk.path())).unwrap()
}

/// Not a test: writes pages through a mapping, syncs each, and says so, until the daemon dies and the process with it,
/// by a signal, for there is nothing behind its memory any more.
#[test]
fn mapped_writer_process() {
    let Some(path) = std::env::var_os(MAPPED_FILE) else { return };
    let seed: u64 = std::env::var("TEST_SEED").unwrap().parse().unwrap();
    let file = open(Path::new(&path));
    let mut options = memmap2::MmapOptions::new();
    // SAFETY: nobody else uses these bytes of the disk, and the disk does not shrink.
    #[allow(unsafe_code)]
    let mut mapping =
        unsafe { options.offset(DISK_BYTES).len(MAPPED_BYTES as usize).map_mut(&file) }.unwrap();
    for step in 0.. {
        let (page, bytes) = mapped_page(seed, step);
        let at = (page * PAGE_BYTES) as usize;
        mapping[at..at + PAGE_BYTES as usize].copy_from_slice(&bytes);
        if mapping.flush_range(at, PAGE_BYTES as usize).is_err() {
            break;
        }
        // Written past the test harness, which would hold it back.
        rustix::io::write(rustix::stdio::stdout(), b"+").unwrap();
    }
    std::process::exit(0);
}

/// The page that a step of the mapped writer writes, and what.
fn mapped_page(seed: u64, step: usize) -> (u64, Vec<u8>) {
    let page = Random::new(seed ^ step as u64).below(MAPPED_BYTES / PAGE_BYTES);
    let label = |sector| Label { seed, disk: Disk::Local.number(), sector, writer: step as u64 };
    let first = DISK_SECTORS + page * PAGE_BYTES / 512;
    (page, (first..first + PAGE_BYTES / 512).flat_map(|sector| label(sector).bytes()).collect())
}

fn start_mapped_writer(disk: &Path, seed: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["mapped_writer_process", "--exact", "--nocapture", "--test-threads=1"])
        .env(MAPPED_FILE, disk)
        .env("TEST_SEED", seed.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until it has died of the daemon's death, and returns how many pages it had synced.
fn end_mapped_writer(mut writer: Child) -> usize {
    let mut said = Vec::new();
    writer.stdout.take().unwrap().read_to_end(&mut said).unwrap();
    writer.wait().unwrap();
    said.iter().filter(|&&byte| byte == b'+').count()
}

/// Puts what the mapping had synced into `content`, and takes the page that was under way as it was found, if each of its
/// sectors is the old or the new one.
fn apply_mapped(seed: u64, synced: usize, found: &[u8], content: &mut [u8]) {
    for step in 0..=synced {
        let (page, bytes) = mapped_page(seed, step);
        let start = (DISK_BYTES + page * PAGE_BYTES) as usize;
        for (at, new) in (start..).step_by(SECTOR_BYTES).zip(bytes.chunks(SECTOR_BYTES)) {
            if step < synced || found[at..at + SECTOR_BYTES] == *new {
                content[at..at + SECTOR_BYTES].copy_from_slice(new);
            }
        }
    }
}
