//! Which parts of a file have space on the host's disk, those included that were reserved and never written, which
//! SEEK_DATA calls holes.
#![allow(unsafe_code)]

use std::fs::File;

use rustix::io::Errno;

/// `FS_IOC_FIEMAP` of `<linux/fs.h>`: `_IOWR('f', 11, struct fiemap)`, of which the header alone counts.
const FIEMAP: rustix::ioctl::Opcode = 0xc020_660b;

/// The extent is the file's last one.
const LAST: u32 = 0x1;
/// Other files have the extent too: a write to it goes to new space.
const SHARED: u32 = 0x2000;

/// Extents that are asked for at once.
const EXTENTS: usize = 64;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

/// `struct fiemap`, with room for extents.
#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    capacity: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

const _: () = assert!(size_of::<Extent>() == 56 && size_of::<Request>() == 32 + EXTENTS * 56);

/// Bytes of `len` at `offset` that have no space of the file's own; `None` where the filesystem cannot tell.
///
/// # Errors
/// Those of the host.
pub fn missing(file: &File, offset: u64, len: u64) -> Result<Option<u64>, Errno> {
    let end = offset.saturating_add(len);
    let (mut at, mut missing) = (offset, 0);
    while at < end {
        let mut request = Request {
            start: at,
            length: end - at,
            flags: 0,
            mapped: 0,
            capacity: u32::try_from(EXTENTS).expect("a small number"),
            reserved: 0,
            extents: [Extent::default(); EXTENTS],
        };
        // SAFETY: the request is the structure that this ioctl reads and writes, followed by as many extents as
        // `capacity` says, all of plain numbers, and it is borrowed for the time of the call.
        let called = unsafe {
            rustix::ioctl::ioctl(file, rustix::ioctl::Updater::<FIEMAP, Request>::new(&mut request))
        };
        match called {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOTTY) => return Ok(None),
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
        }
        let mapped = usize::try_from(request.mapped).unwrap_or(EXTENTS).min(EXTENTS);
        let mut more = mapped == EXTENTS;
        for extent in &request.extents[..mapped] {
            let (from, to) = (extent.logical.clamp(at, end), extent.logical.saturating_add(extent.length));
            missing += from - at;
            at = to.clamp(from, end);
            if extent.flags & SHARED != 0 {
                missing += at - from;
            }
            more &= extent.flags & LAST == 0;
        }
        if !more {
            return Ok(Some(missing + (end - at)));
        }
    }
    Ok(Some(missing))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{FallocateFlags, fallocate};

    use super::*;

    const KIB: u64 = 1 << 10;

    #[test]
    fn holes_are_missing_and_reserved_or_unwritten_back_space_is_not() {
        let file = tempfile::tempfile().unwrap();
        let Some(all) = missing(&file, 0, 64 * KIB).unwrap() else { return };
        assert_eq!(all, 64 * KIB);
        file.set_len(1 << 30).unwrap();
        assert_eq!(missing(&file, 4 * KIB, 1 << 20).unwrap(), Some(1 << 20));
        fallocate(&file, FallocateFlags::KEEP_SIZE, 64 * KIB, 64 * KIB).unwrap();
        file.write_all_at(&[1; 8192], 16 * KIB).unwrap();
        assert_eq!(missing(&file, 0, 256 * KIB).unwrap(), Some((256 - 64 - 8) * KIB));
        assert_eq!(missing(&file, 16 * KIB, 8 * KIB).unwrap(), Some(0));
        assert_eq!(missing(&file, 100 * KIB, 28 * KIB).unwrap(), Some(0));
        assert_eq!(missing(&file, 0, 0).unwrap(), Some(0));
    }

    #[test]
    fn more_extents_than_fit_one_request_are_counted() {
        let file = tempfile::tempfile().unwrap();
        for extent in 0..200 {
            file.write_all_at(&[1; 4096], extent * 8 * KIB).unwrap();
        }
        let Some(found) = missing(&file, 0, 200 * 8 * KIB).unwrap() else { return };
        assert_eq!(found, 200 * 4 * KIB);
    }
}
