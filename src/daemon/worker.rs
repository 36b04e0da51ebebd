//! The process that serves a mount which another one, the [keeper](super::keeper), has made and keeps.
//!
//! It takes over where the last one left off, first or not: with the ledger of open files, the live maps of their disks
//! and what the kernel sends again. It is confined before it looks at any of that, and holds no capability at all: for
//! unmounting it asks the keeper. If the keeper dies it serves on, alone, and says so.
//!
//! Asked to hand over, it stops its background, then reading, answers all that it had read, says so, and ends with its disks
//! open, as if it had been killed at a moment when nothing was under way. If that takes too long it serves on.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::attendant::{Attendant, Attended, Event};
use super::background::Background;
use super::confine::{Role, confine};
use super::control::Control;
use super::farewell::Farewell;
use super::link::{ErrorWord, Handover, Link, PROTOCOL, ToKeeper, ToWorker};
use super::mounts;
use super::options::MountOptions;
use super::passthrough::{Answer, ByKeeper, Offer, Question};
use super::serve::{await_end, close, watch_signals};
use super::status::Identity;
use super::unmounter::Unmounter;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::{Fs, Ledger};
use crate::store::{ServeLock, Store};
use crate::transport::{Choice, Connection, Session, Unanswered};

/// Set to 1 in the environment of a process whose standard input is a socket to its keeper.
pub(super) const VARIABLE: &str = "COWDISK_KEPT";

/// How long the background may take for what it is at, before a hand-over. Requests are answered meanwhile.
pub(super) const BACKGROUND_PATIENCE: Duration = Duration::from_secs(10);

/// How long requests that were read may take then. Others wait meanwhile.
pub(super) const REQUEST_PATIENCE: Duration = Duration::from_secs(2);

/// Whether this process was started by a keeper.
pub(super) fn is_wanted() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|value| value == "1")
}

/// The keeper, as its worker knows it.
#[derive(Debug)]
pub(super) struct KeeperLink {
    link: Link,
    /// Answers to requests for unmounting. Guards that one request and its answer.
    answers: Mutex<Receiver<Option<ErrorWord>>>,
    /// Answers to questions about disks that are left to the kernel. Guards that one question and its answer.
    passed: Mutex<Receiver<Answer>>,
    is_gone: AtomicBool,
}

impl KeeperLink {
    /// Has the keeper take the mount away.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if it is in use; those of the keeper.
    pub(super) fn unmount(&self) -> Result<()> {
        let gone = || {
            Error::new(ErrorKind::Unsupported, "the keeper of the mount has died, and only it could unmount")
                .with_hint("use umount(8), or cowdisk umount")
        };
        let answers = self.answers.lock();
        self.link.tell(&ToKeeper::Unmount, &[]).map_err(|_| gone())?;
        match answers.recv() {
            Ok(None) => Ok(()),
            Ok(Some(word)) => Err(word.into_error()),
            Err(_) => Err(gone()),
        }
    }

    /// Has the keeper see to it that the program which is now where this one came from takes over, and tell the result to
    /// `asker`.
    ///
    /// # Errors
    /// If the keeper has died.
    pub(super) fn upgrade(&self, asker: BorrowedFd<'_>) -> Result<()> {
        self.link.tell(&ToKeeper::Upgrade, &[asker]).map_err(|_| {
            Error::new(ErrorKind::Unsupported, "the keeper of the mount has died, and only it could upgrade")
                .with_hint("unmount, and mount again")
        })
    }

    /// Asks it about a disk that is left, or is to be left, to the kernel.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it has died.
    pub(super) fn ask(&self, question: Question, file: Option<BorrowedFd<'_>>) -> Result<Answer> {
        let gone = || Error::new(ErrorKind::Unsupported, "the keeper of the mount has died");
        let passed = self.passed.lock();
        let file: Vec<_> = file.into_iter().collect();
        self.link.tell(&ToKeeper::Passthrough(question), &file).map_err(|_| gone())?;
        passed.recv().map_err(|_| gone())
    }

    /// Whether it has died.
    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }
}

/// What a worker takes over.
struct Inheritance {
    handover: Handover,
    lock: ServeLock,
    ledger: Ledger,
    descriptors: Vec<OwnedFd>,
}

/// Serves `store` for the keeper at the other end of the standard input until the mount has gone away, then closes every
/// disk.
///
/// # Errors
/// Why it cannot serve, which the keeper was told as well; what could not be made durable at the end.
pub(super) fn work(store: &Path, options: &MountOptions) -> Result<()> {
    let link = Link::from_stdin()?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    // Whoever has ended meanwhile hears nothing.
    let _ = link.tell(&ToKeeper::Hello { protocol: PROTOCOL, version }, &[]);
    let result = receive(&link).and_then(|inheritance| Worker::start(store, options, inheritance));
    match result {
        Ok(worker) => worker.serve(link),
        Err(error) => {
            // If nobody listens any more, nobody misses it.
            let _ = link.tell(&ToKeeper::Failed(ErrorWord::from(&error)), &[]);
            Err(error)
        }
    }
}

