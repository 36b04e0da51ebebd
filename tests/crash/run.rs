//! Scripts of requests, and the overlays that they run on.

use std::path::Path;
use std::sync::Arc;

use cowdisk::Result;
use cowdisk::overlay::{LayerFiles, Overlay};

use crate::common::live::LiveCopy;
use crate::common::record::{Content, Event, Log, RecordedFile, SECTOR, SharedLog, content};
use crate::common::sim::Rng;
use crate::disk::{Disk, filled};
use crate::oracle::{Asked, Mark};
use crate::{DATA, MAP};

#[derive(Clone, Debug)]
pub enum Op {
    /// A window, a place in it and a length, in bytes.
    Write(usize, u64, u64),
    WriteZeroes(usize, u64, u64),
    Discard(usize, u64, u64),
    DiscardAll,
    /// Half a sector into every second block of the first window, from this one on: many changes in one commit.
    Scatter(u64),
    /// The same blocks discarded.
    ScatterDiscard(u64),
    Preallocate(usize, u64, u64),
    /// A block discarded and flushed, then written to and flushed: the commit of a new block, with its contents.
    Renew(usize, u64),
    Flush,
    Checkpoint,
    /// Sectors more.
    Grow(u64),
    /// Closed and opened.
    Reopen,
    /// The daemon dies; the next one takes the live map up.
    Kill,
}

pub fn random_op(disk: &Disk, rng: &mut Rng) -> Op {
    let window = rng.below(disk.windows.len() as u64) as usize;
    let unit = [1, 512, 4096, 4096][rng.below(4) as usize];
    let at = rng.below(disk.windows[window].1) / unit * unit;
    let len = match rng.below(4) {
        0 => 1 + rng.below(6000),
        1 => 512 * (1 + rng.below(16)),
        _ => 4096 * (1 + rng.below(4)),
    };
    match rng.below(44) {
        0..16 => Op::Write(window, at, len),
        16..18 => Op::WriteZeroes(window, at, len),
        18..23 => Op::Discard(window, at, len),
        23 => Op::DiscardAll,
        24 if disk.is_wide() => Op::Scatter(rng.below(2)),
        25 if disk.is_wide() => Op::ScatterDiscard(rng.below(2)),
        24 | 25 => Op::Preallocate(window, at, len),
        26..33 => Op::Flush,
        33..36 => Op::Checkpoint,
        36 => Op::Grow(1 + rng.below(40)),
        37..39 => Op::Reopen,
        39 => Op::Kill,
        _ => Op::Renew(window, at),
    }
}

/// A script: requests that only lead up to it, and those whose every moment is tried.
pub fn random_script(disk: &Disk, rng: &mut Rng) -> (Vec<Op>, Vec<Op>) {
    let mut before = Vec::new();
    if rng.below(4) == 0 {
        // So many commits that the journal is full, or nearly so.
        for _ in 0..39 + rng.below(6) {
            before.push(Op::Renew(0, rng.below(disk.windows[0].1) / 4096 * 4096));
        }
        for _ in 0..rng.below(8) {
            before.push(Op::Discard(0, rng.below(disk.windows[0].1) / 4096 * 4096, 4096));
            before.push(Op::Flush);
        }
    }
    if disk.is_wide() && rng.below(2) == 0 {
        return (before, laps(disk, rng));
    }
    let count = 10 + rng.below(20);
    (before, (0..count).map(|_| random_op(disk, rng)).collect())
}

/// Records of several sectors, each over one of an earlier lap of the journal: what is torn shows the older one's changes
/// in its place, and they are of blocks that have another state by now.
fn laps(disk: &Disk, rng: &mut Rng) -> Vec<Op> {
    let mut ops = Vec::new();
    for _ in 0..1 + rng.below(2) {
        let first = rng.below(2);
        // A checkpoint right after a change writes no record, and begins the journal anew.
        ops.extend([Op::Scatter(first), Op::Checkpoint, Op::ScatterDiscard(first), Op::Flush]);
        ops.extend([Op::Checkpoint, Op::Scatter(first), Op::Checkpoint]);
        ops.extend([Op::Scatter(1 - first), Op::Flush]);
        ops.push(random_op(disk, rng));
    }
    ops
}

/// A run: the overlay, the log of its files, and what its windows hold.
pub struct Run<'a> {
    pub disk: &'a Disk,
    pub live: &'a Path,
    pub log: SharedLog<Mark>,
    pub overlay: Option<Overlay>,
    pub now: Vec<Content>,
    pub size: u64,
    pub writes: &'a mut u64,
}

/// The files of a log.
pub fn files(log: &SharedLog<Mark>) -> LayerFiles {
    let file = |number| Box::new(RecordedFile::new(log, number));
    LayerFiles { data: file(DATA), map: file(MAP) }
}

