//! The session of one process with the kernel, which ends with the mount or is handed over to another process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::channel::Channel;
use super::connection::{Connection, Unanswered};
use super::readers::Readers;
use super::serve::Server;
use super::wake;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Fs;

/// A session of the kernel with the filesystem; ends when the mount goes away.
#[derive(Debug)]
pub struct DevFuseSession {
    server: Arc<Server>,
    channels: Vec<Arc<Channel>>,
    threads: usize,
    tally: Arc<Tally>,
    /// Guards the threads that read requests, while they are stopped and others are started.
    readers: Mutex<Readers>,
}

impl DevFuseSession {
    /// Starts `threads` threads, at least 1, that read from the descriptors of `connection`. Requests are answered when this
    /// returns. What becomes of those that an earlier process has left, `unanswered` says. `begin` is called just before the first
    /// one is read.
    ///
    /// # Errors
    /// Those of the host.
    pub fn start(
        connection: Connection,
        fs: Arc<Fs>,
        threads: usize,
        unanswered: Unanswered,
        begin: impl FnOnce(),
    ) -> Result<Self> {
        wake::prepare()?;
        let server = Arc::new(Server::new(fs, unanswered)?);
        begin();
        if unanswered != Unanswered::Leave {
            connection.resend()?;
        }
        let channels: Vec<_> = connection.into_channels().map(Arc::new).collect();
        let tally = Arc::new(Tally::default());
        let readers = Readers::start(&channels, threads, &server, &tally)?;
        Ok(Self { server, channels, threads, tally, readers: Mutex::new(readers) })
    }

    /// Waits until the mount has gone away and every request is answered. Never returns once it was handed over.
    ///
    /// # Errors
    /// If a thread ended before that.
    pub fn wait(&self) -> Result<()> {
        let result = self.tally.wait();
        self.server.finish(None);
        result.context(|| "answer the kernel's requests")
    }

    /// Stops reading requests and answers all that were read, so that another process can take over when this one has
    /// ended. Requests wait meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if some are not answered within `patience`; requests are read again then. Those of
    /// [`DevFuseSession::take_back`].
    pub fn hand_over(&self, patience: Duration) -> Result<()> {
        let until = Instant::now() + patience;
        self.tally.begin_handing_over();
        if self.readers.lock().stop(until) && self.server.finish(Some(until)) {
            return Ok(());
        }
        self.take_back()?;
        Err(unanswered_after(patience))
    }

    /// Reads requests again after [`DevFuseSession::hand_over`].
    ///
    /// # Errors
    /// If there are no threads to be had; [`DevFuseSession::wait`] returns that, too.
    pub fn take_back(&self) -> Result<()> {
        let mut readers = self.readers.lock();
        let again = Readers::start(&self.channels, self.threads, &self.server, &self.tally);
        self.tally.end_handing_over();
        *readers = again?;
        Ok(())
    }
}

/// Why a session is not handed over.
pub(super) fn unanswered_after(patience: Duration) -> Error {
    let message = format!("some requests still wait for the host's disk after {} s", patience.as_secs());
    Error::new(ErrorKind::Busy, message)
}

/// How many threads of a session there are, and whether one has failed.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Guards the numbers; held for an instant.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    threads: usize,
    failure: Option<Error>,
    /// That no thread is left is no end then.
    handing_over: bool,
}

impl Tally {
    /// A thread begins.
    pub(super) fn begin(&self) {
        self.state.lock().threads += 1;
    }

    /// One has ended, or could not begin.
    pub(super) fn end(&self, result: Result<()>) {
        let mut state = self.state.lock();
        state.threads -= 1;
        state.failure = state.failure.take().or(result.err());
        self.changed.notify_all();
    }

    fn begin_handing_over(&self) {
        self.state.lock().handing_over = true;
    }

    fn end_handing_over(&self) {
        self.state.lock().handing_over = false;
        self.changed.notify_all();
    }

    /// Waits until one has failed, or none is left.
    pub(super) fn wait_for_failure(&self) -> Result<()> {
        let mut state = self.state.lock();
        while state.threads > 0 && state.failure.is_none() {
            self.changed.wait(&mut state);
        }
        state.failure.take().map_or(Ok(()), Err)
    }

    fn wait(&self) -> Result<()> {
        let mut state = self.state.lock();
        while state.threads > 0 || state.handing_over {
            self.changed.wait(&mut state);
        }
        state.failure.take().map_or(Ok(()), Err)
    }
}
