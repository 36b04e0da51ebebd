//! The n-th operation on the host's disk fails, for every n of a run. The error reaches the caller; what was answered
//! before stays; after a failed sync nothing is written any more until the overlay is opened again, and then every
//! sector is as of the last completed flush or of a later write.
#![allow(clippy::cast_possible_truncation)] // sizes that the test made itself

mod common;

use common::sim::{Fate, Rng, SimFile, SimHost};
use cowdisk::format::LayerId;
use cowdisk::overlay::{BaseImage, LayerFiles, Overlay};
use cowdisk::units::Geometry;
use cowdisk::{ErrorKind, Result};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const SECTORS: u64 = 256;

/// What each sector may hold: the oldest content is that of the last completed flush.
struct Oracle(Vec<Vec<u8>>);

impl Oracle {
    fn flushed(&mut self) {
        for allowed in &mut self.0 {
            allowed.drain(..allowed.len() - 1);
        }
    }

    fn check(&mut self, overlay: &Overlay, exact: bool) {
        for (sector, allowed) in (0u64..).zip(&mut self.0) {
            let mut found = [0; 512];
            overlay.read_at(sector * 512, &mut found).expect("read");
            assert!(found.iter().all(|byte| *byte == found[0]), "sector {sector} is torn");
            let fits = if exact { allowed.last() == Some(&found[0]) } else { allowed.contains(&found[0]) };
            assert!(fits, "sector {sector} holds {}, allowed are {allowed:?}", found[0]);
            *allowed = vec![found[0]];
        }
    }
}

struct World {
    host: SimHost,
    data: SimFile,
    map: SimFile,
    folder: tempfile::TempDir,
}

impl World {
    fn new(seed: u64) -> Self {
        let host = SimHost::new(seed);
        let (data, map) = (SimFile::new(&host), SimFile::new(&host));
        let world = Self { host, data, map, folder: tempfile::tempdir().expect("a temporary folder") };
        let geometry = Geometry::new(SECTORS * 512, 4096, 0).expect("valid");
        Overlay::create(&world.files(), LayerId([4; 16]), geometry, BaseImage::blank().reference())
            .expect("create");
        world
    }

    fn files(&self) -> LayerFiles {
        LayerFiles { data: Box::new(self.data.clone()), map: Box::new(self.map.clone()) }
    }

    fn open(&self) -> Result<Overlay> {
        Overlay::open("test", self.files(), BaseImage::blank(), &self.folder.path().join("live"))
    }
}

/// Does steps until one fails, or all are done; whether one failed.
fn steps(overlay: &Overlay, oracle: &mut Oracle, rng: &mut Rng, count: usize) -> bool {
    for step in 0..count {
        let sector = rng.below(SECTORS - 20);
        let sectors = 1 + rng.below(20);
        let byte = if rng.below(4) == 0 { 0 } else { rng.next() as u8 | 1 };
        let result = match (step % 7, byte) {
            (6, _) => overlay.flush(),
            (_, 0) => overlay.zero(sector * 512, sectors * 512),
            (_, byte) => overlay.write_at(sector * 512, &vec![byte; sectors as usize * 512]),
        };
        if step % 7 != 6 {
            // A request that failed may have been done in part.
            for allowed in &mut oracle.0[sector as usize..(sector + sectors) as usize] {
                allowed.push(byte);
            }
        } else if result.is_ok() {
            oracle.flushed();
        }
        if result.is_err() {
            return true;
        }
    }
    false
}

fn run(seed: u64, nth: u64, errno: i32) -> bool {
    let world = World::new(seed);
    let mut oracle = Oracle(vec![vec![0]; SECTORS as usize]);
    let mut rng = Rng(seed);
    let overlay = world.open().expect("open");
    world.host.set_fate(Fate::FailAfter(nth, errno));
    let failed = steps(&overlay, &mut oracle, &mut rng, 40);
    world.host.set_fate(Fate::Fine);
    let latched = overlay.flush().is_err();
    if latched {
        assert!(failed, "the latch closes at a failure");
        for refused in
            [overlay.write_at(0, &[1; 512]), overlay.zero(0, 512), overlay.flush(), overlay.grow(1 << 20)]
        {
            assert_eq!(refused.expect_err("refused after a failed sync").kind(), ErrorKind::Io);
        }
    } else {
        // Only the request that failed is in doubt; what is found holds from then on.
        oracle.check(&overlay, false);
    }
    drop(overlay);
    let overlay = world.open().expect("open again");
    oracle.check(&overlay, !latched);
    assert!(!steps(&overlay, &mut oracle, &mut rng, 20), "after opening again all is well");
    overlay.close().expect("close");
    let overlay = world.open().expect("open after a clean end");
    oracle.check(&overlay, true);
    failed
}

#[test]
fn every_failing_operation_is_reported_and_loses_nothing_flushed() {
    for errno in [EIO, ENOSPC] {
        for seed in 0..2 {
            let mut failures = 0;
            let total = {
                let world = World::new(seed);
                let overlay = world.open().expect("open");
                let before = world.host.operations();
                let mut oracle = Oracle(vec![vec![0]; SECTORS as usize]);
                steps(&overlay, &mut oracle, &mut Rng(seed), 40);
                world.host.operations() - before
            };
            for nth in 0..total {
                failures += u64::from(run(seed, nth, errno));
            }
            assert!(failures == total, "{failures} of {total} failures reached the caller");
        }
    }
}

/// A sync that fails leaves the new content in the host's cache and nowhere else. Opened again in the same boot, the
/// overlay once took such a journal record for durable, built upon it, and was refused after the next power cut.
#[test]
fn what_a_failed_sync_left_in_the_cache_is_not_built_upon() {
    for nth in 0..8 {
        let world = World::new(1);
        let overlay = world.open().expect("open");
        overlay.write_at(0, &[1; 4096]).and_then(|()| overlay.flush()).expect("write and flush");
        overlay.write_at(8192, &[2; 4096]).expect("write");
        world.host.set_fate(Fate::FailAfter(nth, EIO));
        let _ = overlay.flush();
        world.host.set_fate(Fate::Fine);
        drop(overlay);
        let overlay = world.open().expect("open again");
        overlay.write_at(16384, &[3; 4096]).and_then(|()| overlay.flush()).expect("write and flush");
        drop(overlay);
        world.data.crash();
        world.map.crash();
        let live = world.folder.path().join("live");
        std::fs::remove_file(&live).expect("the live map of the boot that ended");
        let overlay = Overlay::open_accepting_loss("test", world.files(), BaseImage::blank(), &live);
        let overlay = overlay.expect("open after the power cut");
        for (at, byte) in [(0, 1), (16384, 3)] {
            let mut found = [0; 4096];
            overlay.read_at(at, &mut found).expect("read");
            assert_eq!(found, [byte; 4096], "flushed before the power cut, failure at operation {nth}");
        }
    }
}

#[test]
fn a_full_disk_fails_the_write_that_did_not_fit_and_nothing_else() {
    let world = World::new(9);
    let overlay = world.open().expect("open");
    overlay.write_at(0, &[7; 8192]).expect("write");
    world.host.set_fate(Fate::FailAfter(0, ENOSPC));
    assert_eq!(overlay.write_at(65536, &[8; 4096]).expect_err("the disk is full").kind(), ErrorKind::NoSpace);
    overlay.write_at(65536, &[8; 4096]).expect("there is room again");
    overlay.flush().expect("flush");
    let mut found = [0; 4096];
    overlay.read_at(65536, &mut found).expect("read");
    assert_eq!(found, [8; 4096]);
}
