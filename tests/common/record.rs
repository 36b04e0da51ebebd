//! Files that remember every change, and what a power cut may leave of them.
//!
//! A [`Log`] holds what was done to some files, in order, and what the caller was told meanwhile. Played forward, a
//! [`Files`] knows at each moment what is durable and what is not; a [`Choice`] says which of the changes that are not
//! durable reach the disk, sector by sector (512 bytes; a punched hole by pages of 4 KiB, a new end of a file on its
//! own). What was chosen lies over what is durable, later changes over earlier ones, so each sector ends up with any one
//! of the contents that it had since the last sync: lost, reordered, torn.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use cowdisk::storage::Storage;
use cowdisk::{Error, ErrorKind, Result};
use parking_lot::Mutex;

use super::sim::Rng;

pub const SECTOR: u64 = 512;
pub type Sector = [u8; 512];
const NONE: Sector = [0; 512];

/// The contents of a sector; `None`: zeroes.
pub type Content = Option<Arc<Sector>>;

pub fn content(bytes: &Sector) -> Content {
    (*bytes != NONE).then(|| Arc::new(*bytes))
}

/// The contents of a file.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Image {
    sectors: BTreeMap<u64, Arc<Sector>>,
    pub len: u64,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, {} sectors of them not zero", self.len, self.sectors.len())
    }
}

impl Image {
    pub fn sector(&self, index: u64) -> &Sector {
        self.sectors.get(&index).map_or(&NONE, |sector| sector)
    }

    pub fn set(&mut self, index: u64, content: Content) {
        match content {
            Some(content) => self.sectors.insert(index, content),
            None => self.sectors.remove(&index),
        };
    }

    /// Sets the end. What lies beyond it is gone.
    pub fn cut(&mut self, len: u64) {
        if len < self.len {
            drop(self.sectors.split_off(&len.div_ceil(SECTOR)));
            if let Some(last) = self.sectors.get_mut(&(len / SECTOR)) {
                Arc::make_mut(last)[(len % SECTOR) as usize..].fill(0);
            }
        }
        self.len = len;
    }

    /// The sectors that are not zeroes.
    pub fn sectors(&self) -> impl Iterator<Item = (u64, &Sector)> {
        self.sectors.iter().map(|(index, sector)| (*index, sector.as_ref()))
    }

    /// The sectors that are not as in `other`, as they are here.
    pub fn differing(&self, other: &Self) -> Vec<(u64, Content)> {
        let mut indexes: Vec<u64> = self.sectors.keys().chain(other.sectors.keys()).copied().collect();
        indexes.sort_unstable();
        indexes.dedup();
        indexes.retain(|index| self.sector(*index) != other.sector(*index));
        indexes.into_iter().map(|index| (index, self.sectors.get(&index).cloned())).collect()
    }

    /// A number that two images share only if they have the same contents in memory; it may differ where bytes do not.
    pub fn fingerprint(&self) -> u64 {
        self.sectors.iter().fold(self.len, |sum, (index, sector)| {
            sum.wrapping_add(Rng(*index ^ (Arc::as_ptr(sector) as u64).rotate_left(20)).next())
        })
    }

    pub fn read_at(&self, offset: u64, buf: &mut [u8]) {
        for (index, within, range) in pieces(offset, buf.len()) {
            let count = range.len();
            buf[range].copy_from_slice(&self.sector(index)[within..within + count]);
        }
    }

    /// The sectors that a write of `len` bytes at `offset` changes, as they are after it.
    pub fn written(&self, offset: u64, len: u64, byte_at: impl Fn(usize) -> u8) -> Vec<(u64, Content)> {
        let changed = pieces(offset, len as usize).map(|(index, within, range)| {
            let mut sector = *self.sector(index);
            for (place, at) in sector[within..].iter_mut().zip(range) {
                *place = byte_at(at);
            }
            (index, content(&sector))
        });
        changed.collect()
    }

