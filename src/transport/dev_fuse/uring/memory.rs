//! The memory of all entries of a connection: for each a head, which says what the request is, and a payload.
//!
//! While the kernel has an entry it may write to both at any time; while we have it, one [`Entry`](super::Entry) does.
//!
//! The kernel knows an entry by the addresses that it was registered with. So that another process can take it over, the
//! memory is a file without a name that the processes hand to each other, and each maps it at the same address. A process
//! that hands over leaves a [`Note`] for each entry.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::super::init::REQUEST_BYTES_MAX;
use super::super::wire::RingHead;
use crate::error::{Context, Error, ErrorKind, Result};

/// Bytes of a payload: the largest read or write. A multiple of the page size, so that every payload is aligned to a page.
pub const PAYLOAD_BYTES: usize = {
    assert!(REQUEST_BYTES_MAX <= 1 << 20 && REQUEST_BYTES_MAX.is_multiple_of(4096));
    REQUEST_BYTES_MAX as usize
};

/// Bytes from one head to the next, so that no two share a cache line. The note lies between.
const HEAD_STRIDE: usize = (size_of::<RingHead>() + size_of::<u32>()).next_multiple_of(64);

/// Bytes of an entry in the file, of which all payloads come first, then all heads.
const ENTRY_BYTES: usize = PAYLOAD_BYTES + HEAD_STRIDE;

/// Most entries: for a host of 1,024 processors.
pub const ENTRIES_MAX: usize = 4096;

/// Where every process maps the memory: far from where programs, heaps, libraries and stacks are put on x86-64 and AArch64.
const ADDRESS: usize = 64 << 30;

/// Its size stays, and nobody may change that.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// What a process that hands over says of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// The kernel does not know it, or will not once that process has ended.
    Unknown,
    /// It holds a request with which nobody has begun.
    Request,
    /// It holds an answer, which the kernel is to be given.
    Answer,
}

/// The file behind the memory of so many entries, at least 1. The host gives a page of it when it is first used.
///
/// # Errors
/// If the host refuses it.
pub fn create(entries: usize) -> Result<OwnedFd> {
    let what = || "get memory for rings";
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("cowdisk-rings", flags).context(what)?);
    let bytes = u64::try_from(entries * ENTRY_BYTES).expect("some GiB");
    file.set_len(bytes).context(what)?;
    rustix::fs::fcntl_add_seals(&file, SEALS).context(what)?;
    Ok(file.into())
}

/// Memory of some entries.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    entries: usize,
}

