//! A connection with the kernel, apart from the process that answers on it.
//!
//! Whoever mounts begins it and keeps every descriptor of it. As long as one of them is open anywhere, the connection
//! lives: requests wait for a process that takes it over. What a process had read and not answered, the kernel sends
//! again when it is asked to ([`Connection::resend`]); a request that comes so has [`RESENT`] in its number. What it had
//! fetched by a ring lies in memory that belongs to the connection, too; the kernel does not send it again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zerocopy::{FromBytes, IntoBytes};

use super::buffers::RequestBuffer;
use super::channel::{Channel, Received};
use super::control;
use super::init::{self, Road};
use super::request::{Operation, Request, parse};
use super::uring;
use super::wire::{InitOut, NOTIFY_RESEND, OutHeader, RESENT};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::{AGREED_BYTES, BackingId, RequestId};
use crate::transport::mount;

/// What becomes of the requests that processes before this one have read and not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// There are none, or the kernel cannot send them again.
    Leave,
    /// The kernel sends them again, and they are done.
    Repeat,
    /// The kernel sends them again, and they are answered with EIO, but for those that close a file: one of them may be
    /// what processes die of.
    Refuse,
}

/// A connection of which both sides have agreed on how to speak.
#[derive(Debug)]
pub struct Connection {
    descriptors: Vec<OwnedFd>,
    /// What entries of rings lie in, if requests come by io_uring.
    memory: Option<OwnedFd>,
    agreed: InitOut,
}

impl Connection {
    /// Answers the kernel's INIT on a descriptor that has just been mounted.
    ///
    /// By [`Road::Device`] opens others of the same connection for `threads` threads, unless the user may not open the device.
    /// Reading from the first waits for requests, from the second it does not, and so on in turns. By [`Road::Rings`] the
    /// kernel holds requests back until there are rings.
    ///
    /// # Errors
    /// If the kernel speaks no version of the protocol that we do, or does not offer that road.
    pub fn begin(device: OwnedFd, road: Road, threads: usize) -> Result<Self> {
        let (device, agreed) = begin(Channel::new(device), road)?;
        let mut descriptors = vec![device];
        let count = match road {
            Road::Device { .. } if mount::may_open_device() => threads.min(descriptors_max()),
            Road::Device { .. } | Road::Rings => 1,
        };
        for number in 1..count {
            let clone = control::open_clone(descriptors[0].as_fd(), number % 2 == 0)?;
            descriptors.push(clone);
        }
        let memory = match road {
            Road::Device { .. } => None,
            Road::Rings => Some(uring::create_memory()?),
        };
        Ok(Self { descriptors, memory, agreed })
    }

    /// Takes over a connection that another process has begun: all of its descriptors, and what [`Connection::agreed`]
    /// said there.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if we cannot keep to what was agreed on, or something is missing.
    pub fn take_over(mut descriptors: Vec<OwnedFd>, agreed: &[u8; AGREED_BYTES]) -> Result<Self> {
        let agreed = InitOut::read_from_bytes(agreed).expect("as many bytes");
        init::check_agreed(&agreed)?;
        let memory = match init::road(&agreed) {
            Road::Device { .. } => None,
            Road::Rings => descriptors.pop(),
        };
        if descriptors.is_empty() {
            return Err(Error::new(ErrorKind::Unsupported, "a connection without its descriptors"));
        }
        Ok(Self { descriptors, memory, agreed })
    }

    /// What was agreed on, for [`Connection::take_over`].
    pub fn agreed(&self) -> [u8; AGREED_BYTES] {
        let mut bytes = [0; AGREED_BYTES];
        bytes.copy_from_slice(self.agreed.as_bytes());
        bytes
    }

