//! What is mounted where, as this process sees it: `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::transport::mount::FS_TYPE;

/// One line of `mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Major and minor number of its device, which is the `st_dev` of every file in it.
    pub device: (u32, u32),
    /// `ext4`, `fuse.cowdisk`, …
    pub fs_type: String,
    /// What is mounted: for a mount of ours the directory of the store.
    pub source: PathBuf,
    /// The user who mounted it, as the kernel knows him, if it is a FUSE mount.
    pub user: Option<u32>,
}

impl MountEntry {
    /// Whether this is a store of cowdisk.
    pub fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }

    /// Whether it is what it says: a store, mounted by its owner. Any user may mount something of his own under our type
    /// and another store's name.
    pub fn is_of_its_store(&self) -> bool {
        let owner = rustix::fs::stat(&self.source).map(|stat| stat.st_uid);
        self.is_ours() && owner.is_ok_and(|owner| Some(owner) == self.user)
    }
}

/// Every mount that this process sees, in the order in which they were made.
///
/// # Errors
/// If `/proc` is not there.
pub fn mounts() -> Result<Vec<MountEntry>> {
    let text = std::fs::read("/proc/self/mountinfo").context(|| "read /proc/self/mountinfo")?;
    Ok(parse(&text))
}

/// The topmost of `mounts` at exactly `path`.
pub fn mount_at<'a>(mounts: &'a [MountEntry], path: &Path) -> Option<&'a MountEntry> {
    mounts.iter().rev().find(|mount| mount.mountpoint == path)
}

/// The mounts of a `mountinfo` file; lines that do not follow its form are passed over.
pub(super) fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mount options [optional…] - type source super-options`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let mountpoint = unescape(fields.nth(1)?);
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    let options = fields.next().and_then(|options| std::str::from_utf8(options).ok()).unwrap_or_default();
    let user = options.split(',').find_map(|option| option.strip_prefix("user_id=")?.parse().ok());
    Some(MountEntry { mountpoint, device: (major.parse().ok()?, minor.parse().ok()?), fs_type, source, user })
}

/// Undoes the kernel's `\040` for a space, a tab, a newline, a `#` or a backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        match (byte, octal(after)) {
            (b'\\', Some(value)) => {
                bytes.push(value);
                rest = &after[3..];
            }
            _ => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

fn octal(digits: &[u8]) -> Option<u8> {
    let digits = digits.get(..3)?;
    digits.iter().all(|digit| (b'0'..=b'7').contains(digit)).then_some(())?;
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

/// `path` as a message and `mountinfo` know it: absolute, without links, without `.` and `..`. A dead mount at its end
/// does no harm: only the way to it is walked.
///
/// # Errors
/// If a folder on the way does not exist.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    if path.as_os_str().as_bytes().is_empty() {
        return Err(Error::new(ErrorKind::Invalid, "an empty path"));
    }
    std::fs::canonicalize(path).context(|| format!("{}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        30 22 0:45 / /mnt/my\\040disks rw,nosuid,nodev,noexec,relatime - fuse.cowdisk /srv/a\\134b rw,user_id=0\n\
        31 22 0:46 / /mnt/my\\040disks rw master:3 propagate_from:2 - tmpfs tmpfs rw\n\
        nonsense\n";

    #[test]
    fn lines_are_read_and_escapes_undone() {
        let mounts = parse(TEXT);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[1].mountpoint, Path::new("/mnt/my disks"));
        assert_eq!(mounts[1].source, Path::new("/srv/a\\b"));
        assert_eq!(mounts[1].device, (0, 45));
        assert!(mounts[1].is_ours());
        assert!(!mounts[0].is_ours());
        assert_eq!((mounts[0].user, mounts[1].user), (None, Some(0)));
    }

    /// A user could mount something of his own in the name of another's store, and root's `umount STORE` took that away.
    #[test]
    fn a_mount_by_another_user_is_not_of_the_store_that_it_names() {
        let store = tempfile::tempdir().unwrap();
        let owner = rustix::process::geteuid().as_raw();
        let mount = |user| {
            let name = store.path().display();
            let line = format!("30 22 0:45 / /mnt rw - fuse.cowdisk {name} rw,user_id={user},group_id=0\n");
            parse(line.as_bytes()).remove(0)
        };
        assert!(mount(owner).is_of_its_store());
        assert!(!mount(owner + 1000).is_of_its_store());
    }

    #[test]
    fn the_topmost_mount_counts() {
        let mounts = parse(TEXT);
        assert_eq!(mount_at(&mounts, Path::new("/mnt/my disks")).unwrap().fs_type, "tmpfs");
        assert_eq!(mount_at(&mounts, Path::new("/mnt")), None);
    }
}
