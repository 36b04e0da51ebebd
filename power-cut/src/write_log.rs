//! A recording in the format of the kernel's dm-log-writes, as QEMU's `blklogwrites` writes it.
//!
//! Everything is in sectors of 512 bytes (`log-sector-size=512`) and little-endian. The first sector is the superblock:
//! magic, version, number of entries (8 bytes each), size of a sector (4). Then come the entries, each a sector with
//! first sector, number of sectors, flags and length of data (8 bytes each), followed by its data, which discards and
//! flushes do not have.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::guest::mark;
use crate::sector::{Label, SECTOR_BYTES};
use crate::{Doing, FS_BYTES, Result};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// What the disk was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To write; `through` if not to its cache (FUA).
    Write {
        /// FUA.
        through: bool,
    },
    /// To forget what sectors hold.
    Discard,
    /// To make durable what was written.
    Flush,
}

/// One request that the disk has answered.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What it was.
    pub kind: Kind,
    /// The first byte on the disk.
    pub offset: u64,
    /// Bytes on the disk.
    pub len: u64,
    /// Where the log has its data.
    data: u64,
}

/// A recording.
#[derive(Debug)]
pub struct WriteLog {
    file: File,
    /// In the order in which they ended.
    pub entries: Vec<Entry>,
}

impl WriteLog {
    /// Reads the list of entries.
    ///
    /// # Errors
    /// If it is no such log, or cut short.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).doing(format!("open {}", path.display()))?;
        let log_bytes = file.metadata().doing("stat the log")?.len();
        let [magic, version, count, sector_bytes] = words(&file, 0)?;
        if (magic, version, sector_bytes & 0xffff_ffff) != (MAGIC, VERSION, SECTOR_BYTES as u64) {
            return Err(format!("{}: no log of writes in sectors of 512 bytes", path.display()));
        }
        let mut entries = Vec::new();
        let mut place = SECTOR_BYTES as u64;
        for number in 0..count {
            let [sector, sectors, flags, _] = words(&file, place)?;
            let (offset, len, data) = (sector * 512, sectors * 512, place + 512);
            let kind = match flags {
                FLUSH => Kind::Flush,
                DISCARD => Kind::Discard,
                0 | FUA => Kind::Write { through: flags == FUA },
                _ => return Err(format!("entry {number}: unknown flags {flags:#x}")),
            };
            entries.push(Entry { kind, offset, len, data });
            place = if matches!(kind, Kind::Write { .. }) { data + len } else { data };
            if place > log_bytes {
                return Err(format!("the log ends within entry {number} of {count}"));
            }
        }
        Ok(Self { file, entries })
    }

    /// What an entry wrote.
    ///
    /// # Errors
    /// Those of the host.
    pub fn data(&self, entry: &Entry) -> Result<Vec<u8>> {
        let mut data = vec![0; usize::try_from(entry.len).doing("length of an entry")?];
        self.file.read_exact_at(&mut data, entry.data).doing("read the log")?;
        Ok(data)
    }

    /// What a power cut after the first `count` entries must have kept: of each worker, the number of promised steps.
    ///
    /// # Errors
    /// If something else than marks was written behind the file system.
    pub fn promises(&self, seed: u64, workers: usize, count: usize) -> Result<Vec<usize>> {
        let mut kept = vec![0; workers];
        for entry in &self.entries[..count] {
            if !matches!(entry.kind, Kind::Write { .. }) || entry.offset < FS_BYTES {
                continue;
            }
            for sector in self.data(entry)?.chunks(SECTOR_BYTES) {
                let label = Label::of(sector).ok_or("behind the file system: not a mark")?;
                let (worker, steps) = (
                    usize::try_from(label.sector).doing("mark")?,
                    usize::try_from(label.writer).doing("mark")?,
                );
                if label != mark(seed, worker, steps) || worker >= workers {
                    return Err("a mark of another recording".to_owned());
                }
                kept[worker] = steps;
            }
        }
        Ok(kept)
    }
}

fn words(file: &File, place: u64) -> Result<[u64; 4]> {
    let mut bytes = [0; 32];
    file.read_exact_at(&mut bytes, place).doing("read the log")?;
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    Ok(words)
}
