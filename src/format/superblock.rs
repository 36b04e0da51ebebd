//! The superblock of a map file: what the layer is, and where its map stands.

use std::num::NonZeroU64;

use super::checksum::{CHECKSUM_BYTES, Checksum};
use super::fields::{array_at, u32_at, u64_at};
use super::ids::{BaseId, BaseRef, BootId, LayerId, SessionId};
use super::journal::JOURNAL_BLOCK_BYTES;
use super::layout::JOURNAL_BYTES_MAX;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{DISK_BYTES_MAX, Geometry};

/// Bytes of one copy of the superblock.
pub const SUPERBLOCK_BYTES: usize = 4096;

/// The version of the format that this code writes; it reads no other.
pub const FORMAT_VERSION: u32 = 1;

const MAGIC_VALUE: [u8; 8] = *b"COWDISK\0";
const BASE_BLANK: u32 = 0;
const BASE_IMAGE: u32 = 1;

const MAGIC: usize = 0;
const VERSION: usize = MAGIC + 8;
const BLOCK_BYTES: usize = VERSION + 4;
const GENERATION: usize = BLOCK_BYTES + 4;
const SIZE: usize = GENERATION + 8;
const LEAD: usize = SIZE + 8;
const BASE_KIND: usize = LEAD + 4;
const BASE_ID: usize = BASE_KIND + 4;
const BASE_SIZE: usize = BASE_ID + 32;
const LAYER: usize = BASE_SIZE + 8;
const FEATURES: usize = LAYER + 16;
const SESSION: usize = FEATURES + 8;
const BOOT: usize = SESSION + 16;
const CHECKPOINT: usize = BOOT + 16;
const JOURNAL_SEQUENCE: usize = CHECKPOINT + 8;
const JOURNAL_BYTES: usize = JOURNAL_SEQUENCE + 8;
const PAGES_DIGEST: usize = JOURNAL_BYTES + 8;
const CONTENTS_SINCE: usize = PAGES_DIGEST + 16;
const RESERVED: usize = CONTENTS_SINCE + 8;
const END: usize = SUPERBLOCK_BYTES - CHECKSUM_BYTES;
const _: () = assert!(RESERVED == 184 && RESERVED < END);

/// Feature bit: records of the journal may have contents.
const FEATURE_CONTENTS: u64 = 1;

/// All that a layer says of itself. Two equal copies are kept, at bytes 0 and 4,096, written durably one after the
/// other: a crash between or within the writes leaves at least one whole, and so does damage to either (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Grows by 1 each time the superblock is written, from 1 on.
    pub generation: u64,
    /// The layer's identity.
    pub layer: LayerId,
    /// Size and block grid of the disk.
    pub geometry: Geometry,
    /// What lies under the layer.
    pub base: BaseRef,
    /// The session in which the layer is open for writing, or [`SessionId::NONE`].
    pub session: SessionId,
    /// The boot of that session.
    pub boot: BootId,
    /// The number of the last completed checkpoint; 0 before the first.
    pub checkpoint: u64,
    /// The sequence number of the journal's first record that is not in the pages.
    pub journal_sequence: u64,
    /// Bytes of the journal; 0 until the layer is first written to.
    pub journal_bytes: u64,
    /// The sum, modulo 2¹²⁸, of the checksums of all pages as of `checkpoint`.
    pub pages_digest: u128,
    /// The number of the first record whose contents may not be in the data file: see [`super::JournalRecord`], whose
    /// own counts where there is one. `None` if no record has any, so that programs which know of none can read the layer.
    pub contents_since: Option<NonZeroU64>,
}

impl Superblock {
    /// The superblock of a layer that has never been written to.
    pub fn new(layer: LayerId, geometry: Geometry, base: BaseRef) -> Self {
        Self {
            generation: 1,
            layer,
            geometry,
            base,
            session: SessionId::NONE,
            boot: BootId::NONE,
            checkpoint: 0,
            journal_sequence: 1,
            journal_bytes: 0,
            pages_digest: 0,
            contents_since: None,
        }
    }

