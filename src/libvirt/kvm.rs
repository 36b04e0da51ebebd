//! Whether KVM really boots a guest here.
//!
//! That `/dev/kvm` can be opened says little: in many nested and emulated environments it is there and a guest hangs in its
//! firmware. So one guest is booted, once per boot of the host: 512 bytes of boot sector that write to a port which
//! makes QEMU exit. KVM that works takes some 100 ms for it.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;

use super::domain::Accelerator;
use crate::error::{Context as _, Result};

/// How long the guest may take.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// How often a running QEMU is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Bytes of the boot disk. The firmware does not boot from a disk of a single sector.
const DISK_BYTES: u64 = 1 << 20;

/// The port of QEMU's isa-debug-exit device, and what is written there.
const EXIT_PORT: u8 = 0xf4;
const EXIT_VALUE: u8 = 0x2a;

/// QEMU's exit code for that value.
const EXIT_CODE: i32 = (EXIT_VALUE as i32) << 1 | 1;

/// Programs that emulate an x86-64 machine, by distribution.
const PROGRAMS: [&str; 3] = ["qemu-system-x86_64", "/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm"];

/// What a domain should be run by: KVM where a guest has booted by it, else QEMU's translator. The answer is kept in
/// `run_dir` until the host boots again.
pub fn accelerator(run_dir: &Path) -> Accelerator {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        log::info!("no KVM: open /dev/kvm: {error}");
        return Accelerator::Qemu;
    }
    let Some(boot) = boot_id() else { return Accelerator::Qemu };
    let (works, fails) =
        (run_dir.join(format!("kvm-works-{boot}")), run_dir.join(format!("kvm-fails-{boot}")));
    if works.exists() {
        return Accelerator::Kvm;
    }
    if fails.exists() {
        return Accelerator::Qemu;
    }
    let (answer, marker) = match boots(Accelerator::Kvm) {
        Ok(true) => (Accelerator::Kvm, works),
        Ok(false) => (Accelerator::Qemu, fails),
        Err(error) => {
            log::warn!("cannot tell whether KVM works, guests run by translation: {error}");
            return Accelerator::Qemu;
        }
    };
    if let Err(error) = File::create(&marker) {
        log::debug!("cannot keep the answer in {}: {error}", marker.display());
    }
    answer
}

/// What a trial of KVM came to.
#[derive(Debug)]
pub enum KvmAnswer {
    /// A guest has booted by it.
    Works,
    /// Its device is not there, or closed to this user.
    Closed(std::io::Error),
    /// Its device is there, but no guest boots by it.
    Fails,
    /// It could not be tried.
    Unknown(crate::error::Error),
}

/// Tries KVM, whatever is kept of an earlier trial, and keeps nothing. Takes at most 5 seconds.
pub fn ask() -> KvmAnswer {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return KvmAnswer::Closed(error);
    }
    match boots(Accelerator::Kvm) {
        Ok(true) => KvmAnswer::Works,
        Ok(false) => KvmAnswer::Fails,
        Err(error) => KvmAnswer::Unknown(error),
    }
}

fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// Whether the boot sector runs. An error says that it could not be tried.
fn boots(accelerator: Accelerator) -> Result<bool> {
    // Inherited by nobody; QEMU opens it by its name while this process lives.
    let disk =
        rustix::fs::memfd_create("cowdisk-kvm-probe", MemfdFlags::CLOEXEC).context(|| "make a boot disk")?;
    let mut disk = File::from(disk);
    disk.write_all(&boot_sector()).context(|| "write a boot disk")?;
    disk.set_len(DISK_BYTES).context(|| "write a boot disk")?;
    let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd()));
    let mut child = PROGRAMS
        .iter()
        .find_map(|program| qemu(program, accelerator, &path).spawn().ok())
        .ok_or(rustix::io::Errno::NOENT)
        .context(|| "run qemu-system-x86_64")?;
    let started = Instant::now();
    while started.elapsed() < TIME_LIMIT {
        if let Some(status) = child.try_wait().context(|| "wait for QEMU")? {
            log::info!("QEMU with {accelerator:?}: {status} after {} ms", started.elapsed().as_millis());
            return Ok(status.code() == Some(EXIT_CODE));
        }
        thread::sleep(POLL_INTERVAL);
    }
    let _ = child.kill();
    let _ = child.wait();
    log::info!("a guest with {accelerator:?} hangs");
    Ok(false)
}

fn qemu(program: &str, accelerator: Accelerator, disk: &Path) -> Command {
    let (machine, cpu) = match accelerator {
        Accelerator::Kvm => ("q35,accel=kvm", "host"),
        Accelerator::Qemu => ("q35,accel=tcg", "max"),
    };
    let mut command = Command::new(program);
    command
        .args(["-nodefaults", "-no-user-config", "-machine", machine, "-cpu", cpu, "-m", "16"])
        .args(["-display", "none", "-no-reboot", "-device"])
        .arg(format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"))
        .args(["-device", "ide-hd,drive=boot", "-drive"])
        .arg(format!("if=none,id=boot,format=raw,file.locking=off,file={}", disk.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// 16-bit code: `mov al, VALUE; out PORT, al; hlt; jmp` to the `hlt`; then the mark of a boot sector.
fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    let code = [0xb0, EXIT_VALUE, 0xe6, EXIT_PORT, 0xf4, 0xeb, 0xfd];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_sector_boots_where_guests_do() {
        // Translation works everywhere: if the probe fails by it, the probe is wrong.
        assert!(boots(Accelerator::Qemu).expect("qemu-system-x86_64, of qemu-system-x86"));
    }

    #[test]
    fn the_answer_is_kept() {
        if !Path::new("/dev/kvm").exists() {
            eprintln!("skipped: no /dev/kvm");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let boot = boot_id().unwrap();
        File::create(folder.path().join(format!("kvm-works-{boot}"))).unwrap();
        assert_eq!(accelerator(folder.path()), Accelerator::Kvm);
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join(format!("kvm-fails-{boot}"))).unwrap();
        assert_eq!(accelerator(folder.path()), Accelerator::Qemu);
    }
}
