//! The buffers that disks are read into: one for each thread, kept for its life.

use std::cell::RefCell;

/// Alignment of the buffers, in bytes.
const BUFFER_ALIGNMENT: usize = 4096;

/// Longest buffer that [`shrink`] leaves, in bytes.
const KEPT_BYTES: usize = 64 << 10;

thread_local! {
    /// What this thread reads into before it is sent to the kernel.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with `len` bytes of this thread's buffer, aligned to [`BUFFER_ALIGNMENT`].
pub fn with_buffer<R>(len: u32, work: impl FnOnce(&mut [u8]) -> R) -> R {
    let len = usize::try_from(len).expect("a length of 32 bits fits an address");
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < len + BUFFER_ALIGNMENT {
            buffer.resize(len + BUFFER_ALIGNMENT, 0);
        }
        let start = buffer.as_ptr().align_offset(BUFFER_ALIGNMENT);
        work(&mut buffer[start..start + len])
    })
}

/// Gives this thread's buffer back to the host if it was grown by a large request.
pub fn shrink() {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() > KEPT_BYTES {
            *buffer = Vec::new();
        }
    });
}
