//! What the guest's streams write, and what may therefore be found in each sector afterwards.
//!
//! A stream is one thread that works on one disk. It alone writes its sectors, so the order of its steps is the order of
//! what happens to them. Blocks are shared: at the end of each disk sectors of all its streams take turns.

use crate::aligned::Aligned;
use crate::random::Random;
use crate::sector::{Label, SECTOR_BYTES};

/// Sectors of each disk when it is made.
pub const DISK_SECTORS: u64 = (24 << 20) / 512;

/// Sectors of the image.
pub const IMAGE_SECTORS: u64 = (16 << 20) / 512;

/// The sectors of the image that are a hole.
const HOLE: Span = Span { start: (8 << 20) / 512, end: (11 << 20) / 512 };

/// At the end of a disk: sectors of its streams take turns there, in stripes.
const SHARED_SECTORS: u64 = (1 << 20) / 512;
/// Less than a block, and no divisor of it.
const STRIPE_SECTORS: u64 = 3;

/// A disk that streams write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Disk {
    /// An overlay over the image.
    Root,
    /// A plain file that was a hole when it was made.
    Local,
    /// A full copy of the image.
    Plain,
}

/// The disk of each stream.
pub const STREAMS: [Disk; 5] = [Disk::Root, Disk::Root, Disk::Local, Disk::Local, Disk::Plain];

impl Disk {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Root, Self::Local, Self::Plain];

    /// Where the mount shows it.
    pub fn path(self) -> &'static str {
        match self {
            Self::Root => "instances/web/disk",
            Self::Local => "instances/web/disk.local",
            Self::Plain => "instances/plain/disk",
        }
    }

    /// Whether the kernel serves it by itself, where the mount has it serve what is one file of the host.
    pub fn by_kernel(self, passthrough: bool) -> bool {
        passthrough && self != Self::Root
    }

    /// What its sectors call it.
    pub fn number(self) -> u64 {
        match self {
            Self::Root => 1,
            Self::Local => 2,
            Self::Plain => 3,
        }
    }

    /// The streams that write it.
    pub fn streams(self) -> Vec<usize> {
        (0..STREAMS.len()).filter(|&stream| STREAMS[stream] == self).collect()
    }
}

/// Sectors from `start` to before `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub start: u64,
    /// The one after the last.
    pub end: u64,
}

/// How a step writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// With O_DIRECT.
    Direct,
    /// Without.
    Buffered,
    /// With O_DSYNC: a sync, too.
    Through,
}

/// One thing that a stream does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Writes sectors that name the step.
    Write(Span, Way),
    /// Punches a hole.
    Discard(Span),
    /// fdatasync, or fsync.
    Sync {
        /// fdatasync.
        data_only: bool,
    },
}

impl Step {
    /// What is promised once the step has returned, on a disk that the kernel serves by itself or not.
    pub fn promise(&self, by_kernel: bool) -> Promise {
        match self {
            Self::Sync { .. } => Promise::All,
            Self::Write(_, Way::Through) if by_kernel => Promise::Itself,
            Self::Write(_, Way::Through) => Promise::All,
            Self::Write(..) | Self::Discard(_) => Promise::Nothing,
        }
    }
}

/// What is durable once a step has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// Nothing more than before.
    Nothing,
    /// What the step has written; of what came before it nothing is said.
    Itself,
    /// All that the stream has done.
    All,
}

/// What a stream does, in order.
pub fn steps(seed: u64, stream: usize, count: usize) -> Vec<Step> {
    let mut random = Random::new(seed ^ (stream as u64 + 1).wrapping_mul(0x5851_f42d_4c95_7f2d));
    let disk = STREAMS[stream];
    let area = Area::of(disk, stream);
    let mut unsynced = 0;
    (0..count)
        .map(|_| {
            if unsynced > 0 && random.chance(unsynced, 12) {
                unsynced = 0;
                return Step::Sync { data_only: random.chance(3, 4) };
            }
            let span = area.choose(&mut random);
            unsynced += 1;
            match random.below(20) {
                0..3 => Step::Discard(span),
                3 => {
                    unsynced = 0;
                    Step::Write(span, Way::Through)
                }
                4..12 => Step::Write(span, Way::Direct),
                _ => Step::Write(span, Way::Buffered),
            }
        })
        .collect()
}

