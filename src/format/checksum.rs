//! The checksum of everything that is written to a map file.

use super::LayerId;

/// Bytes of a [`Checksum`].
pub const CHECKSUM_BYTES: usize = 16;

/// The first 128 bits of BLAKE3 over the layer's id and the bytes it protects. With the id in it, a page or a record of
/// another layer, or of an earlier file at the same place of the host's disk, is never taken for one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum(pub [u8; CHECKSUM_BYTES]);

impl Checksum {
    /// The checksum of `bytes` in `layer`.
    pub fn of(layer: LayerId, bytes: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&layer.0).update(bytes);
        let mut truncated = [0; CHECKSUM_BYTES];
        truncated.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
        Self(truncated)
    }

    /// As a number, to be added up in the digest of all pages.
    pub fn as_u128(self) -> u128 {
        u128::from_le_bytes(self.0)
    }

    /// Writes the checksum of all that comes before it into the last 16 bytes of `bytes`.
    pub(super) fn seal(layer: LayerId, bytes: &mut [u8]) -> Self {
        let (body, place) = bytes.split_at_mut(bytes.len() - CHECKSUM_BYTES);
        let checksum = Self::of(layer, body);
        place.copy_from_slice(&checksum.0);
        checksum
    }

    /// The checksum in the last 16 bytes of `bytes`, if it fits what comes before it.
    pub(super) fn verify(layer: LayerId, bytes: &[u8]) -> Option<Self> {
        let (body, place) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
        let checksum = Self::of(layer, body);
        (checksum.0 == place).then_some(checksum)
    }
}
