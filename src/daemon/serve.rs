//! The life of a daemon: mount, serve, and end when the mount has gone away.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use rustix::process::{Resource, Rlimit};

use super::attendant::{Attendant, Attended, Event};
use super::background::{Background, report};
use super::confine::{Role, confine};
use super::control::Control;
use super::farewell::Farewell;
use super::identity;
use super::keeper;
use super::mounted::Mounted;
use super::mountpoint;
use super::mounts;
use super::options::MountOptions;
use super::signals::SignalWatch;
use super::status::Identity;
use super::unmounter::Unmounter;
use crate::error::{Context, Error, Result};
use crate::fs::Fs;
use crate::store::{ServeLock, Store, Timestamp};
use crate::transport::{Choice, Session, Transport};

/// Open files wanted: for 200,000 overlays, each of which takes five (map, data twice, base and live map), and
/// some besides.
const DESCRIPTORS: u64 = 1 << 20;

/// Mounts `store` on `mountpoint` and serves it until the mount is taken away, then closes every disk. `on_ready` is
/// called once files can be read.
///
/// With a transport that can be taken over, another process serves, and this one keeps the mount and sees to it that
/// there always is one: see [`super::keeper`]. That process is this very program, called as this one was.
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
pub(super) fn serve(
    store: Store,
    mountpoint: &Path,
    options: &MountOptions,
    on_ready: impl FnOnce(),
) -> Result<()> {
    let choice = Choice::of(options.transport)?;
    choice.transport.require()?;
    match choice.transport {
        Transport::Fuser => serve_alone(store, mountpoint, options, choice, on_ready),
        kept => keeper::keep(store, mountpoint, options, kept, on_ready),
    }
}

/// Takes the right to serve `store` on `mountpoint`, which becomes absolute.
pub(super) fn take(
    store: Store,
    mountpoint: &Path,
    options: &MountOptions,
) -> Result<(Store, PathBuf, ServeLock)> {
    // The way to the mountpoint may be closed to the store's owner.
    let mountpoint = identity::with_capabilities(|| mountpoint::prepare(mountpoint, store.dir()))?;
    let store = store.with_space_policy(options.space);
    let lock = store.serve_lock(&mountpoint)?;
    store.clear_marks()?;
    Ok((store, mountpoint, lock))
}

/// Serves in this process, which no other can succeed.
fn serve_alone(
    store: Store,
    mountpoint: &Path,
    options: &MountOptions,
    choice: Choice,
    on_ready: impl FnOnce(),
) -> Result<()> {
    let (store, mountpoint, lock) = take(store, mountpoint, options)?;
    let run_dir = store.run_dir()?;
    let source = mounts::absolute(store.dir())?;
    raise_descriptor_limit();
    let fs = Arc::new(Fs::new(store.accepting_loss(options.accept_loss))?);
    let unmounter = Unmounter::new(&mountpoint)?;
    // Taken away again, when this is dropped, if something fails before it is answered.
    let (mounted, device) =
        identity::with_capabilities(|| Mounted::new(&source, &mountpoint, options, &unmounter))?;
    let number = mounted.device;
    // Before the first thread: what is given up is given up by each thread for itself.
    confine(Role::Alone { mountpoint: &mountpoint });
    let (events, inbox) = channel();
    let signals = watch_signals(&events)?;
    let background = Background::start(Arc::clone(&fs), options.flush_seconds)?;
    let threads = options.threads(choice.transport);
    let session = Session::begin_alone(device, Arc::clone(&fs), threads)?;
    await_end(Arc::new(session), events)?;
    mounted.answered();
    // Nobody's disk depends on it.
    let identity = Identity::new(&source, &mountpoint, options, Timestamp::now(), choice, None);
    let control = Control::start(&run_dir, identity, Arc::clone(&fs))
        .inspect_err(|error| log::warn!("serving without a control socket: {error}"));
    log::info!("serving {} on {} by the transport {choice}", source.display(), mountpoint.display());
    log::info!("with that transport no other process can take over from this one");
    on_ready();
    let mut attendant = Attendant { inbox, mountpoint, device: number, fs: &fs, unmounter, patience: None };
    // Nobody tells this process to hand over.
    let ended = loop {
        if let Attended::Ended(ended) = attendant.attend() {
            break ended;
        }
    };
    drop(control);
    drop(background);
    drop(signals);
    let errors = close(ended, &fs);
    if let Err(error) = Farewell::write(&run_dir, std::process::id(), &errors) {
        log::warn!("leave word of the end: {error}");
    }
    drop(lock);
    log::info!("ended");
    match errors.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Tells `events` of each signal that asks the daemon to end.
pub(super) fn watch_signals(events: &Sender<Event>) -> Result<SignalWatch> {
    let events = events.clone();
    SignalWatch::start(move |name| {
        // Nobody listens only when the daemon has ended anyway.
        let _ = events.send(Event::Signal(name.to_owned()));
    })
}

/// Tells `events` when the session has ended.
pub(super) fn await_end(session: Arc<Session>, events: Sender<Event>) -> Result<()> {
    let wait = move || {
        // Nobody listens only when the daemon has ended anyway.
        let _ = events.send(Event::Ended(session.wait()));
    };
    std::thread::Builder::new().name("session".to_owned()).spawn(wait).map(drop).context(|| "start a thread")
}

/// Closes every disk; returns what went wrong, at the end of the mount or now.
pub(super) fn close(ended: Result<()>, fs: &Fs) -> Vec<Error> {
    let mut errors: Vec<Error> = ended.err().into_iter().collect();
    errors.extend(fs.close_all());
    report("end", &errors);
    errors
}

/// An open overlay takes up to five descriptors, and the usual limit is 1,024. As many as the host allows; with fewer,
/// opening a disk fails when they are used up.
pub(super) fn raise_descriptor_limit() {
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