/// The sectors of a stream: a run of its own, and every so-many-th stripe of what the disk's streams share.
struct Area {
    own: Span,
    rank: u64,
    streams: u64,
}

impl Area {
    fn of(disk: Disk, stream: usize) -> Self {
        let streams = disk.streams();
        let rank = streams.iter().take_while(|&&other| other < stream).count() as u64;
        let count = streams.len() as u64;
        let own = DISK_SECTORS - SHARED_SECTORS;
        // Some sectors off, so that neighbours share a block.
        let border =
            |rank: u64| if rank == 0 || rank == count { own * rank / count } else { own * rank / count + 3 };
        Self { own: Span { start: border(rank), end: border(rank + 1) }, rank, streams: count }
    }

    fn choose(&self, random: &mut Random) -> Span {
        if random.chance(1, 5) {
            let turns = SHARED_SECTORS / (STRIPE_SECTORS * self.streams);
            let stripe = random.below(turns) * self.streams + self.rank;
            let start = DISK_SECTORS - SHARED_SECTORS + stripe * STRIPE_SECTORS;
            let from = random.below(STRIPE_SECTORS);
            return Span { start: start + from, end: start + random.between(from + 1, STRIPE_SECTORS + 1) };
        }
        let longest = match random.below(20) {
            0..10 => 8,
            10..16 => 64,
            16..19 => 512,
            _ => 2048,
        };
        let mut len = random.between(1, longest + 1);
        // A few places are written again and again, the others now and then.
        let reach = if random.chance(1, 3) { 1024 } else { self.own.end - self.own.start };
        let mut start = self.own.start + random.below(reach);
        if random.chance(1, 2) {
            start = start.next_multiple_of(8);
            len = len.next_multiple_of(8);
        }
        let start = start.min(self.own.end - 1);
        Span { start, end: (start + len).min(self.own.end) }
    }
}

/// What a sector may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What the disk was made with.
    First,
    /// Zeroes.
    Zero,
    /// What a step of a stream wrote.
    Step {
        /// The stream.
        stream: usize,
        /// The index of the step.
        step: usize,
    },
}

impl Content {
    /// The bytes that a sector then has.
    pub fn bytes(self, seed: u64, disk: Disk, sector: u64) -> [u8; 512] {
        match self {
            Self::Zero => [0; 512],
            Self::First if disk == Disk::Local => [0; 512],
            Self::First => image_sector(seed, sector),
            Self::Step { stream, step } => written(seed, stream, step, sector),
        }
    }
}

/// What a step writes to a sector.
pub fn written(seed: u64, stream: usize, step: usize, sector: u64) -> [u8; 512] {
    let writer = (stream as u64) << 32 | step as u64;
    Label { seed, disk: STREAMS[stream].number(), sector, writer }.bytes()
}

/// All that a step writes.
pub fn content(seed: u64, stream: usize, step: usize, span: Span) -> Aligned {
    let sectors = usize::try_from(span.end - span.start).unwrap_or(0);
    let mut data = Aligned::new(sectors * SECTOR_BYTES);
    for (place, sector) in data.chunks_exact_mut(SECTOR_BYTES).zip(span.start..) {
        place.copy_from_slice(&written(seed, stream, step, sector));
    }
    data
}

/// A sector of the image; zeroes in its hole and behind its end.
pub fn image_sector(seed: u64, sector: u64) -> [u8; 512] {
    if sector >= IMAGE_SECTORS || (HOLE.start..HOLE.end).contains(&sector) {
        return [0; 512];
    }
    Label { seed, disk: 0, sector, writer: 0 }.bytes()
}

/// The number by which marks call the promises of a stream that are made for single writes ([`Promise::Itself`]). Those for all
/// that it has done go by its own number.
pub fn single_writes_of(stream: usize) -> usize {
    STREAMS.len() + 1 + stream
}

