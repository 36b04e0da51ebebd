//! Values of arguments, read from their texts.

use super::args::MapTarget;
use crate::error::{Error, ErrorKind, Result};
use crate::store::DiskName;
use crate::units::{check_block_bytes, check_disk_bytes, parse_size};

pub(super) fn disk_size(text: &str) -> Result<u64> {
    let size = parse_size(text)?;
    check_disk_bytes(size)?;
    Ok(size)
}

pub(super) fn block_size(text: &str) -> Result<u32> {
    let size = parse_size(text)?;
    let size = u32::try_from(size).unwrap_or(u32::MAX);
    check_block_bytes(size)?;
    Ok(size)
}

pub(super) fn memory_size(text: &str) -> Result<u64> {
    const MIN: u64 = 16 << 20;
    const MAX: u64 = 16 << 40;
    match parse_size(text)? {
        size @ MIN..=MAX => Ok(size),
        size => Err(Error::new(
            ErrorKind::Invalid,
            format!("memory of {size} bytes: must be at least 16M and at most 16T"),
        )),
    }
}

pub(super) fn vcpus(text: &str) -> Result<u32> {
    count("virtual processors", text, 1024)
}

pub(super) fn seconds(text: &str) -> Result<u64> {
    count("seconds", text, 86_400).map(u64::from)
}

pub(super) fn count(what: &str, text: &str, max: u32) -> Result<u32> {
    match text.parse() {
        Ok(number) if (1..=max).contains(&number) => Ok(number),
        _ => Err(Error::new(
            ErrorKind::Invalid,
            format!("{what} {text:?}: must be a whole number from 1 to {max}"),
        )),
    }
}

pub(super) fn map_target(text: &str) -> Result<MapTarget> {
    let (instance, disk) = match text.split_once('/') {
        Some((instance, disk)) => (instance, disk.parse()?),
        None => (text, DiskName::Root),
    };
    Ok(MapTarget { instance: instance.parse()?, disk })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_target_is_an_instance_or_one_of_its_disks() {
        let disk_of = |text: &str| map_target(text).map(|target| target.disk).ok();
        assert_eq!(disk_of("web-1"), Some(DiskName::Root));
        assert_eq!(disk_of("web-1/disk"), Some(DiskName::Root));
        assert_eq!(disk_of("web-1/disk.local"), Some(DiskName::Local));
        for bad in ["", "/disk", "web-1/", "web-1/disk/", "web-1/kernel", "../web-1"] {
            assert!(map_target(bad).is_err(), "{bad:?}");
        }
    }
}
