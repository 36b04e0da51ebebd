//! The engine's hot paths, each beside the same request on the plain file, in one run.
//!
//! `cargo bench --bench core` runs all; `cargo bench --bench core -- read` what has "read" in its name. The figures of
//! one group are to be read as ratios to its `plain`: a 4 KiB request of the host's page cache is what is measured. What
//! says "memory" lies in a plain array instead: the engine's own share, without a system call.

use std::hint::black_box;
use std::path::Path;

use cowdisk::format::{BaseId, LayerId};
use cowdisk::overlay::{BaseImage, LayerFiles, Overlay};
use cowdisk::storage::{FileStorage, MemStorage, Storage};
use cowdisk::units::Geometry;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use tempfile::TempDir;

const DISK: u64 = 256 << 20;
const BLOCK: u64 = 4096;

fn file() -> FileStorage {
    FileStorage::new(tempfile::tempfile().expect("a temporary file"), "bench")
}

fn full_file() -> FileStorage {
    let file = file();
    let chunk = vec![0x5a; 1 << 20];
    for at in (0..DISK).step_by(1 << 20) {
        file.write_at(at, &chunk).expect("fill");
    }
    file
}

fn overlay(folder: &TempDir, base: BaseImage, data: Box<dyn Storage>, map: Box<dyn Storage>) -> Overlay {
    let files = LayerFiles { data, map };
    let layer = LayerId::random().expect("random bytes");
    Overlay::create(&files, layer, Geometry::new(DISK, 4096, 0).expect("valid"), base.reference())
        .expect("create");
    let live = folder.path().join(cowdisk::overlay::live_map_name(layer));
    Overlay::open("bench", files, base, &live).expect("open")
}

fn on_files(folder: &TempDir, base: BaseImage) -> Overlay {
    overlay(folder, base, Box::new(file()), Box::new(file()))
}

fn in_memory(folder: &TempDir, base: BaseImage) -> Overlay {
    overlay(folder, base, Box::new(MemStorage::new()), Box::new(MemStorage::new()))
}

/// Makes every block the disk's own.
fn fill(disk: &Overlay) {
    for at in (0..DISK).step_by(1 << 20) {
        disk.write_at(at, &vec![1; 1 << 20]).expect("fill");
    }
}

/// The run directory of a service: shared memory where there is any.
fn run_folder() -> TempDir {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() }
        .expect("a temporary folder")
}

/// Offsets over the whole disk in an order that no read-ahead foresees.
fn scattered() -> impl FnMut() -> u64 {
    let mut n = 0u64;
    move || {
        n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
        n % (DISK / BLOCK) * BLOCK
    }
}

fn reads(c: &mut Criterion) {
    let folder = run_folder();
    let mut group = c.benchmark_group("read 4 KiB");
    let mut buf = vec![0; 4096];
    let (plain, mut next) = (full_file(), scattered());
    group.bench_function("plain", |b| b.iter(|| plain.read_at(next(), black_box(&mut buf)).expect("read")));
    let base = BaseImage::image(BaseId([1; 32]), Box::new(plain)).expect("a base");
    let on_base = overlay(&folder, base, Box::new(file()), Box::new(file()));
    group.bench_function("base", |b| b.iter(|| on_base.read_at(next(), black_box(&mut buf)).expect("read")));
    let full = on_files(&folder, BaseImage::blank());
    fill(&full);
    group.bench_function("data", |b| b.iter(|| full.read_at(next(), black_box(&mut buf)).expect("read")));
    let memory = MemStorage::new();
    memory.write_at(0, &vec![1; usize::try_from(DISK).expect("fits")]).expect("fill");
    group.bench_function("memory, plain", |b| {
        b.iter(|| memory.read_at(next(), black_box(&mut buf)).expect("read"));
    });
    let on_base = in_memory(&folder, BaseImage::image(BaseId([1; 32]), Box::new(memory)).expect("a base"));
    group.bench_function("memory, base", |b| {
        b.iter(|| on_base.read_at(next(), black_box(&mut buf)).expect("read"));
    });
    let full = in_memory(&folder, BaseImage::blank());
    fill(&full);
    group.bench_function("memory, data", |b| {
        b.iter(|| full.read_at(next(), black_box(&mut buf)).expect("read"));
    });
    group.finish();
}

