//! Edges of the engine that random operations rarely meet: other bases, large disks, limits, what a live map is bound to.
#![allow(clippy::cast_possible_truncation, clippy::disallowed_methods)] // sizes and files that the test made itself

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cowdisk::ErrorKind;
use cowdisk::format::{BaseId, BaseRef, LayerId};
use cowdisk::overlay::{BaseImage, LayerFiles, MapReader, Overlay};
use cowdisk::storage::{FileStorage, MemStorage, Storage};
use cowdisk::units::Geometry;
use tempfile::TempDir;

struct Layer {
    folder: TempDir,
}

impl Layer {
    fn new(geometry: Geometry, base: BaseRef) -> Self {
        let layer = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        Overlay::create(&layer.files(), LayerId([8; 16]), geometry, base).expect("create");
        layer
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str) -> FileStorage {
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        FileStorage::new(options.open(self.path(name)).expect("open a file"), name)
    }

    fn files(&self) -> LayerFiles {
        LayerFiles { data: Box::new(self.file("data")), map: Box::new(self.file("map")) }
    }

    /// Opens it as in another boot of the host, in which nobody misses the live map.
    fn open_after_reboot(&self) -> Overlay {
        let live = self.path("live");
        Overlay::open_accepting_loss("test", self.files(), BaseImage::blank(), &live).expect("open")
    }

    fn open(&self, base: BaseImage) -> cowdisk::Result<Overlay> {
        Overlay::open("test", self.files(), base, &self.path("live"))
    }
}

fn blank(size: u64) -> Layer {
    Layer::new(Geometry::new(size, 4096, 0).expect("valid"), BaseRef::Blank)
}

fn image(id: u8, bytes: &[u8]) -> BaseImage {
    let storage = MemStorage::new();
    storage.write_at(0, bytes).expect("write memory");
    BaseImage::image(BaseId([id; 32]), Box::new(storage)).expect("a base")
}

fn disk_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).expect("stat").blocks() * 512
}

#[test]
fn an_overlay_refuses_a_base_with_another_content() {
    let layer = Layer::new(Geometry::new(8192, 4096, 0).expect("valid"), image(1, &[1; 8192]).reference());
    for other in [image(2, &[1; 8192]), image(1, &[1; 4096]), BaseImage::blank()] {
        let error = layer.open(other).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("it was made over base 0101"), "{error}");
    }
    layer.open(image(1, &[1; 8192])).expect("the base it was made over");
}

