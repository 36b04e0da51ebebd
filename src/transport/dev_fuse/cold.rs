//! Small reads of a base that is not in the host's memory, that no thread waits for: buffered reads by io_uring.
//!
//! A ring belongs to the thread that made it. That thread puts several reads to the kernel with one call. When the disk has
//! a page, the interrupt tells so by an eventfd and does no more (`IORING_SETUP_DEFER_TASKRUN`): the copy is made
//! when the thread asks for what has ended, and no other thread is woken. Where the kernel cannot do it so, threads wait as for
//! other reads; with a ring that interrupts its thread for each page, they would be no slower.
//!
//! While the thread is held up nobody else may ask in its place. Then the watch takes the answers that are still owed to
//! threads of the disk lane, which read anew ([`Desk::look`]); what the ring reads is thrown away.
//!
//! A read changes nothing, so one that is left by a process that dies harms nobody.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use io_uring::{IoUring, opcode, types};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use super::buffers::{SMALL_BYTES, SmallBuffer};
use super::channel::Reply;
use super::direct::{GATHERED_MAX, Tools};
use super::transfers::Read;
use crate::error::{Context, Result};
use crate::fs::Placed;
use crate::transport::scratch::with_buffer;
use crate::transport::slow_lane::SlowLane;

/// Most reads of one thread under way.
const DEPTH: u32 = 128;

/// Looks of the watch, 2 ms apart, after which a thread that has not gone on counts as held up. Not fewer: on a busy host it
/// may just wait for a processor.
const LOOKS_MAX: u8 = 5;

/// [`Desk::pace`] of a thread that waits for requests and ends: it is not held up.
const RESTS: u8 = u8::MAX;

/// How long [`ColdReads::reap`] waits.
const WAIT_NANOS: u32 = 1_000_000;

/// Longest read that is done so, in bytes. Of longer ones a thread that waits costs little beside the copy, which it makes
/// while others make theirs.
pub const COLD_BYTES_MAX: u32 = {
    assert!(SMALL_BYTES == 16 << 10);
    16 << 10
};

fn build(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    builder.build(entries)
}

/// Whether the kernel can read so for this process: each call that a ring takes is tried. Nothing is changed.
///
/// # Errors
/// If it cannot (before Linux 6.1), or may not.
pub fn require() -> Result<()> {
    let mut ring = build(1).context(|| "make an io_uring")?;
    let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(|| "make an eventfd")?;
    ring.submitter().register_eventfd(ended.as_raw_fd()).context(|| "have an io_uring tell of what ends")?;
    // SAFETY: it names no memory and no file.
    let pushed = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
    pushed.expect("there is room for one");
    ring.submit().map(drop).context(|| "ask an io_uring for nothing")
}

/// A read under way.
#[derive(Debug)]
struct ColdRead {
    read: Read,
    placed: Placed,
    /// Where the kernel reads to: a mapping, which stays where it is while its owner is moved.
    bytes: SmallBuffer,
    /// Taken by a thread of the disk lane if the ring's is held up.
    reply: Option<Reply>,
}

/// What is under way in a ring, for others to look after while its thread is held up.
#[derive(Debug)]
pub struct Desk {
    /// By the numbers that the kernel knows them by. Each guards one read: it is put there before the kernel is asked, and
    /// taken away, by the ring's thread, after the kernel is done.
    slots: Box<[Mutex<Option<ColdRead>>]>,
    /// How many are in slots. Changed by the ring's thread alone.
    under_way: AtomicUsize,
    /// Looks of the watch since the thread last went on, or [`RESTS`]. A guess, on which nothing depends but time.
    pace: AtomicU8,
    tools: Arc<Tools>,
    disk: Arc<SlowLane>,
}

/// The reads under way of the thread that made it.
pub struct ColdReads {
    ring: RefCell<IoUring>,
    desk: Arc<Desk>,
    free: RefCell<Vec<usize>>,
    /// Reads that the kernel was not asked for yet.
    gathered: Cell<usize>,
}

