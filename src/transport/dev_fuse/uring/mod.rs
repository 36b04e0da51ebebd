//! FUSE over io_uring: requests come by rings instead of reads of `/dev/fuse`, and answers go by them.
//!
//! The kernel has a queue for each processor and puts a request into that of the processor on which the caller runs. A
//! queue holds *entries*: memory of ours for one request and its answer, which pass to and fro (`memory.rs`, `entry.rs`). A
//! thread per processor has a ring for the entries of its queue (`ring.rs`), so that a request is done where it was made,
//! and one system call hands in any number of answers and fetches as many requests. What it does itself and what others
//! do is as in the parent folder (`serve.rs`). FORGET and INTERRUPT still come by the device, which one thread reads.
//!
//! As many requests of a processor as its queue has entries can be under way; others wait in the kernel.
//!
//! Another process can take such a connection over if this one hands it over: the kernel finds the entry of an answer by the number
//! of its request, whichever ring it comes from. So this process halts its rings (`halt.rs`) once they have all entries, of
//! which some hold answers and others requests with which nobody has begun; to get them the keeper asks for something on each
//! processor (`nudge.rs`). Then it ends. The next process hands in the answers and does the requests, and so has the entries.
//! As long as nobody has any, requests wait in the kernel. The kernel does not send again what a ring has fetched, so if a
//! process that serves dies, the mount is cut off.
//!
//! Direct reads of a disk's own data are operations of the ring. Other backing reads, and writes, are blocking calls of threads
//! here, too: the engine does most writes in steps (room, copy-up, state) that would have to become a machine of states, and
//! what a ring writes may land after its process has gone.

mod entry;
mod halt;
mod memory;
mod nudge;
mod processors;
mod ring;
mod serve;

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use entry::Entry;
pub use nudge::{Nudged, nudge};

use super::channel::Channel;
use super::connection::{Connection, Unanswered};
use super::readers::Readers;
use super::serve::Server;
use super::session::{Tally, unanswered_after};
use super::wake;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Fs;
use entry::Desk;
use halt::Halt;
use memory::Memory;
use ring::Ring;

/// Whether the kernel lets mounts ask for io_uring: `Y` or `N`.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// Most entries of a queue.
const DEPTH_MAX: usize = 64;
/// Fewest entries of a queue.
const DEPTH_MIN: usize = 4;
/// Entries of all queues together, if that leaves each [`DEPTH_MIN`]: each may come to hold 1 MiB of memory.
const ENTRIES: usize = 1024;

/// Whether this host can serve by io_uring; nothing is changed.
///
/// # Errors
/// [`ErrorKind::Unsupported`], with what to do about it.
pub fn require() -> Result<()> {
    judge_switch(std::fs::read_to_string(SWITCH))?;
    ring::build(1).map(drop)
}

