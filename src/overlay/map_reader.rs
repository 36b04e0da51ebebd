//! Reading an overlay's map without opening the overlay: while a daemon serves it, or while nobody does.

use std::path::Path;

use super::durable_map::{DurableMap, read_superblock};
use super::live_map::{self, Binding, Look};
use super::states::{Extent, SparseStates};
use crate::error::{Context, Result};
use crate::format::{SessionId, Superblock, page_count};
use crate::storage::Storage;

/// A private copy of an overlay's map, as it was while it was read. Nothing on disk or in the live map changes.
#[derive(Debug)]
pub struct MapReader {
    superblock: Superblock,
    states: SparseStates,
}

impl MapReader {
    /// Reads the live map of this boot if the overlay is being written to, else the durable map.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] if the map is damaged; those of the host.
    pub fn open<S: Storage>(name: &str, map: S, live_map: &Path) -> Result<Self> {
        Self::read(map, live_map).context(|| format!("read the map of disk {name}"))
    }

    fn read<S: Storage>(map: S, live_map: &Path) -> Result<Self> {
        let superblock = read_superblock(&map)?;
        if superblock.session != SessionId::NONE
            && let Some(states) = read_live(&superblock, live_map)?
        {
            return Ok(Self { superblock, states });
        }
        let (durable, loaded) = DurableMap::load(map)?;
        Ok(Self { superblock: durable.superblock().clone(), states: loaded.states })
    }

    /// What the overlay says of itself.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The longest run from block `start` on.
    ///
    /// # Panics
    /// If `start` lies past the disk's last block.
    pub fn extent(&self, start: u64) -> Extent {
        self.states.extent(start, self.superblock.geometry.blocks())
    }

    /// All runs of the disk, in order.
    pub fn extents(&self) -> impl Iterator<Item = Extent> {
        let (mut block, end) = (0, self.superblock.geometry.blocks());
        std::iter::from_fn(move || {
            (block < end).then(|| {
                let extent = self.extent(block);
                block = extent.span.end;
                extent
            })
        })
    }
}

fn read_live(superblock: &Superblock, path: &Path) -> Result<Option<SparseStates>> {
    let binding =
        Binding { layer: superblock.layer, session: superblock.session, boot: live_map::current_boot()? };
    match live_map::look(path, binding, None, page_count(superblock.geometry))? {
        Look::Bound(states) => Ok(Some(states)),
        Look::Distrusted | Look::Missing => Ok(None),
    }
}
