//! The verifier of one layer: reads its two files, and its live map if there is one, and says what is not as it should be.
//!
//! It changes nothing, needs no lock, and never fails: what cannot be read is a finding too. The states that it holds the
//! data file against are those that an opening would use. What does not fit is read again until it stands still: what a
//! write does meanwhile is no finding. [`repair`] mends what can be mended without
//! losing anything; every step of it leaves the layer as whole as it was, so that a crash between any two does no harm.

mod left;
mod superblocks;

use std::path::Path;
use std::time::Duration;

use super::LayerFiles;
use super::durable_map::Position;
use super::live_map::{self, Binding};
use super::map_scan::{MapFault, MapScan};
use super::states::SparseStates;
use crate::error::{Context, Error, Result};
use crate::finding::{Finding, Outcome, Remedy, Severity};
use crate::format::{
    BLOCKS_PER_PAGE, BaseRef, BlockState, SUPERBLOCK_BYTES, SessionId, Superblock, page_count,
};
use crate::units::{BlockSpan, Geometry, HumanBytes};

/// How often a layer in use is read until it stands still.
const ATTEMPTS_MAX: u32 = 20;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(10);

/// Most pages that a message names.
const PAGES_SHOWN_MAX: usize = 3;

/// The kind of the finding that there is data in blocks that are not `Data`.
const UNMAPPED: &str = "data-unmapped";
/// The kind of the finding that there is a live map which nothing needs.
const LEFT: &str = "live-map-left";

/// Whether anybody has the layer open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Nobody; the caller sees to it, or the caller is alone.
    Free,
    /// Somebody may be writing to it.
    InUse,
}

/// What a check of a layer has found.
#[derive(Debug, Default)]
pub struct LayerReport {
    /// What the layer says of itself, if that can be read.
    pub superblock: Option<Superblock>,
    /// What is not as it should be.
    pub findings: Vec<Finding>,
}

/// Checks the layer `name`, whose live map, if it has one, is at `live_map` (`None`: there is no place for one, for none
/// was needed since the host's boot).
pub fn check(name: &str, files: &LayerFiles, live_map: Option<&Path>, usage: Usage) -> LayerReport {
    let checker = Checker { object: format!("disk {name}"), files, live_map, usage };
    checker.look_until_it_stands_still()
}

/// Checks the layer and mends what can be mended. The caller sees to it that nobody else has it open.
///
/// # Errors
/// If what the host's cache holds of the map cannot be made durable: nothing was changed then.
pub fn repair(name: &str, files: &LayerFiles, live_map: Option<&Path>) -> Result<LayerReport> {
    // As at an opening: what is read from now on is on the disk (I10).
    files.map.sync()?;
    files.map.drop_cache()?;
    let checker = Checker { object: format!("disk {name}"), files, live_map, usage: Usage::Free };
    let mut look = checker.look_at_map();
    checker.look_at_data(&mut look);
    let rewritten = checker.rewrite_superblock(&look);
    let punched = checker.punch(&look);
    let removed = checker.remove_left_live_map(&look);
    for finding in look.findings.iter_mut().filter(|finding| finding.can_be_repaired()) {
        let result = match finding.kind {
            UNMAPPED => &punched,
            LEFT => &removed,
            _ => &rewritten,
        };
        finding.outcome = match result {
            Ok(()) => Outcome::Mended,
            Err(error) => Outcome::Failed(error.to_string()),
        };
    }
    Ok(look.into_report())
}

/// What to do about a layer whose map cannot be trusted.
fn from_backup() -> Remedy {
    Remedy::Operator(
        "bring both files of the disk, .map and .data, back from one backup, or give the instance up"
            .to_owned(),
    )
}

struct Checker<'a> {
    object: String,
    files: &'a LayerFiles,
    live_map: Option<&'a Path>,
    usage: Usage,
}

/// One reading of a layer.
#[derive(Default)]
struct Look {
    superblock: Option<Superblock>,
    /// The copy of the superblock that a repair writes anew.
    rewrite: Option<u64>,
    /// How far the durable map had come when a live map was found that nothing needs.
    left: Option<Position>,
    /// The states that an opening would use, if it would open the layer.
    states: Option<SparseStates>,
    findings: Vec<Finding>,
}

impl Look {
    fn into_report(self) -> LayerReport {
        LayerReport { superblock: self.superblock, findings: self.findings }
    }

    fn generation(&self) -> Option<u64> {
        self.superblock.as_ref().map(|superblock| superblock.generation)
    }

