//! What is done for a request that came by a ring.
//!
//! Reads are filled in where their answer goes, writes are written from where they came. Direct reads of a disk's own data are
//! done by the ring itself, and nobody waits for them. Other reads, and writes, wait for the host's disk in a thread of the disk
//! lane, which takes the entry along; all else is done as for a request that was read from the device.

use std::io;
use std::sync::Arc;

use zerocopy::FromBytes;

use super::super::channel::Reply;
use super::super::connection::request_id;
use super::super::crew::Hand;
use super::super::request::{Malformed, Operation, Request, forgets, parse};
use super::super::serve::Server;
use super::super::transfers::{Read, Write};
use super::super::wire::{ReadIn, WriteIn, opcode};
use super::entry::Entry;
use crate::fs::{Errno, Placed};
use crate::transport::about::guarded;

/// A read that a ring does: into the room of `entry`, as long as `read` is, from where it is `placed`.
#[derive(Debug)]
pub struct RingRead {
    pub entry: Entry,
    pub placed: Placed,
    read: Read,
}

impl RingRead {
    /// Where the bytes go.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.entry.room()[..bytes(&self.read)]
    }
}

impl Server {
    /// Does the request in `entry`, now or later, unless the ring is to do it: then [`Server::end_read`] follows.
    pub(super) fn serve_entry(&self, hand: &Hand<'_>, entry: Entry) -> Option<RingRead> {
        match entry.header().opcode {
            opcode::READ => match ReadIn::read_from_bytes(entry.argument()) {
                Ok(arguments) => return self.read_entry(entry, &arguments),
                Err(_) => refuse_malformed(entry),
            },
            opcode::WRITE => match WriteIn::read_from_bytes(entry.argument()) {
                Ok(arguments) if usize::try_from(arguments.size) == Ok(entry.payload().len()) => {
                    self.write_entry(entry, &arguments);
                }
                _ => refuse_malformed(entry),
            },
            _ => self.serve_rare_entry(hand, entry),
        }
        None
    }

    fn read_entry(&self, mut entry: Entry, arguments: &ReadIn) -> Option<RingRead> {
        let ino = entry.header().nodeid;
        log::debug!("READ ino {ino} offset {} size {}", arguments.offset, arguments.size);
        let read = Read::of(ino, arguments);
        match guarded(|| read.now(&self.fs, &mut entry.room()[..bytes(&read)])) {
            Ok(Some(count)) => entry.answer_room(count),
            Err(failure) => entry.refuse(read.about().failed(&failure)),
            Ok(None) => {
                if read.direct
                    && let Some(placed) = read.place(&self.fs)
                {
                    return Some(RingRead { entry, placed, read });
                }
                self.read_by_lane(entry, read);
            }
        }
        None
    }

    /// A thread that waits fills the entry.
    fn read_by_lane(&self, mut entry: Entry, read: Read) {
        let fs = Arc::clone(&self.fs);
        self.disk.run(read.ino, move || {
            match guarded(|| read.fill(&fs, &mut entry.room()[..bytes(&read)])) {
                Ok(count) => entry.answer_room(count),
                Err(failure) => entry.refuse(read.about().failed(&failure)),
            }
        });
    }

    /// Answers a read of which the ring has read so many bytes, or has it done if those are not all.
    pub(super) fn end_read(&self, done: RingRead, count: io::Result<usize>) {
        let RingRead { entry, placed, read } = done;
        if count.ok() == Some(bytes(&read)) {
            self.fs.landed(placed);
            return entry.answer_room(bytes(&read));
        }
        // It is not aligned enough for the host, say.
        self.fs.let_go(placed);
        self.read_by_lane(entry, read);
    }

    fn write_entry(&self, entry: Entry, arguments: &WriteIn) {
        let ino = entry.header().nodeid;
        log::debug!("WRITE ino {ino} offset {} size {}", arguments.offset, arguments.size);
        let write = Write::of(ino, arguments);
        if write.is_to_memory(&self.fs) {
            let outcome = guarded(|| write.execute(&self.fs, entry.payload()));
            return write.finish(Reply::in_entry(entry), outcome, &self.fs, &self.slow);
        }
        let (fs, slow) = (Arc::clone(&self.fs), Arc::clone(&self.slow));
        self.disk.run(ino, move || {
            let outcome = guarded(|| write.execute(&fs, entry.payload()));
            write.finish(Reply::in_entry(entry), outcome, &fs, &slow);
        });
    }

    fn serve_rare_entry(&self, hand: &Hand<'_>, entry: Entry) {
        let bytes = entry.to_bytes();
        match parse(&bytes) {
            Ok(Request { header, operation }) => {
                let (ino, reply) = (header.nodeid, Reply::in_entry(entry));
                match operation {
                    // The kernel sends these two by the device, where nothing waits for an answer. Here an entry does.
                    Operation::Forget(lookups) => {
                        self.fs.forget(ino, lookups);
                        reply.answer(&[]);
                    }
                    Operation::BatchForget(all) => {
                        forgets(all).for_each(|one| self.fs.forget(one.nodeid, one.nlookup));
                        reply.answer(&[]);
                    }
                    other => self.serve_rare(hand, reply, request_id(header.unique), ino, other),
                }
            }
            Err(Malformed::Headless | Malformed::Body { .. }) => refuse_malformed(entry),
        }
    }
}

fn bytes(read: &Read) -> usize {
    usize::try_from(read.len).expect("1 MiB")
}

fn refuse_malformed(entry: Entry) {
    log::error!("the kernel sent operation {} cut short", entry.header().opcode);
    entry.refuse(Errno::INVALID);
}
