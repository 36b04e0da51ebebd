//! Opening an overlay, after whatever ended its last session.
//!
//! | found | meaning | states come from |
//! |---|---|---|
//! | no session in the superblock | closed cleanly, or never written to | durable map |
//! | a session, and a live map bound to it and to this boot | the daemon died | live map; where the durable map differs, the next flush commits |
//! | a session without such a live map | the host went down, or a sync had failed | durable map |

use std::path::Path;
use std::sync::atomic::AtomicU64;

use super::alloc_map::AllocMap;
use super::base::BaseImage;
use super::block_locks::BlockLocks;
use super::blocks::Blocks;
use super::commit::extend;
use super::durable_map::DurableMap;
use super::live_map::{Binding, LiveMap, current_boot};
use super::states::SparseStates;
use super::{LayerFiles, Overlay};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{BaseRef, SessionId, Superblock, page_count};
use crate::storage::{Latch, LatchedStorage, Storage};

impl Overlay {
    /// Opens an overlay for service. `name` is what messages call it; `live_map` is where its live map is, or will be
    /// made, in a folder that only we can enter. The caller sees to it that nobody else has the overlay open.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the map is damaged, if `base` is not what the overlay was made over, or if data that
    /// the map names is missing; [`ErrorKind::NoSpace`] if the live map does not fit its tmpfs.
    pub fn open(name: &str, files: LayerFiles, base: BaseImage, live_map: &Path) -> Result<Self> {
        open(name, files, base, live_map).context(|| format!("open disk {name}"))
    }
}

fn open(name: &str, files: LayerFiles, base: BaseImage, live_map: &Path) -> Result<Overlay> {
    let latch = Latch::new();
    let data = LatchedStorage::new(files.data, latch.clone());
    let map = LatchedStorage::new(files.map, latch.clone());
    // What a killed daemon wrote may be in the host's page cache only. Whatever is built upon what is read from now on
    // (an empty difference to the live map, a copy of the superblock that is not written first) needs it on the disk.
    map.sync()?;
    let (durable, states) = DurableMap::load(map)?;
    let superblock = durable.superblock().clone();
    let geometry = superblock.geometry;
    check_base(&superblock, &base)?;

    let boot = current_boot()?;
    let pages = page_count(geometry);
    let left_behind = Binding { layer: superblock.layer, session: superblock.session, boot };
    let taken_up = match superblock.session {
        SessionId::NONE => None,
        _ => LiveMap::take_up(live_map, left_behind, pages)?,
    };
    let map = match taken_up {
        Some((live, live_states)) => {
            log::info!("disk {name}: taking up where an earlier daemon left off");
            check_data(&data, geometry.block_bytes(), &live_states)?;
            AllocMap::new(live, left_behind, durable, states.differing_spans(&live_states))
        }
        None => {
            if superblock.session != SessionId::NONE {
                log::warn!("disk {name}: was not closed; what was written after its last flush may be gone");
            }
            check_data(&data, geometry.block_bytes(), &states)?;
            let binding = Binding { layer: superblock.layer, session: SessionId::random()?, boot };
            let live = LiveMap::create(live_map, binding, pages, &states)?;
            AllocMap::new(live, binding, durable, Vec::new())
        }
    };
    extend(&data, geometry.data_bytes())?;
    Ok(Overlay {
        name: name.to_owned(),
        grid: geometry,
        size: AtomicU64::new(geometry.size()),
        blocks: Blocks::new(geometry, data, base, map),
        locks: BlockLocks::default(),
        latch,
        flush_tickets: AtomicU64::new(0),
        flushed_tickets: AtomicU64::new(0),
    })
}

fn check_base(superblock: &Superblock, base: &BaseImage) -> Result<()> {
    if superblock.base != base.reference() {
        let message =
            format!("it was made over {}, not over {}", show(superblock.base), show(base.reference()));
        return Err(Error::new(ErrorKind::Corrupt, message).with_hint("bring back the base it was made over"));
    }
    if base.size() > superblock.geometry.size() {
        return Err(Error::new(ErrorKind::Corrupt, "superblock: the base is larger than the disk"));
    }
    Ok(())
}

fn show(base: BaseRef) -> String {
    match base {
        BaseRef::Blank => "a blank base".to_owned(),
        BaseRef::Image { id, size } => format!("base {id} of {size} bytes"),
    }
}

/// Data that the map names must be there: a shorter file was cut by somebody, and would read as zeroes.
fn check_data(data: &LatchedStorage, block_bytes: u32, states: &SparseStates) -> Result<()> {
    let size = data.size()?;
    let whole_blocks = size / u64::from(block_bytes);
    match states.last_data_block() {
        Some(last) if last >= whole_blocks => {
            let message =
                format!("the data file ends at byte {size}, before data that the map names (block {last})");
            Err(Error::new(ErrorKind::Corrupt, message))
        }
        _ => Ok(()),
    }
}
