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
//! No other process can take such a connection over: the kernel does not send again what a ring has fetched. Backing reads
//! and writes are blocking calls of threads here, too. As no process follows this one, writes of a ring could harm
//! nothing; but the engine does them in steps (room, copy-up, state) that would have to become a machine of states.

mod entry;
mod memory;
mod ring;
mod serve;

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use rustix::thread::{CpuSet, sched_setaffinity};

pub use entry::Entry;

use super::channel::Channel;
use super::connection::{Connection, Unanswered};
use super::readers::Readers;
use super::serve::Server;
use super::session::Tally;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Fs;
use ring::Ring;

/// Whether the kernel lets mounts ask for io_uring: `Y` or `N`.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// The processors that there may ever be, as ranges. Each has a queue.
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

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

/// A session of the kernel with the filesystem, by io_uring; ends when the mount goes away.
#[derive(Debug)]
pub struct RingSession {
    server: Arc<Server>,
    /// Of the rings, and of the thread that reads what comes by the device.
    tally: Arc<Tally>,
}

impl RingSession {
    /// Answers the kernel's INIT on a descriptor that has just been mounted and starts a thread with a ring for each
    /// processor, but at most `threads` of them, which then share the processors. Requests are answered when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the kernel does not offer it; those of the host.
    pub fn start(device: OwnedFd, fs: Arc<Fs>, threads: usize) -> Result<Self> {
        let text = std::fs::read_to_string(POSSIBLE).context(|| format!("read {POSSIBLE}"))?;
        let queues = count_processors(&text)
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, format!("{POSSIBLE}: not understood")))?;
        let device = Arc::new(Connection::begin_rings(device)?);
        let server = Arc::new(Server::new(fs, Unanswered::Leave)?);
        let rings = threads.clamp(1, usize::from(queues));
        let depth = (ENTRIES / usize::from(queues)).clamp(DEPTH_MIN, DEPTH_MAX);
        let tally = Arc::new(Tally::default());
        let (report, registered) = channel();
        for number in 0..rings {
            let own: Vec<u16> = (0..queues).skip(number).step_by(rings).collect();
            let (device, server) = (Arc::clone(&device), Arc::clone(&server));
            let (told, report) = (Arc::clone(&tally), report.clone());
            let serve = move || serve_queues(device, &own, depth, &server, report);
            let work = move || {
                let ended = catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|_told| Err(ended_early()));
                told.end(ended);
            };
            let thread = std::thread::Builder::new().name(format!("ring-{number}"));
            tally.begin();
            thread
                .spawn(work)
                .context(|| "start a thread of the session")
                .inspect_err(|_| tally.end(Ok(())))?;
        }
        drop(report);
        for _ in 0..rings {
            registered.recv().map_err(|_| ended_early())??;
        }
        log::info!("{rings} rings for {queues} processors, {depth} requests each");
        Readers::start(&[device], 1, &server, &tally)?;
        Ok(Self { server, tally })
    }

    /// Waits until the mount has gone away and every request is answered.
    ///
    /// # Errors
    /// If a thread ended before that.
    pub fn wait(&self) -> Result<()> {
        // Nobody else serves the queues of a ring that has failed.
        self.tally.wait_for_failure().context(|| "answer the kernel's requests")?;
        self.server.finish(None);
        Ok(())
    }
}

fn ended_early() -> Error {
    Error::new(ErrorKind::Io, "the thread of a ring panicked, which is a bug in cowdisk")
}

/// Serves the kernel's `queues` by a ring of the calling thread until the mount goes away, if that can begin: `report` is
/// told.
fn serve_queues(
    device: Arc<Channel>,
    queues: &[u16],
    depth: usize,
    server: &Server,
    report: Sender<Result<()>>,
) -> Result<()> {
    stay_on(queues);
    let (begun, ring) = match Ring::register(device, queues, depth) {
        Ok(ring) => (Ok(()), Some(ring)),
        Err(error) => (Err(error), None),
    };
    // Nobody listens if another ring could not begin: then the mount goes away.
    let _ = report.send(begun);
    drop(report);
    ring.map_or(Ok(()), |ring| ring.run(server))
}

/// Keeps the calling thread on these processors, where that is allowed: a request is then done where it was made.
fn stay_on(processors: &[u16]) {
    let mut set = CpuSet::new();
    for processor in processors {
        if usize::from(*processor) < CpuSet::MAX_CPU {
            set.set((*processor).into());
        }
    }
    // One that is not there, or not ours: the scheduler chooses.
    if let Err(errno) = sched_setaffinity(None, &set) {
        log::debug!("stay on processors {processors:?}: {errno}");
    }
}

/// How many processors a list of ranges names (`0-3,8`).
fn count_processors(text: &str) -> Option<u16> {
    let mut count = 0u16;
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
        count = count.checked_add(last.checked_sub(first)?)?.checked_add(1)?;
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted() {
        for (text, count) in [("0\n", Some(1)), ("0-3\n", Some(4)), ("0-3,8-9,12", Some(7))] {
            assert_eq!(count_processors(text), count);
        }
        for text in ["", "x", "3-1", "0-65535", "1-"] {
            assert_eq!(count_processors(text), None, "{text:?}");
        }
    }

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
