//! `cowdisk mount` and `cowdisk umount`.

use std::path::Path;

use super::Session;
use super::args::MountArgs;
use super::df::warn_if_high;
use crate::daemon::{self, MountOptions};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::store::Store;

/// Mounts the store; returns once its disks can be read, in the foreground once it is unmounted.
pub(super) fn mount(session: &Session, args: &MountArgs) -> Result<()> {
    let text = args.options.join(",");
    let options = if args.sloppy { MountOptions::parse_tolerant(&text) } else { MountOptions::parse(&text) }?;
    // Says what is wrong with the store as every other command does.
    let store = daemon::as_owner(&session.store, || session.open_store())?;
    if args.check {
        check(&store, &args.mountpoint)
    } else if args.foreground {
        daemon::run(&session.store, &args.mountpoint, &options, || {})
    } else {
        daemon::spawn(&session.store, &args.mountpoint, &options)?;
        let store = store.with_space_policy(options.space);
        daemon::as_owner_of(&store, || {
            tell_transport(&store, options.passthrough);
            warn_of_refused_disks(&store);
            warn_if_high(&store);
            Ok(())
        })
    }
}

/// Says by `-v` what reads the kernel's requests, and why that; and in any case why no disk will be left to the kernel, if that
/// was `wanted`.
fn tell_transport(store: &Store, wanted: bool) {
    if !wanted && !log::log_enabled!(log::Level::Info) {
        return;
    }
    match daemon::status(store) {
        Ok(Some(status)) => {
            log::info!("served by the transport {}, {}", status.transport, status.transport_reason);
            if let Some(reason) = status.passthrough.reason.filter(|_| wanted) {
                log::warn!("no disk is left to the kernel: {reason}");
            }
        }
        Ok(None) => log::info!("unmounted again"),
        Err(error) => log::warn!("{error}"),
    }
}

/// Says which bases are not as they were stored: their disks are there, but opening them fails. The mount stands, so that
/// nothing of this fails the command.
fn warn_of_refused_disks(store: &Store) {
    match store.base_faults() {
        Ok(faults) => {
            for fault in faults {
                log::warn!("{fault}; every disk over it is refused, and cowdisk check names them");
            }
        }
        Err(error) => log::warn!("cannot look at the bases: {error}"),
    }
}

/// Whether mounting would go, as far as can be told without doing it.
fn check(store: &Store, mountpoint: &Path) -> Result<()> {
    if let Some(server) = store.serving()? {
        return Err(Error::new(
            ErrorKind::Busy,
            format!(
                "store {}: process {} serves it on {} already",
                store.dir().display(),
                server.pid,
                server.mountpoint.display()
            ),
        ));
    }
    let found = mountpoint.metadata().context(|| format!("mountpoint {}", mountpoint.display()))?;
    if !found.is_dir() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("mountpoint {}: not a directory", mountpoint.display()),
        ));
    }
    Ok(())
}

/// Unmounts and waits until everything is durable.
pub(super) fn unmount(mountpoint: &Path) -> Result<()> {
    // Called from a folder below the mountpoint, this command would itself be in the way.
    let mountpoint = std::path::absolute(mountpoint).context(|| format!("find {}", mountpoint.display()))?;
    std::env::set_current_dir("/").context(|| "leave the current folder")?;
    daemon::unmount(&mountpoint)
}
