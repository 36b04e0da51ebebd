//! What a daemon has left once it serves, as `/proc` tells it.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;

use super::mounted::{Mounted, needs_mount};
use super::{Place, text};

/// The capability to unmount, as a bit.
const SYS_ADMIN: u64 = 1 << 21;
/// The capability to read whatever a path leads to.
const DAC_READ_SEARCH: u64 = 1 << 2;
/// The capability to lower an OOM score.
const SYS_RESOURCE: u64 = 1 << 24;

/// A user who is nobody else.
const USER: u32 = 43_210;

/// What `/proc` says of a thread that has ended.
const ENDED: [Option<i32>; 2] = [Some(libc::ENOENT), Some(libc::ESRCH)];

fn daemon_pid(place: &Place) -> u64 {
    let lock: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(place.path("store/daemon.lock")).unwrap()).unwrap();
    lock["pid"].as_u64().unwrap()
}

/// A field of `status` of each thread of a process that does not end meanwhile.
fn of_threads(pid: u64, field: &str) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let values: Vec<String> = threads
        .filter_map(|thread| {
            let status = match fs::read_to_string(thread.unwrap().path().join("status")) {
                Ok(status) => status,
                Err(error) if ENDED.contains(&error.raw_os_error()) => return None,
                Err(error) => panic!("the status of a thread of {pid}: {error}"),
            };
            let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            Some(line.unwrap_or_else(|| panic!("no {field} in\n{status}")).trim().to_owned())
        })
        .collect();
    assert!(!values.is_empty(), "a process has threads");
    values
}

#[track_caller]
fn all_have(pid: u64, field: &str, wanted: &str) {
    let found = of_threads(pid, field);
    assert!(found.iter().all(|value| value == wanted), "{field}: {found:?}, not {wanted}");
}

fn capabilities(pid: u64, set: &str) -> Vec<u64> {
    of_threads(pid, set).iter().map(|digits| u64::from_str_radix(digits, 16).unwrap()).collect()
}

/// The process that answers requests.
fn worker_pid(place: &Place) -> u64 {
    place.json(&["status", "--json"])["daemon"]["pid"].as_u64().unwrap()
}

/// What every daemon has given up: its keeper all but the capabilities `permitted`, its worker everything.
fn check_confined(place: &Place, permitted: u64) {
    let (keeper, worker) = (daemon_pid(place), worker_pid(place));
    if keeper == worker {
        return check_process(keeper, permitted, true);
    }
    check_process(keeper, permitted, false);
    check_process(worker, 0, true);
}

fn check_process(pid: u64, permitted: u64, filtered: bool) {
    all_have(pid, "NoNewPrivs", "1");
    all_have(pid, "Seccomp", if filtered { "2" } else { "0" });
    all_have(pid, "Umask", "0077");
    for set in ["CapInh", "CapEff", "CapBnd", "CapAmb"] {
        assert!(capabilities(pid, set).iter().all(|&set| set == 0), "{set}");
    }
    let found = capabilities(pid, "CapPrm");
    assert!(found.iter().all(|&set| set == permitted), "CapPrm: {found:x?}, not {permitted:x}");
    // A process that cannot be dumped belongs to root in /proc, whoever runs it.
    assert_eq!(fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid(), 0);
}

/// Where we have the right to, the daemon is spared when memory runs out.
fn check_spared(pid: u64) {
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let may_lower = u64::from_str_radix(own.trim(), 16).unwrap() & SYS_RESOURCE != 0;
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    let unchanged = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    assert_eq!(score.trim(), if may_lower { "-900" } else { unchanged.trim() });
}

#[test]
fn a_daemon_keeps_only_what_serving_needs() {
    needs_mount();
    let mounted = Mounted::new();
    let pid = daemon_pid(&mounted.0);
    check_confined(&mounted.0, SYS_ADMIN);
    all_have(worker_pid(&mounted.0), "Uid", "0\t0\t0\t0");
    check_spared(pid);
    check_spared(worker_pid(&mounted.0));

    let disk = mounted.open_disk();
    disk.write_all_at(&[7; 4096], 4096).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    // SIGTERM: it takes the mount away by itself, with the one capability it has kept.
    assert!(Command::new("kill").arg(pid.to_string()).status().unwrap().success());
    mounted.wait_until_ended(pid);
    assert_eq!(fs::read_dir(mounted.0.path("mnt")).unwrap().count(), 0, "unmounted");
}

