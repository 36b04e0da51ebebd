//! The kernel, its FUSE, and what this user may do with them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::Line;
use super::tools::find_program;
use crate::daemon::may_mount;
use crate::error::{Context, Error, ErrorKind};
use crate::transport::mount::check_device;
use crate::transport::{Transport, require_cold_reads};

/// The first kernel that sends requests again after a kill (FUSE_NOTIFY_RESEND).
const RESENDS: (u32, u32) = (6, 9);

/// The first kernel that can serve files by itself (FUSE passthrough).
const PASSES_THROUGH: (u32, u32) = (6, 9);

/// Files that the daemon has open besides those of disks, and for each disk: map, data twice, base, live map.
const FILES_OF_DAEMON: u64 = 100;
const FILES_PER_DISK: u64 = 5;
/// Open disks that any host should have room for.
const DISKS_MIN: u64 = 100;

/// Looks at the kernel.
pub(super) fn look() -> Vec<Line> {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy().into_owned();
    let version = version_of(&release);
    let root = rustix::process::geteuid().is_root();
    let mounts_itself = may_mount();
    let mut lines = vec![kernel(&release, version), fuse(), rights(root, mounts_itself)];
    if !root {
        lines.push(fuse_conf());
    }
    lines.extend([passthrough(version, mounts_itself), uring(), cold_reads(), open_files(), locked_memory()]);
    lines
}

/// Major and minor number of a kernel's release, such as `6.18.44-fc`.
fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel(release: &str, version: Option<(u32, u32)>) -> Line {
    match version {
        Some(version) if version >= RESENDS => {
            Line::ok("kernel", format!("Linux {release}: guests go on when the daemon is killed"))
        }
        Some(_) => Line::warning(
            "kernel",
            format!("Linux {release}: if the daemon is killed, guests get I/O errors"),
            "run Linux 6.9 or newer, which sends unanswered requests to the next daemon",
        ),
        None => Line::warning(
            "kernel",
            format!("Linux {release}: its version is not understood"),
            "see that it is 6.9 or newer",
        ),
    }
}

fn fuse() -> Line {
    match check_device() {
        Ok(()) => Line::ok("fuse", "/dev/fuse can be opened"),
        Err(error) => {
            let next = error.hint().unwrap_or("see what the device is: ls -l /dev/fuse").to_owned();
            Line::problem("fuse", error.to_string(), next)
        }
    }
}

fn rights(root: bool, mounts_itself: bool) -> Line {
    if mounts_itself {
        return Line::ok("rights", "this user may mount");
    }
    if root {
        let message = "root without CAP_SYS_ADMIN may not mount";
        return Line::problem("rights", message, "run outside of the container, or give it CAP_SYS_ADMIN");
    }
    let install = "install it: apt-get install fuse3";
    match find_program("fusermount3") {
        None => Line::problem("rights", "this user may not mount, and there is no fusermount3", install),
        Some(path) if !is_setuid(&path) => {
            let message = format!("this user may not mount, and {} is not setuid root", path.display());
            Line::problem("rights", message, "install it anew: apt-get install --reinstall fuse3")
        }
        Some(path) => Line::ok("rights", format!("this user mounts by {}", path.display())),
    }
}

fn is_setuid(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o4000 != 0)
}

/// Whether users may let others, such as QEMU's user, into their mounts.
fn fuse_conf() -> Line {
    let text = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    match text.lines().any(|line| line.trim() == "user_allow_other") {
        true => Line::ok("allow_other", "users may let others into their mounts"),
        false => Line::warning(
            "allow_other",
            "only this user's own guests can open the disks, not those of the system's libvirtd",
            "as root: echo user_allow_other >> /etc/fuse.conf",
        ),
    }
}

fn passthrough(version: Option<(u32, u32)>, mounts_itself: bool) -> Line {
    let message = match (version.is_some_and(|version| version >= PASSES_THROUGH), mounts_itself) {
        (true, true) => {
            "the kernel can serve disks that are plain files by itself, where a mount has -o passthrough=auto"
        }
        (true, false) => {
            "the kernel serves disks that are plain files by itself only for who has CAP_SYS_ADMIN"
        }
        (false, _) => {
            "the daemon serves disks that are plain files, as all others: Linux 6.9 and newer could by itself"
        }
    };
    Line::ok("passthrough", message)
}

fn uring() -> Line {
    let message = match Transport::IoUring.require() {
        Ok(()) => {
            "-o transport=io_uring serves by it; upgrades work, but a crash cuts the mount off".to_owned()
        }
        Err(error) => format!("-o transport=io_uring is refused: {error}"),
    };
    Line::ok("io_uring", message)
}

fn cold_reads() -> Line {
    // As a daemon is: with no capability in effect. Where kernel.io_uring_disabled is 1, that makes the difference.
    let tried = std::thread::spawn(|| {
        let mut own = capabilities(None).context(|| "look at capabilities")?;
        own.effective = CapabilitySet::empty();
        set_capabilities(None, own).context(|| "give up capabilities")?;
        require_cold_reads()
    });
    let tried = tried.join().unwrap_or_else(|_told| Err(Error::new(ErrorKind::Io, "trying it panicked")));
    let message = match tried {
        Ok(()) => {
            "small reads of bases that are not in memory go by io_uring: no thread waits for them".to_owned()
        }
        Err(error) => format!("threads wait for reads of bases that are not in memory: {error}"),
    };
    Line::ok("cold reads", message)
}

fn open_files() -> Line {
    let limit = getrlimit(Resource::Nofile).maximum;
    let Some(limit) = limit else { return Line::ok("open files", "without limit") };
    let disks = limit.saturating_sub(FILES_OF_DAEMON) / FILES_PER_DISK;
    let message = format!("at most {limit}: {disks} disks in use at the same time");
    match disks {
        DISKS_MIN.. => Line::ok("open files", message),
        _ => Line::warning("open files", message, "raise the hard limit: ulimit -Hn, or LimitNOFILE="),
    }
}

fn locked_memory() -> Line {
    let message = match getrlimit(Resource::Memlock).maximum {
        None => "without limit".to_owned(),
        Some(limit) => format!("at most {limit} bytes; cowdisk locks none"),
    };
    Line::ok("locked memory", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn releases_of_kernels_are_understood() {
        assert_eq!(version_of("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version_of("7.0-rc1"), Some((7, 0)));
        assert_eq!(version_of("custom"), None);
    }

    #[test]
    fn passthrough_takes_a_kernel_and_a_right() {
        let message = |version, may| passthrough(version, may).message;
        assert!(message(Some((6, 9)), true).contains("passthrough=auto"));
        assert!(message(Some((6, 9)), false).contains("CAP_SYS_ADMIN"));
        for version in [Some((6, 8)), None] {
            assert!(message(version, true).contains("6.9"));
        }
    }

    #[test]
    fn a_kernel_that_sends_nothing_again_is_warned_of() {
        assert_eq!(kernel("6.9.0", version_of("6.9.0")).verdict, Verdict::Ok);
        for release in ["6.8.12", "5.15.0", "custom"] {
            let line = kernel(release, version_of(release));
            assert_eq!(line.verdict, Verdict::Warning, "{release}");
            assert!(line.next.is_some());
        }
    }
}
