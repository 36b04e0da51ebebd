//! The threads that read requests: which of them waits when is [`super::crew`]'s.
//!
//! They share the descriptors of the connection. The first one waits for requests; of the others every second does, and the
//! rest say at once that there is none. An answer goes to the descriptor from which its request came.
//!
//! A thread with direct requests under way waits for both, their ends and others' beginnings, and answers the ones between
//! reading the others. Where many are under way it so never sleeps, and nobody has to wake it: waking another processor costs
//! 15 to 20 us in a virtual machine, which was most of what a request took (overwrites of 4 KiB, QD32: 1.7 × as many as with
//! a thread for the ends).

use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, available_parallelism};
use std::time::{Duration, Instant};

use super::buffers::{RequestBuffer, SpareBuffers};
use super::channel::{Channel, Received};
use super::crew::{Crew, Hand};
use super::direct::{Direct, GATHERED_MAX};
use super::rounds::{Ready, Rounds};
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
        let processors = available_parallelism().map_or(1, NonZero::get);
        let crew = Arc::new(Crew::new(threads, processors));
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
                let rounds = Rounds::new(server.direct(), looks.as_ref());
                let reader = Reader {
                    waits: channel,
                    waits_now,
                    looks: looks.as_ref(),
                    helps: number > 0,
                    rounds,
                    crew,
                    hand,
                    server,
                    buffers,
                };
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
                let on_idle = || {
                    buffers.discard();
                    server.shrink();
                };
                crew.watch(|| server.direct().reap(), on_idle);
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

    /// Takes on the threads of `others` that have not ended yet, for [`Readers::stop`] to wait for.
    pub(super) fn adopt(&mut self, others: &mut Self) {
        self.threads.extend(others.threads.drain(..).filter(|thread| !thread.handle.is_finished()));
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
    looks: Option<&'a Arc<Channel>>,
    /// Whether it is there to help the first one.
    helps: bool,
    rounds: Rounds<'a>,
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
            if self.go_round(&mut buffer)? {
                return Ok(());
            }
            done = done.wrapping_add(1);
            if done.is_multiple_of(LOOK_EVERY) && self.waits.has_request() {
                self.crew.call_help();
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
            let (channel, received) = match self.looks {
                _ if self.hand.stays() => (&self.waits, self.wait(buffer)?),
                Some(channel) => (channel, receive(channel, buffer)?),
                None if self.waits.has_request() => (&self.waits, self.wait(buffer)?),
                None => return Ok(false),
            };
            match received {
                Received::Bytes(count) => self.serve(channel, count, buffer),
                Received::Nothing => return Ok(false),
                Received::Ended => return Ok(true),
            }
            if self.go_round(buffer)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Goes round while direct requests of this thread are under way; says whether the mount has gone away.
    fn go_round(&self, buffer: &mut RequestBuffer) -> Result<bool> {
        match (self.looks, self.rounds.direct()) {
            (Some(channel), Some(direct)) if direct.is_busy() => {
                self.hand.bind(true);
                let ended = self.crew.rounding(|| self.rounds(channel, direct, buffer));
                self.hand.bind(false);
                ended
            }
            _ => Ok(false),
        }
    }

    fn rounds(&self, channel: &Arc<Channel>, direct: &Direct, buffer: &mut RequestBuffer) -> Result<bool> {
        let mut ready = Ready { requests: true, ended: false };
        while direct.is_busy() {
            self.crew.note_round();
            if self.crew.is_stopped() {
                direct.drain();
                break;
            }
            if ready.requests {
                match self.read_some(channel, buffer)? {
                    Received::Bytes(_) => self.crew.call_help(),
                    Received::Nothing => ready.requests = false,
                    Received::Ended => return Ok(true),
                }
            }
            direct.submit();
            if ready.requests || ready.ended {
                ready.ended = direct.reap(false);
            } else if self.helps && self.crew.is_crowded() {
                direct.drain();
            } else {
                ready = self.waiting(|| self.rounds.wait()).context(|| "wait for a request")?;
            }
        }
        Ok(false)
    }

    /// Reads as many requests as are put to the kernel at once; what the last look for one came to.
    fn read_some(&self, channel: &Arc<Channel>, buffer: &mut RequestBuffer) -> Result<Received> {
        let mut last = Received::Nothing;
        for _ in 0..GATHERED_MAX {
            last = receive(channel, buffer)?;
            let Received::Bytes(count) = last else { break };
            self.serve(channel, count, buffer);
        }
        Ok(last)
    }

    fn wait(&self, buffer: &mut RequestBuffer) -> Result<Received> {
        self.waiting(|| receive(&self.waits, buffer))
    }

    fn waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.waits_now.store(true, Ordering::Relaxed);
        let result = self.crew.waiting(wait);
        self.waits_now.store(false, Ordering::Relaxed);
        result
    }

    fn serve(&self, channel: &Arc<Channel>, count: usize, buffer: &mut RequestBuffer) {
        self.crew.note_request();
        let serve = || self.server.serve(&self.hand, &self.rounds, channel, count, buffer);
        // The hook has told of the panic, and EIO was answered as it unwound. This thread must serve the next.
        let _ = catch_unwind(AssertUnwindSafe(serve));
    }
}

fn receive(channel: &Channel, buffer: &mut RequestBuffer) -> Result<Received> {
    channel.receive(buffer.bytes()).context(|| "read a request")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// A second attempt to hand over went on while they still had requests under way.
    #[test]
    fn threads_left_over_from_a_stop_that_failed_are_waited_for_by_the_next() {
        super::super::wake::prepare().unwrap();
        let tally = Arc::new(Tally::default());
        let none = || Readers { crew: Arc::new(Crew::new(1, 1)), threads: Vec::new() };
        let (release, released) = channel::<()>();
        let (mut old, mut new) = (none(), none());
        let work = move || {
            let _ = released.recv();
            Ok(())
        };
        old.spawn("left over".to_owned(), &tally, Arc::default(), work).unwrap();
        assert!(!old.stop(Instant::now()));
        new.adopt(&mut old);
        assert!(!new.stop(Instant::now()));
        drop(release);
        assert!(new.stop(Instant::now() + Duration::from_secs(60)));
    }
}
