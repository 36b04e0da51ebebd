//! Random operations on an overlay equal the same operations on plain bytes, through reopenings, kills of the daemon
//! and crashes of the host. The oracle is the promise of the README: a kill loses nothing that was answered; after a
//! crash each sector is as of the last completed flush or of a later write.
//!
//! `PROPTEST_CASES=5000 cargo test --release --test model` runs longer; a failure prints the shrunk case.

#![allow(clippy::cast_possible_truncation)] // sizes that the test made itself

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use common::sim::{Fate, Killed, Rng, SimFile, SimHost};
use cowdisk::format::{BaseId, BaseRef, LayerId};
use cowdisk::overlay::{BaseImage, LayerFiles, MapReader, Overlay, live_map_name};
use cowdisk::storage::{MemStorage, Storage};
use cowdisk::units::Geometry;
use proptest::prelude::*;
use tempfile::TempDir;

const SECTOR: usize = 512;
/// Bytes of each window in which the operations fall.
const WINDOW: u64 = 160 << 10;
const LAYER: LayerId = LayerId([0x5a; 16]);
const BASE: BaseId = BaseId([0xb5; 32]);

#[derive(Clone, Debug)]
enum Op {
    Write {
        at: u64,
        len: u64,
        byte: u8,
    },
    Read {
        at: u64,
        len: u64,
    },
    Zero {
        at: u64,
        len: u64,
    },
    ZeroAll,
    Preallocate {
        at: u64,
        len: u64,
    },
    Flush,
    Checkpoint,
    Grow(u64),
    Reopen,
    KillDaemon,
    CrashHost,
    /// The process is killed, or the host loses power, at the n-th change of the disk from here on.
    Doom {
        after: u64,
        host: bool,
    },
}

#[derive(Clone, Debug)]
struct Setup {
    block_bytes: u32,
    lead: u32,
    base_bytes: u64,
    disk_bytes: u64,
    seed: u64,
}

fn setups() -> impl Strategy<Value = Setup> {
    // Small disks, and disks over the border between two map pages.
    let disks = prop_oneof![3 => 1u64..1200, 1 => 129_100u64..131_000];
    (0u32..5, 0u32..128, disks, 0u64..=100, any::<u64>()).prop_map(|(shift, lead, sectors, base, seed)| {
        let block_bytes = 4096 << shift;
        let lead = if lead < 64 { 0 } else { (lead % 8) * 512 };
        let disk_bytes = sectors * 512;
        // Bases of any length: not even whole sectors.
        let base_bytes = (disk_bytes * base / 100).min(3 << 20).saturating_sub(base % 7);
        Setup { block_bytes, lead, base_bytes, disk_bytes, seed }
    })
}

/// Places favour the beginning, the end and the border between map pages; lengths favour sectors and blocks.
fn places() -> impl Strategy<Value = (u64, u64)> {
    let any_len = prop_oneof![Just(512u64), Just(4096), 1u64..20_000, (0u64..30).prop_map(|n| n * 4096)];
    let at = (0u64..3 * WINDOW, prop_oneof![Just(1u64), Just(512), Just(4096)])
        .prop_map(|(at, unit)| at / unit * unit);
    (at, any_len)
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (places(), any::<u8>()).prop_map(|((at, len), byte)| Op::Write { at, len, byte }),
        6 => places().prop_map(|(at, len)| Op::Read { at, len }),
        5 => places().prop_map(|(at, len)| Op::Zero { at, len }),
        1 => Just(Op::ZeroAll),
        1 => places().prop_map(|(at, len)| Op::Preallocate { at, len }),
        4 => Just(Op::Flush),
        1 => Just(Op::Checkpoint),
        1 => (1u64..300).prop_map(Op::Grow),
        1 => Just(Op::Reopen),
        1 => Just(Op::KillDaemon),
        1 => Just(Op::CrashHost),
        2 => (0u64..14, any::<bool>()).prop_map(|(after, host)| Op::Doom { after, host }),
    ]
}

/// The oracle: the bytes of the windows of the disk.
struct Model {
    size: u64,
    /// A size that was asked for and not answered.
    unanswered_size: Option<u64>,
    /// Beginning of each window, in bytes of the disk.
    windows: Vec<u64>,
    now: Vec<u8>,
    /// For each sector: its contents that a crash may leave, the last completed flush's first.
    allowed: Vec<Vec<Vec<u8>>>,
}

