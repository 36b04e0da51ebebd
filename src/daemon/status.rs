//! What a daemon tells about itself: as JSON for programs and for `cowdisk status`.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::options::MountOptions;
use super::passthrough::Offer;
use super::worker::KeeperLink;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::{DiskState, Fs, ServedBy};
use crate::store::{SpaceNow, Timestamp};
use crate::transport::Choice;

/// A daemon that serves a store. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its version.
    pub version: String,
    /// The process that answers requests.
    pub pid: u32,
    /// The process that keeps the mount and starts those that answer; null if there is none.
    pub keeper: Option<KeeperStatus>,
    /// Whether another process takes over should the one that answers die. Otherwise the mount is cut off then.
    #[serde(default = "survives")]
    pub survives_death: bool,
    /// The directory of the store.
    pub store: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// When it began to serve, as RFC 3339.
    pub started: Timestamp,
    /// How it is mounted, as `-o` takes it.
    pub options: String,
    /// What reads the kernel's requests, as `-o transport=` takes it.
    pub transport: String,
    /// Why that one; empty from a daemon that does not tell.
    #[serde(default)]
    pub transport_reason: String,
    /// Whether the kernel serves by itself disks that are one file of the host.
    #[serde(default)]
    pub passthrough: PassthroughStatus,
    /// The host's filesystem.
    pub host: HostStatus,
    /// Instances of the store.
    pub instances: usize,
    /// Files and directories that are open.
    pub open_files: usize,
    /// Disks in use and disks that could not be opened. All others are idle.
    pub disks: Vec<DiskStatus>,
}

/// Whether the kernel serves disks by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassthroughStatus {
    /// It does, where it can.
    pub on: bool,
    /// Why not, if it does not.
    pub reason: Option<String>,
}

impl Default for PassthroughStatus {
    /// What holds for a daemon that does not tell.
    fn default() -> Self {
        Self { on: false, reason: Some("the daemon does not know of it".to_owned()) }
    }
}

/// What is so of a daemon that has a keeper and does not tell.
fn survives() -> bool {
    true
}

/// The process that keeps a mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperStatus {
    /// Its process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// How often another process had to take over from one that died.
    pub restarts: u32,
    /// How often another process took over in order, as `cowdisk upgrade` has it.
    #[serde(default)]
    pub upgrades: u32,
    /// How the last one that died ended.
    pub last_end: Option<String>,
}

/// The space of the host's filesystem. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// All of it.
    pub size: u64,
    /// What is in use.
    pub used: u64,
    /// That as a percentage of what is not kept for root.
    pub used_percent: u8,
    /// What others than root may take.
    pub available: u64,
    /// What guests' writes leave free.
    pub reserve: u64,
    /// What guests may still fill.
    pub left: u64,
    /// Percentage of use from which on there are warnings.
    pub high_water_percent: u8,
    /// Whether it is reached, or little more than the reserve is left.
    pub nearly_full: bool,
}

/// A disk in use, or one that could not be opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// `INSTANCE/DISK`.
    pub name: String,
    /// `open`; `changing` (being opened or closed); `latched` (a sync of the host's disk failed: it refuses writes until it
    /// is opened again); `refused` (it could not be opened when somebody last tried).
    pub state: String,
    /// Why, if it is refused.
    pub reason: Option<String>,
    /// Handles that share it.
    pub handles: usize,
    /// Bytes of the disk; 0 if it is not open.
    pub size: u64,
    /// Runs of blocks that changed since the last commit of its map.
    pub uncommitted_runs: usize,
    /// Who serves its reads and writes: `kernel` or `daemon`; empty from a daemon that does not tell.
    #[serde(default)]
    pub served_by: String,
    /// Why not the kernel, where it serves disks at all.
    #[serde(default)]
    pub not_kernel: Option<String>,
}

impl From<&SpaceNow> for HostStatus {
    fn from(now: &SpaceNow) -> Self {
        Self {
            size: now.host.total,
            used: now.used(),
            used_percent: now.used_percent(),
            available: now.host.available,
            reserve: now.reserve,
            left: now.left(),
            high_water_percent: now.high_water_percent,
            nearly_full: now.is_high(),
        }
    }
}

