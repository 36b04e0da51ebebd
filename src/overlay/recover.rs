//! Opening an overlay, after whatever ended its last session.
//!
//! | found | meaning | states come from |
//! |---|---|---|
//! | no session in the superblock | closed cleanly, or never written to | durable map |
//! | a session, and a live map bound to it and to this boot | the daemon died | live map; where the durable map differs, the next flush commits |
//! | a session of an earlier boot | the host went down | durable map |
//! | a session of this boot, its live map marked worthless | a sync had failed | durable map, and what the disk, not the cache, holds |
//! | a session of this boot, and no live map of it | somebody removed it, or put a backup in the layer's place | none: refused, unless the caller accepts the loss |

use std::path::Path;
use std::sync::atomic::AtomicU64;

use super::alloc_map::AllocMap;
use super::base::BaseImage;
use super::block_locks::BlockLocks;
use super::blocks::Blocks;
use super::commit::{Commits, extend};
use super::durable_map::{DurableMap, Loaded};
use super::live_map::{self, Binding, LiveMap, TakeUp, current_boot};
use super::map_scan::{BlockContents, MapFault};
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
    /// [`ErrorKind::Corrupt`] if the map is damaged, if `base` is not what the overlay was made over, if data that the
    /// map names is missing, or if the live map that holds the last writes is gone; [`ErrorKind::NoSpace`] if the live
    /// map does not fit its tmpfs; [`ErrorKind::Busy`] if it is in use.
    pub fn open(name: &str, files: LayerFiles, base: BaseImage, live_map: &Path) -> Result<Self> {
        open(name, files, base, live_map, WhenLost::Refuse).context(|| format!("open disk {name}"))
    }

    /// Like [`Overlay::open`], but where the live map is gone it goes back to the last completed flush, as after a crash
    /// of the host.
    ///
    /// # Errors
    /// Those of [`Overlay::open`].
    pub fn open_accepting_loss(
        name: &str,
        files: LayerFiles,
        base: BaseImage,
        live_map: &Path,
    ) -> Result<Self> {
        open(name, files, base, live_map, WhenLost::Accept).context(|| format!("open disk {name}"))
    }
}

impl Overlay {
    /// Opens an overlay that an earlier process had open for guests that still run: where it left off, or not at all. A
    /// disk that was written to needs its live map whole.
    ///
    /// # Errors
    /// Those of [`Overlay::open`]; [`ErrorKind::Corrupt`] also if the live map is marked worthless.
    pub fn adopt(name: &str, files: LayerFiles, base: BaseImage, live_map: &Path) -> Result<Self> {
        open(name, files, base, live_map, WhenLost::NeedAll).context(|| format!("open disk {name}"))
    }
}

/// What to do where the live map of this boot is gone, and with it writes that were answered but not flushed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WhenLost {
    Refuse,
    Accept,
    /// As [`WhenLost::Refuse`], and also where the map is there, but worthless.
    NeedAll,
}

