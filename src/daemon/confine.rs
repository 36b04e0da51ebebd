//! What a daemon gives up once it has mounted: it reads bytes that others wrote, of guests and of a store, so whoever
//! found a mistake in it must gain nothing but the disks that it serves.
//!
//! Nothing here is needed for serving. What the kernel, or the right to it, does not give is said once in the log.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::seccomp;
use crate::error::{Context, Result};

/// Adjustment of the score by which the kernel chooses whom to kill when memory runs out, -1000 to 1000: the guests go
/// first, for without the daemon all of them would lose their disks.
const OOM_SCORE: i32 = -900;
const OOM_FILE: &str = "/proc/self/oom_score_adj";

/// Highest capability number tried; the kernel ends the list before it.
const CAPABILITIES_MAX: u32 = 63;

/// What a process is to a mount, which decides what it keeps.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role<'a> {
    /// It serves, and takes the mount away itself: it keeps the capability for that, where it has it, and not in effect:
    /// see [`super::unmounter`].
    Alone {
        /// Where the mount is.
        mountpoint: &'a Path,
    },
    /// It takes the mount away, and starts the processes that serve, which inherit what it gives up.
    Keeper {
        /// Where the mount is.
        mountpoint: &'a Path,
    },
    /// It serves, and keeps nothing.
    Worker,
}

/// Confines the calling thread and those that it starts; no other thread may be there that serves.
pub(super) fn confine(role: Role<'_>) {
    let root = rustix::process::geteuid().is_root() || super::identity::may_mount();
    let mut lacking = Vec::new();
    let mut step = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            lacking.push(format!("{what} ({error})"));
        }
    };
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // A worker has both from its keeper.
    if root && !matches!(role, Role::Worker) {
        // Of a process that was another user's, such files are root's.
        let lowered = super::identity::with_capabilities(lower_oom_score);
        step("safety from the out-of-memory killer", lowered);
        // Under memory pressure the kernel writes back through us; our own allocations must not wait for that.
        let flusher = rustix::process::configure_io_flusher_behavior(true);
        step("memory reserved for writing back", flusher.context(|| "set PR_SET_IO_FLUSHER"));
    }
    // Memory holds the contents of guests' disks, and descriptors the mount: no core dump, and no other process of this
    // user may look.
    let dumpable = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    step("no core dumps", dumpable.context(|| "set PR_SET_DUMPABLE"));
    step("no new privileges", rustix::thread::set_no_new_privs(true).context(|| "set PR_SET_NO_NEW_PRIVS"));
    step("few capabilities", drop_capabilities(role));
    // A keeper starts programs, and reads nothing that others wrote.
    if !matches!(role, Role::Keeper { .. }) {
        step("few system calls", seccomp::install());
    }
    if !lacking.is_empty() {
        log::info!("not to be had here: {}", lacking.join("; "));
    }
}

fn lower_oom_score() -> Result<()> {
    use std::io::Write;
    let now = std::fs::read_to_string(OOM_FILE).context(|| format!("read {OOM_FILE}"))?;
    if now.trim().parse::<i32>().is_ok_and(|now| now <= OOM_SCORE) {
        return Ok(());
    }
    let write =
        || std::fs::File::options().write(true).open(OOM_FILE)?.write_all(OOM_SCORE.to_string().as_bytes());
    write().context(|| format!("write {OOM_FILE}"))
}

/// Keeps nothing in a worker, and otherwise CAP_SYS_ADMIN, for unmounting, and CAP_DAC_READ_SEARCH only where the way to the mountpoint is closed to our
/// user; neither in effect. All others go for good.
fn drop_capabilities(role: Role<'_>) -> Result<()> {
    let what = || "drop capabilities";
    let had = rustix::thread::capabilities(None).context(what)?;
    let mut bounding = Ok(());
    if had.effective.contains(CapabilitySet::SETPCAP) {
        for number in 0..=CAPABILITIES_MAX {
            match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(
                1 << number,
            )) {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL) => break,
                Err(errno) => bounding = Err(errno),
            }
        }
        bounding = bounding.and_then(|()| rustix::thread::clear_ambient_capability_set());
    }
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: had.permitted, inheritable: none },
    )
    .context(what)?;
    let kept = match role {
        Role::Worker => none,
        Role::Alone { mountpoint } | Role::Keeper { mountpoint } if can_look_up(mountpoint) => {
            CapabilitySet::SYS_ADMIN
        }
        Role::Alone { .. } | Role::Keeper { .. } => CapabilitySet::SYS_ADMIN | CapabilitySet::DAC_READ_SEARCH,
    };
    let permitted = had.permitted & kept;
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted, inheritable: none })
        .context(what)?;
    bounding.context(what)
}

/// Whether the mountpoint can be found without privileges. Nothing is asked of the mount.
fn can_look_up(mountpoint: &Path) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW;
    !matches!(rustix::fs::statx(CWD, mountpoint, flags, StatxFlags::empty()), Err(rustix::io::Errno::ACCESS))
}
