//! What the caller of an operation is told: an errno, chosen here and nowhere else.

use std::fmt;
use std::io;

use crate::error::{Error, ErrorKind};

/// An error number of Linux, above zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// The file is not what its name says any more: removed, or replaced by another.
    pub const STALE: Self = Self(libc::ESTALE);
    /// No such name.
    pub const NO_ENTRY: Self = Self(libc::ENOENT);
    /// The name is longer than any can be.
    pub const NAME_TOO_LONG: Self = Self(libc::ENAMETOOLONG);
    /// Not possible on this kind of file, or at all in this tree.
    pub const NOT_PERMITTED: Self = Self(libc::EPERM);
    /// A directory is needed.
    pub const NOT_DIRECTORY: Self = Self(libc::ENOTDIR);
    /// Not possible on a directory.
    pub const IS_DIRECTORY: Self = Self(libc::EISDIR);
    /// The handle was never given out, or has been closed.
    pub const BAD_HANDLE: Self = Self(libc::EBADF);
    /// An argument is out of range.
    pub const INVALID: Self = Self(libc::EINVAL);
    /// Can only be read.
    pub const READ_ONLY: Self = Self(libc::EROFS);
    /// Past the end of a disk, or of the largest disk.
    pub const TOO_BIG: Self = Self(libc::EFBIG);
    /// Nothing there to seek to.
    pub const NO_SUCH_OFFSET: Self = Self(libc::ENXIO);
    /// No such extended attribute.
    pub const NO_DATA: Self = Self(libc::ENODATA);
    /// Exists already.
    pub const EXISTS: Self = Self(libc::EEXIST);
    /// The answer is longer than the caller's buffer.
    pub const RANGE: Self = Self(libc::ERANGE);
    /// The extended attributes of one file are too many or too long.
    pub const NO_ROOM: Self = Self(libc::ENOSPC);
    /// A name or a value is longer than Linux allows.
    pub const TOO_LONG: Self = Self(libc::E2BIG);
    /// This variant of the operation does not exist here.
    pub const NOT_SUPPORTED: Self = Self(libc::EOPNOTSUPP);
    /// No such device control.
    pub const NO_CONTROL: Self = Self(libc::ENOTTY);
    /// The operation does not exist here; the kernel remembers that and never asks again.
    pub const NOT_IMPLEMENTED: Self = Self(libc::ENOSYS);
    /// The operation failed, and nothing more is known.
    pub const BROKEN: Self = Self(libc::EIO);
    /// Too many open files.
    pub const TOO_MANY: Self = Self(libc::ENFILE);

    /// The number, as the kernel's headers have it.
    pub fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {})", self.0, io::Error::from_raw_os_error(self.0))
    }
}

impl From<ErrorKind> for Errno {
    /// A full host stays `ENOSPC`: QEMU then pauses the guest; any other errno looks to it like a bad disk.
    fn from(kind: ErrorKind) -> Self {
        Self(match kind {
            ErrorKind::Invalid => libc::EINVAL,
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::Exists => libc::EEXIST,
            ErrorKind::Busy => libc::EBUSY,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::OutOfRange => libc::EFBIG,
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::Denied => libc::EACCES,
            ErrorKind::Unsupported => libc::EOPNOTSUPP,
            ErrorKind::Interrupted => libc::EINTR,
            ErrorKind::Corrupt | ErrorKind::Io => libc::EIO,
        })
    }
}

/// Why an operation has no result.
#[derive(Debug)]
pub enum Failure {
    /// An answer that the interface foresees, such as "no such name". Nothing is wrong, nothing is logged.
    Answer(Errno),
    /// Something went wrong here or on the host; the transport logs it.
    Error(Error),
}

impl Failure {
    /// What the caller is told.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Answer(errno) => *errno,
            Self::Error(error) => error.kind().into(),
        }
    }

    /// As an error of ours.
    pub fn into_error(self) -> Error {
        match self {
            Self::Answer(errno) => Error::io("a file", io::Error::from_raw_os_error(errno.0)),
            Self::Error(error) => error,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer(errno) => write!(f, "{}", io::Error::from_raw_os_error(errno.0)),
            Self::Error(error) => write!(f, "{error}"),
        }
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Answer(errno)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// The result of an operation.
pub type Outcome<T> = std::result::Result<T, Failure>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_host_stays_a_full_host() {
        let error = Error::io("write", io::Error::from_raw_os_error(libc::EDQUOT));
        assert_eq!(Failure::from(error).errno().raw(), libc::ENOSPC);
    }

    #[test]
    fn damage_and_a_bad_host_disk_are_an_input_output_error() {
        for kind in [ErrorKind::Corrupt, ErrorKind::Io] {
            assert_eq!(Errno::from(kind).raw(), libc::EIO);
        }
    }
}
