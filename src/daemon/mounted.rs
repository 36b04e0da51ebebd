//! A fresh mount, until somebody answers for it.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

use super::identity;
use super::options::MountOptions;
use super::unmounter::Unmounter;
use crate::error::{Context, Result};
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
        // While the way to it is open to us. Nothing is asked of the mount.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(mountpoint, flags, Mode::empty())
            .context(|| format!("open {}", mountpoint.display()))?;
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let found =
            rustix::fs::statx(&root, "", flags, StatxFlags::empty()).context(|| "look at the mount")?;
        mounted.device = (found.stx_dev_major, found.stx_dev_minor);
        Ok((mounted, connection))
    }

    /// Somebody answers for it: it stays.
    pub(super) fn answered(mut self) {
        self.is_answered = true;
    }
}
