//! Refuses writes after a failed sync.
//!
//! When Linux fails to write a page back it reports the error to one sync and then forgets it: the page counts as
//! clean, though the disk never got it. A later sync that succeeds therefore proves nothing about what came before the
//! failed one ("Can Applications Recover from fsync Failures?", Rebello et al., USENIX ATC 2020). So the first failure
//! is final until the overlay is opened again.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{DirectFile, Storage, Way};
use crate::error::{Error, ErrorKind, Result};

/// Shared by all storages of one overlay: once closed, none of them writes.
#[derive(Clone, Debug, Default)]
pub struct Latch(Arc<AtomicBool>);

impl Latch {
    /// An open latch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a sync has failed.
    pub fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Refuses everything that writes from now on.
    pub fn close(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Does nothing while no sync has failed.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] after a sync has failed.
    pub fn check(&self) -> Result<()> {
        if self.is_closed() {
            let message = "writes are refused because an earlier sync of the host's disk failed";
            return Err(
                Error::new(ErrorKind::Io, message).with_hint("check the host's disk, then open it again")
            );
        }
        Ok(())
    }
}

/// A storage behind a [`Latch`]. A failed sync, and a failed durable write, close it; reads go on.
#[derive(Debug)]
pub struct LatchedStorage {
    inner: Box<dyn Storage>,
    latch: Latch,
}

impl LatchedStorage {
    /// Puts `inner` behind `latch`.
    pub fn new(inner: Box<dyn Storage>, latch: Latch) -> Self {
        Self { inner, latch }
    }

    fn closing(&self, result: Result<()>) -> Result<()> {
        if result.is_err() {
            self.latch.close();
        }
        result
    }
}

impl Storage for LatchedStorage {
    fn size(&self) -> Result<u64> {
        self.inner.size()
    }

    fn allocated(&self) -> Result<u64> {
        self.inner.allocated()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_exact_at(offset, buf)
    }

    fn direct_file(&self) -> Option<DirectFile<'_>> {
        self.inner.direct_file()
    }

    fn goes_direct(&self) -> bool {
        self.inner.goes_direct()
    }

    fn whole_file(&self) -> Option<BorrowedFd<'_>> {
        self.inner.whole_file()
    }

    fn read_by(&self, way: Way, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_by(way, offset, buf)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.inner.read_now(offset, buf)
    }

    // A direct write that fails says so to its own request: nothing of it stays in the host's cache, where only a sync
    // would learn of it. So it closes nothing.
    fn write_by(&self, way: Way, offset: u64, buf: &[u8]) -> Result<()> {
        self.latch.check()?;
        self.inner.write_by(way, offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.latch.check()?;
        self.inner.write_at(offset, buf)
    }

    fn write_durable_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.latch.check()?;
        self.closing(self.inner.write_durable_at(offset, buf))
    }

    fn start_writing(&self) {
        self.inner.start_writing();
    }

    fn check_written(&self) -> Result<()> {
        self.latch.check()?;
        self.closing(self.inner.check_written())
    }

    fn sync(&self) -> Result<()> {
        self.latch.check()?;
        self.closing(self.inner.sync())
    }

    fn drop_cache(&self) -> Result<()> {
        self.inner.drop_cache()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.latch.check()?;
        self.inner.set_len(len)
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.latch.check()?;
        self.inner.allocate(offset, len)
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.latch.check()?;
        self.inner.punch(offset, len)
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        self.inner.next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        self.inner.next_hole(offset)
    }

    fn unallocated(&self, offset: u64, len: u64) -> Result<u64> {
        self.inner.unallocated(offset, len)
    }
}
