//! How urgent the I/O of a thread is to the scheduler of the host's disk.
#![allow(unsafe_code)]

use rustix::io::Errno;

/// From `<linux/ioprio.h>`: of which process (0: the calling thread), and where the class stands in the number.
const WHO_PROCESS: libc::c_int = 1;
const CLASS_SHIFT: libc::c_int = 13;
const CLASS_BEST_EFFORT: libc::c_int = 2;
const CLASS_IDLE: libc::c_int = 3;
/// The last of the eight levels of the class best effort.
const LEVEL_LAST: libc::c_int = 7;

/// A priority below the usual one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Served while nobody else wants the disk; may wait for long.
    Idle,
    /// After all others of the usual class, but never without end.
    Low,
}

/// The calling thread's I/O has another priority until this is dropped. Not every scheduler looks at it.
#[derive(Debug)]
pub struct IoPriority {
    /// What to go back to; `None` if the kernel refused the change.
    before: Option<libc::c_int>,
    /// A priority is of one thread.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl IoPriority {
    /// Changes the priority, if the kernel lets us.
    #[must_use]
    pub fn lowered(urgency: Urgency) -> Self {
        let wanted = match urgency {
            Urgency::Idle => CLASS_IDLE << CLASS_SHIFT,
            Urgency::Low => (CLASS_BEST_EFFORT << CLASS_SHIFT) | LEVEL_LAST,
        };
        let before = get().ok().filter(|_| set(wanted).is_ok());
        Self { before, _not_send: std::marker::PhantomData }
    }

    /// Whether the kernel did as asked.
    pub fn is_set(&self) -> bool {
        self.before.is_some()
    }
}

impl Drop for IoPriority {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // It was that before, so the kernel allows it; and else nothing but speed is lost.
            let _ = set(before);
        }
    }
}

fn get() -> Result<libc::c_int, Errno> {
    // SAFETY: the call takes two numbers and touches no memory of ours.
    let priority = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) };
    libc::c_int::try_from(priority).ok().filter(|priority| *priority >= 0).ok_or(Errno::PERM)
}

fn set(priority: libc::c_int) -> Result<(), Errno> {
    // SAFETY: the call takes three numbers and touches no memory of ours.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, priority) } {
        0 => Ok(()),
        _ => Err(Errno::PERM),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lowered_priority_ends_with_its_guard() {
        let before = get().expect("the kernel knows priorities");
        {
            let lowered = IoPriority::lowered(Urgency::Idle);
            assert!(lowered.is_set());
            assert_eq!(get().expect("get"), CLASS_IDLE << CLASS_SHIFT);
        }
        assert_eq!(get().expect("get"), before);
    }
}
