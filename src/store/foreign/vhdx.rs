//! The region and metadata tables of a VHDX file ([MS-VHDX]; all numbers little-endian).
//!
//! A VHDX refers to another file only through its metadata: the file parameters say that it has a parent, and a parent
//! locator says where. Checksums are left to the converter: this parser only decides what a reader could be led to.

use std::collections::HashSet;

use super::{ImageBytes, little, read_exact, refused, slice};
use crate::error::Result;

const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const TABLE_BYTES: usize = 64 << 10;
const REGION_HEAD_BYTES: usize = 16;
const REGION_ENTRY_BYTES: usize = 32;
const METADATA_HEAD_BYTES: usize = 32;
const METADATA_ENTRY_BYTES: usize = 32;
/// Most entries that either table may have.
const ENTRIES_MAX: u64 = 2047;
/// Flags of an entry of the metadata table and of the region table.
const ITEM_REQUIRED: u64 = 1 << 2;
const REGION_REQUIRED: u64 = 1 << 0;
/// Flag of the file parameters.
const HAS_PARENT: u64 = 1 << 1;

type Guid = [u8; 16];

const REGION_BAT: Guid = *b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08";
const REGION_METADATA: Guid = *b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
const ITEM_PARAMETERS: Guid = *b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b";
const ITEM_SIZE: Guid = *b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8";
const ITEM_PARENT_LOCATOR: Guid = *b"\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c";
const ITEM_PAGE_83: Guid = *b"\xab\x12\xca\xbe\xe6\xb2\x23\x45\x93\xef\xc3\x09\xe0\x00\xc7\x46";
const ITEM_LOGICAL_SECTOR: Guid = *b"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f";
const ITEM_PHYSICAL_SECTOR: Guid = *b"\xc7\x48\xa3\xcd\x5d\x44\x71\x44\x9c\xc9\xe9\x88\x52\x51\xc5\x56";
const ITEMS_KNOWN: [Guid; 5] =
    [ITEM_PARAMETERS, ITEM_SIZE, ITEM_PAGE_83, ITEM_LOGICAL_SECTOR, ITEM_PHYSICAL_SECTOR];

/// Returns the virtual size in bytes.
pub(super) fn check(image: &dyn ImageBytes) -> Result<u64> {
    if read_exact(image, 0, 8)? != b"vhdxfile" {
        return Err(refused("not a vhdx file: the magic is missing"));
    }
    let first = read_exact(image, REGION_TABLES[0], TABLE_BYTES)?;
    let second = read_exact(image, REGION_TABLES[1], TABLE_BYTES)?;
    if first != second {
        return Err(refused("the two copies of the region table differ")
            .with_hint("let the system that wrote the image check or convert it first"));
    }
    let metadata = metadata_region(&first)?;
    check_metadata(image, &metadata)
}

/// A run of bytes of the file.
struct Region {
    offset: u64,
    bytes: u64,
}

fn guid(bytes: &[u8], at: usize) -> Result<Guid> {
    Ok(slice(bytes, at, 16)?.try_into().unwrap_or_default())
}

/// The number of entries of a table, checked.
fn entries(table: &[u8], at: usize, width: usize) -> Result<usize> {
    let count = little(table, at, width)?;
    if count == 0 || count > ENTRIES_MAX {
        return Err(refused(format!("table of {count} entries: must be 1 to {ENTRIES_MAX}")));
    }
    Ok(usize::try_from(count).unwrap_or_default())
}

fn metadata_region(table: &[u8]) -> Result<Region> {
    if slice(table, 0, 4)? != b"regi" {
        return Err(refused("the region table is missing"));
    }
    let mut metadata = None;
    let mut seen = HashSet::new();
    for entry in 0..entries(table, 8, 4)? {
        let at = REGION_HEAD_BYTES + entry * REGION_ENTRY_BYTES;
        let kind = guid(table, at)?;
        if !seen.insert(kind) {
            return Err(refused("the region table names a region twice"));
        }
        let region = Region { offset: little(table, at + 16, 8)?, bytes: little(table, at + 24, 4)? };
        if kind == REGION_METADATA {
            metadata = Some(region);
        } else if kind != REGION_BAT && little(table, at + 28, 4)? & REGION_REQUIRED != 0 {
            return Err(refused("the image has an unknown region that readers must understand"));
        }
    }
    metadata.ok_or_else(|| refused("the image has no metadata region"))
}

fn check_metadata(image: &dyn ImageBytes, region: &Region) -> Result<u64> {
    let table = read_exact(image, region.offset, TABLE_BYTES)?;
    if slice(&table, 0, 8)? != b"metadata" {
        return Err(refused("the metadata table is missing"));
    }
    let (mut size, mut parameters) = (None, None);
    let mut seen = HashSet::new();
    for entry in 0..entries(&table, 10, 2)? {
        let at = METADATA_HEAD_BYTES + entry * METADATA_ENTRY_BYTES;
        let (kind, flags) = (guid(&table, at)?, little(&table, at + 24, 4)?);
        if kind == ITEM_PARENT_LOCATOR {
            return Err(refused("the image names a parent image"));
        }
        if !ITEMS_KNOWN.contains(&kind) {
            if flags & ITEM_REQUIRED != 0 {
                return Err(refused("the image has unknown metadata that readers must understand"));
            }
            continue;
        }
        if !seen.insert(kind) {
            return Err(refused("the image has a metadata item twice"));
        }
        let item = Region { offset: little(&table, at + 16, 4)?, bytes: little(&table, at + 20, 4)? };
        match kind {
            ITEM_SIZE => size = Some(read_item(image, region, &item)?),
            ITEM_PARAMETERS => parameters = Some(read_item(image, region, &item)?),
            _ => {}
        }
    }
    let parameters = parameters.ok_or_else(|| refused("the image has no file parameters"))?;
    if (parameters >> 32) & HAS_PARENT != 0 {
        return Err(refused("the image is a differencing image, which needs its parent"));
    }
    size.ok_or_else(|| refused("the image does not say its size"))
}

