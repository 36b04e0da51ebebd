//! What a disk may hold after a power cut.

use std::fmt;
use std::sync::Arc;

use cowdisk::overlay::Overlay;

use crate::common::live::LiveCopy;
use crate::common::record::{Content, Event, Files, Log, content};
use crate::disk::Disk;

/// What a run tells of itself besides the changes of its files.
#[derive(Clone, Debug)]
pub enum Mark {
    /// A request begins, which gives some sectors of the windows new contents.
    Asked(Asked),
    /// Everything before it is durable.
    Flushed,
    AskedToGrow(u64),
    Grown(u64),
    /// The live map as it is now.
    Live(Option<Arc<LiveCopy>>),
}

/// Sectors, by their number in all windows, and their new contents.
#[derive(Clone)]
pub struct Asked(pub Vec<(usize, Content)>);

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.iter().map(|(sector, content)| (sector, tag(content)))).finish()
    }
}

/// What each sector may hold after a power cut: the content of the last completed flush, and all later ones.
#[derive(Clone, Debug)]
pub struct Oracle {
    allowed: Vec<Vec<Content>>,
    size: u64,
    asked_size: u64,
    /// Grows whenever it becomes stricter.
    pub epoch: u64,
}

impl Oracle {
    /// All of a disk of `size` bytes is durable.
    pub fn new(durable: Vec<Content>, size: u64) -> Self {
        let allowed = durable.into_iter().map(|content| vec![content]).collect();
        Self { allowed, size, asked_size: size, epoch: 0 }
    }

    pub fn apply(&mut self, mark: &Mark) {
        match mark {
            Mark::Asked(Asked(sectors)) => {
                for (sector, content) in sectors {
                    self.allowed[*sector].push(content.clone());
                }
            }
            Mark::Flushed => {
                self.epoch += 1;
                for allowed in &mut self.allowed {
                    allowed.drain(..allowed.len() - 1);
                }
            }
            Mark::AskedToGrow(size) => self.asked_size = *size,
            Mark::Grown(size) => {
                self.epoch += 1;
                (self.size, self.asked_size) = (*size, *size);
            }
            Mark::Live(_) => {}
        }
    }

    /// What the windows hold now, if each sector holds what it may.
    pub fn check(&self, disk: &Disk, overlay: &Overlay) -> Vec<Content> {
        let size = overlay.size();
        assert!(size == self.size || size == self.asked_size, "the size is {size}, not {}", self.size);
        let mut found = Vec::with_capacity(self.allowed.len());
        for &(start, len) in &disk.windows {
            let mut bytes = vec![0; len as usize];
            let here = len.min(size.saturating_sub(start)) as usize;
            overlay.read_at(start, &mut bytes[..here]).expect("read a window");
            found.extend(bytes.as_chunks::<512>().0.iter().map(content));
        }
        for (sector, (found, allowed)) in found.iter().zip(&self.allowed).enumerate() {
            assert!(
                allowed.contains(found),
                "sector {sector} of the windows {:?} holds {:#x}, not one of {:#x?}",
                disk.windows,
                tag(found),
                allowed.iter().map(tag).collect::<Vec<_>>()
            );
        }
        found
    }
}

/// The number of the write that a sector's content is of.
fn tag(content: &Content) -> u64 {
    content.as_ref().map_or(0, |bytes| u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")))
}

/// A moment of a run.
pub struct Moment {
    pub files: Files,
    pub oracle: Oracle,
    /// The live map of a little before.
    pub live: Option<Arc<LiveCopy>>,
}

impl Moment {
    pub fn new(log: &Log<Mark>, oracle: Oracle, live: Option<Arc<LiveCopy>>) -> Self {
        Self { files: Files::new(&log.start), oracle, live }
    }

    pub fn step(&mut self, number: usize, event: &Event<Mark>) {
        self.files.step(number, event);
        if let Event::Mark(mark) = event {
            self.oracle.apply(mark);
            if let Mark::Live(copy) = mark {
                self.live = copy.clone();
            }
        }
    }
}
