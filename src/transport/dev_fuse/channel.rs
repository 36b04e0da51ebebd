//! One descriptor of `/dev/fuse`: reading requests and writing answers.
//!
//! An answer must be written to the descriptor from which its request was read.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno as Os;
use zerocopy::IntoBytes;

use super::uring::Entry;
use super::wire::OutHeader;
use crate::fs::Errno;

/// A descriptor of a connection with the kernel: the first one, or a clone with a queue of its own.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
    waits: bool,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How long a reader waits after an error that has cost one request.
const ERROR_PAUSE: Duration = Duration::from_millis(1);

/// What reading a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes of a request.
    Bytes(usize),
    /// There is none now, and this descriptor does not wait; or a signal came.
    Nothing,
    /// The mount has gone away.
    Ended,
}

impl Channel {
    /// Takes a descriptor of a mounted connection.
    pub fn new(fd: OwnedFd) -> Self {
        let waits = rustix::fs::fcntl_getfl(&fd).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
        Self { fd, waits }
    }

    /// Whether [`Channel::receive`] waits for a request if there is none.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// Its descriptor.
    pub fn into_descriptor(self) -> OwnedFd {
        self.fd
    }

    /// Whether a request waits to be read, or the mount has gone away.
    pub fn has_request(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.as_fd(), PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(count) if count > 0)
    }

    /// Reads one request into `buffer`, which must be as long as the largest.
    ///
    /// # Errors
    /// Those of the kernel that leave nothing to go on with.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        loop {
            return match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(count) => Ok(Received::Bytes(count)),
                // ENOENT: the request was taken back between being announced and being read.
                Err(Os::NOENT) => continue,
                Err(Os::AGAIN | Os::INTR) => Ok(Received::Nothing),
                // ECONNABORTED: it went away while a request was being copied.
                Err(Os::NODEV | Os::CONNABORTED) => Ok(Received::Ended),
                // No memory for a page of the buffer, say: the kernel has answered that one request with EIO.
                Err(errno @ (Os::NOMEM | Os::FAULT | Os::IO)) => {
                    log::error!("read a request: {}", io::Error::from(errno));
                    std::thread::sleep(ERROR_PAUSE);
                    continue;
                }
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Answers request `unique` with `parts`, one after the other.
    pub fn answer(&self, unique: u64, parts: &[&[u8]]) {
        let len = size_of::<OutHeader>() + parts.iter().map(|part| part.len()).sum::<usize>();
        let header =
            OutHeader { len: u32::try_from(len).expect("an answer is at most 1 MiB"), error: 0, unique };
        let mut slices = [IoSlice::new(&[]); 4];
        slices[0] = IoSlice::new(header.as_bytes());
        for (slice, part) in slices[1..].iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        self.send(unique, &slices[..=parts.len()]);
    }

    /// Answers request `unique` with an error.
    pub fn refuse(&self, unique: u64, errno: Errno) {
        let header = OutHeader { len: 16, error: -errno.raw(), unique };
        self.send(unique, &[IoSlice::new(header.as_bytes())]);
    }

    fn send(&self, unique: u64, slices: &[IoSlice<'_>]) {
        match rustix::io::retry_on_intr(|| rustix::io::writev(&self.fd, slices)) {
            Ok(_) => {}
            // The caller was killed and takes no answer any more, or the mount has gone away.
            Err(Os::NOENT | Os::NODEV) => log::trace!("request {unique}: nobody waits for the answer"),
            Err(errno) => {
                log::error!("answer request {unique}: {}", io::Error::from(errno));
                // The kernel has not understood the answer, so the caller still waits; or it has told him of an error
                // itself, and does not know the number any more.
                let header = OutHeader { len: 16, error: -Errno::BROKEN.raw(), unique };
                let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, header.as_bytes()));
            }
        }
    }
}

/// The answer that a request still needs. Dropped without one, by a panic say, it answers EIO: nobody may wait for ever.
#[derive(Debug)]
pub struct Reply {
    /// Where to; nothing once it is answered.
    to: Option<Destination>,
}

/// How an answer reaches the kernel: as its request came.
#[derive(Debug)]
enum Destination {
    /// Written to this channel, under the request's number.
    Channel(Arc<Channel>, u64),
    /// In the entry of a ring that holds the request. It answers EIO itself if it is dropped.
    Entry(Entry),
}

impl Reply {
    /// The answer to request `unique`, which was read from `channel`.
    pub fn new(channel: Arc<Channel>, unique: u64) -> Self {
        Self { to: Some(Destination::Channel(channel, unique)) }
    }

    /// The answer to the request in `entry`.
    pub fn in_entry(entry: Entry) -> Self {
        Self { to: Some(Destination::Entry(entry)) }
    }

    /// Answers with `parts`, at most three, one after the other.
    pub fn answer(mut self, parts: &[&[u8]]) {
        match self.to.take() {
            Some(Destination::Channel(channel, unique)) => channel.answer(unique, parts),
            Some(Destination::Entry(entry)) => entry.answer(parts),
            None => {}
        }
    }

    /// Answers with an error.
    pub fn refuse(mut self, errno: Errno) {
        match self.to.take() {
            Some(Destination::Channel(channel, unique)) => channel.refuse(unique, errno),
            Some(Destination::Entry(entry)) => entry.refuse(errno),
            None => {}
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(Destination::Channel(channel, unique)) = &self.to {
            channel.refuse(*unique, Errno::BROKEN);
        }
    }
}