/// Judges what [`SWITCH`] says.
fn judge_switch(said: std::io::Result<String>) -> Result<()> {
    let refused = |message: &str, hint: String| {
        Err(Error::new(ErrorKind::Unsupported, format!("transport io_uring: {message}")).with_hint(hint))
    };
    match said {
        Ok(text) if text.trim() == "Y" => Ok(()),
        Ok(_) => refused(
            "the kernel's FUSE has io_uring switched off",
            format!("switch it on as root, for all mounts of this host: echo Y > {SWITCH}"),
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => refused(
            "the kernel's FUSE has no io_uring",
            "it takes Linux 6.14 with CONFIG_FUSE_IO_URING; mount with -o transport=dev_fuse".to_owned(),
        ),
        Err(error) => Err(Error::io(format!("read {SWITCH}"), error)),
    }
}

/// The memory of the entries of a new connection, to be handed from process to process.
///
/// # Errors
/// Those of the host.
pub fn create_memory() -> Result<OwnedFd> {
    let queues = usize::from(processors::count_possible()?);
    memory::create(queues * (ENTRIES / queues).clamp(DEPTH_MIN, DEPTH_MAX))
}

/// A session of the kernel with the filesystem, by io_uring; ends when the mount goes away, or is handed over.
#[derive(Debug)]
pub struct RingSession {
    server: Arc<Server>,
    device: Arc<Channel>,
    /// One for each ring.
    desks: Vec<Arc<Desk>>,
    /// Entries of each queue.
    depth: usize,
    halt: Arc<Halt>,
    /// Of the rings, and of the thread that reads what comes by the device.
    tally: Arc<Tally>,
    /// Guards that thread, while it is stopped and another is started.
    readers: Mutex<Readers>,
}

/// What the thread of a ring is made of.
struct Making {
    device: Arc<Channel>,
    memory: Arc<Memory>,
    queues: Vec<u16>,
    depth: usize,
    server: Arc<Server>,
    halt: Arc<Halt>,
    /// Told of the ring, once there is one.
    made: Sender<Result<Arc<Desk>>>,
    /// Says that requests may be fetched.
    go: Receiver<()>,
    /// Told once they are.
    registered: Sender<Result<()>>,
}

impl RingSession {
    /// Starts a thread with a ring for each processor, but at most `threads` of them, which then share the processors, and goes on
    /// with what a process before this one has handed over. `begin` is called just before the first request is taken: if it
    /// fails before that, nothing has changed. Requests are answered when this returns.
    ///
    /// # Errors
    /// Those of the kernel, and of the host.
    pub fn start(connection: Connection, fs: Arc<Fs>, threads: usize, begin: impl FnOnce()) -> Result<Self> {
        wake::prepare()?;
        let queues = processors::count_possible()?;
        let (device, memory) = connection.into_rings()?;
        let (device, memory) = (Arc::new(device), Arc::new(Memory::map(&memory)?));
        let depth = memory.entries() / usize::from(queues);
        if depth * usize::from(queues) != memory.entries() {
            return Err(Error::new(ErrorKind::Unsupported, "the rings are those of other processors"));
        }
        let server = Arc::new(Server::new(fs, Unanswered::Leave)?);
        let (halt, tally) = (Arc::new(Halt::default()), Arc::new(Tally::default()));
        let rings = threads.clamp(1, usize::from(queues));
        let ((made, makings), (registered, registrations)) = (channel(), channel());
        let mut goes = Vec::new();
        for number in 0..rings {
            let (sender, go) = channel();
            goes.push(sender);
            let making = Making {
                device: Arc::clone(&device),
                memory: Arc::clone(&memory),
                queues: (0..queues).skip(number).step_by(rings).collect(),
                depth,
                server: Arc::clone(&server),
                halt: Arc::clone(&halt),
                made: made.clone(),
                go,
                registered: registered.clone(),
            };
            spawn(number, &tally, making)?;
        }
        drop((made, registered));
        let desks =
            (0..rings).map(|_| makings.recv().map_err(|_| ended_early())?).collect::<Result<Vec<_>>>()?;
        log::info!("{rings} rings for {queues} processors, {depth} requests each");
        begin();
        // One that is not there any more has reported why.
        for go in goes {
            let _ = go.send(());
        }
        for _ in 0..rings {
            registrations.recv().map_err(|_| ended_early())??;
        }
        let readers = Mutex::new(Readers::start(&[Arc::clone(&device)], 1, &server, &tally)?);
        Ok(Self { server, device, desks, depth, halt, tally, readers })
    }

    /// Waits until the mount has gone away and every request is answered. Never returns once it was handed over.
    ///
    /// # Errors
    /// If a thread ended before that.
    pub fn wait(&self) -> Result<()> {
        // Nobody else serves the queues of a ring that has failed.
        self.tally.wait_for_failure().context(|| "answer the kernel's requests")?;
        self.server.finish(None);
        Ok(())
    }

    /// Takes all entries from the kernel, and answers all requests that were begun, so that another process can take over when
    /// this one has ended. Requests wait meanwhile. `nudge` has somebody else ask so often on each of these processors for
    /// something; only the next process answers.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if some are not answered within `patience`, [`ErrorKind::Unsupported`] if nobody can ask on all
    /// processors; those of `nudge`, and of [`RingSession::take_back`]. The session goes on then.
    pub fn hand_over(
        &self,
        patience: Duration,
        nudge: impl FnOnce(Vec<u16>, usize) -> Result<()>,
    ) -> Result<()> {
        let online = processors::online()?;
        processors::require(&online)?;
        // The host may allow none any more, and then the next process could not begin when this one has ended.
        drop(ring::build(1)?);
        let until = Instant::now() + patience;
        self.halt.begin(online.clone());
        self.desks.iter().for_each(|desk| desk.ring_bell());
        let result = nudge(online.into_iter().collect(), self.depth).and_then(|()| {
            let readers = self.readers.lock().stop(until);
            let halted = self.halt.wait(self.desks.len(), until);
            match (self.server.finish(Some(until)) && readers, halted) {
                (true, true) => Ok(()),
                (true, false) => {
                    let message =
                        format!("the kernel has not given all entries back within {} s", patience.as_secs());
                    Err(Error::new(ErrorKind::Busy, message))
                }
                (false, _) => Err(unanswered_after(patience)),
            }
        });
        result.map_err(|error| self.take_back().err().unwrap_or(error))
    }

    /// Serves on after [`RingSession::hand_over`].
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn take_back(&self) -> Result<()> {
        let mut readers = self.readers.lock();
        self.halt.end();
        // Those that have not halted hold requests, too. A thread that has not stopped yet will.
        self.desks.iter().for_each(|desk| desk.ring_bell());
        *readers = Readers::start(&[Arc::clone(&self.device)], 1, &self.server, &self.tally)?;
        Ok(())
    }
}

fn ended_early() -> Error {
    Error::new(ErrorKind::Io, "the thread of a ring panicked, which is a bug in cowdisk")
}

fn spawn(number: usize, tally: &Arc<Tally>, making: Making) -> Result<()> {
    let told = Arc::clone(tally);
    let work = move || {
        let serve = AssertUnwindSafe(|| serve_queues(making));
        told.end(catch_unwind(serve).unwrap_or_else(|_told| Err(ended_early())));
    };
    tally.begin();
    let spawned = std::thread::Builder::new().name(format!("ring-{number}")).spawn(work);
    spawned.map(drop).context(|| "start a thread of the session").inspect_err(|_| tally.end(Ok(())))
}

/// Serves the kernel's queues by a ring of the calling thread until the mount goes away, if that can begin: whoever makes it is
/// told.
fn serve_queues(making: Making) -> Result<()> {
    let Making { device, memory, queues, depth, server, halt, made, go, registered } = making;
    // A request is then done where it was made. If none of them is there, or ours, the scheduler chooses.
    if let Err(error) = processors::stay_on(&queues) {
        log::debug!("stay on processors {queues:?}: {error}");
    }
    let mut ring = match Ring::new(device, &memory, &queues, depth) {
        Ok(ring) => ring,
        Err(error) => {
            // Nobody listens if another ring could not be made: then this process ends.
            let _ = made.send(Err(error));
            return Ok(());
        }
    };
    let _ = made.send(Ok(ring.desk()));
    drop(made);
    if go.recv().is_err() {
        return Ok(());
    }
    let begun = ring.register();
    let has_begun = begun.is_ok();
    // As above.
    let _ = registered.send(begun);
    drop(registered);
    if has_begun { ring.run(&server, &halt) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_has_it_switched_off_or_not_at_all_is_told_what_to_do() {
        let error = judge_switch(Err(std::io::ErrorKind::NotFound.into())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.hint().unwrap().contains("6.14"));
        let error = judge_switch(Ok("N\n".to_owned())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(error.to_string(), "transport io_uring: the kernel's FUSE has io_uring switched off");
        assert!(error.hint().unwrap().ends_with(&format!("echo Y > {SWITCH}")));
        judge_switch(Ok("Y\n".to_owned())).unwrap();
    }
}
