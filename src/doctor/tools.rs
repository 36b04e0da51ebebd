//! Programs that cowdisk works with: QEMU, libvirt, mount(8).

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;

use super::Line;
use crate::libvirt::kvm::{self, KvmAnswer};

/// Where programs are looked for besides `PATH`: an unprivileged user's often lacks the first two.
const USUAL_FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// How long a program may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// Bytes of an answer that are looked at.
const BYTES_MAX: u64 = 4096;

/// Looks at the programs.
pub(super) fn look() -> Vec<Line> {
    let mut lines = vec![qemu_img(), libvirt()];
    lines.extend(confinement());
    lines.extend([kvm_line(kvm::ask()), mount_helper()]);
    lines
}

/// The path of a program.
pub(super) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(USUAL_FOLDERS.map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    let metadata = std::fs::metadata(path);
    metadata.is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The first line that a program prints, if it ends well and in time.
fn first_line(program: &Path, arguments: &[&str]) -> Option<String> {
    // No pipe, which somebody whom the program has started and left behind could hold open.
    let mut said = File::from(rustix::fs::memfd_create("said", MemfdFlags::CLOEXEC).ok()?);
    let mut command = Command::new(program);
    // A look changes nothing: virsh would start a libvirtd of its user's own.
    command.env("LIBVIRT_AUTOSTART", "0");
    command.args(arguments).stdin(Stdio::null()).stdout(said.try_clone().ok()?).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    let end = Instant::now() + PATIENCE;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
        std::thread::sleep(PAUSE);
    }
    let _ = child.kill();
    child.wait().ok().filter(ExitStatus::success)?;
    let mut bytes = Vec::new();
    said.rewind().and_then(|()| said.take(BYTES_MAX).read_to_end(&mut bytes)).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

fn qemu_img() -> Line {
    let version = find_program("qemu-img").and_then(|path| first_line(&path, &["--version"]));
    match version {
        Some(version) => Line::ok("qemu-img", version),
        None => Line::warning(
            "qemu-img",
            "not found: only raw images can be imported",
            "install it: apt-get install qemu-utils",
        ),
    }
}

fn libvirt() -> Line {
    let Some(virsh) = find_program("virsh") else {
        let message = "virsh not found: cowdisk libvirt does not work";
        return Line::warning("libvirt", message, "install it: apt-get install libvirt-clients");
    };
    match first_line(&virsh, &["uri"]) {
        Some(uri) => Line::ok("libvirt", format!("libvirtd answers at {uri}")),
        None => Line::warning(
            "libvirt",
            "libvirtd does not answer",
            "start it: systemctl start libvirtd, or scripts/libvirtd run COMMAND where there is no systemd",
        ),
    }
}

/// What confines guests, if anything does.
fn confinement() -> Vec<Line> {
    let reads =
        |path: &str, value: &str| std::fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    let mut lines = Vec::new();
    if reads("/sys/module/apparmor/parameters/enabled", "Y") {
        let message = "guests may open disks by their names in the mount, and no others than disk, disk.*, *.raw, *.img";
        lines.push(Line::ok("apparmor", message));
    }
    if reads("/sys/fs/selinux/enforce", "1") {
        let allowed = ["use_fusefs", "virt_use_fusefs"]
            .iter()
            .any(|name| reads(&format!("/sys/fs/selinux/booleans/{name}"), "1 1"));
        lines.push(match allowed {
            true => Line::ok("selinux", "guests may open files of FUSE"),
            false => Line::warning(
                "selinux",
                "guests may not open files of FUSE",
                "allow it: setsebool -P virt_use_fusefs on",
            ),
        });
    }
    lines
}

fn kvm_line(answer: KvmAnswer) -> Line {
    let slow = "guests run by translation, at a tenth of the speed";
    match answer {
        KvmAnswer::Works => Line::ok("kvm", "a guest boots by it"),
        KvmAnswer::Closed(error) => {
            let next = match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "let this user in: usermod --append --groups kvm USER"
                }
                _ => "switch virtualization on in the firmware, or nested virtualization on the outer host",
            };
            Line::warning("kvm", format!("/dev/kvm: {error}: {slow}"), next)
        }
        KvmAnswer::Fails => Line::warning(
            "kvm",
            format!("/dev/kvm is there, but a guest does not boot by it: {slow}"),
            "see what the kernel says: dmesg",
        ),
        KvmAnswer::Unknown(error) => Line::warning(
            "kvm",
            format!("/dev/kvm is there, but was not tried: {error}"),
            "install QEMU: apt-get install qemu-system-x86",
        ),
    }
}

fn mount_helper() -> Line {
    let found = ["/sbin/mount.cowdisk", "/usr/sbin/mount.cowdisk"].map(Path::new);
    match found.into_iter().find(|path| is_program(path)) {
        Some(path) => Line::ok("mount helper", format!("{}: /etc/fstab may name stores", path.display())),
        None => Line::warning(
            "mount helper",
            "mount.cowdisk is not installed: /etc/fstab cannot name a store",
            "install target/release/mount-cowdisk /sbin/mount.cowdisk",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_and_asked_and_those_that_fail_tell_nothing() {
        let echo = find_program("echo").unwrap();
        assert_eq!(first_line(&echo, &["", "one"]).as_deref(), Some("one"));
        let fails = find_program("false").unwrap();
        assert_eq!(first_line(&fails, &[]), None);
        assert_eq!(find_program("no-such-program"), None);
    }

    /// It was waited for, as it held the pipe.
    #[test]
    fn who_is_left_behind_by_a_program_is_not_waited_for() {
        let shell = find_program("sh").unwrap();
        let left = first_line(&shell, &["-c", "sleep 1000 & echo $!"]).unwrap();
        let left = rustix::process::Pid::from_raw(left.parse().unwrap()).unwrap();
        rustix::process::kill_process(left, rustix::process::Signal::KILL).unwrap();
    }
}
