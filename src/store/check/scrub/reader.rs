//! Reads files once, from the disk and not from the host's cache, at a bounded rate.
//!
//! With O_DIRECT, what comes is what the disk holds, whatever the cache has of it, and the cache neither grows nor loses
//! pages that guests are using. Where the host's file system has no O_DIRECT, the cache is read through as by everybody
//! else, and what it took in stays there: dropping it would drop the pages of guests as well.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::super::super::copy::{next_data, next_hole};
use super::super::super::progress::Work;
use super::pace::Pace;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{IoPriority, Urgency};

/// Offset, length and memory of a direct read are multiples of this: enough for every disk.
const ALIGN: usize = 4096;
/// Most bytes that are read at once.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// Who else uses a file while it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Nobody writes to it: it is read in large pieces, when the disk is idle.
    ReadOnly,
    /// A disk's file. The host's file systems keep writers out of a file that is being read directly, so it is read in
    /// small pieces, and never at idle priority: a guest's write would wait for a read that waits for an idle disk.
    Written,
}

impl Sharing {
    fn piece_bytes(self) -> usize {
        match self {
            Self::ReadOnly => PIECE_BYTES_MAX,
            Self::Written => 128 << 10,
        }
    }

    fn urgency(self) -> Urgency {
        match self {
            Self::ReadOnly => Urgency::Idle,
            Self::Written => Urgency::Low,
        }
    }
}

/// A part of a file, in order.
pub(super) enum Piece<'a> {
    Data(&'a [u8]),
    /// Bytes of a hole, which is not read.
    Hole(u64),
    /// Bytes from an offset on that cannot be read, and why.
    Bad {
        offset: u64,
        len: u64,
        error: Error,
    },
}

/// Reads one file after the other.
pub(super) struct Reader<'a> {
    work: &'a Work<'a>,
    pace: Pace,
    buffer: Vec<u8>,
    /// Where the aligned part of the buffer begins.
    start: usize,
    /// Bytes read from disks so far.
    pub(super) bytes_read: u64,
    /// Files that had to be read through the host's cache.
    pub(super) through_cache: u64,
    /// Whether the kernel refused a lower priority.
    pub(super) usual_priority: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn new(pace: Pace, work: &'a Work<'a>) -> Self {
        let buffer = vec![0; PIECE_BYTES_MAX + ALIGN];
        let start = buffer.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { work, pace, buffer, start, bytes_read: 0, through_cache: 0, usual_priority: false }
    }

    /// Counts bytes that somebody else has read for the scrub.
    pub(super) fn count(&mut self, bytes: u64) -> Result<()> {
        self.bytes_read += bytes;
        self.work.advance(bytes);
        self.pace.keep(bytes, self.work)
    }

    /// What the reading is part of.
    pub(super) fn work(&self) -> &'a Work<'a> {
        self.work
    }

    /// Fails with [`ErrorKind::Interrupted`] if the user has cancelled.
    pub(super) fn check(&self) -> Result<()> {
        self.work.check()
    }

    /// Hands all of `file`, a descriptor of the caller's alone, to `sink`, up to its end or to byte `len`.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`]; those of `sink`; [`ErrorKind::Invalid`] if the file ends before `len`.
    pub(super) fn read(
        &mut self,
        file: &File,
        len: u64,
        sharing: Sharing,
        mut sink: impl FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        let priority = IoPriority::lowered(sharing.urgency());
        self.usual_priority |= !priority.is_set();
        let mut direct = set_direct(file, true);
        let mut position = 0;
        while position < len {
            let data = align_down(next_data(file, position, len)?).max(position);
            if data > position {
                sink(Piece::Hole(data - position))?;
            }
            let end = if data < len { align_up(next_hole(file, data, len)?).min(len) } else { len };
            position = data;
            while position < end {
                let wanted = usize::try_from(end - position).unwrap_or(usize::MAX).min(sharing.piece_bytes());
                let done = match self.read_piece(file, position, wanted) {
                    Err(error) if direct && refuses_direct(&error) => {
                        direct = false;
                        set_direct(file, false);
                        continue;
                    }
                    Err(error) => {
                        let error = Error::io("read it", error);
                        sink(Piece::Bad { offset: position, len: wanted as u64, error })?;
                        wanted
                    }
                    Ok(0) => {
                        return Err(Error::new(ErrorKind::Invalid, "it became shorter while it was read"));
                    }
                    Ok(done) => {
                        sink(Piece::Data(&self.buffer[self.start..][..done]))?;
                        done
                    }
                };
                self.count(done as u64)?;
                position += done as u64;
            }
        }
        self.through_cache += u64::from(!direct);
        // What lies past the end of a file looks like a hole.
        match file.metadata().context(|| "look it up")?.len() < len {
            true => Err(Error::new(ErrorKind::Invalid, "it became shorter while it was read")),
            false => Ok(()),
        }
    }

    /// Reads up to `wanted` bytes into the aligned part of the buffer.
    fn read_piece(&mut self, file: &File, offset: u64, wanted: usize) -> io::Result<usize> {
        let room = wanted.next_multiple_of(ALIGN).min(PIECE_BYTES_MAX);
        loop {
            match file.read_at(&mut self.buffer[self.start..][..room], offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(|done| done.min(wanted)),
            }
        }
    }
}

