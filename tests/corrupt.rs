//! Damaged map files are refused with an error, or change nothing; they never panic, hang or show wrong blocks.
#![allow(clippy::cast_possible_truncation)] // sizes that the test made itself

mod common;

use common::layer::Layer;
use common::sim::{Rng, SimFile, SimHost};
use cowdisk::ErrorKind;
use cowdisk::format::PAGES_OFFSET;
use cowdisk::overlay::{BaseImage, LayerFiles, MapReader, Overlay};
use cowdisk::storage::Storage;

#[test]
fn a_flipped_bit_in_the_map_is_refused_or_harmless() {
    let layer = Layer::cut_by_a_reboot();
    let before = layer.contents().expect("whole");
    let end = layer.map.size().expect("size");
    let mut rng = Rng(1);
    let (mut refused, mut harmless) = (0, 0);
    for round in 0..600 {
        // Half of the flips hit what is in use: superblocks, the journal's records and the pages' slots.
        let offset = match round % 4 {
            0 => rng.below(8192),
            // Not the last record: damage to it cannot be told from a commit that a crash tore (FORMAT.md).
            1 => 8192 + rng.below(2 * 8192),
            2 => PAGES_OFFSET + rng.below(4 * 4096),
            _ => rng.below(end),
        };
        if (24576..32768).contains(&offset) {
            continue;
        }
        let mask = 1 << rng.below(8);
        layer.map.corrupt(offset, mask);
        match layer.contents() {
            Ok(found) => {
                harmless += 1;
                assert!(found == before, "bit {mask:#x} of byte {offset} changed what the disk shows");
            }
            Err(error) => {
                refused += 1;
                assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {offset}: {error}");
            }
        }
        let _ = MapReader::open("test", layer.map.clone(), &layer.live_map());
        layer.map.corrupt(offset, mask);
    }
    assert!(refused > 100 && harmless > 100, "{refused} refused, {harmless} harmless");
    assert!(layer.contents().expect("whole again") == before);
}

#[test]
fn one_copy_of_the_superblock_is_enough() {
    let layer = Layer::cut_by_a_reboot();
    let before = layer.contents().expect("whole");
    for copy in 0..2 {
        for at in 0..4096 {
            layer.map.corrupt(copy * 4096 + at, 0xff);
        }
        assert!(layer.contents().expect("the other copy is whole") == before);
        for at in 0..4096 {
            layer.map.corrupt(copy * 4096 + at, 0xff);
        }
    }
}

#[test]
fn a_lost_journal_record_before_a_committed_one_is_refused() {
    let layer = Layer::cut_by_a_reboot();
    let record = (0..64).map(|n| 8192 + n * 4096).find(|&at| {
        let mut magic = [0; 8];
        layer.map.read_at(at, &mut magic).expect("read");
        &magic == b"COWJRNL1"
    });
    layer.map.corrupt(record.expect("a record") + 100, 1);
    let error = layer.contents().expect_err("refused");
    assert!(error.to_string().contains("journal: record"), "{error}");
}

#[test]
fn a_data_file_that_was_cut_is_refused() {
    let host = SimHost::new(0);
    let (short, map) = (SimFile::new(&host), Layer::cut_by_a_reboot());
    let files = LayerFiles { data: Box::new(short), map: Box::new(map.map.clone()) };
    let live = map.live_map();
    let opened = Overlay::open_accepting_loss("test", files, BaseImage::blank(), &live);
    let error = opened.expect_err("refused");
    assert!(error.to_string().contains("data file ends at byte 0"), "{error}");
}

#[test]
fn random_bytes_are_no_map() {
    let host = SimHost::new(0);
    let mut rng = Rng(3);
    for _ in 0..50 {
        let map = SimFile::new(&host);
        let bytes: Vec<u8> = (0..65536).map(|_| rng.next() as u8).collect();
        map.write_at(0, &bytes).expect("write");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let files = LayerFiles { data: Box::new(SimFile::new(&host)), map: Box::new(map) };
        let error = Overlay::open("test", files, BaseImage::blank(), &folder.path().join("live"))
            .expect_err("no map");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
}
