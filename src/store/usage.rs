//! What a store takes of the host's filesystem, and what it has promised to its disks.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::Store;
use super::dir::{DEPTH_MAX, Dir};
use super::listing::InstanceStatus;
use super::names::ObjectName;
use super::space::SpaceNow;
use crate::error::{ErrorKind, Result};
use crate::format::BaseId;

/// What a store takes and promises. Sizes are bytes; what is *taken* is space of the host's filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The host's filesystem.
    pub space: SpaceNow,
    /// Instances, the unreadable ones not counted.
    pub instances: u64,
    /// Their disks.
    pub disks: u64,
    /// The sizes of all disks: what guests could fill.
    pub promised: u64,
    /// Taken by the data of overlays.
    pub overlays: u64,
    /// Taken by the maps of overlays.
    pub maps: u64,
    /// Taken by independent disks: full copies, what they share with a base (reflinks) counted as well, and blank local disks.
    pub independent: u64,
    /// Taken by the bases of images and flavors.
    pub bases: u64,
    /// Taken by kernels and ramdisks.
    pub boot: u64,
    /// Taken by what is being made or removed right now.
    pub unfinished: u64,
    /// What full copies of their bases would take for all overlays, above what the bases take.
    pub saved: u64,
    /// Instances whose disks cannot be looked up. What they take is not counted.
    pub unreadable: Vec<ObjectName>,
}

impl Usage {
    /// Taken by the whole store, but for its records.
    pub fn taken(&self) -> u64 {
        self.overlays + self.maps + self.independent + self.bases + self.boot + self.unfinished
    }
}

/// What one instance adds.
#[derive(Debug, Default)]
struct Share {
    disks: u64,
    promised: u64,
    overlays: u64,
    maps: u64,
    independent: u64,
    overlaid: Vec<BaseId>,
}

impl Store {
    /// Adds up what the store takes and promises, mounted or not. Instances that come or go meanwhile may be counted or
    /// not. All cores share the work; ten thousand instances take some seconds at most.
    ///
    /// # Errors
    /// Those of the host. An instance that is damaged is listed and passed over.
    pub fn usage(&self) -> Result<Usage> {
        let names = self.instance_names()?;
        let shares: Vec<(ObjectName, Result<Option<Share>>)> = names
            .into_par_iter()
            .map(|name| {
                let share = self.share(&name);
                (name, share)
            })
            .collect();
        let mut usage = Usage {
            space: self.space()?,
            instances: 0,
            disks: 0,
            promised: 0,
            overlays: 0,
            maps: 0,
            independent: 0,
            bases: 0,
            boot: taken_below(&self.boot, DEPTH_MAX)?,
            unfinished: taken_below(&self.tmp, DEPTH_MAX)?,
            saved: 0,
            unreadable: Vec::new(),
        };
        let mut overlays_of = BTreeMap::<BaseId, u64>::new();
        for (name, share) in shares {
            match share {
                Ok(Some(share)) => usage.add(&share, &mut overlays_of),
                // Removed since the names were read.
                Ok(None) => {}
                Err(error) => {
                    log::warn!("instance {name} is not counted: {error}");
                    usage.unreadable.push(name);
                }
            }
        }
        self.add_bases(&mut usage, &overlays_of)?;
        Ok(usage)
    }

    /// `None` if the instance is gone.
    fn share(&self, name: &ObjectName) -> Result<Option<Share>> {
        let Some(InstanceStatus { instance, disks }) = self.status_if_present(name)? else { return Ok(None) };
        let mut share = Share { overlaid: instance.overlaid_bases(), ..Share::default() };
        for status in disks {
            share.disks += 1;
            share.promised += status.size;
            let kind = if status.cow { &mut share.overlays } else { &mut share.independent };
            *kind += status.data_allocated;
            share.maps += status.map_allocated;
        }
        Ok(Some(share))
    }

    fn add_bases(&self, usage: &mut Usage, overlays_of: &BTreeMap<BaseId, u64>) -> Result<()> {
        for name in self.bases.names()? {
            let taken = match self.bases.open_dir(&name) {
                Ok(folder) => taken_below(&folder, DEPTH_MAX)?,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            usage.bases += taken;
            let overlays = name.parse().ok().and_then(|id: BaseId| overlays_of.get(&id)).copied();
            usage.saved += taken * overlays.unwrap_or(0).saturating_sub(1);
        }
        Ok(())
    }
}

impl Usage {
    fn add(&mut self, share: &Share, overlays_of: &mut BTreeMap<BaseId, u64>) {
        let Share { disks, promised, overlays, maps, independent, overlaid } = share;
        self.instances += 1;
        self.disks += disks;
        self.promised += promised;
        self.overlays += overlays;
        self.maps += maps;
        self.independent += independent;
        for base in overlaid {
            *overlays_of.entry(*base).or_default() += 1;
        }
    }
}

/// What the files in a folder, and in the folders in it down to `depth`, take. What vanishes meanwhile takes nothing.
fn taken_below(folder: &Dir, depth: u32) -> Result<u64> {
    let mut taken = 0;
    for name in folder.names()? {
        let Some(stat) = folder.stat(&name)? else { continue };
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory {
            let Some(depth) = depth.checked_sub(1) else { continue };
            match folder.open_dir(&name) {
                Ok(inner) => taken += taken_below(&inner, depth)?,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        } else {
            taken += stat.st_blocks.cast_unsigned() * 512;
        }
    }
    Ok(taken)
}
