//! Direct reads and writes of a disk's own data, that no thread waits for.
//!
//! Whoever reads such a request puts it by, reads the next, puts several to the kernel with one call, and answers what has
//! ended meanwhile: one thread, which is not woken for each ([`super::readers`]). What the kernel does not do so (it would have
//! to wait for a lock of the file, or the request is not aligned enough) is done by a thread of the disk lane, from the
//! beginning.
//!
//! Beside them go small reads of the base that is not in memory ([`super::cold`]).
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use super::buffers::{RequestBuffer, SMALL_BYTES, SmallBuffer, SmallBuffers, SpareBuffers};
use super::channel::Reply;
use super::cold::{self, ColdReads, Desk};
use super::transfers::{Read, Write};
use crate::fs::{Fs, Placed};
use crate::storage::aio::{self, Aio, Transfer};
use crate::transport::slow_lane::SlowLane;

/// Most requests of one thread under way.
const DEPTH: usize = 128;

/// The same of all threads, but for large ones, of which there are as many as there are buffers for. 8 MiB.
const SMALL_MAX: usize = 512;

/// Most threads that put requests to the kernel at once, where they may have to wait: for the host's journal, before Linux 6.0.
const SUBMITTERS_MAX: usize = 4;

/// Most requests put to the kernel with one call. Each call wakes the host's disk once, which in a virtual machine costs more
/// than the rest of a request; but the disk stands still while more are gathered. 4 KiB writes, QD32, virtio, × one at a time:
/// 2 1.0, 4 1.1, 8 1.2, 16 1.2, 32 0.7.
pub const GATHERED_MAX: usize = 8;

/// Where the bytes of a request are.
#[derive(Debug)]
enum Bytes {
    /// From the beginning of a buffer of its own.
    Small(SmallBuffer),
    /// Where the payload of a request is.
    Large(RequestBuffer),
}

#[derive(Debug)]
enum What {
    Read(Read),
    Write(Write),
}

impl What {
    fn len(&self) -> usize {
        let len = match self {
            Self::Read(read) => read.len,
            Self::Write(write) => write.len,
        };
        usize::try_from(len).expect("at most 1 MiB")
    }
}

#[derive(Debug)]
struct Request {
    what: What,
    bytes: Bytes,
    placed: Placed,
    reply: Reply,
}

// SAFETY: both kinds of buffers are mappings, which stay where they are while their owners are moved.
unsafe impl aio::Request for Request {
    fn file(&self) -> BorrowedFd<'_> {
        self.placed.file()
    }

    fn offset(&self) -> u64 {
        self.placed.at()
    }

    fn transfer(&self) -> Transfer {
        self.placed.transfer()
    }

    fn memory(&mut self) -> &mut [u8] {
        self.bytes.of(self.what.len())
    }
}

impl Bytes {
    fn of(&mut self, len: usize) -> &mut [u8] {
        match self {
            Self::Small(buffer) => buffer.bytes(len),
            Self::Large(buffer) => buffer.payload_mut(len),
        }
    }
}

/// What the threads of a session have under way.
#[derive(Debug)]
pub struct DirectQueues {
    tools: Arc<Tools>,
    disk: Arc<SlowLane>,
    /// Guards who they are; held for an instant.
    queues: Mutex<Vec<Weak<Queue>>>,
    /// Whether reads of the base are put to rings of io_uring, too; nothing until it is tried.
    has_rings: OnceLock<bool>,
}

/// What one thread has under way, for others to look after while it is held up.
#[derive(Debug)]
struct Queue {
    aio: Aio<Request>,
    /// What it has in its ring.
    cold: Option<Arc<Desk>>,
    tools: Arc<Tools>,
    disk: Arc<SlowLane>,
}

/// What a request needs of us until it is answered. Not the disk lane, whose tasks hold it.
#[derive(Debug)]
pub struct Tools {
    pub fs: Arc<Fs>,
    pub small: SmallBuffers,
    large: Arc<SpareBuffers>,
    /// Threads that put requests to the kernel just now.
    submitting: AtomicUsize,
}

impl DirectQueues {
    /// None yet. What has to wait is done by `disk`; large requests take their memory from `large`.
    pub fn new(fs: Arc<Fs>, disk: Arc<SlowLane>, large: Arc<SpareBuffers>) -> Self {
        let tools = Arc::new(Tools::new(fs, large));
        Self { tools, disk, queues: Mutex::default(), has_rings: OnceLock::new() }
    }