/// The 8 bytes of a metadata item as a number.
fn read_item(image: &dyn ImageBytes, region: &Region, item: &Region) -> Result<u64> {
    let end = item.offset.checked_add(8).ok_or_else(super::truncated)?;
    if item.bytes < 8 || end > region.bytes {
        return Err(refused("a metadata item lies outside the metadata region"));
    }
    let offset = region.offset.checked_add(item.offset).ok_or_else(super::truncated)?;
    little(&read_exact(image, offset, 8)?, 0, 8)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{put_little, survives_any_damage};
    use super::*;
    use crate::store::foreign::SourceFormat;

    const METADATA: usize = 2 << 20;
    const FIRST_ITEM: usize = METADATA + METADATA_HEAD_BYTES;

    fn put_item(image: &mut [u8], entry: usize, kind: &Guid, offset: u64, value: u64) {
        let at = FIRST_ITEM + entry * METADATA_ENTRY_BYTES;
        image[at..at + 16].copy_from_slice(kind);
        put_little(image, at + 16, 4, offset);
        put_little(image, at + 20, 4, 8);
        put_little(image, at + 24, 4, ITEM_REQUIRED);
        put_little(image, METADATA + usize::try_from(offset).unwrap(), 8, value);
    }

    fn good() -> Vec<u8> {
        let mut image = vec![0; 3 << 20];
        image[..8].copy_from_slice(b"vhdxfile");
        for table in REGION_TABLES {
            let table = usize::try_from(table).unwrap();
            image[table..table + 4].copy_from_slice(b"regi");
            put_little(&mut image, table + 8, 4, 2);
            for (entry, kind, offset) in [(0, REGION_BAT, 1 << 20), (1, REGION_METADATA, 2 << 20)] {
                let at = table + REGION_HEAD_BYTES + entry * REGION_ENTRY_BYTES;
                image[at..at + 16].copy_from_slice(&kind);
                put_little(&mut image, at + 16, 8, offset);
                put_little(&mut image, at + 24, 4, 1 << 20);
                put_little(&mut image, at + 28, 4, REGION_REQUIRED);
            }
        }
        image[METADATA..METADATA + 8].copy_from_slice(b"metadata");
        put_little(&mut image, METADATA + 10, 2, 3);
        put_item(&mut image, 0, &ITEM_PARAMETERS, 65536, 32 << 20);
        put_item(&mut image, 1, &ITEM_SIZE, 65544, 1 << 30);
        put_item(&mut image, 2, &ITEM_LOGICAL_SECTOR, 65552, 512);
        image
    }

    #[track_caller]
    fn refused_for(change: impl Fn(&mut Vec<u8>), reason: &str) {
        let mut image = good();
        change(&mut image);
        let error = check(&image).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }

    #[test]
    fn a_plain_image_is_accepted() {
        assert_eq!(check(&good()).unwrap(), 1 << 30);
    }

    #[test]
    fn whatever_leads_out_of_the_image_is_refused() {
        refused_for(|image| put_item(image, 0, &ITEM_PARAMETERS, 65536, HAS_PARENT << 32), "differencing");
        refused_for(|image| put_item(image, 2, &ITEM_PARENT_LOCATOR, 65552, 0), "parent");
        refused_for(|image| put_item(image, 2, &[9; 16], 65552, 0), "unknown metadata");
        refused_for(|image| put_item(image, 2, &ITEM_PARAMETERS, 65552, 0), "twice");
        refused_for(|image| image[(256 << 10) + 40] ^= 1, "copies");
    }

    #[test]
    fn absurd_numbers_are_refused() {
        refused_for(|image| put_little(image, METADATA + 10, 2, 0xffff), "entries");
        refused_for(|image| put_little(image, METADATA + 10, 2, 0), "entries");
        refused_for(|image| put_little(image, FIRST_ITEM + 16, 4, 0xffff_ffff), "outside the metadata");
        refused_for(|image| put_little(image, FIRST_ITEM + 20, 4, 0), "outside the metadata");
        let far_away = |image: &mut Vec<u8>| {
            for table in [192 << 10, 256 << 10] {
                put_little(image, table + REGION_HEAD_BYTES + REGION_ENTRY_BYTES + 16, 8, u64::MAX);
            }
        };
        refused_for(far_away, "cut short");
        refused_for(|image| image.truncate(300 << 10), "cut short");
    }

    #[test]
    fn damage_never_panics() {
        let table = 192 << 10;
        survives_any_damage(
            SourceFormat::Vhdx,
            &good()[..METADATA + 65600],
            (table..table + 80).chain(METADATA..METADATA + 128),
        );
    }
}
