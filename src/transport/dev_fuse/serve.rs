//! What each request does: from the kernel's arguments to operations of [`Fs`] and back.

use std::sync::Arc;
use std::time::Instant;

use zerocopy::IntoBytes;

use super::answers::{self, Names};
use super::buffers::{RequestBuffer, SpareBuffers};
use super::channel::{Channel, Reply};
use super::connection::{Unanswered, request_id};
use super::crew::Hand;
use super::direct::{Direct, DirectQueues};
use super::request::{Malformed, Operation, Request, forgets, parse};
use super::rounds::Rounds;
use super::transfers::{Read, Write, done, respond};
use super::wire::{
    FallocateIn, GetxattrOut, IoctlIn, IoctlOut, LseekIn, LseekOut, OpenIn, OpenOut, ReadIn, ReleaseIn,
    SetattrIn, WriteIn, open_flag,
};
use crate::error::Result;
use crate::fs::{Errno, Fs, HandleId, NumberedEntry, OpenMode, Opened, Outcome, Placed, RequestId};
use crate::transport::about::{About, guarded};
use crate::transport::scratch::with_buffer;
use crate::transport::slow_lane::SlowLane;

/// Every open file bypasses the kernel's page cache (one copy of a base serves all, and each request goes to the disk
/// that it names), writes to different places go side by side, and a close asks nobody.
const FILE_FLAGS: u32 = open_flag::DIRECT_IO | open_flag::PARALLEL_DIRECT_WRITES | open_flag::NOFLUSH;

/// Of a file that the kernel serves, only a close could still ask us.
const PASSED_FLAGS: u32 = open_flag::PASSTHROUGH | open_flag::NOFLUSH;

/// Threads for requests that wait for the host's disk.
const SLOW_THREADS: usize = 16;

/// Threads for reads and writes that wait for the host's disk. One file has at most half of them.
const DISK_THREADS: usize = 32;

/// Writes whose payload waits for the disk lane or is being written by it. Beyond them the thread that reads a write does
/// it itself, so that no more is taken on than can be done.
const WRITES_UNDER_WAY: usize = 32;

/// Answers requests. Shared by all threads that read them.
#[derive(Debug)]
pub struct Server {
    pub(super) fs: Arc<Fs>,
    /// Whether requests that an earlier process had read are answered with EIO.
    refuses_resent: bool,
    /// Direct reads and writes that no thread waits for. What must wait is handed to the disk lane.
    direct: DirectQueues,
    /// Reads and writes that wait for the host's disk. Ends before the slow lane does, to which it hands syncs.
    pub(super) disk: Arc<SlowLane>,
    /// What may wait for a sync.
    pub(super) slow: Arc<SlowLane>,
    spare: Arc<SpareBuffers>,
}

impl Server {
    /// A server of `fs`, with threads of its own for what may wait.
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub fn new(fs: Arc<Fs>, unanswered: Unanswered) -> Result<Self> {
        let slow = Arc::new(SlowLane::start(SLOW_THREADS)?);
        let disk = Arc::new(SlowLane::start(DISK_THREADS)?);
        let spare = Arc::new(SpareBuffers::new(WRITES_UNDER_WAY));
        let direct = DirectQueues::new(Arc::clone(&fs), Arc::clone(&disk), Arc::clone(&spare));
        let refuses_resent = unanswered == Unanswered::Refuse;
        Ok(Self { fs, refuses_resent, direct, disk, slow, spare })
    }

    /// Direct requests that no thread waits for.
    pub(super) fn direct(&self) -> &DirectQueues {
        &self.direct
    }

    /// Gives memory that nobody uses back to the host.
    pub fn shrink(&self) {
        self.spare.discard();
        self.direct.shrink();
    }

    /// Waits until all that was read is answered, at most until `until`, and says whether it is. The threads that read have
    /// ended.
    pub fn finish(&self, until: Option<Instant>) -> bool {
        // In this order: the one hands what must wait to the other.
        self.disk.finish(until) && self.slow.finish(until)
    }

