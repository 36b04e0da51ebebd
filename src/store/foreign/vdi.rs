//! The header of a VirtualBox disk image (all numbers little-endian).

use super::{ImageBytes, little, read_exact, refused, slice};
use crate::error::Result;

const MAGIC_AT: usize = 0x40;
const VERSION_AT: usize = 0x44;
const TYPE_AT: usize = 0x4c;
const SECTOR_BYTES_AT: usize = 0x168;
const SIZE_AT: usize = 0x170;
const BLOCK_BYTES_AT: usize = 0x178;
const BLOCKS_AT: usize = 0x180;
const LINK_UUID_AT: usize = 0x1a8;
const PARENT_UUID_AT: usize = 0x1b8;
const HEADER_BYTES: usize = 512;

const TYPE_DYNAMIC: u64 = 1;
const TYPE_STATIC: u64 = 2;

/// Returns the virtual size in bytes.
pub(super) fn check(image: &dyn ImageBytes) -> Result<u64> {
    let head = read_exact(image, 0, HEADER_BYTES)?;
    if slice(&head, MAGIC_AT, 4)? != b"\x7f\x10\xda\xbe" {
        return Err(refused("not a vdi file: the magic is missing"));
    }
    let version = little(&head, VERSION_AT, 4)?;
    if version != 0x0001_0001 {
        return Err(refused(format!("vdi version {}.{} is not supported", version >> 16, version & 0xffff)));
    }
    if ![TYPE_DYNAMIC, TYPE_STATIC].contains(&little(&head, TYPE_AT, 4)?) {
        return Err(refused("the image is a differencing image, which needs its parent"));
    }
    let is_zero = |at| Ok(slice(&head, at, 16)?.iter().all(|byte| *byte == 0));
    if !is_zero(LINK_UUID_AT)? || !is_zero(PARENT_UUID_AT)? {
        return Err(refused("the image names a parent image"));
    }
    let (size, block_bytes) = (little(&head, SIZE_AT, 8)?, little(&head, BLOCK_BYTES_AT, 4)?);
    if little(&head, SECTOR_BYTES_AT, 4)? != 512 || block_bytes != 1 << 20 {
        return Err(refused("the image does not have sectors of 512 bytes and blocks of 1 MiB"));
    }
    if size.div_ceil(block_bytes) > little(&head, BLOCKS_AT, 4)? {
        return Err(refused("the image has fewer blocks than its size needs"));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{put_little, survives_any_damage};
    use super::*;
    use crate::store::foreign::SourceFormat;

    fn good() -> Vec<u8> {
        let mut image = vec![0; 4096];
        put_little(&mut image, MAGIC_AT, 4, 0xbeda_107f);
        put_little(&mut image, VERSION_AT, 4, 0x0001_0001);
        put_little(&mut image, TYPE_AT, 4, TYPE_DYNAMIC);
        put_little(&mut image, SECTOR_BYTES_AT, 4, 512);
        put_little(&mut image, SIZE_AT, 8, 1 << 30);
        put_little(&mut image, BLOCK_BYTES_AT, 4, 1 << 20);
        put_little(&mut image, BLOCKS_AT, 4, 1024);
        image
    }

    #[track_caller]
    fn refused_for(at: usize, width: usize, value: u64, reason: &str) {
        let mut image = good();
        put_little(&mut image, at, width, value);
        let error = check(&image).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }

    #[test]
    fn a_plain_image_is_accepted_and_one_with_a_parent_is_not() {
        assert_eq!(check(&good()).unwrap(), 1 << 30);
        for differencing in [0, 3, 4, 5, 0xffff_ffff] {
            refused_for(TYPE_AT, 4, differencing, "differencing");
        }
        refused_for(PARENT_UUID_AT + 15, 1, 1, "parent");
        refused_for(LINK_UUID_AT, 1, 1, "parent");
        refused_for(VERSION_AT, 4, 0x0002_0001, "version 2.1");
        refused_for(BLOCK_BYTES_AT, 4, 0, "blocks of 1 MiB");
        refused_for(SIZE_AT, 8, u64::MAX, "fewer blocks");
        refused_for(MAGIC_AT, 4, 0, "magic");
    }

    #[test]
    fn damage_never_panics() {
        survives_any_damage(SourceFormat::Vdi, &good(), 0x40..512);
    }
}
