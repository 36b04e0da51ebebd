//! The kernel's bytes ↔ operations of [`crate::fs`].
//!
//! A transport reads requests from a `/dev/fuse` descriptor, calls the filesystem from several threads and sends its
//! answers back. It is the place where a failed request is logged, once, with operation, inode, offset and length. All
//! transports call the same operations; which one runs changes speed, never behaviour.

mod about;
pub mod fuser;
pub mod mount;
mod slow_lane;
