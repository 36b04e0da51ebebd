//! What a request was about, and the one place where a failed one is logged.

use crate::fs::{Errno, Failure};

/// What a request was about, for the log.
#[derive(Clone, Copy, Debug)]
pub struct About {
    operation: &'static str,
    ino: u64,
    /// First byte and number of bytes, where the operation has a range.
    range: Option<(u64, u64)>,
}

impl About {
    /// A request about a file.
    pub fn new(operation: &'static str, ino: u64) -> Self {
        Self { operation, ino, range: None }
    }

    /// A request about `len` bytes at `offset` of a file.
    pub fn range(operation: &'static str, ino: u64, offset: u64, len: u64) -> Self {
        Self { operation, ino, range: Some((offset, len)) }
    }

    /// Logs a failure, and says what to answer.
    pub fn failed(self, failure: &Failure) -> Errno {
        let errno = failure.errno();
        match failure {
            Failure::Answer(_) => log::trace!("{self}: {errno:?}"),
            // What was to be made durable is not.
            Failure::Error(error) if self.operation == "fsync" || self.operation == "release" => {
                log::error!("{self}: {error}");
            }
            Failure::Error(error) => log::warn!("{self}: {error}"),
        }
        errno
    }
}

impl std::fmt::Display for About {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} inode {:#x}", self.operation, self.ino)?;
        match self.range {
            Some((offset, len)) => write!(f, " offset {offset} length {len}"),
            None => Ok(()),
        }
    }
}
