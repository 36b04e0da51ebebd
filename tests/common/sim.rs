//! A simulated host file: what `Storage` promises, and nothing more.
//!
//! It remembers, per sector, every content since the last sync. A crash of the host leaves any one of them in each
//! sector, independently: writes lost, reordered and torn at 512 bytes. A kill of the daemon ends it between two
//! operations and loses nothing. A failed sync leaves what Linux leaves: the cache shows the new content, the disk has
//! any, and no later sync will write it.

use std::collections::BTreeMap;
use std::sync::Arc;

use cowdisk::storage::Storage;
use cowdisk::{Error, Result};
use parking_lot::Mutex;

pub const SECTOR: u64 = 512;
type Sector = [u8; 512];
const NONE: Sector = [0; 512];

/// SplitMix64 (Steele, Lea and Flood, 2014): small, and the same everywhere for one seed.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// What happens to the operations that change the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All succeed.
    Fine,
    /// So many more succeed; at the next one the process is gone: the call unwinds with [`Killed`].
    KillAfter(u64),
    /// So many more succeed; the next one fails with this errno, once.
    FailAfter(u64, i32),
}

/// What a call unwinds with when the simulated process is killed within it.
pub struct Killed;

/// The host: its files share a fate and a count of operations.
#[derive(Clone, Debug)]
pub struct SimHost(Arc<Mutex<HostState>>);

#[derive(Debug)]
struct HostState {
    fate: Fate,
    operations: u64,
    rng: Rng,
}

