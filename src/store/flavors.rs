//! Flavors: local disks of a size, ready-made with an empty filesystem.
//!
//! The filesystem is made once, when the flavor is added, on a sparse file that then becomes a base like an image's:
//! every instance's local disk is an overlay of it. A flavor without a filesystem needs no base; its disks are blank.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::atomic::Removal;
use super::bases::BaseDraft;
use super::names::ObjectName;
use super::progress::{Progress, Work};
use super::record::{self, RECORD_BYTES_MAX};
use super::references::{Except, User, list_names};
use super::timestamp::Timestamp;
use super::tool::{Limits, RunAs, Tool};
use super::{Store, copy, images, layout};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::BaseId;
use crate::storage::Storage;
use crate::units::{HumanBytes, check_disk_bytes};

/// The label of every local disk's filesystem, by which a guest mounts it.
pub const LOCAL_LABEL: &str = "ephemeral0";

/// The filesystem on a local disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlavorFs {
    /// A blank disk.
    None,
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// Swap space.
    Swap,
}

impl FlavorFs {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::None, Self::Ext4, Self::Xfs, Self::Swap];

    /// The name, as `--fs` has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Swap => "swap",
        }
    }

    /// Bytes of the smallest disk that we put it on.
    fn bytes_min(self) -> u64 {
        match self {
            Self::None => 512,
            Self::Swap => 1 << 20,
            // Below this there is no room for a journal.
            Self::Ext4 => 16 << 20,
            // xfsprogs since 5.19 refuses less.
            Self::Xfs => 300 << 20,
        }
    }

    /// Program, package and arguments (the file's name follows); the first set that works is taken.
    fn tool(self) -> Option<(&'static str, &'static str, &'static [&'static str])> {
        match self {
            Self::None => None,
            // The inode tables count as zeroed, because a hole is zero: the guest need not do it in the background.
            Self::Ext4 => Some((
                "mkfs.ext4",
                "e2fsprogs",
                &[
                    "-q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0,assume_storage_prezeroed=1 -L",
                    // e2fsprogs before 1.47 zeroes them itself; the zeroes become holes afterwards.
                    "-q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 -L",
                ],
            )),
            Self::Xfs => Some(("mkfs.xfs", "xfsprogs", &["-q -f -K -L"])),
            Self::Swap => Some(("mkswap", "util-linux", &["-L"])),
        }
    }
}

impl fmt::Display for FlavorFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for FlavorFs {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|fs| fs.as_str() == text).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("filesystem {text:?}: must be ext4, xfs, swap or none"))
        })
    }
}

/// A flavor of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flavor {
    /// Its name.
    pub name: ObjectName,
    /// Bytes of its local disks, a multiple of 512.
    pub local_size: u64,
    /// What is on them.
    pub fs: FlavorFs,
    /// The base with that filesystem; `None` for [`FlavorFs::None`].
    pub base: Option<BaseId>,
    /// When it was added.
    pub created: Timestamp,
}

/// A flavor to be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlavorSpec {
    /// Bytes of its local disks, a multiple of 512, up to 16 TiB.
    pub local_size: u64,
    /// What is on them.
    pub fs: FlavorFs,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FlavorRecord {
    local_size: u64,
    #[serde(with = "record::as_text")]
    fs: FlavorFs,
    #[serde(with = "record::as_optional_text")]
    base: Option<BaseId>,
    created: Timestamp,
}

impl Store {
    /// Adds a flavor and makes its blank base. After an error, or when cancelled, nothing is left.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the name is taken; [`ErrorKind::Invalid`] if the size is out of range or too small for
    /// the filesystem; [`ErrorKind::Unsupported`], naming the package, if the `mkfs` is not installed.
    pub fn add_flavor(
        &self,
        name: &ObjectName,
        spec: &FlavorSpec,
        progress: &dyn Progress,
    ) -> Result<Flavor> {
        self.add(name, spec, progress).context(|| format!("add flavor {name}"))
    }

