//! What keeper and worker tell each other, over a socket that the worker has as its standard input.
//!
//! One message is one word in JSON; the first one to a worker carries the descriptors that it takes over. Each side learns
//! from the socket's end that the other has ended.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::passthrough::{Answer, Offer, Question};
use super::status::KeeperStatus;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::Timestamp;

/// The version of all that is in this file, but for the form of [`ToKeeper::Hello`], which never changes: by it processes of
/// different versions find out about each other.
pub(super) const PROTOCOL: u32 = 4;

/// Longest message, in bytes.
const BYTES_MAX: usize = 64 << 10;

/// Most descriptors that go with a message: lock, ledger and one for each thread.
const DESCRIPTORS_MAX: usize = 2 + super::options::THREADS_MAX;

/// The first message to a worker. With it come the descriptors of lock, ledger and connection, in this order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Handover {
    pub(super) protocol: u32,
    pub(super) mountpoint: String,
    /// Device of the mount, major and minor.
    pub(super) device: (u32, u32),
    /// When the mount was made.
    pub(super) started: Timestamp,
    /// Whether no process has served this mount before.
    pub(super) is_first: bool,
    /// Whether the kernel is to send again what others have left unanswered.
    pub(super) resend: bool,
    /// Whether that is to be answered with EIO, as one after the other has died while it was under way.
    pub(super) refuse: bool,
    pub(super) keeper: KeeperStatus,
    /// Whether disks can be left to the kernel.
    pub(super) passthrough: Offer,
}

/// What a worker is told later.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToWorker {
    /// A signal of that name asks the daemon to end.
    Leave(String),
    /// The mount was taken away, or why not.
    Unmounted(Option<ErrorWord>),
    /// Another process stands by: answer what was read, say so and end.
    HandOver,
    /// About a disk that is left to the kernel.
    Passthrough(Answer),
}

/// What a keeper is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToKeeper {
    /// The first word of every worker, before it hears anything.
    Hello {
        /// Its [`PROTOCOL`].
        protocol: u32,
        /// Its version.
        version: String,
    },
    /// From now on it reads requests, which would be lost with it on kernels that do not send them again.
    Reading,
    /// Requests are answered.
    Ready,
    /// They will not be, or no longer, for this reason; this process ends.
    Failed(ErrorWord),
    /// Take the mount away, if nobody uses it, and say whether.
    Unmount,
    /// About a disk that is left to the kernel. A worker that was not offered this asks nothing.
    Passthrough(Question),
    /// The mount is gone and every disk is closed; what went wrong.
    Ended(Vec<ErrorWord>),
    /// Have the program that is now where this one came from take over. With it comes the socket of whoever asks.
    Upgrade,
    /// It is to hand over by rings, and needs requests to do so: ask so often on each of these processors for something.
    Nudge {
        /// Their numbers.
        processors: Vec<u16>,
        /// How often on each.
        times: usize,
    },
    /// Every request that was begun is answered, and no more is begun; disks are left open. It ends now.
    HandedOver {
        /// For how long it has read none.
        pause_milliseconds: u64,
    },
    /// It could not stop, for this reason, and serves on.
    ServesOn(ErrorWord),
}

/// An error on its way to another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ErrorWord {
    kind: String,
    message: String,
    hint: Option<String>,
}

impl From<&Error> for ErrorWord {
    fn from(error: &Error) -> Self {
        Self {
            kind: format!("{:?}", error.kind()),
            message: error.to_string(),
            hint: error.hint().map(str::to_owned),
        }
    }
}

impl ErrorWord {
    /// The error.
    pub(super) fn into_error(self) -> Error {
        let error = Error::new(kind_named(&self.kind), self.message);
        if let Some(hint) = self.hint { error.with_hint(hint) } else { error }
    }
}

fn kind_named(name: &str) -> ErrorKind {
    const KINDS: [ErrorKind; 12] = [
        ErrorKind::Invalid,
        ErrorKind::NotFound,
        ErrorKind::Exists,
        ErrorKind::Busy,
        ErrorKind::NoSpace,
        ErrorKind::OutOfRange,
        ErrorKind::ReadOnly,
        ErrorKind::Denied,
        ErrorKind::Corrupt,
        ErrorKind::Unsupported,
        ErrorKind::Interrupted,
        ErrorKind::Io,
    ];
    KINDS.into_iter().find(|kind| format!("{kind:?}") == name).unwrap_or(ErrorKind::Io)
}

/// One end of the socket.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
}

