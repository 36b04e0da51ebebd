//! The threads that read requests.
//!
//! One thread, the first, waits in the kernel for requests. At queue depth 1 that is the fastest: it stays on its
//! processor, and no other is woken in vain. The others sleep until there is more than it can do:
//!
//! - after every few requests it looks whether another one waits already, and wakes a sleeper if so;
//! - a watch looks every [`WATCH`] whether any thread waits for requests. If all of those that are awake are held up (by the
//!   host writing back, say), it wakes a sleeper, so that nobody's guest waits for another's.
//!
//! A woken thread reads from a descriptor of its own until nothing is left, and sleeps again; but if it finds that nobody
//! else waits for requests, it does so itself for a while. The watch sleeps, too, when nothing is asked for.

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::buffers::RequestBuffer;
use super::channel::{Channel, Received};
use super::serve::Server;
use crate::error::{Context, Error, ErrorKind, Result};

/// After so many requests the first thread looks whether more wait than it can do.
const LOOK_EVERY: u32 = 8;

/// How often the watch looks whether anybody waits for requests.
const WATCH: Duration = Duration::from_millis(2);

/// After so many looks at a session that is asked for nothing the watch sleeps.
const IDLE_LOOKS: u32 = 50;

/// How long a thread that was woken because nobody waited for requests waits for one.
const STAND_IN: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// What the threads of a session share.
#[derive(Debug, Default)]
struct Shared {
    /// Threads that wait for a request.
    waiting: AtomicUsize,
    /// Whether a request came since the watch last looked.
    active: AtomicBool,
    /// Whether the watch sleeps.
    watch_sleeps: AtomicBool,
    /// Guards who sleeps and how many were called; held for an instant.
    sleepers: Mutex<Sleepers>,
    /// Somebody was called, or the session has ended.
    called: Condvar,
    /// The watch has something to do again, or the session has ended.
    watch_called: Condvar,
}

#[derive(Debug, Default)]
struct Sleepers {
    asleep: usize,
    calls: usize,
    ended: bool,
}

/// The threads of a session; they end when the mount goes away.
#[derive(Debug)]
pub struct Readers {
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Readers {
    /// Starts a thread for each of `channels`, at least one. The first channel's read waits, those of the others do not:
    /// see [`Channel::receive`].
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub fn start(channels: Vec<Arc<Channel>>, server: Arc<Server>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut readers = Self { threads: Vec::new() };
        let mut start = |name: String, work: Box<dyn FnOnce() -> Result<()> + Send>| -> Result<()> {
            let thread = std::thread::Builder::new().name(name).spawn(work);
            readers.threads.push(thread.context(|| "start a thread of the session")?);
            Ok(())
        };
        let several = channels.len() > 1;
        for (number, channel) in channels.into_iter().enumerate() {
            let (shared, server) = (Arc::clone(&shared), Arc::clone(&server));
            let work = move || {
                let reader = Reader { channel, shared: &shared, server: &server };
                if number > 0 {
                    return reader
                        .help()
                        .inspect_err(|error| log::error!("a thread of the session: {error}"));
                }
                let _ends = Ends(&shared);
                reader.lead()
            };
            start(format!("fuse-{number}"), Box::new(work))?;
        }
        if several {
            let shared = Arc::clone(&shared);
            start(
                "fuse-watch".to_owned(),
                Box::new(move || {
                    shared.watch();
                    Ok(())
                }),
            )?;
        }
        Ok(readers)
    }

    /// Waits until all have ended.
    ///
    /// # Errors
    /// If one ended before the mount went away.
    pub fn wait(self) -> Result<()> {
        let mut result = Ok(());
        for thread in self.threads {
            let ended = thread.join().unwrap_or_else(|_told| {
                Err(Error::new(ErrorKind::Io, "a thread of the session panicked, which is a bug in cowdisk"))
            });
            result = result.and(ended);
        }
        result.context(|| "answer the kernel's requests")
    }
}

/// Held by the first thread; tells the others, when it is dropped, that the session has ended.
struct Ends<'a>(&'a Shared);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.sleepers.lock().ended = true;
        self.0.called.notify_all();
        self.0.watch_called.notify_all();
    }
}

impl Shared {
    /// Wakes a sleeper, if there is one that was not called yet.
    fn call(&self) {
        let mut sleepers = self.sleepers.lock();
        if sleepers.asleep > sleepers.calls {
            sleepers.calls += 1;
            self.called.notify_one();
        }
    }

