//! Requests of our own, for nothing but to be fetched.
//!
//! The kernel gives an entry back only with a request. A process that is to hand its entries over must have all of them: one
//! that the kernel still had when that process ended might get a request at that very moment, which nobody would ever
//! answer. So the keeper asks on each processor for as many answers as there are entries, and has them from the next process.
//!
//! Whoever waits for an answer cannot even be killed. So that the connection still ends with the processes that serve
//! it, should all be killed now, the threads that wait have no descriptor of it.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::memory::ENTRIES_MAX;
use super::processors::stay_on;
use crate::error::{Context, Error, ErrorKind, Result};

/// Bytes of the stack of a thread that makes one system call.
const STACK_BYTES: usize = 64 << 10;

/// Requests under way. The mount is in use until they are answered.
#[derive(Debug)]
pub struct Nudged(Receiver<()>);

impl Nudged {
    /// Waits until all are answered, but not longer than that.
    pub fn wait(&self, patience: Duration) {
        // Nothing is sent: it ends when they have.
        let _ = self.0.recv_timeout(patience);
    }
}

/// Asks `times` times on each of these processors for what a mount must be asked for, and waits for no answer. `root` is the
/// mount's directory, opened as a path.
///
/// # Errors
/// [`ErrorKind::OutOfRange`] if that is more than there are entries; if the host refuses the first thread.
pub fn nudge(root: OwnedFd, processors: Vec<u16>, times: usize) -> Result<Nudged> {
    if processors.len().saturating_mul(times) > ENTRIES_MAX {
        return Err(Error::new(ErrorKind::OutOfRange, format!("{times} requests on each processor")));
    }
    let ((parted, begun), (ending, ended)) = (channel(), channel());
    let number = root.as_raw_fd();
    let ask = move || {
        ask_all(number, &processors, times, &parted);
        drop::<Sender<()>>(ending);
    };
    std::thread::Builder::new().name("nudge".to_owned()).spawn(ask).context(|| "start a thread")?;
    // Until then `root` belongs to both.
    let begun = begun.recv().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
    drop(root);
    begun.context(|| "part with descriptors").map(|()| Nudged(ended))
}

/// Has threads ask, and waits for them.
fn ask_all(root: RawFd, processors: &[u16], times: usize, parted: &Sender<std::io::Result<()>>) {
    let result = keep_only(root);
    let is_parted = result.is_ok();
    let _ = parted.send(result);
    if !is_parted {
        return;
    }
    // SAFETY: the table of descriptors in which the caller closes it is not ours any more; in ours nobody else does.
    let root = unsafe { OwnedFd::from_raw_fd(root) };
    let asked = root.as_fd();
    std::thread::scope(|scope| {
        for processor in processors.iter().flat_map(|processor| std::iter::repeat_n(*processor, times)) {
            let ask = move || stay_on(&[processor]).map(|()| rustix::fs::fstatfs(asked).map(drop));
            // Whatever it is told: it has asked. Should it not, the process that is to hand over finds that it cannot.
            let _ = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, ask);
        }
    });
}

/// Gives the calling thread, and those that it starts, a table of descriptors of their own, with standard input and output
/// and `kept` alone.
fn keep_only(kept: RawFd) -> std::io::Result<()> {
    let close = |first: i32, last: u32, flags: u32| {
        let (first, flags) = (first.cast_unsigned(), flags.cast_signed());
        // SAFETY: the table is ours alone from the first call on, and nothing that this thread or those that it starts own
        // is in it but what stays.
        match unsafe { libc::close_range(first, last, flags) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    close(kept + 1, u32::MAX, libc::CLOSE_RANGE_UNSHARE)?;
    if kept > 3 { close(3, kept.cast_unsigned() - 1, 0) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn threads_that_ask_have_no_other_descriptor_and_all_others_keep_theirs() {
        let (held, root) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let number = root.as_raw_fd();
        let of_thread = std::thread::scope(|scope| {
            let look = || {
                keep_only(number).unwrap();
                let open: Vec<i32> = (3..100)
                    .filter(|fd| std::fs::read_link(format!("/proc/thread-self/fd/{fd}")).is_ok())
                    .collect();
                open
            };
            scope.spawn(look).join().unwrap()
        });
        assert_eq!(of_thread, [number]);
        assert!(held.metadata().is_ok() && rustix::fs::fstat(root.as_fd()).is_ok());
    }

    #[test]
    fn more_than_any_mount_has_entries_is_refused() {
        let root = OwnedFd::from(tempfile::tempfile().unwrap());
        let error = nudge(root, vec![0, 1], ENTRIES_MAX).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        let few = nudge(tempfile::tempfile().unwrap().into(), vec![0], 3).unwrap();
        few.wait(Duration::from_secs(60));
    }
}