    /// From now on reads of the base are taken on, too, if the kernel can do them without a thread that waits. Says in the log
    /// whether it can. The first call counts.
    pub fn try_rings(&self) {
        self.has_rings.get_or_init(|| match cold::require() {
            Ok(()) => {
                log::info!("small reads of bases that are not in memory go by io_uring");
                true
            }
            Err(error) => {
                log::info!("threads wait for reads of bases that are not in memory: {error}");
                false
            }
        });
    }

    /// Whether reads of the base are taken on.
    pub fn has_rings(&self) -> bool {
        self.has_rings.get() == Some(&true)
    }

    /// A queue for the calling thread.
    ///
    /// # Errors
    /// If the host refuses it; then every request is somebody else's.
    pub fn direct(&self) -> io::Result<Direct> {
        let (tools, disk) = (Arc::clone(&self.tools), Arc::clone(&self.disk));
        let aio = Aio::new(DEPTH)?;
        let ring = || ColdReads::new(Arc::clone(&tools), Arc::clone(&disk), aio.ended());
        let told = |error: &io::Error| log::info!("a thread waits for its reads of bases: {error}");
        let cold = if self.has_rings() { ring().inspect_err(told).ok() } else { None };
        let queue = Arc::new(Queue { aio, cold: cold.as_ref().map(ColdReads::desk), tools, disk });
        let mut queues = self.queues.lock();
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(&queue));
        Ok(Direct { queue, cold, gathered: RefCell::default() })
    }

    /// Answers what has ended of all threads' requests, and says whether any are left. For a thread of its own: whoever has
    /// put them there may be held up.
    pub fn reap(&self) -> bool {
        let queues: Vec<_> = self.queues.lock().iter().filter_map(Weak::upgrade).collect();
        queues.iter().filter(|queue| queue.is_busy()).fold(false, |left, queue| {
            queue.cold.iter().for_each(|cold| cold.look());
            queue.reap(false);
            left || queue.is_busy()
        })
    }

    /// Gives memory that nobody uses back to the host.
    pub fn shrink(&self) {
        self.tools.small.discard();
    }
}

/// What this thread has under way. Dropping it waits until all is answered, or handed to the disk lane.
#[derive(Debug)]
pub struct Direct {
    queue: Arc<Queue>,
    /// Reads of the base, if they are taken on.
    cold: Option<ColdReads>,
    /// What was read and not yet put to the kernel, [`GATHERED_MAX`] at most.
    gathered: RefCell<Vec<Request>>,
}

impl Direct {
    /// Whether anything is under way.
    pub fn is_busy(&self) -> bool {
        !self.gathered.borrow().is_empty() || self.queue.is_busy()
    }

    /// Becomes readable whenever a request ends; see [`Aio::ended`].
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.queue.aio.ended()
    }

    /// Takes on a read of what lies where it is `placed`.
    ///
    /// # Errors
    /// The reply comes back if somebody else must do it.
    pub fn read(&self, read: Read, placed: Placed, reply: Reply) -> std::result::Result<(), Reply> {
        let tools = &self.queue.tools;
        let what = What::Read(read);
        let bytes = match what.len() {
            ..=SMALL_BYTES => tools.small.take().map(Bytes::Small),
            _ => tools.large.take().map(Bytes::Large),
        };
        let Some(bytes) = bytes else {
            tools.fs.let_go(placed);
            return Err(reply);
        };
        self.gather(Request { what, bytes, placed, reply });
        Ok(())
    }

    /// Takes on a read of what lies in the base, where it is `placed`.
    ///
    /// # Errors
    /// The reply comes back if somebody else must do it.
    pub fn read_base(&self, read: Read, placed: Placed, reply: Reply) -> std::result::Result<(), Reply> {
        match &self.cold {
            Some(cold) => cold.take_on(read, placed, reply),
            None => {
                self.queue.tools.fs.let_go(placed);
                Err(reply)
            }
        }
    }

    /// Tells those who look after it whether this thread `rests`; see [`ColdReads::note`].
    pub fn note(&self, rests: bool) {
        if let Some(cold) = &self.cold {
            cold.note(rests);
        }
    }

    /// Takes on a write to where it is `placed`, with the payload of `buffer`; of a large one the buffer itself, and puts
    /// another in its place.
    ///
    /// # Errors
    /// The reply comes back, and the buffer has its payload, if somebody else must do it.
    pub fn write(
        &self,
        write: Write,
        placed: Placed,
        reply: Reply,
        buffer: &mut RequestBuffer,
    ) -> std::result::Result<(), Reply> {
        let tools = &self.queue.tools;
        let what = What::Write(write);
        let bytes = match what.len() {
            len @ ..=SMALL_BYTES => tools.small.take().map(|mut small| {
                small.bytes(len).copy_from_slice(buffer.payload(len));
                Bytes::Small(small)
            }),
            _ => tools.large.take().map(|spare| Bytes::Large(std::mem::replace(buffer, spare))),
        };
        let Some(bytes) = bytes else {
            tools.fs.let_go(placed);
            return Err(reply);
        };
        self.gather(Request { what, bytes, placed, reply });
        Ok(())
    }

    fn gather(&self, request: Request) {
        self.gathered.borrow_mut().push(request);
        if self.gathered.borrow().len() >= GATHERED_MAX {
            self.submit();
        }
    }

    /// Puts what was taken on to the kernel; if too many threads do, or the kernel takes it not, to the disk lane.
    pub fn submit(&self) {
        if let Some(cold) = &self.cold {
            cold.submit();
        }
        let mut gathered = self.gathered.borrow_mut();
        if gathered.is_empty() {
            return;
        }
        let submitting = &self.queue.tools.submitting;
        if submitting.fetch_add(1, Ordering::Relaxed) < SUBMITTERS_MAX {
            self.queue.aio.submit(&mut gathered);
        }
        submitting.fetch_sub(1, Ordering::Relaxed);
        for request in gathered.drain(..) {
            self.queue.hand_on(request);
        }
    }

    /// Answers what has ended, and says whether there may be more; if nothing has and it `waits`, waits for a moment.
    pub fn reap(&self, waits: bool) -> bool {
        let direct = self.queue.aio.under_way() > 0;
        let more = self.cold.as_ref().is_some_and(|cold| cold.reap(waits && !direct));
        direct && self.queue.reap(waits && !more) || more
    }

    /// Waits until nothing is under way.
    pub fn drain(&self) {
        self.submit();
        while self.is_busy() {
            self.reap(true);
        }
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        self.drain();
    }
}

