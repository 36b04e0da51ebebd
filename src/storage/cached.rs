//! Reading what the host has in memory already, without waiting for its disk.

use std::fs::File;
use std::io::IoSliceMut;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::io::{Errno, ReadWriteFlags};

/// What a read without waiting came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// All of it is in the buffer.
    All,
    /// Some of it is not in memory, or an ordinary read has to tell what is wrong.
    NotAll,
    /// The file system keeps everything in memory: an ordinary read does not wait.
    ReadIt,
}

/// How the file system of a file reads without waiting: learnt by trying.
#[derive(Debug, Default)]
pub struct CachedReads {
    /// [`TRIED`] or one of those after it. Nothing else depends on it.
    how: AtomicU8,
}

/// It may: `RWF_NOWAIT` tells each time.
const TRIED: u8 = 0;
/// The file system cannot tell, and has everything in memory.
const ALWAYS: u8 = 1;
/// The file system cannot tell.
const NEVER: u8 = 2;

impl CachedReads {
    /// Fills `buf` with what lies at `offset` if that needs no waiting. After [`Found::NotAll`] the host may have begun to
    /// fetch what is missing.
    pub fn read(&self, file: &File, offset: u64, buf: &mut [u8]) -> Found {
        match self.how.load(Ordering::Relaxed) {
            TRIED => {}
            ALWAYS => return Found::ReadIt,
            _ => return Found::NotAll,
        }
        let wanted = buf.len();
        match rustix::io::preadv2(file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
            Ok(count) if count == wanted => Found::All,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let (how, found) =
                    if is_in_memory(file) { (ALWAYS, Found::ReadIt) } else { (NEVER, Found::NotAll) };
                self.how.store(how, Ordering::Relaxed);
                found
            }
            _ => Found::NotAll,
        }
    }
}

/// Whether a file lies in a file system that is nothing but memory.
pub fn is_in_memory(file: &File) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    rustix::fs::fstatfs(file).is_ok_and(|stat| matches!(u64::try_from(stat.f_type), Ok(TMPFS | RAMFS)))
}

/// Whether a file lies in a file system of which a request under way keeps the locks of its open file, and of which buffered
/// reads need no thread while the disk reads: not on a network.
pub fn is_on_local_disk(file: &File) -> bool {
    const EXT4: u64 = 0xef53;
    const XFS: u64 = 0x5846_5342;
    const BTRFS: u64 = 0x9123_683e;
    rustix::fs::fstatfs(file).is_ok_and(|stat| matches!(u64::try_from(stat.f_type), Ok(EXT4 | XFS | BTRFS)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_was_just_written_is_read_and_what_is_not_there_is_left_to_an_ordinary_read() {
        for folder in ["/dev/shm", "/var/tmp"] {
            let file = tempfile::tempfile_in(folder).unwrap();
            file.write_all_at(&[7; 8192], 0).unwrap();
            let reads = CachedReads::default();
            let mut buf = [0; 4096];
            match reads.read(&file, 4096, &mut buf) {
                Found::All => assert_eq!(buf, [7; 4096]),
                Found::ReadIt => assert!(is_in_memory(&file), "{folder}"),
                Found::NotAll => assert_eq!(reads.how.load(Ordering::Relaxed), NEVER, "{folder}"),
            }
            assert_ne!(reads.read(&file, 6000, &mut buf), Found::All, "it ends within");
        }
    }
}
