//! The processes that serve a mounted store: starting them, their background work, signals, and taking the mount away.
//!
//! One daemon serves one store; the store's lock sees to that. It is two processes: a keeper, which has the mount, and a
//! worker, which answers; if the worker dies the keeper starts another, which takes over. `cowdisk mount` [spawns](spawn) it and returns when it
//! serves; `cowdisk mount -f` [runs](run) it in place. It ends when its mount is [taken away](unmount), by us or by
//! umount(8), or when a signal asks it to and nobody uses the mount. Its end closes every disk; what could not be made
//! durable it leaves behind as its last words, for whoever took the mount away.

mod attendant;
mod background;
mod backoff;
mod confine;
mod control;
mod employ;
mod farewell;
mod holders;
mod http;
mod identity;
mod keeper;
mod link;
mod metrics;
mod mounted;
mod mountpoint;
mod mounts;
mod options;
mod passthrough;
mod program;
mod readiness;
mod seccomp;
mod serve;
mod signals;
mod status;
mod unmount;
mod unmounter;
mod upgrade;
mod worker;

use std::path::Path;

pub use control::{status, upgrade};
pub use holders::{Holder, holders};
pub use http::{REQUEST_BYTES_MAX, Refusal, Request, Route, read_request};
pub use identity::{Keep, as_owner, as_owner_of, become_owner, may_mount};
pub use mounts::{MountEntry, mounts};
pub use options::{FLUSH_SECONDS, FLUSH_SECONDS_MAX, MountOptions, THREADS_MAX};
pub use readiness::{LOG_VARIABLE, SpawnRequest};
pub use status::{DiskStatus, HostStatus, KeeperStatus, PassthroughStatus, Status};
pub use unmount::unmount;
pub use upgrade::Upgraded;

use readiness::Readiness;
use serve::serve;

use crate::error::Result;
use crate::store::Store;

/// File name of a daemon's log, in the run directory, unless an option names another.
const LOG: &str = "daemon.log";

/// Mounts the store in the background: starts this program again as `PROGRAM --store STORE mount -f -o OPTIONS --
/// MOUNTPOINT` and returns once files can be read. The daemon's stderr goes to `options.log`, or to a file in the run
/// directory; it logs as much as this process does.
///
/// # Errors
/// The daemon's own.
pub fn spawn(store: &Path, mountpoint: &Path, options: &MountOptions) -> Result<()> {
    spawn_program(&readiness::own_program()?, store, mountpoint, options)
}

/// [`spawn`] with another program, which must understand the same command line.
///
/// # Errors
/// Those of [`spawn`].
pub fn spawn_program(program: &Path, store: &Path, mountpoint: &Path, options: &MountOptions) -> Result<()> {
    let dir = mounts::absolute(store)?;
    let mountpoint = std::path::absolute(mountpoint).unwrap_or_else(|_| mountpoint.to_owned());
    let (log, log_file) = match &options.log {
        Some(log) => (log.clone(), readiness::open_log(log)?),
        // Who owns the store owns its run directory.
        None => as_owner(&dir, || {
            let log = Store::open(&dir)?.run_dir()?.join(LOG);
            let file = readiness::open_log(&log)?;
            Ok((log, file))
        })?,
    };
    readiness::start(
        &SpawnRequest { program, store: &dir, mountpoint: &mountpoint, options, log: &log },
        log_file,
    )
}

/// Mounts the store in `store` and serves it until it is unmounted, as the user whom it belongs to. If this process was
/// started by [`spawn`], whoever waits there is told when it serves, or why not. `on_ready` is called then.
///
/// The process that answers the kernel is another one: this program, started again with the same arguments, so that it
/// comes here as well. In that process this function serves what it is handed over, and never calls `on_ready`.
///
/// # Errors
/// Those of [`Store::open`]; why the store cannot be mounted, with nothing mounted then; what could not be made durable at
/// the end.
pub fn run(store: &Path, mountpoint: &Path, options: &MountOptions, on_ready: impl FnOnce()) -> Result<()> {
    if worker::is_wanted() {
        return worker::work(store, options);
    }
    let readiness = Readiness::from_environment();
    readiness.detach();
    let owned = become_owner(store, Keep::Capabilities).and_then(|()| Store::open(store));
    let result = owned.and_then(|store| {
        serve(store, mountpoint, options, || {
            readiness.ready();
            on_ready();
        })
    });
    if let Err(error) = &result {
        readiness.failed(error);
    }
    result
}
