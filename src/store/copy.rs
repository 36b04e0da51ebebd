//! Reading large files once: hashing them, copying them, keeping their holes.
//!
//! One thread reads ahead into a few buffers; the caller's thread hashes with all cores and writes meanwhile. A hole of
//! the source is not read, only hashed, from one buffer of zeroes; blocks of zeroes become holes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::progress::Work;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{FileStorage, Room, Storage};

/// Bytes that are read, hashed and written at once: enough for each core's share to be worth a task.
const CHUNK_BYTES: usize = 4 << 20;
/// Buffers between the reader and the rest.
const CHUNKS: usize = 4;
/// Runs of zeroes of this length, at this alignment, become holes: a block of the usual host filesystems.
const HOLE_BYTES: usize = 4096;

/// A part of a file, in order and without gaps.
enum Piece {
    Data { offset: u64, bytes: Vec<u8> },
    Hole { len: u64 },
}

/// Copies `source_len` bytes of `source` into `target`, an empty file, gives it `target_len` bytes (not fewer) and
/// returns their hash. What it writes takes from `room`.
pub(super) fn copy_and_hash(
    source: &File,
    source_len: u64,
    target: &FileStorage,
    target_len: u64,
    room: &Room,
    work: &Work<'_>,
) -> Result<[u8; 32]> {
    target.set_len(target_len)?;
    let mut hashing = Hashing::new();
    pump(source, source_len, work, |piece| {
        hashing.add(piece, work, |offset, bytes| write_without_zeroes(target, offset, bytes, room))
    })?;
    hashing.add_zeroes(target_len - source_len, work)?;
    Ok(hashing.finish())
}

/// Hashes `len` bytes of `file` and turns its runs of zeroes, and what is allocated but was never written, into holes.
pub(super) fn hash_and_punch(file: &FileStorage, len: u64, work: &Work<'_>) -> Result<[u8; 32]> {
    let mut hashing = Hashing::new();
    let mut position = 0;
    pump(file.file(), len, work, |piece| {
        if let Piece::Hole { len } = &piece {
            file.punch(position, *len)?;
            position += len;
        }
        hashing.add(piece, work, |offset, bytes| {
            position = offset + bytes.len() as u64;
            punch_zeroes(file, offset, bytes)
        })
    })?;
    Ok(hashing.finish())
}

/// Copies `len` bytes of `source` into `target`, an empty file. What it writes takes from `room`.
pub(super) fn copy(
    source: &File,
    len: u64,
    target: &FileStorage,
    room: &Room,
    work: &Work<'_>,
) -> Result<()> {
    target.set_len(len)?;
    pump(source, len, work, |piece| {
        match &piece {
            Piece::Data { offset, bytes } => write_without_zeroes(target, *offset, bytes, room)?,
            Piece::Hole { .. } => {}
        }
        work.advance(piece.len());
        Ok(piece.into_buffer())
    })
}

impl Piece {
    fn len(&self) -> u64 {
        match self {
            Self::Data { bytes, .. } => bytes.len() as u64,
            Self::Hole { len } => *len,
        }
    }

    fn into_buffer(self) -> Option<Vec<u8>> {
        match self {
            Self::Data { bytes, .. } => Some(bytes),
            Self::Hole { .. } => None,
        }
    }
}

struct Hashing {
    hasher: blake3::Hasher,
    /// Never written to, so the kernel backs all of it with one page of zeroes.
    zeroes: Vec<u8>,
}

impl Hashing {
    fn new() -> Self {
        Self { hasher: blake3::Hasher::new(), zeroes: vec![0; CHUNK_BYTES] }
    }

    /// Hashes a piece while `write` does what is to be done with data. Returns the piece's buffer.
    fn add(
        &mut self,
        piece: Piece,
        work: &Work<'_>,
        write: impl FnOnce(u64, &[u8]) -> Result<()> + Send,
    ) -> Result<Option<Vec<u8>>> {
        match &piece {
            Piece::Hole { len } => self.add_zeroes(*len, work)?,
            Piece::Data { offset, bytes } => {
                let hasher = &mut self.hasher;
                let hash = || {
                    hasher.update_rayon(bytes);
                };
                let (written, ()) = rayon::join(|| write(*offset, bytes), hash);
                written?;
                work.advance(piece.len());
            }
        }
        Ok(piece.into_buffer())
    }

    fn add_zeroes(&mut self, mut len: u64, work: &Work<'_>) -> Result<()> {
        while len > 0 {
            work.check()?;
            let part = usize::try_from(len).unwrap_or(usize::MAX).min(self.zeroes.len());
            self.hasher.update_rayon(&self.zeroes[..part]);
            work.advance(part as u64);
            len -= part as u64;
        }
        Ok(())
    }

