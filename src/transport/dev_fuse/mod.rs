//! A transport of our own on `/dev/fuse`.
//!
//! `wire.rs` has the kernel's structures, `request.rs` understands what it sends, `serve.rs` does it and answers,
//! `channel.rs` moves the bytes, `readers.rs` are the threads that read requests. Each has a descriptor of its own, from
//! which it reads and to which its requests are answered, by whomever.
//!
//! A reader does itself what memory answers: reads of what the host has cached, overwrites through the host's cache, names
//! and attributes. Reads and writes that wait for the host's disk go to the threads of the disk lane, with their buffers
//! and without a copy; what may wait for a sync goes to those of the slow lane.
//!
//! These are threads and blocking calls, and no io_uring, for two reasons. A process that is killed has not ended before
//! its blocking writes have, so none can land after a newer one of its successor; writes that a ring has in flight can. And
//! the daemon's filter of system calls could not see what a ring does. 16 blocking threads reach the host's disk's own speed.
//!
//! A read that was put off finds the map of *then*. Of a block that was written in between it shows the new bytes or, if
//! the write has not been answered yet, either: just what a read that arrived then would show.

mod answers;
mod buffers;
mod channel;
mod control;
mod init;
mod readers;
pub mod request;
mod serve;
pub mod wire;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use zerocopy::IntoBytes;

use buffers::RequestBuffer;
use channel::{Channel, Received};
use readers::Readers;
use request::{Operation, Request, parse};
use serve::Server;

use super::mount;
use super::slow_lane::SlowLane;
use crate::error::{Context, Error, ErrorKind, Result};
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
    /// Answers the kernel's INIT on a descriptor that has just been mounted and starts `threads` threads, at least 1.
    /// Requests are answered when this returns.
    ///
    /// # Errors
    /// If the kernel speaks no version of the protocol that we do.
    pub fn start(device: OwnedFd, fs: Arc<Fs>, threads: usize) -> Result<Self> {
        let first = Channel::new(device);
        begin(&first)?;
        let server =
            Arc::new(Server::new(fs, SlowLane::start(SLOW_THREADS)?, SlowLane::start(DISK_THREADS)?));
        let first = Arc::new(first);
        // A daemon that has become an ordinary user may not be allowed to open the device again; the threads then share
        // the one descriptor.
        let may_clone = mount::may_open_device();
        let mut channels = vec![Arc::clone(&first)];
        for _ in 1..threads {
            channels.push(if may_clone { Arc::new(first.clone_connection()?) } else { Arc::clone(&first) });
        }
        Ok(Self { readers: Readers::start(channels, server)? })
    }

    /// Waits until the mount has gone away and every request is answered.
    ///
    /// # Errors
    /// If a thread ended before that.
    pub fn wait(self) -> Result<()> {
        self.readers.wait()
    }
}

/// Answers the kernel's INIT.
fn begin(channel: &Channel) -> Result<()> {
    let what = || "begin the session with the kernel";
    let mut buffer = RequestBuffer::new();
    loop {
        let bytes = buffer.bytes();
        let Received::Bytes(count) = channel.receive(bytes).context(what)? else {
            return Err(Error::new(ErrorKind::Io, format!("{}: it has ended", what())));
        };
        let Ok(Request { header, operation: Operation::Init(offer, flags2) }) = parse(&bytes[..count]) else {
            return Err(Error::new(ErrorKind::Io, format!("{}: it did not begin with INIT", what())));
        };
        if let Some(answer) = init::negotiate(&offer, flags2).context(what)? {
            channel.answer(header.unique, &[answer.as_bytes()]);
            return Ok(());
        }
        channel.answer(header.unique, &[init::our_version().as_bytes()]);
    }
}
