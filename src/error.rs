//! The one error type of the crate.
//!
//! An error has a kind (what a caller may act on), a message (what was being done, to what), an optional source, kept
//! as a value and never turned into text, and an optional hint: the next step a user can take. [`std::fmt::Display`]
//! prints the whole chain joined by `: `, without the hint.

use std::fmt;
use std::io;

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller may act on. A kind exists only where some caller treats it differently from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request itself is wrong: a name, a size, a combination of options. Nothing was changed.
    Invalid,
    /// A named object does not exist.
    NotFound,
    /// A named object exists already.
    Exists,
    /// The object is in use: open, mounted, referred to, or locked by another process.
    Busy,
    /// The host filesystem (or the tmpfs of the live map) has no room. The same request succeeds once there is room.
    NoSpace,
    /// An offset or a length reaches beyond the end of the disk, or beyond the largest disk.
    OutOfRange,
    /// The object can only be read.
    ReadOnly,
    /// The operating system refused for lack of privilege.
    Denied,
    /// Bytes on disk are not what the format says, or a base is not the one that an overlay was made over.
    Corrupt,
    /// The host, or a tool on it, lacks something that is needed.
    Unsupported,
    /// The user interrupted the operation. Nothing half-made is left.
    Interrupted,
    /// The host failed to read, write or sync.
    Io,
}

/// What went wrong, to what, and what to do about it.
pub struct Error {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    /// An error without a source. `message` is lower case, names the object and has no full stop.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, source: None }
    }

    /// An error of the operating system; its errno chooses the kind.
    pub fn io(message: impl Into<String>, source: io::Error) -> Self {
        Self { kind: kind_of(&source), message: message.into(), hint: None, source: Some(Box::new(source)) }
    }

    /// An error caused by another one that is not of the operating system.
    pub fn caused(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self { kind, message: message.into(), hint: None, source: Some(Box::new(source)) }
    }

    /// Says on top of this error what was being done. Kind and hint stay.
    #[must_use]
    pub fn context(mut self, message: impl Into<String>) -> Self {
        let (kind, hint) = (self.kind, self.hint.take());
        Self { kind, message: message.into(), hint, source: Some(Box::new(self)) }
    }

    /// Adds the next step, a whole line of its own for the user.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What a caller may act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The next step for the user, if one is known.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// Adds what was being done to the error of a [`Result`].
pub trait Context<T> {
    /// Like [`Error::context`]; `message` is only built for an error.
    fn context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T> {
        self.map_err(|error| error.context(message()))
    }
}

impl<T> Context<T> for io::Result<T> {
    fn context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T> {
        self.map_err(|error| Error::io(message(), error))
    }
}

impl<T> Context<T> for std::result::Result<T, rustix::io::Errno> {
    fn context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T> {
        self.map_err(|errno| Error::io(message(), errno.into()))
    }
}

fn kind_of(error: &io::Error) -> ErrorKind {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
        Some(libc::ENOENT | libc::ENOTDIR) => ErrorKind::NotFound,
        Some(libc::EEXIST | libc::ENOTEMPTY) => ErrorKind::Exists,
        Some(libc::EBUSY | libc::ETXTBSY | libc::EWOULDBLOCK) => ErrorKind::Busy,
        Some(libc::EROFS) => ErrorKind::ReadOnly,
        Some(libc::EPERM | libc::EACCES) => ErrorKind::Denied,
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => ErrorKind::Unsupported,
        Some(libc::EINTR) => ErrorKind::Interrupted,
        Some(libc::EFBIG) => ErrorKind::OutOfRange,
        _ => ErrorKind::Io,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_joins_the_chain_and_keeps_kind_and_hint() {
        let error = Error::io("sync data", io::Error::from_raw_os_error(libc::ENOSPC))
            .with_hint("free some space")
            .context("flush disk web-3");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.hint(), Some("free some space"));
        assert!(error.to_string().starts_with("flush disk web-3: sync data: No space left"));
    }

    #[test]
    fn errno_chooses_the_kind() {
        let kind = |errno| Error::io("x", io::Error::from_raw_os_error(errno)).kind();
        assert_eq!(kind(libc::ENOENT), ErrorKind::NotFound);
        assert_eq!(kind(libc::EIO), ErrorKind::Io);
        assert_eq!(kind(libc::EDQUOT), ErrorKind::NoSpace);
        assert_eq!(kind(libc::EAGAIN), ErrorKind::Busy);
    }
}
