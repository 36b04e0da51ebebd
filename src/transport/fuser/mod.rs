//! The transport on the crate `fuser`: portable, and the measure for the others.
//!
//! A request that only touches memory and the data of a disk is answered by the thread that read it; one that may wait
//! for a sync of the host's disk (open, release, fsync, a durable write) goes to the slow lane, `slow_lane.rs`.

mod convert;
mod init;
mod requests;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuser::{BackgroundSession, Config, Session, SessionACL};
use parking_lot::Mutex;

use super::mount;
use super::slow_lane::SlowLane;
use crate::error::{Context, Result};
use crate::fs::Fs;

/// Threads for requests that wait for the host's disk.
const SLOW_THREADS: usize = 16;

/// A session of the kernel with the filesystem; ends when the mount goes away.
#[derive(Debug)]
pub struct FuserSession {
    /// Guards the session's threads until somebody waits for them.
    session: Mutex<Option<BackgroundSession>>,
}

impl FuserSession {
    /// Answers the kernel's INIT on a descriptor that has just been mounted and starts `threads` threads. Requests are
    /// answered when this returns.
    ///
    /// # Errors
    /// If the kernel speaks no version of the protocol that we do.
    pub fn start(device: OwnedFd, fs: Arc<Fs>, threads: usize) -> Result<Self> {
        let mut config = Config::default();
        config.n_threads = Some(threads);
        // Each thread opens the device again; a daemon that has become an ordinary user may not be allowed to.
        config.clone_fd = threads > 1 && mount::may_open_device();
        let server = Server { fs, slow: SlowLane::start(SLOW_THREADS)? };
        // The kernel itself checks who may enter, by allow_other and by modes.
        let session = Session::from_fd(server, device, SessionACL::All, config)
            .context(|| "begin the session with the kernel")?;
        let session = session.spawn().context(|| "start the threads of the session")?;
        Ok(Self { session: Mutex::new(Some(session)) })
    }

    /// Waits until the mount has gone away and every request is answered; a second caller does not.
    ///
    /// # Errors
    /// If a thread ended before that.
    pub fn wait(&self) -> Result<()> {
        let taken = self.session.lock().take();
        taken.map_or(Ok(()), BackgroundSession::join).context(|| "answer the kernel's requests")
    }
}

#[derive(Debug)]
struct Server {
    fs: Arc<Fs>,
    slow: SlowLane,
}
