//! A transport of our own on `/dev/fuse`.
//!
//! `wire.rs` has the kernel's structures, `request.rs` understands what it sends, `serve.rs` does it and answers,
//! `channel.rs` moves the bytes, `connection.rs` is what outlives the process that serves, `readers.rs` are the threads that
//! read requests, `crew.rs` says which of them waits for what, `session.rs` starts and stops them (`wake.rs`). An answer goes to
//! the descriptor from which its request came, by whomever.
//!
//! A reader does itself what memory answers (reads of what the host has cached, overwrites through the host's cache, names
//! and attributes) and, as long as enough others are there for that, reads, writes and syncs that wait for the host's disk.
//! Direct reads and overwrites of a disk's own data, where one is under way already, nobody waits for (`direct.rs`,
//! `transfers.rs` has what they are), nor for small reads of a base (`cold.rs`). Beyond that, reads and writes go to the threads of the disk lane, with their buffers and
//! without a copy; other requests that may wait for a sync go to those of the slow lane.
//!
//! A process that is killed has not ended before its blocking writes have, nor before its AIO has, and whoever opens a disk
//! next waits for what may be left of that ([`crate::storage::aio`]): none can land after a newer one of its successor.
//!
//! `uring/` is another way for requests to come, and for answers to go.
//!
//! A read that was put off finds the map of *then*. Of a block that was written in between it shows the new bytes or, if
//! the write has not been answered yet, either: just what a read that arrived then would show.

mod answers;
mod buffers;
mod channel;
mod cold;
mod connection;
mod control;
mod crew;
mod direct;
mod init;
mod readers;
pub mod request;
mod rounds;
mod serve;
mod session;
mod transfers;
mod uring;
mod wake;
pub mod wire;

pub use cold::require as require_cold_reads;
pub use connection::{Connection, Unanswered};
pub use init::Road;
pub use session::DevFuseSession;
pub use uring::{Nudged, RingSession, nudge, require as require_rings};