    fn finish(self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }
}

/// Reads `len` bytes of `source` in order and hands them to `sink`, which gives the buffers back.
fn pump(
    source: &File,
    len: u64,
    work: &Work<'_>,
    mut sink: impl FnMut(Piece) -> Result<Option<Vec<u8>>>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let (give_piece, pieces) = sync_channel(CHUNKS);
        let (give_buffer, buffers) = channel();
        for _ in 0..CHUNKS {
            // The other end is still here.
            let _ = give_buffer.send(Vec::new());
        }
        scope.spawn(move || {
            if let Err(error) = read_ahead(source, len, &buffers, &give_piece) {
                let _ = give_piece.send(Err(error));
            }
        });
        // Whichever way this ends, both channels end with it, and so does the reader.
        for piece in pieces {
            work.check()?;
            if let Some(buffer) = sink(piece?)? {
                let _ = give_buffer.send(buffer);
            }
        }
        Ok(())
    })
}

/// The reading thread. It ends early, without an error, when nobody wants its pieces any more.
fn read_ahead(
    source: &File,
    len: u64,
    buffers: &Receiver<Vec<u8>>,
    pieces: &SyncSender<Result<Piece>>,
) -> Result<()> {
    let mut position = 0;
    while position < len {
        let data = next_data(source, position, len)?;
        if data > position && pieces.send(Ok(Piece::Hole { len: data - position })).is_err() {
            return Ok(());
        }
        let end = if data < len { next_hole(source, data, len)? } else { len };
        position = data;
        while position < end {
            let Ok(mut bytes) = buffers.recv() else { return Ok(()) };
            let part = usize::try_from(end - position).unwrap_or(usize::MAX).min(CHUNK_BYTES);
            bytes.resize(part, 0);
            source.read_exact_at(&mut bytes, position).map_err(read_error)?;
            if pieces.send(Ok(Piece::Data { offset: position, bytes })).is_err() {
                return Ok(());
            }
            position += part as u64;
        }
    }
    // What lies past the end of a file looks like a hole.
    let metadata = source.metadata().context(|| "look it up")?;
    if metadata.is_file() && metadata.len() < len {
        return Err(ended_early());
    }
    Ok(())
}

fn ended_early() -> Error {
    Error::new(ErrorKind::Invalid, "it became shorter while it was read")
}

fn read_error(error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => ended_early(),
        _ => Error::io("read it", error),
    }
}

/// The first byte from `position` on that is not in a hole, or `len`. A device has no holes.
pub(super) fn next_data(source: &File, position: u64, len: u64) -> Result<u64> {
    match rustix::fs::seek(source, SeekFrom::Data(position)) {
        Ok(data) => Ok(data.clamp(position, len)),
        Err(Errno::NXIO) => Ok(len),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(position),
        Err(errno) => Err(Error::io("look for data", errno.into())),
    }
}

/// The first byte after `position` that is in a hole, or `len`.
pub(super) fn next_hole(source: &File, position: u64, len: u64) -> Result<u64> {
    match rustix::fs::seek(source, SeekFrom::Hole(position)) {
        // A file that lost its data in this moment answers `position` itself; reading it as data is right too.
        Ok(hole) if hole > position => Ok(hole.min(len)),
        Ok(_) | Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NXIO) => Ok(len),
        Err(errno) => Err(Error::io("look for a hole", errno.into())),
    }
}

/// Calls `each` with the longest runs of whole zero blocks (`true`) and of anything else (`false`).
fn runs(offset: u64, bytes: &[u8], mut each: impl FnMut(bool, u64, &[u8]) -> Result<()>) -> Result<()> {
    const ZEROES: [u8; HOLE_BYTES] = [0; HOLE_BYTES];
    let lead = usize::try_from(offset.next_multiple_of(HOLE_BYTES as u64) - offset).unwrap_or(0);
    let is_zero_block = |at: usize| bytes.get(at..at + HOLE_BYTES) == Some(&ZEROES[..]);
    let mut start = 0;
    let mut in_zeroes = false;
    // What lies before the first and after the last block boundary counts as data.
    for at in (lead..bytes.len()).step_by(HOLE_BYTES) {
        let zero = is_zero_block(at);
        if zero != in_zeroes {
            if start < at {
                each(in_zeroes, offset + start as u64, &bytes[start..at])?;
            }
            (start, in_zeroes) = (at, zero);
        }
    }
    if start < bytes.len() {
        each(in_zeroes, offset + start as u64, &bytes[start..])?;
    }
    Ok(())
}

fn write_without_zeroes(target: &FileStorage, offset: u64, bytes: &[u8], room: &Room) -> Result<()> {
    runs(offset, bytes, |zero, at, run| {
        if zero {
            return Ok(());
        }
        let _taken = room.take(run.len() as u64).context(|| "write the copy")?;
        target.write_at(at, run)
    })
}