fn writes(c: &mut Criterion) {
    let folder = run_folder();
    let mut group = c.benchmark_group("write 4 KiB");
    let buf = vec![7; 4096];
    let (plain, mut next) = (full_file(), scattered());
    group.bench_function("plain", |b| b.iter(|| plain.write_at(next(), black_box(&buf)).expect("write")));
    let full = on_files(&folder, BaseImage::blank());
    fill(&full);
    group.bench_function("overwrite", |b| b.iter(|| full.write_at(next(), black_box(&buf)).expect("write")));
    let full = in_memory(&folder, BaseImage::blank());
    fill(&full);
    group.bench_function("memory, overwrite", |b| {
        b.iter(|| full.write_at(next(), black_box(&buf)).expect("write"));
    });
    group.bench_function("plain, first", |b| {
        b.iter_batched(
            file,
            |file| file.write_at(next(), black_box(&buf)).map(|()| file),
            BatchSize::PerIteration,
        );
    });
    for (name, make) in
        [("first", on_files as fn(&TempDir, BaseImage) -> Overlay), ("memory, first", in_memory)]
    {
        group.bench_function(name, |b| {
            let fresh = || {
                let fresh = make(&folder, BaseImage::blank());
                fresh.write_at(DISK - BLOCK, &buf).expect("begin the session");
                fresh
            };
            b.iter_batched(
                fresh,
                |fresh| fresh.write_at(0, black_box(&buf)).map(|()| fresh),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// Offsets of `count` blocks no two of which are one run, moving on over the disk from call to call; never block 0.
fn apart(at: &mut u64, count: u64) -> Vec<u64> {
    (0..count)
        .map(|_| {
            *at = (*at + 2 * BLOCK) % DISK;
            (*at).max(2 * BLOCK)
        })
        .collect()
}

/// One block is overwritten and synced; what was new before it is made outside the time.
fn flushes(c: &mut Criterion) {
    let folder = run_folder();
    let mut group = c.benchmark_group("flush");
    group.sample_size(20);
    let buf = vec![7; 4096];
    let plain = full_file();
    plain.sync().expect("sync");
    for new_blocks in [0u64, 1, 1000] {
        let mut at = 0;
        group.bench_function(format!("plain, {new_blocks} new"), |b| {
            let renew = || {
                for place in apart(&mut at, new_blocks) {
                    plain.punch(place, BLOCK).and_then(|()| plain.write_at(place, &buf)).expect("write");
                }
            };
            let sync = |()| plain.write_at(0, &buf).and_then(|()| plain.sync()).expect("write and sync");
            b.iter_batched(renew, sync, BatchSize::PerIteration);
        });
        let disk = on_files(&folder, BaseImage::blank());
        disk.write_at(0, &buf).and_then(|()| disk.flush()).expect("begin the session");
        let mut at = 0;
        group.bench_function(format!("{new_blocks} new"), |b| {
            let renew = || {
                for place in apart(&mut at, new_blocks) {
                    disk.zero(place, BLOCK).and_then(|()| disk.write_at(place, &buf)).expect("write");
                }
            };
            let flush = |()| disk.write_at(0, &buf).and_then(|()| disk.flush()).expect("write and flush");
            b.iter_batched(renew, flush, BatchSize::PerIteration);
        });
    }
    group.finish();
}

/// What the map alone costs: seeks on a disk of which every other block is its own, and on one that is one run.
fn map(c: &mut Criterion) {
    let folder = run_folder();
    let mut group = c.benchmark_group("map");
    let mut next = scattered();
    let disk = in_memory(&folder, BaseImage::blank());
    for at in (0..DISK).step_by(2 * 4096) {
        disk.write_at(at, &[1; 4096]).expect("write");
    }
    group.bench_function("look up a block", |b| {
        b.iter(|| disk.next_data(black_box(next() & !BLOCK)).expect("seek"));
    });
    group.bench_function("walk 65,536 extents", |b| {
        b.iter(|| {
            let mut at = 0;
            while let Some(data) = disk.next_data(at).expect("seek") {
                at = disk.next_hole(data).expect("seek");
            }
            at
        });
    });
    fill(&disk);
    group.bench_function("see that 65,536 blocks are one run", |b| {
        b.iter(|| disk.next_hole(black_box(0)).expect("seek"));
    });
    group.finish();
}

criterion_group!(benches, reads, writes, flushes, map);
criterion_main!(benches);
