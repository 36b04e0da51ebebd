//! Starting workers, and following what they say and how they end. What a worker is handed over is the [`Estate`].

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::link::{ErrorWord, Handover, Link, ToKeeper, ToWorker};
use super::program::Program;
use super::worker;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Ledger;
use crate::store::ServeLock;
use crate::transport::Connection;

/// What a keeper is told. Workers go by the numbers in which they were started.
pub(super) enum Event {
    /// The name of a signal that asks the daemon to end.
    Signal(&'static str),
    /// A worker says something, perhaps with descriptors.
    Word(u64, ToKeeper, Vec<OwnedFd>),
    /// A worker's process is gone for good.
    Exited(u64, ExitStatus),
}

/// What passes from worker to worker.
pub(super) struct Estate {
    pub(super) lock: ServeLock,
    pub(super) ledger: Ledger,
    pub(super) connection: Connection,
    pub(super) handover: Handover,
}

impl Estate {
    /// Hands everything over to a worker.
    pub(super) fn pass_to(&self, worker: &Worker, handover: &Handover) {
        let mut descriptors = vec![self.lock.descriptor(), self.ledger.descriptor()];
        descriptors.extend(self.connection.descriptors());
        if let Err(error) = worker.link.tell(handover, &descriptors) {
            log::error!("hand over: {error}");
            // It hears the end in place of a handover, and ends.
            worker.link.close();
        }
    }
}

/// A process that serves, or is about to.
pub(super) struct Worker {
    /// Which of all those that were started.
    pub(super) number: u64,
    link: Arc<Link>,
    /// A handle to its process, if the host gives any.
    process: Option<OwnedFd>,
    begun: Instant,
    pub(super) version: Option<String>,
    /// It has begun to read requests, and may have some.
    pub(super) reads: bool,
    pub(super) is_ready: bool,
    /// Why it cannot serve, in its own words.
    pub(super) failure: Option<Error>,
    /// What it said when it had closed everything.
    pub(super) farewell: Option<Vec<ErrorWord>>,
    /// For how long it had read nothing when it said that it had handed over, and when that was.
    pub(super) handed_over: Option<(Duration, Instant)>,
}

impl Worker {
    /// Starts one from `program`, which waits for what it is handed over. `events` is told what it says and how it ends.
    pub(super) fn start(program: &Program, number: u64, events: Sender<Event>) -> Result<Self> {
        let what = || "start the process that serves";
        let (link, theirs) = Link::pair()?;
        let mut arguments = std::env::args_os();
        let mut command = Command::new(format!("/proc/self/fd/{}", program.file().as_raw_fd()));
        command.arg0(arguments.next().unwrap_or_else(|| "cowdisk".into()));
        command.args(arguments).env(worker::VARIABLE, "1").stdin(Stdio::from(theirs)).stdout(Stdio::null());
        let child = command.spawn().context(what)?;
        // It holds the worker's end of the socket, whose last owner must be the worker.
        drop(command);
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let process = pid.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
        let link = Arc::new(link);
        let heard = Arc::clone(&link);
        let follow = move || follow(child, number, &heard, &events);
        std::thread::Builder::new().name("worker".to_owned()).spawn(follow).context(what)?;
        Ok(Self {
            number,
            link,
            process,
            begun: Instant::now(),
            version: None,
            reads: false,
            is_ready: false,
            failure: None,
            farewell: None,
            handed_over: None,
        })
    }

    pub(super) fn tell(&self, word: &ToWorker) {
        // A worker that has ended hears nothing; its end is the next event.
        if let Err(error) = self.link.tell(word, &[]) {
            log::debug!("{error}");
        }
    }

    /// `kill -9`; its end comes as an event. The link stays: that it ends would say to a worker that its keeper has died.
    pub(super) fn kill(&self) {
        let killed = match &self.process {
            Some(process) => rustix::process::pidfd_send_signal(process, Signal::KILL),
            None => Err(Errno::NOSYS),
        };
        // It may have ended by itself.
        if let Err(errno) = killed
            && errno != Errno::SRCH
        {
            log::warn!("kill the process of a worker: {errno}");
        }
    }

    /// How long it has lived.
    pub(super) fn life(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Why its process has ended, in its own words if it had any.
    pub(super) fn why(&mut self, status: ExitStatus) -> Error {
        let ended = || Error::new(ErrorKind::Io, format!("the process that serves has ended ({status})"));
        self.failure.take().unwrap_or_else(ended)
    }
}

/// Passes on what a worker says, and how it ended once its process is gone for good.
fn follow(mut child: Child, number: u64, link: &Link, events: &Sender<Event>) {
    loop {
        match link.hear() {
            Ok(Some((word, descriptors))) => drop(events.send(Event::Word(number, word, descriptors))),
            Ok(None) => break,
            Err(error) => log::warn!("{error}"),
        }
    }
    match child.wait() {
        Ok(status) => drop(events.send(Event::Exited(number, status))),
        // Whoever started us has had SIGCHLD ignored: the kernel then lets us wait until the child is gone for good, and
        // keeps to itself how it ended.
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
            drop(events.send(Event::Exited(number, ExitStatus::from_raw(1 << 8))));
        }
        // Not knowing whether it lives, another must not be started.
        Err(error) => log::error!("wait for the process that serves: {error}"),
    }
}
