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
    /// Whether the kernel sends what this process leaves unanswered to the next one.
    can_resend: bool,
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
        server.direct().try_rings();
        begin();
        if unanswered != Unanswered::Leave {
            connection.resend()?;
        }
        let can_resend = connection.can_resend();
        let channels: Vec<_> = connection.into_channels().map(Arc::new).collect();
        let tally = Arc::new(Tally::default());
        let readers = Readers::start(&channels, threads, &server, &tally)?;
        Ok(Self { server, channels, threads, can_resend, tally, readers: Mutex::new(readers) })
    }

    /// Waits until the mount has gone away and every request is answered. Never returns once it was handed over.
    ///
    /// # Errors
    /// If a thread has failed. The others still serve then, and this process is to end, so that the next one can. Where the
    /// kernel could not send it what this one leaves unanswered, only once all of them have ended.
    pub fn wait(&self) -> Result<()> {
        let what = || "answer the kernel's requests";
        if let Err(error) = self.tally.wait_for_failure() {
            if self.can_resend {
                return Err(error).context(what);
            }
            log::error!(
                "{error}; the others go on as they can, for on this kernel no process could take over"
            );
            // Of what ends the others the first was the cause, or it was told in the log.
            let _ = self.tally.wait_for_all();
            self.server.finish(None);
            return Err(error).context(what);
        }
        self.server.finish(None);
        Ok(())
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
        let mut again = again?;
        // Some may still answer what they had read.
        again.adopt(&mut readers);
        *readers = again;
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

    /// Waits until one has failed, or none is left. Not while another process is to take over.
    pub(super) fn wait_for_failure(&self) -> Result<()> {
        self.wait(|state| state.threads == 0 || state.failure.is_some())
    }

    /// The same until none is left.
    fn wait_for_all(&self) -> Result<()> {
        self.wait(|state| state.threads == 0)
    }

    fn wait(&self, has_ended: impl Fn(&State) -> bool) -> Result<()> {
        let mut state = self.state.lock();
        while state.handing_over || !has_ended(&state) {
            self.changed.wait(&mut state);
        }
        state.failure.take().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::sync::mpsc::channel;
    use std::thread;

    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
    use zerocopy::{FromBytes, IntoBytes};

    use super::super::init::{self, Road};
    use super::super::wire::{FsyncIn, InHeader, InitIn, OutHeader, opcode};
    use super::*;
    use crate::fs::AGREED_BYTES;
    use crate::store::Store;

    /// How long what must come may take.
    const LONG: Duration = Duration::from_secs(60);

    /// A session of four threads. Two read what the test sends by the socket; the others, when they are called, read from a
    /// folder, which fails.
    fn with_a_thread_that_fails(can_resend: bool) -> (Arc<DevFuseSession>, OwnedFd) {
        let offer = InitIn { major: 7, minor: 45, max_readahead: 0, flags: u32::MAX };
        let flags2 = if can_resend { u32::MAX } else { 0 };
        let agreed = init::negotiate(&offer, flags2, Road::Device { passthrough: false }).unwrap().unwrap();
        let agreed: [u8; AGREED_BYTES] = agreed.as_bytes().try_into().unwrap();
        let (device, kernel) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let store = tempfile::tempdir().unwrap();
        let folder = OwnedFd::from(File::open(store.path()).unwrap());
        let connection = Connection::take_over(vec![device, folder], &agreed).unwrap();
        let fs = Arc::new(Fs::new(Store::init(store.path()).unwrap()).unwrap());
        let session = DevFuseSession::start(connection, fs, 4, Unanswered::Leave, || {}).unwrap();
        (Arc::new(session), kernel)
    }

    fn ask(kernel: &OwnedFd, opcode: u32, body: &[u8]) {
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let header = InHeader { len, opcode, unique: 9, nodeid: 1, ..InHeader::default() };
        send(kernel, &[header.as_bytes(), body].concat(), SendFlags::NOSIGNAL).unwrap();
    }

    /// Asks for what a thread may wait for, so that it calls another to read meanwhile, until `happened`.
    fn press_until(kernel: &OwnedFd, happened: impl Fn() -> bool) {
        let until = Instant::now() + LONG;
        while !happened() {
            assert!(Instant::now() < until, "nothing happens");
            ask(kernel, opcode::FSYNC, FsyncIn { fh: 1, fsync_flags: 0, padding: 0 }.as_bytes());
            assert_refused(kernel, libc::EBADF);
        }
    }

    fn assert_refused(kernel: &OwnedFd, errno: i32) {
        let mut answer = [0; size_of::<OutHeader>()];
        recv(kernel, &mut answer, RecvFlags::empty()).unwrap();
        let answer = OutHeader::read_from_bytes(&answer).unwrap();
        assert_eq!((answer.unique, answer.error), (9, -errno));
    }

    fn assert_is_answered(kernel: &OwnedFd) {
        ask(kernel, 9999, b"");
        assert_refused(kernel, libc::ENOSYS);
    }

    /// A thread that had failed was missed by nobody until the others had ended, too.
    #[test]
    fn one_thread_that_fails_ends_the_session_for_the_next_process() {
        let (session, kernel) = with_a_thread_that_fails(true);
        let (ended, end) = channel();
        let waiting = Arc::clone(&session);
        let waiter = thread::spawn(move || ended.send(waiting.wait()).unwrap());
        press_until(&kernel, || waiter.is_finished());
        let error = end.recv().unwrap().unwrap_err();
        assert!(error.to_string().starts_with("answer the kernel's requests: read a request"), "{error}");
        // Until this process has gone.
        assert_is_answered(&kernel);
        assert!(session.readers.lock().stop(Instant::now() + LONG));
    }

    #[test]
    fn where_no_process_can_take_over_a_session_ends_with_its_last_thread() {
        let (session, kernel) = with_a_thread_that_fails(false);
        let waiting = Arc::clone(&session);
        let waiter = thread::spawn(move || waiting.wait());
        // The two that read from the socket, and the watch.
        press_until(&kernel, || session.tally.state.lock().threads == 3);
        assert_is_answered(&kernel);
        assert!(!waiter.is_finished());
        assert!(session.readers.lock().stop(Instant::now() + LONG));
        let error = waiter.join().unwrap().unwrap_err();
        assert!(error.to_string().starts_with("answer the kernel's requests: read a request"), "{error}");
    }

    #[test]
    fn a_session_whose_threads_end_one_after_the_other_has_ended_with_the_last() {
        let tally = Arc::new(Tally::default());
        (0..3).for_each(|_| tally.begin());
        let waiting = Arc::clone(&tally);
        let waiter = thread::spawn(move || waiting.wait_for_failure());
        tally.end(Ok(()));
        tally.end(Ok(()));
        assert!(!waiter.is_finished());
        tally.end(Ok(()));
        waiter.join().unwrap().unwrap();
    }

    #[test]
    fn what_fails_while_another_process_is_to_take_over_counts_once_it_does_not() {
        let tally = Arc::new(Tally::default());
        (0..2).for_each(|_| tally.begin());
        tally.begin_handing_over();
        let waiting = Arc::clone(&tally);
        let waiter = thread::spawn(move || waiting.wait_for_failure());
        tally.end(Ok(()));
        tally.end(Err(Error::new(ErrorKind::Io, "a thread")));
        assert!(!waiter.is_finished());
        tally.begin();
        tally.end_handing_over();
        assert_eq!(waiter.join().unwrap().unwrap_err().to_string(), "a thread");
    }
}