    /// Sleeps until called; says whether the session goes on.
    fn sleep(&self) -> bool {
        let mut sleepers = self.sleepers.lock();
        sleepers.asleep += 1;
        while sleepers.calls == 0 && !sleepers.ended {
            self.called.wait(&mut sleepers);
        }
        sleepers.asleep -= 1;
        sleepers.calls = sleepers.calls.saturating_sub(1);
        !sleepers.ended
    }

    /// Notes that a request came, and wakes the watch if it sleeps.
    fn note_request(&self) {
        // Looked at first: a store to a line that every thread shares costs more than a load.
        if self.active.load(Ordering::Relaxed) {
            return;
        }
        // In one order with the watch: it falls asleep first and looks at `active` then.
        self.active.store(true, Ordering::SeqCst);
        if self.watch_sleeps.load(Ordering::SeqCst) {
            let _held = self.sleepers.lock();
            self.watch_called.notify_one();
        }
    }

    fn watch(&self) {
        let mut idle = 0;
        let mut sleepers = self.sleepers.lock();
        while !sleepers.ended {
            if idle < IDLE_LOOKS {
                self.watch_called.wait_for(&mut sleepers, WATCH);
            } else {
                self.watch_sleeps.store(true, Ordering::SeqCst);
                if !self.active.load(Ordering::SeqCst) {
                    self.watch_called.wait(&mut sleepers);
                }
                self.watch_sleeps.store(false, Ordering::SeqCst);
            }
            let nobody = self.waiting.load(Ordering::Relaxed) == 0;
            idle = if self.active.swap(false, Ordering::SeqCst) || nobody { 0 } else { idle + 1 };
            if nobody && sleepers.asleep > sleepers.calls {
                sleepers.calls += 1;
                self.called.notify_one();
            }
        }
    }
}

/// One thread that reads requests.
struct Reader<'a> {
    channel: Arc<Channel>,
    shared: &'a Shared,
    server: &'a Server,
}

impl Reader<'_> {
    /// Reads requests and does them until the mount goes away.
    fn lead(&self) -> Result<()> {
        let (mut buffer, mut scratch) = (RequestBuffer::new(), RequestBuffer::new());
        let mut done = 0u32;
        loop {
            self.shared.waiting.fetch_add(1, Ordering::Relaxed);
            let received = self.channel.receive(buffer.bytes());
            self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
            match received.context(|| "read a request")? {
                Received::Bytes(count) => self.serve(count, &mut buffer, &mut scratch),
                Received::Nothing => {}
                Received::Ended => return Ok(()),
            }
            done = done.wrapping_add(1);
            if done.is_multiple_of(LOOK_EVERY) && self.has_request(&Timespec { tv_sec: 0, tv_nsec: 0 }) {
                self.shared.call();
            }
        }
    }

    /// Sleeps until called, then reads requests and does them until none is left; until the mount goes away.
    fn help(&self) -> Result<()> {
        let (mut buffer, mut scratch) = (RequestBuffer::new(), RequestBuffer::new());
        while self.shared.sleep() {
            loop {
                match self.channel.receive(buffer.bytes()).context(|| "read a request")? {
                    Received::Bytes(count) => self.serve(count, &mut buffer, &mut scratch),
                    Received::Nothing if self.stand_in() => {}
                    Received::Nothing => break,
                    Received::Ended => return Ok(()),
                }
            }
        }
        Ok(())
    }

    fn serve(&self, count: usize, buffer: &mut RequestBuffer, scratch: &mut RequestBuffer) {
        self.shared.note_request();
        let serve = || self.server.serve(&self.channel, count, buffer, scratch.payload_mut());
        // The hook has told of the panic, and EIO was answered as it unwound. This thread must serve the next.
        let _ = catch_unwind(AssertUnwindSafe(serve));
    }

    /// Waits for a request if nobody else does; says whether one came.
    fn stand_in(&self) -> bool {
        if self.shared.waiting.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return false;
        }
        let came = self.has_request(&STAND_IN);
        self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        came
    }

    /// Whether a request waits to be read, or comes within `patience`, or the mount has gone away.
    fn has_request(&self, patience: &Timespec) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::IN)];
        matches!(poll(&mut fds, Some(patience)), Ok(count) if count > 0)
    }
}
