//! The decoders of the map file's structures. What is decoded must encode to the same bytes: then no two spellings of
//! one thing exist, and nothing that was read is lost when it is written again.

use cowdisk::ErrorKind;
use cowdisk::format::{
    CHECKSUM_BYTES, Checksum, JOURNAL_BLOCK_BYTES, JournalRecord, LayerId, MapPage, PAGE_BYTES,
    SUPERBLOCK_BYTES, Superblock,
};

use cowdisk::units::Geometry;

use super::input::Input;

const LAYER: LayerId = LayerId(*b"a layer of fuzz!");
/// Where a superblock has its layer's id: its checksum depends on it.
const LAYER_AT: usize = 80;

/// Puts the checksum in its place, so that what comes before it is looked at.
fn seal(layer: LayerId, bytes: &mut [u8]) {
    let (body, place) = bytes.split_at_mut(bytes.len() - CHECKSUM_BYTES);
    place.copy_from_slice(&Checksum::of(layer, body).0);
}

fn start_with(bytes: &mut [u8], start: &[u8]) {
    let len = start.len().min(bytes.len());
    bytes[..len].copy_from_slice(&start[..len]);
}

/// A superblock: a byte that says whether to make the checksum fit, then the superblock from its start.
pub fn superblock(data: &[u8]) {
    let mut input = Input::new(data);
    let fits = input.byte() & 1 == 0;
    let mut bytes = [0; SUPERBLOCK_BYTES];
    start_with(&mut bytes, input.rest());
    if fits {
        let layer = bytes[LAYER_AT..][..16].try_into().expect("16 bytes");
        seal(LayerId(layer), &mut bytes);
    }
    match Superblock::decode(&bytes) {
        Ok(found) => {
            assert_eq!(found.encode(), bytes);
            let geometry = found.geometry;
            assert!(geometry.blocks() > 0 && geometry.blocks() <= geometry.blocks_max());
            assert!(geometry.data_bytes() >= geometry.size());
        }
        Err(error) => assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{error}"),
    }
}

/// A map page: a byte that says whether to make the checksum fit, the page's place, then the page from its start.
pub fn map_page(data: &[u8]) {
    let mut input = Input::new(data);
    let fits = input.byte() & 1 == 0;
    let index = input.below(1 << 19);
    let mut bytes = [0; PAGE_BYTES];
    start_with(&mut bytes, input.rest());
    if fits {
        seal(LAYER, &mut bytes);
    }
    match MapPage::decode(LAYER, index, &bytes) {
        Ok((page, checksum)) => {
            assert_eq!(page.encode(LAYER), (bytes, checksum));
            assert_eq!(page.index, index);
        }
        Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}"),
    }
}

/// A record of the journal: whether to make magic, length and checksum fit; blocks of the disk; how many pages of the
/// host the record has, and how many come after it; then the record from its start.
pub fn journal(data: &[u8]) {
    let mut input = Input::new(data);
    let fits = input.byte();
    let disk_blocks = input.below(1 << 33);
    let len = (1 + usize::try_from(input.count(3)).expect("small")) * JOURNAL_BLOCK_BYTES;
    let after = usize::try_from(input.count(2)).expect("small") * JOURNAL_BLOCK_BYTES;
    let mut bytes = vec![0; len + after];
    start_with(&mut bytes[..len], input.rest());
    if fits & 1 == 0 {
        bytes[..8].copy_from_slice(b"COWJRNL1");
    }
    if fits & 2 == 0 {
        let len = u32::try_from(len).expect("small");
        bytes[16..20].copy_from_slice(&len.to_le_bytes());
    }
    if fits & 4 == 0 {
        seal(LAYER, &mut bytes[..len]);
    }
    let blocks = disk_blocks.clamp(1, 1 << 32);
    let geometry = Geometry::new(blocks * 4096, 4096, 0).expect("valid");
    match JournalRecord::decode(LAYER, geometry, &bytes) {
        Ok(Some(record)) => {
            let encoded = record.encode(LAYER);
            assert_eq!(encoded, bytes[..encoded.len()]);
            for change in record.changes {
                assert!(!change.span.is_empty() && change.span.end <= blocks);
            }
        }
        Ok(None) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}"),
    }
}
