//! Taking over from a process that served before: its open files and the inode numbers that the kernel knows.
//!
//! Nothing is opened in advance. A file that was open is opened anew when the first request for it comes, under its old
//! number; a disk whose last writes cannot be taken up whole answers EIO to everything, for a guest that runs must not see
//! older contents. An inode number that is not known is looked for among all names of the store, once.

use std::sync::Arc;

use parking_lot::{MappedRwLockReadGuard, Mutex};

use super::counters::Operation;
use super::errno::{Errno, Failure, Outcome};
use super::handles::{HandleId, Handles};
use super::inodes::Node;
use super::ledger::{Kept, Ledger};
use super::open_file::{OpenFile, OpenMode};
use super::tree::disk_key;
use super::{Fs, RequestId};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;

/// Whether the kernel may know inode numbers that we were not told of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Numbers {
    /// All that it knows are in the table.
    #[default]
    Complete,
    /// An earlier process told it others.
    Unknown,
}

impl Fs {
    /// The filesystem over `store` as a process before this one left it. An empty ledger is that of the first one.
    ///
    /// # Errors
    /// If the store's folder cannot be looked at or the ledger not be read.
    pub fn adopt(store: Store, ledger: Ledger, is_first: bool) -> Result<Self> {
        let numbers = if is_first { Numbers::Complete } else { Numbers::Unknown };
        Ok(Self { handles: Handles::adopt(ledger)?, numbers: Mutex::new(numbers), ..Self::new(store)? })
    }

    /// The file of an inode number.
    ///
    /// # Errors
    /// [`Errno::STALE`] if the kernel was not told it, or has forgotten it, or it has been removed.
    pub(super) fn node(&self, ino: u64) -> Outcome<Node> {
        let found = self.inodes.node(ino);
        if found.is_ok() {
            return found;
        }
        {
            let mut numbers = self.numbers.lock();
            if *numbers == Numbers::Complete {
                // Perhaps only since we looked.
                return self.inodes.node(ino);
            }
            self.tree.for_each_node(&mut |node| self.inodes.adopt(node))?;
            *numbers = Numbers::Complete;
        }
        self.inodes.node(ino)
    }

    /// The open file of a number.
    ///
    /// # Errors
    /// [`Errno::BAD_HANDLE`] if there is none; those of opening what an earlier process had open.
    pub(super) fn file(&self, id: HandleId) -> Outcome<MappedRwLockReadGuard<'_, OpenFile>> {
        match self.handles.get(id) {
            Err(_) if self.handles.kept(id).is_some() => {
                // Whatever is wrong, whoever has it open is told of a broken disk, not of a name that is not there.
                self.revive(id).map_err(|failure| match failure.errno() {
                    Errno::NO_ROOM => failure,
                    _ => Failure::Error(Error::caused(
                        ErrorKind::Io,
                        "open again what an earlier process had open",
                        failure.into_error(),
                    )),
                })?;
                self.handles.get(id)
            }
            // It may have been opened in between.
            Err(_) => self.handles.get(id),
            found => found,
        }
    }

    /// Whether an earlier process had the file open, and nobody has asked for anything of it since.
    pub(super) fn is_kept(&self, ino: u64) -> bool {
        self.handles.all_kept().iter().any(|(_, kept)| kept.ino == ino)
    }

    /// Opens a file that an earlier process had open, under its number.
    fn revive(&self, id: HandleId) -> Outcome<()> {
        let Some(kept) = self.handles.kept(id) else { return Ok(()) };
        let node = self.node(kept.ino)?;
        let file = if kept.directory {
            let entries = self.tree.entries(&node)?;
            OpenFile::Directory { node, entries: Mutex::new(Arc::new(entries)) }
        } else {
            let mode = OpenMode { write: kept.write, truncate: false };
            OpenFile::open(&self.tree, &self.disks, &node, mode, true)?
        };
        match self.handles.fill(id, file) {
            Ok(()) => Ok(()),
            Err(file) => Ok(self.close_file(file)?),
        }
    }

    /// Opens all disks that an earlier process had open for writing, so that what was answered is flushed in the background
    /// though nobody asks for anything.
    pub fn take_up(&self) {
        for (id, _) in self.handles.all_kept().into_iter().filter(|(_, kept)| kept.write) {
            // Whoever uses it is told with each request. It may have been closed meanwhile.
            match self.file(id) {
                Err(failure) if failure.errno() != Errno::BAD_HANDLE => log::error!("{failure}"),
                _ => {}
            }
        }
    }

    /// Closes an open file or directory. The last handle of a disk closes the disk, which takes as long as making it
    /// durable. A file that a process before this one had open is opened for that, so that it is closed in order.
    ///
    /// # Errors
    /// Those of closing the disk; it is closed all the same. [`Errno::BAD_HANDLE`] if there is no such file, unless the
    /// request was sent before: then it has been closed already.
    pub fn close(&self, handle: HandleId, request: RequestId) -> Outcome<()> {
        self.counted(Operation::Close, 0, || {
            if let Some(kept) = self.handles.kept(handle)
                && let Err(failure) = self.revive(handle)
            {
                log::error!("close what an earlier process had open, inode {:#x}: {failure}", kept.ino);
                self.give_up(handle, kept);
                return Err(failure);
            }
            self.revive_others(handle);
            match self.handles.close(handle, |file| self.close_file(file)) {
                Some(closed) => Ok(closed?),
                None if request.resent => Ok(()),
                None => Err(Errno::BAD_HANDLE.into()),
            }
        })
    }

    /// Opens what else an earlier process had open of a disk of which a file is about to be closed. The disk would be closed with
    /// the last one that this process has opened, while others have it open, to whom the kernel may even serve it.
    fn revive_others(&self, handle: HandleId) {
        let key = match self.handles.get(handle).as_deref() {
            Ok(OpenFile::Disk(disk)) => disk.key().clone(),
            _ => return,
        };
        for (id, kept) in self.handles.all_kept() {
            let is_same =
                self.node(kept.ino).is_ok_and(|node| disk_key(&node).is_ok_and(|other| other == key));
            if is_same && let Err(failure) = self.revive(id) {
                log::error!("{key}, which an earlier process had open: {failure}");
            }
        }
    }

    /// Forgets a file that cannot be opened any more. With its last handle a disk is nobody's: whoever opens it next does so
    /// as after a crash.
    fn give_up(&self, handle: HandleId, kept: Kept) {
        self.handles.forget(handle);
        let others = self.handles.all_kept();
        if others.iter().all(|(_, other)| other.ino != kept.ino)
            && let Ok(node) = self.node(kept.ino)
        {
            self.tree.give_up_disk(&node, &self.disks);
        }
    }

    /// Closes every file that is still open, for the end; returns what went wrong.
    pub fn close_all(&self) -> Vec<Error> {
        let mut errors = Vec::new();
        let open = self.handles.all_open().into_iter();
        let all: Vec<_> = open.chain(self.handles.all_kept().into_iter().map(|(id, _)| id)).collect();
        for handle in all {
            if let Err(failure) = self.close(handle, RequestId { number: 0, resent: true }) {
                errors.push(failure.into_error());
            }
        }
        errors
    }
}
