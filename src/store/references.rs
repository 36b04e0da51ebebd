//! Who refers to what, and removing what nothing refers to any more.

use std::collections::BTreeSet;

use super::lock::StoreLock;
use super::names::ObjectName;
use super::record::BootFileId;
use super::{Store, layout};
use crate::error::{ErrorKind, Result};
use crate::format::BaseId;

/// All that the records of a store refer to.
#[derive(Debug, Default)]
pub(super) struct References {
    image_bases: BTreeSet<BaseId>,
    flavor_bases: BTreeSet<BaseId>,
    overlaid_bases: BTreeSet<BaseId>,
    boot_files: BTreeSet<BootFileId>,
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
        self.image_or_flavor_has_base(id) || self.overlaid_bases.contains(id)
    }

    /// Whether an image or a flavor refers to a base.
    pub(super) fn image_or_flavor_has_base(&self, id: &BaseId) -> bool {
        self.image_bases.contains(id) || self.flavor_bases.contains(id)
    }

    /// Whether anything refers to a boot file.
    pub(super) fn has_boot_file(&self, id: &BootFileId) -> bool {
        self.boot_files.contains(id)
    }
}

impl Store {
    /// Reads every record. Fails if one of them cannot be read: what it refers to is then not known, and must stay.
    pub(super) fn references(&self, _lock: &StoreLock, except: Except<'_>) -> Result<References> {
        let mut references = References::default();
        for image in self.images()? {
            if except != Except::Image(&image.name) {
                references.image_bases.insert(image.base);
                references.boot_files.extend(image.kernel.into_iter().chain(image.ramdisk));
            }
        }
        for flavor in self.flavors()? {
            if except != Except::Flavor(&flavor.name) {
                references.flavor_bases.extend(flavor.base);
            }
        }
        for instance in self.instances()? {
            if except != Except::Instance(&instance.name) {
                references.overlaid_bases.extend(instance.overlaid_bases());
                references.boot_files.extend(instance.kernel.into_iter().chain(instance.ramdisk));
            }
        }
        Ok(references)
    }

    /// Removes bases, boot files and attributes that no record refers to. Called when a process has died in the middle
    /// of a change. Answers whether it is done; if not (a record is damaged, a base is being read), what is left stays
    /// until a later call.
    pub(super) fn remove_unreferenced(&self, lock: &StoreLock) -> Result<bool> {
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
        Ok(done)
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