impl std::fmt::Debug for ColdReads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ColdReads").field("desk", &self.desk).finish_non_exhaustive()
    }
}

impl ColdReads {
    /// None yet, for the calling thread. `ended` is an eventfd: it counts up whenever there is something to
    /// [reap](Self::reap), and perhaps when there is not.
    ///
    /// # Errors
    /// Those of the host.
    pub fn new(tools: Arc<Tools>, disk: Arc<SlowLane>, ended: BorrowedFd<'_>) -> io::Result<Self> {
        let ring = build(DEPTH)?;
        ring.submitter().register_eventfd(ended.as_raw_fd())?;
        let slots: Box<[_]> = (0..DEPTH).map(|_| Mutex::new(None)).collect();
        let free = (0..slots.len()).rev().collect();
        let (under_way, pace) = (AtomicUsize::new(0), AtomicU8::new(RESTS));
        let desk = Arc::new(Desk { slots, under_way, pace, tools, disk });
        Ok(Self { ring: RefCell::new(ring), desk, free: RefCell::new(free), gathered: Cell::new(0) })
    }

    /// What others need to look after it.
    pub fn desk(&self) -> Arc<Desk> {
        Arc::clone(&self.desk)
    }

    /// Whether anything is under way.
    pub fn is_busy(&self) -> bool {
        self.desk.is_busy()
    }

    /// Tells the watch that this thread goes on, or that it `rests`: that it is about to wait for something to do.
    pub fn note(&self, rests: bool) {
        self.desk.pace.store(if rests { RESTS } else { 0 }, Ordering::Relaxed);
    }

    /// Takes on a read of at most [`COLD_BYTES_MAX`] bytes where it is `placed`; see [`Self::submit`].
    ///
    /// # Errors
    /// The reply comes back if somebody else must do it.
    pub fn take_on(&self, read: Read, placed: Placed, reply: Reply) -> std::result::Result<(), Reply> {
        let Some((slot, mut bytes)) = self.room(read.len) else {
            self.desk.tools.fs.let_go(placed);
            return Err(reply);
        };
        let room = bytes.bytes(usize::try_from(read.len).expect("16 KiB"));
        let operation = opcode::Read::new(types::Fd(placed.file().as_raw_fd()), room.as_mut_ptr(), read.len)
            .offset(placed.at())
            .build()
            .user_data(slot as u64);
        *self.desk.slots[slot].lock() = Some(ColdRead { read, placed, bytes, reply: Some(reply) });
        self.desk.under_way.fetch_add(1, Ordering::Relaxed);
        self.note(false);
        // SAFETY: file and memory belong to the read in its slot, from where `end` takes it once the kernel is done with it;
        // if this ring is dropped before that, the slots stay for ever.
        let pushed = unsafe { self.ring.borrow_mut().submission().push(&operation) };
        pushed.expect("there is room for each slot, and each waits there once at most");
        self.gathered.set(self.gathered.get() + 1);
        if self.gathered.get() >= GATHERED_MAX {
            self.submit();
        }
        Ok(())
    }

    /// A slot and memory for a read of `len` bytes, if there are both for one so long.
    fn room(&self, len: u32) -> Option<(usize, SmallBuffer)> {
        let mut free = self.free.borrow_mut();
        if len > COLD_BYTES_MAX || free.is_empty() {
            return None;
        }
        let bytes = self.desk.tools.small.take()?;
        Some((free.pop()?, bytes))
    }

    /// Asks the kernel for what was taken on.
    pub fn submit(&self) {
        if self.gathered.get() == 0 {
            return;
        }
        let result = self.ring.borrow().submit();
        let left = self.ring.borrow_mut().submission().len();
        self.gathered.set(left);
        if left > 0 {
            // It has no memory for more just now, say. It will be asked again, and nobody waits for that.
            if let Err(error) = result {
                log::warn!("ask for reads by io_uring: {error}");
            }
            self.desk.take_over();
        }
    }

