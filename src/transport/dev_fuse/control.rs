//! Device controls of `/dev/fuse`.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io;
use rustix::ioctl::{Setter, ioctl, opcode};

/// Makes `clone`, a fresh descriptor of `/dev/fuse`, one of the connection of `connected`.
///
/// # Errors
/// Those of the kernel.
pub fn clone_connection(connected: BorrowedFd<'_>, clone: BorrowedFd<'_>) -> io::Result<()> {
    const CLONE: rustix::ioctl::Opcode = opcode::read::<u32>(229, 0);
    let number = connected.as_raw_fd().cast_unsigned();
    // SAFETY: FUSE_DEV_IOC_CLONE reads one 32-bit number from its argument, which `Setter` points at for the call.
    unsafe { ioctl(clone, Setter::<CLONE, u32>::new(number)) }
}
