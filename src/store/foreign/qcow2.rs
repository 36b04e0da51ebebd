//! The header of a qcow2 file (QEMU's `docs/interop/qcow2.rst`; all numbers big-endian).

use super::{ImageBytes, big, read_exact, read_up_to, refused, slice};
use crate::error::Result;

const VERSION_AT: usize = 4;
const BACKING_OFFSET_AT: usize = 8;
const BACKING_LEN_AT: usize = 16;
const CLUSTER_BITS_AT: usize = 20;
const SIZE_AT: usize = 24;
const CRYPT_AT: usize = 32;
const V2_BYTES: usize = 72;
const INCOMPATIBLE_AT: usize = 72;
const HEADER_LEN_AT: usize = 100;
const COMPRESSION_AT: usize = 104;
const V3_BYTES: usize = 104;

/// Incompatible features that `qemu-img convert` reads without leaving the file.
const FEATURE_DIRTY: u64 = 1 << 0;
const FEATURE_CORRUPT: u64 = 1 << 1;
const FEATURE_DATA_FILE: u64 = 1 << 2;
const FEATURE_COMPRESSION: u64 = 1 << 3;
const FEATURE_SUBCLUSTERS: u64 = 1 << 4;
const FEATURES_ACCEPTED: u64 = FEATURE_DIRTY | FEATURE_COMPRESSION | FEATURE_SUBCLUSTERS;

const EXTENSION_END: u64 = 0;
const EXTENSION_BACKING_FORMAT: u64 = 0xe279_2aca;
const EXTENSION_ENCRYPTION: u64 = 0x0537_be77;
const EXTENSION_DATA_FILE: u64 = 0x4441_5441;

/// Returns the virtual size in bytes.
pub(super) fn check(image: &dyn ImageBytes) -> Result<u64> {
    let head = read_exact(image, 0, V2_BYTES)?;
    if slice(&head, 0, 4)? != b"QFI\xfb" {
        return Err(refused("not a qcow2 file: the magic is missing"));
    }
    let version = big(&head, VERSION_AT, 4)?;
    if !(2..=3).contains(&version) {
        return Err(refused(format!("qcow2 version {version} is not supported")));
    }
    if big(&head, BACKING_OFFSET_AT, 8)? != 0 || big(&head, BACKING_LEN_AT, 4)? != 0 {
        return Err(refused("the image has a backing file, which is not part of it")
            .with_hint("flatten it where its backing file is trusted: qemu-img convert -O qcow2 IN OUT"));
    }
    if big(&head, CRYPT_AT, 4)? != 0 {
        return Err(refused("the image is encrypted"));
    }
    let cluster_bits = big(&head, CLUSTER_BITS_AT, 4)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(refused(format!("cluster size of 2^{cluster_bits} bytes: must be 2^9 to 2^21")));
    }
    let header_bytes = if version == 2 { V2_BYTES } else { check_version_3(image)? };
    check_extensions(image, header_bytes, 1 << cluster_bits)?;
    big(&head, SIZE_AT, 8)
}

/// Checks what only version 3 has; returns the length of the header.
fn check_version_3(image: &dyn ImageBytes) -> Result<usize> {
    let head = read_exact(image, 0, V3_BYTES)?;
    let features = big(&head, INCOMPATIBLE_AT, 8)?;
    if features & FEATURE_DATA_FILE != 0 {
        return Err(refused("the image keeps its data in another file"));
    }
    if features & FEATURE_CORRUPT != 0 {
        return Err(
            refused("the image is marked as corrupt").with_hint("qemu-img check -r all may repair it")
        );
    }
    let unknown = features & !FEATURES_ACCEPTED;
    if unknown != 0 {
        return Err(refused(format!("the image has unknown incompatible features ({unknown:#x})")));
    }
    let header_bytes = usize::try_from(big(&head, HEADER_LEN_AT, 4)?).unwrap_or(usize::MAX);
    if !(V3_BYTES..=4096).contains(&header_bytes) || !header_bytes.is_multiple_of(8) {
        return Err(refused(format!("header of {header_bytes} bytes: must be 104 to 4096, a multiple of 8")));
    }
    let compression = if header_bytes > COMPRESSION_AT {
        big(&read_exact(image, 0, header_bytes)?, COMPRESSION_AT, 1)?
    } else {
        0
    };
    if compression > 1 || (features & FEATURE_COMPRESSION != 0) != (compression != 0) {
        return Err(refused(format!("compression type {compression} is not supported")));
    }
    Ok(header_bytes)
}

