//! Files of the mounted tree and their inode numbers.
//!
//! A number is a hash of what the file *is*: of its instance's random id for a disk, of its name and content for an
//! image. So it stays the same over a restart of the daemon, and an instance that is made anew under an old name has
//! new numbers. Should two files that the kernel knows at the same time hash to one number (with 100,000 files a chance
//! of one in two billion), the later one gets the next free number; it is then the only one that a restart may change.

use std::collections::HashMap;

use parking_lot::RwLock;

use super::errno::{Errno, Outcome};
use crate::format::{BaseId, Checksum, LayerId};
use crate::store::{BootFileId, DiskName, ObjectName};

/// Numbers below this are kept for the directories that every mount has.
const FIRST_HASHED: u64 = 16;

/// Which of an instance's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkName {
    /// `kernel`
    Kernel,
    /// `ramdisk`
    Ramdisk,
}

impl LinkName {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Kernel, Self::Ramdisk];

    /// The name of the link.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Ramdisk => "ramdisk",
        }
    }
}

/// A file of the mounted tree.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// The mountpoint.
    Root,
    /// `images`
    Images,
    /// `boot`
    Boot,
    /// `instances`
    Instances,
    /// `images/NAME`
    Image {
        /// Name of the image.
        name: ObjectName,
        /// Its content.
        base: BaseId,
    },
    /// `boot/ID`
    BootFile(BootFileId),
    /// `instances/NAME`
    Instance {
        /// Name of the instance.
        name: ObjectName,
        /// Its own id, which no other instance of that name has had or will have.
        id: LayerId,
    },
    /// `instances/NAME/disk` or `instances/NAME/disk.local`
    Disk {
        /// Name of the instance.
        instance: ObjectName,
        /// Which of its disks.
        disk: DiskName,
        /// The instance's id.
        id: LayerId,
    },
    /// `instances/NAME/kernel` or `instances/NAME/ramdisk`
    Link {
        /// Name of the instance.
        instance: ObjectName,
        /// Which of its links.
        link: LinkName,
        /// The instance's id.
        id: LayerId,
    },
}

impl Node {
    /// The directories that every mount has, with their numbers.
    const STATIC: [(u64, Self); 4] =
        [(1, Self::Root), (2, Self::Images), (3, Self::Boot), (4, Self::Instances)];

    /// The number that this file has, unless another one has it already.
    fn wanted_number(&self) -> u64 {
        let none = LayerId([0; 16]);
        match self {
            Self::Root => 1,
            Self::Images => 2,
            Self::Boot => 3,
            Self::Instances => 4,
            Self::Image { name, base } => hashed(none, &format!("image/{name}/{base}")),
            Self::BootFile(id) => hashed(none, &format!("boot/{id}")),
            Self::Instance { id, .. } => hashed(*id, "instance"),
            Self::Disk { disk, id, .. } => hashed(*id, disk.as_str()),
            Self::Link { link, id, .. } => hashed(*id, link.as_str()),
        }
    }

    fn is_static(&self) -> bool {
        matches!(self, Self::Root | Self::Images | Self::Boot | Self::Instances)
    }
}

/// Below 2^63, for programs that take inode numbers for signed.
fn hashed(id: LayerId, what: &str) -> u64 {
    let hash = Checksum::of(id, format!("inode/{what}").as_bytes()).as_u128();
    let number = u64::try_from(hash & (u128::from(u64::MAX) >> 1)).expect("masked to 63 bits");
    number.max(FIRST_HASHED)
}

#[derive(Debug)]
struct Known {
    node: Node,
    /// How often the kernel was told the number and has not yet said that it forgot it; [`FOREVER`] if nobody knows.
    lookups: u64,
}

/// The count of a number that a process before this one may have told the kernel: it is never forgotten.
const FOREVER: u64 = u64::MAX;

/// The files that the kernel knows by number. No read or write of an open file comes here.
#[derive(Debug, Default)]
pub struct Inodes {
    /// Guards the table; held for a look into it and never while the store is read.
    known: RwLock<HashMap<u64, Known>>,
}

impl Inodes {
    /// The file of a number that the kernel was told.
    ///
    /// # Errors
    /// [`Errno::STALE`] if it was not told, or has forgotten it.
    pub fn node(&self, ino: u64) -> Outcome<Node> {
        if let Some((_, node)) = Node::STATIC.into_iter().find(|(number, _)| *number == ino) {
            return Ok(node);
        }
        match self.known.read().get(&ino) {
            Some(known) => Ok(known.node.clone()),
            None => Err(Errno::STALE.into()),
        }
    }

