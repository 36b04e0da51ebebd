//! Where everything lies in a store. No other file spells a path.
//!
//! ```text
//! STORE/                        0700
//!   cowdisk-store.json          the store's superblock: magic, version, uuid
//!   lock                        flock, exclusive: the store is being changed
//!   daemon.lock                 flock, exclusive: a daemon serves the store; holds its pid and mountpoint as JSON
//!   run.json                    where this boot's live maps are
//!   bases/HASH/base.raw         0400, sparse, named by the BLAKE3 of its bytes; of images and of flavors alike
//!   bases/HASH/base.json        size and modification time of base.raw when it was made
//!   boot/HASH                   0400: kernels and ramdisks by content
//!   images/NAME.json
//!   flavors/NAME.json
//!   instances/NAME/instance.json
//!   instances/NAME/disk.map     overlay: the map; its flock is held by whoever has the disk open
//!   instances/NAME/disk.data    overlay: the data file
//!   instances/NAME/disk.raw     instead of the two: a plain file, an independent disk; its flock is the disk's
//!   instances/NAME/disk.attr    owner, mode and extended attributes, where they were ever changed
//!   instances/NAME/disk.local.… the same for the local disk
//!   attrs/image-NAME.json       the same for what the mount shows of an image
//!   attrs/boot-HASH.json        and of a kernel or ramdisk
//!   tmp/                        what is being made or removed
//! ```
//!
//! A name may end in `.json` itself: `images/a.json.json` is the image `a.json`. A file whose name does not follow
//! these rules is none of the store's: lists pass over it.
//!
//! **Versions.** A store keeps the version that it was made with. What is made in it is such that every program which knows
//! that version can read it; programs that know older ones only refuse the store, in words, before they read anything else.
//!
//! - 1: all disks of an instance are overlays (`cow` in its record, and each with `block_bytes`), or none is.
//! - 2: `cow` says what the root is. A local disk over nothing, with neither `base` nor `block_bytes` in its record, is a
//!   plain file in each new instance; one that is an overlay, from a store of version 1 that lost its superblock and got a new
//!   one, goes on as it is.

use super::names::{DiskName, ObjectName};

pub(super) const SUPERBLOCK: &str = "cowdisk-store.json";
pub(super) const LOCK: &str = "lock";
pub(super) const DAEMON_LOCK: &str = "daemon.lock";
pub(super) const RUN: &str = "run.json";
pub(super) const BASES: &str = "bases";
pub(super) const BOOT: &str = "boot";
pub(super) const IMAGES: &str = "images";
pub(super) const FLAVORS: &str = "flavors";
pub(super) const INSTANCES: &str = "instances";
pub(super) const ATTRS: &str = "attrs";
pub(super) const TMP: &str = "tmp";

/// Every folder that `init` makes.
pub(super) const FOLDERS: [&str; 7] = [BASES, BOOT, IMAGES, FLAVORS, INSTANCES, ATTRS, TMP];

/// The bytes of a base, in its folder.
pub(super) const BASE_RAW: &str = "base.raw";
/// The record of a base, in its folder.
pub(super) const BASE_RECORD: &str = "base.json";
/// The record of an instance, in its folder.
pub(super) const INSTANCE_RECORD: &str = "instance.json";

/// A file that belongs to one disk of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskPart {
    Data,
    Map,
    Raw,
    Attributes,
}

/// The file name of a part of a disk, in the instance's folder.
pub(super) fn disk_file(disk: DiskName, part: DiskPart) -> &'static str {
    match (disk, part) {
        (DiskName::Root, DiskPart::Data) => "disk.data",
        (DiskName::Root, DiskPart::Map) => "disk.map",
        (DiskName::Root, DiskPart::Raw) => "disk.raw",
        (DiskName::Root, DiskPart::Attributes) => "disk.attr",
        (DiskName::Local, DiskPart::Data) => "disk.local.data",
        (DiskName::Local, DiskPart::Map) => "disk.local.map",
        (DiskName::Local, DiskPart::Raw) => "disk.local.raw",
        (DiskName::Local, DiskPart::Attributes) => "disk.local.attr",
    }
}

/// The record of an image or a flavor, in its folder.
pub(super) fn record_file(name: &ObjectName) -> String {
    format!("{name}.json")
}

/// The name whose record a file is, if it is one.
pub(super) fn name_of_record(file: &str) -> Option<ObjectName> {
    file.strip_suffix(".json")?.parse().ok()
}

/// The attributes of an image, in [`ATTRS`].
pub(super) fn image_attributes_file(name: &ObjectName) -> String {
    format!("image-{name}.json")
}

/// The attributes of a kernel or ramdisk, in [`ATTRS`].
pub(super) fn boot_attributes_file(id: &super::BootFileId) -> String {
    format!("boot-{id}.json")
}

/// The image whose attributes a file in [`ATTRS`] holds.
pub(super) fn image_of_attributes(file: &str) -> Option<ObjectName> {
    name_of_record(file.strip_prefix("image-")?)
}

/// The kernel or ramdisk whose attributes a file in [`ATTRS`] holds.
pub(super) fn boot_of_attributes(file: &str) -> Option<super::BootFileId> {
    file.strip_prefix("boot-")?.strip_suffix(".json")?.parse().ok()
}
