//! Where a store is, or would be: the file system below it, its room, its run directory, and the daemon that serves it.

use std::path::{Path, PathBuf};

use super::Line;
use crate::daemon::{self, DiskStatus, Status};
use crate::error::{Error, ErrorKind};
use crate::store::{HostFeatures, Store, run_dir_to_be, try_host};
use crate::units::HumanBytes;

/// Memory that a host should have left for live maps, in bytes: a disk of 1 TiB, scattered all over, takes as much.
const MEMORY_MIN: u64 = 64 << 20;

/// Looks at a store, with its owner's rights, and at the place where it is or would be.
pub(super) fn look(store: &Path) -> Vec<Line> {
    let looked = daemon::as_owner(store, || {
        Ok(match Store::open_as_it_is(store) {
            Ok(open) => look_at(&open),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let next = format!("make one: cowdisk --store {} init", store.display());
                let message = format!("{}: there is no store yet", store.display());
                let mut lines = vec![Line::warning("store", message, next), host_fs(&nearest(store))];
                lines.push(run_dir(run_dir_to_be().as_deref()));
                lines
            }
            Err(error) => vec![store_refused(&error)],
        })
    });
    looked.unwrap_or_else(|error| vec![store_refused(&error)])
}

fn store_refused(error: &Error) -> Line {
    Line::problem("store", error.to_string(), error.hint().unwrap_or("see what is wrong: cowdisk check"))
}

/// The folder itself, or the nearest one above it that is there.
fn nearest(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

fn look_at(store: &Store) -> Vec<Line> {
    let dir = store.dir();
    let mut lines = vec![Line::ok("store", dir.display().to_string()), host_fs(dir), room(store)];
    let in_use = store.run_dir_in_use().ok().flatten();
    lines.push(run_dir(in_use.or_else(run_dir_to_be).as_deref()));
    match daemon::status(store) {
        Ok(Some(status)) => lines.extend(served(&status)),
        Ok(None) => lines.push(not_served(dir, left_mounted(dir))),
        Err(error) => {
            let next = error.hint().unwrap_or("see its log: daemon.log in the run directory").to_owned();
            lines.push(Line::problem("daemon", error.to_string(), next));
        }
    }
    lines
}

fn host_fs(folder: &Path) -> Line {
    match try_host(folder) {
        Ok(features) => host_fs_line(folder, &features),
        Err(error) => Line::problem("file system", error.to_string(), "see what the kernel says: dmesg"),
    }
}

fn host_fs_line(folder: &Path, features: &HostFeatures) -> Line {
    const TOPIC: &str = "file system";
    let HostFeatures { name, tried, holes, direct, extents, memory } = features;
    let place = format!("{} below {}", name, folder.display());
    let elsewhere = "keep the store on ext4, XFS or btrfs";
    if *memory {
        return Line::warning(TOPIC, format!("{place}: in memory, and gone with the next boot"), elsewhere);
    }
    if !tried {
        let message = format!("{place}: not tried, for no file can be made there by this user");
        return Line::warning(TOPIC, message, "run cowdisk doctor as the user who will own the store");
    }
    if !holes {
        return Line::problem(TOPIC, format!("{place}: has no sparse files with holes"), elsewhere);
    }
    match (direct, extents) {
        (true, true) => Line::ok(TOPIC, format!("{place}: holes, direct I/O, extents")),
        (false, _) => Line::warning(
            TOPIC,
            format!("{place}: without direct I/O guests' writes fill the host's cache"),
            elsewhere,
        ),
        (true, false) => Line::warning(
            TOPIC,
            format!("{place}: does not tell extents, so a full host refuses writes early"),
            elsewhere,
        ),
    }
}

/// What is left, against what is promised.
fn room(store: &Store) -> Line {
    const TOPIC: &str = "room";
    let usage = match store.usage() {
        Ok(usage) => usage,
        Err(error) => return Line::problem(TOPIC, error.to_string(), "see what is wrong: cowdisk check"),
    };
    let own = usage.overlays + usage.independent;
    let (left, more) = (usage.space.left(), usage.promised.saturating_sub(own));
    let message = format!("{} left for disks, which may ask for {} more", HumanBytes(left), HumanBytes(more));
    if left == 0 {
        return Line::problem(TOPIC, message, "make room: guests that write to new blocks are paused");
    }
    match usage.space.is_high() {
        true => Line::warning(TOPIC, format!("{message}: nearly full"), "see what takes it: cowdisk df"),
        false => Line::ok(TOPIC, message),
    }
}

fn run_dir(dir: Option<&Path>) -> Line {
    const TOPIC: &str = "run directory";
    let elsewhere = "name a folder on a tmpfs with COWDISK_RUN_DIR";
    let Some(dir) = dir else {
        return Line::problem(TOPIC, "there is no folder in memory for live maps", elsewhere);
    };
    let place = nearest(dir);
    let stat = rustix::fs::statvfs(&place);
    let memory = try_host(&place).is_ok_and(|features| features.memory);
    match stat {
        Err(errno) => Line::problem(TOPIC, format!("{}: {errno}", place.display()), elsewhere),
        Ok(_) if !memory => {
            let message = format!(
                "{}: not in memory, so disks that were open at a power cut are not told from others",
                dir.display()
            );
            Line::problem(TOPIC, message, elsewhere)
        }
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let message = format!("{}: {} of memory left for live maps", dir.display(), HumanBytes(free));
            match free {
                MEMORY_MIN.. => Line::ok(TOPIC, message),
                _ => Line::warning(TOPIC, message, "make its tmpfs larger: mount -o remount,size=…"),
            }
        }
    }
}

