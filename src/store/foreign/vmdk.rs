//! The header and the embedded descriptor of a VMDK in one file (all numbers little-endian, offsets in sectors).
//!
//! QEMU opens other files for a VMDK in two cases: when the capacity in the header is 0 it follows the extents that the
//! descriptor names, and it looks for a parent's name in the descriptor at byte 512, wherever the header says that the
//! descriptor is. Both are closed here: a capacity of 0 is refused, and the descriptor must be the one at byte 512.

use super::{ImageBytes, little, read_exact, read_up_to, refused, slice};
use crate::error::Result;

const SECTOR: u64 = 512;
const VERSION_AT: usize = 4;
const CAPACITY_AT: usize = 12;
const GRAIN_AT: usize = 20;
const DESCRIPTOR_AT: usize = 28;
const DESCRIPTOR_LEN_AT: usize = 36;
const DIRECTORY_AT: usize = 56;
const HEADER_BYTES: usize = 512;

/// In the field of the grain directory: it stands in a footer, two sectors before the end.
const DIRECTORY_IN_FOOTER: u64 = u64::MAX;
const FOOTER_BYTES_FROM_END: u64 = 2 * SECTOR;

const DESCRIPTOR_SECTOR: u64 = 1;
/// Longest descriptor that QEMU reads.
const DESCRIPTOR_BYTES_MAX: usize = 20 * 512;

/// Returns the virtual size in bytes.
pub(super) fn check(image: &dyn ImageBytes) -> Result<u64> {
    let head = read_exact(image, 0, HEADER_BYTES)?;
    let capacity = check_header(&head)?;
    if little(&head, DIRECTORY_AT, 8)? == DIRECTORY_IN_FOOTER {
        let at = image.size().checked_sub(FOOTER_BYTES_FROM_END).ok_or_else(super::truncated)?;
        let footer = read_exact(image, at, HEADER_BYTES)?;
        if check_header(&footer)? != capacity {
            return Err(refused("header and footer differ in the size of the disk"));
        }
    }
    check_descriptor(&read_up_to(image, DESCRIPTOR_SECTOR * SECTOR, DESCRIPTOR_BYTES_MAX)?)?;
    capacity.checked_mul(SECTOR).ok_or_else(|| refused(format!("size of {capacity} sectors")))
}

/// Checks a header or a footer; returns the capacity in sectors.
fn check_header(head: &[u8]) -> Result<u64> {
    if slice(head, 0, 4)? != b"KDMV" {
        return Err(refused("not a vmdk file with its own data: the magic is missing"));
    }
    let version = little(head, VERSION_AT, 4)?;
    if !(1..=3).contains(&version) {
        return Err(refused(format!("vmdk version {version} is not supported")));
    }
    let capacity = little(head, CAPACITY_AT, 8)?;
    if capacity == 0 {
        return Err(refused("the image has no data of its own, only a descriptor that names other files"));
    }
    let grain = little(head, GRAIN_AT, 8)?;
    if !grain.is_power_of_two() || !(8..=128 << 10).contains(&grain) {
        return Err(refused(format!("grain of {grain} sectors: must be a power of two from 8 to 131072")));
    }
    if little(head, DESCRIPTOR_AT, 8)? != DESCRIPTOR_SECTOR || little(head, DESCRIPTOR_LEN_AT, 8)? == 0 {
        return Err(refused("the image does not have its descriptor at byte 512"));
    }
    Ok(capacity)
}

/// Checks that the descriptor names one extent, in the file itself, and no parent.
fn check_descriptor(bytes: &[u8]) -> Result<()> {
    if find(bytes, b"parentFileNameHint") {
        return Err(refused("the image names a parent image"));
    }
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let (mut kind, mut extents) = (None, 0);
    for line in text.lines().map(str::trim) {
        if let Some(value) = value_of(line, "createType") {
            kind = Some(value.to_owned());
        } else if let Some(value) = value_of(line, "parentCID") {
            if !value.eq_ignore_ascii_case("ffffffff") {
                return Err(refused("the image has a parent image"));
            }
        } else if let Some(rest) = extent_of(line) {
            extents += 1;
            check_extent(rest)?;
        }
    }
    match kind.as_deref() {
        Some("monolithicSparse" | "streamOptimized") => {}
        Some(other) => {
            let shown: String = other.chars().take(40).collect();
            return Err(refused(format!(
                "vmdk of type {shown:?}: only monolithicSparse and streamOptimized keep everything in one file"
            )));
        }
        None => return Err(refused("the descriptor does not say the type of the vmdk")),
    }
    if extents != 1 {
        return Err(refused(format!("the descriptor names {extents} extents: must be 1")));
    }
    Ok(())
}

/// The value in `key = "value"`; the key in either case, the quotes optional.
fn value_of<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (name, value) = line.split_once('=')?;
    name.trim().eq_ignore_ascii_case(key).then(|| value.trim().trim_matches('"'))
}

/// What follows the access mode of an extent line such as `RW 2097152 SPARSE "disk.vmdk"`.
fn extent_of(line: &str) -> Option<&str> {
    let (access, rest) = line.split_once(char::is_whitespace)?;
    ["RW", "RDONLY", "NOACCESS"].iter().any(|mode| access.eq_ignore_ascii_case(mode)).then_some(rest.trim())
}

