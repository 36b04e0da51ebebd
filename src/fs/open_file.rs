//! What can be done with an open file.

use std::sync::Arc;

use parking_lot::Mutex;

use super::errno::{Errno, Outcome};
use super::inodes::Node;
use super::open_disks::{OpenDisk, OpenDisks};
use super::tree::{Entry, Tree};
use crate::storage::{FileStorage, Storage, Way};
use crate::units::SECTOR_BYTES;

/// `XFS_IOC_DIOINFO`, by which QEMU asks any filesystem for the alignment of direct I/O.
const DIOINFO: u32 = 0x800C_581E;

/// Largest direct request that [`DIOINFO`] tells of, in bytes: the largest multiple of a page that fits its 32 bits.
const DIRECT_BYTES_MAX: u32 = 0x7fff_f000;

/// Most bytes that are zeroed or preallocated in one go, for writes to the same blocks wait meanwhile. Guests discard whole
/// disks.
const PIECE_BYTES: u64 = 1 << 30;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenMode {
    /// For writing, perhaps also for reading.
    pub write: bool,
    /// With O_TRUNC.
    pub truncate: bool,
}

/// An open file or directory.
#[derive(Debug)]
pub enum OpenFile {
    /// A disk, shared with its other handles.
    Disk(Arc<OpenDisk>),
    /// An image, a kernel or a ramdisk, whose content never changes.
    Fixed {
        /// The store's file.
        file: FileStorage,
        /// Its bytes.
        size: u64,
    },
    /// A directory.
    Directory {
        /// Which.
        node: Node,
        /// Its entries when it was last read from the beginning; the mutex guards which listing that is.
        entries: Mutex<Arc<Vec<Entry>>>,
    },
}

impl OpenFile {
    /// Opens the file of `node`, which an earlier process of this mount may have open, as `kept` says.
    pub fn open(tree: &Tree, disks: &OpenDisks, node: &Node, mode: OpenMode, kept: bool) -> Outcome<Self> {
        match node {
            Node::Disk { .. } if mode.truncate => Err(Errno::NOT_PERMITTED.into()),
            Node::Disk { .. } => Ok(Self::Disk(tree.acquire_disk(node, disks, kept)?)),
            Node::Image { .. } | Node::BootFile(_) if mode.write || mode.truncate => {
                Err(Errno::READ_ONLY.into())
            }
            Node::Image { .. } | Node::BootFile(_) => {
                let file = FileStorage::new(tree.open_fixed(node)?, "an image");
                let size = file.size()?;
                Ok(Self::Fixed { file, size })
            }
            Node::Link { .. } => Err(Errno::INVALID.into()),
            Node::Root | Node::Images | Node::Boot | Node::Instances | Node::Instance { .. } => {
                Err(Errno::IS_DIRECTORY.into())
            }
        }
    }

    fn size(&self) -> Outcome<u64> {
        match self {
            Self::Disk(disk) => Ok(disk.disk().size()),
            Self::Fixed { size, .. } => Ok(*size),
            Self::Directory { .. } => Err(Errno::IS_DIRECTORY.into()),
        }
    }

    /// The disk, if it is one that `offset..offset + len` lies on.
    fn disk_in_range(&self, offset: u64, len: u64) -> Outcome<&OpenDisk> {
        match self {
            Self::Disk(disk) => match offset.checked_add(len) {
                Some(end) if end <= disk.disk().size() => Ok(disk),
                _ => Err(Errno::TOO_BIG.into()),
            },
            Self::Fixed { .. } => Err(Errno::READ_ONLY.into()),
            Self::Directory { .. } => Err(Errno::IS_DIRECTORY.into()),
        }
    }

    /// How many bytes there are of `len` at `offset`.
    fn bytes_there(&self, offset: u64, len: usize) -> Outcome<usize> {
        let left = self.size()?.saturating_sub(offset);
        Ok(usize::try_from(left).map_or(len, |left| left.min(len)))
    }

    /// See [`super::Fs::read`].
    pub fn read(&self, offset: u64, buf: &mut [u8], direct: bool, way: Way) -> Outcome<usize> {
        check_alignment(direct, offset, buf.len() as u64)?;
        let len = self.bytes_there(offset, buf.len())?;
        let buf = &mut buf[..len];
        match self {
            _ if buf.is_empty() => {}
            Self::Disk(disk) => disk.disk().read_by(way, offset, buf)?,
            Self::Fixed { file, .. } => file.read_exact_at(offset, buf)?,
            Self::Directory { .. } => return Err(Errno::IS_DIRECTORY.into()),
        }
        Ok(len)
    }

    /// See [`super::Fs::read_now`].
    pub fn read_now(&self, offset: u64, buf: &mut [u8], direct: bool, way: Way) -> Outcome<Option<usize>> {
        check_alignment(direct, offset, buf.len() as u64)?;
        let len = self.bytes_there(offset, buf.len())?;
        let buf = &mut buf[..len];
        let done = match self {
            _ if buf.is_empty() => true,
            Self::Disk(disk) => disk.disk().read_now(way, offset, buf)?,
            Self::Fixed { file, .. } => file.read_now(offset, buf)?,
            Self::Directory { .. } => return Err(Errno::IS_DIRECTORY.into()),
        };
        Ok(done.then_some(len))
    }