    /// Does the request that is the first `count` bytes of `buffer`, and answers it to `channel`, now or later. The calling
    /// thread waits for the host's disk only if `hand` lets it, and answers what it has taken on in its `rounds`. Another
    /// buffer may have taken the place of this one afterwards.
    pub fn serve(
        &self,
        hand: &Hand<'_>,
        rounds: &Rounds<'_>,
        channel: &Arc<Channel>,
        count: usize,
        buffer: &mut RequestBuffer,
    ) {
        let bytes = &buffer.bytes()[..count];
        match parse(bytes) {
            Ok(Request { header, operation }) => {
                let (ino, unique) = (header.nodeid, header.unique);
                if self.refuses_resent && is_refused(unique, &operation) {
                    let number = request_id(unique).number;
                    log::error!(
                        "request {number}, ino {ino}: refused, as processes died while it was under way"
                    );
                    return channel.refuse(unique, Errno::BROKEN);
                }
                match operation {
                    Operation::Read(arguments) => {
                        self.read(hand, rounds, Reply::new(Arc::clone(channel), unique), ino, &arguments);
                    }
                    Operation::Write(arguments, _payload) => {
                        let reply = Reply::new(Arc::clone(channel), unique);
                        self.write(hand, rounds, reply, ino, &arguments, buffer);
                    }
                    Operation::Forget(lookups) => self.fs.forget(ino, lookups),
                    Operation::BatchForget(all) => {
                        forgets(all).for_each(|one| self.fs.forget(one.nodeid, one.nlookup));
                    }
                    // Requests end by themselves, so none needs to be taken back.
                    Operation::Interrupt => {}
                    other => {
                        // It may take a while.
                        rounds.submit();
                        let reply = Reply::new(Arc::clone(channel), unique);
                        self.serve_rare(hand, reply, request_id(unique), ino, other);
                    }
                }
            }
            Err(Malformed::Headless) => log::error!("the kernel sent {} bytes, no request", bytes.len()),
            Err(Malformed::Body { unique, opcode }) => {
                log::error!("the kernel sent operation {opcode} cut short");
                channel.refuse(unique, Errno::INVALID);
            }
        }
    }

    fn read(&self, hand: &Hand<'_>, rounds: &Rounds<'_>, mut reply: Reply, ino: u64, arguments: &ReadIn) {
        let read = Read::of(ino, arguments);
        log::debug!("READ ino {ino} offset {} size {}", arguments.offset, arguments.size);
        with_buffer(read.len, |buffer| {
            match guarded(|| read.now(&self.fs, buffer)) {
                Ok(Some(count)) => return reply.answer(&[&buffer[..count]]),
                Err(failure) => return reply.refuse(read.about().failed(&failure)),
                Ok(None) => {}
            }
            if read.direct
                && let Some((direct, placed)) = self.joined(rounds, hand, read.place(&self.fs))
            {
                match direct.read(read, placed, reply) {
                    Ok(()) => return,
                    Err(back) => reply = back,
                }
            }
            if rounds.takes_cold(&read)
                && let Some((direct, placed)) = self.joined(rounds, hand, read.place_in_base(&self.fs))
            {
                match direct.read_base(read, placed, reply) {
                    Ok(()) => return,
                    Err(back) => reply = back,
                }
            }
            if let Some(_away) = hand.leave(ino) {
                return read.execute(reply, &self.fs, buffer);
            }
            let fs = Arc::clone(&self.fs);
            self.disk.run(ino, move || with_buffer(read.len, |buffer| read.execute(reply, &fs, buffer)));
        });
    }

