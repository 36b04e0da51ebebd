//! A layer that has been used: two map pages, both slots of the first in use, records in the journal.

use std::path::PathBuf;

use cowdisk::format::LayerId;
use cowdisk::overlay::{BaseImage, LayerFiles, Overlay};
use cowdisk::units::Geometry;

use super::sim::{SimFile, SimHost};

/// Bytes of the disk.
pub const DISK: u64 = 70 << 20;
/// Its identity.
pub const LAYER: LayerId = LayerId([6; 16]);
/// Bytes at both ends of the disk that the tests write to.
const EDGE: usize = 2 << 20;

/// A layer on a simulated disk of the host, with a live map in a folder of its own.
pub struct Layer {
    pub data: SimFile,
    pub map: SimFile,
    folder: tempfile::TempDir,
}

impl Layer {
    /// Two map pages, both slots of the first in use, and three records with contents in the journal, of 8 KiB each; open, with a
    /// live map.
    pub fn open_one() -> (Self, Overlay) {
        let host = SimHost::new(0);
        let layer = Self {
            data: SimFile::new(&host),
            map: SimFile::new(&host),
            folder: tempfile::tempdir().expect("a temporary folder"),
        };
        let geometry = Geometry::new(DISK, 4096, 0).expect("valid");
        Overlay::create(&layer.files(), LAYER, geometry, BaseImage::blank().reference()).expect("create");
        let overlay = layer.open();
        for (at, byte) in [(0, 1), (DISK - 8192, 2), (40960, 3)] {
            overlay.write_at(at, &[byte; 8192]).expect("write");
            overlay.checkpoint().expect("checkpoint");
        }
        for n in 0..3u8 {
            overlay.write_at(1 << 20 | u64::from(n) << 14, &[4 + n; 4096]).expect("write");
            overlay.flush().expect("flush");
        }
        (layer, overlay)
    }

    /// The same, left open by a crash of the host, which has taken the live map with it.
    pub fn cut_by_a_reboot() -> Self {
        let (layer, overlay) = Self::open_one();
        drop(overlay);
        layer.forget_live_map();
        layer
    }

    /// The same after a reboot of the host that followed a crash: no session, three records in the journal.
    pub fn after_a_crash() -> Self {
        let layer = Self::cut_by_a_reboot();
        drop(layer.open());
        layer.forget_live_map();
        layer
    }

    /// Its files.
    pub fn files(&self) -> LayerFiles {
        LayerFiles { data: Box::new(self.data.clone()), map: Box::new(self.map.clone()) }
    }

    /// Where its live map is while it is open.
    pub fn live_map(&self) -> PathBuf {
        self.folder.path().join("live")
    }

    /// What a reboot does to an open layer.
    pub fn forget_live_map(&self) {
        std::fs::remove_file(self.live_map()).expect("there is a live map");
    }

    /// Opens it as in another boot of the host, in which nobody misses the live map.
    pub fn try_open(&self) -> cowdisk::Result<Overlay> {
        Overlay::open_accepting_loss("test", self.files(), BaseImage::blank(), &self.live_map())
    }

    /// Opens it; it must be whole.
    pub fn open(&self) -> Overlay {
        self.try_open().expect("open")
    }

    /// All that was written, and the neighbourhood; it is opened for that, in another boot.
    pub fn contents(&self) -> cowdisk::Result<Vec<u8>> {
        let overlay = self.try_open()?;
        let mut all = vec![0; 2 * EDGE];
        let (head, tail) = all.split_at_mut(EDGE);
        overlay.read_at(0, head)?;
        overlay.read_at(DISK - EDGE as u64, tail)?;
        drop(overlay);
        self.forget_live_map();
        Ok(all)
    }
}
