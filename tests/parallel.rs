//! Threads that share blocks, but no sector, never disturb each other: copy-ups, overwrites, discards and flushes of
//! the same block go on at the same time.
#![allow(clippy::cast_possible_truncation)] // sizes that the test made itself

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::sim::Rng;
use cowdisk::format::{BaseId, BlockState, LayerId};
use cowdisk::overlay::{BaseImage, LayerFiles, MapReader, Overlay};
use cowdisk::storage::{FileStorage, MemStorage, Storage};
use cowdisk::units::Geometry;

const THREADS: u64 = 4;
const SECTORS: u64 = 2048;

fn base_byte(sector: u64) -> u8 {
    (sector % 251) as u8 | 1
}

fn base() -> BaseImage {
    let storage = MemStorage::new();
    for sector in 0..SECTORS {
        storage.write_at(sector * 512, &[base_byte(sector); 512]).expect("write memory");
    }
    BaseImage::image(BaseId([1; 32]), Box::new(storage)).expect("a base")
}

fn hammer(data: Box<dyn Storage>, map: Box<dyn Storage>, block_bytes: u32) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let geometry = Geometry::new(SECTORS * 512, block_bytes, 0).expect("valid");
    let files = LayerFiles { data, map };
    Overlay::create(&files, LayerId([2; 16]), geometry, base().reference()).expect("create");
    let overlay = Overlay::open("test", files, base(), &folder.path().join("live")).expect("open");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn({
                    let overlay = &overlay;
                    move || work(overlay, thread)
                })
            })
            .collect();
        let (overlay, done) = (&overlay, &done);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                overlay.flush().expect("flush");
                overlay.checkpoint().expect("checkpoint");
            }
        });
        for worker in workers {
            worker.join().expect("a worker found only its own bytes");
        }
        done.store(true, Ordering::Relaxed);
    });
    overlay.close().expect("close");
}

/// Owns every sector whose number is `thread` modulo the number of threads, and checks it at each step.
fn work(overlay: &Overlay, thread: u64) {
    let mut rng = Rng(thread);
    let mut mine: Vec<u8> = (0..SECTORS / THREADS).map(|n| base_byte(n * THREADS + thread)).collect();
    for _ in 0..6000 {
        let n = rng.below(SECTORS / THREADS);
        let offset = (n * THREADS + thread) * 512;
        let mut found = [0; 512];
        overlay.read_at(offset, &mut found).expect("read");
        assert!(
            found == [mine[n as usize]; 512],
            "sector at {offset}: {} not {}",
            found[0],
            mine[n as usize]
        );
        mine[n as usize] = match rng.below(4) {
            0 => {
                overlay.zero(offset, 512).expect("zero");
                0
            }
            _ => {
                let byte = rng.next() as u8;
                overlay.write_at(offset, &[byte; 512]).expect("write");
                byte
            }
        };
    }
}

#[test]
fn neighbours_in_a_block_never_lose_a_write_in_memory() {
    for block_bytes in [4096, 65536] {
        hammer(Box::new(MemStorage::new()), Box::new(MemStorage::new()), block_bytes);
    }
}

#[test]
fn neighbours_in_a_block_never_lose_a_write_on_the_host() {
    let file = || FileStorage::new(tempfile::tempfile().expect("a temporary file"), "file");
    hammer(Box::new(file()), Box::new(file()), 4096);
}

/// Whoever sees that a block is data overwrites it without a lock; his flush has to commit the block, though another's
/// request made it data and is not answered yet. Once the state was seen before the commit could know of it.
#[test]
fn a_flush_commits_blocks_that_another_request_is_just_making_data() {
    const LEN: usize = 16 << 20;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    let file = |name: &str| {
        let mut options = std::fs::OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(false).open(path(name)).expect("a file");
        FileStorage::new(file, name)
    };
    let files = LayerFiles { data: Box::new(MemStorage::new()), map: Box::new(file("map")) };
    let geometry = Geometry::new(64 * LEN as u64, 4096, 0).expect("valid");
    Overlay::create(&files, LayerId([3; 16]), geometry, BaseImage::blank().reference()).expect("create");
    let overlay = Overlay::open("test", files, BaseImage::blank(), &path("live")).expect("open");
    let big = vec![1; LEN];
    for round in 0..64 {
        let at = round * LEN as u64;
        std::thread::scope(|scope| {
            scope.spawn(|| overlay.write_at(at, &big).expect("write"));
            while overlay.next_data(at).expect("seek") != Some(at) {
                std::hint::spin_loop();
            }
            overlay.write_at(at, &[2; 512]).expect("overwrite");
            overlay.flush().expect("flush");
            let durable =
                MapReader::open("test", file("map"), &path("no live map")).expect("the durable map");
            assert_eq!(durable.extent(at / 4096).state, BlockState::Data, "round {round}");
        });
    }
}