    /// Its descriptors, in the order in which [`Connection::take_over`] takes them.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.descriptors.iter().chain(&self.memory).map(AsFd::as_fd)
    }

    /// How requests travel.
    pub fn road(&self) -> Road {
        init::road(&self.agreed)
    }

    /// Whether the kernel can send again what was read and not answered: Linux 6.9 and newer, and not by io_uring.
    pub fn can_resend(&self) -> bool {
        self.road() != Road::Rings && init::can_resend(&self.agreed)
    }

    /// Whether the kernel can serve files by itself: Linux 6.9 and newer, where it was asked to.
    pub fn can_pass_through(&self) -> bool {
        init::can_pass_through(&self.agreed)
    }

    /// Has the kernel serve `file`, a regular file, to those who open a file of ours with the number that this answers
    /// with, for whatever they open it for. The caller has to have CAP_SYS_ADMIN in effect; the kernel then reads and writes
    /// with the caller's rights.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the file's own file system lies upon another one; those of the kernel.
    pub fn pass_through(&self, file: BorrowedFd<'_>) -> Result<BackingId> {
        match control::open_backing(self.descriptors[0].as_fd(), file) {
            Ok(number) => Ok(BackingId(number)),
            Err(rustix::io::Errno::LOOP) => {
                let message = "the file system of the store lies upon another one (overlayfs, FUSE)";
                Err(Error::new(ErrorKind::Unsupported, message))
            }
            Err(errno) => Err(errno).context(|| "have the kernel serve a file"),
        }
    }

    /// Has the kernel serve a file to nobody else by that number, and let go of it once nobody has it open.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn end_pass_through(&self, number: BackingId) -> Result<()> {
        let closed = control::close_backing(self.descriptors[0].as_fd(), number.0);
        closed.context(|| "have the kernel let go of a file")
    }

    /// Whether the mount has gone away.
    pub fn has_ended(&self) -> bool {
        let mut polled = [PollFd::new(&self.descriptors[0], PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let found = rustix::io::retry_on_intr(|| poll(&mut polled, Some(&now)));
        found.is_ok() && polled[0].revents().contains(PollFlags::ERR)
    }

    /// Has the kernel send again all that processes before this one have read and not answered. None of them may still be
    /// alive: what it does late would come after what is done for the request that is sent again.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn resend(&self) -> Result<()> {
        let len = u32::try_from(size_of::<OutHeader>()).expect("16 bytes");
        let notice = OutHeader { len, error: NOTIFY_RESEND, unique: 0 };
        match rustix::io::retry_on_intr(|| rustix::io::write(&self.descriptors[0], notice.as_bytes())) {
            Ok(_) | Err(rustix::io::Errno::NODEV | rustix::io::Errno::NOTCONN) => Ok(()),
            Err(errno) => Err(errno).context(|| "have the kernel send its requests again"),
        }
    }

    /// The descriptor that everything is asked by, and the memory of entries, if requests come by io_uring.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if they do not.
    pub(super) fn into_rings(self) -> Result<(Channel, OwnedFd)> {
        match (self.descriptors.into_iter().next(), self.memory) {
            (Some(device), Some(memory)) => Ok((Channel::new(device), memory)),
            _ => Err(Error::new(ErrorKind::Unsupported, "a connection without rings")),
        }
    }

    /// Its descriptors, each as a channel.
    pub(super) fn into_channels(self) -> impl Iterator<Item = Channel> {
        self.descriptors.into_iter().map(Channel::new)
    }
}

/// Most descriptors that are of use: threads share them, and no more work at once than there are processors.
fn descriptors_max() -> usize {
    2 * std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8)
}

/// What a request is known by, from the number that the kernel gave it.
pub(super) fn request_id(unique: u64) -> RequestId {
    RequestId { number: unique & !RESENT, resent: unique & RESENT != 0 }
}

/// Answers the kernel's INIT.
fn begin(channel: Channel, road: Road) -> Result<(OwnedFd, InitOut)> {
    let what = || "begin the session with the kernel";
    let mut buffer = RequestBuffer::new();
    loop {
        let bytes = buffer.bytes();
        let count = match channel.receive(bytes).context(what)? {
            Received::Bytes(count) => count,
            Received::Nothing => continue,
            Received::Ended => return Err(Error::new(ErrorKind::Io, format!("{}: it has ended", what()))),
        };
        let Ok(Request { header, operation: Operation::Init(offer, flags2) }) = parse(&bytes[..count]) else {
            return Err(Error::new(ErrorKind::Io, format!("{}: it did not begin with INIT", what())));
        };
        if let Some(answer) = init::negotiate(&offer, flags2, road).context(what)? {
            channel.answer(header.unique, &[answer.as_bytes()]);
            return Ok((channel.into_descriptor(), answer));
        }
        channel.answer(header.unique, &[init::our_version().as_bytes()]);
    }
}
