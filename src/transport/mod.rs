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

pub use dev_fuse::{Connection, Nudged, Road, Unanswered, nudge, require_cold_reads};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Fs;

/// How requests of the kernel are read and answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Our own on `/dev/fuse`.
    #[default]
    DevFuse,
    /// Our own by io_uring: faster, but no other process can take over from one that dies.
    IoUring,
    /// That of the crate `fuser`.
    Fuser,
}

/// Environment variable that names the transport of mounts whose options name none.
pub const TRANSPORT_VARIABLE: &str = "COWDISK_TRANSPORT";

impl Transport {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::DevFuse, Self::IoUring, Self::Fuser];

    /// Threads that read requests, unless the options say otherwise. Those of [`Self::DevFuse`] wait for the host's disk
    /// themselves, and sleep when they are not needed; of [`Self::IoUring`] there are no more than processors.
    pub fn threads(self) -> usize {
        match self {
            Self::DevFuse => 48,
            Self::IoUring => 64,
            Self::Fuser => 2 * std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8),
        }
    }

    /// How its requests travel; by the device the kernel may serve files by itself if `passthrough`.
    pub fn road(self, passthrough: bool) -> Road {
        match self {
            Self::IoUring => Road::Rings,
            Self::DevFuse | Self::Fuser => Road::Device { passthrough },
        }
    }

    /// Whether this host has what it needs. Nothing is changed.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], with what to do about it.
    pub fn require(self) -> Result<()> {
        match self {
            Self::IoUring => dev_fuse::require_rings(),
            Self::DevFuse | Self::Fuser => Ok(()),
        }
    }
}

/// Why a mount has the transport that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its options name it.
    Options,
    /// [`TRANSPORT_VARIABLE`] names it.
    Environment,
    /// Nothing names one.
    Default,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Options => f.write_str("named by the mount's options"),
            Self::Environment => write!(f, "named by {TRANSPORT_VARIABLE}"),
            Self::Default => f.write_str("the default"),
        }
    }
}

/// A transport, and why it was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Which one.
    pub transport: Transport,
    /// Why that one.
    pub reason: Reason,
}

impl Choice {
    /// What a mount's options name, or else [`TRANSPORT_VARIABLE`] if it is set and not empty, or else the default.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the variable is asked and names none.
    pub fn of(named: Option<Transport>) -> Result<Self> {
        if let Some(transport) = named {
            return Ok(Self { transport, reason: Reason::Options });
        }
        match std::env::var(TRANSPORT_VARIABLE) {
            Ok(text) if !text.is_empty() => {
                let transport = text.parse::<Transport>().context(|| TRANSPORT_VARIABLE)?;
                Ok(Self { transport, reason: Reason::Environment })
            }
            _ => Ok(Self { transport: Transport::default(), reason: Reason::Default }),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.transport, self.reason)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DevFuse => "dev_fuse",
            Self::IoUring => "io_uring",
            Self::Fuser => "fuser",
        })
    }
}

impl FromStr for Transport {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|transport| transport.to_string() == text).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("transport {text:?}: must be dev_fuse, io_uring or fuser"))
        })
    }
}

/// A session of the kernel with the filesystem; ends when the mount goes away.
#[derive(Debug)]
pub enum Session {
    /// On [`Transport::DevFuse`].
    DevFuse(dev_fuse::DevFuseSession),
    /// On [`Transport::IoUring`].
    IoUring(dev_fuse::RingSession),
    /// On [`Transport::Fuser`].
    Fuser(fuser::FuserSession),
}

impl Session {
    /// A session of [`Transport::Fuser`], which no other process can take over: answers the kernel's INIT on a descriptor that
    /// has just been mounted and starts `threads` threads, at least 1. Requests are answered when this returns.
    ///
    /// # Errors
    /// If the kernel speaks no version of the protocol that the crate does.
    pub fn begin_alone(device: OwnedFd, fs: Arc<Fs>, threads: usize) -> Result<Self> {
        Ok(Self::Fuser(fuser::FuserSession::start(device, fs, threads)?))
    }

    /// A session on a connection that has begun, with up to `threads` threads that fetch requests, at least 1. `begin` is called
    /// just before the first one is fetched; requests are answered when this returns. What becomes of those that
    /// processes before this one, all of which have ended, had read and not answered, `unanswered` says; by
    /// [`Road::Rings`] there are none.
    ///
    /// # Errors
    /// Those of the host.
    pub fn take_over(
        connection: Connection,
        fs: Arc<Fs>,
        threads: usize,
        unanswered: Unanswered,
        begin: impl FnOnce(),
    ) -> Result<Self> {
        Ok(match connection.road() {
            Road::Device { .. } => {
                Self::DevFuse(dev_fuse::DevFuseSession::start(connection, fs, threads, unanswered, begin)?)
            }
            Road::Rings => Self::IoUring(dev_fuse::RingSession::start(connection, fs, threads, begin)?),
        })
    }

    /// Waits until the mount has gone away and every request is answered.
    ///
    /// # Errors
    /// If a thread ended before that.
    pub fn wait(&self) -> Result<()> {
        match self {
            Self::DevFuse(session) => session.wait(),
            Self::IoUring(session) => session.wait(),
            Self::Fuser(session) => session.wait(),
        }
    }

    /// Stops fetching requests and answers all with which it had begun, so that another process can take over when this one has
    /// ended; [`Session::wait`] never returns then. By rings, `nudge` is to have the keeper call [`nudge()`].
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with a transport that cannot be taken over; [`ErrorKind::Busy`] if not all is answered within
    /// `patience`; those of `nudge`. The session goes on then.
    pub fn hand_over(
        &self,
        patience: Duration,
        nudge: impl FnOnce(Vec<u16>, usize) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::DevFuse(session) => session.hand_over(patience),
            Self::IoUring(session) => session.hand_over(patience, nudge),
            Self::Fuser(_) => Err(Error::new(ErrorKind::Unsupported, "this transport cannot be handed over")),
        }
    }

    /// Fetches requests again after [`Session::hand_over`].
    ///
    /// # Errors
    /// Those of the host; [`Session::wait`] returns them, too.
    pub fn take_back(&self) -> Result<()> {
        match self {
            Self::DevFuse(session) => session.take_back(),
            Self::IoUring(session) => session.take_back(),
            Self::Fuser(_) => Ok(()),
        }
    }
}
