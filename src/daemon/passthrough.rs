//! Leaving disks to the kernel: what worker and keeper say about it, and what the keeper remembers.
//!
//! The kernel serves a file by itself only for whoever has CAP_SYS_ADMIN, which of the two processes the keeper alone can
//! have. So the worker sends the file, and the keeper tells the kernel. It also remembers the numbers by which the kernel
//! knows the files: the next worker must give the same one to whoever opens a disk that is open already.
//!
//! The kernel looks neither at how a file was opened nor at whose it is. So the keeper does: it passes on nothing but the
//! file of the very disk of its store that the worker names, and only if the worker had it open for reading and writing.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::identity;
use super::link::ErrorWord;
use super::worker::KeeperLink;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::{BackingId, DiskKey, Passthrough};
use crate::store::{ObjectName, Store};
use crate::transport::{Connection, Road};

/// Whether a keeper has the kernel serve disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Offer {
    /// It does.
    On,
    /// It does not, for this reason.
    Off(String),
}

impl Offer {
    /// What is offered to a user who has `wanted` it or not, and may or may not, where requests travel by `road` and the kernel
    /// can or not.
    pub(super) fn new(wanted: bool, may: bool, road: Road, can: bool) -> Self {
        let why_not = match (wanted, may, can) {
            (true, true, true) => return Self::On,
            (false, ..) => "the mount was not made with the option passthrough=auto",
            _ if road == Road::Rings => "the transport io_uring cannot",
            (_, false, _) => "it takes CAP_SYS_ADMIN",
            (.., false) => "this kernel cannot; Linux 6.9 and newer can, built with CONFIG_FUSE_PASSTHROUGH",
        };
        Self::Off(why_not.to_owned())
    }

    /// Says in the log why there is none, if it was `wanted`.
    pub(super) fn tell(&self, wanted: bool) {
        if let Some(why_not) = self.why_not().filter(|_| wanted) {
            log::warn!("no disk is left to the kernel: {why_not}");
        }
    }

    /// Why there is none.
    pub(super) fn why_not(&self) -> Option<&str> {
        match self {
            Self::On => None,
            Self::Off(why_not) => Some(why_not),
        }
    }
}

/// What a worker wants to have done with a disk. A file comes with [`Wanted::Pass`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Question {
    instance: ObjectName,
    /// The instance's id, and one of its disks, as they write themselves.
    id: String,
    disk: String,
    wanted: Wanted,
}

impl Question {
    fn new(key: &DiskKey, wanted: Wanted) -> Self {
        let DiskKey { instance, disk, id } = key;
        Self { instance: instance.clone(), id: id.to_string(), disk: disk.to_string(), wanted }
    }

    fn disk(self) -> Result<DiskKey> {
        Ok(DiskKey { instance: self.instance, disk: self.disk.parse()?, id: self.id.parse()? })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Wanted {
    /// Say whether the kernel serves it.
    Passed,
    /// Have the kernel serve it.
    Pass,
    /// Have the kernel no longer serve it.
    End,
}

/// What the keeper says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// The number by which the kernel serves the disk, if it does.
    Number(Option<i32>),
    /// Why it does not.
    Refused(ErrorWord),
}

/// The disks that the kernel serves, as the keeper knows them.
pub(super) struct Passed {
    store: Store,
    numbers: HashMap<DiskKey, BackingId>,
}

impl Passed {
    /// None yet, of `store`.
    pub(super) fn new(store: Store) -> Self {
        Self { store, numbers: HashMap::new() }
    }

    /// Does what a worker asks for; `files` came with the question.
    pub(super) fn answer(
        &mut self,
        question: Question,
        files: &[OwnedFd],
        connection: &Connection,
    ) -> Answer {
        let wanted = question.wanted;
        let number = question.disk().and_then(|disk| match wanted {
            Wanted::Passed => Ok(self.numbers.get(&disk).copied()),
            Wanted::Pass => self.pass(disk, files, connection).map(Some),
            Wanted::End => self.end(&disk, connection).map(|()| None),
        });
        match number {
            Ok(number) => Answer::Number(number.map(|number| number.0)),
            Err(error) => Answer::Refused(ErrorWord::from(&error)),
        }
    }

    fn pass(&mut self, disk: DiskKey, files: &[OwnedFd], connection: &Connection) -> Result<BackingId> {
        let [file] = files else {
            let message =
                "its file has not come to the process that keeps the mount, which may have too many open";
            return Err(Error::new(ErrorKind::Invalid, message));
        };
        self.store.check_whole_file(&disk.instance, disk.disk, file.as_fd())?;
        if let Some(number) = self.numbers.get(&disk) {
            return Ok(*number);
        }
        let number = identity::with_capabilities(|| connection.pass_through(file.as_fd()))?;
        self.numbers.insert(disk, number);
        Ok(number)
    }

    fn end(&mut self, disk: &DiskKey, connection: &Connection) -> Result<()> {
        if let Some(number) = self.numbers.get(disk) {
            identity::with_capabilities(|| connection.end_pass_through(*number))?;
            self.numbers.remove(disk);
        }
        Ok(())
    }
}

/// The way from a worker to its keeper.
#[derive(Debug)]
pub(super) struct ByKeeper(pub(super) Arc<KeeperLink>);

impl ByKeeper {
    fn ask(&self, key: &DiskKey, wanted: Wanted, file: Option<BorrowedFd<'_>>) -> Result<Option<BackingId>> {
        match self.0.ask(Question::new(key, wanted), file)? {
            Answer::Number(number) => Ok(number.map(BackingId)),
            Answer::Refused(word) => Err(word.into_error()),
        }
    }
}

impl Passthrough for ByKeeper {
    fn passed(&self, disk: &DiskKey) -> Result<Option<BackingId>> {
        // Of a disk that the kernel does serve, only requests to us fail then: its lock is not to be had.
        if self.0.is_gone() {
            return Ok(None);
        }
        self.ask(disk, Wanted::Passed, None)
    }

    fn pass(&self, disk: &DiskKey, file: BorrowedFd<'_>) -> Result<BackingId> {
        let number = self.ask(disk, Wanted::Pass, Some(file))?;
        number.ok_or_else(|| Error::new(ErrorKind::Io, "the process that keeps the mount does not say"))
    }

    fn end(&self, disk: &DiskKey) -> Result<()> {
        self.ask(disk, Wanted::End, None).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_and_nothing_where_it_is_not_wanted() {
        let device = |passthrough| Road::Device { passthrough };
        assert_eq!(Offer::new(true, true, device(true), true), Offer::On);
        for (wanted, may, road, can, why_not) in [
            (false, true, device(false), false, "the option passthrough=auto"),
            (true, false, device(false), false, "CAP_SYS_ADMIN"),
            (true, true, Road::Rings, false, "the transport io_uring"),
            (true, true, device(false), false, "Linux 6.9"),
        ] {
            let offer = Offer::new(wanted, may, road, can);
            assert!(offer.why_not().is_some_and(|why| why.contains(why_not)), "{offer:?}");
        }
    }
}