    fn next_data(&self, offset: u64) -> Option<u64> {
        let found =
            self.sectors.range(offset / SECTOR..).next().map(|(index, _)| (index * SECTOR).max(offset));
        found.filter(|&at| at < self.len)
    }

    fn next_hole(&self, offset: u64) -> u64 {
        let mut index = offset / SECTOR;
        while self.sectors.contains_key(&index) {
            index += 1;
        }
        (index * SECTOR).max(offset).min(self.len.max(offset))
    }
}

/// Cuts a range at sector borders: sector, first byte within it, place in the buffer.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = (at % SECTOR) as usize;
        let count = (512 - within).min(len - done);
        let piece = (at / SECTOR, within, done..done + count);
        done += count;
        (count > 0).then_some(piece)
    })
}

/// One change of one file.
pub struct Change {
    pub what: &'static str,
    /// Sectors as they are after it.
    pub sectors: Vec<(u64, Content)>,
    /// Sectors that reach the disk together: of a punched hole those of a page.
    unit_sectors: u64,
    /// The end of the file after it, if it moves it.
    pub len: Option<u64>,
}

impl Change {
    pub fn new(what: &'static str, sectors: Vec<(u64, Content)>, len: Option<u64>) -> Self {
        Self { what, sectors, unit_sectors: if what == "punch" { 8 } else { 1 }, len }
    }

    /// Whether the first sectors of a page are all there is in it, and more than one: so a record of many changes looks.
    pub fn fills_sectors(&self) -> bool {
        self.sectors.len() == 8 && self.sectors[1].1.is_some() && self.sectors[6].1.is_none()
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if let (Some((first, _)), Some((last, _))) = (self.sectors.first(), self.sectors.last()) {
            write!(f, " of sectors {first} to {last}")?;
        }
        self.len.map_or(Ok(()), |len| write!(f, " with the end at {len}"))
    }
}

/// What happened, in order.
#[derive(Clone, Debug)]
pub enum Event<M> {
    /// A file was changed, not durably.
    Change(usize, Arc<Change>),
    /// All of a file became durable.
    Sync(usize),
    /// The last change of a file became durable alone: it was a durable write.
    Through(usize),
    /// Something that does not matter to contents, such as a reservation of space.
    Other(&'static str),
    /// What the caller was told, or asked for.
    Mark(M),
}

/// What was done to some files, and each file as the cache of the host shows it.
#[derive(Debug)]
pub struct Log<M> {
    pub start: Vec<Image>,
    pub cache: Vec<Image>,
    pub events: Vec<Event<M>>,
}

pub type SharedLog<M> = Arc<Mutex<Log<M>>>;

impl<M> Log<M> {
    /// A log that begins with these files, all durable.
    pub fn new(files: Vec<Image>) -> SharedLog<M> {
        Arc::new(Mutex::new(Self { start: files.clone(), cache: files, events: Vec::new() }))
    }

    fn change(&mut self, file: usize, what: &'static str, sectors: Vec<(u64, Content)>, len: Option<u64>) {
        let cache = &mut self.cache[file];
        if let Some(len) = len {
            cache.cut(len);
        }
        for (index, content) in &sectors {
            cache.set(*index, content.clone());
        }
        self.events.push(Event::Change(file, Arc::new(Change::new(what, sectors, len))));
    }
}

/// A file whose changes go to a log.
#[derive(Debug)]
pub struct RecordedFile<M> {
    log: SharedLog<M>,
    file: usize,
}

impl<M> RecordedFile<M> {
    pub fn new(log: &SharedLog<M>, file: usize) -> Self {
        Self { log: log.clone(), file }
    }
}

impl<M: Send + Sync + std::fmt::Debug> Storage for RecordedFile<M> {
    fn size(&self) -> Result<u64> {
        Ok(self.log.lock().cache[self.file].len)
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.log.lock().cache[self.file].sectors.len() as u64 * SECTOR)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.log.lock().cache[self.file].read_at(offset, buf);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let mut log = self.log.lock();
        let cache = &log.cache[self.file];
        let sectors = cache.written(offset, buf.len() as u64, |at| buf[at]);
        let end = offset + buf.len() as u64;
        let len = (end > cache.len).then_some(end);
        log.change(self.file, "write", sectors, len);
        Ok(())
    }

