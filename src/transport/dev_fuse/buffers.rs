//! Memory for requests.

use memmap2::{MmapMut, MmapOptions};
use parking_lot::Mutex;

use super::init::REQUEST_BYTES_MAX;
use super::wire::WRITE_HEAD_BYTES;

/// Alignment of payloads, in bytes.
const PAGE: usize = 4096;

/// Payload of the largest request, in bytes.
const PAYLOAD_BYTES: usize = {
    assert!(REQUEST_BYTES_MAX <= 1 << 20);
    REQUEST_BYTES_MAX as usize
};

/// Memory for one request, placed so that the payload of a WRITE is aligned to a page: it then goes past the host's cache
/// from where it is. A mapping of its own, so that it goes back to the host with its owner.
#[derive(Debug)]
pub struct RequestBuffer(MmapMut);

impl RequestBuffer {
    /// Memory for the largest request.
    pub fn new() -> Self {
        // With every page there: a process that is killed while the kernel copies a request into a page that still has to be
        // found would cost that request an EIO.
        let memory = MmapOptions::new().len(PAGE + PAYLOAD_BYTES).populate().map_anon();
        Self(memory.expect("1 MiB of memory, as for any allocation"))
    }

    /// Where a request is read to.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.0[PAGE - WRITE_HEAD_BYTES..]
    }

    /// The first `len` bytes of the payload of a WRITE.
    pub fn payload(&self, len: usize) -> &[u8] {
        &self.0[PAGE..][..len]
    }

    /// The same, to change.
    pub fn payload_mut(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[PAGE..][..len]
    }
}

/// Longest payload that a [`SmallBuffer`] holds, in bytes.
pub const SMALL_BYTES: usize = 16 << 10;

/// Memory for a payload of at most [`SMALL_BYTES`], aligned to a page.
#[derive(Debug)]
pub struct SmallBuffer(MmapMut);

impl SmallBuffer {
    /// The first `len` bytes.
    pub fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[..len]
    }
}

/// Memory that is made when it is needed, and used again.
pub trait Buffer {
    /// A new one.
    fn make() -> Self;
}

impl Buffer for RequestBuffer {
    fn make() -> Self {
        Self::new()
    }
}

impl Buffer for SmallBuffer {
    fn make() -> Self {
        Self(MmapMut::map_anon(SMALL_BYTES).expect("16 KiB of memory, as for any allocation"))
    }
}

/// Buffers for what is under way.
#[derive(Debug)]
pub struct Spares<B> {
    /// Guards the buffers that nobody uses, and how many more may be made; held for an instant.
    spare: Mutex<Spare<B>>,
}

struct Spare<B> {
    buffers: Vec<B>,
    /// How many were not made yet.
    unmade: usize,
}

/// Buffers that take the place of those whose payload is still being written.
pub type SpareBuffers = Spares<RequestBuffer>;

/// Buffers for small payloads.
pub type SmallBuffers = Spares<SmallBuffer>;

impl<B> std::fmt::Debug for Spare<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").field("buffers", &self.buffers.len()).field("unmade", &self.unmade).finish()
    }
}

impl<B: Buffer> Spares<B> {
    /// At most `count` buffers, made when they are needed.
    pub fn new(count: usize) -> Self {
        Self { spare: Mutex::new(Spare { buffers: Vec::new(), unmade: count }) }
    }

    /// A buffer that nobody uses; `None` if all are in use.
    pub fn take(&self) -> Option<B> {
        let mut spare = self.spare.lock();
        if let Some(buffer) = spare.buffers.pop() {
            return Some(buffer);
        }
        spare.unmade = spare.unmade.checked_sub(1)?;
        drop(spare);
        Some(B::make())
    }

    /// Gives a buffer back.
    pub fn put(&self, buffer: B) {
        self.spare.lock().buffers.push(buffer);
    }

    /// Gives the memory of buffers that nobody uses back to the host.
    pub fn discard(&self) {
        let mut spare = self.spare.lock();
        spare.unmade += spare.buffers.len();
        spare.buffers.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_aligned_and_as_long_as_the_largest() {
        for _ in 0..8 {
            let mut buffer = RequestBuffer::new();
            assert_eq!(buffer.bytes().len(), WRITE_HEAD_BYTES + PAYLOAD_BYTES);
            assert_eq!(buffer.payload(1).as_ptr().align_offset(PAGE), 0);
            buffer.bytes()[WRITE_HEAD_BYTES] = 7;
            assert_eq!(buffer.payload(1), [7]);
        }
    }

    #[test]
    fn no_more_buffers_are_made_than_allowed_and_each_is_used_again() {
        let spare = SpareBuffers::new(2);
        let (one, _two) = (spare.take().unwrap(), spare.take().unwrap());
        assert!(spare.take().is_none());
        spare.put(one);
        assert!(spare.take().is_some());
        assert!(spare.take().is_none());
        spare.put(RequestBuffer::new());
        spare.discard();
        assert!(spare.take().is_some());
        assert!(spare.take().is_none());
    }
}