fn receive(link: &Link) -> Result<Inheritance> {
    let strange = || Error::new(ErrorKind::Unsupported, "the keeper of this mount hands over something else");
    let unneeded = || Error::new(ErrorKind::Interrupted, "the keeper of this mount has nothing to hand over");
    let (handover, descriptors) = link.hear::<Handover>()?.ok_or_else(unneeded)?;
    if handover.protocol != PROTOCOL {
        let message = format!(
            "the keeper of this mount speaks version {} of its protocol, not {PROTOCOL}",
            handover.protocol
        );
        return Err(Error::new(ErrorKind::Unsupported, message).with_hint("unmount, and mount again"));
    }
    let mut descriptors = descriptors.into_iter();
    let lock = ServeLock::shared(descriptors.next().ok_or_else(strange)?);
    let ledger = Ledger::adopt(descriptors.next().ok_or_else(strange)?)?;
    let descriptors: Vec<_> = descriptors.collect();
    if descriptors.is_empty() {
        return Err(strange());
    }
    Ok(Inheritance { handover, lock, ledger, descriptors })
}

/// A worker that is about to serve.
struct Worker<'a> {
    options: &'a MountOptions,
    handover: Handover,
    lock: ServeLock,
    connection: Connection,
    fs: Arc<Fs>,
    source: PathBuf,
    run_dir: PathBuf,
}

impl<'a> Worker<'a> {
    fn start(store: &Path, options: &'a MountOptions, inheritance: Inheritance) -> Result<Self> {
        let Inheritance { handover, lock, ledger, descriptors } = inheritance;
        // Before the first thread: what is given up is given up by each thread for itself.
        confine(Role::Worker);
        let connection = Connection::take_over(descriptors, &ledger.agreed()?)?;
        let store = Store::open(store)?.with_space_policy(options.space);
        if !lock.is_of(&store)? {
            let message =
                format!("{}: not the store that is mounted, but another one", store.dir().display());
            return Err(Error::new(ErrorKind::Unsupported, message)
                .with_hint("bring the one that was there back to its place: its disks wait for it"));
        }
        let run_dir = store.run_dir()?;
        let source = mounts::absolute(store.dir())?;
        let store = store.accepting_loss(options.accept_loss).in_service();
        let fs = Arc::new(Fs::adopt(store, ledger, handover.is_first)?);
        Ok(Self { options, handover, lock, connection, fs, source, run_dir })
    }

    fn serve(self, link: Link) -> Result<()> {
        let Self { options, handover, lock, connection, fs, source, run_dir } = self;
        let mountpoint = PathBuf::from(&handover.mountpoint);
        let (events, inbox) = channel();
        let signals = watch_signals(&events)?;
        let ((unmounted, answers), (told, passed)) = (channel(), channel());
        let (answers, passed) = (Mutex::new(answers), Mutex::new(passed));
        let keeper = Arc::new(KeeperLink { link, answers, passed, is_gone: AtomicBool::new(false) });
        let heir = Heir { lock, mountpoint: mountpoint.clone(), options: options.clone() };
        listen(&keeper, Listeners { events: events.clone(), unmounted, told }, heir)?;
        if handover.passthrough == Offer::On {
            fs.pass_through(Arc::new(ByKeeper(Arc::clone(&keeper))));
        }
        // Opens what others had open, for which the keeper may be asked.
        let background = Background::start(Arc::clone(&fs), options.flush_seconds)?;
        let choice = Choice::of(options.transport)?;
        let reading = || drop(keeper.link.tell(&ToKeeper::Reading, &[]));
        let unanswered = match (handover.resend, handover.refuse) {
            (false, _) => Unanswered::Leave,
            (true, false) => Unanswered::Repeat,
            (true, true) => Unanswered::Refuse,
        };
        let threads = options.threads(choice.transport);
        let can_resend = connection.can_resend();
        let session = Session::take_over(connection, Arc::clone(&fs), threads, unanswered, reading)?;
        let session = Arc::new(session);
        await_end(Arc::clone(&session), events)?;
        // Nobody's disk depends on it.
        let known = Some((handover.keeper.clone(), Arc::clone(&keeper)));
        let identity = Identity::new(&source, &mountpoint, options, handover.started, choice, known)
            .passing(handover.passthrough)
            .surviving(can_resend);
        let control = Control::start(&run_dir, identity, Arc::clone(&fs))
            .inspect_err(|error| log::warn!("serving without a control socket: {error}"));
        log::info!("serving {} on {} by the transport {choice}", source.display(), mountpoint.display());
        // A keeper that has died meanwhile is told nothing.
        let _ = keeper.link.tell(&ToKeeper::Ready, &[]);
        let unmounter = Unmounter::by_keeper(mountpoint.clone(), Arc::clone(&keeper));
        let mut attendant =
            Attendant { inbox, mountpoint, device: handover.device, fs: &fs, unmounter, patience: None };
        let ended = loop {
            match attendant.attend() {
                Attended::Ended(ended) => break ended,
                Attended::HandOver if hand_over(&keeper, &background, &session) => return Ok(()),
                Attended::HandOver => {}
            }
        };
        // A session that failed is as if this process had died: no disk is closed, and the next one takes over, if any can.
        if let Err(error) = &ended
            && !keeper.is_gone()
        {
            let _ = keeper.link.tell(&ToKeeper::Failed(ErrorWord::from(error)), &[]);
            return ended;
        }
        drop(control);
        drop(background);
        drop(signals);
        let speaker = if keeper.is_gone() { std::process::id() } else { handover.keeper.pid };
        take_leave(&keeper, close(ended, &fs), &run_dir, speaker)
    }
}