// SAFETY: it is plain memory that belongs to no thread; who may touch which part is up to those who use its pointers.
unsafe impl Send for Memory {}
// SAFETY: as above; `&self` gives pointers, numbers and atomics only.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps what [`create`] has made, here or in another process. To be done once in a process.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it is something else; if the address is taken, or the host refuses it.
    pub fn map(file: &OwnedFd) -> Result<Self> {
        Self::map_at(file.as_fd(), Some(ADDRESS))
    }

    fn map_at(file: BorrowedFd<'_>, address: Option<usize>) -> Result<Self> {
        let what = || "map the memory of rings";
        let strange = || Error::new(ErrorKind::Unsupported, format!("{}: it is something else", what()));
        let sealed = rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SEALS));
        let bytes = rustix::fs::fstat(file).context(what)?.st_size;
        let bytes = usize::try_from(bytes).map_err(|_| strange())?;
        let entries = bytes / ENTRY_BYTES;
        if !sealed || !bytes.is_multiple_of(ENTRY_BYTES) || !(1..=ENTRIES_MAX).contains(&entries) {
            return Err(strange());
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let (place, flags) = match address {
            Some(address) => (std::ptr::without_provenance_mut(address), MapFlags::FIXED_NOREPLACE),
            None => (std::ptr::null_mut(), MapFlags::empty()),
        };
        // SAFETY: a new mapping at a place that is free takes nobody's memory away. The size of the file is sealed, so that
        // each of its pages stays there.
        let start = unsafe { mmap(place, bytes, protection, MapFlags::SHARED | flags, file, 0) };
        let start = start.context(what)?.cast::<u8>();
        Ok(Self { start: NonNull::new(start).expect("the kernel places nothing at zero"), entries })
    }

    /// How many entries there are.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// The payload of an entry: [`PAYLOAD_BYTES`] bytes, aligned to a page.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn payload(&self, entry: usize) -> NonNull<u8> {
        assert!(entry < self.entries);
        // SAFETY: payload `entry` lies within the mapping.
        unsafe { self.start.add(entry * PAYLOAD_BYTES) }
    }

    /// The head of an entry.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn head(&self, entry: usize) -> NonNull<RingHead> {
        assert!(entry < self.entries);
        // SAFETY: the heads lie behind all payloads, and head `entry` within the mapping.
        let head = unsafe { self.start.add(self.entries * PAYLOAD_BYTES + entry * HEAD_STRIDE) };
        // The mapping is aligned to a page, payloads are whole pages and the stride is whole lines.
        head.cast()
    }

    /// What the last process that has handed over says of an entry: at first that the kernel does not know it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it says what we do not know.
    pub fn note(&self, entry: usize) -> Result<Note> {
        match self.note_place(entry).load(Ordering::Acquire) {
            0 => Ok(Note::Unknown),
            1 => Ok(Note::Request),
            2 => Ok(Note::Answer),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("entry {entry} of a ring: unknown note {other}"),
            )),
        }
    }

    /// Leaves a note for the next process.
    pub fn leave_note(&self, entry: usize, note: Note) {
        let number = match note {
            Note::Unknown => 0,
            Note::Request => 1,
            Note::Answer => 2,
        };
        self.note_place(entry).store(number, Ordering::Release);
    }

    fn note_place(&self, entry: usize) -> &AtomicU32 {
        let head = self.head(entry);
        // SAFETY: behind the head there is room for a note up to the next head, which is aligned as the head is; nobody reads
        // or writes it but by this.
        unsafe { AtomicU32::from_ptr(head.add(1).cast().as_ptr()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it is our own mapping, and nobody else has it any more: entries hold on to it, and the kernel lets go
        // of it with the ring.
        if let Err(errno) = unsafe { munmap(self.start.as_ptr().cast(), self.entries * ENTRY_BYTES) } {
            log::error!("give back the memory of rings: {errno}");
        }
    }
}

#[cfg(test)]
impl Memory {
    /// Memory of so many entries, anywhere.
    pub fn anywhere(entries: usize) -> Self {
        Self::map_at(create(entries).unwrap().as_fd(), None).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_memory_of_their_own_and_payloads_are_aligned() {
        let memory = Memory::anywhere(3);
        assert_eq!(memory.entries(), 3);
        let mut parts: Vec<(usize, usize)> = Vec::new();
        for entry in 0..3 {
            let (payload, head) = (memory.payload(entry).as_ptr(), memory.head(entry).as_ptr());
            assert_eq!(payload.align_offset(4096), 0);
            assert!(head.is_aligned());
            parts.push((payload.addr(), PAYLOAD_BYTES));
            parts.push((head.addr(), size_of::<RingHead>()));
            parts.push((memory.note_place(entry).as_ptr().addr(), size_of::<u32>()));
        }
        parts.sort_unstable();
        assert!(parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        let (last, len) = parts[parts.len() - 1];
        assert!(last + len <= memory.start.as_ptr().addr() + 3 * ENTRY_BYTES);
    }

    #[test]
    fn another_mapping_finds_what_was_left_in_the_first() {
        let file = create(2).unwrap();
        let first = Memory::map_at(file.as_fd(), None).unwrap();
        assert_eq!(first.note(1).unwrap(), Note::Unknown);
        first.leave_note(0, Note::Request);
        first.leave_note(1, Note::Answer);
        // SAFETY: nobody else uses that memory.
        unsafe { first.payload(1).write(7) };
        let second = Memory::map_at(file.as_fd(), None).unwrap();
        assert_eq!((second.note(0).unwrap(), second.note(1).unwrap()), (Note::Request, Note::Answer));
        // SAFETY: as above.
        assert_eq!(unsafe { second.payload(1).read() }, 7);
        second.note_place(0).store(9, Ordering::Relaxed);
        assert_eq!(first.note(0).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn files_that_are_no_such_memory_are_refused() {
        let refused = |file: &OwnedFd| {
            assert_eq!(Memory::map_at(file.as_fd(), None).unwrap_err().kind(), ErrorKind::Unsupported);
        };
        refused(&tempfile::tempfile().unwrap().into());
        let unsealed = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        unsealed.set_len(ENTRY_BYTES as u64).unwrap();
        refused(&unsealed.into());
        refused(&create(ENTRIES_MAX + 1).unwrap());
    }

    /// The kernel would write to whatever is there.
    #[test]
    fn an_address_that_is_taken_stays_with_whom_it_belongs_to() {
        let file = create(1).unwrap();
        let first = Memory::map_at(file.as_fd(), None).unwrap();
        let taken = first.start.as_ptr().addr();
        Memory::map_at(file.as_fd(), Some(taken)).unwrap_err();
    }
}
