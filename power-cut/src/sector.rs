//! Sectors that say what they are: of which disk, which sector of it, and written by which step.
//!
//! All 512 bytes follow from these numbers and the seed, so one that was torn, mixed up or belongs elsewhere is told from
//! every one that may be there.

use crate::random::Random;

/// Bytes of a sector: what a disk writes whole.
pub const SECTOR_BYTES: usize = 512;

const MAGIC: u64 = u64::from_le_bytes(*b"SECTOR01");

/// What a sector says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Of the run.
    pub seed: u64,
    /// The disk's number.
    pub disk: u64,
    /// The sector's number on that disk.
    pub sector: u64,
    /// Who wrote it, and in which step.
    pub writer: u64,
}

impl Label {
    /// Fills a sector.
    pub fn fill(&self, sector: &mut [u8]) {
        let label = [MAGIC, self.seed, self.disk, self.sector, self.writer];
        let mut random = Random::new(label.iter().fold(0, |mixed, part| Random::new(mixed ^ part).number()));
        let words = label.into_iter().chain(std::iter::from_fn(|| Some(random.number())));
        for (place, word) in sector.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// The whole sector.
    pub fn bytes(&self) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        self.fill(&mut bytes);
        bytes
    }

    /// What a sector says it is, if every byte of it fits.
    pub fn of(sector: &[u8]) -> Option<Self> {
        let word = |index: usize| {
            let bytes = sector.get(index * 8..index * 8 + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let label = Self { seed: word(1)?, disk: word(2)?, sector: word(3)?, writer: word(4)? };
        (label.bytes() == sector).then_some(label)
    }
}

/// What a sector holds, in words for a report.
pub fn describe(sector: &[u8]) -> String {
    if sector.iter().all(|&byte| byte == 0) {
        return "zeroes".to_owned();
    }
    match Label::of(sector) {
        Some(label) => format!(
            "sector {} of disk {} by writer {}, step {}",
            label.sector,
            label.disk,
            label.writer >> 32,
            label.writer & 0xffff_ffff
        ),
        None => format!("bytes that nobody wrote as one sector, {:02x?}…", &sector[..16.min(sector.len())]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_is_known_by_its_bytes_and_a_torn_one_is_not() {
        let label = Label { seed: 1, disk: 2, sector: 3, writer: 4 };
        let mut bytes = label.bytes();
        assert_eq!(Label::of(&bytes), Some(label));
        bytes[511] ^= 1;
        assert_eq!(Label::of(&bytes), None);
        assert_eq!(Label::of(&bytes[..256]), None);
    }
}