    /// Answers what has ended, and says whether there may be more. If nothing has and it `waits`, waits for a moment.
    pub fn reap(&self, waits: bool) -> bool {
        self.note(false);
        if !self.is_busy() {
            return false;
        }
        if waits && self.ring.borrow_mut().completion().is_empty() {
            let timeout = types::Timespec::new().nsec(WAIT_NANOS);
            let arguments = types::SubmitArgs::new().timespec(&timeout);
            // A signal, or the end of the moment.
            let _ = self.ring.borrow().submitter().submit_with_args(1, &arguments);
        } else if self.has_ends() {
            let _ = self.ring.borrow().submit();
        }
        loop {
            // Not borrowed while it is answered.
            let told = self.ring.borrow_mut().completion().next();
            let Some(told) = told else { break };
            let Ok(slot) = usize::try_from(told.user_data()) else { continue };
            // The hook has told of the panic, and EIO was answered as it unwound.
            let _ = catch_unwind(AssertUnwindSafe(|| self.desk.end(slot, told.result())));
            self.free.borrow_mut().push(slot);
            self.desk.under_way.fetch_sub(1, Ordering::Relaxed);
        }
        self.has_ends()
    }

    /// Whether the kernel has pages to copy when it is asked to.
    fn has_ends(&self) -> bool {
        self.ring.borrow_mut().submission().taskrun()
    }
}

impl Drop for ColdReads {
    fn drop(&mut self) {
        if self.is_busy() {
            // Whoever drops it has waited, so it is not reached. The kernel may still read into the memory: it must stay.
            std::mem::forget(Arc::clone(&self.desk));
        }
    }
}