/// Switches O_DIRECT on or off. Answers whether it is on now.
fn set_direct(file: &File, on: bool) -> bool {
    let Ok(flags) = rustix::fs::fcntl_getfl(file.as_fd()) else { return false };
    let wanted = if on { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT };
    rustix::fs::fcntl_setfl(file.as_fd(), wanted).is_ok() && on
}

/// A file system that has no O_DIRECT may say so at the first read only.
fn refuses_direct(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::OPNOTSUPP))
}

fn align_down(offset: u64) -> u64 {
    offset - offset % ALIGN as u64
}

fn align_up(offset: u64) -> u64 {
    offset.next_multiple_of(ALIGN as u64)
}

#[cfg(test)]
mod tests {
    use super::super::super::super::progress::NoProgress;
    use super::*;

    fn contents(file: &File, len: u64, sharing: Sharing) -> Result<Vec<u8>> {
        let work = Work::begin(&NoProgress, "read", None);
        let mut bytes = Vec::new();
        Reader::new(Pace::new(None), &work).read(file, len, sharing, |piece| {
            match piece {
                Piece::Data(data) => bytes.extend_from_slice(data),
                Piece::Hole(len) => bytes.resize(bytes.len() + usize::try_from(len).unwrap(), 0),
                Piece::Bad { error, .. } => return Err(error),
            }
            Ok(())
        })?;
        Ok(bytes)
    }

    #[test]
    fn data_and_holes_come_in_order_and_whole() {
        let mut expected = vec![0; (5 << 20) + 1777];
        for (at, byte) in expected[(1 << 20) + 512..3 << 20].iter_mut().enumerate() {
            *byte = u8::try_from(at % 251).unwrap();
        }
        expected[(5 << 20) + 1000..].fill(7);
        for folder in [std::env::temp_dir(), "/dev/shm".into()] {
            let file = tempfile::tempfile_in(folder).unwrap();
            file.set_len(expected.len() as u64).unwrap();
            file.write_all_at(&expected[1 << 20..3 << 20], 1 << 20).unwrap();
            file.write_all_at(&expected[5 << 20..], 5 << 20).unwrap();
            for sharing in [Sharing::ReadOnly, Sharing::Written] {
                let found = contents(&file, expected.len() as u64, sharing).unwrap();
                assert!(found == expected, "{sharing:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_and_passed_over() {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().write_all_at(&[1; 300_000], 0).unwrap();
        // Every read of a file that is open for writing only fails.
        let file = File::options().write(true).open(named.path()).unwrap();
        let work = Work::begin(&NoProgress, "read", None);
        let mut bad = Vec::new();
        let read = Reader::new(Pace::new(None), &work).read(&file, 300_000, Sharing::Written, |piece| {
            if let Piece::Bad { offset, len, .. } = piece {
                bad.push((offset, len));
            }
            Ok(())
        });
        read.unwrap();
        assert_eq!(bad, [(0, 131_072), (131_072, 131_072), (262_144, 37_856)]);
    }

    #[test]
    fn a_file_that_has_been_cut_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 100_000], 0).unwrap();
        let error = contents(&file, 200_000, Sharing::ReadOnly).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
