//! An upgrade, as the keeper sees it: another worker, started from the program that is now in the place of its own, takes over
//! from the one that serves.
//!
//! | stage | what goes on | if it fails, or takes too long |
//! |---|---|---|
//! | starting | the candidate's process begins, and says which protocol it speaks | nobody has noticed anything |
//! | standing by | the worker answers what it had begun, by rings takes all entries from the kernel, and ends | it reads on, and the candidate is dismissed |
//! | taking over | the candidate gets everything, and begins to answer | it is killed, and the program of before takes over; but by rings, once it fetches, it serves on, or the mount is cut off |
//!
//! Whoever asked for it has left a socket, on which the keeper answers; it reads nothing from there.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendFlags};
use serde::{Deserialize, Serialize};

use super::employ::Worker;
use super::http;
use super::link::{ErrorWord, PROTOCOL};
use super::program::Program;
use super::worker::{BACKGROUND_PATIENCE, REQUEST_PATIENCE};
use crate::error::{Error, ErrorKind, Result};
use crate::transport::Nudged;

/// How long a candidate may take to say what it is.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// How long the worker may take to say that it has stopped or cannot: more than it gives itself.
const STOP_PATIENCE: Duration =
    BACKGROUND_PATIENCE.saturating_add(REQUEST_PATIENCE).saturating_add(Duration::from_secs(5));

/// How long the candidate may take to serve. Guests wait meanwhile.
const READY_PATIENCE: Duration = Duration::from_secs(5);

/// How long what the worker was given to hand over may take to be answered, once somebody serves.
const NUDGE_PATIENCE: Duration = Duration::from_secs(1);

/// How long all of it may take.
pub(super) const PATIENCE: Duration = START_PATIENCE
    .saturating_add(STOP_PATIENCE)
    .saturating_add(READY_PATIENCE)
    .saturating_add(READY_PATIENCE)
    .saturating_add(NUDGE_PATIENCE);

/// What an upgrade has come to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgraded {
    /// The version that served before.
    pub from: String,
    /// The one that serves now.
    pub to: String,
    /// For how long, in milliseconds, no request was read.
    pub pause_milliseconds: u64,
}

/// What whoever asks is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Upgraded(Upgraded),
    Failed(ErrorWord),
}

/// The response to whoever asked for an upgrade.
pub(super) fn response(result: Result<Upgraded>) -> Vec<u8> {
    let answer = result.map_or_else(|error| Answer::Failed(ErrorWord::from(&error)), Answer::Upgraded);
    let text = serde_json::to_string(&answer).expect("plain numbers and text");
    http::response("application/json", &(text + "\n"))
}

/// What the body of such a response says; `None` if it is none.
pub(super) fn read_answer(body: &[u8]) -> Option<Result<Upgraded>> {
    match serde_json::from_slice(body).ok()? {
        Answer::Upgraded(upgraded) => Some(Ok(upgraded)),
        Answer::Failed(word) => Some(Err(word.into_error())),
    }
}

/// The socket of whoever asks.
pub(super) struct Asker(OwnedFd);

impl Asker {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Answers, if that goes without waiting.
    pub(super) fn answer(self, result: Result<Upgraded>) {
        let bytes = response(result);
        // By a call for sockets alone: the worker chose the descriptor, and it must be nothing that a write of ours would
        // change.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut none = SendAncillaryBuffer::default();
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut none, flags);
        if let Err(errno) = sent {
            log::debug!("tell whoever asked for an upgrade: {errno}");
        }
    }
}

/// Where an upgrade has got to.
pub(super) enum Stage {
    /// The candidate has not said yet what it is.
    Starting(Worker),
    /// It waits for what it will be handed over.
    StandingBy(Worker),
    /// It is the worker now.
    TakingOver,
}

/// An upgrade that is under way.
pub(super) struct Upgrade {
    pub(super) program: Program,
    pub(super) stage: Stage,
    /// When it has taken too long.
    pub(super) until: Instant,
    /// The version that serves when it begins.
    pub(super) from: String,
    /// For how long the worker had read nothing when it said that it had handed over, and when that was.
    stopped: Option<(Duration, Instant)>,
    /// What the worker was given to be able to hand over.
    pub(super) nudged: Option<Nudged>,
    asker: Asker,
}

impl Upgrade {
    pub(super) fn new(program: Program, candidate: Worker, from: String, asker: Asker) -> Self {
        let until = Instant::now() + START_PATIENCE;
        Self { program, stage: Stage::Starting(candidate), until, from, stopped: None, nudged: None, asker }
    }

    /// The candidate, unless it is the worker already.
    pub(super) fn candidate(&mut self) -> Option<&mut Worker> {
        match &mut self.stage {
            Stage::Starting(candidate) | Stage::StandingBy(candidate) => Some(candidate),
            Stage::TakingOver => None,
        }
    }

    /// The candidate speaks that protocol: it stands by.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it is another than ours.
    pub(super) fn stand_by(&mut self, protocol: u32, version: String) -> Result<()> {
        if protocol != PROTOCOL {
            let message = format!(
                "it is cowdisk {version} and speaks version {protocol} of the protocol between the processes of a daemon; the \
                 one that keeps the mount is cowdisk {} and speaks {PROTOCOL}",
                env!("CARGO_PKG_VERSION")
            );
            return Err(Error::new(ErrorKind::Unsupported, message).with_hint(
                "it takes over with the next mount: shut the guests down, unmount, and mount again",
            ));
        }
        if let Stage::Starting(_) = self.stage {
            self.until = Instant::now() + STOP_PATIENCE;
        }
        self.stage = match std::mem::replace(&mut self.stage, Stage::TakingOver) {
            Stage::Starting(mut candidate) => {
                candidate.version = Some(version);
                Stage::StandingBy(candidate)
            }
            other => other,
        };
        Ok(())
    }

    /// The worker has handed over; only its end is waited for.
    pub(super) fn note_stopped(&mut self, stopped: Option<(Duration, Instant)>) {
        self.stopped = stopped;
        self.until = Instant::now() + READY_PATIENCE;
    }

    /// The candidate is to take over now; `None` if it does not stand by.
    pub(super) fn take_over(&mut self) -> Option<Worker> {
        match std::mem::replace(&mut self.stage, Stage::TakingOver) {
            Stage::StandingBy(candidate) => {
                self.until = Instant::now() + READY_PATIENCE;
                Some(candidate)
            }
            other => {
                self.stage = other;
                None
            }
        }
    }

    /// Tells whoever asked that it has succeeded.
    pub(super) fn succeed(self, to: String) -> Program {
        self.forget_nudges();
        let pause = self.stopped.map_or(Duration::ZERO, |(before, since)| before + since.elapsed());
        let pause_milliseconds = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        log::info!("upgraded from {} to {to}; no request was read for {pause_milliseconds} ms", self.from);
        self.asker.answer(Ok(Upgraded { from: self.from, to, pause_milliseconds }));
        self.program
    }

    /// Waits until the mount is not in use by us any more, which it is not if anybody serves it.
    fn forget_nudges(&self) {
        if let Some(nudged) = &self.nudged {
            nudged.wait(NUDGE_PATIENCE);
        }
    }

    /// Dismisses the candidate and tells whoever asked why.
    pub(super) fn fail(mut self, why: Error) {
        if let Some(candidate) = self.candidate() {
            candidate.kill();
        }
        self.forget_nudges();
        let error = why.context(format!("upgrade to {}", self.program.path().display()));
        log::warn!("{error}");
        self.asker.answer(Err(error));
    }
}