fn served(status: &Status) -> Vec<Line> {
    const TOPIC: &str = "daemon";
    let ours = env!("CARGO_PKG_VERSION");
    let place = format!("process {} serves {}", status.pid, status.mountpoint.display());
    let by = format!("cowdisk {}, transport {}", status.version, status.transport);
    let next = match status.keeper {
        Some(_) => "replace it, while guests go on: cowdisk upgrade",
        None => "mount anew, when no guest runs",
    };
    let mut lines = vec![match status.version == ours {
        true => Line::ok(TOPIC, format!("{place}: {by}")),
        false => Line::warning(TOPIC, format!("{place}: {by}, and this is cowdisk {ours}"), next),
    }];
    lines.push(match &status.keeper {
        None => Line::warning(
            "keeper",
            "none: if the daemon dies, the mount is cut off",
            "mount anew, when no guest runs, with Linux 6.9 and transport=dev_fuse",
        ),
        Some(keeper) if keeper.restarts > 0 => {
            let last = keeper.last_end.as_ref().map(|end| format!(", the last time after: {end}"));
            let message =
                format!("replaced the daemon {} times{}", keeper.restarts, last.unwrap_or_default());
            Line::warning("keeper", message, "see why: daemon.log in the run directory")
        }
        Some(keeper) if !status.survives_death => {
            let message = format!("process {}; if the daemon dies, the mount is cut off", keeper.pid);
            Line::ok("keeper", message)
        }
        Some(keeper) => Line::ok("keeper", format!("process {}, replaced no daemon yet", keeper.pid)),
    });
    lines.push(disks(&status.disks));
    lines
}

fn disks(disks: &[DiskStatus]) -> Line {
    const TOPIC: &str = "disks";
    let is_bad = |disk: &&DiskStatus| disk.state == "latched" || disk.state == "refused";
    match disks.iter().find(is_bad) {
        None => Line::ok(TOPIC, format!("{} in use", disks.len())),
        Some(first) => {
            let count = disks.iter().filter(is_bad).count();
            let message =
                format!("{count} of {} do not serve; {} is {}", disks.len(), first.name, first.state);
            Line::problem(TOPIC, message, "see which and why: cowdisk status")
        }
    }
}

