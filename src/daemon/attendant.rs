//! The main thread of a process that serves, while the mount is there: it waits for the mount's end, and takes the mount
//! away when a signal asks for that and nobody uses it.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::background::report;
use super::holders;
use super::mounts;
use super::unmounter::Unmounter;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::Fs;

/// How long a signalled daemon waits for its mount to fall idle before it gives up and serves on. Below the 90 seconds
/// after which systemd kills.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// How often it tries within that time.
const RETRY: Duration = Duration::from_millis(500);

/// What happens to a mount.
pub(super) enum Event {
    /// The mount is gone, or a thread of the session has failed.
    Ended(Result<()>),
    /// The name of a signal that asks the daemon to end.
    Signal(String),
    /// Another process stands by to take over from this one.
    HandOver,
}

/// Why there is nothing more to attend to for the moment.
pub(super) enum Attended {
    /// The mount is gone, or a thread of the session has failed.
    Ended(Result<()>),
    /// Another process is to take over.
    HandOver,
}

/// How the mount was given up.
enum Left {
    /// It was taken away; the session ends by itself.
    Unmounted,
    /// It lives on somewhere where it cannot be taken away, but nobody has a file of it open.
    Abandoned,
}

/// The daemon's main thread while the mount is there.
pub(super) struct Attendant<'a> {
    pub(super) inbox: Receiver<Event>,
    pub(super) mountpoint: PathBuf,
    pub(super) device: (u32, u32),
    pub(super) fs: &'a Fs,
    pub(super) unmounter: Unmounter,
    /// Until when to go on trying to take the mount away.
    pub(super) patience: Option<Instant>,
}

impl Attendant<'_> {
    /// Waits until the mount is gone, or another process is to take over; if it does not, to be called again.
    pub(super) fn attend(&mut self) -> Attended {
        loop {
            let event = match self.patience {
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => self.inbox.recv_timeout(RETRY),
            };
            match event {
                Ok(Event::Ended(result)) => return Attended::Ended(result),
                Ok(Event::HandOver) => return Attended::HandOver,
                Ok(Event::Signal(name)) => {
                    if let Some(Left::Abandoned) = self.begin_to_leave(&name) {
                        return Attended::Ended(Ok(()));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(Left::Abandoned) = self.try_to_leave() {
                        return Attended::Ended(Ok(()));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let gone = Error::new(ErrorKind::Io, "the session's thread is gone");
                    return Attended::Ended(Err(gone));
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