#[test]
fn a_disk_smaller_than_its_base_is_refused() {
    let files = LayerFiles { data: Box::new(MemStorage::new()), map: Box::new(MemStorage::new()) };
    let geometry = Geometry::new(4096, 4096, 0).expect("valid");
    let base = BaseRef::Image { id: BaseId([1; 32]), size: 8192 };
    let error = Overlay::create(&files, LayerId([1; 16]), geometry, base).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn the_largest_disk_takes_room_only_for_what_is_used() {
    const SIZE: u64 = (16 << 40) - 4096;
    let layer = blank(SIZE);
    let overlay = layer.open(BaseImage::blank()).expect("open");
    for at in [0, 5 << 40, SIZE - 4096] {
        overlay.write_at(at, &[7; 4096]).expect("write");
    }
    overlay.flush().expect("flush");
    let live = disk_bytes(&layer.path("live"));
    assert!(live <= 64 << 10, "the live map takes {live} bytes");
    overlay.zero(0, SIZE).expect("zero all of it");
    assert_eq!(overlay.next_data(0).expect("seek"), None);
    overlay.close().expect("close");
    let map = disk_bytes(&layer.path("map"));
    assert!(map <= 640 << 10, "the map file takes {map} bytes");
}

#[test]
fn a_new_overlay_takes_a_few_kilobytes() {
    let layer = blank(1 << 40);
    assert_eq!(disk_bytes(&layer.path("data")), 0);
    assert!(disk_bytes(&layer.path("map")) <= 8192);
    layer.open(BaseImage::blank()).expect("open").close().expect("close");
    assert!(disk_bytes(&layer.path("map")) <= 8192, "opening and closing writes nothing");
}

#[test]
fn zeroes_over_a_zero_base_take_no_room_and_discard_gives_room_back() {
    let layer = blank(1 << 20);
    let overlay = layer.open(BaseImage::blank()).expect("open");
    overlay.write_at(0, &[0; 1 << 20]).expect("write zeroes");
    assert_eq!(overlay.allocated().expect("stat"), 0);
    overlay.write_at(0, &[1; 1 << 20]).expect("write");
    overlay.flush().expect("flush");
    assert!(overlay.allocated().expect("stat") >= 1 << 20);
    overlay.zero(4096, (1 << 20) - 8192).expect("discard");
    assert_eq!(overlay.allocated().expect("stat"), 8192);
    overlay.preallocate(0, 1 << 20).expect("preallocate");
    assert!(overlay.allocated().expect("stat") >= 1 << 20);
    assert_eq!(overlay.next_hole(0).expect("seek"), 4096, "preallocated is not written");
}

#[test]
fn requests_beyond_the_end_are_refused_and_change_nothing() {
    let layer = blank(8192);
    let overlay = layer.open(BaseImage::blank()).expect("open");
    let out_of_range = |result: cowdisk::Result<()>| {
        assert_eq!(result.expect_err("refused").kind(), ErrorKind::OutOfRange);
    };
    out_of_range(overlay.write_at(4096, &[1; 4097]));
    out_of_range(overlay.write_at(u64::MAX, &[1]));
    out_of_range(overlay.read_at(8192, &mut [0]));
    out_of_range(overlay.zero(1, 8192));
    out_of_range(overlay.preallocate(8192, 1));
    assert_eq!(overlay.grow(4096).expect_err("refused").kind(), ErrorKind::Invalid);
    assert_eq!(overlay.grow(8193).expect_err("refused").kind(), ErrorKind::Invalid);
    assert_eq!(overlay.next_data(0).expect("seek"), None);
    overlay.write_at(8192, &[]).expect("nothing at the end is nothing");
}

#[test]
fn what_grows_reads_as_zeroes_even_where_the_last_block_was_cut() {
    let base = || image(3, &[9; 5000]);
    let layer = Layer::new(Geometry::new(5120, 4096, 0).expect("valid"), base().reference());
    let overlay = layer.open(base()).expect("open");
    overlay.write_at(5119, &[8]).expect("write the last byte");
    overlay.grow(20480).expect("grow");
    let mut found = vec![1; 20480];
    overlay.read_at(0, &mut found).expect("read");
    assert!(found[..5000].iter().all(|&byte| byte == 9));
    assert_eq!(found[5119], 8);
    assert!(found[5000..5119].iter().chain(&found[5120..]).all(|&byte| byte == 0));
    overlay.close().expect("close");
    assert_eq!(layer.open(base()).expect("open").size(), 20480);
}

#[test]
fn a_live_map_of_another_session_is_not_believed() {
    let layer = blank(1 << 20);
    let overlay = layer.open(BaseImage::blank()).expect("open");
    overlay.write_at(0, &[1; 4096]).expect("write");
    overlay.flush().expect("flush");
    drop(overlay);
    // Header and first page: all that is in use.
    let mut old_live = vec![0; 8192];
    layer.file("live").read_at(0, &mut old_live).expect("read the live map");
    let overlay = layer.open(BaseImage::blank()).expect("take it up");
    overlay.zero(0, 4096).expect("zero");
    overlay.close().expect("close");
    let overlay = layer.open(BaseImage::blank()).expect("open");
    overlay.write_at(8192, &[2; 4096]).expect("write in a new session");
    drop(overlay);
    layer.file("live").write_at(0, &old_live).expect("put the old live map back");
    let overlay = layer.open_after_reboot();
    let mut found = [7; 4096];
    overlay.read_at(0, &mut found).expect("read");
    assert_eq!(found, [0; 4096], "the block that was discarded stays so");
}

#[test]
fn the_map_is_read_beside_an_open_overlay_and_without_one() {
    let layer = blank(1 << 20);
    let overlay = layer.open(BaseImage::blank()).expect("open");
    overlay.write_at(8192, &[1; 8192]).expect("write");
    let runs = || -> Vec<(u64, u64)> {
        let reader = MapReader::open("test", layer.file("map"), &layer.path("live")).expect("read the map");
        reader.extents().map(|extent| (extent.span.start, extent.span.end)).collect()
    };
    let expected = vec![(0, 2), (2, 4), (4, 256)];
    assert_eq!(runs(), expected, "from the live map, before any flush");
    overlay.close().expect("close");
    assert_eq!(runs(), expected, "from the durable map");
}

#[test]
fn a_guest_that_never_flushes_takes_bounded_memory_and_loses_nothing() {
    let layer = blank(2 << 30);
    let overlay = layer.open(BaseImage::blank()).expect("open");
    // Every second block, so that no two runs merge: more runs than may wait for a commit.
    for n in 0..70_000u64 {
        overlay.write_at(n * 8192, &[n as u8 | 1; 512]).expect("write");
    }
    drop(overlay);
    std::fs::remove_file(layer.path("live")).expect("as after a reboot of the host");
    let overlay = layer.open_after_reboot();
    let mut found = [0; 512];
    overlay.read_at(8192, &mut found).expect("read");
    assert_eq!(found, [1; 512], "the first of them were committed on the way");
}

#[test]
fn an_overlay_whose_live_map_was_removed_is_refused_unless_the_loss_is_accepted() {
    let layer = blank(1 << 20);
    let overlay = layer.open(BaseImage::blank()).expect("open");
    overlay.write_at(0, &[1; 4096]).expect("write");
    overlay.flush().expect("flush");
    overlay.write_at(8192, &[2; 4096]).expect("write");
    drop(overlay);
    std::fs::remove_file(layer.path("live")).expect("somebody removes the live map");
    let error = layer.open(BaseImage::blank()).expect_err("refused");
    assert!(error.to_string().contains("live map") && error.hint().is_some(), "{error}");
    let overlay = layer.open_after_reboot();
    let mut found = [7; 8192 + 4096];
    overlay.read_at(0, &mut found).expect("read");
    assert!(found[..4096] == [1; 4096] && found[8192..] == [0; 4096], "as of the last flush");
    drop(overlay);
    layer.open(BaseImage::blank()).expect("the loss was accepted once and for all");
}

#[test]
fn a_backup_put_in_an_overlays_place_is_not_read_by_the_newer_live_map() {
    let layer = blank(1 << 20);
    let overlay = layer.open(BaseImage::blank()).expect("open");
    overlay.write_at(0, &[1; 4096]).expect("write");
    overlay.flush().expect("flush");
    for name in ["data", "map"] {
        std::fs::copy(layer.path(name), layer.path(&format!("{name}.backup"))).expect("back up");
    }
    overlay.write_at(8192, &[2; 4096]).expect("write");
    overlay.flush().expect("flush");
    drop(overlay);
    for name in ["data", "map"] {
        std::fs::copy(layer.path(&format!("{name}.backup")), layer.path(name)).expect("restore");
    }
    assert_eq!(layer.open(BaseImage::blank()).expect_err("refused").kind(), ErrorKind::Corrupt);
    let overlay = layer.open_after_reboot();
    assert_eq!(overlay.next_hole(0).expect("seek"), 4096);
    assert_eq!(
        overlay.next_data(8192).expect("seek"),
        None,
        "the newer map named data that the backup lacks"
    );
}

/// The superblock that began the session is in the host's cache until the first commit. Should the host fail to write it, the
/// layer looks as if it had never been written to: whoever has the disk open still must not see it so.
#[test]
fn a_disk_whose_session_the_host_has_lost_is_not_taken_up_for_those_who_have_it_open() {
    let layer = blank(1 << 20);
    let read_map = || std::fs::read(layer.path("map")).expect("read the map");
    let untouched = read_map();
    let overlay = layer.open(BaseImage::blank()).expect("open");
    overlay.write_at(0, &[1; 4096]).expect("write");
    // The daemon dies.
    drop(overlay);
    let adopt = || Overlay::adopt("test", layer.files(), BaseImage::blank(), &layer.path("live"));
    let begun = read_map();
    std::fs::write(layer.path("map"), &untouched).expect("lose what was written");
    assert_eq!(adopt().expect_err("what was answered is not there").kind(), ErrorKind::Corrupt);
    std::fs::write(layer.path("map"), &begun).expect("bring it back");
    let overlay = adopt().expect("take it up");
    let mut bytes = [0; 4096];
    overlay.read_at(0, &mut bytes).expect("read");
    assert_eq!(bytes, [1; 4096]);
    overlay.close().expect("close");
}

/// After the beginning of a session a copy of the superblock is one writing behind until the first commit, in which it is made
/// equal again: damage to one of them then loses nothing.
#[test]
fn the_first_commit_of_a_session_makes_the_copies_of_the_superblock_equal() {
    let layer = blank(1 << 20);
    let copies = || {
        let map = std::fs::read(layer.path("map")).expect("read the map");
        (map[..4096].to_vec(), map[4096..8192].to_vec())
    };
    let overlay = layer.open(BaseImage::blank()).expect("open");
    overlay.write_at(0, &[1; 4096]).expect("write");
    let (one, two) = copies();
    assert_ne!(one, two);
    overlay.flush().expect("flush");
    let (one, two) = copies();
    assert_eq!(one, two);
    overlay.close().expect("close");
}