impl Model {
    fn new(setup: &Setup) -> Self {
        let border = 16_128 * u64::from(setup.block_bytes) - u64::from(setup.lead);
        let mut windows = vec![0];
        // Windows must not overlap, and must lie on the disk.
        if setup.disk_bytes > border + WINDOW {
            windows.push((border - WINDOW / 2) / 4096 * 4096);
        }
        let end = setup.disk_bytes.saturating_sub(WINDOW) / 512 * 512;
        if end > windows.last().expect("one") + WINDOW {
            windows.push(end);
        }
        let bytes: Vec<u8> = windows
            .iter()
            .flat_map(|&start| start..start + WINDOW)
            .map(|at| if at < setup.base_bytes { base_byte(setup.seed, at) } else { 0 })
            .collect();
        let allowed = bytes.chunks(SECTOR).map(|sector| vec![sector.to_vec()]).collect();
        Self { size: setup.disk_bytes, unanswered_size: None, windows, now: bytes, allowed }
    }

    /// A place on the disk for a place in the windows, with a length that stays in window and disk.
    fn place(&self, at: u64, len: u64) -> (u64, u64) {
        let at = at % (self.windows.len() as u64 * WINDOW);
        let start = self.windows[(at / WINDOW) as usize] + at % WINDOW;
        let room = (WINDOW - at % WINDOW).min(self.size.saturating_sub(start));
        if start >= self.size { (0, len.min(self.size).min(WINDOW)) } else { (start, len.min(room)) }
    }

    /// Where a byte of the disk lies in the windows.
    fn index(&self, at: u64) -> usize {
        let (number, start) = (0u64..)
            .zip(&self.windows)
            .find(|(_, start)| (**start..**start + WINDOW).contains(&at))
            .expect("places lie in windows");
        (number * WINDOW + at - start) as usize
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let from = self.index(at);
        self.now[from..from + bytes.len()].copy_from_slice(bytes);
        for sector in from / SECTOR..(from + bytes.len()).div_ceil(SECTOR) {
            let content = self.now[sector * SECTOR..(sector + 1) * SECTOR].to_vec();
            self.allowed[sector].push(content);
        }
    }

    fn flushed(&mut self) {
        for (sector, allowed) in self.allowed.iter_mut().enumerate() {
            *allowed = vec![self.now[sector * SECTOR..(sector + 1) * SECTOR].to_vec()];
        }
    }

    fn read_all(&self, overlay: &Overlay) -> Vec<u8> {
        let mut all = Vec::new();
        for &start in &self.windows {
            let mut bytes = vec![0; WINDOW as usize];
            let len = WINDOW.min(overlay.size().saturating_sub(start)) as usize;
            overlay.read_at(start, &mut bytes[..len]).expect("read a window");
            all.extend(bytes);
        }
        all
    }

    /// Nothing that was answered may be missing.
    fn check_exact(&self, overlay: &Overlay) {
        let found = self.read_all(overlay);
        if let Some(at) = found.iter().zip(&self.now).position(|(found, expected)| found != expected) {
            panic!("window byte {at} is {:#x}, not {:#x}", found[at], self.now[at]);
        }
    }

    /// After a crash: each sector is one of those allowed. What was found is the truth from now on.
    fn check_after_crash(&mut self, overlay: &Overlay) {
        let found = self.read_all(overlay);
        for (sector, content) in found.chunks(SECTOR).enumerate() {
            assert!(
                self.allowed[sector].iter().any(|allowed| allowed == content),
                "window sector {sector} begins with {:#x}: none of the {} contents that a crash may leave",
                content[0],
                self.allowed[sector].len(),
            );
        }
        self.now = found;
        self.flushed();
    }
}

fn base_byte(seed: u64, at: u64) -> u8 {
    // Runs of zeroes of several blocks, so that the base has holes.
    let word = Rng(seed ^ (at / 4096 / 5)).next();
    if word.is_multiple_of(3) { 0 } else { (word >> 8) as u8 ^ (at / 512) as u8 | 1 }
}

/// The host that the overlay lives on: two simulated files, and a live map on the real one.
struct World {
    host: SimHost,
    data: SimFile,
    map: SimFile,
    folder: TempDir,
    setup: Setup,
    overlay: Option<Overlay>,
}

