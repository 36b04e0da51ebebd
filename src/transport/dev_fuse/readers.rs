//! The threads that read requests: which of them waits when is [`super::crew`]'s.
//!
//! They share the descriptors of the connection. The first one waits for requests; of the others every second does, and the
//! rest say at once that there is none. An answer goes to the descriptor from which its request came.

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::buffers::{RequestBuffer, SpareBuffers};
use super::channel::{Channel, Received};
use super::crew::{Crew, Hand};
use super::serve::Server;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::transport::scratch;

/// After so many requests the first thread looks whether more wait than it can do.
const LOOK_EVERY: u32 = 8;

/// The threads of a session; they end when the mount goes away.
#[derive(Debug)]
pub struct Readers {
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Readers {
    /// Starts `threads` threads, at least one, on `channels`, of which there is at least one that waits; the first does.
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub fn start(channels: Vec<Arc<Channel>>, threads: usize, server: Arc<Server>) -> Result<Self> {
        let (waiting, others): (Vec<_>, Vec<_>) = channels.into_iter().partition(|channel| channel.waits());
        let crew = Arc::new(Crew::new(threads));
        let buffers = Arc::new(SpareBuffers::new(threads));
        let mut readers = Self { threads: Vec::new() };
        let mut start = |name: String, work: Box<dyn FnOnce() -> Result<()> + Send>| -> Result<()> {
            let thread = std::thread::Builder::new().name(name).spawn(work);
            readers.threads.push(thread.context(|| "start a thread of the session")?);
            Ok(())
        };
        for number in 0..threads {
            let waits = Arc::clone(&waiting[number % waiting.len()]);
            let looks = others.get(number % others.len().max(1)).map(Arc::clone);
            let (crew, server, buffers) = (Arc::clone(&crew), Arc::clone(&server), Arc::clone(&buffers));
            let work = move || {
                let hand = Hand::of(&crew);
                let reader = Reader { waits, looks, crew: &crew, hand, server: &server, buffers: &buffers };
                if number > 0 {
                    return reader
                        .help()
                        .inspect_err(|error| log::error!("a thread of the session: {error}"));
                }
                let _ends = Ends(&crew);
                reader.lead()
            };
            start(format!("fuse-{number}"), Box::new(work))?;
        }
        if threads > 1 {
            let watch = move || {
                crew.watch(|| {
                    buffers.discard();
                    server.shrink();
                });
                Ok(())
            };
            start("fuse-watch".to_owned(), Box::new(watch))?;
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
    /// Where it looks whether there is one. `None` if the user who mounted may open the device only once.
    looks: Option<Arc<Channel>>,
    crew: &'a Crew,
    hand: Hand<'a>,
    server: &'a Server,
    buffers: &'a SpareBuffers,
}

impl Reader<'_> {
    /// Reads requests and does them until the mount goes away.
    fn lead(&self) -> Result<()> {
        let mut buffer = RequestBuffer::new();
        let mut done = 0u32;
        loop {
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
        loop {
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
    }

    fn wait(&self, buffer: &mut RequestBuffer) -> Result<Received> {
        self.crew.waiting(|| receive(&self.waits, buffer))
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