fn open(
    name: &str,
    files: LayerFiles,
    base: BaseImage,
    live_map: &Path,
    when_lost: WhenLost,
) -> Result<Overlay> {
    let latch = Latch::new();
    let data = LatchedStorage::new(files.data, latch.clone());
    let map = LatchedStorage::new(files.map, latch.clone());
    // What a killed daemon wrote may be in the host's page cache only, and what a failed sync left there never reached
    // the disk: what is read from now on is on it (I10).
    map.sync()?;
    map.drop_cache()?;
    let (mut durable, Loaded { states, contents }) = DurableMap::load(map)?;
    let superblock = durable.superblock().clone();
    let geometry = superblock.geometry;
    check_base(&superblock, &base)?;

    let boot = current_boot()?;
    let pages = page_count(geometry);
    let left_behind = Binding { layer: superblock.layer, session: superblock.session, boot };
    let found = match superblock.session {
        SessionId::NONE => TakeUp::Missing,
        _ => LiveMap::take_up(live_map, left_behind, durable.position(), pages)?,
    };
    let is_taken_up = matches!(found, TakeUp::Taken(..));
    let map = if let TakeUp::Taken(live, live_states) = found {
        log::info!("disk {name}: taking up where an earlier daemon left off");
        if let Some(block) = live_states.block_behind(geometry.blocks()) {
            let fault = MapFault::BehindEnd { block, blocks: geometry.blocks() };
            return Err(fault.into_error().context("live map"));
        }
        check_data(&data, geometry.block_bytes(), &live_states)?;
        AllocMap::new(live, left_behind, durable, states.differing_spans(&live_states))
    } else {
        if superblock.session != SessionId::NONE {
            let lost = matches!(found, TakeUp::Missing) && superblock.boot == boot;
            match when_lost {
                WhenLost::Refuse if lost => return Err(live_map_is_gone(live_map)),
                WhenLost::NeedAll if matches!(found, TakeUp::Missing) => {
                    return Err(live_map_is_gone(live_map));
                }
                WhenLost::NeedAll => return Err(live_map_is_worthless(live_map)),
                WhenLost::Refuse | WhenLost::Accept => {}
            }
            log::warn!("disk {name}: was not closed; what was written after its last flush may be gone");
        } else if live_map.try_exists().unwrap_or(true)
            && live_map::is_ahead(live_map, superblock.layer, durable.position())?
        {
            // The host may have failed to write what began that session, and the sync that learnt of it was somebody else's.
            if when_lost == WhenLost::NeedAll {
                return Err(live_map_is_worthless(live_map));
            }
            log::warn!(
                "disk {name}: its last session is lost; what was written after its last flush may be gone"
            );
        }
        go_back(&data, &mut durable, &states, &contents, live_map)?;
        let binding = Binding { layer: superblock.layer, session: SessionId::random()?, boot };
        let live = LiveMap::create(live_map, binding, pages, &states)?;
        AllocMap::new(live, binding, durable, Vec::new())
    };
    // What an earlier process wrote, and was not asked to flush, the next flush has to sync; and a new end of the file.
    let unsynced = extend(&data, geometry.data_bytes())? || is_taken_up;
    Ok(Overlay {
        name: name.to_owned(),
        grid: geometry,
        size: AtomicU64::new(geometry.size()),
        blocks: Blocks::new(geometry, data, base, map, unsynced),
        locks: BlockLocks::default(),
        latch,
        flush_tickets: AtomicU64::new(0),
        flushed_tickets: AtomicU64::new(0),
        commits: Commits::default(),
    })
}

/// Makes the data file what the last commit says, without the live map: what the host's cache has of it is not believed
/// (I10), and what only the journal has is put there. The last session is over then.
fn go_back(
    data: &LatchedStorage,
    durable: &mut DurableMap<LatchedStorage>,
    states: &SparseStates,
    contents: &[BlockContents],
    live_map: &Path,
) -> Result<()> {
    let geometry = durable.superblock().geometry;
    let was_open = durable.superblock().session != SessionId::NONE;
    // A session that was closed leaves no live map.
    if was_open || durable.has_contents() || live_map.try_exists().unwrap_or(true) {
        data.sync()?;
        data.drop_cache()?;
    }
    check_data(data, geometry.block_bytes(), states)?;
    if durable.has_contents() {
        // In their order: of what was committed twice the last one stays.
        for BlockContents { span, bytes } in contents {
            data.write_at(span.start * u64::from(geometry.block_bytes()), bytes)?;
        }
        data.sync()?;
    }
    // A crash before the next session begins loses nothing more, and brings back no contents over what that one writes.
    if was_open || durable.has_contents() { durable.end_session() } else { Ok(()) }
}

fn live_map_is_gone(path: &Path) -> Error {
    let message =
        format!("its live map {} is gone, and with it what was written since the last flush", path.display());
    Error::new(ErrorKind::Corrupt, message)
        .with_hint("bring it back, or mount with -o accept_loss to go back to the last flush")
}

fn live_map_is_worthless(path: &Path) -> Error {
    let message =
        format!("a sync had failed, so its live map {} names what may not be there", path.display());
    Error::new(ErrorKind::Corrupt, message)
        .with_hint("close the disk, and open it again: it then goes back to its last completed flush")
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
