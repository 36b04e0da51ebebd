//! `cowdisk status`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Session;
use super::args::StatusArgs;
use crate::daemon::{self, DiskStatus, KeeperStatus, Status};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::store::Store;
use crate::units::HumanBytes;

/// A store as `--json` shows it.
#[derive(Debug, Serialize)]
struct StatusView {
    store: PathBuf,
    mounted: bool,
    /// What the daemon tells; null if the store is not mounted.
    daemon: Option<Status>,
}

/// Prints how a store is served.
pub(super) fn run(session: &mut Session, args: &StatusArgs) -> Result<()> {
    let dir = store_meant(session, args)?;
    // It may be another store than that whose owner we are by now.
    let status = daemon::as_owner(&dir, || daemon::status(&Store::open(&dir)?))?;
    if args.form.json {
        return session.output.json(&StatusView { store: dir, mounted: status.is_some(), daemon: status });
    }
    match status {
        None => session.output.line(&format!("store {}: not mounted", dir.display())),
        Some(status) => show(session, &status),
    }
}

/// The directory of the store that is meant.
pub(super) fn store_meant(session: &Session, args: &StatusArgs) -> Result<PathBuf> {
    match &args.mountpoint {
        None => Ok(session.store.clone()),
        Some(mountpoint) => store_mounted_on(mountpoint),
    }
}

fn store_mounted_on(mountpoint: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(mountpoint).context(|| format!("find {}", mountpoint.display()))?;
    let mounts = daemon::mounts()?;
    let mount = mounts.into_iter().rev().find(|mount| mount.is_ours() && mount.mountpoint == path);
    mount.map(|mount| mount.source).ok_or_else(|| {
        let message = format!("{}: no store is mounted there", mountpoint.display());
        Error::new(ErrorKind::NotFound, message)
    })
}

fn show(session: &mut Session, status: &Status) -> Result<()> {
    let host = &status.host;
    let full = if host.nearly_full { ", nearly full" } else { "" };
    let left = format!("{} left for disks, {} % used{full}", HumanBytes(host.left), host.used_percent);
    session.output.properties(&[
        ("store", status.store.display().to_string()),
        ("mounted on", status.mountpoint.display().to_string()),
        ("daemon", format!("process {}, cowdisk {}", status.pid, status.version)),
        ("keeper", keeper(status)),
        ("since", status.started.to_string()),
        ("options", status.options.clone()),
        ("transport", format!("{}, {}", status.transport, status.transport_reason)),
        ("passthrough", passthrough(status)),
        ("host's file system", left),
        ("instances", status.instances.to_string()),
        ("open files", status.open_files.to_string()),
    ])?;
    if status.disks.is_empty() {
        return session.output.line("no disk is in use");
    }
    let rows: Vec<Vec<String>> = status.disks.iter().map(row).collect();
    session.output.line("")?;
    let titles = ["DISK", "STATE", "SIZE", "HANDLES", "UNCOMMITTED", "SERVED BY", "REASON"];
    session.output.table(&titles, &[2, 3, 4], &rows)
}

fn passthrough(status: &Status) -> String {
    match &status.passthrough.reason {
        None => "on: the kernel serves disks that are one file of the host".to_owned(),
        Some(reason) => format!("off: {reason}"),
    }
}

fn keeper(status: &Status) -> String {
    let Some(keeper) = &status.keeper else {
        return "none: if the daemon dies, the mount is cut off".to_owned();
    };
    let last =
        keeper.last_end.as_ref().map(|last| format!(", the last time after: {last}")).unwrap_or_default();
    let KeeperStatus { pid, version, restarts, upgrades, .. } = keeper;
    let cut_off = if status.survives_death { "" } else { "; if the daemon dies, the mount is cut off" };
    format!(
        "process {pid}, cowdisk {version}, upgraded the daemon {upgrades} times, replaced it {restarts} times{last}{cut_off}"
    )
}

fn row(disk: &DiskStatus) -> Vec<String> {
    vec![
        disk.name.clone(),
        disk.state.clone(),
        HumanBytes(disk.size).to_string(),
        disk.handles.to_string(),
        disk.uncommitted_runs.to_string(),
        disk.served_by.clone(),
        disk.reason.as_ref().or(disk.not_kernel.as_ref()).cloned().unwrap_or_default(),
    ]
}
