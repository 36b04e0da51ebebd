//! The n-th operation on the host's disk fails, for every n of a run. The error reaches the caller; what was answered
//! before stays; after a failed sync nothing is written any more until the overlay is opened again, and then every
//! sector is as of the last completed flush or of a later write.
#![allow(clippy::cast_possible_truncation)] // sizes that the test made itself

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::sim::{Fate, Rng, SimFile, SimHost};
use cowdisk::format::{BaseId, LayerId};
use cowdisk::overlay::{BaseImage, LayerFiles, Overlay};
use cowdisk::storage::{MemStorage, Storage};
use cowdisk::units::Geometry;
use cowdisk::{Error, ErrorKind, Result};

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
        Overlay::open("test", self.files(), BaseImage::blank(), &self.live_map())
    }

    fn live_map(&self) -> PathBuf {
        self.folder.path().join("live")
    }

    /// Cuts the host's power while the layer is open, and opens it in the next boot.
    fn cut_power_and_open(&self) -> Overlay {
        self.data.crash();
        self.map.crash();
        std::fs::remove_file(self.live_map()).expect("the live map of the boot that ended");
        Overlay::open_accepting_loss("test", self.files(), BaseImage::blank(), &self.live_map())
            .expect("open after the power cut")
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
        let overlay = world.cut_power_and_open();
        for (at, byte) in [(0, 1), (16384, 3)] {
            let mut found = [0; 4096];
            overlay.read_at(at, &mut found).expect("read");
            assert_eq!(found, [byte; 4096], "flushed before the power cut, failure at operation {nth}");
        }
    }
}

/// The beginning of a session was in the host's cache and nowhere else, and so was what the session wrote. Opened again, the
/// disk once counted as closed before, and showed that as if it were on the disk.
#[test]
fn what_the_host_failed_to_write_is_not_read_though_the_beginning_of_the_session_is_lost_as_well() {
    let mut lost = 0;
    for seed in 0..32 {
        let world = World::new(seed);
        let read = |overlay: &Overlay| {
            let mut found = [0; 4096];
            overlay.read_at(0, &mut found).expect("read");
            found
        };
        let overlay = world.open().expect("open");
        overlay.write_at(0, &[1; 4096]).and_then(|()| overlay.flush()).expect("write and flush");
        overlay.close().expect("close");
        let overlay = world.open().expect("open");
        overlay.write_at(0, &[2; 4096]).expect("write");
        for file in [&world.map, &world.data] {
            world.host.set_fate(Fate::FailAfter(0, EIO));
            file.sync().expect_err("the host writes nothing");
        }
        drop(overlay);
        world.host.set_fate(Fate::Fine);
        let overlay = world.open().expect("open again");
        let seen = read(&overlay);
        overlay.flush().expect("flush");
        drop(overlay);
        let left = read(&world.cut_power_and_open());
        assert!(left == seen, "what was read is not what the disk held, seed {seed}");
        lost += u32::from(seen != [2; 4096]);
    }
    assert!(lost > 0, "the host has written everything each time");
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

/// Storage whose reads fail while a switch is on, or that has lost what waited in its cache.
#[derive(Debug, Default)]
struct Unreadable {
    inner: MemStorage,
    fails: Arc<AtomicBool>,
    has_lost: Arc<AtomicBool>,
}

impl Storage for Unreadable {
    fn size(&self) -> Result<u64> {
        self.inner.size()
    }
    fn allocated(&self) -> Result<u64> {
        self.inner.allocated()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        match self.fails.load(Ordering::Relaxed) {
            true => Err(Error::io("read (simulated)", std::io::Error::from_raw_os_error(EIO))),
            false => self.inner.read_at(offset, buf),
        }
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.inner.write_at(offset, buf)
    }
    fn write_durable_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.inner.write_durable_at(offset, buf)
    }
    fn check_written(&self) -> Result<()> {
        match self.has_lost.load(Ordering::Relaxed) {
            true => Err(Error::io("write back (simulated)", std::io::Error::from_raw_os_error(EIO))),
            false => Ok(()),
        }
    }
    fn sync(&self) -> Result<()> {
        self.check_written()
    }
    fn drop_cache(&self) -> Result<()> {
        self.inner.drop_cache()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }
    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.allocate(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.punch(offset, len)
    }
    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        self.inner.next_data(offset)
    }
    fn next_hole(&self, offset: u64) -> Result<u64> {
        self.inner.next_hole(offset)
    }
}

