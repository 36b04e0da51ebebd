//! cowdisk: copy-on-write disks for virtual machines.
//!
//! A store holds shared, read-only base images and, for every instance, only the blocks that it changed. A FUSE mount
//! shows each instance's disks as raw files. `ARCHITECTURE.md` says which module may use which; [`mod@format`] holds the
//! specification of everything on disk.

pub mod cli;
pub mod daemon;
pub mod doctor;
pub mod error;
pub mod finding;
pub mod format;
pub mod fs;
pub mod inspect;
pub mod libvirt;
pub mod overlay;
pub mod storage;
pub mod store;
pub mod transport;
pub mod units;

pub use error::{Context, Error, ErrorKind, Result};
