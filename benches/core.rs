//! The engine's hot paths, each beside the same request on the plain file, in one run.
//!
//! `cargo bench --bench core` runs all; `cargo bench --bench core -- read` what has "read" in its name. The figures of
//! one group are to be read as ratios to its `plain`: a 4 KiB request of the host's page cache is what is measured.

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
    let full = overlay(&folder, BaseImage::blank(), Box::new(file()), Box::new(file()));
    for at in (0..DISK).step_by(1 << 20) {
        full.write_at(at, &vec![1; 1 << 20]).expect("fill");
    }
    group.bench_function("data", |b| b.iter(|| full.read_at(next(), black_box(&mut buf)).expect("read")));
    let memory =
        overlay(&folder, BaseImage::blank(), Box::new(MemStorage::new()), Box::new(MemStorage::new()));
    group.bench_function("map lookup alone", |b| {
        b.iter(|| memory.read_at(next(), black_box(&mut buf)).expect("read zeroes"));
    });
    group.finish();
}

fn writes(c: &mut Criterion) {
    let folder = run_folder();
    let mut group = c.benchmark_group("write 4 KiB");
    let buf = vec![7; 4096];
    let (plain, mut next) = (full_file(), scattered());
    group.bench_function("plain", |b| b.iter(|| plain.write_at(next(), black_box(&buf)).expect("write")));
    let full = overlay(&folder, BaseImage::blank(), Box::new(file()), Box::new(file()));
    for at in (0..DISK).step_by(1 << 20) {
        full.write_at(at, &vec![1; 1 << 20]).expect("fill");
    }
    group.bench_function("overwrite", |b| b.iter(|| full.write_at(next(), black_box(&buf)).expect("write")));
    group.bench_function("plain, first", |b| {
        b.iter_batched(
            file,
            |file| file.write_at(next(), black_box(&buf)).map(|()| file),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("first", |b| {
        let fresh = || {
            let fresh = overlay(&folder, BaseImage::blank(), Box::new(file()), Box::new(file()));
            fresh.write_at(DISK - BLOCK, &buf).expect("begin the session");
            fresh
        };
        b.iter_batched(
            fresh,
            |fresh| fresh.write_at(0, black_box(&buf)).map(|()| fresh),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

fn flushes(c: &mut Criterion) {
    let folder = run_folder();
    let mut group = c.benchmark_group("flush");
    group.sample_size(20);
    let buf = vec![7; 4096];
    let plain = full_file();
    plain.sync().expect("sync");
    group.bench_function("plain: one block, sync", |b| {
        b.iter(|| plain.write_at(0, &buf).and_then(|()| plain.sync()).expect("write and sync"));
    });
    for new_blocks in [0u64, 1, 1000] {
        let disk = overlay(&folder, BaseImage::blank(), Box::new(file()), Box::new(file()));
        let mut at = 0;
        group.bench_function(format!("one block, flush with {new_blocks} new"), |b| {
            b.iter(|| {
                disk.write_at(0, &buf).expect("write");
                for _ in 0..new_blocks {
                    // Every second block, so that no two of them are one run.
                    at = (at + 2 * BLOCK) % DISK;
                    disk.zero(at, BLOCK).and_then(|()| disk.write_at(at, &buf)).expect("write");
                }
                disk.flush().expect("flush");
            });
        });
    }
    group.finish();
}

fn extents(c: &mut Criterion) {
    let folder = run_folder();
    let disk = overlay(&folder, BaseImage::blank(), Box::new(MemStorage::new()), Box::new(MemStorage::new()));
    for at in (0..DISK).step_by(64 << 10) {
        disk.write_at(at, &[1; 4096]).expect("write");
    }
    c.bench_function("walk 8,192 extents", |b| {
        b.iter(|| {
            let mut at = 0;
            while let Some(data) = disk.next_data(at).expect("seek") {
                at = disk.next_hole(data).expect("seek");
            }
            at
        });
    });
}

criterion_group!(benches, reads, writes, flushes, extents);
criterion_main!(benches);
