//! How long work reports what it has done, and how it learns that the user does not want it any more.

use crate::error::{Error, ErrorKind, Result};

/// Watches a long operation. The command line shows a bar; tests count.
pub trait Progress: Sync {
    /// A piece of work begins: what it is, in a few lower-case words, and how many bytes it has, where known.
    fn begin(&self, what: &str, total_bytes: Option<u64>);

    /// `bytes` more of the piece of work are done.
    fn advance(&self, bytes: u64);

    /// The piece of work has ended, well or not. Each `begin` is followed by exactly one `finish`.
    fn finish(&self);

    /// Whether the user wants the operation to stop. Asked many times a second; the operation then undoes what it did
    /// and fails with [`ErrorKind::Interrupted`].
    fn cancelled(&self) -> bool;
}

/// Shows nothing and never cancels.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn begin(&self, _what: &str, _total_bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
    fn cancelled(&self) -> bool {
        false
    }
}

/// One piece of work; calls [`Progress::finish`] when dropped, so that an early return does not leave a bar behind.
pub(super) struct Work<'a> {
    progress: &'a dyn Progress,
}

impl<'a> Work<'a> {
    pub(super) fn begin(progress: &'a dyn Progress, what: &str, total_bytes: Option<u64>) -> Self {
        progress.begin(what, total_bytes);
        Self { progress }
    }

    pub(super) fn advance(&self, bytes: u64) {
        self.progress.advance(bytes);
    }

    /// Fails with [`ErrorKind::Interrupted`] if the user has cancelled.
    pub(super) fn check(&self) -> Result<()> {
        check_cancelled(self.progress)
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.progress.finish();
    }
}

/// Fails with [`ErrorKind::Interrupted`] if the user has cancelled.
pub(super) fn check_cancelled(progress: &dyn Progress) -> Result<()> {
    if progress.cancelled() {
        return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
    }
    Ok(())
}
