//! The map of a disk, for people and as `qemu-img map --output=json` has it.
//!
//! One difference in meaning is unavoidable: QEMU's offsets are those of the file it names, which for an overlay of ours is
//! the data file (depth 0) or the base (depth 1). In both a byte lies where the disk has it.

use std::fmt;

use serde::Serialize;

use crate::format::BaseRef;
use crate::store::{DiskExtent, DiskExtentKind, DiskMap};
use crate::units::HumanBytes;

/// A part of a disk, with the fields of `qemu-img map --output=json` and no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct QemuExtent {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// 0: the disk itself; 1: its base.
    pub depth: u32,
    /// Whether disk or base say anything about it; false where the base has ended.
    pub present: bool,
    /// Whether it reads as zeroes, as far as can be told without reading.
    pub zero: bool,
    /// Whether there are bytes to read.
    pub data: bool,
    /// Never.
    pub compressed: bool,
    /// Where the bytes are in the file at that depth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

/// The map as QEMU tells it: in order, without gaps, neighbours that are alike made one.
pub fn qemu_extents(map: &DiskMap) -> impl Iterator<Item = QemuExtent> {
    // A disk without a base has, for QEMU, an offset for its holes as well, for it is one file.
    let one_file = map.base.is_none();
    let base_end = base_end(map.base);
    let parts = map.extents.iter().flat_map(move |extent| split_at(*extent, base_end));
    let mut parts = parts.map(move |extent| qemu_extent(extent, one_file, base_end)).peekable();
    std::iter::from_fn(move || {
        let mut whole = parts.next()?;
        while let Some(next) = parts.next_if(|next| continues(&whole, next)) {
            whole.length += next.length;
        }
        Some(whole)
    })
}

/// First byte past the base.
fn base_end(base: Option<BaseRef>) -> u64 {
    match base {
        Some(BaseRef::Image { size, .. }) => size,
        Some(BaseRef::Blank) | None => 0,
    }
}

/// The part before `end` and the part from there on, whichever of them there are.
fn split_at(extent: DiskExtent, end: u64) -> impl Iterator<Item = DiskExtent> {
    let before = end.saturating_sub(extent.offset).min(extent.len);
    let first = DiskExtent { len: before, ..extent };
    let second = DiskExtent { offset: extent.offset + before, len: extent.len - before, ..extent };
    [first, second].into_iter().filter(|part| part.len > 0)
}

fn qemu_extent(extent: DiskExtent, one_file: bool, base_end: u64) -> QemuExtent {
    let DiskExtent { offset: start, len: length, kind } = extent;
    let own = QemuExtent {
        start,
        length,
        depth: 0,
        present: true,
        zero: false,
        data: true,
        compressed: false,
        offset: None,
    };
    match kind {
        DiskExtentKind::Data => QemuExtent { offset: Some(start), ..own },
        DiskExtentKind::Zero => {
            QemuExtent { zero: true, data: false, offset: one_file.then_some(start), ..own }
        }
        DiskExtentKind::Base => QemuExtent { depth: 1, offset: Some(start), ..own },
        DiskExtentKind::BaseZero if start < base_end => {
            QemuExtent { depth: 1, zero: true, data: false, offset: Some(start), ..own }
        }
        DiskExtentKind::BaseZero => QemuExtent { present: false, zero: true, data: false, ..own },
    }
}

/// Whether `next` is the same kind of part as `whole`, and goes on where that ends.
fn continues(whole: &QemuExtent, next: &QemuExtent) -> bool {
    let offset = whole.offset.map(|offset| offset + whole.length);
    let moved = QemuExtent { start: next.start, length: next.length, offset, ..*whole };
    moved == *next
}

/// One line of the map for people.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    extent: DiskExtent,
    map: &'a DiskMap,
}

/// The heading of the lines.
pub const HEADING: &str = "        OFFSET          LENGTH  STATE  WHERE";

/// The map for people, line by line; offsets and lengths in bytes.
pub fn lines(map: &DiskMap) -> impl Iterator<Item = Line<'_>> {
    let end = base_end(map.base);
    let split = move |extent: &DiskExtent| match extent.kind {
        DiskExtentKind::BaseZero => split_at(*extent, end),
        _ => split_at(*extent, u64::MAX),
    };
    map.extents.iter().flat_map(split).map(move |extent| Line { extent, map })
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DiskExtent { offset, len, kind } = self.extent;
        let past_base = offset >= base_end(self.map.base);
        let (state, place) = match kind {
            DiskExtentKind::Data => ("data", "the disk's own file"),
            DiskExtentKind::Zero => ("zero", "nowhere: zeroes"),
            DiskExtentKind::Base => ("base", "its base"),
            DiskExtentKind::BaseZero if self.map.base == Some(BaseRef::Blank) => {
                ("base", "nowhere: blank base")
            }
            DiskExtentKind::BaseZero if past_base => ("base", "nowhere: past the base's end"),
            DiskExtentKind::BaseZero => ("base", "nowhere: a hole of its base"),
        };
        write!(f, "{offset:>14}  {len:>14}  {state:<5}  {place}")
    }
}

