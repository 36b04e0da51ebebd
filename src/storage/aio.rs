//! Direct reads and writes that no thread waits for: Linux AIO, io_setup(2).
//!
//! Of the kernel's two ways this is the one that fits a reader of requests. What io_uring has to do when a request ends, it
//! does in the thread that submitted it, which it wakes for that; here the interrupt leaves the result, and whoever waits
//! for results takes many at once. And a process that dies ends only after its AIO has ([`hold`] is for the one exception).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use parking_lot::Mutex;
use rustix::event::EventfdFlags;

use super::cached::is_on_local_disk;

/// A request, with memory of its own.
///
/// # Safety
/// The memory stays where it is while the request is moved, and is not freed before the request is dropped.
pub unsafe trait Request: Send {
    /// The file, opened with O_DIRECT.
    fn file(&self) -> BorrowedFd<'_>;

    /// The byte of the file at which it begins.
    fn offset(&self) -> u64;

    /// Which way.
    fn transfer(&self) -> Transfer;

    /// The bytes to write, or to read into.
    fn memory(&mut self) -> &mut [u8];
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// The kernel's `struct iocb`.
#[derive(Default)]
#[repr(C)]
struct Control {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    memory: u64,
    len: u64,
    offset: u64,
    reserved: u64,
    flags: u32,
    event_file: u32,
}

/// The kernel's `struct io_event`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Event {
    data: u64,
    control: u64,
    result: i64,
    result2: i64,
}

const OPCODE_READ: u16 = 0;
const OPCODE_WRITE: u16 = 1;
/// `RWF_NOWAIT`.
const NOWAIT: u32 = 8;
/// `IOCB_FLAG_RESFD`: the end of the request is counted in an eventfd, too.
const TELLS: u32 = 1;

/// The byte that [`hold`] locks: one that nobody else does, whatever he reads. (QEMU locks some from 100 on.)
const LOCKED_BYTE: libc::off_t = libc::off_t::MAX - 1;

/// Most requests put to the kernel at once, and results taken at once.
pub const BATCH: usize = 32;

/// How long [`Aio::reap`] waits.
const WAIT_NANOS: libc::c_long = 1_000_000;

/// Requests under way. All methods may be called by several threads.
#[derive(Debug)]
pub struct Aio<T> {
    context: libc::c_ulong,
    /// What is under way, by its number. Each guards one request: it is put there before the kernel is asked and taken away
    /// after the kernel is done.
    slots: Box<[Mutex<Option<T>>]>,
    /// Guards which slots are free; held for an instant.
    free: Mutex<Vec<usize>>,
    /// Counts the requests that have ended.
    ended: OwnedFd,
}

impl<T: Request> Aio<T> {
    /// A queue of at most `depth` requests.
    ///
    /// # Errors
    /// `ENOSYS` where the kernel has no AIO; `EAGAIN` where `fs.aio-max-nr` allows no more; `EPERM` where it is filtered.
    pub fn new(depth: usize) -> io::Result<Self> {
        let ended = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let entries = libc::c_ulong::try_from(depth).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup writes one context number to where its second argument points, for the call.
        check(unsafe { libc::syscall(libc::SYS_io_setup, entries, &raw mut context) })?;
        let slots = (0..depth).map(|_| Mutex::new(None)).collect();
        Ok(Self { context, slots, free: Mutex::new((0..depth).rev().collect()), ended })
    }

