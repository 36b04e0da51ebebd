//! The memory of a ring's entries: for each a head, which says what the request is, and a payload.
//!
//! While the kernel has an entry it may write to both at any time; while we have it, one [`Entry`](super::Entry) does.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::super::init::REQUEST_BYTES_MAX;
use super::super::wire::RingHead;
use crate::error::{Context, Result};

/// Bytes of a payload: the largest read or write. A multiple of the page size, so that every payload is aligned to a page.
pub const PAYLOAD_BYTES: usize = {
    assert!(REQUEST_BYTES_MAX <= 1 << 20 && REQUEST_BYTES_MAX.is_multiple_of(4096));
    REQUEST_BYTES_MAX as usize
};

/// Bytes from one head to the next, so that no two share a cache line.
const HEAD_STRIDE: usize = size_of::<RingHead>().next_multiple_of(64);

/// Memory of some entries. The host gives a page of it when it is first used.
#[derive(Debug)]
pub struct Memory {
    /// All payloads, then all heads.
    start: NonNull<u8>,
    entries: usize,
}

// SAFETY: it is plain memory that belongs to no thread; who may touch which part is up to those who use its pointers.
unsafe impl Send for Memory {}
// SAFETY: as above; `&self` gives pointers and numbers only.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory for `entries` entries, at least 1.
    ///
    /// # Errors
    /// If the host refuses it.
    pub fn new(entries: usize) -> Result<Self> {
        let (protection, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at a place that the kernel chooses takes nobody's memory away.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), Self::bytes(entries), protection, flags) };
        let start = start.context(|| "get memory for a ring")?.cast::<u8>();
        Ok(Self { start: NonNull::new(start).expect("the kernel places nothing at zero"), entries })
    }

    fn bytes(entries: usize) -> usize {
        entries * (PAYLOAD_BYTES + HEAD_STRIDE)
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
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it is our own mapping, and nobody else has it any more: entries hold on to it, and the kernel lets go
        // of it with the ring.
        if let Err(errno) = unsafe { munmap(self.start.as_ptr().cast(), Self::bytes(self.entries)) } {
            log::error!("give back the memory of a ring: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_memory_of_their_own_and_payloads_are_aligned() {
        let memory = Memory::new(3).unwrap();
        let mut parts: Vec<(usize, usize)> = Vec::new();
        for entry in 0..3 {
            let (payload, head) = (memory.payload(entry).as_ptr(), memory.head(entry).as_ptr());
            assert_eq!(payload.align_offset(4096), 0);
            assert!(head.is_aligned());
            parts.push((payload.addr(), PAYLOAD_BYTES));
            parts.push((head.addr(), size_of::<RingHead>()));
        }
        parts.sort_unstable();
        assert!(parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        let (last, len) = parts[parts.len() - 1];
        assert!(last + len <= memory.start.as_ptr().addr() + Memory::bytes(3));
    }
}
