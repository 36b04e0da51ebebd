//! A transport of our own on `/dev/fuse`.
//!
//! `wire.rs` has the kernel's structures, `request.rs` understands what it sends, `serve.rs` does it and answers,
//! `channel.rs` moves the bytes, `connection.rs` is what outlives the process that serves. Each thread has a descriptor of its own, from which it reads requests and to which they
//! are answered. What may wait for a sync of the host's disk goes to the slow lane.

mod answers;
mod channel;
mod connection;
mod control;
mod init;
pub mod request;
mod serve;
pub mod wire;

use std::sync::Arc;
use std::thread::JoinHandle;

pub use connection::Connection;

use channel::{Channel, Received};
use init::REQUEST_BYTES_MAX;
use serve::Server;
use wire::WRITE_HEAD_BYTES;

use super::slow_lane::SlowLane;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Fs;

/// Threads for requests that wait for the host's disk.
const SLOW_THREADS: usize = 16;

/// Alignment of what is read and written, in bytes.
const PAGE: usize = 4096;

/// A session of the kernel with the filesystem; ends when the mount goes away.
#[derive(Debug)]
pub struct DevFuseSession {
    readers: Vec<JoinHandle<Result<()>>>,
}

impl DevFuseSession {
    /// Starts `threads` threads on the descriptors of `connection`, at least one on each. Requests are answered when this returns, and those that an
    /// earlier process left unanswered are sent again if `resend` says so.
    ///
    /// # Errors
    /// Those of the host.
    pub fn start(connection: Connection, fs: Arc<Fs>, threads: usize, resend: bool) -> Result<Self> {
        let server = Arc::new(Server::new(fs, SlowLane::start(SLOW_THREADS)?));
        if resend {
            connection.resend()?;
        }
        let mut readers = Vec::new();
        let channels: Vec<_> = connection.into_channels().map(Arc::new).collect();
        for number in 0..threads.max(channels.len()) {
            let channel = Arc::clone(&channels[number % channels.len()]);
            let server = Arc::clone(&server);
            let thread = std::thread::Builder::new()
                .name(format!("fuse-{number}"))
                .spawn(move || read_requests(&channel, &server));
            readers.push(thread.context(|| "start a thread of the session")?);
        }
        Ok(Self { readers })
    }

    /// Waits until the mount has gone away and every request is answered.
    ///
    /// # Errors
    /// If a thread ended before that.
    pub fn wait(self) -> Result<()> {
        let mut result = Ok(());
        for reader in self.readers {
            let ended = reader.join().unwrap_or_else(|_told| {
                Err(Error::new(ErrorKind::Io, "a thread of the session panicked, which is a bug in cowdisk"))
            });
            result = result.and(ended);
        }
        result.context(|| "answer the kernel's requests")
    }
}

/// Memory for one request, placed so that the payload of a WRITE is aligned to a page.
struct RequestBuffer(Vec<u8>);

impl RequestBuffer {
    fn new() -> Self {
        let payload = usize::try_from(REQUEST_BYTES_MAX).expect("1 MiB");
        // Not zeroes, so that every page is there: a process that is killed while the kernel copies a request into a page that
        // still has to be found would cost that request an EIO.
        Self(vec![1; 2 * PAGE + payload])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let page = self.0.as_ptr().align_offset(PAGE);
        // The first page border with room for the head of a WRITE before it.
        let payload = if page >= WRITE_HEAD_BYTES { page } else { page + PAGE };
        let end = payload + usize::try_from(REQUEST_BYTES_MAX).expect("1 MiB");
        &mut self.0[payload - WRITE_HEAD_BYTES..end]
    }
}

/// Reads requests and does them until the mount goes away.
fn read_requests(channel: &Arc<Channel>, server: &Server) -> Result<()> {
    let mut buffer = RequestBuffer::new();
    let mut scratch = RequestBuffer::new();
    loop {
        let bytes = buffer.bytes();
        match channel.receive(bytes).context(|| "read a request")? {
            Received::Bytes(count) => {
                server.serve(channel, &bytes[..count], &mut scratch.bytes()[WRITE_HEAD_BYTES..]);
            }
            Received::Ended => return Ok(()),
        }
    }
}
