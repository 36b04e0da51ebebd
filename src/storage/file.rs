//! A file of the host as [`Storage`].

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::Storage;
use crate::error::{Context, Error, ErrorKind, Result};

/// A regular file (or, for what only reads, a block device) of the host. Its position is never used, so threads may
/// share it.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    name: String,
}

impl FileStorage {
    /// Takes `file`; `name` is what error messages call it.
    pub fn new(file: File, name: impl Into<String>) -> Self {
        Self { file, name: name.into() }
    }

    /// The file itself, for what only the host's files have: owner, times, locks.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn fallocate(&self, what: &str, flags: FallocateFlags, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, len))
            .context(|| format!("{what} {len} bytes at {offset} of {}", self.name))
    }
}

impl Storage for FileStorage {
    fn size(&self) -> Result<u64> {
        let end = self.file.metadata().context(|| format!("stat {}", self.name))?;
        Ok(end.len())
    }

    fn allocated(&self) -> Result<u64> {
        let metadata = self.file.metadata().context(|| format!("stat {}", self.name))?;
        Ok(metadata.blocks() * 512)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let message = format!("read {} bytes at {offset} of {}", buf.len(), self.name);
                    return Err(Error::io(message, error));
                }
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.file
            .write_all_at(buf, offset)
            .context(|| format!("write {} bytes at {offset} of {}", buf.len(), self.name))
    }

    fn write_durable_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let message = || format!("write {} bytes through at {offset} of {}", buf.len(), self.name);
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            match rustix::io::pwritev2(&self.file, &[IoSlice::new(&buf[done..])], at, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(Error::new(ErrorKind::Io, message() + ": the host wrote nothing")),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::io(message(), errno.into())),
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        // EINTR is not retried: after a sync that did not end well nothing is known about what is on the disk.
        rustix::fs::fdatasync(&self.file).context(|| format!("sync {}", self.name))
    }

    fn drop_cache(&self) -> Result<()> {
        rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed)
            .context(|| format!("drop the cache of {}", self.name))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len).context(|| format!("set the size of {} to {len} bytes", self.name))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.fallocate("reserve", FallocateFlags::KEEP_SIZE, offset, len)
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.fallocate("punch", FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(Error::io(format!("seek data from {offset} in {}", self.name), errno.into())),
        }
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(found) => Ok(found),
            Err(Errno::NXIO) => Ok(offset),
            Err(errno) => Err(Error::io(format!("seek a hole from {offset} in {}", self.name), errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage() -> FileStorage {
        FileStorage::new(tempfile::tempfile().expect("a temporary file"), "test file")
    }

    #[test]
    fn reads_past_the_end_are_zeroes() {
        let storage = storage();
        storage.write_at(0, b"abc").expect("write");
        let mut buf = [7; 6];
        storage.read_at(1, &mut buf).expect("read");
        assert_eq!(&buf, b"bc\0\0\0\0");
        storage.read_at(1 << 40, &mut buf).expect("read far past the end");
        assert_eq!(buf, [0; 6]);
    }

    #[test]
    fn punching_gives_space_back_and_leaves_zeroes() {
        let storage = storage();
        storage.write_durable_at(0, &[1; 65536]).expect("write");
        let before = storage.allocated().expect("stat");
        storage.punch(4096, 32768).expect("punch");
        assert!(storage.allocated().expect("stat") < before);
        assert_eq!(storage.size().expect("stat"), 65536);
        let mut buf = [7; 2];
        storage.read_at(4095, &mut buf).expect("read");
        assert_eq!(buf, [1, 0]);
    }

    #[test]
    fn holes_and_data_are_found() {
        let storage = storage();
        storage.set_len(1 << 20).expect("grow");
        storage.write_at(512 << 10, &[1; 4096]).expect("write");
        assert_eq!(storage.next_data(0).expect("seek"), Some(512 << 10));
        assert_eq!(storage.next_hole(512 << 10).expect("seek"), (512 << 10) + 4096);
        assert_eq!(storage.next_data(1 << 20).expect("seek"), None);
        assert_eq!(storage.next_hole(1 << 20).expect("seek"), 1 << 20);
    }
}
