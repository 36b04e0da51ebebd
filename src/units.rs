//! Sizes, and the arithmetic between the bytes of a disk and its blocks.
//!
//! A disk is an array of bytes; copy-on-write works in *blocks*. [`Geometry`] is the only place that converts between
//! the two. The block grid need not begin at byte 0 of the disk: block 0 may reach [`Geometry::lead`] bytes before it,
//! so that an old partition at sector 63 can keep the grid of its file system.

use std::fmt;

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a sector, the smallest unit that a disk promises to write whole.
pub const SECTOR_BYTES: u64 = SECTOR_LEN as u64;
/// The same, of memory.
pub const SECTOR_LEN: usize = 512;

/// Largest disk: 16 TiB. (A file of ext4 with 4 KiB blocks ends one block below; XFS and btrfs hold larger ones.)
pub const DISK_BYTES_MAX: u64 = 16 << 40;

/// Smallest block: 4 KiB, a page of the host and the usual block of a guest's file system.
pub const BLOCK_BYTES_MIN: u32 = 4 << 10;

/// Largest block: 64 KiB.
pub const BLOCK_BYTES_MAX: u32 = 64 << 10;

/// The number of a block: block `n` begins at byte `n × block size` of the data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

/// A run of blocks, `start` inclusive, `end` exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSpan {
    /// First block.
    pub start: u64,
    /// One past the last block; never below `start`.
    pub end: u64,
}

impl BlockSpan {
    /// The blocks `start..end`.
    ///
    /// # Panics
    /// If `end` is below `start`.
    pub fn new(start: u64, end: u64) -> Self {
        assert!(start <= end, "a span ends before it begins: {start}..{end}");
        Self { start, end }
    }

    /// How many blocks.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether there is no block in it.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether some block lies in both.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// Size and block grid of one disk. Every value is checked when it is made, so the arithmetic cannot overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
    block_bytes: u32,
    lead: u32,
}

impl Geometry {
    /// A disk of `size` bytes (a multiple of 512, 512 to 16 TiB) in blocks of `block_bytes` (a power of two, 4 KiB to
    /// 64 KiB) whose first block reaches `lead` bytes (a multiple of 512, below `block_bytes`) before byte 0.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], naming the value and its range.
    pub fn new(size: u64, block_bytes: u32, lead: u32) -> Result<Self> {
        check_block_bytes(block_bytes)?;
        check_disk_bytes(size)?;
        if !u64::from(lead).is_multiple_of(SECTOR_BYTES) || lead >= block_bytes {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("grid lead of {lead} bytes: must be a multiple of 512 below the block size"),
            ));
        }
        Ok(Self { size, block_bytes, lead })
    }

    /// The same grid with another size; same errors as [`Geometry::new`].
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if `size` is out of range.
    pub fn resized(self, size: u64) -> Result<Self> {
        Self::new(size, self.block_bytes, self.lead)
    }

    /// Bytes of the disk.
    pub fn size(self) -> u64 {
        self.size
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> u32 {
        self.block_bytes
    }

    /// Bytes of block 0 that lie before the disk's first byte.
    pub fn lead(self) -> u32 {
        self.lead
    }

    /// Number of blocks that hold some byte of the disk.
    pub fn blocks(self) -> u64 {
        (self.size + u64::from(self.lead)).div_ceil(u64::from(self.block_bytes))
    }

    /// Largest number of blocks that a disk with this grid can grow to.
    pub fn blocks_max(self) -> u64 {
        (DISK_BYTES_MAX + u64::from(self.lead)).div_ceil(u64::from(self.block_bytes))
    }

    /// Bytes of the data file: whole blocks.
    pub fn data_bytes(self) -> u64 {
        self.blocks() * u64::from(self.block_bytes)
    }

    /// Where byte `offset` of the disk lies in the data file.
    pub fn data_offset(self, offset: u64) -> u64 {
        offset + u64::from(self.lead)
    }

    /// The block that holds byte `offset` of the disk.
    pub fn block_of(self, offset: u64) -> BlockIndex {
        BlockIndex(self.data_offset(offset) / u64::from(self.block_bytes))
    }

    /// All blocks that hold some byte of `offset..offset + len`; empty for a `len` of 0.
    pub fn span_touched(self, offset: u64, len: u64) -> BlockSpan {
        let start = self.block_of(offset).0;
        if len == 0 {
            return BlockSpan::new(start, start);
        }
        BlockSpan::new(start, self.block_of(offset + len - 1).0 + 1)
    }

    /// The part of the disk that the blocks of `span` hold, as (offset, length) in bytes. The disk's first block may
    /// begin before the disk and its last may end after it; only bytes of the disk are counted.
    pub fn bytes_of(self, span: BlockSpan) -> (u64, u64) {
        let (lead, block) = (u64::from(self.lead), u64::from(self.block_bytes));
        let start = (span.start * block).saturating_sub(lead).min(self.size);
        let end = (span.end * block).saturating_sub(lead).min(self.size);
        (start, end - start)
    }

    /// Checks that `offset..offset + len` lies on the disk.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] if it does not, or if the sum overflows.
    pub fn check_range(self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!("{len} bytes at {offset} reach beyond the end of the disk ({} bytes)", self.size),
            )),
        }
    }
}

