//! Live maps that nothing will take up again.

use super::super::durable_map::Position;
use super::super::live_map;
use super::{Checker, LEFT, Look, Usage};
use crate::error::Result;
use crate::finding::{Remedy, Severity};
use crate::format::Superblock;

impl Checker<'_> {
    /// Notes the live map of a layer that has no session, if there is one: who had opened the layer and not written to it
    /// was killed, or was killed in closing it.
    ///
    /// The layer proves that it is not needed: its session has ended, and its durable map has come at least as far as the
    /// one that the live map builds upon. Where it has not, somebody has put an older copy of the layer in its place,
    /// and the live map is left for the newer one.
    pub(super) fn look_for_left_live_map(
        &self,
        look: &mut Look,
        superblock: &Superblock,
        position: Position,
    ) -> Result<()> {
        let Some(path) = self.live_map else { return Ok(()) };
        if self.usage == Usage::Free && live_map::is_left(path, superblock.layer, position)? {
            look.left = Some(position);
            let message = "its live map is still there, though it was closed".to_owned();
            let remedy = Remedy::Repair("removes the live map; so does the next opening".to_owned());
            look.findings.push(self.finding(LEFT, Severity::Note, message, remedy));
        }
        Ok(())
    }

    /// Removes what [`Checker::look_for_left_live_map`] has noted. The caller has the layer's lock, so nobody opens it
    /// meanwhile.
    pub(super) fn remove_left_live_map(&self, look: &Look) -> Result<()> {
        match (self.live_map, &look.superblock, look.left) {
            (Some(path), Some(superblock), Some(position)) => {
                live_map::remove_left(path, superblock.layer, position)
            }
            _ => Ok(()),
        }
    }
}