/// A place that belongs to another user, with the run directory.
fn anothers_place() -> Place {
    let place = Place::furnished();
    let owner = format!("{USER}:{USER}");
    for path in [place.path(""), place.run.path().to_str().unwrap().to_owned()] {
        assert!(Command::new("chown").args(["-R", &owner, &path]).status().unwrap().success());
    }
    place
}

/// Root mounted another user's store with root's rights, and its commands made root's files in it.
#[test]
fn the_store_of_another_user_is_served_and_changed_with_that_users_rights() {
    needs_mount();
    let mounted = Mounted::of(anothers_place());
    let place = &mounted.0;
    let pid = daemon_pid(place);
    check_confined(place, SYS_ADMIN);
    for pid in [pid, worker_pid(place)] {
        for field in ["Uid", "Gid"] {
            all_have(pid, field, &[USER.to_string().as_str(); 4].join("\t"));
        }
        all_have(pid, "Groups", "");
    }
    check_spared(pid);
    check_spared(worker_pid(place));
    let disk = mounted.open_disk();
    disk.write_all_at(&[7; 4096], 4096).unwrap();
    disk.sync_all().unwrap();
    let refusal = place.run(&["umount", &place.path("mnt")]);
    assert!(text(&refusal.stderr).contains("is in use: process"), "{}", text(&refusal.stderr));
    drop(disk);
    place.works(&["instance", "create", "late", "--image", "img"]);
    assert!(fs::metadata(place.path("mnt/instances/late/disk")).is_ok());
    mounted.umount();
    assert_eq!(fs::read_dir(place.path("mnt")).unwrap().count(), 0);
    for (path, _) in place.snapshot() {
        let found = fs::symlink_metadata(&path).unwrap();
        assert_eq!((found.uid(), found.gid()), (USER, USER), "{}", path.display());
    }
}

/// A path that the owner may not go is root's to go, for mounting and for unmounting.
#[test]
fn a_mountpoint_behind_a_closed_folder_is_left_again() {
    needs_mount();
    let place = Place::furnished();
    let owner = format!("{USER}:{USER}");
    for path in [place.path("store"), place.run.path().to_str().unwrap().to_owned()] {
        assert!(Command::new("chown").args(["-R", &owner, &path]).status().unwrap().success());
    }
    // The store can be reached, the mountpoint can not.
    assert!(Command::new("chmod").args(["0711", &place.path("")]).status().unwrap().success());
    fs::create_dir_all(place.path("closed/mnt")).unwrap();
    assert!(Command::new("chmod").args(["0700", &place.path("closed")]).status().unwrap().success());
    assert_eq!(place.works(&["mount", &place.path("closed/mnt")]), "");
    let pid = daemon_pid(&place);
    check_confined(&place, SYS_ADMIN | DAC_READ_SEARCH);
    assert!(fs::metadata(place.path("closed/mnt/instances/inst/disk")).is_ok());
    assert!(Command::new("kill").arg(pid.to_string()).status().unwrap().success());
    let mounted = Mounted(place);
    mounted.wait_until_ended(pid);
    assert_eq!(fs::read_dir(mounted.0.path("closed/mnt")).unwrap().count(), 0, "unmounted");
}

/// It failed for every such store, as its run directory is not root's; and what the owner could put there is not for
/// root's daemons to follow.
#[test]
fn root_keeps_the_console_of_another_users_guest_in_a_folder_of_its_own() {
    needs_mount();
    let mounted = Mounted::of(anothers_place());
    let domain = mounted.0.works(&["libvirt", "xml", "inst", "--domain", "--type", "qemu"]);
    let log = domain.split("<log file=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let folder = Path::new(log).parent().unwrap();
    let found = fs::symlink_metadata(folder).unwrap();
    fs::remove_dir(folder).unwrap();
    assert!(log.starts_with("/run/cowdisk/") && log.ends_with("/inst-console.log"), "{log}");
    assert_eq!((found.uid(), found.mode() & 0o7777, found.is_dir()), (0, 0o700, true));
}