impl Desk {
    /// Whether anything is under way.
    pub fn is_busy(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) > 0
    }

    /// To be called by a thread of its own every now and then: if the ring's thread is held up, others answer what it has under
    /// way.
    pub fn look(&self) {
        if !self.is_busy() {
            return;
        }
        let count = |pace| (pace < LOOKS_MAX).then(|| pace + 1);
        if self.pace.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count) == Err(LOOKS_MAX) {
            self.take_over();
        }
    }

    /// Has threads of the disk lane answer all that is not answered yet.
    fn take_over(&self) {
        for slot in &self.slots {
            let owed = slot.lock().as_mut().and_then(|cold| Some((cold.read, cold.reply.take()?)));
            if let Some((read, reply)) = owed {
                self.hand_on(read, reply);
            }
        }
    }

    /// Has a thread that waits do a read, from the beginning.
    fn hand_on(&self, read: Read, reply: Reply) {
        let fs = Arc::clone(&self.tools.fs);
        self.disk.run(read.ino, move || with_buffer(read.len, |buffer| read.execute(reply, &fs, buffer)));
    }

    /// The kernel is done with a read: how many bytes were read, or a negative errno.
    fn end(&self, slot: usize, outcome: i32) {
        let Some(cold) = self.slots.get(slot).and_then(|slot| slot.lock().take()) else { return };
        let ColdRead { read, placed, mut bytes, reply } = cold;
        match reply {
            Some(reply) if u32::try_from(outcome) == Ok(read.len) => {
                self.tools.fs.landed(placed);
                reply.answer(&[bytes.bytes(usize::try_from(read.len).expect("16 KiB"))]);
            }
            // Short, or failed: whoever reads it anew says what is wrong.
            reply => {
                self.tools.fs.let_go(placed);
                if let Some(reply) = reply {
                    self.hand_on(read, reply);
                }
            }
        }
        self.tools.small.put(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs::File;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};
    use zerocopy::FromBytes;

    use super::super::buffers::SpareBuffers;
    use super::super::channel::Channel;
    use super::super::wire::OutHeader;
    use super::*;
    use crate::fs::{Fs, HandleId, OpenMode, RequestId};
    use crate::store::{ImportRequest, InstanceSpec, NoProgress, SourceFormat, Store};

    const IMAGE_BYTES: usize = 1 << 20;

    fn image() -> Vec<u8> {
        (0..IMAGE_BYTES).map(|at| u8::try_from(at / 7 % 251).unwrap() + 1).collect()
    }

    /// An open disk over an image, somebody who asks for it, and the ring of this thread.
    struct Place {
        reads: ColdReads,
        ended: Arc<OwnedFd>,
        disk: HandleId,
        base: PathBuf,
        asks: OwnedFd,
        channel: Arc<Channel>,
        _store: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            let folder = tempfile::tempdir_in("/var/tmp").unwrap();
            let source = folder.path().join("image.raw");
            File::create(&source).unwrap().write_all_at(&image(), 0).unwrap();
            let path = folder.path().join("store");
            let store = Store::init(&path).unwrap().with_run_dir(folder.path());
            let name = "web".parse().unwrap();
            let request =
                ImportRequest { source, format: Some(SourceFormat::Raw), ..ImportRequest::default() };
            store.import_image(&name, &request, &NoProgress).unwrap();
            store.create_instance(&name, &InstanceSpec::of(name.clone()), &NoProgress).unwrap();
            let base = path.join(format!("bases/{}/base.raw", store.image(&name).unwrap().base));
            let fs = Arc::new(Fs::new(store).unwrap());
            let find = |parent, name| fs.lookup(parent, OsStr::new(name)).unwrap().ino;
            let ino = find(find(find(1, "instances"), "web"), "disk");
            let mode = OpenMode { write: false, truncate: false };
            let disk = fs.open(ino, mode, RequestId::default()).unwrap().handle;
            let ended = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
            let tools = Arc::new(Tools::new(fs, Arc::new(SpareBuffers::new(1))));
            let reads = ColdReads::new(tools, Arc::new(SlowLane::start(2).unwrap()), ended.as_fd());
            let reads = reads.expect("this needs Linux 6.1 and kernel.io_uring_disabled=0");
            let (answers, asks) =
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
            let channel = Arc::new(Channel::new(answers));
            Self { reads, ended, disk, base, asks, channel, _store: folder }
        }

        fn forget_base(&self) {
            let file = File::open(&self.base).unwrap();
            file.sync_all().unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }

        /// Asks for a read; says whether it was taken on.
        fn read(&self, unique: u64, offset: u64, len: u32) -> bool {
            let read = Read { ino: 7, handle: self.disk, offset, len, direct: false };
            let placed = read.place_in_base(&self.reads.desk.tools.fs).expect("all of it is the base's");
            let reply = Reply::new(Arc::clone(&self.channel), unique);
            self.reads.take_on(read, placed, reply).map_err(|reply| reply.answer(&[])).is_ok()
        }

        /// The next answer: its number, its error, and its bytes.
        fn answer(&self) -> (u64, i32, Vec<u8>) {
            let mut answer = vec![0; 20_000];
            let (len, _) = recv(&self.asks, &mut answer[..], RecvFlags::empty()).unwrap();
            let (head, bytes) = OutHeader::read_from_prefix(&answer[..len]).unwrap();
            (head.unique, head.error, bytes.to_vec())
        }

        fn has_answer(&self, patience: Option<&Timespec>) -> bool {
            poll(&mut [PollFd::new(&self.asks, PollFlags::IN)], patience).unwrap() > 0
        }

        fn drain(&self) {
            self.reads.submit();
            while self.reads.is_busy() {
                self.reads.reap(true);
            }
        }
    }

    #[test]
    fn each_read_is_answered_once_with_its_own_bytes() {
        let place = Place::new();
        place.forget_base();
        let image = image();
        let at = |unique: u64| usize::try_from(unique * 37 % 250).unwrap() * 4096 + 512;
        let wanted = |unique: u64| &image[at(unique)..][..if unique.is_multiple_of(2) { 512 } else { 8192 }];
        // As many as the socket takes.
        for batch in 0..10u64 {
            let batch = batch * 10..batch * 10 + 10;
            for unique in batch.clone() {
                assert!(place.read(unique, at(unique) as u64, u32::try_from(wanted(unique).len()).unwrap()));
            }
            place.drain();
            let mut seen: Vec<_> = (0..10).map(|_| place.answer()).collect();
            seen.sort_unstable();
            for (unique, answer) in batch.zip(seen) {
                assert!(answer == (unique, 0, wanted(unique).to_vec()), "read {unique}");
            }
        }
        assert!(!place.has_answer(Some(&Timespec::default())));
        assert_eq!(place.reads.desk.tools.fs.asynchronous_requests(), 100);
    }

    #[test]
    fn the_end_of_a_read_is_told() {
        let place = Place::new();
        place.forget_base();
        assert!(place.read(1, 0, 4096));
        place.reads.submit();
        poll(&mut [PollFd::new(&place.ended, PollFlags::IN)], None).unwrap();
        while place.reads.is_busy() {
            place.reads.reap(false);
        }
        assert_eq!(place.answer().0, 1);
    }

    #[test]
    fn what_is_too_long_or_too_much_is_somebody_elses() {
        let place = Place::new();
        place.forget_base();
        assert!(!place.read(1, 0, COLD_BYTES_MAX + 512));
        assert_eq!(place.answer(), (1, 0, Vec::new()));
        assert!((0..u64::from(DEPTH)).all(|unique| place.read(unique, unique * 4096, 512)));
        assert!(!place.read(1000, 0, 512));
        place.drain();
        assert!((0..=DEPTH).any(|_| place.answer() == (1000, 0, Vec::new())));
    }

    /// The memory of each such read was lost, up to three quarters of all that there is.
    #[test]
    fn what_there_is_no_place_for_keeps_no_memory() {
        let place = Place::new();
        let small = &place.reads.desk.tools.small;
        let count = || {
            let all: Vec<_> = std::iter::from_fn(|| small.take()).collect();
            all.into_iter().map(|buffer| small.put(buffer)).count()
        };
        let before = count();
        assert!((0..u64::from(DEPTH)).all(|unique| place.read(unique, 0, 512)));
        assert!(!place.read(1000, 0, 512));
        place.drain();
        assert_eq!(count(), before);
    }

    #[test]
    fn a_read_that_fails_is_read_anew_and_refused() {
        let place = Place::new();
        let mut permissions = std::fs::metadata(&place.base).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
        std::fs::set_permissions(&place.base, permissions).unwrap();
        File::options().write(true).open(&place.base).unwrap().set_len(6000).unwrap();
        for (unique, at) in [(1, 8192), (2, 4096), (3, 0)] {
            assert!(place.read(unique, at, 4096));
        }
        place.drain();
        let mut seen: Vec<_> =
            (0..3).map(|_| place.answer()).map(|(number, error, _)| (number, error)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [(1, -libc::EIO), (2, -libc::EIO), (3, 0)]);
    }

    /// Nobody but the ring's thread can have the kernel copy what has been read.
    #[test]
    fn others_answer_for_a_thread_that_is_held_up_but_not_for_one_that_rests() {
        let place = Place::new();
        place.forget_base();
        let look = || (0..2 * LOOKS_MAX).for_each(|_| place.reads.desk.look());
        assert!(place.read(1, 4096, 4096));
        place.reads.submit();
        place.reads.note(true);
        look();
        place.reads.note(false);
        (0..LOOKS_MAX).for_each(|_| place.reads.desk.look());
        assert!(!place.has_answer(Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 })));
        place.reads.desk.look();
        assert!(place.answer() == (1, 0, image()[4096..8192].to_vec()));
        look();
        place.drain();
        assert!(!place.has_answer(Some(&Timespec::default())), "it is not answered again");
        assert!(place.read(2, 0, 4096));
        place.drain();
        assert_eq!(place.answer().0, 2);
    }
}
