//! The thread of a ring: it fetches requests from the kernel, does them or has them done, and hands in the answers.
#![allow(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use zerocopy::IntoBytes;

use super::super::channel::Channel;
use super::super::crew::{Crew, Hand};
use super::super::serve::Server;
use super::super::wire::{RingCommand, RingHead, ring_command};
use super::entry::{Desk, Entry};
use super::halt::Halt;
use super::memory::{Memory, Note, PAYLOAD_BYTES};
use super::serve::RingRead;
use crate::error::{Context, Error, ErrorKind, Result};

/// What the kernel tells of the bell instead of an entry's number.
const BELL: u64 = u64::MAX;

/// Set in what the kernel tells of a read of the host's disk, beside its entry's number.
const READ: u64 = 1 << 62;

/// How long the thread waits after an error of the host that may pass.
const ERROR_PAUSE: Duration = Duration::from_millis(1);

/// Who has an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    /// Another ring.
    Other,
    /// Nobody: the kernel does not take it any more.
    Lost,
    /// The kernel.
    Kernel,
    /// An [`Entry`].
    Entry,
    /// This ring: it holds a request with which nobody has begun.
    Request,
    /// This ring: it holds an answer.
    Answer,
}

/// A ring of io_uring with the memory of its entries. It belongs to one thread.
pub struct Ring {
    // Dropped before the memory that the kernel writes to by it.
    ring: IoUring<Entry128, cqueue::Entry>,
    desk: Arc<Desk>,
    /// Reads under way, by their entries.
    reads: HashMap<usize, RingRead>,
    channel: Arc<Channel>,
    /// Who has each entry of the memory.
    holds: Vec<Hold>,
    /// Entries of each queue of the kernel.
    depth: usize,
    /// Entries that are this ring's.
    alive: usize,
    /// Where the bell's count is read to. On the heap, so that it stays where it is.
    rang: Box<u64>,
    /// Entries to hand in, and what the kernel has told: here so that no request needs new memory.
    answered: Vec<usize>,
    told: Vec<(u64, i32)>,
}

/// A ring of the kind that the kernel's FUSE asks for, with room for `entries` operations.
///
/// # Errors
/// If the kernel has no io_uring, or refuses it to this process.
pub fn build(entries: u32) -> Result<IoUring<Entry128, cqueue::Entry>> {
    let mut builder = IoUring::<Entry128, cqueue::Entry>::builder();
    // Each entry has one outcome at most, so that there is always room for all of them.
    builder.setup_cqsize((2 * entries).next_power_of_two());
    // Work for this thread is done when it asks for it, and not whenever it returns from some call.
    builder.setup_single_issuer().setup_defer_taskrun();
    builder.build(entries.next_power_of_two()).context(|| "make an io_uring").map_err(|error| {
        error.with_hint("allow it by sysctl kernel.io_uring_disabled=0, or mount with -o transport=dev_fuse")
    })
}

/// The entries of a queue.
fn entries_of(queue: u16, depth: usize) -> std::ops::Range<usize> {
    let first = usize::from(queue) * depth;
    first..first + depth
}

/// Whether an outcome says that the mount has gone away.
fn is_end(errno: i32) -> bool {
    matches!(errno, libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV | libc::ECANCELED)
}

impl Ring {
    /// A ring for the kernel's `queues`, each of which has `depth` entries in `memory`, as a process before this one has left them
    /// there. The kernel is told nothing yet. To be made by the thread that runs it.
    ///
    /// # Errors
    /// Those of the host; if it was left what we do not know.
    pub fn new(channel: Arc<Channel>, memory: &Arc<Memory>, queues: &[u16], depth: usize) -> Result<Self> {
        let mut holds = vec![Hold::Other; memory.entries()];
        for entry in queues.iter().flat_map(|queue| entries_of(*queue, depth)) {
            holds[entry] = match memory.note(entry)? {
                Note::Unknown => Hold::Kernel,
                Note::Request => Hold::Request,
                Note::Answer => Hold::Answer,
            };
        }
        let entries = queues.len() * depth;
        Ok(Self {
            // One more for the bell.
            ring: build(u32::try_from(entries + 1).expect("a few thousand"))?,
            desk: Arc::new(Desk::new(Arc::clone(memory))?),
            reads: HashMap::new(),
            channel,
            holds,
            depth,
            alive: entries,
            rang: Box::new(0),
            answered: Vec::with_capacity(entries),
            told: Vec::with_capacity(entries + 1),
        })
    }

