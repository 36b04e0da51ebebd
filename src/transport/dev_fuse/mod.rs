//! A transport of our own on `/dev/fuse`.
//!
//! `wire.rs` has the kernel's structures, `request.rs` understands what it sends, `serve.rs` does it and answers,
//! `channel.rs` moves the bytes, `connection.rs` is what outlives the process that serves, `readers.rs` are the threads that
//! read requests, `crew.rs` says which of them waits for what. An answer goes to the descriptor from which its request came,
//! by whomever.
//!
//! A reader does itself what memory answers (reads of what the host has cached, overwrites through the host's cache, names
//! and attributes) and, as long as enough others are there for that, reads, writes and syncs that wait for the host's disk.
//! Direct reads and overwrites of a disk's own data, where one is under way already, nobody waits for (`direct.rs`,
//! `transfers.rs` has what they are). Beyond that, reads and writes go to the threads of the disk lane, with their buffers and
//! without a copy; other requests that may wait for a sync go to those of the slow lane.
//!
//! A process that is killed has not ended before its blocking writes have, nor before its AIO has, and whoever opens a disk
//! next waits for what may be left of that ([`crate::storage::aio`]): none can land after a newer one of its successor.
//!
//! A read that was put off finds the map of *then*. Of a block that was written in between it shows the new bytes or, if
//! the write has not been answered yet, either: just what a read that arrived then would show.

mod answers;
mod buffers;
mod channel;
mod connection;
mod control;
mod crew;
mod direct;
mod init;
mod readers;
pub mod request;
mod serve;
mod transfers;
pub mod wire;

use std::sync::Arc;

pub use connection::Connection;

use readers::Readers;
use serve::Server;

use super::slow_lane::SlowLane;
use crate::error::Result;
use crate::fs::Fs;

/// Threads for requests that wait for the host's disk.
const SLOW_THREADS: usize = 16;

/// Threads for reads and writes that wait for the host's disk. One file has at most half of them.
const DISK_THREADS: usize = 32;

/// A session of the kernel with the filesystem; ends when the mount goes away.
#[derive(Debug)]
pub struct DevFuseSession {
    readers: Readers,
}

impl DevFuseSession {
    /// Starts `threads` threads, at least 1, that read from the descriptors of `connection`. Requests are answered when this returns, and those that an
    /// earlier process left unanswered are sent again if `resend` says so.
    ///
    /// # Errors
    /// Those of the host.
    pub fn start(connection: Connection, fs: Arc<Fs>, threads: usize, resend: bool) -> Result<Self> {
        let server =
            Arc::new(Server::new(fs, SlowLane::start(SLOW_THREADS)?, SlowLane::start(DISK_THREADS)?)?);
        if resend {
            connection.resend()?;
        }
        let connected: Vec<_> = connection.into_channels().map(Arc::new).collect();
        Ok(Self { readers: Readers::start(connected, threads, server)? })
    }

    /// Waits until the mount has gone away and every request is answered.
    ///
    /// # Errors
    /// If a thread ended before that.
    pub fn wait(self) -> Result<()> {
        self.readers.wait()
    }
}