/// Says that all is closed, and what went wrong, to the keeper and to whoever unmounted; `speaker` is the process that he
/// knows.
fn take_leave(keeper: &KeeperLink, errors: Vec<Error>, run_dir: &Path, speaker: u32) -> Result<()> {
    if let Err(error) = Farewell::write(run_dir, speaker, &errors) {
        log::warn!("leave word of the end: {error}");
    }
    let words = errors.iter().map(ErrorWord::from).collect();
    let _ = keeper.link.tell(&ToKeeper::Ended(words), &[]);
    match errors.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Stops, so that another process can take over, and says whether this one has.
fn hand_over(keeper: &KeeperLink, background: &Background, session: &Session) -> bool {
    let mut begun = Instant::now();
    let stopped = if background.pause(BACKGROUND_PATIENCE) {
        begun = Instant::now();
        session.hand_over(REQUEST_PATIENCE, |processors, times| {
            keeper.link.tell(&ToKeeper::Nudge { processors, times }, &[])
        })
    } else {
        let seconds = BACKGROUND_PATIENCE.as_secs();
        let message = format!("a flush in the background has not ended after {seconds} s");
        Err(Error::new(ErrorKind::Busy, message))
    };
    let told = stopped.and_then(|()| {
        let pause_milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        log::info!("handing over after {pause_milliseconds} ms");
        // Without a keeper nobody takes over.
        let told = keeper.link.tell(&ToKeeper::HandedOver { pause_milliseconds }, &[]);
        told.map_err(|error| session.take_back().err().unwrap_or(error))
    });
    let Err(error) = told else { return true };
    background.resume();
    log::warn!("serving on: {error}");
    let _ = keeper.link.tell(&ToKeeper::ServesOn(ErrorWord::from(&error)), &[]);
    false
}

/// What is to be done when the keeper dies.
struct Heir {
    lock: ServeLock,
    mountpoint: PathBuf,
    options: MountOptions,
}

impl Heir {
    fn take_over(&mut self) {
        log::warn!(
            "the keeper of the mount has died: serving on without one; should this process end too, the mount is cut off"
        );
        if let Err(error) = self.lock.inherit(&self.mountpoint, self.options.space) {
            log::warn!("write down who serves: {error}");
        }
    }
}

/// Who is told what the keeper says.
struct Listeners {
    events: Sender<Event>,
    unmounted: Sender<Option<ErrorWord>>,
    told: Sender<Answer>,
}

/// Hears what the keeper says, in a thread of its own.
fn listen(keeper: &Arc<KeeperLink>, listeners: Listeners, mut heir: Heir) -> Result<()> {
    let keeper = Arc::clone(keeper);
    let hear = move || {
        loop {
            // Nobody listens only when this process has ended anyway.
            match keeper.link.hear() {
                Ok(Some((ToWorker::Leave(signal), _))) => drop(listeners.events.send(Event::Signal(signal))),
                Ok(Some((ToWorker::Unmounted(failure), _))) => drop(listeners.unmounted.send(failure)),
                Ok(Some((ToWorker::HandOver, _))) => drop(listeners.events.send(Event::HandOver)),
                Ok(Some((ToWorker::Passthrough(answer), _))) => drop(listeners.told.send(answer)),
                Ok(None) => break,
                Err(error) => log::warn!("{error}"),
            }
        }
        keeper.is_gone.store(true, Ordering::Release);
        drop(listeners);
        heir.take_over();
        // It keeps the lock for as long as the process lives.
        loop {
            std::thread::park();
        }
    };
    std::thread::Builder::new().name("keeper".to_owned()).spawn(hear).map(drop).context(|| "start a thread")
}
