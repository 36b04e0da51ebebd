//! The states in which a power cut may leave the recorded disk.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::FallocateFlags;

use crate::random::Random;
use crate::sector::SECTOR_BYTES;
use crate::write_log::{Entry, Kind, WriteLog};
use crate::{Doing, Result};

/// What has become of the entries since the last flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Nothing is lost.
    Linear,
    /// Any half of them is.
    Subset,
    /// Of the last write, the end is.
    Torn,
}

/// A power cut.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Entries before it.
    pub entries: usize,
    /// What is lost.
    pub loss: Loss,
    /// Chooses what is lost.
    pub seed: u64,
}

/// As many cuts, spread over the recording, in its order.
pub fn cuts(seed: u64, entries: usize, count: usize) -> Vec<Cut> {
    let mut random = Random::new(seed);
    let place = |number: usize| (number * entries) as u64 / count as u64;
    (0..count)
        .map(|number| {
            let at = random.between(place(number), place(number + 1).max(place(number) + 1)) + 1;
            let loss = [Loss::Subset, Loss::Torn, Loss::Linear][number % 3];
            Cut { entries: usize::try_from(at).unwrap_or(entries).min(entries), loss, seed: random.number() }
        })
        .collect()
}

/// Makes the states of cuts, which must come in the recording's order.
#[derive(Debug)]
pub struct States<'a> {
    log: &'a WriteLog,
    /// The disk with the first `durable` entries.
    base: PathBuf,
    durable: usize,
}

impl<'a> States<'a> {
    /// `base` is the disk before the recording; it is changed.
    pub fn new(log: &'a WriteLog, base: PathBuf) -> Self {
        Self { log, base, durable: 0 }
    }

    /// Writes to `target` what `cut` leaves.
    ///
    /// # Errors
    /// Those of the host.
    pub fn make(&mut self, cut: &Cut, target: &Path) -> Result<()> {
        let entries = &self.log.entries;
        let flushed = entries[..cut.entries].iter().rposition(|entry| entry.kind == Kind::Flush).unwrap_or(0);
        let base = open(&self.base)?;
        for entry in &entries[self.durable..flushed.max(self.durable)] {
            self.apply(&base, entry, None)?;
        }
        self.durable = flushed.max(self.durable);
        let status =
            Command::new("cp").args(["--reflink=auto", "--sparse=auto"]).arg(&self.base).arg(target).status();
        if !status.doing("cp")?.success() {
            return Err("cp failed".to_owned());
        }
        let image = open(target)?;
        let mut random = Random::new(cut.seed);
        for (index, entry) in entries.iter().enumerate().take(cut.entries).skip(self.durable) {
            let through = entry.kind == Kind::Write { through: true };
            if cut.loss == Loss::Subset && !through && random.chance(1, 2) {
                continue;
            }
            let is_last = index + 1 == cut.entries;
            let torn = cut.loss == Loss::Torn && is_last;
            self.apply(&image, entry, torn.then(|| random.below(entry.len / 512 + 1)))?;
        }
        Ok(())
    }

    /// Does to `image` what the entry did to the disk, or to so many of its first sectors.
    fn apply(&self, image: &File, entry: &Entry, sectors: Option<u64>) -> Result<()> {
        let len = sectors.map_or(entry.len, |sectors| sectors * SECTOR_BYTES as u64);
        match entry.kind {
            Kind::Flush => Ok(()),
            _ if len == 0 => Ok(()),
            Kind::Discard => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(image, flags, entry.offset, len).doing("punch")
            }
            Kind::Write { .. } => {
                let data = self.log.data(entry)?;
                let len = usize::try_from(len).doing("length")?;
                image.write_all_at(&data[..len], entry.offset).doing("write the image")
            }
        }
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path).doing(format!("open {}", path.display()))
}