fn punch_zeroes(file: &FileStorage, offset: u64, bytes: &[u8]) -> Result<()> {
    runs(offset, bytes, |zero, at, run| match zero {
        true => file.punch(at, run.len() as u64),
        false => Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::progress::{NoProgress, Progress};
    use super::*;

    struct Counting {
        advanced: AtomicU64,
        cancel_at: u64,
    }

    impl Progress for Counting {
        fn begin(&self, _what: &str, _total_bytes: Option<u64>) {}
        fn advance(&self, bytes: u64) {
            self.advanced.fetch_add(bytes, Ordering::Relaxed);
        }
        fn finish(&self) {}
        fn cancelled(&self) -> bool {
            self.advanced.load(Ordering::Relaxed) >= self.cancel_at
        }
    }

    /// A file with data, zeroes written as data, holes, and an end at an odd place; its bytes.
    fn sample() -> (File, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 11 << 20];
        for (at, byte) in bytes[..5 << 20].iter_mut().enumerate() {
            *byte = u8::try_from(at % 251).unwrap();
        }
        bytes[1 << 20..3 << 20].fill(0);
        bytes[(9 << 20) + 100..(9 << 20) + 300].fill(0xee);
        bytes.truncate((10 << 20) + 777);
        file.set_len(bytes.len() as u64).unwrap();
        file.write_all_at(&bytes[..5 << 20], 0).unwrap();
        file.write_all_at(&bytes[9 << 20..(9 << 20) + 8192], 9 << 20).unwrap();
        (file, bytes)
    }

    fn empty() -> FileStorage {
        FileStorage::new(tempfile::tempfile().unwrap(), "copy")
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_copy_has_the_same_bytes_their_hash_and_only_their_data() {
        let (source, bytes) = sample();
        let target = empty();
        let total = bytes.len().next_multiple_of(512) as u64;
        let progress = Counting { advanced: AtomicU64::new(0), cancel_at: u64::MAX };
        let work = Work::begin(&progress, "copy", None);
        let hash =
            copy_and_hash(&source, bytes.len() as u64, &target, total, &Room::unlimited(), &work).unwrap();
        let mut padded = bytes.clone();
        padded.resize(usize::try_from(total).unwrap(), 0);
        assert_eq!(contents(target.file()), padded);
        assert_eq!(hash, *blake3::hash(&padded).as_bytes());
        assert_eq!(progress.advanced.load(Ordering::Relaxed), total);
        assert!(target.allocated().unwrap() <= (3 << 20) + (64 << 10), "zeroes became holes");
    }

    #[test]
    fn punching_in_place_changes_no_byte_and_frees_the_zeroes() {
        let (file, bytes) = sample();
        let before = file.metadata().unwrap().blocks();
        let work = Work::begin(&NoProgress, "hash", None);
        let storage = FileStorage::new(file.try_clone().unwrap(), "file");
        let hash = hash_and_punch(&storage, bytes.len() as u64, &work).unwrap();
        assert_eq!(hash, *blake3::hash(&bytes).as_bytes());
        assert_eq!(contents(&file), bytes);
        assert!(before - file.metadata().unwrap().blocks() >= (2 << 20) / 512);
    }

    #[test]
    fn a_plain_copy_is_equal_and_sparse() {
        let (source, bytes) = sample();
        let target = empty();
        let work = Work::begin(&NoProgress, "copy", None);
        copy(&source, bytes.len() as u64, &target, &Room::unlimited(), &work).unwrap();
        assert_eq!(contents(target.file()), bytes);
        assert!(target.allocated().unwrap() / 512 < source.metadata().unwrap().blocks());
    }

    #[test]
    fn cancelling_stops_at_once_even_in_a_hole() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        let progress = Counting { advanced: AtomicU64::new(0), cancel_at: 64 << 20 };
        let work = Work::begin(&progress, "hash", None);
        let (target, room) = (empty(), Room::unlimited());
        let copied = copy_and_hash(&file, 1 << 40, &target, 1 << 40, &room, &work);
        assert_eq!(copied.unwrap_err().kind(), ErrorKind::Interrupted);
    }

    #[test]
    fn a_source_that_ends_early_is_refused() {
        let (source, bytes) = sample();
        let work = Work::begin(&NoProgress, "hash", None);
        source.set_len(1000).unwrap();
        let target = empty();
        let (len, room) = (bytes.len() as u64, Room::unlimited());
        let copied = copy_and_hash(&source, len, &target, len, &room, &work);
        assert_eq!(copied.unwrap_err().kind(), ErrorKind::Invalid);
    }
}
