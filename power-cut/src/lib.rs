//! Power cuts, recorded in an emulated machine and judged outside it; `scripts/power-cut` drives it.
//!
//! A guest ([`guest`]) serves a store from a disk of which QEMU's driver `blklogwrites` records every write, flush and
//! discard. It writes what the [`plan`] says, which follows from a seed alone, and after each sync that has returned it
//! writes a mark: to the same disk, behind the file system. From the recording ([`write_log`]) come the states in which
//! a power cut may leave the disk ([`cut`]); each is mounted, and everything on it held against the plan ([`judge`]).
//!
//! # What a state must hold
//!
//! A mark says "up to this step all is synced". It is written only after the sync has returned, so whatever flush of the
//! disk the sync took is before the mark in the log. In the state after a cut at entry `t` every mark before `t` is
//! therefore a promise that was made before the cut, and must be kept: whether the mark itself has reached the disk does
//! not matter, for marks are read off the log. So that a mark makes nothing durable it is written without a flush: with
//! one, it would put right what the sync before it had left out.
//!
//! Where the kernel serves a disk by itself (`passthrough`) a write by O_DSYNC makes itself durable and nothing that came before
//! it. Its mark, one of another kind, promises no more than that.
//!
//! All entries up to the last flush before `t` are taken for durable. Entries are recorded as they end; so a write that
//! ended while that flush was under way counts with them, though a disk might still lose it. Such states are missed.

pub mod aligned;
pub mod cut;
pub mod guest;
pub mod initramfs;
pub mod judge;
pub mod plan;
pub mod random;
pub mod sector;
pub mod store_plan;
pub mod write_log;

use std::fmt::Display;

/// What failed, in words.
pub type Result<T> = std::result::Result<T, String>;

/// Says what was being done when something failed.
pub trait Doing<T> {
    /// Puts `what` before the error.
    ///
    /// # Errors
    /// The same, in words.
    fn doing(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Display) -> Result<T> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

/// Bytes that the store's file system takes of the disk; the least that XFS is made of is 300 MiB.
pub const FS_BYTES: u64 = 320 << 20;

/// Bytes behind the file system, for the marks.
pub const MARKS_BYTES: u64 = 1 << 20;