/// Checks the header extensions, which follow the header within the first cluster.
fn check_extensions(image: &dyn ImageBytes, header_bytes: usize, cluster_bytes: usize) -> Result<()> {
    let first_cluster = read_up_to(image, 0, cluster_bytes.min(super::READ_BYTES_MAX))?;
    let mut at = header_bytes;
    // A header may fill the first cluster up to fewer bytes than an extension has: then there is none.
    while at + 8 <= first_cluster.len() {
        let kind = big(&first_cluster, at, 4)?;
        let len = usize::try_from(big(&first_cluster, at + 4, 4)?).unwrap_or(usize::MAX);
        match kind {
            EXTENSION_END => return Ok(()),
            EXTENSION_BACKING_FORMAT => return Err(refused("the image names the format of a backing file")),
            EXTENSION_DATA_FILE => return Err(refused("the image names another file for its data")),
            EXTENSION_ENCRYPTION => return Err(refused("the image is encrypted")),
            _ => {}
        }
        at += 8;
        slice(&first_cluster, at, len)
            .map_err(|_| refused("a header extension reaches beyond the first cluster"))?;
        at += len.next_multiple_of(8);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{put_big, survives_any_damage};
    use super::*;
    use crate::store::foreign::SourceFormat;

    fn good() -> Vec<u8> {
        let mut image = vec![0; 65536];
        image[..4].copy_from_slice(b"QFI\xfb");
        put_big(&mut image, VERSION_AT, 4, 3);
        put_big(&mut image, CLUSTER_BITS_AT, 4, 16);
        put_big(&mut image, SIZE_AT, 8, 1 << 30);
        put_big(&mut image, HEADER_LEN_AT, 4, 112);
        // The table of feature names, as qemu-img writes it.
        put_big(&mut image, 112, 4, 0x6803_f857);
        put_big(&mut image, 116, 4, 48);
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
        let mut version_2 = good();
        put_big(&mut version_2, VERSION_AT, 4, 2);
        version_2[72..200].fill(0);
        assert_eq!(check(&version_2).unwrap(), 1 << 30);
    }

    #[test]
    fn whatever_leads_out_of_the_image_is_refused() {
        refused_for(|image| put_big(image, BACKING_OFFSET_AT, 8, 200), "backing file");
        refused_for(|image| put_big(image, BACKING_LEN_AT, 4, 9), "backing file");
        refused_for(|image| put_big(image, INCOMPATIBLE_AT, 8, FEATURE_DATA_FILE), "another file");
        refused_for(|image| put_big(image, 112, 4, EXTENSION_DATA_FILE), "another file");
        refused_for(|image| put_big(image, 168, 4, EXTENSION_DATA_FILE), "another file");
        refused_for(|image| put_big(image, 112, 4, EXTENSION_BACKING_FORMAT), "backing");
        refused_for(|image| put_big(image, 112, 4, EXTENSION_ENCRYPTION), "encrypted");
        refused_for(|image| put_big(image, CRYPT_AT, 4, 2), "encrypted");
    }

    #[test]
    fn whatever_is_unknown_or_absurd_is_refused() {
        refused_for(|image| put_big(image, INCOMPATIBLE_AT, 8, 1 << 5), "unknown incompatible");
        refused_for(|image| put_big(image, INCOMPATIBLE_AT, 8, 1 << 63), "unknown incompatible");
        refused_for(|image| put_big(image, INCOMPATIBLE_AT, 8, FEATURE_CORRUPT), "corrupt");
        refused_for(|image| put_big(image, VERSION_AT, 4, 4), "version 4");
        refused_for(|image| put_big(image, CLUSTER_BITS_AT, 4, 64), "cluster size");
        refused_for(|image| put_big(image, HEADER_LEN_AT, 4, 0xffff_fff8), "header of");
        refused_for(|image| put_big(image, 116, 4, 0xffff_ffff), "beyond the first cluster");
        refused_for(|image| image[COMPRESSION_AT] = 7, "compression");
        refused_for(|image| image[0] = 0, "magic");
        refused_for(|image| image.truncate(40), "cut short");
    }

    #[test]
    fn damage_never_panics() {
        survives_any_damage(SourceFormat::Qcow2, &good(), 0..256);
    }
}