/// How much of a disk comes from where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes in the disk's own file.
    pub data: u64,
    /// Bytes that are zeroes by the disk's own word.
    pub zero: u64,
    /// Bytes that the base has.
    pub base: u64,
    /// Bytes that neither has: they read as zeroes.
    pub neither: u64,
    /// Number of [lines].
    pub extents: usize,
}

impl Summary {
    /// Adds up a map.
    pub fn of(map: &DiskMap) -> Self {
        let mut summary = Self { extents: lines(map).count(), ..Self::default() };
        for extent in &map.extents {
            match extent.kind {
                DiskExtentKind::Data => summary.data += extent.len,
                DiskExtentKind::Zero => summary.zero += extent.len,
                DiskExtentKind::Base => summary.base += extent.len,
                DiskExtentKind::BaseZero => summary.neither += extent.len,
            }
        }
        summary
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data, zero, base, neither, extents } = *self;
        let noun = if extents == 1 { "extent" } else { "extents" };
        let [data, zero, base, neither] = [data, zero, base, neither].map(HumanBytes);
        write!(f, "{extents} {noun}: {data} data, {zero} zero, {base} base, {neither} in neither")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BaseId;

    fn map(base: Option<BaseRef>, parts: &[(u64, DiskExtentKind)]) -> DiskMap {
        let mut offset = 0;
        let mut extents = Vec::new();
        for &(len, kind) in parts {
            extents.push(DiskExtent { offset, len, kind });
            offset += len;
        }
        DiskMap { size: offset, base, block_bytes: base.map(|_| 4096), extents }
    }

    fn over_image(size: u64, parts: &[(u64, DiskExtentKind)]) -> DiskMap {
        map(Some(BaseRef::Image { id: BaseId([7; 32]), size }), parts)
    }

    fn json(map: &DiskMap) -> Vec<String> {
        qemu_extents(map).map(|extent| serde_json::to_string(&extent).unwrap()).collect()
    }

    #[test]
    fn an_overlay_looks_as_a_qcow2_over_a_backing_file_does() {
        use DiskExtentKind::{Base, BaseZero, Data, Zero};
        // What qemu-img 10.0 printed for a qcow2 of the same making, but for the offsets in the overlay's own file.
        let map =
            over_image(0x20000, &[(0x10000, Base), (0x8000, Data), (0x4000, Zero), (0x14000, BaseZero)]);
        assert_eq!(
            json(&map),
            [
                r#"{"start":0,"length":65536,"depth":1,"present":true,"zero":false,"data":true,"compressed":false,"offset":0}"#,
                r#"{"start":65536,"length":32768,"depth":0,"present":true,"zero":false,"data":true,"compressed":false,"offset":65536}"#,
                r#"{"start":98304,"length":16384,"depth":0,"present":true,"zero":true,"data":false,"compressed":false}"#,
                r#"{"start":114688,"length":16384,"depth":1,"present":true,"zero":true,"data":false,"compressed":false,"offset":114688}"#,
                r#"{"start":131072,"length":65536,"depth":0,"present":false,"zero":true,"data":false,"compressed":false}"#,
            ]
        );
    }

    #[test]
    fn a_disk_of_its_own_looks_as_a_raw_file_does() {
        let map = map(None, &[(4096, DiskExtentKind::Data), (8192, DiskExtentKind::Zero)]);
        let extents: Vec<QemuExtent> = qemu_extents(&map).collect();
        assert_eq!(extents[1].offset, Some(4096));
        assert!(extents[1].zero && extents[1].present && !extents[1].data);
    }

    #[test]
    fn alike_neighbours_are_one() {
        use DiskExtentKind::{BaseZero, Data};
        let extents =
            json(&over_image(1 << 20, &[(4096, Data), (4096, Data), (4096, BaseZero), (4096, BaseZero)]));
        assert_eq!(extents.len(), 2);
        assert!(extents[1].contains(r#""start":8192,"length":8192,"#), "{}", extents[1]);
    }

    #[test]
    fn lines_say_where_the_bytes_are() {
        use DiskExtentKind::{BaseZero, Data};
        let map = over_image(8192, &[(4096, Data), (8192, BaseZero)]);
        let lines: Vec<String> = lines(&map).map(|line| line.to_string()).collect();
        assert_eq!(
            lines,
            [
                "             0            4096  data   the disk's own file",
                "          4096            4096  base   nowhere: a hole of its base",
                "          8192            4096  base   nowhere: past the base's end",
            ]
        );
        assert_eq!(
            Summary::of(&map).to_string(),
            "3 extents: 4 KiB data, 0 B zero, 0 B base, 8 KiB in neither"
        );
    }

    #[test]
    fn the_heading_stands_above_its_columns() {
        let map = over_image(8192, &[(4096, DiskExtentKind::Data)]);
        let line = lines(&map).next().unwrap().to_string();
        assert_eq!(HEADING.find("STATE"), line.find("data"));
        assert_eq!(HEADING.find("WHERE"), line.find("the disk"));
        assert_eq!(HEADING.find("LENGTH").map(|at| at + "LENGTH".len()), line.find("4096").map(|at| at + 4));
    }
}