    /// Becomes readable whenever a request ends; to be watched for edges, as nobody reads it.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Has the kernel move all memory of each of `requests`, [`BATCH`] at most, to or from its file. What would have to wait
    /// before it begins (for a lock of the file, or for new space, say) ends with `EAGAIN` instead. What the kernel does not
    /// take, or the queue has no place for, is left in `requests`.
    pub fn submit(&self, requests: &mut Vec<T>) {
        let mut slots = [0; BATCH];
        let count = {
            let mut free = self.free.lock();
            let count = requests.len().min(free.len()).min(BATCH);
            let left = free.len() - count;
            slots[..count].copy_from_slice(&free[left..]);
            free.truncate(left);
            count
        };
        if count == 0 {
            return;
        }
        let mut controls: [Control; BATCH] = Default::default();
        for ((mut request, &slot), control) in requests.drain(..count).zip(&slots).zip(&mut controls) {
            *control = self.control(&mut request, slot);
            *self.slots[slot].lock() = Some(request);
        }
        let taken = self.enqueue(&mut controls[..count]).unwrap_or(0);
        for &slot in &slots[taken.min(count)..count] {
            requests.extend(self.slots[slot].lock().take());
            self.free.lock().push(slot);
        }
    }

    fn control(&self, request: &mut T, slot: usize) -> Control {
        let (file, offset) = (request.file().as_raw_fd().cast_unsigned(), request.offset());
        let opcode = if request.transfer() == Transfer::Read { OPCODE_READ } else { OPCODE_WRITE };
        let memory = request.memory();
        Control {
            data: slot as u64,
            rw_flags: NOWAIT,
            opcode,
            file,
            memory: memory.as_mut_ptr() as u64,
            len: memory.len() as u64,
            offset,
            flags: TELLS,
            event_file: self.ended.as_raw_fd().cast_unsigned(),
            ..Control::default()
        }
    }

    /// Puts requests to the kernel; says how many of them, from the first on, it has taken.
    fn enqueue(&self, controls: &mut [Control]) -> io::Result<usize> {
        let mut pointers = [std::ptr::null_mut(); BATCH];
        for (pointer, control) in pointers.iter_mut().zip(&mut *controls) {
            *pointer = std::ptr::from_mut(control);
        }
        let count = controls.len().min(BATCH);
        // SAFETY: io_submit reads `count` pointers, each to a `struct iocb`, and these, during the call. The memory that they
        // name belongs to requests in slots, where it stays (see `Request`) until the kernel is done with it: `reap` takes
        // it away only then, and dropping the queue waits for that first.
        let taken =
            check(unsafe { libc::syscall(libc::SYS_io_submit, self.context, count, pointers.as_mut_ptr()) })?;
        Ok(usize::try_from(taken).unwrap_or(0))
    }

    /// How many requests are under way; one of them is until [`Aio::reap`] has said so and been answered.
    pub fn under_way(&self) -> usize {
        self.slots.len() - self.free.lock().len()
    }

    /// Calls `done` with each request that the kernel is done with, [`BATCH`] at most: how many bytes were moved, or the
    /// error. If there is none and it `waits`, it waits for one, 1 ms at most: somebody else may have taken the last. Says
    /// whether there may be more.
    ///
    /// # Errors
    /// Those of the kernel that leave nothing to go on with: what is under way is never told.
    pub fn reap(&self, waits: bool, mut done: impl FnMut(T, io::Result<usize>)) -> io::Result<bool> {
        let mut events = [Event::default(); BATCH];
        let count = match self.events(waits, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in &events[..count] {
            let slot = usize::try_from(event.data).unwrap_or(usize::MAX);
            let Some(guard) = self.slots.get(slot) else { continue };
            let request = guard.lock().take();
            if let Some(request) = request {
                done(request, result(event.result));
            }
            self.free.lock().push(slot);
        }
        Ok(count == BATCH)
    }

    fn events(&self, waits: bool, events: &mut [Event; BATCH]) -> io::Result<usize> {
        let (least, tv_nsec) = if waits { (1, WAIT_NANOS) } else { (0, 0) };
        let mut timeout = libc::timespec { tv_sec: 0, tv_nsec };
        // SAFETY: io_getevents writes at most BATCH events to where `events` points, and reads the timeout, for the call.
        let count = check(unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                least,
                BATCH,
                events.as_mut_ptr(),
                &raw mut timeout,
            )
        })?;
        Ok(usize::try_from(count).unwrap_or(0).min(BATCH))
    }
}