    /// The number of a file, which the kernel is now told and will [forget](Self::forget) once for this call.
    pub fn remember(&self, node: &Node) -> u64 {
        self.number(node, 1)
    }

    /// Notes a file that the kernel may know of from an earlier process. Its number is never forgotten.
    pub fn adopt(&self, node: &Node) {
        self.number(node, FOREVER);
    }

    /// The number of a file, for a place where the kernel does not keep it.
    pub fn show(&self, node: &Node) -> u64 {
        let known = self.known.read();
        number_in(&known, node)
    }

    fn number(&self, node: &Node, lookups: u64) -> u64 {
        if node.is_static() {
            return node.wanted_number();
        }
        let mut known = self.known.write();
        let ino = number_in(&known, node);
        known.entry(ino).or_insert_with(|| Known { node: node.clone(), lookups: 0 });
        let told = &mut known.get_mut(&ino).expect("just put there").lookups;
        *told = told.saturating_add(lookups);
        ino
    }

    /// The kernel forgets `lookups` of the times that it was told a number.
    pub fn forget(&self, ino: u64, lookups: u64) {
        let mut known = self.known.write();
        if let Some(entry) = known.get_mut(&ino) {
            if entry.lookups != FOREVER {
                entry.lookups = entry.lookups.saturating_sub(lookups);
            }
            if entry.lookups == 0 {
                known.remove(&ino);
            }
        }
    }
}

/// The number under which `node` stands in the table, or else the first free one from the one it wants.
fn number_in(known: &HashMap<u64, Known>, node: &Node) -> u64 {
    let mut ino = node.wanted_number();
    while known.get(&ino).is_some_and(|other| other.node != *node) {
        ino = ino.wrapping_add(1).max(FIRST_HASHED);
    }
    ino
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(layer: u8, disk: DiskName) -> Node {
        Node::Disk { instance: "web-1".parse().unwrap(), disk, id: LayerId([layer; 16]) }
    }

    #[test]
    fn a_number_depends_on_identity_alone() {
        let (one, two) = (Inodes::default(), Inodes::default());
        two.remember(&disk(9, DiskName::Root));
        assert_eq!(one.remember(&disk(1, DiskName::Root)), two.remember(&disk(1, DiskName::Root)));
        assert_ne!(one.remember(&disk(1, DiskName::Root)), one.remember(&disk(1, DiskName::Local)));
    }

    #[test]
    fn a_new_disk_under_an_old_name_has_a_new_number() {
        let inodes = Inodes::default();
        assert_ne!(inodes.remember(&disk(1, DiskName::Root)), inodes.remember(&disk(2, DiskName::Root)));
    }

    #[test]
    fn a_number_is_known_until_every_lookup_is_forgotten() {
        let inodes = Inodes::default();
        let ino = inodes.remember(&disk(1, DiskName::Root));
        assert_eq!(inodes.remember(&disk(1, DiskName::Root)), ino);
        inodes.forget(ino, 1);
        assert_eq!(inodes.node(ino).unwrap(), disk(1, DiskName::Root));
        inodes.forget(ino, 1);
        assert_eq!(inodes.node(ino).unwrap_err().errno(), Errno::STALE);
        assert!(inodes.known.read().is_empty());
    }

    #[test]
    fn two_files_with_one_hash_get_two_numbers() {
        let inodes = Inodes::default();
        let (first, second) = (disk(1, DiskName::Root), disk(2, DiskName::Root));
        let wanted = second.wanted_number();
        inodes.known.write().insert(wanted, Known { node: first.clone(), lookups: 1 });
        assert_eq!(inodes.remember(&second), wanted + 1);
        assert_eq!(inodes.node(wanted).unwrap(), first);
        assert_eq!(inodes.node(wanted + 1).unwrap(), second);
    }

    #[test]
    fn the_directories_of_every_mount_are_never_forgotten() {
        let inodes = Inodes::default();
        inodes.forget(1, 5);
        assert_eq!(inodes.node(1).unwrap(), Node::Root);
        assert_eq!(inodes.remember(&Node::Instances), 4);
        assert!(inodes.known.read().is_empty());
    }

    #[test]
    fn an_adopted_number_is_the_same_and_is_never_forgotten() {
        let (first, second) = (Inodes::default(), Inodes::default());
        let ino = first.remember(&disk(1, DiskName::Root));
        second.adopt(&disk(1, DiskName::Root));
        second.forget(ino, 1000);
        assert_eq!(second.node(ino).unwrap(), disk(1, DiskName::Root));
        assert_eq!(second.remember(&disk(1, DiskName::Root)), ino);
        second.forget(ino, u64::MAX);
        assert_eq!(second.node(ino).unwrap(), disk(1, DiskName::Root));
    }
}
