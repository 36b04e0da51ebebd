//! What outlives the process that serves: which files are open, under which numbers, and what a transport has agreed on
//! with the kernel.
//!
//! The ledger is anonymous memory (a memfd) that the processes of a daemon hand to each other as a descriptor. Nobody else
//! can change or remove it, and it is gone exactly when the last of them is, so it is never stale. Its size is sealed. It
//! is read and written by system calls and never mapped, and what is read is not trusted.
//!
//! | at byte | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `COWLEDGE` |
//! | 8 | 4 | version, 1 |
//! | 64 | 64 | the transport's own |
//! | 4,096 + 32 *i* | 32 | the slot *i* of open files: request (8), inode number (8), use (4), state (1), flags (1), zeroes |
//!
//! Numbers are little-endian. State: 0 never used, 1 open, 2 closed; flags: 1 for writing, 2 a directory. An entry is
//! written by one system call and lies within a page, so a killed writer leaves it as it was or as it was to be.
//!
//! An entry says "open" before the kernel is told the number, and "closed" only after the file was closed: a process that
//! dies in between leaves an entry of a file that nobody uses, never a file in use without an entry.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};

use crate::error::{Context, Error, ErrorKind, Result};

const MAGIC: [u8; 8] = *b"COWLEDGE";
const VERSION: u32 = 1;
const AGREED_AT: u64 = 64;
const ENTRIES_AT: u64 = 4096;
const ENTRY_BYTES: usize = 32;
const PAGE_BYTES: usize = 4096;

/// Bytes that a transport keeps here.
pub const AGREED_BYTES: usize = 64;

/// Files that can be open at once.
pub const SLOTS: u32 = 1 << 20;

const BYTES: u64 = ENTRIES_AT + SLOTS as u64 * ENTRY_BYTES as u64;

/// Its size stays, and nobody may change that.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// What is known of an open file without having it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its inode number.
    pub ino: u64,
    /// Opened for writing.
    pub write: bool,
    /// A directory.
    pub directory: bool,
}

/// The slot of an open file, or of one that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which of the slot's successive users this is, at least 1.
    pub count: u32,
    /// The file, if it is open.
    pub kept: Option<Kept>,
    /// Number of the request that opened it; 0 if it has none.
    pub request: u64,
}

const OPEN: u8 = 1;
const CLOSED: u8 = 2;
const FLAG_WRITE: u8 = 1;
const FLAG_DIRECTORY: u8 = 2;

impl Entry {
    fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[16..20].copy_from_slice(&self.count.to_le_bytes());
        match self.kept {
            None => bytes[20] = CLOSED,
            Some(Kept { ino, write, directory }) => {
                bytes[..8].copy_from_slice(&self.request.to_le_bytes());
                bytes[8..16].copy_from_slice(&ino.to_le_bytes());
                bytes[20] = OPEN;
                bytes[21] = u8::from(write) * FLAG_WRITE + u8::from(directory) * FLAG_DIRECTORY;
            }
        }
        bytes
    }

    /// `None` for a slot that was never used.
    fn decode(bytes: &[u8; ENTRY_BYTES]) -> Result<Option<Self>> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let count = u32::from_le_bytes(bytes[16..20].try_into().expect("4 bytes"));
        let (state, flags) = (bytes[20], bytes[21]);
        if *bytes == [0; ENTRY_BYTES] {
            return Ok(None);
        }
        if count == 0 || flags > FLAG_WRITE + FLAG_DIRECTORY || bytes[22..] != [0; 10] {
            return Err(Error::new(ErrorKind::Corrupt, "an entry of open files holds what none does"));
        }
        let kept =
            Kept { ino: word(8), write: flags & FLAG_WRITE != 0, directory: flags & FLAG_DIRECTORY != 0 };
        match state {
            OPEN => Ok(Some(Self { count, kept: Some(kept), request: word(0) })),
            CLOSED if flags == 0 => Ok(Some(Self { count, kept: None, request: 0 })),
            _ => Err(Error::new(ErrorKind::Corrupt, format!("an entry of open files has the state {state}"))),
        }
    }
}

/// The memory of open files.
#[derive(Debug)]
pub struct Ledger {
    file: File,
}