impl<T> Drop for Aio<T> {
    fn drop(&mut self) {
        // SAFETY: the number is that of io_setup. The call returns when the kernel uses no memory of requests any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn result(result: i64) -> io::Result<usize> {
    match usize::try_from(result) {
        Ok(count) => Ok(count),
        Err(_) => Err(io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO))),
    }
}

/// Keeps a mark on an open file for as long as it is open, anywhere: by a descriptor, or by a request under way. It is
/// what [`wait_until_landed`] waits for. (A dying process waits for its AIO with its memory. Whoever looks at that memory
/// in that very moment, through `/proc`, waits in its place, and others may see the process gone before.)
///
/// # Errors
/// Those of the host, where its file system has no such locks.
pub fn hold(file: impl AsFd) -> io::Result<()> {
    lock(file.as_fd(), libc::F_OFD_SETLK, libc::F_RDLCK)
}

/// Waits until no description of the file is [held](hold) by anybody else, open or with a request under way. `file` is open
/// for writing. Where files are not held, on file systems of a network, it returns at once.
///
/// # Errors
/// Those of the host; `EINTR` if a signal came.
pub fn wait_until_landed(file: &File) -> io::Result<()> {
    if !is_on_local_disk(file) {
        return Ok(());
    }
    lock(file.as_fd(), libc::F_OFD_SETLKW, libc::F_WRLCK)?;
    lock(file.as_fd(), libc::F_OFD_SETLK, libc::F_UNLCK)
}

