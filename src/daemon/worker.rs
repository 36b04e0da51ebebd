//! The process that serves a mount which another one, the [keeper](super::keeper), has made and keeps.
//!
//! It takes over where the last one left off, first or not: with the ledger of open files, the live maps of their disks
//! and what the kernel sends again. It is confined before it looks at any of that, and holds no capability at all: for
//! unmounting it asks the keeper. If the keeper dies it serves on, alone, and says so.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use parking_lot::Mutex;

use super::attendant::{Attendant, Event};
use super::background::Background;
use super::confine::{Role, confine};
use super::control::Control;
use super::farewell::Farewell;
use super::link::{ErrorWord, Handover, Link, PROTOCOL, ToKeeper, ToWorker};
use super::mounts;
use super::options::MountOptions;
use super::serve::{await_end, close, watch_signals};
use super::status::Identity;
use super::unmounter::Unmounter;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::{Fs, Ledger};
use crate::store::{ServeLock, Store};
use crate::transport::{Connection, Session, Transport};

/// Set to 1 in the environment of a process whose standard input is a socket to its keeper.
pub(super) const VARIABLE: &str = "COWDISK_KEPT";

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
    let (handover, descriptors) = link.hear::<Handover>()?.ok_or_else(strange)?;
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
        let background = Background::start(Arc::clone(&fs), options.flush_seconds)?;
        let (answered, answers) = channel();
        let keeper =
            Arc::new(KeeperLink { link, answers: Mutex::new(answers), is_gone: AtomicBool::new(false) });
        let heir = Heir { lock, mountpoint: mountpoint.clone(), options: options.clone() };
        listen(&keeper, events.clone(), answered, heir)?;
        let threads = options.threads(Transport::DevFuse);
        let session = Session::take_over(connection, Arc::clone(&fs), threads, handover.resend)?;
        await_end(session, events)?;
        // Nobody's disk depends on it.
        let known = Some((handover.keeper.clone(), Arc::clone(&keeper)));
        let identity = Identity::new(&source, &mountpoint, options, handover.started, known);
        let control = Control::start(&run_dir, identity, Arc::clone(&fs))
            .inspect_err(|error| log::warn!("serving without a control socket: {error}"));
        log::info!("serving {} on {} by the transport dev_fuse", source.display(), mountpoint.display());
        // A keeper that has died meanwhile is told nothing.
        let _ = keeper.link.tell(&ToKeeper::Ready, &[]);
        let unmounter = Unmounter::by_keeper(mountpoint.clone(), Arc::clone(&keeper));
        let ended =
            Attendant { inbox, mountpoint, device: handover.device, fs: &fs, unmounter, patience: None }
                .attend();
        drop(control);
        drop(background);
        drop(signals);
        // A session that failed is as if this process had died: no disk is closed, and the next one takes over, if any can.
        let ended = if keeper.is_gone() { ended } else { Ok(ended?) };
        let errors = close(ended, &fs);
        let speaker = if keeper.is_gone() { std::process::id() } else { handover.keeper.pid };
        if let Err(error) = Farewell::write(&run_dir, speaker, &errors) {
            log::warn!("leave word of the end: {error}");
        }
        let words = errors.iter().map(ErrorWord::from).collect();
        let _ = keeper.link.tell(&ToKeeper::Ended(words), &[]);
        match errors.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
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

/// Hears what the keeper says, in a thread of its own.
fn listen(
    keeper: &Arc<KeeperLink>,
    events: Sender<Event>,
    answered: Sender<Option<ErrorWord>>,
    mut heir: Heir,
) -> Result<()> {
    let keeper = Arc::clone(keeper);
    let hear = move || {
        loop {
            // Nobody listens only when this process has ended anyway.
            match keeper.link.hear() {
                Ok(Some((ToWorker::Leave(signal), _))) => drop(events.send(Event::Signal(signal))),
                Ok(Some((ToWorker::Unmounted(failure), _))) => drop(answered.send(failure)),
                Ok(None) => break,
                Err(error) => log::warn!("{error}"),
            }
        }
        keeper.is_gone.store(true, Ordering::Release);
        drop(answered);
        heir.take_over();
        // It keeps the lock for as long as the process lives.
        loop {
            std::thread::park();
        }
    };
    std::thread::Builder::new().name("keeper".to_owned()).spawn(hear).map(drop).context(|| "start a thread")
}