    fn write_durable_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_at(offset, buf)?;
        self.log.lock().events.push(Event::Through(self.file));
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.log.lock().events.push(Event::Sync(self.file));
        Ok(())
    }

    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.log.lock().change(self.file, "set the size", Vec::new(), Some(len));
        Ok(())
    }

    fn allocate(&self, _offset: u64, _len: u64) -> Result<()> {
        self.log.lock().events.push(Event::Other("allocate"));
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        let mut log = self.log.lock();
        let cache = &log.cache[self.file];
        let len = len.min(cache.len.saturating_sub(offset));
        let sectors = cache.written(offset, len, |_| 0);
        log.change(self.file, "punch", sectors, None);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        Ok(self.log.lock().cache[self.file].next_data(offset))
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        Ok(self.log.lock().cache[self.file].next_hole(offset))
    }
}

/// An image that is only read.
#[derive(Clone, Debug)]
pub struct ReadOnly(pub Arc<Image>);

impl Storage for ReadOnly {
    fn size(&self) -> Result<u64> {
        Ok(self.0.len)
    }
    fn allocated(&self) -> Result<u64> {
        Ok(self.0.sectors.len() as u64 * SECTOR)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buf);
        Ok(())
    }
    fn write_at(&self, _offset: u64, _buf: &[u8]) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "a file that is only read"))
    }
    fn write_durable_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_at(offset, buf)
    }
    fn sync(&self) -> Result<()> {
        self.write_at(0, &[])
    }
    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }
    fn set_len(&self, _len: u64) -> Result<()> {
        self.write_at(0, &[])
    }
    fn allocate(&self, _offset: u64, _len: u64) -> Result<()> {
        self.write_at(0, &[])
    }
    fn punch(&self, _offset: u64, _len: u64) -> Result<()> {
        self.write_at(0, &[])
    }
    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        Ok(self.0.next_data(offset))
    }
    fn next_hole(&self, offset: u64) -> Result<u64> {
        Ok(self.0.next_hole(offset))
    }
}

/// One file at one moment: what is durable, and what is not, oldest first. Each change has its number in the run.
#[derive(Clone, Debug, Default)]
pub struct FileState {
    pub durable: Image,
    pub pending: Vec<(usize, Arc<Change>)>,
}

impl FileState {
    /// One more change, not durable yet.
    pub fn change(&mut self, number: usize, change: &Arc<Change>) {
        self.pending.push((number, change.clone()));
    }

    /// All that was changed becomes durable.
    pub fn sync(&mut self) {
        for (_, change) in std::mem::take(&mut self.pending) {
            self.settle(&change);
        }
    }

    /// The last change becomes durable alone: of its sectors no earlier contents can come back.
    pub fn through(&mut self) {
        let (_, last) = self.pending.pop().expect("a durable write is a change first");
        self.settle(&last);
        for (_, change) in &mut self.pending {
            let gone = |index: u64| last.sectors.iter().any(|(other, _)| *other == index);
            if change.sectors.iter().any(|(index, _)| gone(*index)) {
                let left = change.sectors.iter().filter(|(index, _)| !gone(*index)).cloned().collect();
                *change = Arc::new(Change::new(change.what, left, change.len));
            }
        }
    }

    fn settle(&mut self, change: &Change) {
        if let Some(len) = change.len {
            self.durable.cut(len);
        }
        for (index, content) in &change.sectors {
            self.durable.set(*index, content.clone());
        }
    }