fn lock(file: BorrowedFd<'_>, command: libc::c_int, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeroes are a `struct flock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_start, lock.l_len) = (LOCKED_BYTE, 1);
    lock.l_type = libc::c_short::try_from(kind).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: these commands read a `struct flock` from where the argument points, for the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) }.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use memmap2::MmapMut;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::fs::{Mode, OFlags};

    use super::*;

    struct Page {
        memory: MmapMut,
        byte: u8,
        file: Arc<OwnedFd>,
        offset: u64,
        transfer: Transfer,
    }

    // SAFETY: a mapping stays where it is.
    unsafe impl Request for Page {
        fn file(&self) -> BorrowedFd<'_> {
            self.file.as_fd()
        }

        fn offset(&self) -> u64 {
            self.offset
        }

        fn transfer(&self) -> Transfer {
            self.transfer
        }

        fn memory(&mut self) -> &mut [u8] {
            &mut self.memory
        }
    }

    fn page(file: &Arc<OwnedFd>, transfer: Transfer, offset: u64, byte: u8) -> Page {
        let mut memory = MmapMut::map_anon(4096).unwrap();
        memory.fill(byte);
        Page { memory, byte, file: Arc::clone(file), offset, transfer }
    }

    /// A file on a disk of 16 pages that hold 9, and the same opened directly.
    fn file() -> (File, Arc<OwnedFd>) {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().write_all_at(&[9; 16 * 4096], 0).unwrap();
        file.as_file().sync_all().unwrap();
        let direct = rustix::fs::open(file.path(), OFlags::RDWR | OFlags::DIRECT, Mode::empty()).unwrap();
        (file.into_file(), Arc::new(direct))
    }

    /// Waits for all that is under way.
    fn all_of(aio: &Aio<Page>) -> Vec<(Page, io::Result<usize>)> {
        let mut all = Vec::new();
        while aio.under_way() > 0 {
            aio.reap(true, |request, result| all.push((request, result))).unwrap();
        }
        all
    }

    #[test]
    fn what_is_submitted_is_done_once_and_said_with_its_own_request() {
        let (file, direct) = file();
        let aio = Aio::new(8).unwrap();
        let mut requests: Vec<_> =
            (0..8u8).map(|byte| page(&direct, Transfer::Write, u64::from(byte) * 4096, byte)).collect();
        aio.submit(&mut requests);
        assert!(requests.is_empty());
        for (request, result) in all_of(&aio) {
            match result {
                Ok(count) => assert_eq!(count, 4096),
                // It would have had to wait.
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    file.write_all_at(&request.memory, request.offset).unwrap();
                }
            }
        }
        aio.submit(&mut vec![page(&direct, Transfer::Read, 15 * 4096, 0)]);
        let (request, result) = all_of(&aio).pop().unwrap();
        if result.is_ok() {
            assert!(request.memory.iter().all(|byte| *byte == 9));
        }
        // Not aligned.
        aio.submit(&mut vec![page(&direct, Transfer::Read, 1, 0)]);
        let error = all_of(&aio).pop().unwrap().1.unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EAGAIN)), "{error}");
        for byte in 0..8u8 {
            let mut seen = [0xff; 4096];
            file.read_exact_at(&mut seen, u64::from(byte) * 4096).unwrap();
            assert!(seen.iter().all(|seen| *seen == byte), "page {byte}");
        }
    }

    #[test]
    fn a_full_queue_gives_requests_back() {
        let (_file, direct) = file();
        let aio = Aio::new(1).unwrap();
        let mut requests: Vec<_> = (1..=3).map(|byte| page(&direct, Transfer::Read, 0, byte)).collect();
        aio.submit(&mut requests);
        let left: Vec<_> = requests.iter().map(|request| request.byte).collect();
        assert_eq!((left, aio.under_way()), (vec![2, 3], 1));
        assert_eq!(all_of(&aio)[0].0.byte, 1);
    }

    #[test]
    fn the_end_of_a_request_is_told() {
        let (_file, direct) = file();
        let aio = Aio::new(1).unwrap();
        let is_told = |timeout: Option<Timespec>| {
            let mut fds = [PollFd::new(&aio.ended, PollFlags::IN)];
            poll(&mut fds, timeout.as_ref()).unwrap() > 0
        };
        assert!(!is_told(Some(Timespec::default())));
        aio.submit(&mut vec![page(&direct, Transfer::Read, 0, 1)]);
        assert!(is_told(None));
        // Nothing is waited for any more.
        let mut count = 0;
        assert!(!aio.reap(false, |_, _| count += 1).unwrap());
        assert_eq!(count, 1);
    }

    /// Of those that had ended at once only the first were told of, and the rest waited for another to end.
    #[test]
    fn more_ends_than_are_taken_at_once_are_all_told_of() {
        let (_file, direct) = file();
        let aio = Aio::new(BATCH + 1).unwrap();
        let mut requests: Vec<_> = (0..=BATCH).map(|_| page(&direct, Transfer::Read, 0, 1)).collect();
        aio.submit(&mut requests);
        assert_eq!(requests.len(), 1, "no more are put to the kernel at once");
        aio.submit(&mut requests);
        let ended = || {
            let mut count = [0; 8];
            // Less than 256: all in one byte, whichever that is.
            rustix::io::read(&aio.ended, &mut count)
                .map_or(0, |_| count.into_iter().map(u64::from).sum::<u64>())
        };
        let mut told = 0;
        while told <= BATCH as u64 {
            told += ended();
        }
        let mut count = 0;
        assert!(aio.reap(false, |_, _| count += 1).unwrap(), "one is left");
        assert_eq!(count, BATCH);
        assert!(!aio.reap(false, |_, _| count += 1).unwrap());
        assert_eq!(count, BATCH + 1);
    }

    #[test]
    fn whoever_waits_for_a_held_file_waits_until_it_is_nowhere_open() {
        let (file, direct) = file();
        hold(&direct).unwrap();
        let other = direct.try_clone().unwrap();
        let (waited, word) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                wait_until_landed(&file).unwrap();
                waited.send(()).unwrap();
            });
            drop(direct);
            assert!(word.recv_timeout(std::time::Duration::from_millis(50)).is_err(), "still open elsewhere");
            drop(other);
            word.recv().unwrap();
        });
        wait_until_landed(&file).unwrap();
    }
}