pub fn open(disk: &Disk, log: &SharedLog<Mark>, live: &Path) -> Result<Overlay> {
    Overlay::open("test", files(log), disk.base(), live)
}

impl Run<'_> {
    fn mark(&self, mark: Mark) {
        self.log.lock().events.push(Event::Mark(mark));
    }

    fn mark_live(&self) {
        self.mark(Mark::Live(LiveCopy::of(self.live).map(Arc::new)));
    }

    fn overlay(&self) -> &Overlay {
        self.overlay.as_ref().expect("open between requests")
    }

    fn fill(&mut self) -> [u8; 512] {
        *self.writes += 1;
        filled(*self.writes)
    }

    /// The daemon dies.
    pub fn end(mut self) -> Log<Mark> {
        self.overlay = None;
        Arc::into_inner(self.log).expect("the overlay and its files are gone").into_inner()
    }

    pub fn open(&mut self) {
        self.overlay = Some(open(self.disk, &self.log, self.live).expect("open in the same boot"));
    }

    /// Notes what a request is to do, and returns its bytes.
    fn ask(&mut self, place: u64, len: u64, zero: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len as usize);
        let mut asked = Vec::new();
        let mut at = place;
        while at < place + len {
            let (sector, within) = ((at / SECTOR) as usize, (at % SECTOR) as usize);
            let count = (512 - within).min((place + len - at) as usize);
            let new = if zero { [0; 512] } else { self.fill() };
            let mut whole = self.now[sector].as_ref().map_or([0; 512], |content| **content);
            whole[within..within + count].copy_from_slice(&new[within..within + count]);
            bytes.extend_from_slice(&new[within..within + count]);
            self.now[sector] = content(&whole);
            asked.push((sector, self.now[sector].clone()));
            at += count as u64;
        }
        self.mark(Mark::Asked(Asked(asked)));
        bytes
    }

    pub fn apply(&mut self, op: &Op) {
        match *op {
            Op::Write(window, at, len) | Op::WriteZeroes(window, at, len) => {
                if let Some((offset, place, len)) = self.disk.place(self.size, (window, at, len)) {
                    let bytes = self.ask(place, len, matches!(op, Op::WriteZeroes(..)));
                    self.overlay().write_at(offset, &bytes).expect("write");
                }
            }
            Op::Discard(window, at, len) => {
                if let Some((offset, place, len)) = self.disk.place(self.size, (window, at, len)) {
                    self.ask(place, len, true);
                    self.overlay().zero(offset, len).expect("discard");
                }
            }
            Op::DiscardAll => {
                for window in 0..self.disk.windows.len() {
                    if let Some((_, place, len)) = self.disk.place(self.size, (window, 0, u64::MAX)) {
                        self.ask(place, len, true);
                    }
                }
                self.overlay().zero(0, self.size).expect("discard all");
            }
            Op::Scatter(first) => {
                for at in self.disk.every_second_block(first) {
                    if let Some((offset, place, len)) = self.disk.place(self.size, (0, at, 256)) {
                        let bytes = self.ask(place, len, false);
                        self.overlay().write_at(offset, &bytes).expect("write");
                    }
                }
            }
            Op::ScatterDiscard(first) => {
                let block_bytes = u64::from(self.disk.geometry.block_bytes());
                for at in self.disk.every_second_block(first) {
                    if let Some((offset, place, len)) = self.disk.place(self.size, (0, at, block_bytes)) {
                        self.ask(place, len, true);
                        self.overlay().zero(offset, len).expect("discard");
                    }
                }
            }
            Op::Preallocate(window, at, len) => {
                if let Some((offset, _, len)) = self.disk.place(self.size, (window, at, len)) {
                    self.overlay().preallocate(offset, len).expect("preallocate");
                }
            }
            Op::Flush => self.overlay().flush().expect("flush"),
            Op::Checkpoint => self.overlay().checkpoint().expect("checkpoint"),
            Op::Renew(window, at) => {
                let block_bytes = u64::from(self.disk.geometry.block_bytes());
                let block = at / block_bytes * block_bytes;
                for op in [
                    Op::Discard(window, block, 2 * block_bytes),
                    Op::Flush,
                    Op::Write(window, at, 700),
                    Op::Flush,
                ] {
                    self.apply(&op);
                }
            }
            Op::Grow(sectors) => {
                let size = self.size + sectors * SECTOR;
                self.mark(Mark::AskedToGrow(size));
                self.overlay().grow(size).expect("grow");
                self.size = size;
                self.mark(Mark::Grown(size));
            }
            Op::Reopen => {
                self.overlay.take().expect("open between requests").close().expect("close");
                self.mark(Mark::Flushed);
                self.open();
            }
            Op::Kill => {
                self.overlay = None;
                self.open();
            }
        }
        if matches!(op, Op::Flush | Op::Checkpoint) {
            self.mark(Mark::Flushed);
        }
        self.mark_live();
    }
}