    fn add(&self, name: &ObjectName, spec: &FlavorSpec, progress: &dyn Progress) -> Result<Flavor> {
        check_disk_bytes(spec.local_size)?;
        if spec.local_size < spec.fs.bytes_min() {
            let (size, min) = (HumanBytes(spec.local_size), HumanBytes(spec.fs.bytes_min()));
            let message =
                format!("local disk of {size} is too small for {}: must be at least {min}", spec.fs);
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        self.check_flavor_absent(name)?;
        let blank = match spec.fs {
            FlavorFs::None => None,
            fs => Some(self.make_blank(fs, spec.local_size, progress)?),
        };
        let base = blank.as_ref().map(|(_, id)| *id);
        let FlavorSpec { local_size, fs } = *spec;
        let flavor = Flavor { name: name.clone(), local_size, fs, base, created: Timestamp::now() };

        let lock = self.lock()?;
        self.check_flavor_absent(name)?;
        let created = flavor.created;
        self.in_steps(&lock, || {
            let made = FlavorRecord { local_size, fs, base, created };
            let mut record = record::draft(&self.tmp, "flavor", &made)?;
            if let Some((draft, id)) = blank {
                record = record.make_sign()?;
                self.publish_base(draft, &id, &lock)?;
            }
            record.commit(&self.flavors, &layout::record_file(name))
        })?;
        Ok(flavor)
    }

    /// Makes the filesystem on a sparse file; returns it sealed, with its identity.
    fn make_blank(
        &self,
        fs: FlavorFs,
        size: u64,
        progress: &dyn Progress,
    ) -> Result<(BaseDraft<'_>, BaseId)> {
        let draft = BaseDraft::new(&self.tmp)?;
        let shown = || format!("make {fs} on a blank disk of {}", HumanBytes(size));
        if let Some((program, package, variants)) = fs.tool() {
            let mut result = Ok(());
            for options in variants {
                draft.file().set_len(0).and_then(|()| draft.file().set_len(size)).context(shown)?;
                let arguments = options.split(' ').chain([LOCAL_LABEL, layout::BASE_RAW]).map(str::to_owned);
                let tool = Tool {
                    program,
                    package,
                    arguments: arguments.collect(),
                    folder: draft.folder(),
                    input: None,
                    run_as: RunAs::Us,
                    limits: Limits {
                        cpu_seconds: 300,
                        address_bytes: 4 << 30,
                        file_bytes: size,
                        wall: Duration::from_secs(600),
                    },
                };
                result = tool.run(self.room()?, progress, |_| {}).context(shown);
                match &result {
                    Err(error) if error.kind() == ErrorKind::Io => {}
                    _ => break,
                }
            }
            result?;
        }
        let found = draft.file().size()?;
        if found != size {
            return Err(Error::new(
                ErrorKind::Io,
                format!("{}: the file has {found} bytes after it", shown()),
            ));
        }
        let hash = copy::hash_and_punch(draft.file(), size, &Work::begin(progress, "hash", Some(size)))?;
        draft.seal()?;
        Ok((draft, BaseId(hash)))
    }

    fn check_flavor_absent(&self, name: &ObjectName) -> Result<()> {
        if self.flavors.has(&layout::record_file(name))? {
            return Err(Error::new(ErrorKind::Exists, format!("flavor {name}: exists already")));
        }
        Ok(())
    }

    /// The names of all flavors, in order, whether their records can be read or not.
    ///
    /// # Errors
    /// Those of the host.
    pub fn flavor_names(&self) -> Result<Vec<ObjectName>> {
        Ok(self.flavors.names()?.iter().filter_map(|file| layout::name_of_record(file)).collect())
    }

    /// All flavors, by name.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming the file, if a record is damaged.
    pub fn flavors(&self) -> Result<Vec<Flavor>> {
        images::present(self.flavor_names()?.iter().map(|name| self.flavor(name)))
    }

    /// A flavor.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Corrupt`], naming the file, if its record is damaged.
    pub fn flavor(&self, name: &ObjectName) -> Result<Flavor> {
        let file = layout::record_file(name);
        let record: FlavorRecord = match record::read(&self.flavors, &file, RECORD_BYTES_MAX) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(Error::new(ErrorKind::NotFound, format!("flavor {name}: not found"))
                    .with_hint("see what there is: cowdisk flavor list"));
            }
            record => record?,
        };
        let FlavorRecord { local_size, fs, base, created } = record;
        if check_disk_bytes(local_size).is_err() || base.is_none() != (fs == FlavorFs::None) {
            let path = self.flavors.path_of(&file);
            return Err(Error::new(ErrorKind::Corrupt, format!("{}: not a valid record", path.display())));
        }
        Ok(Flavor { name: name.clone(), local_size, fs, base, created })
    }

    /// Reads all of a flavor's blank disk again and compares it with its identity. A base that is whole but whose
    /// modification time was changed opens again after this.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], saying what has changed.
    pub fn verify_flavor(&self, name: &ObjectName, progress: &dyn Progress) -> Result<()> {
        let base = self.flavor(name)?.base;
        base.map_or(Ok(()), |base| self.verify_base(&base, progress))
            .context(|| format!("verify flavor {name}"))
    }

    /// Removes a flavor and, unless something else refers to it, its base.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], naming the instances, if overlays over its base exist; nothing is changed then.
    pub fn remove_flavor(&self, name: &ObjectName) -> Result<()> {
        self.remove_flavor_locked(name).context(|| format!("remove flavor {name}"))
    }

    fn remove_flavor_locked(&self, name: &ObjectName) -> Result<()> {
        let lock = self.lock()?;
        let flavor = self.flavor(name)?;
        let mut held = None;
        if let Some(base) = flavor.base {
            let others = self.references(&lock, Except::Flavor(name))?;
            let base_goes = !others.image_or_flavor_has_base(&base);
            let users = others.users(|User { instance, overlaid_bases }| {
                overlaid_bases.contains(&base) && (base_goes || instance.flavor.as_ref() == Some(name))
            });
            if !users.is_empty() {
                return Err(Error::new(ErrorKind::Busy, format!("overlays need it: {}", list_names(&users)))
                    .with_hint("remove these instances first"));
            }
            if base_goes {
                held = Some((base, self.hold_base(&base)?));
            }
        }
        self.in_steps(&lock, || {
            let removal = Removal::begin(&self.tmp, &self.flavors, &layout::record_file(name))?;
            if let Some((base, held)) = held {
                self.remove_held_base(&base, held, &lock)?;
            }
            removal.finish()
        })
    }
}