impl Ledger {
    /// An empty one.
    ///
    /// # Errors
    /// Those of the host.
    pub fn create() -> Result<Self> {
        let what = || "make a ledger of open files";
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("cowdisk-ledger", flags).context(what)?);
        file.set_len(BYTES).context(what)?;
        rustix::fs::fcntl_add_seals(&file, SEALS).context(what)?;
        file.write_all_at(&MAGIC, 0).context(what)?;
        file.write_all_at(&VERSION.to_le_bytes(), 8).context(what)?;
        Ok(Self { file })
    }

    /// The one that another process has made.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it is another version's; [`ErrorKind::Corrupt`] if it is none.
    pub fn adopt(descriptor: OwnedFd) -> Result<Self> {
        let what = || "take up the ledger of open files";
        let file = File::from(descriptor);
        let mut head = [0; 12];
        file.read_exact_at(&mut head, 0).context(what)?;
        let len = file.metadata().context(what)?.len();
        let sealed = rustix::fs::fcntl_get_seals(&file).context(what)?.contains(SEALS);
        if head[..8] != MAGIC || !sealed {
            return Err(Error::new(ErrorKind::Corrupt, "that is no ledger of open files"));
        }
        let version = u32::from_le_bytes(head[8..].try_into().expect("4 bytes"));
        if version != VERSION || len != BYTES {
            let message = format!("the ledger of open files has version {version}, not {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(Self { file })
    }

    /// Its descriptor, to be handed on.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Keeps what a transport has agreed on with the kernel.
    ///
    /// # Errors
    /// Those of the host.
    pub fn set_agreed(&self, bytes: &[u8; AGREED_BYTES]) -> Result<()> {
        self.file.write_all_at(bytes, AGREED_AT).context(|| "write the ledger of open files")
    }

    /// What [`Ledger::set_agreed`] has kept; zeroes before.
    ///
    /// # Errors
    /// Those of the host.
    pub fn agreed(&self) -> Result<[u8; AGREED_BYTES]> {
        let mut bytes = [0; AGREED_BYTES];
        self.file.read_exact_at(&mut bytes, AGREED_AT).context(|| "read the ledger of open files")?;
        Ok(bytes)
    }

    /// Writes the entry of a slot below the limit of slots.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if there is no memory for it.
    pub fn write(&self, slot: u32, entry: &Entry) -> Result<()> {
        let at = ENTRIES_AT + u64::from(slot) * ENTRY_BYTES as u64;
        self.file.write_all_at(&entry.encode(), at).context(|| "write the ledger of open files")
    }

    /// Every slot that was ever used, in order. What holds no entry is logged and left out.
    ///
    /// # Errors
    /// Those of the host.
    pub fn entries(&self) -> Result<Vec<(u32, Entry)>> {
        let what = || "read the ledger of open files";
        let mut found = Vec::new();
        let mut at = ENTRIES_AT;
        while at < BYTES {
            at = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) if data < BYTES => data / PAGE_BYTES as u64 * PAGE_BYTES as u64,
                Ok(_) | Err(rustix::io::Errno::NXIO) => break,
                Err(errno) => return Err(errno).context(what),
            };
            let mut page = [0; PAGE_BYTES];
            self.file.read_exact_at(&mut page, at).context(what)?;
            let first = (at - ENTRIES_AT) / ENTRY_BYTES as u64;
            for (slot, bytes) in (first..).zip(page.chunks_exact(ENTRY_BYTES)) {
                let slot = u32::try_from(slot).expect("the ledger holds few enough");
                match Entry::decode(bytes.try_into().expect("32 bytes")) {
                    Ok(Some(entry)) => found.push((slot, entry)),
                    Ok(None) => {}
                    Err(error) => log::error!("ledger of open files, slot {slot}: {error}"),
                }
            }
            at += PAGE_BYTES as u64;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(ino: u64) -> Entry {
        Entry { count: 3, kept: Some(Kept { ino, write: true, directory: false }), request: 9 }
    }

    #[test]
    fn entries_come_back_as_they_were_written_wherever_they_lie() {
        let ledger = Ledger::create().unwrap();
        assert!(ledger.entries().unwrap().is_empty());
        let closed = Entry { count: 7, kept: None, request: 0 };
        let written = [(0, open(5)), (127, closed), (128, open(u64::MAX)), (SLOTS - 1, open(1))];
        for (slot, entry) in &written {
            ledger.write(*slot, entry).unwrap();
        }
        ledger.set_agreed(&[4; AGREED_BYTES]).unwrap();
        let other = Ledger::adopt(ledger.descriptor().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(other.entries().unwrap(), written);
        assert_eq!(other.agreed().unwrap(), [4; AGREED_BYTES]);
    }

    #[test]
    fn every_bit_flip_of_an_entry_is_another_entry_or_left_out() {
        let bytes = open(5).encode();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            match Entry::decode(&flipped) {
                Ok(entry) => assert_ne!(entry, Some(open(5)), "bit {bit}"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt),
            }
        }
    }

    #[test]
    fn a_file_that_is_no_ledger_of_this_version_is_refused() {
        let refused = |file: File| Ledger::adopt(file.into()).unwrap_err().kind();
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(BYTES).unwrap();
        assert_ne!(refused(plain), ErrorKind::Unsupported);
        let ledger = Ledger::create().unwrap();
        assert!(ledger.file.set_len(BYTES - 1).is_err() && ledger.file.set_len(BYTES + 1).is_err(), "sealed");
        ledger.file.write_all_at(&2u32.to_le_bytes(), 8).unwrap();
        assert_eq!(refused(ledger.file.try_clone().unwrap()), ErrorKind::Unsupported);
        ledger.file.write_all_at(b"X", 0).unwrap();
        assert_eq!(refused(ledger.file), ErrorKind::Corrupt);
    }
}
