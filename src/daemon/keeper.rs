//! The process that keeps a mount while another one, the [worker](super::worker), serves it.
//!
//! It holds every descriptor of the connection with the kernel, the serve lock and the ledger of open files, and hardly
//! does anything: it starts the worker, waits for its end, and starts another. While none serves, requests wait in the
//! kernel. What a dead worker had read and not answered, the kernel sends to the next one again.
//!
//! No other worker is started before the process of the last one has ended for good (`waitpid`). A worker writes to disks
//! by system calls that a killed process completes before it has ended, so nothing that a dead worker had begun can
//! land on a disk after what its successor does.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::attendant;
use super::backoff::Backoff;
use super::confine::{Role, confine};
use super::employ::{Estate, Event, Worker};
use super::identity;
use super::link::{ErrorWord, Handover, PROTOCOL, ToKeeper, ToWorker};
use super::mounted::{Mounted, open_root};
use super::mounts;
use super::options::MountOptions;
use super::passthrough::{Offer, Passed};
use super::program::Program;
use super::serve::{raise_descriptor_limit, take};
use super::signals::SignalWatch;
use super::status::KeeperStatus;
use super::unmounter::Unmounter;
use super::upgrade::{Asker, Stage, Upgrade};
use crate::error::{Error, ErrorKind, Result};
use crate::fs::Ledger;
use crate::store::{Store, Timestamp};
use crate::transport::{self, Connection, Road, Transport};

/// After so many deaths in a row, of processes that had begun to read, what was under way is not done again: some 20 s after the
/// first. A life of seconds takes deaths back, see [`Backoff`].
const REFUSED_AFTER: u32 = 5;

/// Once a process was killed there is nothing to do but to wait for its end.
const UNHURRIED: Duration = Duration::from_secs(3600);

/// Mounts `store` on `mountpoint` and sees to it that it is served until it is taken away. See [`super::serve::serve`].
pub(super) fn keep(
    store: Store,
    mountpoint: &Path,
    options: &MountOptions,
    transport: Transport,
    on_ready: impl FnOnce(),
) -> Result<()> {
    let (store, mountpoint, lock) = take(store, mountpoint, options)?;
    let source = mounts::absolute(store.dir())?;
    raise_descriptor_limit();
    let program = Program::own()?;
    let unmounter = Unmounter::new(&mountpoint)?;
    // Taken away again, when this is dropped, if nobody serves it.
    let (mounted, device) =
        identity::with_capabilities(|| Mounted::new(&source, &mountpoint, options, &unmounter))?;
    let may_pass = identity::may_mount();
    // Before the first thread: what is given up is given up by each thread for itself, and by the workers.
    confine(Role::Keeper { mountpoint: &mountpoint });
    let road = transport.road(options.passthrough && may_pass);
    let connection = Connection::begin(device, road, options.threads(transport))?;
    let can_pass = connection.can_pass_through();
    let passthrough = Offer::new(options.passthrough, may_pass, connection.road(), can_pass);
    passthrough.tell(options.passthrough);
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
        refuse: false,
        keeper: KeeperStatus {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            restarts: 0,
            upgrades: 0,
            last_end: None,
        },
        passthrough,
    };
    let cut_off = "should the process that serves crash, the mount is cut off";
    match road {
        // Whoever chose it was told.
        Road::Rings => log::info!("with this transport no other process takes over after a crash: {cut_off}"),
        Road::Device { .. } if connection.can_resend() => {}
        Road::Device { .. } => log::warn!("this kernel is older than 6.9: {cut_off}"),
    }
    let keeper = Keeper {
        estate: Estate { lock, ledger, connection, handover },
        program,
        started: 0,
        events,
        inbox,
        unmounter: &unmounter,
        passed: Passed::new(store),
        leave: None,
        worker: None,
        upgrade: None,
    };
    keeper.run(|| {
        mounted.answered();
        on_ready();
    })
}

/// How a worker has ended.
enum End {
    /// With the mount.
    Mount(Vec<ErrorWord>),
    /// In order, for another to take over.
    HandedOver,
    /// In some other way.
    Death(Death),
}

struct Death {
    /// Why, in its own words or as its process ended.
    why: Error,
    was_ready: bool,
    /// It may have had requests.
    had_read: bool,
    life: Duration,
}

