//! A fresh mount, until somebody answers for it.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

use super::identity;
use super::options::MountOptions;
use super::unmounter::Unmounter;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::transport::mount::{self, MountRequest};

/// A mount that nobody answers for yet; dropped, it is taken away.
pub(super) struct Mounted<'a> {
    /// Device of the mount, major and minor.
    pub(super) device: (u32, u32),
    unmounter: &'a Unmounter,
    is_answered: bool,
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if !self.is_answered
            && let Err(error) = self.unmounter.unmount()
        {
            log::warn!("{error}");
        }
    }
}

impl<'a> Mounted<'a> {
    /// Mounts; returns also the descriptor on which the kernel waits for an answer.
    ///
    /// # Errors
    /// Those of [`mount::mount`].
    pub(super) fn new(
        source: &Path,
        mountpoint: &Path,
        options: &MountOptions,
        unmounter: &'a Unmounter,
    ) -> Result<(Self, OwnedFd)> {
        let root = rustix::process::geteuid().is_root() || identity::may_mount();
        let request = MountRequest {
            source,
            mountpoint,
            read_only: options.read_only,
            allow_other: options.allows_other(root),
        };
        let connection = mount::mount(&request)?;
        let mut mounted = Self { device: (0, 0), unmounter, is_answered: false };
        // While the way to it is open to us.
        mounted.device = open_root_and_look(mountpoint)?.1;
        Ok((mounted, connection))
    }

    /// Somebody answers for it: it stays.
    pub(super) fn answered(mut self) {
        self.is_answered = true;
    }
}

/// Opens the directory of the mount that has that device, as a path: nothing is asked of the mount. It is in use as long as
/// this is open.
///
/// # Errors
/// [`ErrorKind::NotFound`] if something else is there; those of the host.
pub(super) fn open_root(mountpoint: &Path, device: (u32, u32)) -> Result<OwnedFd> {
    match open_root_and_look(mountpoint)? {
        (root, found) if found == device => Ok(root),
        _ => {
            let message = format!("{}: the mount is not there any more", mountpoint.display());
            Err(Error::new(ErrorKind::NotFound, message))
        }
    }
}

fn open_root_and_look(mountpoint: &Path) -> Result<(OwnedFd, (u32, u32))> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(mountpoint, flags, Mode::empty())
        .context(|| format!("open {}", mountpoint.display()))?;
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(&root, "", flags, StatxFlags::empty()).context(|| "look at the mount")?;
    Ok((root, (found.stx_dev_major, found.stx_dev_minor)))
}
