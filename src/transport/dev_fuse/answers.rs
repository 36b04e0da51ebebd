//! Our plain types as the kernel's structures.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use zerocopy::IntoBytes;

use super::wire::{Attr, AttrOut, Dirent, EntryOut, SetattrIn, StatfsOut, attribute};
use crate::fs::{AttributeChanges, Attributes, FileKind, SetTime, Statistics};

/// Answer to LOOKUP. Inode numbers are never used again, so there is one generation.
pub fn entry(attributes: &Attributes) -> EntryOut {
    let trusted = attributes.trusted_for();
    EntryOut {
        nodeid: attributes.ino,
        generation: 0,
        entry_valid: trusted.as_secs(),
        attr_valid: trusted.as_secs(),
        entry_valid_nsec: trusted.subsec_nanos(),
        attr_valid_nsec: trusted.subsec_nanos(),
        attr: attr(attributes),
    }
}

/// Answer to GETATTR and SETATTR.
pub fn attributes(attributes: &Attributes) -> AttrOut {
    let trusted = attributes.trusted_for();
    AttrOut {
        attr_valid: trusted.as_secs(),
        attr_valid_nsec: trusted.subsec_nanos(),
        dummy: 0,
        attr: attr(attributes),
    }
}

fn attr(attributes: &Attributes) -> Attr {
    let ((atime, atimensec), (mtime, mtimensec), (ctime, ctimensec)) =
        (stamp(attributes.atime), stamp(attributes.mtime), stamp(attributes.ctime));
    Attr {
        ino: attributes.ino,
        size: attributes.size,
        blocks: attributes.allocated.div_ceil(512),
        atime,
        mtime,
        ctime,
        atimensec,
        mtimensec,
        ctimensec,
        mode: kind_bits(attributes.kind) | attributes.mode,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// `S_IFDIR` and its like.
fn kind_bits(kind: FileKind) -> u32 {
    match kind {
        FileKind::Directory => libc::S_IFDIR,
        FileKind::Regular => libc::S_IFREG,
        FileKind::Symlink => libc::S_IFLNK,
    }
}

/// Seconds since 1970 as the kernel's structures have them (negative ones as two's complement), and nanoseconds.
fn stamp(time: SystemTime) -> (u64, u32) {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => (since.as_secs(), since.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            match before.subsec_nanos() {
                0 => (before.as_secs().wrapping_neg(), 0),
                nanos => ((before.as_secs() + 1).wrapping_neg(), 1_000_000_000 - nanos),
            }
        }
    }
}

fn time(seconds: u64, nanoseconds: u32) -> Option<SystemTime> {
    let nanoseconds = Duration::from_nanos(nanoseconds.min(999_999_999).into());
    let signed = seconds.cast_signed();
    let whole = match signed {
        0.. => UNIX_EPOCH.checked_add(Duration::from_secs(seconds)),
        _ => UNIX_EPOCH.checked_sub(Duration::from_secs(signed.unsigned_abs())),
    };
    whole?.checked_add(nanoseconds)
}

/// What SETATTR asks for; `None` if a time is one that no clock can show.
pub fn changes(wanted: &SetattrIn) -> Option<AttributeChanges> {
    let has = |bit| wanted.valid & bit != 0;
    let when = |bit, now, seconds, nanoseconds| -> Option<Option<SetTime>> {
        match (has(now), has(bit)) {
            (true, _) => Some(Some(SetTime::Now)),
            (false, true) => time(seconds, nanoseconds).map(|time| Some(SetTime::To(time))),
            (false, false) => Some(None),
        }
    };
    Some(AttributeChanges {
        mode: has(attribute::MODE).then_some(wanted.mode),
        uid: has(attribute::UID).then_some(wanted.uid),
        gid: has(attribute::GID).then_some(wanted.gid),
        size: has(attribute::SIZE).then_some(wanted.size),
        atime: when(attribute::ATIME, attribute::ATIME_NOW, wanted.atime, wanted.atimensec)?,
        mtime: when(attribute::MTIME, attribute::MTIME_NOW, wanted.mtime, wanted.mtimensec)?,
    })
}

/// Answer to STATFS.
pub fn statistics(found: &Statistics) -> StatfsOut {
    StatfsOut {
        blocks: found.blocks,
        bfree: found.blocks_free,
        bavail: found.blocks_available,
        files: found.files,
        ffree: found.files_free,
        bsize: found.block_bytes,
        namelen: found.name_bytes_max,
        frsize: found.block_bytes,
        ..StatfsOut::default()
    }
}

/// Names for the answer to READDIR or READDIRPLUS, as many as fit what the kernel has room for.
#[derive(Debug)]
pub struct Names {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl Names {
    /// No names yet, and room for `bytes_max` bytes.
    pub fn new(bytes_max: u32) -> Self {
        Self { bytes: Vec::new(), bytes_max: usize::try_from(bytes_max).unwrap_or(usize::MAX) }
    }

    /// Adds a name after `head` (nothing for READDIR, an [`EntryOut`] for READDIRPLUS); says whether it did *not* fit.
    pub fn add(&mut self, head: &[u8], ino: u64, kind: FileKind, name: &str, next: u64) -> bool {
        let Ok(namelen) = u32::try_from(name.len()) else { return true };
        let dirent = Dirent { ino, off: next, namelen, kind: kind_bits(kind) >> 12 };
        let len = head.len() + size_of::<Dirent>() + name.len();
        let padded = len.next_multiple_of(8);
        if self.bytes.len() + padded > self.bytes_max {
            return true;
        }
        for part in [head, dirent.as_bytes(), name.as_bytes(), &[0; 8][..padded - len]] {
            self.bytes.extend_from_slice(part);
        }
        false
    }

    /// What to answer.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_survive_the_way_to_the_kernel_and_back() {
        for (seconds, nanoseconds) in
            [(0, 0), (1, 5), (u64::MAX, 0), (u64::MAX, 999_999_999), (u64::MAX - 3, 7), (1 << 63, 0)]
        {
            let found = time(seconds, nanoseconds).unwrap();
            assert_eq!(stamp(found), (seconds, nanoseconds));
        }
    }

    #[test]
    fn names_are_padded_and_stop_where_the_kernel_has_no_room() {
        let mut names = Names::new(64);
        assert!(!names.add(&[], 7, FileKind::Regular, "disk", 1));
        assert_eq!(names.bytes().len(), 32);
        assert_eq!(names.bytes()[24..], *b"disk\0\0\0\0");
        assert_eq!(names.bytes()[20], 8, "DT_REG");
        assert!(names.add(&[], 8, FileKind::Regular, "disk.local", 2), "34 bytes padded to 40 do not fit");
        assert!(!names.add(&[], 8, FileKind::Directory, "12345678", 2));
        assert_eq!(names.bytes().len(), 64);
    }
}