    /// What is left if of each change those parts reach the disk that `choice` says.
    pub fn left(&self, file: usize, choice: &mut Choice) -> Image {
        let mut image = self.durable.clone();
        // The end is decided by the last change of it that is chosen; what lies beyond it is not there.
        let mut len = image.len;
        for (number, change) in &self.pending {
            let units =
                change.sectors.chunk_by(|(a, _), (b, _)| a / change.unit_sectors == b / change.unit_sectors);
            let count = units.clone().count();
            for (at, unit) in units.enumerate() {
                if choice.takes(file, *number, at, count) {
                    for (index, content) in unit {
                        image.set(*index, content.clone());
                    }
                }
            }
            if let Some(new) = change.len
                && choice.takes(file, *number, count, count)
            {
                len = new;
            }
        }
        image.len = u64::MAX;
        image.cut(len);
        image
    }
}

/// Which of the changes that are not durable reach the disk.
#[derive(Clone, Debug)]
pub enum Choice {
    /// None.
    Lost,
    /// All.
    All,
    /// All but one.
    AllBut(usize),
    /// One.
    Only(usize),
    /// All of one file.
    File(usize),
    /// Of one change the first so many parts (or all but them), of all others all, or nothing.
    Torn { change: usize, from: usize, to: usize, others: bool },
    /// Whole changes, at random.
    Changes(Rng),
    /// Parts, at random.
    Parts(Rng),
}

impl Choice {
    /// Whether a part of a change of a file reaches the disk; of a file's end, `part` is `parts`.
    pub fn takes(&mut self, file: usize, change: usize, part: usize, parts: usize) -> bool {
        match self {
            Self::Lost => false,
            Self::All => true,
            Self::AllBut(left_out) => change != *left_out,
            Self::Only(one) => change == *one,
            Self::File(one) => file == *one,
            Self::Torn { change: one, from, to, others } => {
                if change == *one {
                    part == parts || (*from..*to).contains(&part)
                } else {
                    *others
                }
            }
            Self::Changes(rng) => Rng(rng.0 ^ change as u64).next().is_multiple_of(2),
            Self::Parts(rng) => rng.below(2) == 0,
        }
    }

    /// The choices to try at one moment, the systematic ones first. `last` is the last change that is not durable, if
    /// there is any, and its number of sectors.
    pub fn at(last: Option<(usize, usize)>, files: usize, random: usize, rng: &mut Rng) -> Vec<Self> {
        let Some((last, sectors)) = last else { return vec![Self::Lost] };
        let mut choices = vec![Self::Lost, Self::All, Self::AllBut(last), Self::Only(last)];
        choices.extend((0..files).map(Self::File));
        if sectors > 1 {
            for others in [false, true] {
                let cut = 1 + rng.below(sectors as u64 - 1) as usize;
                choices.push(Self::Torn { change: last, from: 0, to: cut, others });
                choices.push(Self::Torn { change: last, from: cut, to: sectors, others });
            }
        }
        for _ in 0..random {
            choices.push(Self::Changes(Rng(rng.next())));
            choices.push(Self::Parts(Rng(rng.next())));
        }
        choices
    }
}

/// Some files at one moment of a run.
#[derive(Clone, Debug)]
pub struct Files(pub Vec<FileState>);

impl Files {
    /// At the beginning of a log.
    pub fn new(start: &[Image]) -> Self {
        Self(start.iter().map(|image| FileState { durable: image.clone(), pending: Vec::new() }).collect())
    }

    /// Goes on by the event of that number.
    pub fn step<M>(&mut self, number: usize, event: &Event<M>) {
        match event {
            Event::Change(file, change) => self.0[*file].change(number, change),
            Event::Sync(file) => self.0[*file].sync(),
            Event::Through(file) => self.0[*file].through(),
            Event::Other(_) | Event::Mark(_) => {}
        }
    }

    /// The last change that is not durable, and its number of sectors.
    pub fn last_pending(&self) -> Option<(usize, usize)> {
        let last = self.0.iter().filter_map(|file| file.pending.last()).max_by_key(|(number, _)| *number);
        last.map(|(number, change)| (*number, change.sectors.len()))
    }

    /// What a power cut leaves.
    pub fn left(&self, choice: &Choice) -> Vec<Image> {
        let mut choice = choice.clone();
        (0..).zip(&self.0).map(|(number, file)| file.left(number, &mut choice)).collect()
    }
}
