//! Owner, mode and extended attributes of the files that the mount shows.
//!
//! They are kept in records beside the objects, for the files of the store itself always belong to who runs the
//! daemon. No record means what nobody ever changed: the owner of the store's folder, and 0600 for a disk, 0400 for an
//! image, a kernel or a ramdisk. libvirt changes the owner of a disk at each start and stop of a guest and leaves its
//! notes in `trusted.*` attributes, so a change must survive the daemon, and does: each is a whole record, replaced.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::dir::{Dir, MODE_PRIVATE, MODE_READ_ONLY};
use super::layout::{self, DiskPart};
use super::lock::StoreLock;
use super::names::{DiskName, ObjectName};
use super::record::{self, BootFileId};
use super::{Store, atomic, hex};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{BaseId, LayerId};

/// Largest value of an extended attribute, in bytes: the kernel's own limit.
pub const XATTR_VALUE_BYTES_MAX: usize = 64 << 10;
/// Longest name of an extended attribute, in bytes: the kernel's own limit.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// Most extended attributes of one file.
pub const XATTRS_MAX: usize = 64;

/// The bits of a mode that can be set.
const MODE_BITS: u32 = 0o7777;
/// A record with the most and largest attributes, in hex digits, and room for the rest.
const ATTRIBUTES_BYTES_MAX: usize =
    XATTRS_MAX * (2 * XATTR_VALUE_BYTES_MAX + 6 * XATTR_NAME_BYTES_MAX + 64) + 4096;

/// A file that the mount shows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FileRef {
    /// A disk of the instance that has this name and this id.
    Disk(ObjectName, LayerId, DiskName),
    /// The image that has this name and this content.
    Image(ObjectName, BaseId),
    /// A kernel or a ramdisk.
    Boot(BootFileId),
}

/// What `stat` and `getxattr` tell of a file besides its size and times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits, 0 to 0o7777.
    pub mode: u32,
    /// Extended attributes by their full name, such as `user.note`.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AttributesRecord {
    uid: u32,
    gid: u32,
    mode: u32,
    /// Values in hex digits.
    xattrs: BTreeMap<String, String>,
}

impl Attributes {
    /// Checks the limits.
    fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::Invalid, message));
        if self.mode & !MODE_BITS != 0 {
            return refuse(format!("mode {:#o}: must be at most 0o7777", self.mode));
        }
        if self.xattrs.len() > XATTRS_MAX {
            let message = format!("more than {XATTRS_MAX} extended attributes");
            return Err(Error::new(ErrorKind::NoSpace, message));
        }
        for (name, value) in &self.xattrs {
            if name.is_empty() || name.len() > XATTR_NAME_BYTES_MAX || name.contains('\0') {
                return refuse(format!(
                    "name of an extended attribute of {} bytes: must be 1 to 255",
                    name.len()
                ));
            }
            if value.len() > XATTR_VALUE_BYTES_MAX {
                return refuse(format!(
                    "extended attribute {name}: larger than {XATTR_VALUE_BYTES_MAX} bytes"
                ));
            }
        }
        Ok(())
    }

    fn to_record(&self) -> AttributesRecord {
        let xattrs = self.xattrs.iter().map(|(name, value)| (name.clone(), hex::encode(value))).collect();
        AttributesRecord { uid: self.uid, gid: self.gid, mode: self.mode, xattrs }
    }

    fn from_record(record: AttributesRecord) -> Result<Self> {
        let xattrs = record.xattrs.into_iter().map(|(name, digits)| match hex::decode(&digits) {
            Some(value) => Ok((name, value)),
            None => Err(Error::new(ErrorKind::Invalid, "a value is not in hex digits")),
        });
        let xattrs = xattrs.collect::<Result<_>>()?;
        let attributes = Self { uid: record.uid, gid: record.gid, mode: record.mode, xattrs };
        attributes.check()?;
        Ok(attributes)
    }
}

