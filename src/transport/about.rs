//! What a request was about, and the one place where a failed one is logged.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, ErrorKind};
use crate::fs::{Errno, Failure, Outcome};

/// Runs an operation so that a panic in it, which is a bug of ours, costs one request an error and not all guests their
/// disks. Locks are released as it unwinds; the panic hook has told where it was.
pub fn guarded<T>(operation: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    catch_unwind(AssertUnwindSafe(operation)).unwrap_or_else(|_told| {
        Err(Error::new(ErrorKind::Io, "it panicked, which is a bug in cowdisk").into())
    })
}

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
            Failure::Error(error) => match error.hint() {
                Some(hint) => log::warn!("{self}: {error}; {hint}"),
                None => log::warn!("{self}: {error}"),
            },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_input_output_error_of_one_request() {
        let outcome: Outcome<()> = guarded(|| panic!("on purpose"));
        assert_eq!(outcome.unwrap_err().errno().raw(), libc::EIO);
        assert_eq!(guarded(|| Ok(7)).unwrap(), 7);
    }
}
