//! `fixtures/v1` is a layer that the first version of the format left behind: it must open for ever, and what is decoded
//! from it must encode to the same bytes. It is never made again.
//!
//! It is a disk of 256 KiB in blocks of 4 KiB with a lead of 512 bytes, over a blank base; the daemon was killed.

use std::path::{Path, PathBuf};

use cowdisk::format::{
    BaseRef, BlockState, JOURNAL_OFFSET, JournalRecord, LayerId, MapPage, PAGE_BYTES, SUPERBLOCK_BYTES,
    Superblock, slot_offset,
};
use cowdisk::overlay::{BaseImage, LayerFiles, MapReader, Overlay};
use cowdisk::storage::{FileStorage, Storage};
use cowdisk::units::Geometry;

const LAYER: LayerId = LayerId(*b"cowdisk fixture1");

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1").join(name)
}

fn read<const N: usize>(file: &FileStorage, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    file.read_at(offset, &mut bytes).expect("read the fixture");
    bytes
}

fn open(path: &Path) -> FileStorage {
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).open(path).expect("open the fixture");
    FileStorage::new(file, path.display().to_string())
}

#[test]
fn the_first_version_encodes_to_the_same_bytes() {
    let map = open(&fixture("disk.map"));
    let bytes = read::<SUPERBLOCK_BYTES>(&map, 0);
    let superblock = Superblock::decode(&bytes).expect("the superblock");
    assert_eq!(superblock.encode(), bytes);
    assert_eq!(superblock.layer, LAYER);
    assert_eq!(superblock.base, BaseRef::Blank);
    assert_eq!(superblock.geometry, Geometry::new(256 << 10, 4096, 512).expect("valid"));

    let bytes = read::<PAGE_BYTES>(&map, slot_offset(0, 0));
    let (page, _) = MapPage::decode(LAYER, 0, &bytes).expect("the page");
    assert_eq!(page.encode(LAYER).0, bytes);

    let bytes = read::<4096>(&map, JOURNAL_OFFSET);
    let record = JournalRecord::decode(LAYER, superblock.geometry, &bytes).expect("not corrupt");
    let record = record.expect("a record");
    assert_eq!(record.encode(LAYER), bytes);
    assert_eq!(record.sequence, superblock.journal_sequence);
}

#[test]
fn the_first_version_opens_with_its_contents() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let copy = |name: &str| {
        std::fs::copy(fixture(name), folder.path().join(name)).expect("copy the fixture");
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).open(folder.path().join(name)).expect("open the copy");
        Box::new(FileStorage::new(file, name))
    };
    let live = folder.path().join("live");
    let reader = MapReader::open("fixture", open(&fixture("disk.map")), &live).expect("read the map");
    let states: Vec<_> = reader.extents().map(|extent| (extent.span.start, extent.state)).collect();
    let (base, data) = (BlockState::Base, BlockState::Data);
    assert_eq!(states, [(0, base), (1, data), (3, base), (9, data), (10, base)]);

    let files = LayerFiles { data: copy("disk.data"), map: copy("disk.map") };
    let overlay = Overlay::open_accepting_loss("fixture", files, BaseImage::blank(), &live).expect("open");
    let mut found = vec![9; 256 << 10];
    overlay.read_at(0, &mut found).expect("read");
    let expected = |at: usize| match at {
        3584..11776 => 0x11,
        40_000..40_010 => 0x22,
        _ => 0,
    };
    assert!(found.iter().enumerate().all(|(at, &byte)| byte == expected(at)));
    overlay.close().expect("close");
}
