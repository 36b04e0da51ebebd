//! Direct reads and writes of a disk's own data, that no thread waits for.
//!
//! Whoever reads such a request puts it to the kernel and goes on to the next; one thread takes what is done, many at once
//! where there are many, and answers. What the kernel does not do so (it would have to wait for a lock of the file, or the
//! request is not aligned enough) is done by a thread of the disk lane, from the beginning.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::buffers::{RequestBuffer, SMALL_BYTES, SmallBuffer, SmallBuffers, SpareBuffers};
use super::channel::Reply;
use super::transfers::{Read, Write};
use crate::error::{Context, Result};
use crate::fs::{Fs, Placed};
use crate::storage::aio::{self, Aio, Transfer};
use crate::transport::slow_lane::SlowLane;

/// Most requests under way.
const DEPTH: usize = 128;

/// Most threads that put requests to the kernel at once.
const SUBMITTERS_MAX: usize = 4;

/// How often whoever waits for the last ones looks.
const FINISH_PAUSE: Duration = Duration::from_millis(1);

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

/// The requests under way, and the thread that answers them.
#[derive(Debug)]
pub struct DirectLane {
    /// `None` where the host gives us no queue: then every request is somebody else's.
    shared: Option<Arc<Shared>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    aio: Aio<Request>,
    /// Threads that put a request to the kernel just now.
    submitting: AtomicUsize,
    tools: Arc<Tools>,
    disk: Arc<SlowLane>,
}

/// What a request needs of us until it is answered.
#[derive(Debug)]
struct Tools {
    fs: Arc<Fs>,
    small: SmallBuffers,
    large: Arc<SpareBuffers>,
}

impl DirectLane {
    /// Starts the thread that answers. What has to wait is done by `disk`; large requests take their memory from `large`.
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub fn start(fs: Arc<Fs>, disk: Arc<SlowLane>, large: Arc<SpareBuffers>) -> Result<Self> {
        let aio = match Aio::new(DEPTH) {
            Ok(aio) => aio,
            Err(error) => {
                log::info!("direct I/O is done by threads that wait: io_setup: {error}");
                return Ok(Self { shared: None, thread: None });
            }
        };
        let tools = Arc::new(Tools { fs, small: SmallBuffers::new(DEPTH), large });
        let shared = Arc::new(Shared { aio, submitting: AtomicUsize::new(0), tools, disk });
        let serve = {
            let shared = Arc::clone(&shared);
            move || {
                let ended = shared.aio.serve(|request, result| {
                    // The hook has told of the panic, and EIO was answered as it unwound.
                    let _ = catch_unwind(AssertUnwindSafe(|| shared.finish(request, result)));
                });
                if let Err(error) = ended {
                    // What is under way will never be answered by this process; by the next one it will.
                    log::error!("wait for direct I/O: {error}");
                    std::process::abort();
                }
            }
        };
        let thread = std::thread::Builder::new().name("fuse-direct".to_owned()).spawn(serve);
        Ok(Self { shared: Some(shared), thread: Some(thread.context(|| "start a thread")?) })
    }

    /// Whether anything is under way.
    pub fn is_busy(&self) -> bool {
        self.shared.as_ref().is_some_and(|shared| shared.aio.under_way() > 0)
    }

    /// Waits until nothing is under way, at most until `until`, and says whether nothing is. Nobody takes anything on meanwhile.
    pub fn finish(&self, until: Option<Instant>) -> bool {
        while self.is_busy() {
            if until.is_some_and(|until| Instant::now() >= until) {
                return false;
            }
            std::thread::sleep(FINISH_PAUSE);
        }
        true
    }

