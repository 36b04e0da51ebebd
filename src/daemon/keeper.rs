//! The process that keeps a mount while another one, the [worker](super::worker), serves it.
//!
//! It holds every descriptor of the connection with the kernel, the serve lock and the ledger of open files, and hardly
//! does anything: it starts the worker, waits for its end, and starts another. While none serves, requests wait in the
//! kernel. What a dead worker had read and not answered, the kernel sends to the next one again.
//!
//! No other worker is started before the process of the last one has ended for good (`waitpid`). A worker writes to disks
//! by system calls that a killed process completes before it has ended, so nothing that a dead worker had begun can
//! land on a disk after what its successor does.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::backoff::Backoff;
use super::confine::{Role, confine};
use super::identity;
use super::link::{ErrorWord, Handover, Link, PROTOCOL, ToKeeper, ToWorker};
use super::mounted::Mounted;
use super::mounts;
use super::options::MountOptions;
use super::serve::{raise_descriptor_limit, take};
use super::signals::SignalWatch;
use super::status::KeeperStatus;
use super::unmounter::Unmounter;
use super::worker;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Ledger;
use crate::store::{ServeLock, Store, Timestamp};
use crate::transport::{Connection, Transport};

/// The program that is running, whatever has become of its file.
const OWN_PROGRAM: &str = "/proc/self/exe";

enum Event {
    /// The name of a signal that asks the daemon to end.
    Signal(&'static str),
    /// The worker says something.
    Word(ToKeeper),
    /// The worker's process is gone for good.
    Exited(ExitStatus),
}

/// Mounts `store` on `mountpoint` and sees to it that it is served until it is taken away. See [`super::serve::serve`].
pub(super) fn keep(
    store: Store,
    mountpoint: &Path,
    options: &MountOptions,
    on_ready: impl FnOnce(),
) -> Result<()> {
    let (store, mountpoint, lock) = take(store, mountpoint, options)?;
    let source = mounts::absolute(store.dir())?;
    raise_descriptor_limit();
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let program = rustix::fs::open(OWN_PROGRAM, flags, Mode::empty()).context(|| "find this program")?;
    let unmounter = Unmounter::new(&mountpoint)?;
    // Taken away again, when this is dropped, if nobody serves it.
    let (mounted, device) =
        identity::with_capabilities(|| Mounted::new(&source, &mountpoint, options, &unmounter))?;
    // Before the first thread: what is given up is given up by each thread for itself, and by the workers.
    confine(Role::Keeper { mountpoint: &mountpoint });
    let connection = Connection::begin(device, options.threads(Transport::DevFuse))?;
    let ledger = Ledger::create()?;
    ledger.set_agreed(&connection.agreed())?;
    let (events, inbox) = channel();
    let signalled = events.clone();
    let _signals = SignalWatch::start(move |name| {
        // Nobody listens only when the daemon has ended anyway.
        let _ = signalled.send(Event::Signal(name));
    })?;
    let handover = Handover {
        protocol: PROTOCOL,
        mountpoint: mountpoint.to_str().unwrap_or_default().to_owned(),
        device: mounted.device,
        started: Timestamp::now(),
        is_first: true,
        resend: false,
        keeper: KeeperStatus {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            restarts: 0,
            last_end: None,
        },
    };
    if !connection.can_resend() {
        log::warn!(
            "this kernel is older than 6.9: should the process that serves crash, the mount is cut off"
        );
    }
    let estate = Estate { lock, ledger, connection, program: program.into(), handover };
    let keeper = Keeper { estate, events, inbox, unmounter: &unmounter, pending: Vec::new(), worker: None };
    keeper.run(|| {
        mounted.answered();
        on_ready();
    })
}

/// What passes from worker to worker.
struct Estate {
    lock: ServeLock,
    ledger: Ledger,
    connection: Connection,
    program: File,
    handover: Handover,
}

/// A process that serves, or is about to.
struct Worker {
    link: Arc<Link>,
    begun: Instant,
    is_ready: bool,
    /// Why it cannot serve, in its own words.
    failure: Option<Error>,
    /// What it said when it had closed everything.
    farewell: Option<Vec<ErrorWord>>,
}

impl Estate {
    /// Starts a worker and hands everything over. `events` is told what it says and how it ends.
    fn start_worker(&self, events: Sender<Event>) -> Result<Worker> {
        let what = || "start the process that serves";
        let (link, theirs) = Link::pair()?;
        let mut arguments = std::env::args_os();
        let mut command = Command::new(format!("/proc/self/fd/{}", self.program.as_raw_fd()));
        command.arg0(arguments.next().unwrap_or_else(|| "cowdisk".into()));
        command.args(arguments).env(worker::VARIABLE, "1").stdin(Stdio::from(theirs)).stdout(Stdio::null());
        let child = command.spawn().context(what)?;
        // It holds the worker's end of the socket, whose last owner must be the worker.
        drop(command);
        let link = Arc::new(link);
        let heard = Arc::clone(&link);
        let follow = move || follow(child, &heard, &events);
        std::thread::Builder::new().name("worker".to_owned()).spawn(follow).context(what)?;
        let mut descriptors = vec![self.lock.descriptor(), self.ledger.descriptor()];
        descriptors.extend(self.connection.descriptors());
        if let Err(error) = link.tell(&self.handover, &descriptors) {
            log::error!("hand over: {error}");
            // It hears the end in place of a handover, and ends.
            link.close();
        }
        let begun = Instant::now();
        Ok(Worker { link, begun, is_ready: false, failure: None, farewell: None })
    }
}

/// Passes on what a worker says, and how it ended once its process is gone for good.
fn follow(mut child: Child, link: &Link, events: &Sender<Event>) {
    loop {
        match link.hear() {
            Ok(Some((word, _))) => drop(events.send(Event::Word(word))),
            Ok(None) => break,
            Err(error) => log::warn!("{error}"),
        }
    }
    match child.wait() {
        Ok(status) => drop(events.send(Event::Exited(status))),
        // Whoever started us has had SIGCHLD ignored: the kernel then lets us wait until the child is gone for good, and
        // keeps to itself how it ended.
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
            drop(events.send(Event::Exited(ExitStatus::from_raw(1 << 8))));
        }
        // Not knowing whether it lives, another must not be started.
        Err(error) => log::error!("wait for the process that serves: {error}"),
    }
}

