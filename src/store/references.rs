//! Who refers to what, and removing what nothing refers to any more.
//!
//! What an overlay is over is read from its own superblock as well as from its instance's record: a base stays if either
//! names it. All of this happens under the store's lock, where nothing that is listed can vanish. So a record that is
//! missing was taken away by somebody else; what it referred to is then not known, and nothing is removed.

use std::collections::BTreeSet;

use super::Store;
use super::dir::Dir;
use super::instances::Instance;
use super::layout::{self, DiskPart, disk_file};
use super::lock::StoreLock;
use super::names::{DiskName, ObjectName};
use super::record::BootFileId;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BaseId, BaseRef};
use crate::overlay::read_superblock;
use crate::storage::FileStorage;

/// What to do about a folder among the instances whose name is none of an instance.
pub(super) const STRANGE_INSTANCE_HINT: &str =
    "rename it back, or, if nobody needs what is in it, move it out of the store";

/// All that the records and the overlays of a store refer to.
#[derive(Debug, Default)]
pub(super) struct References {
    image_bases: BTreeSet<BaseId>,
    flavor_bases: BTreeSet<BaseId>,
    instances: Vec<User>,
    boot_files: BTreeSet<BootFileId>,
}

/// An instance and the bases that its overlays are over.
#[derive(Debug)]
pub(super) struct User {
    pub(super) instance: Instance,
    pub(super) overlaid_bases: BTreeSet<BaseId>,
}

/// A record that is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Except<'a> {
    Nothing,
    Image(&'a ObjectName),
    Flavor(&'a ObjectName),
    Instance(&'a ObjectName),
}

impl References {
    /// Whether anything refers to a base.
    pub(super) fn has_base(&self, id: &BaseId) -> bool {
        self.image_or_flavor_has_base(id)
            || self.instances.iter().any(|user| user.overlaid_bases.contains(id))
    }

    /// Whether an image or a flavor refers to a base.
    pub(super) fn image_or_flavor_has_base(&self, id: &BaseId) -> bool {
        self.image_bases.contains(id) || self.flavor_bases.contains(id)
    }

    /// The instances for which `needs` is true.
    pub(super) fn users(&self, needs: impl Fn(&User) -> bool) -> Vec<ObjectName> {
        self.instances.iter().filter(|user| needs(user)).map(|user| user.instance.name.clone()).collect()
    }

    /// Whether anything refers to a boot file.
    pub(super) fn has_boot_file(&self, id: &BootFileId) -> bool {
        self.boot_files.contains(id)
    }
}

impl Store {
    /// Reads every record and the superblock of every overlay. Fails if a record is missing or cannot be read, or if there
    /// is a folder that somebody has given a name of no instance: what it refers to is then not known, and must stay.
    pub(super) fn references(&self, _lock: &StoreLock, except: Except<'_>) -> Result<References> {
        if let Some(name) = self.strange_instances()?.first() {
            let folder = layout::INSTANCES;
            let message = format!("{folder}/{name}: no name of an instance, so what it needs is not known");
            return Err(Error::new(ErrorKind::Corrupt, message).with_hint(STRANGE_INSTANCE_HINT));
        }
        let mut references = References::default();
        for name in self.image_names()?.iter().filter(|name| except != Except::Image(name)) {
            let image = self.image(name).map_err(missing)?;
            references.image_bases.insert(image.base);
            references.boot_files.extend(image.kernel.into_iter().chain(image.ramdisk));
        }
        for name in self.flavor_names()?.iter().filter(|name| except != Except::Flavor(name)) {
            references.flavor_bases.extend(self.flavor(name).map_err(missing)?.base);
        }
        for name in self.instance_names()?.iter().filter(|name| except != Except::Instance(name)) {
            let instance = self.instance(name).map_err(missing)?;
            references.boot_files.extend(instance.kernel.into_iter().chain(instance.ramdisk));
            let mut overlaid_bases: BTreeSet<BaseId> = instance.overlaid_bases().into_iter().collect();
            let folder = self.instance_dir(name).map_err(missing)?;
            for disk in DiskName::ALL {
                overlaid_bases.extend(base_of_overlay(&folder, disk)?);
            }
            references.instances.push(User { instance, overlaid_bases });
        }
        Ok(references)
    }

    /// Removes bases, boot files and attributes that no record refers to. Called when a process has died in the middle
    /// of a change. Answers whether it is done; if not (a record is damaged, a base is being read), what is left stays
    /// until a later call.
    pub(super) fn remove_unreferenced(&self, lock: &StoreLock) -> Result<bool> {
        // A record that a dead process has taken away must be away for good before what it referred to goes.
        self.tmp.sync()?;
        let references = match self.references(lock, Except::Nothing) {
            Ok(references) => references,
            Err(error) => {
                log::warn!("cannot look for what nothing refers to: {error}");
                return Ok(false);
            }
        };
        let mut done = true;
        for name in self.bases.names()? {
            let Ok(id) = name.parse::<BaseId>() else { continue };
            if !references.has_base(&id) {
                match self.remove_base(&id, lock) {
                    Err(error) if error.kind() == ErrorKind::Busy => done = false,
                    other => other?,
                }
            }
        }
        for name in self.boot.names()? {
            let Ok(id) = name.parse::<BootFileId>() else { continue };
            if !references.has_boot_file(&id) {
                self.remove_boot_file(&id, lock)?;
            }
        }
        for name in self.attrs.names()? {
            let orphan = match (layout::image_of_attributes(&name), layout::boot_of_attributes(&name)) {
                (Some(image), _) => !self.images.has(&layout::record_file(&image))?,
                (None, Some(boot_file)) => !references.has_boot_file(&boot_file),
                (None, None) => false,
            };
            if orphan {
                self.attrs.unlink(&name)?;
            }
        }
        // What the dead have removed themselves, too: with the sign gone nobody would look again.
        self.attrs.sync()?;
        Ok(done)
    }
}

/// The base that an overlay's superblock names. If there is no overlay, or its superblock is damaged, only the record
/// can tell.
pub(super) fn base_of_overlay(folder: &Dir, disk: DiskName) -> Result<Option<BaseId>> {
    let name = disk_file(disk, DiskPart::Map);
    let superblock = folder.open_to_look(name).and_then(|(file, _)| {
        read_superblock(&FileStorage::new(file, folder.path_of(name).display().to_string()))
    });
    match superblock {
        Ok(superblock) => match superblock.base {
            BaseRef::Image { id, .. } => Ok(Some(id)),
            BaseRef::Blank => Ok(None),
        },
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What is listed under the store's lock is there; if it is not, the store is damaged.
fn missing(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound => Error::caused(ErrorKind::Corrupt, "count references", error),
        _ => error,
    }
}

/// Names for a message: the first few, and how many more there are.
pub(super) fn list_names(names: &[ObjectName]) -> String {
    const SHOWN_MAX: usize = 5;
    let shown: Vec<&str> = names.iter().take(SHOWN_MAX).map(ObjectName::as_str).collect();
    match names.len().saturating_sub(SHOWN_MAX) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