    /// Takes a read on.
    ///
    /// # Errors
    /// The reply comes back if somebody else must do it.
    pub fn read(&self, read: Read, reply: Reply) -> std::result::Result<(), Reply> {
        let Some(shared) = self.shared.as_deref() else { return Err(reply) };
        let tools = &shared.tools;
        let place = tools.fs.place(read.handle, Transfer::Read, read.offset, read.len.into());
        let Some(placed) = place else { return Err(reply) };
        let what = What::Read(read);
        let bytes = match what.len() {
            ..=SMALL_BYTES => tools.small.take().map(Bytes::Small),
            _ => tools.large.take().map(Bytes::Large),
        };
        let Some(bytes) = bytes else {
            tools.fs.let_go(placed);
            return Err(reply);
        };
        shared.submit(Request { what, bytes, placed, reply }).map_err(|request| {
            tools.fs.let_go(request.placed);
            tools.give_back(request.bytes);
            request.reply
        })
    }

    /// Takes a write on, with the payload of `buffer`; of a large one the buffer itself, and puts another in its place.
    ///
    /// # Errors
    /// The reply comes back, and the buffer has its payload, if somebody else must do it.
    pub fn write(
        &self,
        write: Write,
        reply: Reply,
        buffer: &mut RequestBuffer,
    ) -> std::result::Result<(), Reply> {
        let Some(shared) = self.shared.as_deref() else { return Err(reply) };
        let tools = &shared.tools;
        let place = tools.fs.place(write.handle, Transfer::Write, write.offset, write.len.into());
        let Some(placed) = place else { return Err(reply) };
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
        shared.submit(Request { what, bytes, placed, reply }).map_err(|request| {
            tools.fs.let_go(request.placed);
            tools.give_back(match request.bytes {
                Bytes::Large(payload) => Bytes::Large(std::mem::replace(buffer, payload)),
                small @ Bytes::Small(_) => small,
            });
            request.reply
        })
    }

    /// Gives memory that nobody uses back to the host.
    pub fn shrink(&self) {
        if let Some(shared) = &self.shared {
            shared.tools.small.discard();
        }
    }
}

impl Drop for DirectLane {
    /// Waits until all are answered, or handed to the disk lane.
    fn drop(&mut self) {
        let (Some(shared), Some(thread)) = (&self.shared, self.thread.take()) else { return };
        shared.aio.close();
        if thread.join().is_err() {
            log::error!("the thread of direct I/O panicked");
        }
    }
}

impl Shared {
    /// Puts a request to the kernel, unless so many threads do already that too few would be left if all had to wait there: for
    /// the host's queue of requests, or for its journal.
    #[expect(clippy::result_large_err, reason = "the request comes back as it was")]
    fn submit(&self, request: Request) -> std::result::Result<(), Request> {
        let others = self.submitting.fetch_add(1, Ordering::Relaxed);
        let result = if others < SUBMITTERS_MAX { self.aio.submit(request) } else { Err(request) };
        self.submitting.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Answers what is done, and has done what is not.
    fn finish(&self, request: Request, result: io::Result<usize>) {
        let Request { what, bytes, placed, reply } = request;
        let tools = Arc::clone(&self.tools);
        let mut bytes = Lent { bytes: Some(bytes), tools };
        let (len, fs) = (what.len(), &self.tools.fs);
        if result.ok() != Some(len) {
            fs.let_go(placed);
            return match what {
                What::Read(read) => {
                    self.disk
                        .run(read.ino, move || bytes.with(len, |fs, bytes| read.execute(reply, fs, bytes)));
                }
                What::Write(write) => {
                    self.disk.run(write.ino, move || {
                        bytes.with(len, |fs, bytes| write.complete(reply, fs, bytes));
                    });
                }
            };
        }
        fs.landed(placed);
        match what {
            What::Read(_) => bytes.with(len, |_, bytes| reply.answer(&[bytes])),
            What::Write(write) => write.done(reply),
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

impl Tools {
    fn give_back(&self, bytes: Bytes) {
        match bytes {
            Bytes::Small(buffer) => self.small.put(buffer),
            Bytes::Large(buffer) => self.large.put(buffer),
        }
    }
}