impl Queue {
    fn is_busy(&self) -> bool {
        self.aio.under_way() > 0 || self.cold.as_ref().is_some_and(|cold| cold.is_busy())
    }

    fn reap(&self, waits: bool) -> bool {
        let ended = self.aio.reap(waits, |request, result| {
            // The hook has told of the panic, and EIO was answered as it unwound.
            let _ = catch_unwind(AssertUnwindSafe(|| self.finish(request, result)));
        });
        ended.unwrap_or_else(|error| {
            // What is under way will never be answered by this process; by the next one it will.
            log::error!("wait for direct I/O: {error}");
            std::process::abort();
        })
    }

    /// Answers what is done, and has done what is not.
    fn finish(&self, request: Request, result: io::Result<usize>) {
        let len = request.what.len();
        if result.ok() != Some(len) {
            return self.hand_on(request);
        }
        let Request { what, bytes, placed, reply } = request;
        let mut bytes = Lent { bytes: Some(bytes), tools: Arc::clone(&self.tools) };
        self.tools.fs.landed(placed);
        match what {
            What::Read(_) => bytes.with(len, |_, bytes| reply.answer(&[bytes])),
            What::Write(write) => write.done(reply),
        }
    }

    /// Has a thread that waits do a request, from the beginning.
    fn hand_on(&self, request: Request) {
        let Request { what, bytes, placed, reply } = request;
        let (len, mut bytes) = (what.len(), Lent { bytes: Some(bytes), tools: Arc::clone(&self.tools) });
        self.tools.fs.let_go(placed);
        match what {
            What::Read(read) => {
                self.disk.run(read.ino, move || bytes.with(len, |fs, bytes| read.execute(reply, fs, bytes)));
            }
            What::Write(write) => {
                self.disk
                    .run(write.ino, move || bytes.with(len, |fs, bytes| write.complete(reply, fs, bytes)));
            }
        }
    }
}

impl Tools {
    /// With all buffers unused.
    pub fn new(fs: Arc<Fs>, large: Arc<SpareBuffers>) -> Self {
        Self { fs, small: SmallBuffers::new(SMALL_MAX), large, submitting: AtomicUsize::new(0) }
    }

    fn give_back(&self, bytes: Bytes) {
        match bytes {
            Bytes::Small(buffer) => self.small.put(buffer),
            Bytes::Large(buffer) => self.large.put(buffer),
        }
    }
}

/// Bytes of a request, which go back to where they came from.
struct Lent {
    bytes: Option<Bytes>,
    tools: Arc<Tools>,
}

impl Lent {
    fn with(&mut self, len: usize, work: impl FnOnce(&Fs, &mut [u8])) {
        if let Some(bytes) = &mut self.bytes {
            work(&self.tools.fs, bytes.of(len));
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(bytes) = self.bytes.take() {
            self.tools.give_back(bytes);
        }
    }
}