    /// The superblock as bytes.
    pub fn encode(&self) -> [u8; SUPERBLOCK_BYTES] {
        let (kind, id, base_size) = match self.base {
            BaseRef::Blank => (BASE_BLANK, [0; 32], 0),
            BaseRef::Image { id, size } => (BASE_IMAGE, id.0, size),
        };
        let mut bytes = [0; SUPERBLOCK_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(MAGIC, &MAGIC_VALUE);
        put(VERSION, &FORMAT_VERSION.to_le_bytes());
        put(BLOCK_BYTES, &self.geometry.block_bytes().to_le_bytes());
        put(GENERATION, &self.generation.to_le_bytes());
        put(SIZE, &self.geometry.size().to_le_bytes());
        put(LEAD, &self.geometry.lead().to_le_bytes());
        put(BASE_KIND, &kind.to_le_bytes());
        put(BASE_ID, &id);
        put(BASE_SIZE, &base_size.to_le_bytes());
        put(LAYER, &self.layer.0);
        put(SESSION, &self.session.0);
        put(BOOT, &self.boot.0);
        put(CHECKPOINT, &self.checkpoint.to_le_bytes());
        put(JOURNAL_SEQUENCE, &self.journal_sequence.to_le_bytes());
        put(JOURNAL_BYTES, &self.journal_bytes.to_le_bytes());
        put(PAGES_DIGEST, &self.pages_digest.to_le_bytes());
        if let Some(contents_since) = self.contents_since {
            put(FEATURES, &FEATURE_CONTENTS.to_le_bytes());
            put(CONTENTS_SINCE, &contents_since.get().to_le_bytes());
        }
        Checksum::seal(self.layer, &mut bytes);
        bytes
    }

    /// The generation that a copy claims to be of, whole or not.
    pub fn generation_of(bytes: &[u8; SUPERBLOCK_BYTES]) -> u64 {
        u64_at(bytes, GENERATION)
    }

    /// Reads one copy.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if it is none, if its checksum does not fit, or if a value is out of its range;
    /// [`ErrorKind::Unsupported`] if it is whole, but of a version or with a feature that this code does not know.
    pub fn decode(bytes: &[u8; SUPERBLOCK_BYTES]) -> Result<Self> {
        let corrupt = |what: &str| Error::new(ErrorKind::Corrupt, format!("superblock: {what}"));
        if bytes[MAGIC..VERSION] != MAGIC_VALUE {
            return Err(corrupt("not the map of a cowdisk overlay"));
        }
        let layer = LayerId(array_at(bytes, LAYER));
        Checksum::verify(layer, bytes).ok_or_else(|| corrupt("checksum does not fit"))?;
        let (version, features) = (u32_at(bytes, VERSION), u64_at(bytes, FEATURES));
        if version != FORMAT_VERSION || features & !FEATURE_CONTENTS != 0 {
            let message = format!("superblock: format version {version}, features {features:#x}");
            return Err(
                Error::new(ErrorKind::Unsupported, message).with_hint("a newer cowdisk wrote this overlay")
            );
        }
        if bytes[RESERVED..END].iter().any(|&byte| byte != 0) {
            return Err(corrupt("reserved bytes are not zero"));
        }
        let contents_since = NonZeroU64::new(u64_at(bytes, CONTENTS_SINCE));
        if contents_since.is_some() != (features & FEATURE_CONTENTS != 0) {
            return Err(corrupt("its features do not fit the contents in its journal"));
        }
        let superblock = Self {
            generation: u64_at(bytes, GENERATION),
            layer,
            geometry: Geometry::new(u64_at(bytes, SIZE), u32_at(bytes, BLOCK_BYTES), u32_at(bytes, LEAD))
                .map_err(|error| Error::caused(ErrorKind::Corrupt, "superblock", error))?,
            base: decode_base(u32_at(bytes, BASE_KIND), array_at(bytes, BASE_ID), u64_at(bytes, BASE_SIZE))?,
            session: SessionId(array_at(bytes, SESSION)),
            boot: BootId(array_at(bytes, BOOT)),
            checkpoint: u64_at(bytes, CHECKPOINT),
            journal_sequence: u64_at(bytes, JOURNAL_SEQUENCE),
            journal_bytes: u64_at(bytes, JOURNAL_BYTES),
            pages_digest: u128::from_le_bytes(array_at(bytes, PAGES_DIGEST)),
            contents_since,
        };
        superblock.check_counters().map(|()| superblock)
    }

    /// A value that no layer reaches in its life is damage; refusing it also keeps every later `+ 1` from overflowing.
    fn check_counters(&self) -> Result<()> {
        const COUNTER_MAX: u64 = 1 << 62;
        let counters = [self.generation, self.journal_sequence, self.checkpoint.saturating_add(1)];
        let whole_blocks = self.journal_bytes.is_multiple_of(JOURNAL_BLOCK_BYTES as u64);
        if counters.iter().any(|&counter| counter == 0 || counter > COUNTER_MAX)
            || self.journal_bytes > JOURNAL_BYTES_MAX
            || !whole_blocks
            || self.contents_since.is_some_and(|since| since.get() > COUNTER_MAX)
        {
            return Err(Error::new(ErrorKind::Corrupt, "superblock: a counter is out of range"));
        }
        Ok(())
    }
}

fn decode_base(kind: u32, id: [u8; 32], size: u64) -> Result<BaseRef> {
    match kind {
        BASE_BLANK if id == [0; 32] && size == 0 => Ok(BaseRef::Blank),
        BASE_IMAGE if size > 0 && size <= DISK_BYTES_MAX => Ok(BaseRef::Image { id: BaseId(id), size }),
        _ => Err(Error::new(ErrorKind::Corrupt, format!("superblock: base of kind {kind}, {size} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> Superblock {
        let geometry = Geometry::new(10 << 30, 65536, 512).expect("valid");
        let base = BaseRef::Image { id: BaseId([9; 32]), size: 1 << 30 };
        let mut superblock = Superblock::new(LayerId([3; 16]), geometry, base);
        superblock.session = SessionId([1; 16]);
        superblock.boot = BootId([2; 16]);
        superblock.pages_digest = u128::MAX - 5;
        superblock
    }

    #[test]
    fn a_superblock_survives_its_encoding() {
        assert_eq!(Superblock::decode(&superblock().encode()).expect("valid"), superblock());
    }

    #[test]
    fn a_flipped_bit_anywhere_is_noticed() {
        let bytes = superblock().encode();
        for at in 0..SUPERBLOCK_BYTES {
            let mut flipped = bytes;
            flipped[at] ^= 1 << (at % 8);
            assert!(Superblock::decode(&flipped).is_err(), "byte {at}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused_though_the_checksum_fits() {
        let mut bad = superblock();
        bad.journal_bytes = 1 << 40;
        assert_eq!(Superblock::decode(&bad.encode()).expect_err("refused").kind(), ErrorKind::Corrupt);
        bad = superblock();
        bad.checkpoint = (1 << 62) + 1;
        assert!(Superblock::decode(&bad.encode()).is_err());
        bad = superblock();
        bad.base = BaseRef::Image { id: BaseId([1; 32]), size: 0 };
        assert!(Superblock::decode(&bad.encode()).is_err());
    }

    #[test]
    fn a_newer_version_and_an_unknown_feature_are_unsupported_not_corrupt() {
        for (at, value) in [(VERSION, 2), (FEATURES, 2)] {
            let mut bytes = superblock().encode();
            bytes[at] = value;
            Checksum::seal(superblock().layer, &mut bytes);
            assert_eq!(Superblock::decode(&bytes).expect_err("refused").kind(), ErrorKind::Unsupported);
        }
    }

    #[test]
    fn contents_in_the_journal_are_a_feature_that_a_reader_must_know() {
        let mut with = superblock();
        with.contents_since = NonZeroU64::new(7);
        let bytes = with.encode();
        assert_eq!(u64_at(&bytes, FEATURES), 1);
        assert_eq!(Superblock::decode(&bytes).expect("valid"), with);
        for at in [FEATURES, CONTENTS_SINCE] {
            let mut bytes = with.encode();
            bytes[at] = 0;
            Checksum::seal(with.layer, &mut bytes);
            assert_eq!(Superblock::decode(&bytes).expect_err("refused").kind(), ErrorKind::Corrupt);
        }
    }
}