/// What of a daemon's status never changes.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    store: PathBuf,
    mountpoint: PathBuf,
    started: Timestamp,
    options: String,
    transport: Choice,
    keeper: Option<(KeeperStatus, Arc<KeeperLink>)>,
    passthrough: Offer,
    /// Whether the keeper could have another process take over from one that has died.
    can_resend: bool,
}

impl Identity {
    /// That of this process, for a mount that was made at `started`.
    pub(super) fn new(
        store: &Path,
        mountpoint: &Path,
        options: &MountOptions,
        started: Timestamp,
        transport: Choice,
        keeper: Option<(KeeperStatus, Arc<KeeperLink>)>,
    ) -> Self {
        let (store, mountpoint) = (store.to_owned(), mountpoint.to_owned());
        let passthrough = Offer::Off(format!("the transport {} cannot", transport.transport));
        let (options, can_resend) = (options.to_string(), false);
        Self { store, mountpoint, started, options, transport, keeper, passthrough, can_resend }
    }

    /// The same of a process that has the kernel serve disks, or not.
    pub(super) fn passing(self, passthrough: Offer) -> Self {
        Self { passthrough, ..self }
    }

    /// The same of a process that another one can take over from should it die.
    pub(super) fn surviving(self, can_resend: bool) -> Self {
        Self { can_resend, ..self }
    }

    /// What reads the kernel's requests, and why.
    pub(super) fn transport(&self) -> Choice {
        self.transport
    }

    /// The process that keeps the mount, unless it has died.
    pub(super) fn keeper(&self) -> Option<&KeeperStatus> {
        self.keeper.as_ref().filter(|(_, link)| !link.is_gone()).map(|(keeper, _)| keeper)
    }

    /// Asks that process to have another one take over from this one, and to tell `asker` what came of it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if there is none.
    pub(super) fn upgrade(&self, asker: BorrowedFd<'_>) -> Result<()> {
        match &self.keeper {
            Some((_, link)) => link.upgrade(asker),
            None => {
                let message = format!("the transport {} cannot be handed over", self.transport.transport);
                Err(Error::new(ErrorKind::Unsupported, message).with_hint("unmount, and mount again"))
            }
        }
    }

    /// When it began to serve.
    pub(super) fn started(&self) -> Timestamp {
        self.started
    }

    /// The status as it is now.
    pub(super) fn status(&self, fs: &Fs) -> Result<Status> {
        let (disks, _) = fs.disk_figures();
        let disks = disks.into_iter().map(|disk| {
            let (state, reason) = match disk.state {
                DiskState::Open => ("open", None),
                DiskState::Changing => ("changing", None),
                DiskState::Latched => ("latched", None),
                DiskState::Refused(reason) => ("refused", Some(reason)),
            };
            let (served_by, not_kernel) = match disk.served_by {
                ServedBy::Kernel(_) => ("kernel", None),
                ServedBy::Daemon(why_not) => ("daemon", why_not),
            };
            DiskStatus {
                name: disk.name,
                state: state.to_owned(),
                reason,
                handles: disk.handles,
                size: disk.size,
                uncommitted_runs: disk.uncommitted_runs,
                served_by: served_by.to_owned(),
                not_kernel,
            }
        });
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            keeper: self.keeper().cloned(),
            survives_death: self.can_resend && self.keeper().is_some(),
            store: self.store.clone(),
            mountpoint: self.mountpoint.clone(),
            started: self.started,
            options: self.options.clone(),
            transport: self.transport.transport.to_string(),
            transport_reason: self.transport.reason.to_string(),
            passthrough: PassthroughStatus {
                on: self.passthrough == Offer::On,
                reason: self.passthrough.why_not().map(str::to_owned),
            },
            host: HostStatus::from(&fs.look_at_space()?),
            instances: fs.count_instances()?,
            open_files: fs.open_files(),
            disks: disks.collect(),
        })
    }
}