impl World {
    fn new(setup: &Setup) -> Self {
        let host = SimHost::new(setup.seed);
        let (data, map) = (SimFile::new(&host), SimFile::new(&host));
        let geometry =
            Geometry::new(setup.disk_bytes, setup.block_bytes, setup.lead).expect("a valid geometry");
        let files = LayerFiles { data: Box::new(data.clone()), map: Box::new(map.clone()) };
        Overlay::create(&files, LAYER, geometry, base(setup).reference()).expect("create");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut world = Self { host, data, map, folder, setup: setup.clone(), overlay: None };
        world.open();
        world
    }

    fn live_map(&self) -> PathBuf {
        self.folder.path().join(live_map_name(LAYER))
    }

    /// Opens it; after a crash the boot is simulated to be another one, in which nobody misses the live map.
    fn open_after(&mut self, crash: bool) {
        let files = LayerFiles { data: Box::new(self.data.clone()), map: Box::new(self.map.clone()) };
        let open = if crash { Overlay::open_accepting_loss } else { Overlay::open };
        self.overlay = Some(open("test", files, base(&self.setup), &self.live_map()).expect("open"));
    }

    fn open(&mut self) {
        self.open_after(false);
    }

    fn overlay(&self) -> &Overlay {
        self.overlay.as_ref().expect("open between operations")
    }

    fn kill(&mut self) {
        self.overlay = None;
        self.host.set_fate(Fate::Fine);
    }

    fn crash(&mut self) {
        self.kill();
        std::fs::remove_file(self.live_map()).expect("the live map of the boot that ended");
        self.data.crash();
        self.map.crash();
    }
}

fn base(setup: &Setup) -> BaseImage {
    if setup.base_bytes == 0 {
        return BaseImage::blank();
    }
    let storage = MemStorage::new();
    let bytes: Vec<u8> = (0..setup.base_bytes).map(|at| base_byte(setup.seed, at)).collect();
    for (block, chunk) in (0u64..).zip(bytes.chunks(4096)) {
        if chunk.iter().any(|&byte| byte != 0) {
            storage.write_at(block * 4096, chunk).expect("write memory");
        }
    }
    storage.set_len(setup.base_bytes).expect("size memory");
    BaseImage::image(BASE, Box::new(storage)).expect("a base")
}

/// Does one operation on the overlay and then on the model. What was not answered is allowed, and not demanded.
fn apply(world: &mut World, model: &mut Model, op: &Op) {
    match *op {
        Op::Write { at, len, byte } => {
            let (at, len) = model.place(at, len);
            let bytes: Vec<u8> =
                (0..len).map(|n| if byte < 40 { 0 } else { byte ^ (n / 512) as u8 }).collect();
            let before = model.now.clone();
            model.write(at, &bytes);
            let now = std::mem::replace(&mut model.now, before);
            world.overlay().write_at(at, &bytes).expect("write");
            model.now = now;
        }
        Op::Read { at, len } => {
            let (at, len) = model.place(at, len);
            let mut bytes = vec![0xcc; len as usize];
            world.overlay().read_at(at, &mut bytes).expect("read");
            let from = model.index(at);
            assert!(bytes == model.now[from..from + bytes.len()], "read of {len} at {at}");
        }
        Op::Zero { at, len } => {
            let (at, len) = model.place(at, len);
            let before = model.now.clone();
            model.write(at, &vec![0; len as usize]);
            let now = std::mem::replace(&mut model.now, before);
            world.overlay().zero(at, len).expect("zero");
            model.now = now;
        }
        Op::ZeroAll => {
            let before = model.now.clone();
            for start in model.windows.clone() {
                model.write(start, &vec![0; WINDOW.min(model.size.saturating_sub(start)) as usize]);
            }
            let now = std::mem::replace(&mut model.now, before);
            world.overlay().zero(0, model.size).expect("zero the disk");
            model.now = now;
        }
        Op::Preallocate { at, len } => {
            let (at, len) = model.place(at, len);
            world.overlay().preallocate(at, len).expect("preallocate");
        }
        Op::Flush => {
            world.overlay().flush().expect("flush");
            model.flushed();
        }
        Op::Checkpoint => {
            world.overlay().checkpoint().expect("checkpoint");
            model.flushed();
        }
        Op::Grow(sectors) => {
            model.unanswered_size = Some(model.size + sectors * 512);
            world.overlay().grow(model.size + sectors * 512).expect("grow");
            model.size = model.unanswered_size.take().expect("just set");
        }
        Op::Reopen => {
            let overlay = world.overlay.take().expect("open");
            overlay.close().expect("close");
            assert!(!world.live_map().exists(), "a clean close removes the live map");
            model.flushed();
            world.open();
        }
        Op::KillDaemon => {
            world.kill();
            world.open();
            model.check_exact(world.overlay());
        }
        Op::CrashHost => {
            world.crash();
            world.open_after(true);
            model.check_after_crash(world.overlay());
        }
        Op::Doom { .. } => unreachable!("handled by run"),
    }
}