#[test]
fn a_read_error_of_base_or_data_fails_its_request_and_nothing_else() {
    let storage = || {
        let fails = Arc::new(AtomicBool::new(false));
        (Unreadable { fails: fails.clone(), ..Unreadable::default() }, fails)
    };
    let ((base, base_fails), (data, data_fails)) = (storage(), storage());
    base.write_at(0, &[0xb5; 65536]).expect("write memory");
    let base = BaseImage::image(BaseId([1; 32]), Box::new(base)).expect("a base");
    let files = LayerFiles { data: Box::new(data), map: Box::new(MemStorage::new()) };
    let geometry = Geometry::new(65536, 4096, 0).expect("valid");
    Overlay::create(&files, LayerId([4; 16]), geometry, base.reference()).expect("create");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let overlay = Overlay::open("test", files, base, &folder.path().join("live")).expect("open");
    overlay.write_at(0, &[1; 4096]).and_then(|()| overlay.flush()).expect("write and flush");
    let read = |at| {
        let mut found = [0; 512];
        overlay.read_at(at, &mut found).map(|()| found[0])
    };
    let (in_data, in_base) = (0, 8192);

    data_fails.store(true, Ordering::Relaxed);
    assert_eq!(read(in_data).expect_err("the data cannot be read").kind(), ErrorKind::Io);
    assert_eq!(read(in_base).expect("the base can"), 0xb5);
    overlay.write_at(in_data, &[2; 512]).expect("an overwrite reads nothing");
    data_fails.store(false, Ordering::Relaxed);

    base_fails.store(true, Ordering::Relaxed);
    assert_eq!(read(in_base).expect_err("the base cannot be read").kind(), ErrorKind::Io);
    // The rest of the block has to come from the base.
    let copy_up = overlay.write_at(in_base, &[3; 512]);
    assert_eq!(copy_up.expect_err("the base cannot be read").kind(), ErrorKind::Io);
    overlay.write_at(16384, &[4; 4096]).expect("a whole block reads nothing");
    overlay.flush().expect("a failed read latches nothing");
    base_fails.store(false, Ordering::Relaxed);

    let found = [in_data, 512, in_base, 16384].map(|at| read(at).expect("all can be read again"));
    assert_eq!(found, [2, 1, 0xb5, 4]);
    overlay.write_at(in_base, &[3; 512]).expect("and written to");
    overlay.close().expect("close");
}

/// Its contents, read back for the journal, may be those of before the write.
#[test]
fn a_flush_of_a_new_block_fails_where_the_host_could_not_write_it_back() {
    let has_lost = Arc::new(AtomicBool::new(false));
    let data = Unreadable { has_lost: has_lost.clone(), ..Unreadable::default() };
    let files = LayerFiles { data: Box::new(data), map: Box::new(MemStorage::new()) };
    let geometry = Geometry::new(65536, 4096, 0).expect("valid");
    Overlay::create(&files, LayerId([4; 16]), geometry, BaseImage::blank().reference()).expect("create");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let live = folder.path().join("live");
    let overlay = Overlay::open("test", files, BaseImage::blank(), &live).expect("open");
    overlay.write_at(0, &[1; 4096]).and_then(|()| overlay.flush()).expect("write and flush");
    assert_eq!(overlay.commit_counts().records_with_contents, 1);

    overlay.write_at(8192, &[2; 4096]).expect("write");
    has_lost.store(true, Ordering::Relaxed);
    assert_eq!(overlay.flush().expect_err("it is not on the disk").kind(), ErrorKind::Io);
    assert!(overlay.is_latched());
    has_lost.store(false, Ordering::Relaxed);
    overlay.flush().expect_err("a second flush would prove nothing");
    overlay.write_at(0, &[3; 512]).expect_err("writes are refused");
}
