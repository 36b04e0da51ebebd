//! Who keeps a mount from being taken away.
//!
//! `/proc` is asked, not the mount: attributes come from the kernel's cache, so a dead daemon does not hang the search.
//! The device number finds users in other mount namespaces too, where QEMU under libvirt lives.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::mounts;

/// Most holders that a message names.
const SHOWN_MAX: usize = 8;

/// A process that uses a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// What it runs: the name of the program.
    pub command: String,
    /// A file or folder of the mount that it uses, as the process sees it.
    pub path: PathBuf,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({}) uses {}", self.pid, self.command, self.path.display())
    }
}

/// Every use of the mounted device by a process, each path once per process. Processes of other users are only seen by
/// root; those that end meanwhile are not seen.
pub fn holders(device: (u32, u32)) -> Vec<Holder> {
    let mut found = Vec::new();
    for pid in pids() {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let mut paths = paths_in_use(&folder, device);
        paths.sort();
        paths.dedup();
        let command = command(&folder);
        found.extend(paths.into_iter().map(|path| Holder { pid, command: command.clone(), path }));
    }
    found
}

/// Whether some process has the device in its mount namespace, whether it uses it or not.
pub fn is_seen_mounted(device: (u32, u32)) -> bool {
    pids().into_iter().any(|pid| {
        std::fs::read(format!("/proc/{pid}/mountinfo"))
            .is_ok_and(|text| mounts::parse(&text).iter().any(|mount| mount.device == device))
    })
}

/// A line that names holders: all of a few, the first of many.
pub fn describe(holders: &[Holder]) -> String {
    let mut text = holders.iter().take(SHOWN_MAX).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if holders.len() > SHOWN_MAX {
        text.push_str(&format!("; and {} more", holders.len() - SHOWN_MAX));
    }
    text
}

fn pids() -> Vec<u32> {
    let Ok(folder) = std::fs::read_dir("/proc") else { return Vec::new() };
    folder.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn command(process: &Path) -> String {
    let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
    match name.trim() {
        "" => "?".to_owned(),
        name => name.chars().filter(|c| !c.is_control()).collect(),
    }
}

fn paths_in_use(process: &Path, device: (u32, u32)) -> Vec<PathBuf> {
    let mut links = vec![process.join("cwd"), process.join("root"), process.join("exe")];
    if let Ok(entries) = std::fs::read_dir(process.join("fd")) {
        links.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    let linked =
        links.into_iter().filter(|link| is_on(link, device)).filter_map(|link| std::fs::read_link(link).ok());
    linked.chain(mapped_files(process, device)).collect()
}

/// Files that a process has mapped. Its `map_files` would say the same, in a system call for each of what may be tens of
/// thousands of mappings.
fn mapped_files(process: &Path, (major, minor): (u32, u32)) -> Vec<PathBuf> {
    let Ok(maps) = std::fs::read(process.join("maps")) else { return Vec::new() };
    let device = format!("{major:02x}:{minor:02x}");
    maps.split(|&byte| byte == b'\n')
        .filter_map(|line| {
            // Addresses, rights, offset, device, inode, and, behind more spaces, the path up to the end of the line.
            let mut fields = line.splitn(6, |&byte| byte == b' ');
            let on_device = fields.nth(3)? == device.as_bytes();
            let path = fields.nth(1)?.trim_ascii_start();
            on_device.then(|| PathBuf::from(OsStr::from_bytes(path)))
        })
        .collect()
}

/// Whether the file behind a link of `/proc` lies on `device`.
fn is_on(link: &Path, device: (u32, u32)) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(CWD, link, flags, StatxFlags::TYPE)
        .is_ok_and(|stat| (stat.stx_dev_major, stat.stx_dev_minor) == device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_of_this_process_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap().join("held");
        let file = std::fs::File::create(&path).unwrap();
        let device = rustix::fs::fstat(&file).unwrap().st_dev;
        let found = holders((rustix::fs::major(device), rustix::fs::minor(device)));
        let own = found.iter().find(|holder| holder.path == path).expect("the file is held by us");
        assert_eq!(own.pid, std::process::id());
        assert!(own.to_string().contains(path.to_str().unwrap()));
    }

    #[test]
    fn a_mapped_file_of_this_process_is_found() {
        let program = std::env::current_exe().unwrap();
        let device = rustix::fs::stat(&program).unwrap().st_dev;
        let device = (rustix::fs::major(device), rustix::fs::minor(device));
        assert!(mapped_files(Path::new("/proc/self"), device).contains(&program));
        assert!(mapped_files(Path::new("/proc/self"), (device.0, device.1 + 1)).is_empty());
    }

    #[test]
    fn a_message_names_a_few_of_many() {
        let holder = Holder { pid: 7, command: "qemu".into(), path: "/mnt/disk".into() };
        assert_eq!(describe(std::slice::from_ref(&holder)), "process 7 (qemu) uses /mnt/disk");
        assert!(describe(&vec![holder; 20]).ends_with("; and 12 more"));
    }
}
