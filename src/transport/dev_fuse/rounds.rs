//! What a thread needs to go round: to look after direct requests of its own, and to read others meanwhile.

use std::cell::{Cell, OnceCell};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::channel::Channel;
use super::cold::COLD_BYTES_MAX;
use super::crew::Hand;
use super::direct::{Direct, DirectQueues};
use super::transfers::Read;

const REQUEST: u64 = 0;
const ENDED: u64 = 1;

/// What a thread that goes round has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// To read requests.
    pub requests: bool,
    /// To answer direct ones.
    pub ended: bool,
}

/// A thread's rounds.
#[derive(Debug)]
pub struct Rounds<'a> {
    queues: &'a DirectQueues,
    /// Where this thread looks for requests without waiting for one; without it, it never goes round.
    channel: Option<&'a Arc<Channel>>,
    /// Made when they are first needed; nothing if the host refuses them.
    means: OnceCell<Option<Means>>,
    /// Whether several direct requests were under way at once, when any last were.
    had_several: Cell<bool>,
}

#[derive(Debug)]
struct Means {
    direct: Direct,
    /// Tells of requests and of ends.
    epoll: OwnedFd,
}

impl<'a> Rounds<'a> {
    /// None yet.
    pub fn new(queues: &'a DirectQueues, channel: Option<&'a Arc<Channel>>) -> Self {
        Self { queues, channel, means: OnceCell::new(), had_several: Cell::new(false) }
    }

    /// Whether reads of the base that are not longer than [`COLD_BYTES_MAX`] may be taken on; see [`Self::join`].
    pub fn takes_cold(&self, read: &Read) -> bool {
        self.channel.is_some() && self.queues.has_rings() && read.len <= COLD_BYTES_MAX
    }

    /// Where a direct request is taken on, if it is better taken on than waited for: while others are under way or wait to be
    /// read, or if just now there were. One after the other is done soonest by a thread that waits for it.
    pub fn join(&self, hand: &Hand<'_>) -> Option<&Direct> {
        let channel = self.channel?;
        let has_several = self.is_busy() || hand.has_company() || channel.has_request();
        if !has_several && !self.had_several.get() {
            return None;
        }
        self.had_several.set(has_several);
        let means = self.means.get_or_init(|| match Means::new(self.queues, channel) {
            Ok(means) => Some(means),
            Err(error) => {
                log::info!("a thread waits for its direct I/O: {error}");
                None
            }
        });
        Some(&means.as_ref()?.direct)
    }

    /// Whether direct requests are under way.
    pub fn is_busy(&self) -> bool {
        self.direct().is_some_and(Direct::is_busy)
    }

    /// Puts what was taken on to the kernel.
    pub fn submit(&self) {
        if let Some(direct) = self.direct() {
            direct.submit();
        }
    }

    /// Answers what has ended; if nothing has, waits for a moment.
    pub fn reap(&self) {
        if let Some(direct) = self.direct() {
            direct.reap(true);
        }
    }

    /// Those that are or were under way.
    pub fn direct(&self) -> Option<&Direct> {
        self.means.get()?.as_ref().map(|means| &means.direct)
    }

    /// Waits until there is something to do, or a signal comes.
    ///
    /// # Errors
    /// Those of the host.
    pub fn wait(&self) -> io::Result<Ready> {
        let Some(Some(means)) = self.means.get() else { return Ok(Ready::default()) };
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 2];
        means.direct.note(true);
        let waited = epoll::wait(&means.epoll, &mut events, None);
        means.direct.note(false);
        let (told, _) = match waited {
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            result => result?,
        };
        let is_told = |what| told.iter().any(|event| event.data.u64() == what);
        Ok(Ready { requests: is_told(REQUEST), ended: is_told(ENDED) })
    }
}

impl Means {
    fn new(queues: &DirectQueues, channel: &Channel) -> io::Result<Self> {
        let direct = queues.direct()?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, channel.as_fd(), EventData::new_u64(REQUEST), EventFlags::IN)?;
        epoll::add(&epoll, direct.ended(), EventData::new_u64(ENDED), EventFlags::IN | EventFlags::ET)?;
        Ok(Self { direct, epoll })
    }
}