impl Store {
    /// The attributes of a file.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the instance does not exist; [`ErrorKind::Corrupt`] if the record is damaged.
    pub fn attributes(&self, file: &FileRef) -> Result<Attributes> {
        let (folder, name) = self.attributes_place(file)?;
        match record::read::<AttributesRecord>(folder.dir(self), &name, ATTRIBUTES_BYTES_MAX) {
            Ok(record) => Attributes::from_record(record).map_err(|error| {
                let file = folder.dir(self).path_of(&name);
                Error::caused(ErrorKind::Corrupt, format!("{}: not a valid record", file.display()), error)
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => self.default_attributes(file),
            Err(error) => Err(error),
        }
    }

    /// Changes the attributes of a file, durably and all at once. Two callers that change one file at the same time
    /// must take turns themselves, from reading to writing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the file does not exist; [`ErrorKind::Invalid`] for a mode, a name or a value, and
    /// [`ErrorKind::NoSpace`] for a number of attributes, out of range.
    pub fn set_attributes(&self, file: &FileRef, attributes: &Attributes) -> Result<()> {
        attributes.check()?;
        let bytes = record::encode(&attributes.to_record())?;
        // The record of a disk goes with the folder of its instance. That of an image or a boot file is found by name, and
        // must not fall to the next one of that name, so none appears or leaves until it is written.
        let _lock = match file {
            FileRef::Disk(..) => None,
            FileRef::Image(..) | FileRef::Boot(_) => Some(StoreLock::wait(&self.root)?),
        };
        let (folder, name) = self.attributes_place(file)?;
        atomic::replace_file(&self.tmp, folder.dir(self), &name, &bytes)
    }

    /// Removes the record of a file's attributes, so that they are again as nobody has changed them.
    pub(super) fn forget_attributes_of(&self, file: &FileRef) -> Result<()> {
        let (place, name) = self.attributes_place(file)?;
        place.dir(self).unlink(&name)?;
        place.dir(self).sync()
    }

    /// Where the record of a file's attributes is; fails if the file does not exist.
    fn attributes_place(&self, file: &FileRef) -> Result<(Place, String)> {
        let absent = |what: String| Error::new(ErrorKind::NotFound, format!("{what}: not found"));
        match file {
            FileRef::Disk(instance, id, disk) => {
                let folder = self.instance_dir_of(instance, *id)?;
                Ok((Place::Own(folder), layout::disk_file(*disk, DiskPart::Attributes).to_owned()))
            }
            FileRef::Image(name, base) if self.image(name)?.base != *base => {
                Err(absent(format!("image {name} of content {base}")))
            }
            FileRef::Image(name, _) => Ok((Place::Attrs, layout::image_attributes_file(name))),
            FileRef::Boot(id) if !self.boot.has(&id.to_string())? => Err(absent(format!("boot file {id}"))),
            FileRef::Boot(id) => Ok((Place::Attrs, layout::boot_attributes_file(id))),
        }
    }

    fn default_attributes(&self, file: &FileRef) -> Result<Attributes> {
        let stat = rustix::fs::fstat(&self.root).context(|| "look up the store's folder")?;
        let mode = match file {
            FileRef::Disk(..) => MODE_PRIVATE,
            FileRef::Image(..) | FileRef::Boot(_) => MODE_READ_ONLY,
        };
        Ok(Attributes { uid: stat.st_uid, gid: stat.st_gid, mode, xattrs: BTreeMap::new() })
    }

    /// Removes a record from [`layout::ATTRS`] so that no crash brings it back for a later object of that name. Nothing
    /// there is no error, but a removal then, too: a process may have died before it was durable.
    pub(super) fn forget_attributes(&self, file: &str) -> Result<()> {
        self.attrs.unlink(file)?;
        self.attrs.sync()
    }
}

/// The folder of a record of attributes.
enum Place {
    /// An instance's.
    Own(Dir),
    /// The one for everything else.
    Attrs,
}

impl Place {
    fn dir<'a>(&'a self, store: &'a Store) -> &'a Dir {
        match self {
            Self::Own(dir) => dir,
            Self::Attrs => &store.attrs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::store_with_image;
    use super::*;

    fn disk(store: &Store) -> FileRef {
        let instance = store.instance(&"web-3".parse().unwrap()).unwrap();
        FileRef::Disk(instance.name, instance.id, DiskName::Root)
    }

    fn image(store: &Store) -> FileRef {
        let image = store.image(&"debian".parse().unwrap()).unwrap();
        FileRef::Image(image.name, image.base)
    }

    /// An image's attributes were set by name, so those of a removed image, its mode for one, could fall to the next.
    #[test]
    fn attributes_of_a_removed_image_are_not_set_on_the_next_of_its_name() {
        let t = store_with_image();
        let store = &t.store;
        let first = image(store);
        let mut attributes = store.attributes(&first).unwrap();
        attributes.mode = 0o444;
        store.remove_instance(&"web-3".parse().unwrap()).unwrap();
        store.remove_image(&"debian".parse().unwrap()).unwrap();
        assert_eq!(store.set_attributes(&first, &attributes).unwrap_err().kind(), ErrorKind::NotFound);
        let secret = t.folder.path().join("secret.raw");
        std::io::Write::write_all(&mut std::fs::File::create(&secret).unwrap(), &[7; 8192]).unwrap();
        let request = crate::store::ImportRequest { source: secret, ..Default::default() };
        store.import_image(&"debian".parse().unwrap(), &request, &crate::store::NoProgress).unwrap();
        assert_ne!(image(store), first);
        assert_eq!(store.set_attributes(&first, &attributes).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(store.attributes(&first).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(store.attributes(&image(store)).unwrap().mode, 0o400);
    }

    /// A disk's attributes were set by name, so those of a removed instance could fall to the next of its name.
    #[test]
    fn attributes_of_a_removed_instance_are_not_set_on_the_next_of_its_name() {
        let t = store_with_image();
        let store = &t.store;
        let (first, name) = (disk(store), "web-3".parse().unwrap());
        let mut attributes = store.attributes(&first).unwrap();
        attributes.mode = 0o666;
        let image = store.instance(&name).unwrap().image;
        store.remove_instance(&name).unwrap();
        store
            .create_instance(&name, &crate::store::InstanceSpec::of(image), &crate::store::NoProgress)
            .unwrap();
        assert_eq!(store.set_attributes(&first, &attributes).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(store.attributes(&disk(store)).unwrap().mode, 0o600);
    }

    #[test]
    fn attributes_nobody_changed_are_the_stores_owner_and_a_mode_by_kind() {
        let t = store_with_image();
        let store = &t.store;
        let attributes = store.attributes(&disk(store)).unwrap();
        assert_eq!((attributes.mode, attributes.uid), (0o600, rustix::process::getuid().as_raw()));
        let image = image(store);
        assert_eq!(store.attributes(&image).unwrap().mode, 0o400);
        let absent = FileRef::Disk("nobody".parse().unwrap(), LayerId::random().unwrap(), DiskName::Root);
        assert_eq!(store.attributes(&absent).unwrap_err().kind(), ErrorKind::NotFound);
        let absent = FileRef::Image("nobody".parse().unwrap(), BaseId([0; 32]));
        assert_eq!(store.set_attributes(&absent, &attributes).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn attributes_survive_the_store_being_opened_again() {
        let t = store_with_image();
        let store = &t.store;
        for file in [disk(store), image(store)] {
            let mut attributes = store.attributes(&file).unwrap();
            (attributes.uid, attributes.gid, attributes.mode) = (64055, 108, 0o660);
            attributes.xattrs.insert("trusted.libvirt.security.dac".into(), b"+0:+0\0\xff".to_vec());
            attributes.xattrs.insert("user.largest".into(), vec![0xa5; XATTR_VALUE_BYTES_MAX]);
            store.set_attributes(&file, &attributes).unwrap();
            let again = Store::open(t.folder.path()).unwrap();
            assert_eq!(again.attributes(&file).unwrap(), attributes);
        }
    }

    #[test]
    fn limits_are_kept_and_a_refusal_changes_nothing() {
        let t = store_with_image();
        let store = &t.store;
        let before = store.attributes(&disk(store)).unwrap();
        let refused = |change: &dyn Fn(&mut Attributes)| {
            let mut attributes = before.clone();
            change(&mut attributes);
            assert!(store.set_attributes(&disk(store), &attributes).is_err());
            assert_eq!(store.attributes(&disk(store)).unwrap(), before);
        };
        refused(&|a| a.mode = 0o100_600);
        refused(&|a| drop(a.xattrs.insert(String::new(), vec![])));
        refused(&|a| drop(a.xattrs.insert("a".repeat(256), vec![])));
        refused(&|a| drop(a.xattrs.insert("user.x".into(), vec![0; XATTR_VALUE_BYTES_MAX + 1])));
        refused(&|a| a.xattrs.extend((0..=XATTRS_MAX).map(|n| (format!("user.{n}"), vec![]))));
    }

    #[test]
    fn a_damaged_record_is_refused_naming_its_file() {
        let t = store_with_image();
        let store = &t.store;
        let path = t.folder.path().join("instances/web-3/disk.attr");
        for bad in ["", "{}", "{\"uid\":0,\"gid\":0,\"mode\":99999999,\"xattrs\":{}}", "[", "\0\0"] {
            std::io::Write::write_all(&mut std::fs::File::create(&path).unwrap(), bad.as_bytes()).unwrap();
            let error = store.attributes(&disk(store)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains("disk.attr"), "{error}");
        }
    }
}