/// A mount of the store that is there although nobody serves it.
fn left_mounted(store: &Path) -> Option<PathBuf> {
    let mounts = daemon::mounts().ok()?;
    let store = store.canonicalize().ok()?;
    mounts
        .into_iter()
        .find(|mount| mount.is_of_its_store() && mount.source == store)
        .map(|mount| mount.mountpoint)
}

fn not_served(store: &Path, left: Option<PathBuf>) -> Line {
    const TOPIC: &str = "daemon";
    match left {
        None => Line::ok(TOPIC, format!("none: store {} is not mounted", store.display())),
        Some(mountpoint) => Line::problem(
            TOPIC,
            format!("{} is mounted, and nobody serves it: its daemon has died", mountpoint.display()),
            format!("mount it anew: cowdisk mount {0}; then start its guests anew", mountpoint.display()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::{HostStatus, KeeperStatus, PassthroughStatus};
    use crate::doctor::Verdict;
    use crate::store::Timestamp;

    #[test]
    fn each_lack_of_a_file_system_is_judged_by_what_it_costs() {
        let good = HostFeatures {
            name: "ext4".to_owned(),
            tried: true,
            holes: true,
            direct: true,
            extents: true,
            memory: false,
        };
        let verdict = |features: HostFeatures| host_fs_line(Path::new("/store"), &features).verdict;
        assert_eq!(verdict(good.clone()), Verdict::Ok);
        assert_eq!(verdict(HostFeatures { holes: false, ..good.clone() }), Verdict::Problem);
        for lacking in [
            HostFeatures { direct: false, ..good.clone() },
            HostFeatures { extents: false, ..good.clone() },
            HostFeatures { tried: false, holes: false, ..good.clone() },
            HostFeatures { memory: true, ..good },
        ] {
            assert_eq!(verdict(lacking), Verdict::Warning);
        }
    }

    #[test]
    fn disks_that_do_not_serve_are_a_problem() {
        let disk = |state: &str| DiskStatus {
            name: "web/disk".to_owned(),
            state: state.to_owned(),
            reason: None,
            handles: 1,
            size: 512,
            uncommitted_runs: 0,
            served_by: "daemon".to_owned(),
            not_kernel: None,
        };
        assert_eq!(disks(&[disk("open"), disk("changing")]).verdict, Verdict::Ok);
        let line = disks(&[disk("open"), disk("latched"), disk("refused")]);
        assert_eq!(
            (line.verdict, line.message.as_str()),
            (Verdict::Problem, "2 of 3 do not serve; web/disk is latched")
        );
    }

    /// Guests had to be shut down for it, it said.
    #[test]
    fn a_daemon_of_another_version_is_replaced_by_an_upgrade_if_somebody_keeps_its_mount() {
        let host = HostStatus {
            size: 0,
            used: 0,
            used_percent: 0,
            available: 0,
            reserve: 0,
            left: 0,
            high_water_percent: 90,
            nearly_full: false,
        };
        let alone = Status {
            version: "0.0.1".to_owned(),
            pid: 2,
            keeper: None,
            survives_death: false,
            store: "/store".into(),
            mountpoint: "/mnt".into(),
            started: Timestamp::now(),
            options: String::new(),
            transport: "dev_fuse".to_owned(),
            transport_reason: String::new(),
            passthrough: PassthroughStatus::default(),
            host,
            instances: 0,
            open_files: 0,
            disks: Vec::new(),
        };
        let keeper =
            KeeperStatus { pid: 1, version: "0.0.1".to_owned(), restarts: 0, upgrades: 0, last_end: None };
        let kept = Status { keeper: Some(keeper), ..alone.clone() };
        let next = |status: &Status| served(status)[0].next.clone().unwrap();
        assert!(next(&kept).contains("cowdisk upgrade"));
        assert!(!next(&alone).contains("upgrade"));
    }

    #[test]
    fn a_mount_without_a_daemon_is_a_problem() {
        assert_eq!(not_served(Path::new("/store"), None).verdict, Verdict::Ok);
        assert_eq!(not_served(Path::new("/store"), Some("/mnt".into())).verdict, Verdict::Problem);
    }
}
