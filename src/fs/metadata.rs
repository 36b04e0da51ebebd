//! Changing what is kept beside a file's content: owner, mode, times, size, extended attributes.

use std::ffi::OsStr;

use super::attributes::{AttributeChanges, Attributes, MODE_BITS};
use super::errno::{Errno, Outcome};
use super::inodes::Node;
use super::tree::or_stale;
use super::{Fs, RequestId};
use crate::store::{self, FileRef};
use crate::units::DISK_BYTES_MAX;

/// Namespaces of extended attributes that a file keeps.
const NAMESPACES: [&str; 3] = ["user.", "trusted.", "security."];

/// Capabilities of a program: no disk is one, and the kernel need not look for them before each write.
const CAPABILITIES: &str = "security.capability";

/// Bytes of a list of names, the most that Linux passes on.
const NAMES_BYTES_MAX: usize = 64 << 10;

impl Fs {
    /// Changes owner, mode, times or size of a file; durable on return. All checks come first, so a refused change
    /// changes nothing.
    ///
    /// # Errors
    /// [`Errno::NOT_PERMITTED`] for a smaller size, and for a directory or a link; [`Errno::READ_ONLY`] for size or times
    /// of an image, a kernel or a ramdisk; [`Errno::TOO_BIG`] above the largest disk; [`Errno::INVALID`] for a size that
    /// is no multiple of 512.
    pub fn change(&self, ino: u64, changes: &AttributeChanges) -> Outcome<Attributes> {
        let node = self.node(ino)?;
        let file = self.tree.file_ref(&node)?.ok_or(Errno::NOT_PERMITTED)?;
        let is_disk = matches!(node, Node::Disk { .. });
        let times = changes.atime.is_some() || changes.mtime.is_some();
        if !is_disk && (changes.size.is_some() || times) {
            return Err(Errno::READ_ONLY.into());
        }
        if let Some(size) = changes.size {
            self.grow(ino, &node, size)?;
        }
        if changes.uid.is_some() || changes.gid.is_some() || changes.mode.is_some() {
            self.update(&file, |record| {
                record.uid = changes.uid.unwrap_or(record.uid);
                record.gid = changes.gid.unwrap_or(record.gid);
                record.mode = changes.mode.map_or(record.mode, |mode| mode & MODE_BITS);
                Ok(())
            })?;
        }
        if times {
            self.tree.set_times(&node, changes.atime, changes.mtime)?;
        }
        self.attributes(ino)
    }

    fn grow(&self, ino: u64, node: &Node, size: u64) -> Outcome<()> {
        let now = self.tree.attributes(node, &self.disks)?.size;
        if size < now {
            return Err(Errno::NOT_PERMITTED.into());
        }
        if size > DISK_BYTES_MAX {
            return Err(Errno::TOO_BIG.into());
        }
        if size == now {
            return Ok(());
        }
        let disk = self.tree.acquire_disk(node, &self.disks, self.is_kept(ino))?;
        let grown = disk.change(|disk| disk.grow(size));
        let closed = self.disks.release(disk);
        grown?;
        Ok(closed?)
    }

    /// Reads the record of a file, has it changed and writes it back.
    fn update(
        &self,
        file: &FileRef,
        change: impl FnOnce(&mut store::Attributes) -> Outcome<()>,
    ) -> Outcome<()> {
        let _held = self.records.lock();
        let mut record = or_stale(self.tree.store().attributes(file))?;
        let before = record.clone();
        change(&mut record)?;
        if record != before {
            or_stale(self.tree.store().set_attributes(file, &record))?;
        }
        Ok(())
    }

    /// The value of an extended attribute.
    ///
    /// # Errors
    /// [`Errno::NO_DATA`] if there is none; [`Errno::NOT_SUPPORTED`] for a namespace that is not kept.
    pub fn xattr(&self, ino: u64, name: &OsStr) -> Outcome<Vec<u8>> {
        let name = kept_name(name)?;
        let node = self.node(ino)?;
        let file = self.tree.file_ref(&node)?.ok_or(Errno::NO_DATA)?;
        let mut record = or_stale(self.tree.store().attributes(&file))?;
        Ok(record.xattrs.remove(name).ok_or(Errno::NO_DATA)?)
    }