struct Keeper<'a> {
    estate: Estate,
    /// What workers are started from.
    program: Program,
    /// How many were started.
    started: u64,
    events: Sender<Event>,
    inbox: Receiver<Event>,
    unmounter: &'a Unmounter,
    passed: Passed,
    /// The last signal that asks the daemon to end, and when it came. Each worker is told of it as long as one would heed it.
    leave: Option<(&'static str, Instant)>,
    worker: Option<Worker>,
    upgrade: Option<Upgrade>,
}

impl Keeper<'_> {
    fn run(mut self, on_ready: impl FnOnce()) -> Result<()> {
        let mut on_ready = Some(on_ready);
        let mut backoff = Backoff::default();
        loop {
            let end = match self.next_worker() {
                Ok(worker) => {
                    self.worker = Some(worker);
                    self.follow_worker(&mut on_ready)?
                }
                Err(why) => {
                    End::Death(Death { why, was_ready: false, had_read: false, life: Duration::ZERO })
                }
            };
            self.worker = None;
            match end {
                End::Mount(errors) => {
                    self.fail_upgrade(Error::new(ErrorKind::NotFound, "the mount has been taken away"));
                    return farewell(errors);
                }
                End::HandedOver => self.estate.handover.refuse = false,
                End::Death(death) if on_ready.is_some() => return Err(death.why),
                End::Death(death) => self.bury(death, &mut backoff).inspect_err(|why| {
                    self.fail_upgrade(Error::new(why.kind(), why.to_string()));
                })?,
            }
            let can_resend = self.estate.connection.can_resend();
            let handover = &mut self.estate.handover;
            (handover.is_first, handover.resend) = (false, can_resend);
        }
    }

    /// The process that is to serve now: the one that stands by to take over, if there is one.
    fn next_worker(&mut self) -> Result<Worker> {
        let mut handover = self.estate.handover.clone();
        let worker = match self.upgrade.as_mut().and_then(Upgrade::take_over) {
            Some(candidate) => {
                // It is there to say so only if it succeeds.
                handover.keeper.upgrades += 1;
                candidate
            }
            None => self.start_worker(None)?,
        };
        self.estate.pass_to(&worker, &handover);
        Ok(worker)
    }

    /// Starts a process from `program`, or from the one that has served.
    fn start_worker(&mut self, program: Option<&Program>) -> Result<Worker> {
        self.started += 1;
        Worker::start(program.unwrap_or(&self.program), self.started, self.events.clone())
    }

    /// Does what the worker asks for until it has ended.
    fn follow_worker(&mut self, on_ready: &mut Option<impl FnOnce()>) -> Result<End> {
        loop {
            let Some(event) = self.next_event(self.upgrade.as_ref().map(|upgrade| upgrade.until))? else {
                self.hurry_upgrade();
                continue;
            };
            let Some(worker) = &mut self.worker else {
                return Err(Error::new(ErrorKind::Io, "no process serves"));
            };
            match event {
                Event::Signal(name) => {
                    self.leave = Some((name, Instant::now()));
                    if worker.is_ready {
                        worker.tell(&ToWorker::Leave(name.to_owned()));
                    }
                }
                Event::Word(number, word, descriptors) if number == worker.number => {
                    self.heed(word, descriptors, on_ready);
                }
                Event::Exited(number, status) if number == worker.number => return Ok(end(worker, status)),
                other => self.note(other),
            }
        }
    }

    /// The next event, or `None` if there is none until then.
    fn next_event(&self, until: Option<Instant>) -> Result<Option<Event>> {
        let gone = || Error::new(ErrorKind::Io, "the keeper's threads are gone");
        let Some(until) = until else { return self.inbox.recv().map(Some).map_err(|_| gone()) };
        match self.inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }

    /// Does what the worker asks for.
    fn heed(&mut self, word: ToKeeper, descriptors: Vec<OwnedFd>, on_ready: &mut Option<impl FnOnce()>) {
        let Some(worker) = &mut self.worker else { return };
        match word {
            ToKeeper::Hello { version, .. } => worker.version = Some(version),
            ToKeeper::Reading => worker.reads = true,
            ToKeeper::Ready => {
                worker.is_ready = true;
                if let Some(on_ready) = on_ready.take() {
                    on_ready();
                }
                if let Some((name, since)) = self.leave
                    && since.elapsed() < attendant::PATIENCE
                {
                    worker.tell(&ToWorker::Leave(name.to_owned()));
                }
                self.go_on_upgrading();
            }
            ToKeeper::Failed(word) => worker.failure = Some(word.into_error()),
            ToKeeper::Unmount => {
                let failure = self.unmounter.unmount().err();
                worker.tell(&ToWorker::Unmounted(failure.as_ref().map(ErrorWord::from)));
            }
            ToKeeper::Passthrough(question) => {
                let answer = self.passed.answer(question, &descriptors, &self.estate.connection);
                worker.tell(&ToWorker::Passthrough(answer));
            }
            ToKeeper::Ended(errors) => worker.farewell = Some(errors),
            ToKeeper::Upgrade => {
                if let Some(socket) = descriptors.into_iter().next() {
                    self.begin_upgrade(Asker::new(socket));
                }
            }
            ToKeeper::HandedOver { pause_milliseconds } => {
                worker.handed_over = Some((Duration::from_millis(pause_milliseconds), Instant::now()));
                if let Some(upgrade) = &mut self.upgrade {
                    upgrade.note_stopped(worker.handed_over);
                }
            }
            ToKeeper::Nudge { processors, times } => self.nudge(processors, times),
            ToKeeper::ServesOn(word) => self.fail_upgrade(word.into_error()),
        }
    }

    /// Has the kernel give the worker requests, for it is about to hand over.
    fn nudge(&mut self, processors: Vec<u16>, times: usize) {
        let Some(upgrade @ Upgrade { stage: Stage::StandingBy(_), nudged: None, .. }) = &mut self.upgrade
        else {
            return;
        };
        let Handover { mountpoint, device, .. } = &self.estate.handover;
        let root = identity::with_capabilities(|| open_root(Path::new(mountpoint), *device));
        match root.and_then(|root| transport::nudge(root, processors, times)) {
            Ok(nudged) => upgrade.nudged = Some(nudged),
            // The worker finds that it cannot hand over, and serves on.
            Err(why) => self.fail_upgrade(why),
        }
    }

    /// Starts the program that is in the place of ours now, without disturbing the worker.
    fn begin_upgrade(&mut self, asker: Asker) {
        let from =
            self.worker.as_ref().filter(|worker| worker.is_ready).and_then(|worker| worker.version.clone());
        let begun = match (from, &self.upgrade) {
            (Some(from), None) => self.program.successor().and_then(|program| {
                let candidate = self.start_worker(Some(&program))?;
                Ok((program, candidate, from))
            }),
            _ => Err(Error::new(ErrorKind::Busy, "another process is taking over already")),
        };
        match begun {
            Ok((program, candidate, from)) => {
                log::info!("upgrade: starting {}", program.path().display());
                self.upgrade = Some(Upgrade::new(program, candidate, from, asker));
            }
            Err(error) => {
                log::warn!("upgrade: {error}");
                asker.answer(Err(error));
            }
        }
    }

    /// Notes what is not the worker's: a signal, or what becomes of the candidate. Of others nothing is wanted any more.
    fn note(&mut self, event: Event) {
        let candidate = self.upgrade.as_mut().and_then(Upgrade::candidate);
        match (event, candidate) {
            (Event::Signal(name), _) => self.leave = Some((name, Instant::now())),
            (Event::Word(number, ToKeeper::Hello { protocol, version }, _), Some(candidate))
                if number == candidate.number =>
            {
                self.consider(protocol, version);
            }
            (Event::Word(number, ToKeeper::Failed(word), _), Some(candidate))
                if number == candidate.number =>
            {
                candidate.failure = Some(word.into_error());
            }
            (Event::Exited(number, status), Some(candidate)) if number == candidate.number => {
                let why = candidate.why(status);
                self.fail_upgrade(why);
            }
            _ => {}
        }
    }

    /// The candidate has said what it is.
    fn consider(&mut self, protocol: u32, version: String) {
        let Some(upgrade) = &mut self.upgrade else { return };
        match upgrade.stand_by(protocol, version) {
            Err(why) => self.fail_upgrade(why),
            Ok(()) if self.worker.as_ref().is_some_and(|worker| worker.is_ready) => self.go_on_upgrading(),
            // Told to the worker that is about to serve, once it does.
            Ok(()) => {}
        }
    }

    /// Something takes too long.
    fn hurry_upgrade(&mut self) {
        let Some(upgrade) = &mut self.upgrade else { return };
        let Some(worker) = &mut self.worker else { return };
        let late = |what: &str| Error::new(ErrorKind::Io, format!("{what} in time"));
        match &upgrade.stage {
            Stage::Starting(_) => self.fail_upgrade(late("it has not said what it is")),
            // It has answered everything, so nothing is lost, and its end is all that is waited for.
            Stage::StandingBy(_) if worker.handed_over.is_some() => {
                worker.kill();
                upgrade.until += UNHURRIED;
            }
            Stage::StandingBy(_) => self.fail_upgrade(late("the process that serves has not stopped")),
            // It may have requests that nobody else could answer.
            Stage::TakingOver if worker.reads && !self.estate.connection.can_resend() => {
                self.fail_upgrade(late("it has taken over, but not said that it serves"));
            }
            Stage::TakingOver => {
                worker.failure = Some(late("it has not begun to serve"));
                worker.kill();
                upgrade.until += UNHURRIED;
            }
        }
    }

    /// The worker serves. If it was to take over, it has; if another one stands by, it is to hand over.
    fn go_on_upgrading(&mut self) {
        let (Some(upgrade), Some(worker)) = (&self.upgrade, &self.worker) else { return };
        match upgrade.stage {
            Stage::Starting(_) => {}
            Stage::StandingBy(_) => worker.tell(&ToWorker::HandOver),
            Stage::TakingOver => {
                let version = worker.version.clone().unwrap_or_default();
                if let Some(upgrade) = self.upgrade.take() {
                    self.estate.handover.keeper.upgrades += 1;
                    self.program = upgrade.succeed(version);
                }
            }
        }
    }

    fn fail_upgrade(&mut self, why: Error) {
        if let Some(upgrade) = self.upgrade.take() {
            upgrade.fail(why);
        }
    }

    /// Notes how a worker died and waits as long as it takes until the next may begin.
    ///
    /// # Errors
    /// If there will be none.
    fn bury(&mut self, death: Death, backoff: &mut Backoff) -> Result<()> {
        let Death { why, was_ready, had_read, life } = death;
        if had_read && !self.estate.connection.can_resend() {
            let hint = match self.estate.connection.road() {
                Road::Rings => "what it had fetched by io_uring cannot be sent to another: mount again",
                Road::Device { .. } => {
                    "this kernel, older than 6.9, cannot send its requests to another: mount again"
                }
            };
            return Err(Error::new(ErrorKind::Io, why.to_string()).with_hint(hint));
        }
        if !was_ready && self.estate.connection.has_ended() {
            let message = format!("the mount is gone, and its disks cannot be closed: {why}");
            return Err(Error::new(ErrorKind::Io, message).with_hint(
                "nothing is lost as long as the host stays up: opening a disk again takes up its live map",
            ));
        }
        let patience = backoff.after(life);
        let (lived, wait) = (life.as_secs_f32(), patience.as_secs_f32());
        match backoff.deaths() {
            0..10 => log::error!("{why}, after {lived:.1} s; another one takes over in {wait} s"),
            deaths => log::error!(
                "{why}, {deaths} times now, as soon as it has begun: guests wait; another one takes over in {wait} s"
            ),
        }
        let handover = &mut self.estate.handover;
        // One of those requests may be what they die of, and would hold up all guests for ever.
        handover.refuse = had_read && backoff.deaths() >= REFUSED_AFTER;
        if handover.refuse {
            log::error!(
                "what was under way is not tried again: whoever waits for it is told of an I/O error"
            );
        }
        let keeper = &mut handover.keeper;
        keeper.restarts += 1;
        keeper.last_end = Some(why.to_string());
        if self.upgrade.as_ref().is_some_and(|upgrade| matches!(upgrade.stage, Stage::TakingOver)) {
            self.fail_upgrade(why.context("the program of before takes over again"));
        }
        self.wait(patience)
    }

    /// Lets time pass until the next worker may begin, or until one that stands by is to take over.
    fn wait(&mut self, patience: Duration) -> Result<()> {
        let end = Instant::now() + patience;
        let stands_by = |upgrade: &Upgrade| matches!(upgrade.stage, Stage::StandingBy(_));
        while !self.upgrade.as_ref().is_some_and(stands_by) {
            match self.next_event(Some(end))? {
                Some(event) => self.note(event),
                None => break,
            }
        }
        Ok(())
    }
}

/// How a worker whose process is gone has ended.
fn end(worker: &mut Worker, status: ExitStatus) -> End {
    match (worker.farewell.take(), worker.handed_over) {
        (Some(errors), _) => End::Mount(errors),
        (None, Some(_)) => End::HandedOver,
        (None, None) => End::Death(Death {
            why: worker.why(status),
            was_ready: worker.is_ready,
            had_read: worker.reads,
            life: worker.life(),
        }),
    }
}

fn farewell(errors: Vec<ErrorWord>) -> Result<()> {
    log::info!("ended");
    match errors.into_iter().next() {
        Some(word) => Err(word.into_error()),
        None => Ok(()),
    }
}