    /// Where a request that lies where it is `placed` is taken on, if it is to be.
    fn joined<'r>(
        &self,
        rounds: &'r Rounds<'_>,
        hand: &Hand<'_>,
        placed: Option<Placed>,
    ) -> Option<(&'r Direct, Placed)> {
        let placed = placed?;
        match rounds.join(hand) {
            Some(direct) => Some((direct, placed)),
            None => {
                self.fs.let_go(placed);
                None
            }
        }
    }

    /// Writes the payload in `buffer`.
    fn write(
        &self,
        hand: &Hand<'_>,
        rounds: &Rounds<'_>,
        mut reply: Reply,
        ino: u64,
        arguments: &WriteIn,
        buffer: &mut RequestBuffer,
    ) {
        let write = Write::of(ino, arguments);
        log::debug!("WRITE ino {ino} offset {} size {}", arguments.offset, arguments.size);
        let now = write.is_to_memory(&self.fs);
        if write.direct
            && !(now || write.durable)
            && let Some((direct, placed)) = self.joined(rounds, hand, write.place(&self.fs))
        {
            match direct.write(write, placed, reply, buffer) {
                Ok(()) => return,
                Err(back) => reply = back,
            }
        }
        if (!now || write.durable)
            && let Some(_away) = hand.leave(ino)
        {
            return write.complete(reply, &self.fs, buffer.payload(write.bytes()));
        }
        match if now { None } else { self.spare_buffer(rounds) } {
            Some(spare) => {
                let buffer = std::mem::replace(buffer, spare);
                let (fs, spare, slow) =
                    (Arc::clone(&self.fs), Arc::clone(&self.spare), Arc::clone(&self.slow));
                self.disk.run(ino, move || {
                    let outcome = guarded(|| write.execute(&fs, buffer.payload(write.bytes())));
                    spare.put(buffer);
                    write.finish(reply, outcome, &fs, &slow);
                });
            }
            None => {
                // The host may hold it up.
                rounds.submit();
                if !now {
                    hand.call_another();
                }
                let outcome = guarded(|| write.execute(&self.fs, buffer.payload(write.bytes())));
                write.finish(reply, outcome, &self.fs, &self.slow);
            }
        }
    }

    /// A buffer to take the place of one whose payload somebody else writes. If there is none, it waits for those of direct
    /// requests that this thread has under way: what it writes itself may have to wait for them.
    fn spare_buffer(&self, rounds: &Rounds<'_>) -> Option<RequestBuffer> {
        let mut spare = self.spare.take();
        rounds.submit();
        while spare.is_none() && rounds.is_busy() {
            rounds.reap();
            spare = self.spare.take();
        }
        spare
    }

    /// Everything but reads and writes: what may wait for the host's disk goes to the slow lane, but for a sync by a thread
    /// that may wait.
    pub(super) fn serve_rare(
        &self,
        hand: &Hand<'_>,
        reply: Reply,
        request: RequestId,
        ino: u64,
        operation: Operation<'_>,
    ) {
        log::debug!("{} ino {ino}", operation.name());
        match operation {
            Operation::Open(arguments) => self.open(reply, request, ino, arguments),
            Operation::Release(arguments) => self.release(reply, request, ino, arguments),
            // Attributes are durable as soon as they are changed, so data is all there is to sync.
            Operation::Fsync(arguments) => match hand.leave(ino) {
                Some(_away) => {
                    let outcome = guarded(|| self.fs.sync(HandleId(arguments.fh)));
                    respond(reply, About::new("fsync", ino), outcome, done);
                }
                None => self.slowly("fsync", reply, ino, done, move |fs| fs.sync(HandleId(arguments.fh))),
            },
            Operation::Setattr(arguments) => self.set_attributes(reply, ino, &arguments),
            Operation::Fallocate(arguments) => self.allocate(reply, ino, arguments),
            Operation::Setxattr { name, value, flags } => {
                let (name, value) = (name.to_owned(), value.to_vec());
                let flags = flags.cast_signed();
                self.slowly("setxattr", reply, ino, done, move |fs| {
                    fs.set_xattr(ino, &name, value, flags, request)
                });
            }
            Operation::Removexattr(name) => {
                let name = name.to_owned();
                self.slowly("removexattr", reply, ino, done, move |fs| fs.remove_xattr(ino, &name, request));
            }
            other => self.serve_at_once(reply, request, ino, other),
        }
    }

    /// What is answered by the thread that read it.
    fn serve_at_once(&self, reply: Reply, request: RequestId, ino: u64, operation: Operation<'_>) {
        let fs = &self.fs;
        let about = |operation| About::new(operation, ino);
        match operation {
            Operation::Lookup(name) => {
                respond(reply, about("lookup"), guarded(|| fs.lookup(ino, name)), |reply, found| {
                    reply.answer(&[answers::entry(&found).as_bytes()]);
                });
            }
            Operation::Getattr => {
                respond(reply, about("getattr"), guarded(|| fs.attributes(ino)), |reply, found| {
                    reply.answer(&[answers::attributes(&found).as_bytes()]);
                });
            }
            Operation::Readlink => {
                respond(reply, about("readlink"), guarded(|| fs.link_target(ino)), |reply, target| {
                    reply.answer(&[target.as_bytes()]);
                });
            }
            Operation::Statfs => {
                respond(reply, about("statfs"), guarded(|| fs.statistics()), |reply, found| {
                    reply.answer(&[answers::statistics(&found).as_bytes()]);
                });
            }
            Operation::Opendir => {
                respond(
                    reply,
                    about("opendir"),
                    guarded(|| fs.open_directory(ino, request)),
                    |reply, handle| {
                        reply.answer(&[OpenOut { fh: handle.0, ..OpenOut::default() }.as_bytes()]);
                    },
                );
            }
            Operation::Readdir(arguments) => self.read_directory(reply, ino, &arguments),
            Operation::Readdirplus(arguments) => self.read_directory_plus(reply, ino, &arguments),
            Operation::Releasedir(arguments) => {
                let outcome = guarded(|| fs.close(HandleId(arguments.fh), request));
                respond(reply, about("releasedir"), outcome, done);
            }
            Operation::Getxattr { name, size } => {
                answer_xattr(reply, about("getxattr"), size, guarded(|| fs.xattr(ino, name)));
            }
            Operation::Listxattr { size } => {
                answer_xattr(reply, about("listxattr"), size, guarded(|| fs.xattr_names(ino)));
            }
            Operation::Ioctl(arguments) => self.control(reply, ino, &arguments),
            Operation::Lseek(arguments) => self.seek(reply, ino, &arguments),
            // Only the command line makes and removes instances.
            Operation::ChangeTree => reply.refuse(Errno::NOT_PERMITTED),
            // Whatever stands in a directory was durable before it appeared.
            Operation::Fsyncdir | Operation::Flush | Operation::Destroy => reply.answer(&[]),
            // The kernel remembers it, does without, and does not ask again.
            _ => reply.refuse(Errno::NOT_IMPLEMENTED),
        }
    }

    /// Has a thread of the slow lane do `work`, and answer what `send` makes of it.
    fn slowly<T>(
        &self,
        operation: &'static str,
        reply: Reply,
        ino: u64,
        send: impl FnOnce(Reply, T) + Send + 'static,
        work: impl FnOnce(&Fs) -> Outcome<T> + Send + 'static,
    ) {
        let fs = Arc::clone(&self.fs);
        self.slow.run(ino, move || {
            respond(reply, About::new(operation, ino), guarded(|| work(&fs)), send);
        });
    }

    fn open(&self, reply: Reply, request: RequestId, ino: u64, arguments: OpenIn) {
        let flags = arguments.flags.cast_signed();
        let write = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let mode = OpenMode { write, truncate: flags & libc::O_TRUNC != 0 };
        let send = |reply: Reply, Opened { handle, backing }| {
            let (open_flags, backing_id) = backing.map_or((FILE_FLAGS, 0), |id| (PASSED_FLAGS, id.0));
            reply.answer(&[OpenOut { fh: handle.0, open_flags, backing_id }.as_bytes()]);
        };
        self.slowly("open", reply, ino, send, move |fs| fs.open(ino, mode, request));
    }

    fn release(&self, reply: Reply, request: RequestId, ino: u64, arguments: ReleaseIn) {
        self.slowly("release", reply, ino, done, move |fs| fs.close(HandleId(arguments.fh), request));
    }

    fn set_attributes(&self, reply: Reply, ino: u64, arguments: &SetattrIn) {
        let Some(changes) = answers::changes(arguments) else { return reply.refuse(Errno::INVALID) };
        let send = |reply: Reply, found| reply.answer(&[answers::attributes(&found).as_bytes()]);
        self.slowly("setattr", reply, ino, send, move |fs| fs.change(ino, &changes));
    }

    fn allocate(&self, reply: Reply, ino: u64, arguments: FallocateIn) {
        let FallocateIn { fh, offset, length, mode, .. } = arguments;
        let fs = Arc::clone(&self.fs);
        self.slow.run(ino, move || {
            let about = About::range("fallocate", ino, offset, length);
            let outcome = guarded(|| fs.allocate(HandleId(fh), mode.cast_signed(), offset, length));
            respond(reply, about, outcome, done);
        });
    }

    fn read_directory(&self, reply: Reply, ino: u64, arguments: &ReadIn) {
        let mut names = Names::new(arguments.size);
        let outcome = guarded(|| {
            let mut add =
                |entry: &NumberedEntry, next| names.add(&[], entry.ino, entry.kind, &entry.name, next);
            self.fs.read_directory(HandleId(arguments.fh), arguments.offset, &mut add)
        });
        respond(reply, About::new("readdir", ino), outcome, |reply, ()| reply.answer(&[names.bytes()]));
    }

    fn read_directory_plus(&self, reply: Reply, ino: u64, arguments: &ReadIn) {
        let mut names = Names::new(arguments.size);
        let outcome = guarded(|| {
            let mut add = |name: &str, found: &crate::fs::Attributes, next| {
                names.add(answers::entry(found).as_bytes(), found.ino, found.kind, name, next)
            };
            self.fs.read_directory_with_attributes(HandleId(arguments.fh), arguments.offset, &mut add)
        });
        respond(reply, About::new("readdirplus", ino), outcome, |reply, ()| reply.answer(&[names.bytes()]));
    }

    fn control(&self, reply: Reply, ino: u64, arguments: &IoctlIn) {
        let outcome = guarded(|| self.fs.control(HandleId(arguments.fh), arguments.cmd));
        respond(reply, About::new("ioctl", ino), outcome, |reply, data| {
            reply.answer(&[IoctlOut::default().as_bytes(), &data]);
        });
    }

    fn seek(&self, reply: Reply, ino: u64, arguments: &LseekIn) {
        let LseekIn { fh, offset, whence, .. } = *arguments;
        let outcome = guarded(|| self.fs.seek(HandleId(fh), offset.cast_signed(), whence.cast_signed()));
        respond(reply, About::range("lseek", ino, offset, 0), outcome, |reply, at: i64| {
            reply.answer(&[LseekOut { offset: at.cast_unsigned() }.as_bytes()]);
        });
    }
}

/// A caller that has room for nothing asks for the length.
fn answer_xattr(reply: Reply, about: About, size: u32, outcome: Outcome<Vec<u8>>) {
    respond(reply, about, outcome, |reply, value| match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.answer(&[GetxattrOut { size: len, padding: 0 }.as_bytes()]),
        Ok(len) if len <= size => reply.answer(&[&value]),
        _ => reply.refuse(about.failed(&Errno::RANGE.into())),
    });
}

/// Whether a request was sent before and waits for an answer. What closes a file is done all the same: nobody closes it again.
fn is_refused(unique: u64, operation: &Operation<'_>) -> bool {
    let unwaited = matches!(
        operation,
        Operation::Forget(_)
            | Operation::BatchForget(_)
            | Operation::Interrupt
            | Operation::Release(_)
            | Operation::Releasedir(_)
    );
    request_id(unique).resent && !unwaited
}