    /// See [`super::Fs::write`].
    pub fn write(&self, offset: u64, data: &[u8], direct: bool, way: Way) -> Outcome<()> {
        check_alignment(direct, offset, data.len() as u64)?;
        let disk = self.disk_in_range(offset, data.len() as u64)?;
        Ok(disk.change(|disk| disk.write_by(way, offset, data))?)
    }

    /// See [`super::Fs::writes_to_memory`].
    pub fn writes_to_memory(&self, offset: u64, len: u64, way: Way) -> bool {
        match self {
            Self::Disk(disk) => disk.disk().writes_to_memory(way, offset, len),
            // Refused, which takes no time.
            Self::Fixed { .. } | Self::Directory { .. } => true,
        }
    }

    /// See [`super::Fs::sync`].
    pub fn sync(&self) -> Outcome<()> {
        match self {
            Self::Disk(disk) => Ok(disk.flush()?),
            Self::Fixed { .. } | Self::Directory { .. } => Ok(()),
        }
    }

    /// See [`super::Fs::allocate`].
    pub fn allocate(&self, mode: i32, offset: u64, len: u64) -> Outcome<()> {
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        match mode {
            PUNCH | ZERO | ZERO_KEEP => {
                let disk = self.disk_in_range(offset, len)?;
                for (offset, len) in pieces(offset, len) {
                    disk.change(|disk| disk.zero(offset, len))?;
                }
            }
            0 | KEEP => {
                let disk = self.disk_in_range(offset, len)?;
                for (offset, len) in pieces(offset, len) {
                    disk.change(|disk| disk.preallocate(offset, len))?;
                }
            }
            _ => return Err(Errno::NOT_SUPPORTED.into()),
        }
        Ok(())
    }

    /// See [`super::Fs::seek`].
    pub fn seek(&self, offset: i64, whence: i32) -> Outcome<i64> {
        let size = self.size()?;
        let from = u64::try_from(offset).ok().filter(|from| *from < size).ok_or(Errno::NO_SUCH_OFFSET)?;
        let found = match whence {
            libc::SEEK_DATA => self.next_data(from)?.filter(|at| *at < size).ok_or(Errno::NO_SUCH_OFFSET)?,
            libc::SEEK_HOLE => self.next_hole(from)?.min(size),
            _ => return Err(Errno::INVALID.into()),
        };
        i64::try_from(found).map_err(|_| Errno::INVALID.into())
    }

    fn next_data(&self, from: u64) -> Outcome<Option<u64>> {
        match self {
            Self::Disk(disk) => Ok(disk.disk().next_data(from)?),
            Self::Fixed { file, size } => Ok(file.next_data_up_to(from, *size)?),
            Self::Directory { .. } => Err(Errno::IS_DIRECTORY.into()),
        }
    }

    fn next_hole(&self, from: u64) -> Outcome<u64> {
        match self {
            Self::Disk(disk) => Ok(disk.disk().next_hole(from)?),
            Self::Fixed { file, .. } => Ok(file.next_hole(from)?),
            Self::Directory { .. } => Err(Errno::IS_DIRECTORY.into()),
        }
    }

    /// See [`super::Fs::control`].
    pub fn control(&self, command: u32) -> Outcome<Vec<u8>> {
        match (self, command) {
            (Self::Disk(_) | Self::Fixed { .. }, DIOINFO) => {
                let sector = u32::try_from(SECTOR_BYTES).expect("512 fits");
                // struct dioattr: alignment in memory, smallest and largest request, in the host's byte order.
                let answer = [sector, sector, DIRECT_BYTES_MAX];
                Ok(answer.into_iter().flat_map(u32::to_ne_bytes).collect())
            }
            _ => Err(Errno::NO_CONTROL.into()),
        }
    }
}

/// The parts of a range between multiples of [`PIECE_BYTES`], each with its length.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset.saturating_add(len);
    let end_of = move |at: u64| end.min((at / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES));
    std::iter::successors(Some(offset), move |at| Some(end_of(*at)))
        .take_while(move |at| *at < end)
        .map(move |at| (at, end_of(at) - at))
}

/// Direct I/O must be aligned to sectors. This is also how QEMU learns that a disk has sectors of 512 bytes: it tries to
/// read a single byte, and would take larger sectors if that succeeded.
fn check_alignment(direct: bool, offset: u64, len: u64) -> Outcome<()> {
    if direct && !(offset | len).is_multiple_of(SECTOR_BYTES) {
        return Err(Errno::INVALID.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_range_and_end_at_their_multiples() {
        let all = |offset, len| pieces(offset, len).collect::<Vec<_>>();
        assert_eq!(all(512, 0), []);
        assert_eq!(all(512, 1024), [(512, 1024)]);
        assert_eq!(all(0, PIECE_BYTES), [(0, PIECE_BYTES)]);
        let third = PIECE_BYTES * 2;
        assert_eq!(
            all(PIECE_BYTES - 512, PIECE_BYTES + 1024),
            [(PIECE_BYTES - 512, 512), (PIECE_BYTES, PIECE_BYTES), (third, 512)]
        );
    }
}