/// Checks the extent `2097152 SPARSE "disk.vmdk"`. Its name is not compared with the file's, for an image keeps it when
/// the file is renamed and no reader of these types opens it; but a name that leads elsewhere is a sign of malice.
fn check_extent(extent: &str) -> Result<()> {
    let wrong = || refused("the descriptor has an extent that is not the sparse data of the file itself");
    let (_sectors, rest) = extent.split_once(char::is_whitespace).ok_or_else(wrong)?;
    let (kind, name) = rest.trim().split_once(char::is_whitespace).ok_or_else(wrong)?;
    let name = name.trim().strip_prefix('"').and_then(|name| name.split_once('"')).ok_or_else(wrong)?.0;
    if kind != "SPARSE" {
        return Err(wrong());
    }
    if name.is_empty() || name.contains(['/', '\\', ':']) {
        return Err(refused("the descriptor names an extent in another place"));
    }
    Ok(())
}

fn find(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window.eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{put_little, survives_any_damage};
    use super::*;
    use crate::store::foreign::SourceFormat;

    const DESCRIPTOR: &str = "# Disk DescriptorFile\nversion=1\nCID=7f3a\nparentCID=ffffffff\n\
        createType=\"monolithicSparse\"\n\n# Extent description\nRW 2048 SPARSE \"disk.vmdk\"\n\n\
        ddb.virtualHWVersion = \"4\"\n";

    fn image(descriptor: &str) -> Vec<u8> {
        let mut image = vec![0; 32768];
        image[..4].copy_from_slice(b"KDMV");
        put_little(&mut image, VERSION_AT, 4, 1);
        put_little(&mut image, CAPACITY_AT, 8, 2048);
        put_little(&mut image, GRAIN_AT, 8, 128);
        put_little(&mut image, DESCRIPTOR_AT, 8, 1);
        put_little(&mut image, DESCRIPTOR_LEN_AT, 8, 20);
        image[512..512 + descriptor.len()].copy_from_slice(descriptor.as_bytes());
        image
    }

    fn stream_optimized() -> Vec<u8> {
        let mut image = image(&DESCRIPTOR.replace("monolithicSparse", "streamOptimized"));
        put_little(&mut image, DIRECTORY_AT, 8, DIRECTORY_IN_FOOTER);
        let footer = image[..512].to_vec();
        let at = image.len() - 1024;
        image[at..at + 512].copy_from_slice(&footer);
        image
    }

    #[track_caller]
    fn refused_for(image: &Vec<u8>, reason: &str) {
        let error = check(image).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }

    #[test]
    fn images_in_one_file_are_accepted() {
        assert_eq!(check(&image(DESCRIPTOR)).unwrap(), 1 << 20);
        assert_eq!(check(&stream_optimized()).unwrap(), 1 << 20);
    }

    #[test]
    fn a_descriptor_that_leads_elsewhere_is_refused() {
        let with = |from: &str, to: &str| image(&DESCRIPTOR.replace(from, to));
        refused_for(&with("disk.vmdk", "/etc/shadow"), "another place");
        refused_for(&with("disk.vmdk", "..\\\\x"), "another place");
        refused_for(&with("disk.vmdk", "nbd:host"), "another place");
        refused_for(&with("RW 2048 SPARSE", "RW 2048 FLAT"), "not the sparse data");
        refused_for(&with("RW 2048 SPARSE", "RW\t2048  VMFS "), "not the sparse data");
        refused_for(&with("monolithicSparse", "twoGbMaxExtentSparse"), "twoGbMaxExtentSparse");
        refused_for(&with("createType", "otherType"), "does not say the type");
        refused_for(&with("parentCID=ffffffff", "parentCID=12345678"), "parent");
        refused_for(&with("CID=7f3a", "parentFileNameHint=\"/etc/shadow\""), "parent");
        refused_for(&with("# Extent", "RW 2048 SPARSE \"b.vmdk\"\n# Extent"), "2 extents");
        refused_for(&with("RW 2048 SPARSE \"disk.vmdk\"", ""), "0 extents");
    }

    #[test]
    fn a_parent_hidden_behind_the_end_of_the_descriptor_is_refused() {
        let mut image = image(DESCRIPTOR);
        image[5000..5018].copy_from_slice(b"parentFileNameHint");
        refused_for(&image, "parent");
    }

    #[test]
    fn a_header_that_makes_readers_follow_the_descriptor_is_refused() {
        let mut no_data = image(DESCRIPTOR);
        put_little(&mut no_data, CAPACITY_AT, 8, 0);
        refused_for(&no_data, "names other files");
        let mut elsewhere = image(DESCRIPTOR);
        put_little(&mut elsewhere, DESCRIPTOR_AT, 8, 8);
        refused_for(&elsewhere, "descriptor at byte 512");
        put_little(&mut elsewhere, DESCRIPTOR_AT, 8, u64::MAX);
        refused_for(&elsewhere, "descriptor at byte 512");
        let mut footer = stream_optimized();
        let at = footer.len() - 1024;
        put_little(&mut footer[at..], CAPACITY_AT, 8, 0);
        refused_for(&footer, "names other files");
        put_little(&mut footer[at..], CAPACITY_AT, 8, 4096);
        refused_for(&footer, "differ");
    }

    #[test]
    fn absurd_numbers_are_refused() {
        let mut huge = image(DESCRIPTOR);
        put_little(&mut huge, CAPACITY_AT, 8, u64::MAX);
        refused_for(&huge, "sectors");
        let mut grain = image(DESCRIPTOR);
        put_little(&mut grain, GRAIN_AT, 8, 0);
        refused_for(&grain, "grain");
    }

    #[test]
    fn damage_never_panics() {
        survives_any_damage(SourceFormat::Vmdk, &image(DESCRIPTOR), (0..80).chain(512..800));
        survives_any_damage(SourceFormat::Vmdk, &stream_optimized(), (0..80).chain(31744..31824));
    }
}