/// Checks the size of a disk: a multiple of 512 bytes, 512 bytes to 16 TiB.
///
/// # Errors
/// [`ErrorKind::Invalid`], naming the size and the rule.
pub fn check_disk_bytes(size: u64) -> Result<()> {
    if size == 0 || !size.is_multiple_of(SECTOR_BYTES) || size > DISK_BYTES_MAX {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("disk size of {size} bytes: must be a multiple of 512, at least 512 and at most 16 TiB"),
        ));
    }
    Ok(())
}

/// Checks the size of a block: a power of two, 4 KiB to 64 KiB.
///
/// # Errors
/// [`ErrorKind::Invalid`], naming the size and the rule.
pub fn check_block_bytes(block_bytes: u32) -> Result<()> {
    if !block_bytes.is_power_of_two() || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block_bytes) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("block size of {block_bytes} bytes: must be a power of two from 4K to 64K"),
        ));
    }
    Ok(())
}

/// Reads a size as users write it: bytes (`1048576`), or a whole number with `K`, `M`, `G` or `T` (powers of 1,024,
/// either case, an `iB` after it is accepted): `10G`, `512M`, `64KiB`.
///
/// # Errors
/// [`ErrorKind::Invalid`] for anything else, and for what does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64> {
    let invalid = || {
        Error::new(
            ErrorKind::Invalid,
            format!("size {text:?}: must be a whole number of bytes or like 512M, 10G"),
        )
    };
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(invalid()),
    };
    let number: u64 = number.parse().map_err(|_| invalid())?;
    number.checked_mul(1 << shift).ok_or_else(invalid)
}

/// Shows a number of bytes for people: `512 B`, `4 KiB`, `1.5 GiB`.
#[derive(Clone, Copy, Debug)]
pub struct HumanBytes(pub u64);

impl fmt::Display for HumanBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in UNITS {
            let one = 1u64 << shift;
            if self.0 >= one {
                let tenths = u128::from(self.0) * 10 / u128::from(one);
                return match tenths % 10 {
                    0 => write!(f, "{} {unit}", tenths / 10),
                    rest => write!(f, "{}.{rest} {unit}", tenths / 10),
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(size: u64, block: u32, lead: u32) -> Geometry {
        Geometry::new(size, block, lead).expect("a valid geometry")
    }

    #[test]
    fn geometry_refuses_what_is_out_of_range() {
        assert!(Geometry::new(0, 4096, 0).is_err());
        assert!(Geometry::new(513, 4096, 0).is_err());
        assert!(Geometry::new(DISK_BYTES_MAX + 512, 4096, 0).is_err());
        assert!(Geometry::new(4096, 2048, 0).is_err());
        assert!(Geometry::new(4096, 12288, 0).is_err());
        assert!(Geometry::new(4096, 131_072, 0).is_err());
        assert!(Geometry::new(4096, 4096, 100).is_err());
        assert!(Geometry::new(4096, 4096, 4096).is_err());
        assert!(Geometry::new(DISK_BYTES_MAX, 4096, 512).is_ok());
    }

    #[test]
    fn spans_round_to_whole_blocks() {
        let g = geometry(1 << 20, 4096, 0);
        assert_eq!(g.span_touched(0, 0), BlockSpan::new(0, 0));
        assert_eq!(g.span_touched(4095, 2), BlockSpan::new(0, 2));
        assert_eq!(g.bytes_of(BlockSpan::new(1, 2)), (4096, 4096));
        assert_eq!(g.blocks(), 256);
    }

    #[test]
    fn a_grid_with_a_lead_keeps_every_byte_in_one_block() {
        let g = geometry(8192, 4096, 512);
        assert_eq!(g.blocks(), 3);
        assert_eq!(g.data_bytes(), 12288);
        assert_eq!(g.block_of(3583), BlockIndex(0));
        assert_eq!(g.block_of(3584), BlockIndex(1));
        assert_eq!(g.bytes_of(BlockSpan::new(0, 1)), (0, 3584));
        assert_eq!(g.bytes_of(BlockSpan::new(2, 3)), (7680, 512));
        assert_eq!(g.bytes_of(BlockSpan::new(0, 3)), (0, 8192));
    }

    #[test]
    fn ranges_past_the_end_are_refused() {
        let g = geometry(8192, 4096, 0);
        assert!(g.check_range(8192, 0).is_ok());
        assert!(g.check_range(8191, 2).is_err());
        assert!(g.check_range(u64::MAX, 2).is_err());
    }

    #[test]
    fn sizes_are_read_as_users_write_them() {
        assert_eq!(parse_size("512").ok(), Some(512));
        assert_eq!(parse_size("10G").ok(), Some(10 << 30));
        assert_eq!(parse_size("64KiB").ok(), Some(64 << 10));
        assert_eq!(parse_size("2t").ok(), Some(2 << 40));
        for bad in ["", "G", "-1", "1.5G", "10 G", "10X", "99999999999T", "0x10"] {
            assert!(parse_size(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn bytes_are_shown_for_people() {
        assert_eq!(HumanBytes(0).to_string(), "0 B");
        assert_eq!(HumanBytes(4096).to_string(), "4 KiB");
        assert_eq!(HumanBytes(1_610_612_736).to_string(), "1.5 GiB");
    }
}