    /// The names of all extended attributes, each ended by a zero byte.
    ///
    /// # Errors
    /// Those of the store.
    pub fn xattr_names(&self, ino: u64) -> Outcome<Vec<u8>> {
        let node = self.node(ino)?;
        let Some(file) = self.tree.file_ref(&node)? else { return Ok(Vec::new()) };
        let record = or_stale(self.tree.store().attributes(&file))?;
        Ok(record.xattrs.keys().flat_map(|name| name.bytes().chain([0])).collect())
    }

    /// Sets an extended attribute; durable on return. `flags` may hold XATTR_CREATE (it must not be there yet) or
    /// XATTR_REPLACE (it must be there).
    ///
    /// # Errors
    /// [`Errno::EXISTS`] and [`Errno::NO_DATA`] as the flags ask; [`Errno::NO_ROOM`] if there are too many;
    /// [`Errno::NOT_SUPPORTED`] for a namespace that is not kept, `security.capability`, a directory or a link.
    pub fn set_xattr(
        &self,
        ino: u64,
        name: &OsStr,
        value: Vec<u8>,
        flags: i32,
        request: RequestId,
    ) -> Outcome<()> {
        let name = kept_name(name)?;
        if name == CAPABILITIES {
            return Err(Errno::NOT_SUPPORTED.into());
        }
        if flags & !(libc::XATTR_CREATE | libc::XATTR_REPLACE) != 0 {
            return Err(Errno::INVALID.into());
        }
        let node = self.node(ino)?;
        let file = self.tree.file_ref(&node)?.ok_or(Errno::NOT_SUPPORTED)?;
        if value.len() > store::XATTR_VALUE_BYTES_MAX {
            return Err(Errno::TOO_LONG.into());
        }
        self.update(&file, |record| {
            let exists = record.xattrs.contains_key(name);
            if request.resent && record.xattrs.get(name) == Some(&value) {
                // It was done; only the answer did not come.
                return Ok(());
            }
            if flags & libc::XATTR_CREATE != 0 && exists {
                return Err(Errno::EXISTS.into());
            }
            if flags & libc::XATTR_REPLACE != 0 && !exists {
                return Err(Errno::NO_DATA.into());
            }
            record.xattrs.insert(name.to_owned(), value);
            let names: usize = record.xattrs.keys().map(|name| name.len() + 1).sum();
            if record.xattrs.len() > store::XATTRS_MAX || names > NAMES_BYTES_MAX {
                return Err(Errno::NO_ROOM.into());
            }
            Ok(())
        })
    }

    /// Removes an extended attribute; durable on return.
    ///
    /// # Errors
    /// [`Errno::NO_DATA`] if there is none.
    pub fn remove_xattr(&self, ino: u64, name: &OsStr, request: RequestId) -> Outcome<()> {
        let name = kept_name(name)?;
        let node = self.node(ino)?;
        let file = self.tree.file_ref(&node)?.ok_or(Errno::NO_DATA)?;
        self.update(&file, |record| match record.xattrs.remove(name) {
            None if !request.resent => Err(Errno::NO_DATA.into()),
            _ => Ok(()),
        })
    }
}

/// A name in a namespace that is kept.
fn kept_name(name: &OsStr) -> Outcome<&str> {
    let name = name.to_str().ok_or(Errno::NOT_SUPPORTED)?;
    let kept = NAMESPACES.iter().any(|space| name.starts_with(space) && name.len() > space.len());
    if kept { Ok(name) } else { Err(Errno::NOT_SUPPORTED.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_three_namespaces_are_kept() {
        for name in ["user.x", "trusted.libvirt.security.dac", "security.selinux"] {
            assert_eq!(kept_name(OsStr::new(name)).unwrap(), name);
        }
        for name in ["system.posix_acl_access", "user.", "user", "", "os2.x"] {
            assert_eq!(kept_name(OsStr::new(name)).unwrap_err().errno(), Errno::NOT_SUPPORTED);
        }
    }
}
