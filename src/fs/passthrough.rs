//! Disks that the kernel serves by itself.
//!
//! Where a disk is one file of the host, the kernel can be told to take reads, writes and mappings of it to that file, and
//! not to us. That is decided when a file of the disk is opened first, for the time until the last one is closed: the
//! kernel refuses to have some go one way and some the other. All else (size, syncs, holes, attributes) still comes to us.
//!
//! Only a process with a privilege that we have given up can tell the kernel; [`Passthrough`] is the way to it. It also
//! remembers what the kernel serves, for the next process.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Fs;
use super::handles::HandleId;
use super::open_disks::DiskKey;
use super::open_file::OpenFile;
use crate::error::Result;

/// Number by which the kernel knows a file that it serves by itself, at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingId(pub i32);

/// Tells the kernel which disks it serves.
pub trait Passthrough: Send + Sync + Debug {
    /// Under which number an earlier process had the kernel serve the disk, if it still does.
    ///
    /// # Errors
    /// If nobody can say.
    fn passed(&self, disk: &DiskKey) -> Result<Option<BackingId>>;

    /// Has the kernel serve the disk, which is `file`, until [`Passthrough::end`]. Asked again, it gives the same number.
    ///
    /// # Errors
    /// Why it does not.
    fn pass(&self, disk: &DiskKey, file: BorrowedFd<'_>) -> Result<BackingId>;

    /// Has the kernel no longer serve the disk, of which no file is open any more. On return the kernel has let go of its file,
    /// and of the lock on it.
    ///
    /// # Errors
    /// If nobody can tell the kernel any more: it then keeps both until the end of the mount.
    fn end(&self, disk: &DiskKey) -> Result<()>;
}

/// By whom reads and writes of a disk in use are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServedBy {
    /// By the kernel.
    Kernel(BackingId),
    /// By us, and why not by the kernel, where it serves disks at all.
    Daemon(Option<String>),
}

impl ServedBy {
    /// The number by which the kernel serves it, if it does.
    pub fn backing(&self) -> Option<BackingId> {
        match self {
            Self::Kernel(backing) => Some(*backing),
            Self::Daemon(_) => None,
        }
    }
}

/// A file that was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its number.
    pub handle: HandleId,
    /// What the kernel takes reads and writes of it to, if not to us.
    pub backing: Option<BackingId>,
}

impl Fs {
    /// What to tell of a file that was opened, now or by an earlier process. Where no disk is left to the kernel, what an earlier
    /// one had opened is not opened again for that.
    pub(super) fn opened(&self, handle: HandleId) -> Opened {
        if !self.disks.can_pass() {
            return Opened { handle, backing: None };
        }
        let backing = match self.file(handle).as_deref() {
            Ok(OpenFile::Disk(disk)) => self.disks.served_by(disk).backing(),
            // Of what cannot be opened again each request is told why.
            Ok(_) | Err(_) => None,
        };
        Opened { handle, backing }
    }

    /// Has disks left to the kernel by `passthrough` from now on. To be called once, before any is opened.
    pub fn pass_through(&self, passthrough: Arc<dyn Passthrough>) {
        self.disks.pass_through(passthrough);
    }
}
