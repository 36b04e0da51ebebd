//! Memory for requests.

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
/// from where it is.
pub struct RequestBuffer(Vec<u8>);

impl RequestBuffer {
    /// Memory for the largest request.
    pub fn new() -> Self {
        // Not zeroes, so that every page is there: a process that is killed while the kernel copies a request into a page
        // that still has to be found would cost that request an EIO.
        Self(vec![1; 2 * PAGE + PAYLOAD_BYTES])
    }

    /// Where a request is read to.
    pub fn bytes(&mut self) -> &mut [u8] {
        let start = self.start();
        &mut self.0[start..start + WRITE_HEAD_BYTES + PAYLOAD_BYTES]
    }

    /// The first `len` bytes of the payload of a WRITE.
    pub fn payload(&self, len: usize) -> &[u8] {
        &self.0[self.start() + WRITE_HEAD_BYTES..][..len]
    }

    /// The room of a payload, for what is read.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.bytes()[WRITE_HEAD_BYTES..]
    }

    fn start(&self) -> usize {
        let page = self.0.as_ptr().align_offset(PAGE);
        // The first page border with room for the head of a WRITE before it.
        let payload = if page >= WRITE_HEAD_BYTES { page } else { page + PAGE };
        payload - WRITE_HEAD_BYTES
    }
}

/// Buffers that take the place of those whose payload is still being written.
#[derive(Debug)]
pub struct SpareBuffers {
    /// Guards the buffers that nobody uses, and how many more may be made; held for an instant.
    spare: Mutex<Spare>,
}

struct Spare {
    buffers: Vec<RequestBuffer>,
    /// How many were not made yet.
    unmade: usize,
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").field("buffers", &self.buffers.len()).field("unmade", &self.unmade).finish()
    }
}

impl SpareBuffers {
    /// At most `count` buffers, made when they are needed.
    pub fn new(count: usize) -> Self {
        Self { spare: Mutex::new(Spare { buffers: Vec::new(), unmade: count }) }
    }

    /// A buffer that nobody uses; `None` if all are in use.
    pub fn take(&self) -> Option<RequestBuffer> {
        let mut spare = self.spare.lock();
        if let Some(buffer) = spare.buffers.pop() {
            return Some(buffer);
        }
        spare.unmade = spare.unmade.checked_sub(1)?;
        drop(spare);
        Some(RequestBuffer::new())
    }

    /// Gives a buffer back.
    pub fn put(&self, buffer: RequestBuffer) {
        self.spare.lock().buffers.push(buffer);
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
            assert_eq!(buffer.payload_mut().len(), PAYLOAD_BYTES);
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
    }
}
