//! The threads that read requests: which of them waits when is [`super::crew`]'s.
//!
//! They share the descriptors of the connection. The first one waits for requests; of the others every second does, and the
//! rest say at once that there is none. An answer goes to the descriptor from which its request came.

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::buffers::{RequestBuffer, SpareBuffers};
use super::channel::{Channel, Received};
use super::crew::{Crew, Hand};
use super::serve::Server;
use super::session::Tally;
use super::wake::wake;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::transport::scratch;

/// After so many requests the first thread looks whether more wait than it can do.
const LOOK_EVERY: u32 = 8;

/// How often threads that are to stop, and wait for a request, are woken.
const STOP_PAUSE: Duration = Duration::from_millis(1);

/// The threads of a session; they end when the mount goes away, or when they are [stopped](Readers::stop).
#[derive(Debug)]
pub struct Readers {
    crew: Arc<Crew>,
    threads: Vec<Thread>,
}

#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    /// Whether it waits in the kernel for a request: only then is it woken, for a signal might cut short what else it does.
    waits: Arc<AtomicBool>,
}

impl Readers {
    /// Starts `threads` threads, at least one, on `channels`, of which there is at least one that waits; the first does.
    /// `tally` is told of each and of its end.
    ///
    /// # Errors
    /// If the host refuses a thread; `tally` is told then, too.
    pub(super) fn start(
        channels: &[Arc<Channel>],
        threads: usize,
        server: &Arc<Server>,
        tally: &Arc<Tally>,
    ) -> Result<Self> {
        let (waiting, others): (Vec<_>, Vec<_>) = channels.iter().partition(|channel| channel.waits());
        let crew = Arc::new(Crew::new(threads));
        let buffers = Arc::new(SpareBuffers::new(threads));
        let mut readers = Self { crew: Arc::clone(&crew), threads: Vec::new() };
        for number in 0..threads {
            let channel = Arc::clone(waiting[number % waiting.len()]);
            let looks = others.get(number % others.len().max(1)).map(|channel| Arc::clone(channel));
            let (crew, server, buffers) = (Arc::clone(&crew), Arc::clone(server), Arc::clone(&buffers));
            let waits = Arc::new(AtomicBool::new(false));
            let work_waits = Arc::clone(&waits);
            let work = move || {
                let (hand, waits_now) = (Hand::of(&crew), &*work_waits);
                let (crew, server, buffers) = (&*crew, &*server, &*buffers);
                let reader = Reader { waits: channel, waits_now, looks, crew, hand, server, buffers };
                if number > 0 {
                    return reader
                        .help()
                        .inspect_err(|error| log::error!("a thread of the session: {error}"));
                }
                let _ends = Ends(crew);
                reader.lead()
            };
            readers.spawn(format!("fuse-{number}"), tally, waits, work)?;
        }
        if threads > 1 {
            let server = Arc::clone(server);
            let watch = move || {
                crew.watch(|| {
                    buffers.discard();
                    server.shrink();
                });
                Ok(())
            };
            readers.spawn("fuse-watch".to_owned(), tally, Arc::default(), watch)?;
        }
        Ok(readers)
    }

    fn spawn(
        &mut self,
        name: String,
        tally: &Arc<Tally>,
        waits: Arc<AtomicBool>,
        work: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        tally.begin();
        let told = Arc::clone(tally);
        let work = move || {
            let ended = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_told| {
                Err(Error::new(ErrorKind::Io, "a thread of the session panicked, which is a bug in cowdisk"))
            });
            told.end(ended);
        };
        match std::thread::Builder::new().name(name).spawn(work) {
            Ok(handle) => {
                self.threads.push(Thread { handle, waits });
                Ok(())
            }
            Err(error) => {
                let what = "start a thread of the session";
                tally.end(Err(Error::io(what, std::io::Error::from(error.kind()))));
                self.crew.stop();
                Err(error).context(|| what)
            }
        }
    }

    /// Has all threads end as soon as they have done what they had read, and says whether they have until `until`. One that
    /// has not ends later.
    pub(super) fn stop(&self, until: Instant) -> bool {
        self.crew.stop();
        loop {
            let mut left = self.threads.iter().filter(|thread| !thread.handle.is_finished()).peekable();
            if left.peek().is_none() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            // One that is only about to wait is woken the next time.
            left.filter(|thread| thread.waits.load(Ordering::SeqCst)).for_each(|thread| wake(&thread.handle));
            std::thread::sleep(STOP_PAUSE);
        }
    }
}

