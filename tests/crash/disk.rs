//! The disks that scripts run on.

use std::sync::Arc;

use cowdisk::format::BaseId;
use cowdisk::overlay::BaseImage;
use cowdisk::units::Geometry;

use crate::common::record::{Content, Image, ReadOnly, SECTOR, content};
use crate::common::sim::Rng;

/// What a script runs on.
#[derive(Debug)]
pub struct Disk {
    pub geometry: Geometry,
    pub base: Option<Arc<Image>>,
    /// The parts of the disk in which requests fall: beginning, border of two map pages, end. Bytes.
    pub windows: Vec<(u64, u64)>,
}

impl Disk {
    pub fn random(rng: &mut Rng) -> Self {
        let lead = if rng.below(4) == 0 { (rng.below(8) * 512) as u32 } else { 0 };
        // Where a commit of every second block takes more than a sector of the journal.
        let wide = rng.below(4) == 0;
        let block_bytes =
            if wide { 4096 } else { [4096, 4096, 4096, 4096, 16_384, 65_536][rng.below(6) as usize] };
        let window = if wide { 512 << 10 } else { (32 << 10).max(2 * u64::from(block_bytes)) };
        let border = 16_128 * u64::from(block_bytes) - u64::from(lead);
        // Small disks, and disks over the border of two map pages.
        let over_border = rng.below(4) == 0;
        let sectors = match (over_border, wide) {
            (true, _) => border / SECTOR + 40 + rng.below(200),
            (false, true) => 900 + rng.below(300),
            (false, false) => 1 + rng.below(160),
        };
        let size = sectors * SECTOR;
        let mut windows = vec![(0, window)];
        if over_border {
            windows.push(((border - window / 2) / 4096 * 4096, window));
        }
        let end = windows.last().map_or(0, |(start, len)| start + len);
        if size > end {
            windows.push((end, window));
        }
        let geometry = Geometry::new(size, block_bytes, lead).expect("a valid geometry");
        let base = (rng.below(3) > 0).then(|| {
            let len = (size / 4 * rng.below(5)).clamp(SECTOR, size) - rng.below(2) * 100;
            let mut image = Image::default();
            image.cut(len.next_multiple_of(SECTOR));
            // Holes of some blocks.
            for sector in (0..len.div_ceil(SECTOR).min(200)).filter(|sector| Rng(sector / 24).below(3) > 0) {
                image.set(sector, content(&filled(1 << 40 | sector)));
            }
            image.cut(len);
            Arc::new(image)
        });
        Self { geometry, base, windows }
    }

    /// Whether a commit of every second block of the first window takes more than a sector of the journal.
    pub fn is_wide(&self) -> bool {
        self.windows[0].1 > 256 << 10
    }

    /// Where every second block of the first window begins.
    pub fn every_second_block(&self, first: u64) -> impl Iterator<Item = u64> + use<> {
        let block_bytes = u64::from(self.geometry.block_bytes());
        (first * block_bytes..self.windows[0].1).step_by(2 * block_bytes as usize)
    }

    pub fn base(&self) -> BaseImage {
        let image = |image: &Arc<Image>| {
            BaseImage::image(BaseId([0xb5; 32]), Box::new(ReadOnly(image.clone()))).expect("a base")
        };
        self.base.as_ref().map_or_else(BaseImage::blank, image)
    }

    /// What the windows hold before the first write.
    pub fn contents(&self) -> Vec<Content> {
        let sectors = self.windows.iter().flat_map(|&(start, len)| (start..start + len).step_by(512));
        let in_base =
            |at| self.base.as_ref().filter(|base| at < base.len).map(|base| *base.sector(at / SECTOR));
        sectors.map(|at| in_base(at).and_then(|bytes| content(&bytes))).collect()
    }

    /// A request's place on the disk of `size` bytes, and its first byte in the windows.
    pub fn place(&self, size: u64, (window, at, len): (usize, u64, u64)) -> Option<(u64, u64, u64)> {
        let before: u64 = self.windows[..window].iter().map(|(_, len)| len).sum();
        let (start, window_len) = self.windows[window];
        let room = window_len.min(size.saturating_sub(start)).saturating_sub(at);
        (room > 0).then_some((start + at, before + at, len.min(room)))
    }
}

/// A sector's content that no other write has.
pub fn filled(number: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes.as_chunks_mut::<8>().0.fill(number.to_le_bytes());
    bytes
}
