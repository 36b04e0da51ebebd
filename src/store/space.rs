//! The space of the host's filesystem under a store: the room that all who fill it share, and when it becomes tight.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::{Store, host_fs};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{HostSpace, Room};
use crate::units::HumanBytes;

/// Percentage of use from which on the filesystem is called nearly full, unless the user says otherwise.
pub const HIGH_WATER_PERCENT: u8 = 90;

/// Points of percentage by which use must fall below the mark before the filesystem is no longer called nearly full.
const HYSTERESIS_PERCENT: u8 = 2;

/// What the user wants of the host's space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpacePolicy {
    /// Bytes that guests' writes leave free; `None`: a twentieth of the filesystem, at most 256 MiB.
    pub reserve: Option<u64>,
    /// Percentage of use from which on there are warnings, 1 to 100.
    pub high_water_percent: u8,
}

impl Default for SpacePolicy {
    fn default() -> Self {
        Self { reserve: None, high_water_percent: HIGH_WATER_PERCENT }
    }
}

/// The space of the host's filesystem at some moment. Sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceNow {
    /// As the filesystem says.
    pub host: HostSpace,
    /// What guests' writes leave free.
    pub reserve: u64,
    /// Percentage of use from which on there are warnings.
    pub high_water_percent: u8,
}

impl SpaceNow {
    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.host.total.saturating_sub(self.host.free)
    }

    /// Bytes that guests may still fill.
    pub fn left(&self) -> u64 {
        self.host.available.saturating_sub(self.reserve)
    }

    /// Percentage in use of what is not kept for root, rounded up, as df(1) shows it.
    pub fn used_percent(&self) -> u8 {
        let (used, available) = (u128::from(self.used()), u128::from(self.host.available));
        let percent = (used * 100).div_ceil((used + available).max(1));
        u8::try_from(percent).unwrap_or(100)
    }

    /// Whether the filesystem is nearly full: the mark is reached, or little more than the reserve is left.
    pub fn is_high(&self) -> bool {
        self.used_percent() >= self.high_water_percent || self.left() < self.reserve
    }

    /// Whether it is far enough from being nearly full that a warning may be taken back.
    fn is_low(&self) -> bool {
        self.used_percent().saturating_add(HYSTERESIS_PERCENT) < self.high_water_percent
            && self.left() >= self.reserve.saturating_mul(2)
    }

    /// What to tell people about it.
    pub fn sentence(&self) -> String {
        format!(
            "the host's filesystem is {} % full: {} are free, of which {} are kept in reserve",
            self.used_percent(),
            HumanBytes(self.host.available),
            HumanBytes(self.reserve)
        )
    }
}

/// Remembers whether the filesystem is nearly full, so that each change of that is told once.
#[derive(Clone, Copy, Debug, Default)]
pub struct HighWater {
    high: bool,
}

/// What has become of the space since it was last looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaterMove {
    /// It is nearly full now.
    Rose,
    /// It is no longer.
    Fell,
}

impl HighWater {
    /// Notes the space as it is now; says if that is news.
    pub fn note(&mut self, now: &SpaceNow) -> Option<WaterMove> {
        let (high, moved) = match self.high {
            false if now.is_high() => (true, Some(WaterMove::Rose)),
            true if now.is_low() => (false, Some(WaterMove::Fell)),
            high => (high, None),
        };
        self.high = high;
        moved
    }
}

impl Store {
    /// Says how much of the host's filesystem is to stay free. Without it, that is what the daemon that serves the store
    /// was told, or the default.
    #[must_use]
    pub fn with_space_policy(mut self, policy: SpacePolicy) -> Self {
        self.space_policy = Some(policy);
        self
    }

    pub(super) fn space_policy(&self) -> SpacePolicy {
        let served = || self.serving().ok().flatten().and_then(|server| server.space_policy);
        self.space_policy.or_else(served).unwrap_or_default()
    }

    /// The room that all disks opened by this store, and all that is imported or copied by it, share.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn room(&self) -> Result<&Arc<Room>> {
        if let Some(room) = self.room.get() {
            return Ok(room);
        }
        let root = self.root.as_fd().try_clone_to_owned().context(|| "open the store once more")?;
        let room = Room::new(move || host_fs::space(&root), self.space_policy().reserve);
        Ok(self.room.get_or_init(|| Arc::new(room)))
    }

    /// Looks at the space of the host's filesystem. What others have filled or freed since the last time counts from now
    /// on for everything that this store writes.
    ///
    /// # Errors
    /// Those of the host.
    pub fn space(&self) -> Result<SpaceNow> {
        let room = self.room()?;
        let host = room.look()?;
        let high_water_percent = self.space_policy().high_water_percent;
        Ok(SpaceNow { host, reserve: room.reserve_of(host), high_water_percent })
    }

    /// Fails if `needed` bytes for `what` do not fit.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`], with both figures.
    pub(super) fn check_room(&self, what: &str, needed: u64) -> Result<()> {
        let now = self.space()?;
        if needed <= now.left() {
            return Ok(());
        }
        let message = format!("{what} needs {}, but {}", HumanBytes(needed), now.sentence());
        Err(Error::new(ErrorKind::NoSpace, message).with_hint("see what takes the space: cowdisk df"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(used: u64, available: u64, reserve: u64) -> SpaceNow {
        // 50 of 1,050 are kept for root.
        let host = HostSpace { total: used + available + 50, free: available + 50, available };
        SpaceNow { host, reserve, high_water_percent: 90 }
    }

    #[test]
    fn use_is_counted_as_df_counts_it() {
        assert_eq!(now(0, 1000, 10).used_percent(), 0);
        assert_eq!(now(1, 999, 10).used_percent(), 1);
        assert_eq!(now(899, 101, 10).used_percent(), 90);
        assert_eq!(now(1000, 0, 10).used_percent(), 100);
        assert_eq!(now(0, 0, 0).used_percent(), 0);
        assert_eq!((now(900, 100, 10).left(), now(995, 5, 10).left()), (90, 0));
    }

    #[test]
    fn each_rise_and_fall_is_told_once_and_not_for_a_few_bytes() {
        let mut mark = HighWater::default();
        assert_eq!(mark.note(&now(800, 200, 10)), None);
        assert_eq!(mark.note(&now(900, 100, 10)), Some(WaterMove::Rose));
        assert_eq!(mark.note(&now(990, 10, 10)), None);
        assert_eq!(mark.note(&now(880, 120, 10)), None, "not far enough below the mark");
        assert_eq!(mark.note(&now(870, 130, 10)), Some(WaterMove::Fell));
        assert_eq!(mark.note(&now(880, 120, 10)), None);
        // With a large reserve the mark is where as much again is left.
        assert_eq!(mark.note(&now(700, 300, 151)), Some(WaterMove::Rose));
        assert_eq!(mark.note(&now(600, 400, 151)), None);
        assert_eq!(mark.note(&now(500, 500, 151)), Some(WaterMove::Fell));
    }
}
