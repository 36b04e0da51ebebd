//! Waking a thread that waits in the kernel for a request.
#![allow(unsafe_code)]

use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

use crate::error::{Context, Result};

/// What wakes. The kernel sends it for urgent bytes of a socket, of which we have none, and ignores it where it is not
/// handled.
const SIGNAL: libc::c_int = libc::SIGURG;

extern "C" fn do_nothing(_signal: libc::c_int) {}

/// Has [`wake`] interrupt system calls of this process, for good.
///
/// # Errors
/// If the host refuses the handler.
pub fn prepare() -> Result<()> {
    // SAFETY: a `sigaction` of zeroes is one without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = do_nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: `action` is valid for the call, which copies it; the handler touches nothing, so it may run at any time in
    // any thread. Without SA_RESTART a call that waits returns EINTR.
    match unsafe { libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context(|| "handle a signal"),
    }
}

/// Interrupts the system call that `thread` waits in, if it does: one that it is only about to make is not, so whoever
/// wants to be sure calls this again.
pub fn wake<T>(thread: &JoinHandle<T>) {
    // SAFETY: the thread was neither joined nor detached, for `thread` is still there, so its id is valid even if it has ended.
    let _ = unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGNAL) };
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_thread_that_waits_for_bytes_is_woken_without_any() {
        prepare().unwrap();
        let (empty, _other) = rustix::pipe::pipe().unwrap();
        let thread = std::thread::spawn(move || rustix::io::read(&empty, &mut [0u8; 1]));
        while !thread.is_finished() {
            wake(&thread);
            std::thread::sleep(Duration::from_millis(1));
        }
        // One that has ended is not minded.
        wake(&thread);
        assert_eq!(thread.join().unwrap(), Err(rustix::io::Errno::INTR));
    }
}