/// How a worker has ended.
enum End {
    /// With the mount.
    Mount(Vec<ErrorWord>),
    /// In some other way.
    Death(Death),
}

struct Death {
    /// Why, in its own words or as its process ended.
    why: Error,
    was_ready: bool,
    life: Duration,
}

struct Keeper<'a> {
    estate: Estate,
    events: Sender<Event>,
    inbox: Receiver<Event>,
    unmounter: &'a Unmounter,
    /// Signals that no worker has been told of.
    pending: Vec<&'static str>,
    worker: Option<Worker>,
}

impl Keeper<'_> {
    fn run(mut self, on_ready: impl FnOnce()) -> Result<()> {
        let mut on_ready = Some(on_ready);
        let mut backoff = Backoff::default();
        loop {
            let end = match self.estate.start_worker(self.events.clone()) {
                Ok(worker) => {
                    self.worker = Some(worker);
                    self.follow_worker(&mut on_ready)?
                }
                Err(why) => End::Death(Death { why, was_ready: false, life: Duration::ZERO }),
            };
            self.worker = None;
            match end {
                End::Mount(errors) => return farewell(errors),
                End::Death(death) if on_ready.is_some() => return Err(death.why),
                End::Death(death) => self.bury(&death, &mut backoff)?,
            }
        }
    }

    /// Does what the worker asks for until it has ended.
    fn follow_worker(&mut self, on_ready: &mut Option<impl FnOnce()>) -> Result<End> {
        loop {
            let gone = |_| Error::new(ErrorKind::Io, "the keeper's threads are gone");
            let event = self.inbox.recv().map_err(gone)?;
            let Some(worker) = &mut self.worker else {
                return Err(Error::new(ErrorKind::Io, "no process serves"));
            };
            match event {
                Event::Signal(name) if worker.is_ready => tell(worker, &ToWorker::Leave(name.to_owned())),
                Event::Signal(name) => self.pending.push(name),
                Event::Word(ToKeeper::Ready) => {
                    worker.is_ready = true;
                    if let Some(on_ready) = on_ready.take() {
                        on_ready();
                    }
                    for name in self.pending.drain(..) {
                        tell(worker, &ToWorker::Leave(name.to_owned()));
                    }
                }
                Event::Word(ToKeeper::Failed(word)) => worker.failure = Some(word.into_error()),
                Event::Word(ToKeeper::Unmount) => {
                    let failure = self.unmounter.unmount().err();
                    tell(worker, &ToWorker::Unmounted(failure.as_ref().map(ErrorWord::from)));
                }
                Event::Word(ToKeeper::Ended(errors)) => worker.farewell = Some(errors),
                Event::Exited(status) => {
                    let life = worker.begun.elapsed();
                    let ended =
                        || Error::new(ErrorKind::Io, format!("the process that serves has ended ({status})"));
                    let why = worker.failure.take().unwrap_or_else(ended);
                    return Ok(match worker.farewell.take() {
                        Some(errors) => End::Mount(errors),
                        None => End::Death(Death { why, was_ready: worker.is_ready, life }),
                    });
                }
            }
        }
    }

    /// Notes how a worker died and waits as long as it takes until the next may begin.
    ///
    /// # Errors
    /// If there will be none.
    fn bury(&mut self, death: &Death, backoff: &mut Backoff) -> Result<()> {
        let Death { why, was_ready, life } = death;
        if !self.estate.connection.can_resend() {
            return Err(Error::new(ErrorKind::Io, why.to_string())
                .with_hint("this kernel, older than 6.9, cannot send its requests to another: mount again"));
        }
        if !was_ready && self.estate.connection.has_ended() {
            let message = format!("the mount is gone, and its disks cannot be closed: {why}");
            return Err(Error::new(ErrorKind::Io, message).with_hint(
                "nothing is lost as long as the host stays up: opening a disk again takes up its live map",
            ));
        }
        let patience = backoff.after(*life);
        let (lived, wait) = (life.as_secs_f32(), patience.as_secs_f32());
        match backoff.deaths() {
            0..10 => log::error!("{why}, after {lived:.1} s; another one takes over in {wait} s"),
            deaths => log::error!(
                "{why}, {deaths} times now, as soon as it has begun: guests wait; another one takes over in {wait} s"
            ),
        }
        let handover = &mut self.estate.handover;
        handover.keeper.restarts += 1;
        handover.keeper.last_end = Some(why.to_string());
        (handover.is_first, handover.resend) = (false, true);
        self.wait(patience);
        Ok(())
    }

    /// Lets time pass, and keeps what comes meanwhile for the next worker.
    fn wait(&mut self, patience: Duration) {
        let end = Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(Event::Signal(name)) => self.pending.push(name),
                Ok(Event::Word(_) | Event::Exited(_)) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

fn tell(worker: &Worker, word: &ToWorker) {
    // A worker that has ended hears nothing; its end is the next event.
    if let Err(error) = worker.link.tell(word, &[]) {
        log::debug!("{error}");
    }
}

fn farewell(errors: Vec<ErrorWord>) -> Result<()> {
    log::info!("ended");
    match errors.into_iter().next() {
        Some(word) => Err(word.into_error()),
        None => Ok(()),
    }
}
