//! Where the bytes of a disk come from, in parts.

use crate::error::Result;
use crate::format::BaseRef;

/// Where the bytes of a part of a disk come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskExtentKind {
    /// The disk's own file.
    Data,
    /// Zeroes of the disk's own: discarded, or never written in a file without a base.
    Zero,
    /// Data of the base.
    Base,
    /// Zeroes of the base: a hole in it, or past its end.
    BaseZero,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskExtent {
    /// First byte.
    pub offset: u64,
    /// Bytes, at least 1.
    pub len: u64,
    /// Where they come from.
    pub kind: DiskExtentKind,
}

/// All of a disk, in parts that are as long as they can be, in order and without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskMap {
    /// Bytes of the disk.
    pub size: u64,
    /// What an overlay is over; `None` for a disk that is no overlay.
    pub base: Option<BaseRef>,
    /// Bytes of a block; `None` for a disk that is no overlay.
    pub block_bytes: Option<u32>,
    /// The parts.
    pub extents: Vec<DiskExtent>,
}

/// Extents that join with their neighbours of the same kind.
#[derive(Default)]
pub(super) struct Extents(pub(super) Vec<DiskExtent>);

impl Extents {
    /// Adds a part behind those that are there.
    pub(super) fn add(&mut self, offset: u64, len: u64, kind: DiskExtentKind) {
        match self.0.last_mut() {
            Some(last) if last.kind == kind && last.offset + last.len == offset => last.len += len,
            _ if len > 0 => self.0.push(DiskExtent { offset, len, kind }),
            _ => {}
        }
    }

    /// Adds `from..to` of a file as data and holes.
    pub(super) fn add_file(
        &mut self,
        next_data: impl Fn(u64) -> Result<Option<u64>>,
        next_hole: impl Fn(u64) -> Result<u64>,
        from: u64,
        to: u64,
        data_kind: DiskExtentKind,
        hole_kind: DiskExtentKind,
    ) -> Result<()> {
        let mut at = from;
        while at < to {
            let data = next_data(at)?.unwrap_or(to).clamp(at, to);
            self.add(at, data - at, hole_kind);
            // A file that changes meanwhile may answer its own argument; then the rest counts as data.
            let hole = if data < to { next_hole(data)?.min(to) } else { to };
            let hole = if hole > data { hole } else { to };
            self.add(data, hole - data, data_kind);
            at = hole;
        }
        Ok(())
    }
}