impl Link {
    /// Both ends.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn pair() -> Result<(Self, OwnedFd)> {
        let pair =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair.context(|| "make a socket to another process")?;
        Ok((Self { socket: ours }, theirs))
    }

    /// The one that this process has as its standard input, which is empty from then on.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn from_stdin() -> Result<Self> {
        let what = || "take the socket to the keeper";
        let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).context(what)?;
        let null = std::fs::File::open("/dev/null").context(what)?;
        rustix::stdio::dup2_stdin(null).context(what)?;
        Ok(Self { socket })
    }

    /// Ends it for both sides.
    pub(super) fn close(&self) {
        // If it is not connected any more, it has ended.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Sends a word, with `descriptors`.
    ///
    /// # Errors
    /// If the other side has ended.
    pub(super) fn tell(&self, word: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let what = || "tell another process";
        let bytes = serde_json::to_vec(word).expect("a word is plain text");
        if bytes.len() > BYTES_MAX {
            return Err(Error::new(ErrorKind::OutOfRange, format!("{}: {} bytes", what(), bytes.len())));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(Error::new(ErrorKind::OutOfRange, "too many descriptors for one message"));
        }
        let slices = [IoSlice::new(&bytes)];
        let send = || rustix::net::sendmsg(&self.socket, &slices, &mut control, SendFlags::NOSIGNAL);
        rustix::io::retry_on_intr(send).map(drop).context(what)
    }

    /// Waits for a word and the descriptors that come with it. `None`: the other side has ended. If this process may not open
    /// as many, the word comes without any: whoever needs them finds none, rather than too few.
    ///
    /// # Errors
    /// If what comes is not understood; it was received then, and the next one can be.
    pub(super) fn hear<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>> {
        let what = || "hear from another process";
        let mut bytes = vec![0; BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                // It was killed with words of ours unread.
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                other => break other.context(what)?,
            }
        };
        if received.bytes == 0 {
            return Ok(None);
        }
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(sent) = message {
                descriptors.extend(sent);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            log::warn!("not all descriptors of a message could be taken: too many are open in this process");
            descriptors.clear();
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(Error::new(ErrorKind::Unsupported, "a message of another process is cut off"));
        }
        let word = serde_json::from_slice(&bytes[..received.bytes])
            .map_err(|error| Error::caused(ErrorKind::Unsupported, what(), error))?;
        Ok(Some((word, descriptors)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn words_and_descriptors_come_through_and_the_end_is_heard() {
        let (one, other) = Link::pair().unwrap();
        let other = Link { socket: other };
        let file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut &file, b"here").unwrap();
        let error = Error::new(ErrorKind::Busy, "in use").with_hint("wait");
        one.tell(&ToKeeper::Failed(ErrorWord::from(&error)), &[file.as_fd(), file.as_fd()]).unwrap();
        one.tell(&ToKeeper::Ready, &[]).unwrap();
        let (word, descriptors) = other.hear::<ToKeeper>().unwrap().unwrap();
        let ToKeeper::Failed(word) = word else { panic!("another word: {word:?}") };
        let heard = word.into_error();
        assert_eq!(
            (heard.kind(), heard.to_string().as_str(), heard.hint()),
            (ErrorKind::Busy, "in use", Some("wait"))
        );
        assert_eq!(descriptors.len(), 2);
        assert_eq!(std::fs::File::from(descriptors.into_iter().next().unwrap()).metadata().unwrap().len(), 4);
        assert!(matches!(other.hear().unwrap(), Some((ToKeeper::Ready, _))));
        one.tell(&ToWorker::Leave("SIGTERM".to_owned()), &[]).unwrap();
        assert_eq!(
            other.hear::<ToKeeper>().unwrap_err().kind(),
            ErrorKind::Unsupported,
            "not a word for a keeper"
        );
        drop(one);
        assert!(other.hear::<ToKeeper>().unwrap().is_none());
    }
    /// A word that lost its descriptors was lost with them, and whoever had asked something waited for ever.
    #[test]
    fn a_word_whose_descriptors_cannot_all_be_taken_is_heard_without_any() {
        let (one, other) = Link::pair().unwrap();
        let other = Link { socket: other };
        let file = tempfile::tempfile().unwrap();
        // There is room for some more, to have it aligned.
        let too_many = [file.as_fd(); 2 * DESCRIPTORS_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2 * DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&too_many)));
        let word = serde_json::to_vec(&ToKeeper::Ready).unwrap();
        rustix::net::sendmsg(&one.socket, &[IoSlice::new(&word)], &mut control, SendFlags::NOSIGNAL).unwrap();
        let (word, descriptors) = other.hear::<ToKeeper>().unwrap().unwrap();
        assert!(matches!(word, ToKeeper::Ready));
        assert!(descriptors.is_empty());
        one.tell(&ToKeeper::Ready, &[file.as_fd()]).unwrap();
        assert_eq!(other.hear::<ToKeeper>().unwrap().unwrap().1.len(), 1, "the next one is whole again");
    }
}
