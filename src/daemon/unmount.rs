//! Taking a mount away from outside the daemon, and waiting until it has made everything durable.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::farewell::Farewell;
use super::holders;
use super::identity::as_owner;
use super::mounts::{self, MountEntry};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{ServerInfo, Store};
use crate::transport::mount;

/// How often to look whether the daemon has ended.
const PAUSE: Duration = Duration::from_millis(10);

/// After how long to look whether the mount lives on in another mount namespace.
const DOUBT: Duration = Duration::from_secs(2);

/// How long a daemon that has given up its lock may take to end.
const LAST_MOMENTS: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Takes away the mount at `target`, which is a mountpoint or the directory of a mounted store, and waits until its
/// daemon has flushed and closed every disk and ended. A dead mount is taken away as well.
///
/// # Errors
/// [`ErrorKind::NotFound`] if no store is mounted there; [`ErrorKind::Busy`], naming who uses it, if a file in it is
/// open (nothing is changed then); [`ErrorKind::Io`] if the daemon could not make everything durable.
pub fn unmount(target: &Path) -> Result<()> {
    let path = mounts::absolute(target)?;
    let mounts = mounts::mounts()?;
    let entry = mounts::mount_at(&mounts, &path)
        .filter(|mount| mount.is_ours())
        .or_else(|| mounts.iter().rev().find(|mount| mount.source == path && mount.is_of_its_store()))
        .ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{}: no store is mounted there", target.display()))
        })?;
    // Without the right to look into the store, or where somebody only says that it is one, one can still unmount, only
    // not wait.
    let open = || as_owner(&entry.source, || Store::open(&entry.source)).ok();
    let store = entry.is_of_its_store().then(open).flatten();
    let server = store.as_ref().and_then(|store| store.serving().ok().flatten());
    // The kernel would not mind users in other mount namespaces; but the daemon would go on for them, out of reach.
    if server.is_some() && !holders::holders(entry.device).is_empty() {
        return Err(busy(entry));
    }
    let process = server.as_ref().and_then(process_of);
    mount::unmount(&entry.mountpoint).map_err(|error| match error.kind() {
        ErrorKind::Busy => busy(entry),
        _ => error,
    })?;
    match (store, server) {
        (Some(store), Some(server)) if server.pid != 0 => wait(&store, &server, process.as_ref(), entry),
        _ => Ok(()),
    }
}

/// A handle to the daemon's process, for its number may go to another when it ends. None if it is not seen from here.
fn process_of(server: &ServerInfo) -> Option<OwnedFd> {
    let pid = i32::try_from(server.pid).ok().and_then(Pid::from_raw)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Waits until the process of a daemon that has given up its lock has gone, and with it the last files of the store that
/// it has open: the host's filesystem can be unmounted then.
fn wait_for_exit(process: Option<&OwnedFd>) {
    let Some(process) = process else { return };
    let mut awaited = [PollFd::new(process, PollFlags::IN)];
    if let Err(errno) = rustix::io::retry_on_intr(|| poll(&mut awaited, Some(&LAST_MOMENTS))) {
        log::warn!("wait for the daemon's process: {errno}");
    }
}

fn busy(entry: &MountEntry) -> Error {
    let shown = entry.mountpoint.display();
    let holders = holders::holders(entry.device);
    if holders.is_empty() && rustix::process::geteuid().is_root() {
        return Error::new(ErrorKind::Busy, format!("{shown} is in use, but by no process"))
            .with_hint("a loop device (losetup -a), a mount on top of it, or swap?");
    }
    if holders.is_empty() {
        return Error::new(
            ErrorKind::Busy,
            format!("{shown} is in use, by a process that this user may not see"),
        )
        .with_hint("try again as root to learn which");
    }
    Error::new(ErrorKind::Busy, format!("{shown} is in use: {}", holders::describe(&holders)))
        .with_hint("shut the guests down, or close those files, and unmount again")
}

/// Waits until `server` has given up its lock on the store, and its process has ended.
fn wait(store: &Store, server: &ServerInfo, process: Option<&OwnedFd>, entry: &MountEntry) -> Result<()> {
    let mut doubt = Instant::now() + DOUBT;
    while store.serving()?.is_some_and(|now| now.pid == server.pid) {
        if Instant::now() >= doubt {
            leave_other_namespaces(server, entry)?;
            doubt = Instant::now() + DOUBT;
        }
        std::thread::sleep(PAUSE);
    }
    wait_for_exit(process);
    as_owner(&entry.source, || Farewell::check(&store.run_dir()?, server.pid))
}

/// Tells the daemon to end if the mount lives on in other mount namespaces but is used in none; fails if it is used.
fn leave_other_namespaces(server: &ServerInfo, entry: &MountEntry) -> Result<()> {
    let shown = entry.mountpoint.display();
    if let Some(holder) = holders::holders(entry.device).first() {
        let text = format!("{shown}: unmounted here, but in another mount namespace {holder}");
        return Err(Error::new(ErrorKind::Busy, text)
            .with_hint(format!("the daemon (process {}) serves on until that ends", server.pid)));
    }
    if holders::is_seen_mounted(entry.device)
        && let Some(pid) = i32::try_from(server.pid).ok().and_then(Pid::from_raw)
    {
        // It looks for itself whether a file is open.
        rustix::process::kill_process(pid, Signal::TERM)
            .context(|| format!("tell the daemon (process {}) to end", server.pid))?;
    }
    Ok(())
}
