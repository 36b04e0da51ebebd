//! Scripts of changes of a store.

use cowdisk::store::DiskName;

use crate::common::sim::Rng;

/// Sectors of every source of an image.
pub const IMAGE_SECTORS: u64 = 64;
pub const LOCAL_SECTORS: u64 = 48;
/// Bytes of every flavor, but for one sector for each version.
pub const FLAVOR_BYTES: u64 = 1 << 20;

pub const IMAGES: [&str; 3] = ["debian", "alpine", "arch"];
pub const INSTANCES: [&str; 3] = ["web", "db", "ci"];
pub const FLAVORS: [&str; 2] = ["small", "swap"];

/// A change. Objects are named by their place in the lists above.
#[derive(Clone, Debug)]
pub enum Op {
    Import {
        image: usize,
        twin: bool,
        kernel: bool,
    },
    RemoveImage(usize),
    AddFlavor {
        flavor: usize,
        swap: bool,
    },
    RemoveFlavor(usize),
    Create {
        instance: usize,
        image: usize,
        flavor: Option<usize>,
        local: bool,
        no_cow: bool,
    },
    /// Two instances over an image, together.
    CreateBoth {
        instance: usize,
        image: usize,
    },
    RemoveInstance(usize),
    /// Owner, mode and an extended attribute of an image or of an instance's disk.
    ChangeImage(usize),
    ChangeDisk(usize, DiskName),
    Disk(usize, DiskName, DiskOp),
    /// The process dies within a change, after so many operations of its host.
    Killed(Box<Self>, u64),
    /// Another process makes a change while this one copies.
    During(Box<Self>, Box<Self>),
    /// The process ends, and another one opens the store.
    Reopen,
}

#[derive(Clone, Debug)]
pub enum DiskOp {
    /// A sector, and how many.
    Write(u64, u64),
    Discard(u64, u64),
    Flush,
    Close,
    Grow,
}

impl Op {
    /// Changes the set of objects, in several steps.
    fn is_large(&self) -> bool {
        !matches!(self, Self::Disk(..) | Self::Killed(..) | Self::During(..) | Self::Reopen)
    }

    /// Whether it makes a file system, or swap space.
    pub fn runs_a_program(&self) -> bool {
        match self {
            Self::AddFlavor { swap, .. } => *swap,
            Self::Killed(op, _) => op.runs_a_program(),
            Self::During(op, other) => op.runs_a_program() || other.runs_a_program(),
            _ => false,
        }
    }

    fn copies(&self) -> bool {
        matches!(self, Self::Import { .. } | Self::Create { no_cow: true, .. })
    }
}

pub fn random_op(rng: &mut Rng) -> Op {
    let mut pick = |list: usize| rng.below(list as u64) as usize;
    let (image, instance, flavor) = (pick(IMAGES.len()), pick(INSTANCES.len()), pick(FLAVORS.len()));
    let disk = DiskName::ALL[pick(2)];
    match rng.below(40) {
        0..4 => Op::Import { image, twin: rng.below(2) == 0, kernel: rng.below(2) == 0 },
        4..7 => Op::RemoveImage(image),
        7 => Op::AddFlavor { flavor, swap: flavor == 1 },
        8 => Op::RemoveFlavor(flavor),
        9..13 => Op::Create {
            instance,
            image,
            flavor: (rng.below(3) == 0).then_some(flavor),
            local: rng.below(2) == 0,
            no_cow: rng.below(4) == 0,
        },
        13 => Op::CreateBoth { instance, image },
        14..16 => Op::RemoveInstance(instance),
        16 => Op::ChangeImage(image),
        17..19 => Op::ChangeDisk(instance, disk),
        19..30 => {
            let sector = rng.below(LOCAL_SECTORS + 8);
            let sectors = 1 + rng.below(16);
            let op = match rng.below(9) {
                0..3 => DiskOp::Write(sector, sectors),
                3 => DiskOp::Discard(sector, sectors),
                4..6 => DiskOp::Flush,
                6 => DiskOp::Close,
                7 => DiskOp::Grow,
                _ => DiskOp::Write(sector, 1),
            };
            Op::Disk(instance, disk, op)
        }
        30..34 => match random_op(rng) {
            op if op.is_large() => Op::Killed(Box::new(op), rng.below(24)),
            op => op,
        },
        34..38 => match (random_op(rng), random_op(rng)) {
            (op, other) if op.copies() && other.is_large() => Op::During(Box::new(op), Box::new(other)),
            (op, _) => op,
        },
        _ => Op::Reopen,
    }
}

/// A script: what makes a store to begin with, and what then happens to it.
pub fn random_script(rng: &mut Rng) -> Vec<Op> {
    let instance = rng.below(2) as usize;
    let mut ops = vec![
        Op::Import { image: 0, twin: false, kernel: rng.below(2) == 0 },
        Op::Create { instance, image: 0, flavor: None, local: true, no_cow: rng.below(3) == 0 },
    ];
    ops.truncate(rng.below(3) as usize);
    for _ in 0..4 + rng.below(12) {
        let op = random_op(rng);
        let again = match &op {
            Op::Killed(op, _) if rng.below(2) == 0 => Some(after_death(op)),
            _ => None,
        };
        ops.push(op);
        ops.extend(again);
    }
    ops
}

/// What another process does next that has to do with what one died of.
fn after_death(op: &Op) -> Op {
    match *op {
        Op::Import { image, twin: true, kernel } => {
            Op::Import { image: (image + 1) % IMAGES.len(), twin: true, kernel }
        }
        Op::RemoveImage(image) => Op::Import { image, twin: true, kernel: true },
        ref op => op.clone(),
    }
}

/// What a source of an image has in each sector, by its number.
pub fn source_sector(number: u64, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    // Some blocks of zeroes.
    if !(sector / 8 + number).is_multiple_of(3) {
        bytes.as_chunks_mut::<8>().0.fill(((number << 32) | sector | (1 << 31)).to_le_bytes());
    }
    bytes
}

/// A sector's content that no other write has.
pub fn filled(number: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes.as_chunks_mut::<8>().0.fill(number.to_le_bytes());
    bytes
}
