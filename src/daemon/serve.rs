//! The life of a daemon: mount, serve, and end when the mount has gone away.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::process::{Resource, Rlimit};

use super::background::{Background, report};
use super::confine::confine;
use super::control::Control;
use super::farewell::Farewell;
use super::holders;
use super::identity;
use super::mountpoint;
use super::mounts;
use super::options::MountOptions;
use super::signals::SignalWatch;
use super::status::Identity;
use super::unmounter::Unmounter;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Fs;
use crate::store::Store;
use crate::transport::mount::{self, MountRequest};
use crate::transport::{Session, Transport};

/// How long a signalled daemon waits for its mount to fall idle before it gives up and serves on. Below the 90 seconds
/// after which systemd kills.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it tries within that time.
const RETRY: Duration = Duration::from_millis(500);

/// Open files wanted: for 200,000 overlays, each of which takes five (map, data twice, base and live map), and
/// some besides.
const DESCRIPTORS: u64 = 1 << 20;

enum Event {
    /// The mount is gone, or a thread of the session has failed.
    Ended(Result<()>),
    /// The name of a signal that asks the daemon to end.
    Signal(&'static str),
}

/// Mounts `store` on `mountpoint` and serves it until the mount is taken away, then closes every disk. `on_ready` is
/// called once files can be read.
///
/// SIGTERM, SIGINT and SIGHUP flush every disk and take the mount away if nobody uses it. A mount in use is never
/// pulled from under a guest: that it is used is logged, for a minute the mount is taken away as soon as it falls idle, and
/// then the daemon serves on as if there had been no signal. A mount that is gone here but lives on in another mount
/// namespace, with no file open, is left behind dead; the session's threads then end with the process.
///
/// Once it has mounted, the process gives up every privilege that serving does not need, for good. A caller that has
/// other threads keeps those of theirs.
///
/// # Errors
/// Before `on_ready`: why the store cannot be mounted; nothing is mounted then. After it: what could not be made durable.
pub fn serve(store: Store, mountpoint: &Path, options: &MountOptions, on_ready: impl FnOnce()) -> Result<()> {
    let transport = options.transport.map_or_else(Transport::of_environment, Ok)?;
    // The way to the mountpoint may be closed to the store's owner.
    let mountpoint = identity::with_capabilities(|| mountpoint::prepare(mountpoint, store.dir()))?;
    let store = store.with_space_policy(options.space);
    let lock = store.serve_lock(&mountpoint)?;
    let run_dir = store.run_dir()?;
    let source = mounts::absolute(store.dir())?;
    raise_descriptor_limit();
    let fs = Arc::new(Fs::new(store.accepting_loss(options.accept_loss))?);
    let unmounter = Unmounter::new(&mountpoint)?;
    // Taken away again, when this is dropped, if something fails before it is answered.
    let mounted = identity::with_capabilities(|| Mounted::new(&source, &mountpoint, options, &unmounter))?;
    // Before the first thread: what is given up is given up by each thread for itself.
    confine(&mountpoint);
    let (events, inbox) = channel();
    let signalled = events.clone();
    let signals = SignalWatch::start(move |name| {
        // Nobody listens only when the daemon has ended anyway.
        let _ = signalled.send(Event::Signal(name));
    })?;
    let background = Background::start(Arc::clone(&fs), options.flush_seconds)?;
    let device = mounted.answer(transport, options.threads, &fs, events)?;
    // Nobody's disk depends on it.
    let identity = Identity::new(&source, &mountpoint, options, transport);
    let control = Control::start(&run_dir, identity, Arc::clone(&fs))
        .inspect_err(|error| log::warn!("serving without a control socket: {error}"));
    log::info!("serving {} on {} by the transport {transport}", source.display(), mountpoint.display());
    on_ready();
    let ended = Keeper { inbox, mountpoint, device, fs: &fs, unmounter, patience: None }.keep();
    drop(control);
    drop(background);
    drop(signals);
    let mut errors: Vec<Error> = ended.err().into_iter().collect();
    errors.extend(fs.close_all());
    report("end", &errors);
    if let Err(error) = Farewell::write(&run_dir, &errors) {
        log::warn!("leave word of the end: {error}");
    }
    drop(lock);
    log::info!("ended");
    match errors.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// How the mount was given up.
enum Left {
    /// It was taken away; the session ends by itself.
    Unmounted,
    /// It lives on somewhere where it cannot be taken away, but nobody has a file of it open.
    Abandoned,
}

/// A mount that nobody answers for yet; dropped, it is taken away.
struct Mounted<'a> {
    /// What the kernel waits on for an answer.
    device: OwnedFd,
    /// The mount's own folder, opened while the way to it was open to us. It keeps the mount busy.
    root: OwnedFd,
    rest: Rest<'a>,
}

/// What takes the mount away, unless it is answered for.
struct Rest<'a> {
    unmounter: &'a Unmounter,
    is_answered: bool,
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        if !self.is_answered
            && let Err(error) = self.unmounter.unmount()
        {
            log::warn!("{error}");
        }
    }
}