    /// What others need to wake it.
    pub fn desk(&self) -> Arc<Desk> {
        Arc::clone(&self.desk)
    }

    /// Makes those entries known to the kernel that it does not know.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn register(&mut self) -> Result<()> {
        let unknown: Vec<_> = self.holding(Hold::Kernel).collect();
        let places: Vec<_> = unknown.iter().map(|entry| self.place(*entry)).collect();
        for (entry, place) in unknown.iter().zip(&places) {
            // SAFETY: `places` lives until the kernel has read it, at the submission below.
            unsafe { self.push_register(*entry, place)? };
        }
        self.push_bell()?;
        let what = || "register with the kernel's FUSE";
        if self.ring.submit().context(what)? != unknown.len() + 1 {
            return Err(Error::new(ErrorKind::Io, format!("{}: it does not take all entries", what())));
        }
        self.listen();
        match self.told.iter().find(|(number, outcome)| *number != BELL && *outcome < 0) {
            Some((_, outcome)) => Err(io::Error::from_raw_os_error(-outcome)).context(what),
            None => Ok(()),
        }
    }

    /// Serves until the mount goes away, but while the session is to halt.
    ///
    /// # Errors
    /// If the kernel no longer takes part although the mount is there.
    pub fn run(mut self, server: &Server, halt: &Halt) -> Result<()> {
        // A crew of one never lets its hand leave: whoever waits for the host's disk is a thread of a lane.
        let crew = Crew::new(1, 1);
        let hand = Hand::of(&crew);
        let (all, mut lost) = (self.alive, 0);
        let mut held = true;
        while self.alive > 0 {
            let halts = halt.is_on();
            if std::mem::replace(&mut held, halts) && !halts {
                self.go_on(server, &hand)?;
            }
            let mut told = std::mem::take(&mut self.told);
            for (number, outcome) in told.drain(..) {
                match usize::try_from(number & !READ) {
                    _ if number == BELL => self.hear_bell(outcome)?,
                    Ok(entry) if number & READ != 0 => self.end_read(entry, outcome, server),
                    Ok(entry) if outcome == 0 && halts => self.holds[entry] = Hold::Request,
                    Ok(entry) if outcome == 0 => self.serve(entry, server, &hand)?,
                    Ok(entry) => {
                        self.holds[entry] = Hold::Lost;
                        self.alive -= 1;
                        if !is_end(-outcome) {
                            let error = io::Error::from_raw_os_error(-outcome);
                            log::error!("fetch a request by io_uring: {error}");
                            lost += 1;
                        }
                    }
                    Err(_) => {}
                }
            }
            self.told = told;
            self.take_answers(halts)?;
            if halts && self.has_all_of(&halt.queues()) {
                self.leave_notes();
                halt.stand_still();
                self.desk.wake();
            } else if self.alive > 0 {
                self.exchange()?;
            }
        }
        if lost == all {
            return Err(Error::new(ErrorKind::Io, "the kernel takes no answers by io_uring any more"));
        }
        Ok(())
    }

    /// The entries that it holds so.
    fn holding(&self, hold: Hold) -> impl Iterator<Item = usize> {
        self.holds.iter().enumerate().filter(move |(_, held)| **held == hold).map(|(entry, _)| entry)
    }

    /// Whether neither the kernel nor anybody else has an entry of these queues.
    fn has_all_of(&self, queues: &BTreeSet<u16>) -> bool {
        let is_of_them = |entry| queues.contains(&self.queue_of(entry));
        self.holding(Hold::Entry).next().is_none() && !self.holding(Hold::Kernel).any(is_of_them)
    }

    /// Leaves word of what each entry holds for the process that may take them over.
    fn leave_notes(&self) {
        for (entry, held) in self.holds.iter().enumerate() {
            let note = match held {
                Hold::Other => continue,
                // What the kernel still has it gives up when this thread ends.
                Hold::Lost | Hold::Kernel | Hold::Entry => Note::Unknown,
                Hold::Request => Note::Request,
                Hold::Answer => Note::Answer,
            };
            self.desk.memory.leave_note(entry, note);
        }
    }

    /// Does the requests that it holds, and hands in the answers.
    fn go_on(&mut self, server: &Server, hand: &Hand<'_>) -> Result<()> {
        for entry in self.holding(Hold::Answer).collect::<Vec<_>>() {
            self.push_commit(entry)?;
        }
        for entry in self.holding(Hold::Request).collect::<Vec<_>>() {
            self.serve(entry, server, hand)?;
        }
        Ok(())
    }

    fn hear_bell(&mut self, outcome: i32) -> Result<()> {
        if outcome < 0 {
            log::error!("hear of answers by io_uring: {}", io::Error::from_raw_os_error(-outcome));
            std::thread::sleep(ERROR_PAUSE);
        }
        self.push_bell()
    }

    /// Takes all answers, to be handed in by [`Ring::exchange`] unless they are to be held. From now on whoever answers rings the
    /// bell.
    fn take_answers(&mut self, holds: bool) -> Result<()> {
        let mut answered = std::mem::take(&mut self.answered);
        self.desk.take_and_sleep(&mut answered);
        for entry in answered.drain(..) {
            if holds {
                self.holds[entry] = Hold::Answer;
            } else {
                self.push_commit(entry)?;
            }
        }
        self.answered = answered;
        Ok(())
    }

    /// Hands in the answers that were taken and waits until the kernel has something to tell.
    fn exchange(&mut self) -> Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => {
                log::error!("wait for requests by io_uring: {error}");
                std::thread::sleep(ERROR_PAUSE);
            }
            Err(error) => return Err(error).context(|| "wait for requests by io_uring"),
        }
        self.desk.wake();
        self.listen();
        Ok(())
    }

    /// Takes what the kernel has told.
    fn listen(&mut self) {
        self.told.extend(self.ring.completion().map(|outcome| (outcome.user_data(), outcome.result())));
    }

    fn serve(&mut self, entry: usize, server: &Server, hand: &Hand<'_>) -> Result<()> {
        self.holds[entry] = Hold::Entry;
        // SAFETY: the kernel has told us, or the process before us, that this entry holds a request; it gets it back by
        // `push_commit` alone, which follows the end of this `Entry`.
        let Ok(fetched) = (unsafe { Entry::fetched(Arc::clone(&self.desk), entry) }) else {
            log::error!("the kernel sent a request whose lengths do not fit");
            return Ok(());
        };
        // The hook has told of the panic, and EIO was answered as it unwound. This thread must serve the next.
        match catch_unwind(AssertUnwindSafe(|| server.serve_entry(hand, fetched))) {
            Ok(Some(read)) => self.push_read(entry, read),
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// A read has ended, so.
    fn end_read(&mut self, entry: usize, outcome: i32, server: &Server) {
        let Some(read) = self.reads.remove(&entry) else { return };
        let count = usize::try_from(outcome).map_err(|_| io::Error::from_raw_os_error(-outcome));
        // As above.
        let _ = catch_unwind(AssertUnwindSafe(|| server.end_read(read, count)));
    }

    /// Head and payload of an entry, as REGISTER takes them.
    fn place(&self, entry: usize) -> [libc::iovec; 2] {
        let (head, payload) = (self.desk.memory.head(entry), self.desk.memory.payload(entry));
        [
            libc::iovec { iov_base: head.as_ptr().cast(), iov_len: size_of::<RingHead>() },
            libc::iovec { iov_base: payload.as_ptr().cast(), iov_len: PAYLOAD_BYTES },
        ]
    }

    /// Gives an entry to the kernel for the first time.
    ///
    /// # Safety
    /// `place` stays where it is until it is submitted.
    unsafe fn push_register(&mut self, entry: usize, place: &[libc::iovec; 2]) -> Result<()> {
        let command = RingCommand { qid: self.queue_of(entry), ..RingCommand::default() };
        let address = u64::try_from(place.as_ptr().addr()).expect("an address fits 64 bits");
        let operation = opcode::UringCmd80::new(self.device(), ring_command::REGISTER)
            .cmd(padded(&command))
            .addr(Some(address))
            .build();
        // SAFETY: head and payload belong to `desk`, which outlives the ring.
        unsafe { self.push(with_len(operation, 2), entry as u64) }
    }

    /// Hands in an answer, and gives the entry to the kernel for the next request.
    fn push_commit(&mut self, entry: usize) -> Result<()> {
        // SAFETY: the `Entry` has ended, and the kernel does not have the entry yet.
        let commit_id = unsafe { self.desk.memory.head(entry).as_ref() }.ent.commit_id;
        let command = RingCommand { commit_id, qid: self.queue_of(entry), ..RingCommand::default() };
        let operation = opcode::UringCmd80::new(self.device(), ring_command::COMMIT_AND_FETCH)
            .cmd(padded(&command))
            .build();
        // SAFETY: it refers to nothing but the memory that was registered, which outlives the ring.
        unsafe { self.push(operation, entry as u64)? };
        self.holds[entry] = Hold::Kernel;
        Ok(())
    }

    /// Begins a read of the host's disk.
    fn push_read(&mut self, entry: usize, mut read: RingRead) -> Result<()> {
        let (file, at) = (types::Fd(read.placed.file().as_raw_fd()), read.placed.at());
        let room = read.room();
        let len = u32::try_from(room.len()).expect("1 MiB");
        let operation = opcode::Read::new(file, room.as_mut_ptr(), len).offset(at).build();
        self.reads.insert(entry, read);
        // SAFETY: `reads` keeps file and entry until the read has ended, and then gives them away; should this ring be dropped
        // before that, its memory stays.
        unsafe { self.push(operation.into(), READ | entry as u64) }
    }

    /// Has the kernel tell when somebody rings the bell.
    fn push_bell(&mut self) -> Result<()> {
        let bell = types::Fd(self.desk.bell.as_fd().as_raw_fd());
        let operation = opcode::Read::new(bell, NonNull::from(&mut *self.rang).as_ptr().cast(), 8).build();
        // SAFETY: eventfd and number live as long as the ring, and nobody looks at the number.
        unsafe { self.push(operation.into(), BELL) }
    }

    fn queue_of(&self, entry: usize) -> u16 {
        u16::try_from(entry / self.depth).expect("as many queues as processors")
    }

    fn device(&self) -> types::Fd {
        types::Fd(self.channel.as_fd().as_raw_fd())
    }

    /// # Safety
    /// What the operation refers to stays valid until it has ended.
    unsafe fn push(&mut self, operation: Entry128, number: u64) -> Result<()> {
        // SAFETY: promised by the caller.
        let pushed = unsafe { self.ring.submission().push(&operation.user_data(number)) };
        // There is room for all entries and the bell, and each waits there once at most: it is handed in, or read into.
        pushed.map_err(|_full| Error::new(ErrorKind::Io, "an io_uring has no room"))
    }
}

fn padded(command: &RingCommand) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[..size_of::<RingCommand>()].copy_from_slice(command.as_bytes());
    bytes
}

/// Sets the field `len` of an operation, for which the crate has no way.
fn with_len(mut operation: Entry128, len: u32) -> Entry128 {
    const OFFSET: usize = 24;
    const _: () = assert!(size_of::<Entry128>() == 128 && align_of::<Entry128>() >= 4);
    // SAFETY: the operation is the kernel's `struct io_uring_sqe` in C's layout, in which `len` is the 32 bits at byte 24.
    unsafe { (&raw mut operation).cast::<u8>().add(OFFSET).cast::<u32>().write(len) };
    operation
}

impl Drop for Ring {
    fn drop(&mut self) {
        if !self.reads.is_empty() {
            // The thread has failed, and the kernel may still read into the memory: it must stay, and no entry be answered.
            std::mem::forget((Arc::clone(&self.desk), std::mem::take(&mut self.reads)));
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("depth", &self.depth).field("alive", &self.alive).finish_non_exhaustive()
    }
}
