//! Where each byte of a disk comes from.

use super::Store;
use super::dir::Access;
use super::layout::{DiskPart, disk_file};
use super::names::{DiskName, ObjectName};
use crate::error::{Context, Result};
use crate::format::{BaseRef, BlockState};
use crate::overlay::{BaseImage, MapReader, live_map_name, read_superblock};
use crate::storage::{FileStorage, Storage};

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

impl Store {
    /// Where each byte of a disk comes from, whether it is open or not. Changes nothing; of a disk that is being
    /// written to it shows some moment, not necessarily the same for all parts.
    ///
    /// # Errors
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such disk; [`Corrupt`](crate::ErrorKind::Corrupt) if its
    /// map or its base is damaged.
    pub fn disk_map(&self, instance: &ObjectName, disk: DiskName) -> Result<DiskMap> {
        let folder = self.instance_dir(instance)?;
        if folder.has(disk_file(disk, DiskPart::Raw))? {
            let file = folder.open_file(disk_file(disk, DiskPart::Raw), Access::Read)?;
            let file = FileStorage::new(file, format!("{instance}/{disk}"));
            let size = file.size()?;
            let mut extents = Extents::default();
            let (data, zero) = (DiskExtentKind::Data, DiskExtentKind::Zero);
            extents.add_file(|at| file.next_data(at), |at| file.next_hole(at), 0, size, data, zero)?;
            return Ok(DiskMap { size, base: None, block_bytes: None, extents: extents.0 });
        }
        let (map, _) = self.open_map(&folder, instance, disk)?;
        let superblock = read_superblock(&map).context(|| format!("read the map of {instance}/{disk}"))?;
        let live_map = self.run_dir()?.join(live_map_name(superblock.layer));
        let reader = MapReader::open(&format!("{instance}/{disk}"), map, &live_map)?;
        let base = match superblock.base {
            BaseRef::Blank => BaseImage::blank(),
            BaseRef::Image { id, .. } => {
                BaseImage::image(id, Box::new(FileStorage::new(self.open_base(&id)?, format!("base {id}"))))?
            }
        };
        let geometry = reader.superblock().geometry;
        let mut extents = Extents::default();
        for run in reader.extents() {
            let (offset, len) = geometry.bytes_of(run.span);
            match run.state {
                BlockState::Data => extents.add(offset, len, DiskExtentKind::Data),
                BlockState::Zero => extents.add(offset, len, DiskExtentKind::Zero),
                BlockState::Base => extents.add_file(
                    |at| base.next_data(at),
                    |at| base.next_hole(at),
                    offset,
                    offset + len,
                    DiskExtentKind::Base,
                    DiskExtentKind::BaseZero,
                )?,
            }
        }
        Ok(DiskMap {
            size: geometry.size(),
            base: Some(superblock.base),
            block_bytes: Some(geometry.block_bytes()),
            extents: extents.0,
        })
    }
}

/// Extents that join with their neighbours of the same kind.
#[derive(Default)]
struct Extents(Vec<DiskExtent>);

impl Extents {
    fn add(&mut self, offset: u64, len: u64, kind: DiskExtentKind) {
        match self.0.last_mut() {
            Some(last) if last.kind == kind && last.offset + last.len == offset => last.len += len,
            _ if len > 0 => self.0.push(DiskExtent { offset, len, kind }),
            _ => {}
        }
    }

    /// Adds `from..to` of a file as data and holes.
    fn add_file(
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
