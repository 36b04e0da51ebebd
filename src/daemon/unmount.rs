//! Taking a mount away from outside the daemon, and waiting until it has made everything durable.

use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::farewell::Farewell;
use super::holders;
use super::identity::{as_owner, as_owner_of};
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

/// How long the daemon of another user's store may take, if we are root: that user decides when its lock is given up.
const PATIENCE_WITH_OTHERS: Duration = Duration::from_secs(5 * 60);

/// Takes away the mount at `target`, which is a mountpoint or the directory of a mounted store, and waits until its
/// daemon has flushed and closed every disk and ended. A dead mount is taken away as well.
///
/// # Errors
/// [`ErrorKind::NotFound`] if no store is mounted there; [`ErrorKind::Busy`], naming who uses it, if a file in it is
/// open (nothing is changed then), or if another user's daemon holds its store for minutes after the mount has gone;
/// [`ErrorKind::Io`] if the daemon could not make everything durable.
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
        (Some(store), Some(server)) if server.pid != 0 => {
            let ending = Ending { store, server, process, entry: entry.clone() };
            if ending.store.owner()?.0 == rustix::process::geteuid() {
                ending.wait()
            } else {
                ending.wait_for(PATIENCE_WITH_OTHERS)
            }
        }
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

/// A daemon whose mount has gone.
struct Ending {
    store: Store,
    server: ServerInfo,
    process: Option<OwnedFd>,
    entry: MountEntry,
}

impl Ending {
    /// [`Ending::wait`], but no longer than `patience`: the store's owner decides when the lock is given up, and what lies
    /// where the daemon's last words do.
    fn wait_for(self, patience: Duration) -> Result<()> {
        let shown = self.entry.mountpoint.display().to_string();
        let pid = self.server.pid;
        let (tell, told) = channel();
        let wait = move || {
            // Nobody listens any more when it has taken too long.
            let _ = tell.send(self.wait());
        };
        std::thread::Builder::new().name("wait".to_owned()).spawn(wait).context(|| "start a thread")?;
        told.recv_timeout(patience).unwrap_or_else(|_| {
            let text = format!("{shown}: unmounted, but its daemon (process {pid}, it says) does not end");
            Err(Error::new(ErrorKind::Busy, text).with_hint("its store stays locked until it does"))
        })
    }

    /// Waits until the daemon has given up its lock on the store, and its process has ended.
    fn wait(&self) -> Result<()> {
        let mut doubt = Instant::now() + DOUBT;
        while self.store.serving()?.is_some_and(|now| now.pid == self.server.pid) {
            if Instant::now() >= doubt {
                self.leave_other_namespaces()?;
                doubt = Instant::now() + DOUBT;
            }
            std::thread::sleep(PAUSE);
        }
        wait_for_exit(self.process.as_ref());
        as_owner_of(&self.store, || match self.store.run_dir_in_use()? {
            Some(run_dir) => Farewell::check(&run_dir, self.server.pid),
            None => Farewell::missing(self.server.pid),
        })
    }

    /// Tells the daemon to end if the mount lives on in other mount namespaces but is used in none; fails if it is used.
    fn leave_other_namespaces(&self) -> Result<()> {
        let shown = self.entry.mountpoint.display();
        if let Some(holder) = holders::holders(self.entry.device).first() {
            let text = format!("{shown}: unmounted here, but in another mount namespace {holder}");
            return Err(Error::new(ErrorKind::Busy, text)
                .with_hint(format!("the daemon (process {}) serves on until that ends", self.server.pid)));
        }
        if holders::is_seen_mounted(self.entry.device) { self.tell_to_end() } else { Ok(()) }
    }

    /// The store's owner wrote down which process that is, so it is told with no more than his rights.
    fn tell_to_end(&self) -> Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        as_owner_of(&self.store, || {
            // It looks for itself whether a file is open.
            match rustix::process::pidfd_send_signal(process, Signal::TERM) {
                Ok(()) | Err(Errno::SRCH) => Ok(()),
                Err(errno) => Err(errno)
                    .context(|| format!("tell the daemon (process {}, it says) to end", self.server.pid)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    /// A user who is nobody else.
    const USER: u32 = 43_211;

    /// A daemon that holds the store's lock and does not end, and says that it is `pid`.
    fn ending(folder: &Path, pid: u32) -> (Ending, crate::store::ServeLock) {
        assert!(rustix::process::geteuid().is_root(), "needs root");
        let store = Store::init(&folder.join("store")).unwrap();
        let lock = store.serve_lock(Path::new("/mnt")).unwrap();
        chown(store.dir(), Some(USER), Some(USER)).unwrap();
        let server = ServerInfo { pid, ..store.serving().unwrap().unwrap() };
        let entry = MountEntry {
            mountpoint: "/mnt".into(),
            // Of no mount.
            device: (0xfff, 0xf_ffff),
            fs_type: mount::FS_TYPE.to_owned(),
            source: store.dir().to_owned(),
            user: Some(USER),
        };
        let process = process_of(&server);
        (Ending { store, server, process, entry }, lock)
    }

    /// A user could have root signal any process by naming it in the lock of his store.
    #[test]
    fn a_daemon_of_another_user_is_told_to_end_with_that_users_rights() {
        let folder = tempfile::tempdir().unwrap();
        let mut of_root = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let (ending, lock) = ending(folder.path(), of_root.id());
        let refused = ending.tell_to_end().unwrap_err();
        of_root.kill().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
        assert_eq!(of_root.wait().unwrap().signal(), Some(Signal::KILL.as_raw()), "and not by SIGTERM");
        drop((ending, lock));
    }

    /// Root waited for the lock for as long as that user held it.
    #[test]
    fn a_daemon_of_another_user_is_not_awaited_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let (ending, lock) = ending(folder.path(), std::process::id());
        let error = ending.wait_for(PAUSE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().starts_with("/mnt: unmounted, but its daemon (process "), "{error}");
        drop(lock);
    }
}
