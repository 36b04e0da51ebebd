//! What `stat` shows of a file, and what may be changed about it.

use std::time::{Duration, SystemTime};

/// Permission bits that a file can have. Set-user-ID, set-group-ID and sticky bits have no meaning on a disk and are
/// dropped, so that a write never has to clear them.
pub const MODE_BITS: u32 = 0o777;

/// Kind of a file in the mounted tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A disk, an image, a kernel or a ramdisk.
    Regular,
    /// A symbolic link.
    Symlink,
}

/// What `stat` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub ino: u64,
    /// Kind of the file.
    pub kind: FileKind,
    /// Permission bits, within [`MODE_BITS`].
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names; 1 for a directory whose subdirectories are not counted.
    pub links: u32,
    /// Bytes of the file.
    pub size: u64,
    /// Bytes that it takes of the host's disk.
    pub allocated: u64,
    /// Last access.
    pub atime: SystemTime,
    /// Last change of the content.
    pub mtime: SystemTime,
    /// Last change of content; that of owner, mode and extended attributes is not kept.
    pub ctime: SystemTime,
    /// Whether name and attributes stay as they are as long as the mount lives.
    pub fixed: bool,
}

impl Attributes {
    /// How long the kernel may trust a name that it has looked up, or attributes that it was told. Instances come and
    /// go, and disks grow and shrink in allocation, without the kernel's doing: only what is fixed may be kept.
    pub fn trusted_for(&self) -> Duration {
        if self.fixed { Duration::from_secs(3600) } else { Duration::ZERO }
    }
}

/// A time to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The host's time of now.
    Now,
    /// This one.
    To(SystemTime),
}

/// What `chown`, `chmod`, `utimensat` and `ftruncate` ask for; `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttributeChanges {
    /// Permission bits; other bits of a mode are passed over.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes of the file.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the content.
    pub mtime: Option<SetTime>,
}