/// Held by the first thread; tells the others, when it is dropped, that the session has ended.
struct Ends<'a>(&'a Crew);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// One thread that reads requests.
struct Reader<'a> {
    /// Where it waits for one.
    waits: Arc<Channel>,
    /// Whether it does.
    waits_now: &'a AtomicBool,
    /// Where it looks whether there is one. `None` if the user who mounted may open the device only once.
    looks: Option<Arc<Channel>>,
    crew: &'a Crew,
    hand: Hand<'a>,
    server: &'a Server,
    buffers: &'a SpareBuffers,
}

impl Reader<'_> {
    /// Reads requests and does them until the mount goes away or it is to stop.
    fn lead(&self) -> Result<()> {
        let mut buffer = RequestBuffer::new();
        let mut done = 0u32;
        while !self.crew.is_stopped() {
            match self.wait(&mut buffer)? {
                Received::Bytes(count) => self.serve(&self.waits, count, &mut buffer),
                Received::Nothing => {}
                Received::Ended => return Ok(()),
            }
            done = done.wrapping_add(1);
            if done.is_multiple_of(LOOK_EVERY) && has_request(&self.waits) {
                self.crew.call();
            }
        }
        Ok(())
    }

    /// Sleeps until called, then reads requests and does them until none is left; until the mount goes away.
    fn help(&self) -> Result<()> {
        while self.crew.sleep() {
            // There are as many as there are threads.
            let Some(mut buffer) = self.buffers.take() else { continue };
            let ended = self.read_on(&mut buffer)?;
            self.buffers.put(buffer);
            if ended {
                break;
            }
            scratch::shrink();
        }
        Ok(())
    }

    /// Reads requests and does them as long as there are any; says whether the mount has gone away.
    fn read_on(&self, buffer: &mut RequestBuffer) -> Result<bool> {
        while !self.crew.is_stopped() {
            let (channel, received) = match &self.looks {
                _ if self.hand.stays() => (&self.waits, self.wait(buffer)?),
                Some(channel) => (channel, receive(channel, buffer)?),
                None if has_request(&self.waits) => (&self.waits, self.wait(buffer)?),
                None => return Ok(false),
            };
            match received {
                Received::Bytes(count) => self.serve(channel, count, buffer),
                Received::Nothing => return Ok(false),
                Received::Ended => return Ok(true),
            }
        }
        Ok(false)
    }

    fn wait(&self, buffer: &mut RequestBuffer) -> Result<Received> {
        self.waits_now.store(true, Ordering::Relaxed);
        let received = self.crew.waiting(|| receive(&self.waits, buffer));
        self.waits_now.store(false, Ordering::Relaxed);
        received
    }

    fn serve(&self, channel: &Arc<Channel>, count: usize, buffer: &mut RequestBuffer) {
        self.crew.note_request();
        let serve = || self.server.serve(&self.hand, channel, count, buffer);
        // The hook has told of the panic, and EIO was answered as it unwound. This thread must serve the next.
        let _ = catch_unwind(AssertUnwindSafe(serve));
    }
}

fn receive(channel: &Channel, buffer: &mut RequestBuffer) -> Result<Received> {
    channel.receive(buffer.bytes()).context(|| "read a request")
}

/// Whether a request waits to be read, or the mount has gone away.
fn has_request(channel: &Channel) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(count) if count > 0)
}