/// What each sector of a disk may hold, given how many steps of each stream are promised, by the numbers of marks: what the last
/// promised step left, or any later one that may have begun. None has that comes after the next promise, which was not made.
pub fn allowed(
    seed: u64,
    disk: Disk,
    by_kernel: bool,
    count: usize,
    promised: &[usize],
) -> Vec<Vec<Content>> {
    let mut sectors = vec![vec![Content::First]; usize::try_from(DISK_SECTORS).unwrap_or(usize::MAX)];
    for stream in disk.streams() {
        let (kept, single) = (promised[stream], promised[single_writes_of(stream)]);
        for (index, step) in steps(seed, stream, count).iter().enumerate() {
            let promise = step.promise(by_kernel);
            let is_kept = index < kept || promise == Promise::Itself && index < single;
            let (span, content) = match *step {
                Step::Write(span, _) => (span, Content::Step { stream, step: index }),
                Step::Discard(span) => (span, Content::Zero),
                Step::Sync { .. } => (Span { start: 0, end: 0 }, Content::Zero),
            };
            for sector in sectors.iter_mut().take(as_index(span.end)).skip(as_index(span.start)) {
                if is_kept {
                    sector.clear();
                }
                sector.push(content);
            }
            if promise != Promise::Nothing && !is_kept {
                break;
            }
        }
    }
    sectors
}

fn as_index(sector: u64) -> usize {
    usize::try_from(sector).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of marks.
    const MARKS: usize = 2 * STREAMS.len() + 1;

    #[test]
    fn no_two_streams_write_a_sector() {
        let mut writers = vec![None; 3 * as_index(DISK_SECTORS)];
        for (stream, disk) in STREAMS.into_iter().enumerate() {
            for step in steps(7, stream, 3000) {
                let (Step::Write(span, _) | Step::Discard(span)) = step else { continue };
                assert!(span.start < span.end && span.end <= DISK_SECTORS, "{span:?}");
                for sector in span.start..span.end {
                    let place = as_index((disk.number() - 1) * DISK_SECTORS + sector);
                    assert_eq!(*writers[place].get_or_insert(stream), stream, "{disk:?} {sector}");
                }
            }
        }
    }

    #[test]
    fn a_promised_write_allows_nothing_older() {
        let all = steps(7, 0, 50);
        let kept =
            all.iter().position(|step| step.promise(false) == Promise::All).map_or(0, |index| index + 1);
        let mut promised = [0; MARKS];
        promised[0] = kept;
        let sectors = allowed(7, Disk::Root, false, 50, &promised);
        let (step, span) = all[..kept]
            .iter()
            .enumerate()
            .find_map(|(step, what)| if let Step::Write(span, _) = what { Some((step, span)) } else { None })
            .expect("something is written");
        let found = &sectors[as_index(span.start)];
        assert!(!found.contains(&Content::First), "{found:?}");
        assert!(
            matches!(found[0], Content::Step { stream: 0, step: first } if first >= step)
                || found[0] == Content::Zero
        );
    }

    #[test]
    fn a_write_that_promises_itself_says_nothing_of_those_before_it() {
        let stream = 4;
        let all = steps(7, stream, 200);
        let through = |step: &Step| step.promise(true) == Promise::Itself;
        let (at, span) = all
            .iter()
            .enumerate()
            .find_map(|(at, step)| {
                if let (true, Step::Write(span, _)) = (through(step), step) {
                    Some((at, *span))
                } else {
                    None
                }
            })
            .expect("something is written through");
        let mut promised = [0; MARKS];
        promised[stream] = all[..at]
            .iter()
            .rposition(|step| step.promise(true) == Promise::All)
            .map_or(0, |index| index + 1);
        promised[single_writes_of(stream)] = at + 1;
        let sectors = allowed(7, Disk::Plain, true, 200, &promised);
        let first = sectors[as_index(span.start)][0];
        assert_eq!(first, Content::Step { stream, step: at }, "neither lost nor older");
        let unsynced = all[promised[stream]..at].iter().find_map(|step| match *step {
            Step::Write(other, _) if other.end <= span.start || other.start >= span.end => Some(other),
            _ => None,
        });
        let found = &sectors[as_index(unsynced.expect("something is written before").start)];
        assert!(found.len() > 1, "what was not synced may be lost: {found:?}");
        // By us the same write would have taken all before it along.
        promised[stream] = at + 1;
        assert_eq!(allowed(7, Disk::Plain, false, 200, &promised)[as_index(span.start)][0], first);
    }
}
