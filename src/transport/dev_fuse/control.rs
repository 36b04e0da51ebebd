//! Device controls of `/dev/fuse`.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io;
use rustix::ioctl::{Setter, ioctl, opcode};

use crate::error::{Context, Result};
use crate::transport::mount;

/// Another descriptor of the connection of `connected`, reading from which waits for a request or not. Requests read from it
/// have a queue of their own, so that threads with descriptors of their own do not wait for each other.
///
/// # Errors
/// Those of the kernel.
pub fn open_clone(connected: BorrowedFd<'_>, waits: bool) -> Result<OwnedFd> {
    let clone = mount::open_device()?;
    clone_connection(connected, clone.as_fd()).context(|| "clone /dev/fuse")?;
    rustix::io::ioctl_fionbio(&clone, !waits).context(|| "say whether /dev/fuse waits")?;
    Ok(clone)
}

/// Makes `clone`, a fresh descriptor of `/dev/fuse`, one of the connection of `connected`.
fn clone_connection(connected: BorrowedFd<'_>, clone: BorrowedFd<'_>) -> io::Result<()> {
    const CLONE: rustix::ioctl::Opcode = opcode::read::<u32>(229, 0);
    let number = connected.as_raw_fd().cast_unsigned();
    // SAFETY: FUSE_DEV_IOC_CLONE reads one 32-bit number from its argument, which `Setter` points at for the call.
    unsafe { ioctl(clone, Setter::<CLONE, u32>::new(number)) }
}