fn run(setup: &Setup, ops: &[Op]) {
    let mut world = World::new(setup);
    let mut model = Model::new(setup);
    let mut doom_is_host = false;
    for op in ops {
        if let Op::Doom { after, host } = *op {
            world.host.set_fate(Fate::KillAfter(after));
            doom_is_host = host;
            continue;
        }
        let died = catch_unwind(AssertUnwindSafe(|| apply(&mut world, &mut model, op)));
        match died {
            Ok(()) => continue,
            Err(cause) if cause.is::<Killed>() => {}
            Err(cause) => std::panic::resume_unwind(cause),
        }
        // What was under way was not answered: both its old and its new contents are allowed, sector by sector.
        if doom_is_host {
            if world.live_map().exists() {
                world.crash();
            } else {
                world.kill();
                world.data.crash();
                world.map.crash();
            }
        } else {
            world.kill();
        }
        world.open_after(doom_is_host);
        let size = world.overlay().size();
        assert!(size == model.size || Some(size) == model.unanswered_size, "size {size}");
        (model.size, model.unanswered_size) = (size, None);
        if doom_is_host {
            model.check_after_crash(world.overlay());
        } else {
            check_after_kill(&mut model, world.overlay(), op);
        }
    }
    model.check_exact(world.overlay());
    check_map(&world);
    world.kill();
    world.open();
    model.check_exact(world.overlay());
}

/// After a kill within `op`, only the sectors that it touched may have changed.
fn check_after_kill(model: &mut Model, overlay: &Overlay, op: &Op) {
    let found = model.read_all(overlay);
    let touched = match *op {
        Op::Write { at, len, .. } | Op::Zero { at, len } => {
            let (at, len) = model.place(at, len);
            let from = model.index(at);
            from / SECTOR..(from + len as usize).div_ceil(SECTOR)
        }
        Op::ZeroAll => 0..model.allowed.len(),
        _ => 0..0,
    };
    for (sector, content) in found.chunks(SECTOR).enumerate() {
        let exact = model.now[sector * SECTOR..(sector + 1) * SECTOR] == *content;
        let new = touched.contains(&sector) && model.allowed[sector].last().is_some_and(|new| new == content);
        assert!(exact || new, "window sector {sector} lost what was answered before the kill in {op:?}");
    }
    for (sector, content) in found.chunks(SECTOR).enumerate() {
        model.now[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(content);
    }
}

/// A reader of the map, beside the open overlay, sees states that fit what the overlay says of its holes.
fn check_map(world: &World) {
    let reader = MapReader::open("test", world.map.clone(), &world.live_map()).expect("read the map");
    assert_eq!(reader.superblock().geometry, world.overlay().geometry());
    let covered: u64 = reader.extents().map(|extent| extent.span.len()).sum();
    assert_eq!(covered, world.overlay().geometry().blocks());
    let mut at = 0;
    while let Some(data) = world.overlay().next_data(at).expect("seek data") {
        assert!(data >= at);
        at = world.overlay().next_hole(data).expect("seek hole");
        assert!(at > data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_overlay_equals_plain_bytes_through_kills_and_crashes(
        setup in setups(),
        ops in prop::collection::vec(ops(), 20..200),
    ) {
        run(&setup, &ops);
    }
}

#[test]
fn a_base_reference_names_content_and_size() {
    let setup = Setup { block_bytes: 4096, lead: 0, base_bytes: 5000, disk_bytes: 8192, seed: 1 };
    assert_eq!(base(&setup).reference(), BaseRef::Image { id: BASE, size: 5000 });
}
