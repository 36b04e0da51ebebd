//! One request that came by a ring, in the entry that holds it, and its answer.
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use zerocopy::{FromBytes, IntoBytes};

use super::super::wire::{InHeader, OutHeader, RING_ARGUMENT_BYTES};
use super::memory::{Memory, PAYLOAD_BYTES};
use crate::error::{Context, Result};
use crate::fs::Errno;

/// What the thread of a ring shares with those who answer its requests.
#[derive(Debug)]
pub struct Desk {
    pub memory: Arc<Memory>,
    /// Guards which entries are answered and wait for the ring's thread to hand them to the kernel; held for an instant.
    answered: Mutex<Answered>,
    /// Wakes the ring's thread.
    pub bell: OwnedFd,
}

#[derive(Debug, Default)]
struct Answered {
    entries: Vec<usize>,
    /// The ring's thread sleeps, or will without looking again: whoever answers rings the bell.
    asleep: bool,
}

impl Desk {
    /// That of a ring that has entries in `memory`.
    ///
    /// # Errors
    /// Those of the host.
    pub fn new(memory: Arc<Memory>) -> Result<Self> {
        let bell =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(|| "make an eventfd")?;
        let answered = Mutex::new(Answered { entries: Vec::with_capacity(memory.entries()), asleep: false });
        Ok(Self { memory, answered, bell })
    }

    /// Takes what is answered into `entries`, which is empty. From now on whoever answers rings the bell.
    pub fn take_and_sleep(&self, entries: &mut Vec<usize>) {
        let mut answered = self.answered.lock();
        std::mem::swap(&mut answered.entries, entries);
        answered.asleep = true;
    }

    /// From now on nobody need ring the bell.
    pub fn wake(&self) {
        self.answered.lock().asleep = false;
    }

    fn put(&self, entry: usize) {
        let mut answered = self.answered.lock();
        answered.entries.push(entry);
        let sleeps = std::mem::take(&mut answered.asleep);
        drop(answered);
        if sleeps {
            self.ring_bell();
        }
    }

    /// Wakes the ring's thread, or has it not sleep the next time.
    pub fn ring_bell(&self) {
        // Should it be full, it rings.
        if let Err(errno) = rustix::io::write(&self.bell, 1u64.as_bytes()) {
            log::error!("wake the thread of a ring: {errno}");
        }
    }
}

/// An entry that holds a request. Dropped unanswered, by a panic say, it answers EIO.
#[derive(Debug)]
pub struct Entry {
    desk: Arc<Desk>,
    number: usize,
    header: InHeader,
    /// Bytes of the request's first argument and of the payload.
    lengths: (usize, usize),
    answered: bool,
}

/// The kernel's lengths of a request do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inconsistent;

impl Entry {
    /// The request that the kernel has put into entry `number`. If its lengths are not those of a request it is answered
    /// with EINVAL.
    ///
    /// # Safety
    /// The kernel has handed this entry over and not got it back, and there is no other `Entry` of it.
    pub unsafe fn fetched(desk: Arc<Desk>, number: usize) -> std::result::Result<Self, Inconsistent> {
        // SAFETY: the entry is ours, so nobody writes to its head.
        let head = unsafe { desk.memory.head(number).as_ref() };
        let (header, _) = InHeader::read_from_prefix(&head.in_out).expect("128 bytes hold it");
        let payload = usize::try_from(head.ent.payload_sz).unwrap_or(usize::MAX);
        let argument = lengths(&header, payload);
        let entry = Self { desk, number, header, lengths: (argument.unwrap_or(0), payload), answered: false };
        match argument {
            Some(_) => Ok(entry),
            None => {
                entry.refuse(Errno::INVALID);
                Err(Inconsistent)
            }
        }
    }

    /// Who asks, about what.
    pub fn header(&self) -> &InHeader {
        &self.header
    }

    /// The request's first argument, which has a length of its own for each operation.
    pub fn argument(&self) -> &[u8] {
        // SAFETY: the entry is ours, so nobody writes to its head but `commit`, which takes `self`.
        let head = unsafe { self.desk.memory.head(self.number).as_ref() };
        &head.op_in[..self.lengths.0]
    }

    /// What follows the first argument.
    pub fn payload(&self) -> &[u8] {
        // SAFETY: the entry is ours, its payload is that long, and who changes it has `&mut self`.
        unsafe { std::slice::from_raw_parts(self.desk.memory.payload(self.number).as_ptr(), self.lengths.1) }
    }

    /// Room for an answer, as long as the longest: what [`Entry::answer_room`] sends.
    pub fn room(&mut self) -> &mut [u8] {
        // SAFETY: the entry is ours, its payload is that long, and `self` is borrowed exclusively.
        unsafe {
            std::slice::from_raw_parts_mut(self.desk.memory.payload(self.number).as_ptr(), PAYLOAD_BYTES)
        }
    }

    /// All of the request as `/dev/fuse` would have given it.
    pub fn to_bytes(&self) -> Vec<u8> {
        [self.header.as_bytes(), self.argument(), self.payload()].concat()
    }

    /// Answers with `parts`, one after the other, [`PAYLOAD_BYTES`] at most.
    pub fn answer(mut self, parts: &[&[u8]]) {
        let mut len = 0;
        for part in parts {
            self.room()[len..len + part.len()].copy_from_slice(part);
            len += part.len();
        }
        self.answer_room(len);
    }

    /// Answers with the first `len` bytes of [`Entry::room`].
    pub fn answer_room(mut self, len: usize) {
        self.commit(0, len);
    }

