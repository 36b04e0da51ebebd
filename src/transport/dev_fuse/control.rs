//! Device controls of `/dev/fuse`.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io;
use rustix::ioctl::{Ioctl, IoctlOutput, Setter, ioctl, opcode};

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

/// Has the kernel know `file`, a regular file, as one that it may serve in the connection of `connected`, as long as
/// the connection lives or until [`close_backing`]. It looks neither at how `file` was opened nor at whose it is. Needs
/// CAP_SYS_ADMIN. Answers with the number by which it knows it.
///
/// # Errors
/// `PERM` without that capability; `LOOP` if the file system of `file` lies upon another one.
pub fn open_backing(connected: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<i32> {
    let map = BackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: FUSE_DEV_IOC_BACKING_OPEN reads one `struct fuse_backing_map`, which lies in the request for the call.
    unsafe { ioctl(connected, OpenBacking(map)) }
}

/// Has the kernel forget a file that it knows by that number. Files that were opened upon it stay as they are.
///
/// # Errors
/// `NOENT` if it knows none.
pub fn close_backing(connected: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    const CLOSE: rustix::ioctl::Opcode = opcode::write::<u32>(229, 2);
    // SAFETY: FUSE_DEV_IOC_BACKING_CLOSE reads one 32-bit number from its argument, which `Setter` points at for the call.
    unsafe { ioctl(connected, Setter::<CLOSE, i32>::new(number)) }
}

/// The kernel's `struct fuse_backing_map`.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// FUSE_DEV_IOC_BACKING_OPEN, which answers with a number in place of zero.
struct OpenBacking(BackingMap);

// SAFETY: the opcode is that of the call, whose argument is a pointer to a `struct fuse_backing_map`, which it only reads.
unsafe impl Ioctl for OpenBacking {
    type Output = i32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> rustix::ioctl::Opcode {
        opcode::write::<BackingMap>(229, 1)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _argument: *mut c_void) -> io::Result<i32> {
        Ok(output)
    }
}

/// Makes `clone`, a fresh descriptor of `/dev/fuse`, one of the connection of `connected`.
fn clone_connection(connected: BorrowedFd<'_>, clone: BorrowedFd<'_>) -> io::Result<()> {
    const CLONE: rustix::ioctl::Opcode = opcode::read::<u32>(229, 0);
    let number = connected.as_raw_fd().cast_unsigned();
    // SAFETY: FUSE_DEV_IOC_CLONE reads one 32-bit number from its argument, which `Setter` points at for the call.
    unsafe { ioctl(clone, Setter::<CLONE, u32>::new(number)) }
}
