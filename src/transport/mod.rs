//! The kernel's bytes ↔ operations of [`crate::fs`].
//!
//! A transport reads requests from a `/dev/fuse` descriptor, calls the filesystem from several threads and sends its
//! answers back. It is the place where a failed request is logged, once, with operation, inode, offset and length. All
//! transports call the same operations; which one runs changes speed, never behaviour.

mod about;
pub mod dev_fuse;
mod fuser;
pub mod mount;
mod scratch;
mod slow_lane;

use std::fmt;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

pub use dev_fuse::{Connection, Unanswered};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Fs;

/// How requests of the kernel are read and answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Our own on `/dev/fuse`.
    #[default]
    DevFuse,
    /// That of the crate `fuser`.
    Fuser,
}

impl Transport {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::DevFuse, Self::Fuser];

    /// Threads that read requests, unless the options say otherwise. Those of [`Self::DevFuse`] wait for the host's disk
    /// themselves, and sleep when they are not needed.
    pub fn threads(self) -> usize {
        match self {
            Self::DevFuse => 48,
            Self::Fuser => 2 * std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8),
        }
    }
}

/// Environment variable that names the transport of mounts whose options name none.
pub const TRANSPORT_VARIABLE: &str = "COWDISK_TRANSPORT";

impl Transport {
    /// That of [`TRANSPORT_VARIABLE`], if it is set and not empty, or else the default.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the variable names none.
    pub fn of_environment() -> Result<Self> {
        match std::env::var(TRANSPORT_VARIABLE) {
            Ok(text) if !text.is_empty() => text.parse::<Self>().context(|| TRANSPORT_VARIABLE),
            _ => Ok(Self::default()),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DevFuse => "dev_fuse",
            Self::Fuser => "fuser",
        })
    }
}

impl FromStr for Transport {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|transport| transport.to_string() == text).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("transport {text:?}: must be dev_fuse or fuser"))
        })
    }
}

/// A session of the kernel with the filesystem; ends when the mount goes away.
#[derive(Debug)]
pub enum Session {
    /// On [`Transport::DevFuse`].
    DevFuse(dev_fuse::DevFuseSession),
    /// On [`Transport::Fuser`].
    Fuser(fuser::FuserSession),
}

impl Session {
    /// A session of [`Transport::Fuser`]: answers the kernel's INIT on a descriptor that has just been mounted and starts
    /// `threads` threads, at least 1. Requests are answered when this returns. No other process can take it over.
    ///
    /// # Errors
    /// If the kernel speaks no version of the protocol that we do.
    pub fn begin(device: OwnedFd, fs: Arc<Fs>, threads: usize) -> Result<Self> {
        Ok(Self::Fuser(fuser::FuserSession::start(device, fs, threads)?))
    }

    /// A session of [`Transport::DevFuse`] on a connection that has begun, with `threads` threads, at least 1. Requests are
    /// answered when this returns. What becomes of those that processes before this one, all of which have ended, had read and
    /// not answered, `unanswered` says.
    ///
    /// # Errors
    /// Those of the host.
    pub fn take_over(
        connection: Connection,
        fs: Arc<Fs>,
        threads: usize,
        unanswered: Unanswered,
    ) -> Result<Self> {
        Ok(Self::DevFuse(dev_fuse::DevFuseSession::start(connection, fs, threads, unanswered)?))
    }

    /// Waits until the mount has gone away and every request is answered.
    ///
    /// # Errors
    /// If a thread ended before that.
    pub fn wait(&self) -> Result<()> {
        match self {
            Self::DevFuse(session) => session.wait(),
            Self::Fuser(session) => session.wait(),
        }
    }

    /// Stops reading requests and answers all that were read, so that another process can take over when this one has
    /// ended; [`Session::wait`] never returns then.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with a transport that cannot be taken over; [`ErrorKind::Busy`] if not all is answered within
    /// `patience`. The session goes on then.
    pub fn hand_over(&self, patience: Duration) -> Result<()> {
        match self {
            Self::DevFuse(session) => session.hand_over(patience),
            Self::Fuser(_) => {
                Err(Error::new(ErrorKind::Unsupported, "the transport fuser cannot be handed over"))
            }
        }
    }

    /// Reads requests again after [`Session::hand_over`].
    ///
    /// # Errors
    /// Those of the host; [`Session::wait`] returns them, too.
    pub fn take_back(&self) -> Result<()> {
        match self {
            Self::DevFuse(session) => session.take_back(),
            Self::Fuser(_) => Ok(()),
        }
    }
}