    /// Answers with an error.
    pub fn refuse(mut self, errno: Errno) {
        self.commit(-errno.raw(), 0);
    }

    fn commit(&mut self, error: i32, len: usize) {
        self.answered = true;
        let len = u32::try_from(len).expect("an answer is at most 1 MiB");
        let out = OutHeader { len: 16 + len, error, unique: self.header.unique };
        // SAFETY: the entry is ours, and nobody else looks at its head: `argument` borrows `self`.
        let head = unsafe { self.desk.memory.head(self.number).as_mut() };
        head.in_out[..size_of::<OutHeader>()].copy_from_slice(out.as_bytes());
        head.ent.payload_sz = len;
        self.desk.put(self.number);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if !self.answered {
            self.commit(-Errno::BROKEN.raw(), 0);
        }
    }
}

/// Bytes of the first argument of a request with so many bytes of payload; `None` if that cannot be.
fn lengths(header: &InHeader, payload: usize) -> Option<usize> {
    let all = usize::try_from(header.len).ok()?.checked_sub(size_of::<InHeader>())?;
    let argument = all.checked_sub(payload)?;
    (payload <= PAYLOAD_BYTES && argument <= RING_ARGUMENT_BYTES).then_some(argument)
}

#[cfg(test)]
mod tests {
    use super::super::super::wire::{RingEntInOut, RingHead, WriteIn, opcode};
    use super::*;

    /// Puts a request into an entry, as the kernel does.
    fn put(desk: &Arc<Desk>, len: u32, argument: &[u8], payload: &[u8]) {
        let header = InHeader { len, opcode: opcode::WRITE, unique: 9, nodeid: 7, ..InHeader::default() };
        let payload_sz = u32::try_from(payload.len()).unwrap();
        let ent = RingEntInOut { commit_id: 9, payload_sz, ..RingEntInOut::default() };
        let mut head = RingHead { in_out: [0; 128], op_in: [0; 128], ent };
        head.in_out[..40].copy_from_slice(header.as_bytes());
        head.op_in[..argument.len()].copy_from_slice(argument);
        // SAFETY: nothing else of this test looks at the entry now.
        unsafe {
            desk.memory.head(0).write(head);
            std::slice::from_raw_parts_mut(desk.memory.payload(0).as_ptr(), payload.len())
                .copy_from_slice(payload);
        }
    }

    fn answer_of(desk: &Desk) -> (i32, u64, Vec<u8>) {
        let mut taken = Vec::new();
        desk.take_and_sleep(&mut taken);
        desk.wake();
        assert_eq!(taken, [0]);
        // SAFETY: the entry was given back, so nobody has it.
        let head = unsafe { desk.memory.head(0).as_ref() };
        let (out, _) = OutHeader::read_from_prefix(&head.in_out).unwrap();
        assert_eq!(out.len, 16 + head.ent.payload_sz);
        let len = usize::try_from(head.ent.payload_sz).unwrap();
        // SAFETY: as above.
        let payload = unsafe { std::slice::from_raw_parts(desk.memory.payload(0).as_ptr(), len) };
        (out.error, out.unique, payload.to_vec())
    }

    #[test]
    fn a_request_reads_as_from_the_device_and_its_answer_takes_its_place() {
        let desk = Arc::new(Desk::new(Arc::new(Memory::anywhere(2))).unwrap());
        let write = WriteIn { fh: 3, size: 5, ..WriteIn::default() };
        put(&desk, 85, write.as_bytes(), b"hello");
        // SAFETY: there is no other `Entry`.
        let entry = unsafe { Entry::fetched(Arc::clone(&desk), 0) }.unwrap();
        assert_eq!((entry.argument(), entry.payload()), (write.as_bytes(), &b"hello"[..]));
        assert_eq!(entry.to_bytes().len(), 85);
        entry.answer(&[b"by", b"e"]);
        assert_eq!(answer_of(&desk), (0, 9, b"bye".to_vec()));
    }

    #[test]
    fn an_entry_that_is_dropped_answers_an_error() {
        let desk = Arc::new(Desk::new(Arc::new(Memory::anywhere(1))).unwrap());
        put(&desk, 40, b"", b"");
        // SAFETY: there is no other `Entry`.
        drop(unsafe { Entry::fetched(Arc::clone(&desk), 0) }.unwrap());
        assert_eq!(answer_of(&desk), (-libc::EIO, 9, Vec::new()));
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let desk = Arc::new(Desk::new(Arc::new(Memory::anywhere(1))).unwrap());
        for len in [0, 39, 44, 40 + 5 + 129, u32::MAX] {
            put(&desk, len, b"", b"hello");
            // SAFETY: there is no other `Entry`.
            let entry = unsafe { Entry::fetched(Arc::clone(&desk), 0) };
            assert_eq!(entry.err(), Some(Inconsistent), "{len}");
            assert_eq!(answer_of(&desk).0, -libc::EINVAL);
        }
    }

    #[test]
    fn only_a_thread_that_sleeps_is_woken() {
        let desk = Arc::new(Desk::new(Arc::new(Memory::anywhere(1))).unwrap());
        let mut bell = [0; 8];
        for sleeps in [false, true] {
            if sleeps {
                desk.take_and_sleep(&mut Vec::new());
            }
            put(&desk, 40, b"", b"");
            // SAFETY: there is no other `Entry`.
            unsafe { Entry::fetched(Arc::clone(&desk), 0) }.unwrap().answer(&[]);
            let rang = rustix::io::read(&desk.bell, &mut bell);
            assert_eq!(rang.is_ok(), sleeps);
            answer_of(&desk);
        }
    }
}