    fn has_damage(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Damage)
    }

    /// Takes back that a repair writes a copy of the superblock anew. What is damaged may be so because the copy that
    /// can be read is an old one: then what is left of the newer one is the last that tells of it.
    fn leave_superblocks(&mut self) {
        self.rewrite = None;
        for finding in self.findings.iter_mut().filter(|finding| finding.kind.starts_with("superblock-")) {
            if finding.can_be_repaired() {
                finding.remedy =
                    Remedy::Nothing("both copies are left as they are while the disk is damaged".to_owned());
            }
        }
    }
}

impl Checker<'_> {
    /// Reads the map until it stands still, then the data file.
    fn look_until_it_stands_still(&self) -> LayerReport {
        let mut before: Option<Look> = None;
        for _ in 0..ATTEMPTS_MAX {
            let mut look = self.look_at_map();
            // Within one generation of the superblock no current page is overwritten.
            let now = superblocks::read(&self.object, self.files.map.as_ref());
            let generation = now.ok().and_then(|copies| copies.newest).map(|newest| newest.generation);
            let settled = generation == look.generation();
            let again = before.as_ref().is_some_and(|before| before.findings == look.findings);
            if settled && (look.findings.is_empty() || again) {
                self.look_at_data(&mut look);
                return look.into_report();
            }
            before = settled.then_some(look);
            if self.usage == Usage::InUse {
                std::thread::sleep(ATTEMPT_PAUSE);
            }
        }
        let message = "it changed whenever it was read: not checked".to_owned();
        let remedy =
            Remedy::Nothing("it is in use; check it again when it is not written to so much".to_owned());
        let superblock = before.and_then(|look| look.superblock);
        LayerReport { superblock, findings: vec![self.finding("in-use", Severity::Note, message, remedy)] }
    }

    fn look_at_map(&self) -> Look {
        let mut look = Look::default();
        if let Err(error) = self.read_map(&mut look) {
            look.states = None;
            look.findings.push(self.unreadable(&error));
        }
        look
    }

    fn look_at_data(&self, look: &mut Look) {
        self.judge_data_of(look);
        if look.has_damage() {
            look.leave_superblocks();
        }
    }

    fn judge_data_of(&self, look: &mut Look) {
        let (Some(superblock), Some(states)) = (&look.superblock, &look.states) else { return };
        let geometry = superblock.geometry;
        match self.judge_data(geometry, states, look.has_damage()).context(|| "read the data file") {
            Ok(findings) => look.findings.extend(findings),
            Err(error) => look.findings.push(self.unreadable(&error)),
        }
    }

    fn unreadable(&self, error: &Error) -> Finding {
        let remedy =
            Remedy::Operator("check the host's disk; what it cannot read must come from a backup".to_owned());
        self.finding("read-error", Severity::Damage, error.to_string(), remedy)
    }

    fn finding(&self, kind: &'static str, severity: Severity, message: String, remedy: Remedy) -> Finding {
        Finding::new(kind, severity, self.object.clone(), message, remedy)
    }

    fn read_map(&self, look: &mut Look) -> Result<()> {
        let copies =
            superblocks::read(&self.object, self.files.map.as_ref()).context(|| "read the superblock")?;
        look.findings.extend(copies.finding);
        look.rewrite = copies.to_rewrite;
        let Some(superblock) = copies.newest else { return Ok(()) };
        look.superblock = Some(superblock.clone());
        if let BaseRef::Image { size, .. } = superblock.base
            && size > superblock.geometry.size()
        {
            let message = format!("superblock: a base of {size} bytes, larger than the disk");
            look.findings.push(self.finding("base-size", Severity::Damage, message, from_backup()));
        }
        let scan = MapScan::read(self.files.map.as_ref(), &superblock).context(|| "read the map")?;
        self.judge_scan(look, &superblock, &scan);
        let Some(states) = self.states_of_an_opening(look, &superblock, scan)? else { return Ok(()) };
        self.judge_end(look, superblock.geometry, &states);
        look.states = Some(states);
        Ok(())
    }

    fn judge_scan(&self, look: &mut Look, superblock: &Superblock, scan: &MapScan) {
        for fault in &scan.faults {
            let (kind, details) = match fault {
                MapFault::PagesDiffer => ("pages", shown_pages(superblock.geometry, &scan.torn_pages)),
                MapFault::PageNewer { .. } => ("pages", String::new()),
                MapFault::BehindEnd { .. } => ("states-past-end", String::new()),
                MapFault::RecordLost { .. } | MapFault::RecordInvalid { .. } => ("journal", String::new()),
            };
            let message = format!("{fault}{details}");
            look.findings.push(self.finding(kind, Severity::Damage, message, from_backup()));
        }
        if !scan.faults.is_empty() {
            return;
        }
        let mut note = |kind, message: String, why: &str| {
            let remedy = Remedy::Nothing(why.to_owned());
            look.findings.push(self.finding(kind, Severity::Note, message, remedy));
        };
        if let [first, ..] = scan.torn_pages[..] {
            let message = format!(
                "{} old or half-written copies of map pages are not whole (the first is of page {first})",
                scan.torn_pages.len()
            );
            note(
                "page-copy",
                message,
                "they are not in use; the next checkpoint of these pages writes them anew",
            );
        }
        if scan.checkpoint_cut {
            let message = "an interrupted checkpoint left pages".to_owned();
            note("checkpoint-cut", message, "they are not in use; the next checkpoint writes them anew");
        }
        if scan.record_cut {
            let message = format!("the journal ends in a torn record, number {}", scan.next_sequence);
            note("record-cut", message, "a crash cut that commit short, so nobody was told that it was done");
        }
    }

    /// The states that an opening would use; `None` if it would refuse the layer.
    fn states_of_an_opening(
        &self,
        look: &mut Look,
        superblock: &Superblock,
        scan: MapScan,
    ) -> Result<Option<SparseStates>> {
        let durable = scan.faults.is_empty().then_some(scan.states);
        let position = Position { generation: superblock.generation, next_sequence: scan.next_sequence };
        let SessionId::NONE = superblock.session else {
            return self.states_of_a_session(look, superblock, position, durable);
        };
        if durable.is_some() {
            self.look_for_left_live_map(look, superblock, position)?;
        }
        Ok(durable)
    }

    /// [`Checker::states_of_an_opening`] of a layer that was not closed.
    fn states_of_a_session(
        &self,
        look: &mut Look,
        superblock: &Superblock,
        position: Position,
        durable: Option<SparseStates>,
    ) -> Result<Option<SparseStates>> {
        let position = (self.usage == Usage::Free).then_some(position);
        let found = self.look_at_live_map(superblock, position);
        if self.usage == Usage::InUse {
            return Ok(match found? {
                live_map::Look::Bound(states) => Some(states),
                live_map::Look::Distrusted | live_map::Look::Missing => durable,
            });
        }
        let this_boot = superblock.boot == live_map::current_boot()?;
        let accept = "mount with -o accept_loss to go back to the last completed flush";
        let (states, kind, severity, message, remedy) = match found {
            Ok(live_map::Look::Bound(states)) => {
                let remedy = Remedy::Nothing(
                    "its live map is there: the next opening goes on where it ended".to_owned(),
                );
                let message = "not closed: who served it died".to_owned();
                (durable.map(|_| states), "session-open", Severity::Note, message, remedy)
            }
            Ok(live_map::Look::Distrusted) => {
                let message = "not closed: a sync of the host's disk had failed".to_owned();
                let remedy = Remedy::Operator(
                    "check the host's disk; the next opening goes back to the last completed flush"
                        .to_owned(),
                );
                (durable, "sync-failed", Severity::Warning, message, remedy)
            }
            Ok(live_map::Look::Missing) if this_boot => {
                let message =
                    "not closed, and its live map is gone, with what was written since the last flush";
                let remedy = Remedy::Operator(format!("bring the live map back, or {accept}"));
                (None, "live-map-lost", Severity::Damage, message.to_owned(), remedy)
            }
            Ok(live_map::Look::Missing) => {
                let message = "not closed: the host went down".to_owned();
                let remedy =
                    Remedy::Nothing("the next opening goes back to the last completed flush".to_owned());
                (durable, "session-open", Severity::Note, message, remedy)
            }
            Err(error) => {
                let remedy = Remedy::Operator(format!("remove that file, and {accept}"));
                (None, "live-map-damaged", Severity::Damage, error.to_string(), remedy)
            }
        };
        look.findings.push(self.finding(kind, severity, message, remedy));
        Ok(states)
    }

    /// The live map of the layer's session, if that is of this boot.
    fn look_at_live_map(
        &self,
        superblock: &Superblock,
        position: Option<Position>,
    ) -> Result<live_map::Look> {
        let boot = live_map::current_boot()?;
        match self.live_map {
            Some(path) if superblock.boot == boot => {
                let binding = Binding { layer: superblock.layer, session: superblock.session, boot };
                live_map::look(path, binding, position, page_count(superblock.geometry))
            }
            _ => Ok(live_map::Look::Missing),
        }
    }

    /// No block past the disk's end has a state of its own: growing the disk would show it, so opening refuses it.
    fn judge_end(&self, look: &mut Look, geometry: Geometry, states: &SparseStates) {
        let blocks = geometry.blocks();
        if let Some(block) = states.block_behind(blocks) {
            let message = format!("live map: {}", MapFault::BehindEnd { block, blocks });
            look.findings.push(self.finding("states-past-end", Severity::Damage, message, from_backup()));
        }
    }

    fn judge_data(&self, geometry: Geometry, states: &SparseStates, damaged: bool) -> Result<Vec<Finding>> {
        let mut findings = Vec::new();
        // After the states: the file only grows.
        let size = self.files.data.size()?;
        let whole_blocks = size / u64::from(geometry.block_bytes());
        let mut damaged = damaged;
        match states.last_data_block() {
            Some(last) if last >= whole_blocks => {
                let message = format!(
                    "the data file ends at byte {size}, before data that the map names (block {last})"
                );
                findings.push(self.finding("data-cut", Severity::Damage, message, from_backup()));
                damaged = true;
            }
            _ if size < geometry.data_bytes() => {
                let message = format!("the data file ends at byte {size}, before the disk does");
                let remedy = Remedy::Nothing("the next opening extends it; no data is missing".to_owned());
                findings.push(self.finding("data-short", Severity::Note, message, remedy));
            }
            _ => {}
        }
        // What is being written has its place in the data file some time before its state says so.
        let bytes = if self.usage == Usage::InUse { 0 } else { self.unmapped_bytes(geometry, states)? };
        if bytes > 0 {
            let message = format!("{} of data lie outside of what the map calls data", HumanBytes(bytes));
            let remedy = if damaged {
                Remedy::Nothing("it is left alone as long as the disk is damaged".to_owned())
            } else {
                Remedy::Repair("gives that space back to the host".to_owned())
            };
            findings.push(self.finding(UNMAPPED, Severity::Note, message, remedy));
        }
        Ok(findings)
    }

    /// Bytes of data in blocks that are not `Data`.
    fn unmapped_bytes(&self, geometry: Geometry, states: &SparseStates) -> Result<u64> {
        let mut bytes = 0;
        self.for_each_unmapped(geometry, states, |_, len| {
            bytes += len;
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Calls `found` with each run of blocks that are not `Data` and that hold data in the data file, and the bytes of it.
    fn for_each_unmapped(
        &self,
        geometry: Geometry,
        states: &SparseStates,
        mut found: impl FnMut(BlockSpan, u64) -> Result<()>,
    ) -> Result<()> {
        let block_bytes = u64::from(geometry.block_bytes());
        let mut at = 0;
        while let Some(start) = self.files.data.next_data(at)? {
            let end = self.files.data.next_hole(start)?.max(start + 1);
            let (mut block, last) = (start / block_bytes, end.div_ceil(block_bytes));
            while block < last {
                let extent = states.extent(block, last);
                if extent.state != BlockState::Data {
                    let (from, to) = (extent.span.start * block_bytes, extent.span.end * block_bytes);
                    found(extent.span, to.min(end) - from.max(start))?;
                }
                block = extent.span.end;
            }
            at = end;
        }
        Ok(())
    }

    /// I5: the copy that is written is not the one that is read.
    fn rewrite_superblock(&self, look: &Look) -> Result<()> {
        let (Some(copy), Some(superblock)) = (look.rewrite, &look.superblock) else { return Ok(()) };
        let offset = copy * SUPERBLOCK_BYTES as u64;
        self.files.map.write_durable_at(offset, &superblock.encode()).context(|| "superblock")
    }

    /// Punches what no state refers to: a block that becomes `Data` later is written whole (I7).
    fn punch(&self, look: &Look) -> Result<()> {
        let (Some(superblock), Some(states)) = (&look.superblock, &look.states) else { return Ok(()) };
        if !look.findings.iter().any(|finding| finding.kind == UNMAPPED && finding.can_be_repaired()) {
            return Ok(());
        }
        let block_bytes = u64::from(superblock.geometry.block_bytes());
        self.for_each_unmapped(superblock.geometry, states, |span, _| {
            self.files.data.punch(span.start * block_bytes, span.len() * block_bytes)
        })?;
        self.files.data.sync()
    }
}

/// Which parts of the disk damaged pages describe, for a message.
fn shown_pages(geometry: Geometry, pages: &[u64]) -> String {
    let shown = pages.iter().take(PAGES_SHOWN_MAX).map(|page| {
        let span = BlockSpan::new(page * BLOCKS_PER_PAGE, (page + 1) * BLOCKS_PER_PAGE);
        let (offset, len) = geometry.bytes_of(span);
        format!("page {page}, for bytes {offset} to {} of the disk", offset + len)
    });
    let shown: Vec<String> = shown.collect();
    match (shown.len(), pages.len()) {
        (0, _) => String::new(),
        (some, all) if some < all => format!("; not whole: {} and {} more", shown.join(", "), all - some),
        _ => format!("; not whole: {}", shown.join(", ")),
    }
}