impl<'a> Mounted<'a> {
    fn new(
        source: &Path,
        mountpoint: &Path,
        options: &MountOptions,
        unmounter: &'a Unmounter,
    ) -> Result<Self> {
        let root = rustix::process::geteuid().is_root() || identity::may_mount();
        let request = MountRequest {
            source,
            mountpoint,
            read_only: options.read_only,
            allow_other: options.allows_other(root),
        };
        let device = mount::mount(&request)?;
        let rest = Rest { unmounter, is_answered: false };
        // Asks nothing of the mount.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(mountpoint, flags, Mode::empty())
            .context(|| format!("open {}", mountpoint.display()))?;
        Ok(Self { device, root, rest })
    }

    /// Starts a session with the kernel, whose end `events` will tell; returns the device of the mount.
    fn answer(
        self,
        transport: Transport,
        threads: usize,
        fs: &Arc<Fs>,
        events: Sender<Event>,
    ) -> Result<(u32, u32)> {
        let Self { device, root, mut rest } = self;
        let session = Session::start(transport, device, Arc::clone(fs), threads)?;
        // First of all, for its end, should it fail to answer, ends the waiting below.
        std::thread::Builder::new()
            .name("session".to_owned())
            .spawn(move || {
                // Nobody listens only when the daemon has ended anyway.
                let _ = events.send(Event::Ended(session.wait()));
            })
            .context(|| "start a thread")?;
        let found = rustix::fs::statx(&root, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS);
        drop(root);
        let found = found.context(|| "look at the mount")?;
        rest.is_answered = true;
        Ok((found.stx_dev_major, found.stx_dev_minor))
    }
}

/// The daemon's main thread while the mount is there.
struct Keeper<'a> {
    inbox: Receiver<Event>,
    mountpoint: PathBuf,
    device: (u32, u32),
    fs: &'a Fs,
    unmounter: Unmounter,
    /// Until when to go on trying to take the mount away.
    patience: Option<Instant>,
}

impl Keeper<'_> {
    /// Waits until the mount is gone.
    fn keep(mut self) -> Result<()> {
        loop {
            let event = match self.patience {
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => self.inbox.recv_timeout(RETRY),
            };
            match event {
                Ok(Event::Ended(result)) => return result,
                Ok(Event::Signal(name)) => {
                    if let Some(Left::Abandoned) = self.begin_to_leave(name) {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(Left::Abandoned) = self.try_to_leave() {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(ErrorKind::Io, "the session's thread is gone"));
                }
            }
        }
    }

    fn begin_to_leave(&mut self, signal: &str) -> Option<Left> {
        log::info!("{signal}: taking the mount {} away", self.mountpoint.display());
        // First of all, whatever comes: a second signal may be one that kills.
        report("flush at a signal", &self.fs.flush_dirty());
        match self.leave() {
            Ok(left) => {
                self.patience = None;
                Some(left)
            }
            Err(error) => {
                let seconds = PATIENCE.as_secs();
                log::warn!("{signal}: {error}; waiting up to {seconds} s, `kill -9` would cut them off");
                self.patience = Some(Instant::now() + PATIENCE);
                None
            }
        }
    }

    fn try_to_leave(&mut self) -> Option<Left> {
        match self.leave() {
            Ok(left) => {
                self.patience = None;
                Some(left)
            }
            Err(error) => {
                if self.patience.is_some_and(|until| Instant::now() >= until) {
                    log::error!("staying mounted, for {error}");
                    self.patience = None;
                }
                None
            }
        }
    }

    /// Takes the mount away if nobody uses it.
    fn leave(&self) -> Result<Left> {
        let mounts = mounts::mounts()?;
        // Somebody may have detached ours, and mounted something else there.
        let detached =
            mounts::mount_at(&mounts, &self.mountpoint).is_none_or(|mount| mount.device != self.device);
        if detached {
            return match self.fs.open_files() {
                0 => Ok(Left::Abandoned),
                _ => Err(self.in_use("detached from its mountpoint, but")),
            };
        }
        match self.unmounter.unmount() {
            Ok(()) => Ok(Left::Unmounted),
            Err(error) if error.kind() == ErrorKind::Busy => Err(self.in_use("")),
            Err(error) => Err(error),
        }
    }

    fn in_use(&self, but: &str) -> Error {
        let holders = holders::describe(&holders::holders(self.device));
        let space = if but.is_empty() { "" } else { " " };
        let text = match holders.as_str() {
            "" => format!(
                "{} is{space}{but} in use, by whom this confined process may not see: `cowdisk umount` as root names them",
                self.mountpoint.display()
            ),
            _ => format!("{} is{space}{but} in use: {holders}", self.mountpoint.display()),
        };
        Error::new(ErrorKind::Busy, text)
    }
}

/// An open overlay takes up to five descriptors, and the usual limit is 1,024. As many as the host allows; with fewer,
/// opening a disk fails when they are used up.
fn raise_descriptor_limit() {
    let now = rustix::process::getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    let enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= DESCRIPTORS);
    if enough(now.current) {
        return;
    }
    // Only root may raise the maximum as well.
    let raised = !enough(now.maximum) && rustix::process::setrlimit(Resource::Nofile, wanted).is_ok();
    if !raised {
        let most = Rlimit { current: now.maximum, maximum: now.maximum };
        if let Err(errno) = rustix::process::setrlimit(Resource::Nofile, most) {
            log::warn!("raise the limit of open files from {:?}: {errno}", now.current);
        }
    }
}
