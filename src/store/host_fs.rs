//! Whether a host filesystem can hold a store: found out by doing it, not by a list of names.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;

use super::atomic::DraftFile;
use super::dir::Dir;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{FileStorage, HostSpace, Storage};

/// Bytes written and punched: at least two blocks of any filesystem.
const PROBE_BYTES: u64 = 128 << 10;
/// The end of the probe's sparse file.
const PROBE_END: u64 = 64 << 30;

/// Begins the name of the file with which a filesystem is tried.
const PROBE: &str = "probe";

/// Whether a file is what a crash left of [`check`].
pub(super) fn is_probe(name: &str) -> bool {
    name.strip_prefix(PROBE).is_some_and(|rest| rest.starts_with('-'))
}

/// Makes a sparse file in `folder`, punches a hole into it and looks whether it is one.
///
/// # Errors
/// [`ErrorKind::Unsupported`], with the name of the filesystem, if it cannot; those of the host if it fails.
pub(super) fn check(folder: &Dir) -> Result<()> {
    try_holes(DraftFile::new(folder, PROBE)?.file(), folder)
}

/// [`check`] on an empty file of `folder`.
fn try_holes(probe: &FileStorage, folder: &Dir) -> Result<()> {
    let file = probe.file();
    let unsupported = |what: &str| {
        Error::new(ErrorKind::Unsupported, format!("the host filesystem ({}) has no {what}", name(folder)))
            .with_hint("keep the store on ext4, XFS or btrfs")
    };
    let bytes = vec![0xa5; usize::try_from(PROBE_BYTES).unwrap_or(0)];
    probe.write_at(0, &bytes)?;
    // A disk that is full or fails says nothing of what the filesystem can do.
    let refused = |error: Error, what: &str| match error.kind() {
        ErrorKind::Unsupported | ErrorKind::OutOfRange => unsupported(what),
        _ => error,
    };
    probe.set_len(PROBE_END).map_err(|error| refused(error, "sparse files of 64 GiB"))?;
    probe.punch(0, PROBE_BYTES).map_err(|error| refused(error, "hole punching"))?;
    let mut byte = [1];
    file.read_exact_at(&mut byte, 0).context(|| "read from the host filesystem")?;
    let data = rustix::fs::seek(file, SeekFrom::Data(0));
    if byte != [0] || data != Err(rustix::io::Errno::NXIO) {
        return Err(unsupported("holes that can be found (SEEK_DATA)"));
    }
    let stat = rustix::fs::fstat(file).context(|| "look up a file on the host filesystem")?;
    if stat.st_blocks.cast_unsigned() * 512 > PROBE_BYTES {
        return Err(unsupported("sparse files"));
    }
    Ok(())
}

/// What a host filesystem can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFeatures {
    /// Its name, or the number by which the kernel knows it.
    pub name: String,
    /// Whether it could be tried. If not, the others say nothing.
    pub tried: bool,
    /// Files of 64 GiB of which only what was written takes space, and holes can be made and found. Nothing works without.
    pub holes: bool,
    /// Reads and writes past the host's cache.
    pub direct: bool,
    /// It tells which parts of a file have space (FIEMAP).
    pub extents: bool,
    /// It is in memory.
    pub memory: bool,
}

/// Tries the host filesystem under `folder`, on a file without a name, which a crash does not leave either.
///
/// # Errors
/// Those of the host but for those that answer the question: no such folder, a full or failing disk.
pub fn try_host(folder: &Path) -> Result<HostFeatures> {
    let dir = Dir::open_path(folder)?;
    let memory = is_memory(&dir);
    let mut features =
        HostFeatures { name: name(&dir), tried: false, holes: false, direct: false, extents: false, memory };
    let Some(file) = dir.nameless_file()? else { return Ok(features) };
    features.tried = true;
    features.holes = match try_holes(&file, &dir) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::Unsupported => false,
        Err(error) => return Err(error),
    };
    features.direct = file.can_go_direct();
    features.extents = file.tells_extents();
    Ok(features)
}

/// The name of the filesystem that a folder is on, or the number by which the kernel knows it.
fn name(dir: &Dir) -> String {
    const NAMES: [(u32, &str); 17] = [
        (0xef53, "ext4"),
        (0x5846_5342, "xfs"),
        (0x9123_683e, "btrfs"),
        (0x0102_1994, "tmpfs"),
        (0x8584_58f6, "ramfs"),
        (0x794c_7630, "overlay"),
        (0x6969, "nfs"),
        (0xff53_4d42, "cifs"),
        (0xfe53_4d42, "smb2"),
        (0x4d44, "vfat"),
        (0x2011_bab0, "exfat"),
        (0x7366_746e, "ntfs3"),
        (0x6573_5546, "fuse"),
        (0x0102_1997, "9p"),
        (0x2fc1_2fc1, "zfs"),
        (0xf2f5_2010, "f2fs"),
        (0x3153_464a, "jfs"),
    ];
    let Ok(statfs) = rustix::fs::fstatfs(dir) else { return "unknown".to_owned() };
    let known = NAMES.iter().find(|(magic, _)| i128::from(statfs.f_type) == i128::from(*magic));
    known.map_or_else(|| format!("type {:#x}", statfs.f_type), |(_, name)| (*name).to_owned())
}

/// Whether a folder is in memory: gone after a reboot, and never written to a disk.
pub(super) fn is_memory(dir: &Dir) -> bool {
    ["tmpfs", "ramfs"].contains(&name(dir).as_str())
}

/// The space of the filesystem that an open folder is on. Where a quota of the folder's project holds, filesystems answer
/// with that. One that does not say how large it is (ramfs, say) counts as endless.
pub(super) fn space(dir: &impl AsFd) -> Result<HostSpace> {
    let stat = rustix::fs::fstatvfs(dir).context(|| "look at the space of the host filesystem")?;
    if stat.f_blocks == 0 {
        return Ok(HostSpace { total: u64::MAX, free: u64::MAX, available: u64::MAX });
    }
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok(HostSpace { total: bytes(stat.f_blocks), free: bytes(stat.f_bfree), available: bytes(stat.f_bavail) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filesystem_with_holes_passes_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let dir = Dir::open_path(folder.path()).unwrap();
        check(&dir).unwrap();
        assert!(dir.names().unwrap().is_empty());
    }

    #[test]
    fn a_filesystem_without_holes_is_refused_by_name() {
        // The kernel's own sysfs and proc cannot be written to at all; any error must come back as one, not a panic.
        let proc = Dir::open_path(std::path::Path::new("/proc/self")).unwrap();
        assert!(check(&proc).is_err());
    }

    #[test]
    fn a_filesystem_is_tried_without_a_trace() {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let before = std::fs::metadata(folder.path()).unwrap().modified().unwrap();
        let features = try_host(folder.path()).unwrap();
        assert!(features.tried && features.holes, "{features:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(std::fs::metadata(folder.path()).unwrap().modified().unwrap(), before);
        assert!(!try_host(Path::new("/proc/self")).unwrap().tried);
    }
}
