//! A transport of our own on `/dev/fuse`.
//!
//! `wire.rs` has the kernel's structures, `request.rs` understands what it sends, `serve.rs` does it and answers,
//! `channel.rs` moves the bytes. Each thread has a descriptor of its own, from which it reads requests and to which they
//! are answered. What may wait for a sync of the host's disk goes to the slow lane.

mod answers;
mod channel;
mod control;
mod init;
pub mod request;
mod serve;
pub mod wire;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use zerocopy::IntoBytes;

use channel::{Channel, Received};
use init::REQUEST_BYTES_MAX;
use request::{Operation, Request, parse};
use serve::Server;
use wire::WRITE_HEAD_BYTES;

use super::mount;
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
    /// Answers the kernel's INIT on a descriptor that has just been mounted and starts `threads` threads, at least 1.
    /// Requests are answered when this returns.
    ///
    /// # Errors
    /// If the kernel speaks no version of the protocol that we do.
    pub fn start(device: OwnedFd, fs: Arc<Fs>, threads: usize) -> Result<Self> {
        let first = Channel::new(device);
        begin(&first)?;
        let server = Arc::new(Server::new(fs, SlowLane::start(SLOW_THREADS)?));
        let first = Arc::new(first);
        // A daemon that has become an ordinary user may not be allowed to open the device again; the threads then share
        // the one descriptor.
        let may_clone = mount::may_open_device();
        let mut channels = vec![Arc::clone(&first)];
        for _ in 1..threads {
            channels.push(if may_clone { Arc::new(first.clone_connection()?) } else { Arc::clone(&first) });
        }
        let mut readers = Vec::new();
        for (number, channel) in channels.into_iter().enumerate() {
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
        Self(vec![0; 2 * PAGE + payload])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let page = self.0.as_ptr().align_offset(PAGE);
        // The first page border with room for the head of a WRITE before it.
        let payload = if page >= WRITE_HEAD_BYTES { page } else { page + PAGE };
        let end = payload + usize::try_from(REQUEST_BYTES_MAX).expect("1 MiB");
        &mut self.0[payload - WRITE_HEAD_BYTES..end]
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
