//! Reads and writes: from the kernel's arguments to operations of [`Fs`], and their answers.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::channel::Reply;
use super::init::REQUEST_BYTES_MAX;
use super::wire::{ReadIn, WRITE_CACHE, WriteIn, WriteOut};
use crate::fs::{Fs, HandleId, Outcome, Placed};
use crate::storage::Way;
use crate::storage::aio::Transfer;
use crate::transport::about::{About, guarded};
use crate::transport::slow_lane::SlowLane;

/// A read.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    pub ino: u64,
    pub handle: HandleId,
    pub offset: u64,
    /// At most [`REQUEST_BYTES_MAX`].
    pub len: u32,
    /// It must be aligned, as the file was opened with O_DIRECT.
    pub direct: bool,
}

impl Read {
    /// The read that the kernel asks for.
    pub fn of(ino: u64, arguments: &ReadIn) -> Self {
        let ReadIn { fh, offset, size, flags, .. } = *arguments;
        Self { ino, handle: HandleId(fh), offset, len: size.min(REQUEST_BYTES_MAX), direct: is_direct(flags) }
    }

    /// Fills `buffer` if that needs no waiting; see [`Fs::read_now`].
    pub fn now(&self, fs: &Fs, buffer: &mut [u8]) -> Outcome<Option<usize>> {
        fs.read_now(self.handle, self.offset, buffer, self.direct, way(self.direct))
    }

    /// See [`Fs::place`].
    pub fn place(&self, fs: &Fs) -> Option<Placed> {
        fs.place(self.handle, Transfer::Read, self.offset, self.len.into())
    }

    /// See [`Fs::place_in_base`].
    pub fn place_in_base(&self, fs: &Fs) -> Option<Placed> {
        fs.place_in_base(self.handle, self.offset, self.len.into())
    }

    /// Fills `buffer`, and says how much of it; see [`Fs::read`].
    pub fn fill(&self, fs: &Fs, buffer: &mut [u8]) -> Outcome<usize> {
        fs.read(self.handle, self.offset, buffer, self.direct, way(self.direct))
    }

    /// Fills `buffer`, and answers with it.
    pub fn execute(&self, reply: Reply, fs: &Fs, buffer: &mut [u8]) {
        let outcome = guarded(|| self.fill(fs, buffer));
        respond(reply, self.about(), outcome, |reply, count| reply.answer(&[&buffer[..count]]));
    }

    /// What it is about.
    pub fn about(&self) -> About {
        About::range("read", self.ino, self.offset, self.len.into())
    }
}

/// A write, but for its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub ino: u64,
    pub handle: HandleId,
    pub offset: u64,
    pub len: u32,
    /// It must be aligned, as the file was opened with O_DIRECT.
    pub direct: bool,
    /// It is to be durable when it is answered.
    pub durable: bool,
}

impl Write {
    /// The write that the kernel asks for.
    pub fn of(ino: u64, arguments: &WriteIn) -> Self {
        Self {
            ino,
            handle: HandleId(arguments.fh),
            offset: arguments.offset,
            len: arguments.size,
            // A page of a mapping is written in the name of some open file, whose flags say nothing about it.
            direct: arguments.write_flags & WRITE_CACHE == 0 && is_direct(arguments.flags),
            durable: arguments.flags.cast_signed() & libc::O_DSYNC != 0,
        }
    }

    /// By which way it goes.
    fn way(&self) -> Way {
        way(self.direct)
    }

    /// Whether it only changes memory, or is refused: it takes no thread that has time to wait.
    pub fn is_to_memory(&self, fs: &Fs) -> bool {
        fs.writes_to_memory(self.handle, self.offset, self.len.into(), self.way())
    }

    /// See [`Fs::place`].
    pub fn place(&self, fs: &Fs) -> Option<Placed> {
        fs.place(self.handle, Transfer::Write, self.offset, self.len.into())
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        usize::try_from(self.len).expect("no longer than the request was")
    }

    /// Writes.
    ///
    /// # Errors
    /// Those of [`Fs::write`].
    pub fn execute(&self, fs: &Fs, payload: &[u8]) -> Outcome<()> {
        fs.write(self.handle, self.offset, payload, self.direct, self.way())
    }

    /// Writes, makes it durable if it is to be, and answers, in this thread.
    pub fn complete(self, reply: Reply, fs: &Fs, payload: &[u8]) {
        let outcome = guarded(|| {
            self.execute(fs, payload)?;
            if self.durable { fs.sync(self.handle) } else { Ok(()) }
        });
        respond(reply, self.about(), outcome, |reply, ()| self.done(reply));
    }

    /// Answers, at once or after a sync that a thread of `slow` waits for.
    pub fn finish(self, reply: Reply, outcome: Outcome<()>, fs: &Arc<Fs>, slow: &SlowLane) {
        if !self.durable || outcome.is_err() {
            return respond(reply, self.about(), outcome, |reply, ()| self.done(reply));
        }
        let fs = Arc::clone(fs);
        slow.run(self.ino, move || {
            let outcome = guarded(|| fs.sync(self.handle));
            respond(reply, self.about(), outcome, |reply, ()| self.done(reply));
        });
    }

    /// Says that all of it is written.
    pub fn done(&self, reply: Reply) {
        reply.answer(&[WriteOut { size: self.len, padding: 0 }.as_bytes()]);
    }

    fn about(&self) -> About {
        About::range("write", self.ino, self.offset, self.len.into())
    }
}

/// Answers with what `send` makes of an outcome, or with its errno.
pub fn respond<T>(reply: Reply, about: About, outcome: Outcome<T>, send: impl FnOnce(Reply, T)) {
    match outcome {
        Ok(value) => send(reply, value),
        Err(failure) => reply.refuse(about.failed(&failure)),
    }
}

/// Answers that it is done.
pub fn done(reply: Reply, (): ()) {
    reply.answer(&[]);
}

/// Whether whoever opened the file did so with O_DIRECT.
fn is_direct(flags: u32) -> bool {
    flags.cast_signed() & libc::O_DIRECT != 0
}

fn way(direct: bool) -> Way {
    if direct { Way::Direct } else { Way::Cached }
}