impl SimHost {
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(HostState { fate: Fate::Fine, operations: 0, rng: Rng(seed) })))
    }

    pub fn set_fate(&self, fate: Fate) {
        self.0.lock().fate = fate;
    }

    /// Operations that changed, or were to change, the disk so far.
    pub fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    /// One more operation: whether it goes on, fails, or finds the process dead.
    fn step(&self, what: &str) -> Result<()> {
        let mut state = self.0.lock();
        state.operations += 1;
        match &mut state.fate {
            Fate::Fine => Ok(()),
            Fate::KillAfter(0) => {
                drop(state);
                std::panic::resume_unwind(Box::new(Killed));
            }
            Fate::KillAfter(left) => {
                *left -= 1;
                Ok(())
            }
            Fate::FailAfter(0, errno) => {
                let error = std::io::Error::from_raw_os_error(*errno);
                state.fate = Fate::Fine;
                Err(Error::io(format!("{what} (simulated)"), error))
            }
            Fate::FailAfter(left, _) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    fn pick(&self, n: u64) -> u64 {
        self.0.lock().rng.below(n)
    }
}

/// One file of the host; clones are the same file.
#[derive(Clone, Debug)]
pub struct SimFile {
    host: SimHost,
    state: Arc<Mutex<FileState>>,
}

#[derive(Debug, Default)]
struct FileState {
    durable: BTreeMap<u64, Sector>,
    durable_len: u64,
    /// Contents since the last sync, oldest first.
    pending: BTreeMap<u64, Vec<Sector>>,
    pending_len: Vec<u64>,
    /// Shown by the cache, and never to be written after a failed sync.
    phantom: BTreeMap<u64, Sector>,
}

impl FileState {
    fn sector(&self, index: u64) -> Sector {
        let pending = self.pending.get(&index).and_then(|versions| versions.last());
        *pending.or_else(|| self.phantom.get(&index)).or_else(|| self.durable.get(&index)).unwrap_or(&NONE)
    }

    fn len(&self) -> u64 {
        self.pending_len.last().copied().unwrap_or(self.durable_len)
    }

    fn change(&mut self, offset: u64, len: u64, byte_at: impl Fn(u64) -> u8) {
        let mut at = offset;
        while at < offset + len {
            let index = at / SECTOR;
            let end = ((index + 1) * SECTOR).min(offset + len);
            let mut sector = self.sector(index);
            for position in at..end {
                sector[(position % SECTOR) as usize] = byte_at(position - offset);
            }
            self.pending.entry(index).or_default().push(sector);
            at = end;
        }
    }

    fn settle(&mut self, index: u64, sector: Sector) {
        if sector == NONE {
            self.durable.remove(&index);
        } else {
            self.durable.insert(index, sector);
        }
    }
}

impl SimFile {
    pub fn new(host: &SimHost) -> Self {
        Self { host: host.clone(), state: Arc::default() }
    }

    /// The host loses power: of the contents that a sector had since the last sync any one is left, or the one before.
    pub fn crash(&self) {
        let mut state = self.state.lock();
        state.phantom.clear();
        for (index, versions) in std::mem::take(&mut state.pending) {
            let left = self.host.pick(versions.len() as u64 + 1) as usize;
            if left > 0 {
                state.settle(index, versions[left - 1]);
            }
        }
        let lens = std::mem::take(&mut state.pending_len);
        let left = self.host.pick(lens.len() as u64 + 1) as usize;
        if left > 0 {
            state.durable_len = lens[left - 1];
        }
        let len = state.durable_len;
        state.durable.retain(|&index, _| index * SECTOR < len);
    }

    /// Damages the durable bytes at `offset`.
    pub fn corrupt(&self, offset: u64, mask: u8) {
        let mut state = self.state.lock();
        assert!(state.pending.is_empty(), "corrupt a file that is at rest");
        let mut sector = state.sector(offset / SECTOR);
        sector[(offset % SECTOR) as usize] ^= mask;
        state.settle(offset / SECTOR, sector);
    }
}

impl Storage for SimFile {
    fn size(&self) -> Result<u64> {
        Ok(self.state.lock().len())
    }

    fn allocated(&self) -> Result<u64> {
        let state = self.state.lock();
        let mut used: Vec<u64> = state.durable.keys().chain(state.pending.keys()).copied().collect();
        used.sort_unstable();
        used.dedup();
        Ok(used.into_iter().filter(|&index| state.sector(index) != NONE).count() as u64 * SECTOR)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let state = self.state.lock();
        let mut at = 0;
        while at < buf.len() {
            let position = offset + at as u64;
            let within = (position % SECTOR) as usize;
            let count = (512 - within).min(buf.len() - at);
            buf[at..at + count].copy_from_slice(&state.sector(position / SECTOR)[within..within + count]);
            at += count;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.host.step("write")?;
        let mut state = self.state.lock();
        state.change(offset, buf.len() as u64, |at| buf[at as usize]);
        let end = offset + buf.len() as u64;
        if end > state.len() {
            state.pending_len.push(end);
        }
        Ok(())
    }

    fn write_durable_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        // Two steps, so that a crash can fall between them and leave the write torn.
        self.write_at(offset, buf)?;
        if let Err(error) = self.host.step("write through") {
            // As after a failed sync: the cache shows it, the disk does not have it, nobody will write it.
            let mut state = self.state.lock();
            for index in offset / SECTOR..(offset + buf.len() as u64).div_ceil(SECTOR) {
                if let Some(versions) = state.pending.remove(&index) {
                    state.phantom.insert(index, *versions.last().expect("never empty"));
                }
            }
            return Err(error);
        }
        let mut state = self.state.lock();
        for index in offset / SECTOR..(offset + buf.len() as u64).div_ceil(SECTOR) {
            if let Some(versions) = state.pending.remove(&index) {
                state.settle(index, *versions.last().expect("never empty"));
            }
        }
        state.durable_len = state.len();
        state.pending_len.clear();
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let outcome = self.host.step("sync");
        let mut state = self.state.lock();
        for (index, versions) in std::mem::take(&mut state.pending) {
            let newest = *versions.last().expect("never empty");
            if outcome.is_ok() {
                state.phantom.remove(&index);
                state.settle(index, newest);
                continue;
            }
            state.phantom.insert(index, newest);
            let left = self.host.pick(versions.len() as u64 + 1) as usize;
            if left > 0 {
                state.settle(index, versions[left - 1]);
            }
        }
        state.durable_len = state.len();
        state.pending_len.clear();
        outcome
    }

    fn drop_cache(&self) -> Result<()> {
        self.state.lock().phantom.clear();
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.host.step("set the size")?;
        let mut state = self.state.lock();
        let now = state.len();
        assert!(len >= now, "the engine never cuts a file");
        state.pending_len.push(len);
        Ok(())
    }

    fn allocate(&self, _offset: u64, _len: u64) -> Result<()> {
        self.host.step("reserve")
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.host.step("punch")?;
        self.state.lock().change(offset, len, |_| 0);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        let state = self.state.lock();
        let from = offset / SECTOR;
        let found = state
            .durable
            .range(from..)
            .map(|(index, _)| *index)
            .chain(state.pending.range(from..).map(|(index, _)| *index));
        let found = found.chain(state.phantom.range(from..).map(|(index, _)| *index)).min();
        Ok(found.map(|index| (index * SECTOR).max(offset)).filter(|&at| at < state.len()))
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        let state = self.state.lock();
        let mut index = offset / SECTOR;
        while state.sector(index) != NONE {
            index += 1;
        }
        Ok((index * SECTOR).max(offset).min(state.len().max(offset)))
    }
}
