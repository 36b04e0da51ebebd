//! How long to wait before a process that has died is started again.

use std::time::Duration;

/// Waits after the first, second, third and every later death in a row.
const WAITS: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(10)];

/// Each of these that a process lived takes back one death.
const FORGIVEN_AFTER: Duration = Duration::from_secs(1);

/// Counts deaths. One that comes after a life of some seconds costs no wait; a process that dies at once, again and
/// again, is left dead for longer and longer, up to ten seconds.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    deaths: u32,
}

impl Backoff {
    /// Counts a death after a life of that length, and says how long to wait.
    pub(super) fn after(&mut self, life: Duration) -> Duration {
        let forgiven = u32::try_from(life.as_millis() / FORGIVEN_AFTER.as_millis()).unwrap_or(u32::MAX);
        let before = self.deaths.saturating_sub(forgiven);
        self.deaths = before.saturating_add(1);
        WAITS[usize::try_from(before).unwrap_or(usize::MAX).min(WAITS.len() - 1)]
    }

    /// Deaths in a row that are not forgiven.
    pub(super) fn deaths(&self) -> u32 {
        self.deaths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deaths_in_a_row_cost_longer_and_longer_waits() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..12).map(|_| backoff.after(Duration::from_millis(3)).as_millis()).collect();
        assert_eq!(waits[..5], [0, 100, 1000, 10_000, 10_000]);
        assert_eq!((waits[11], backoff.deaths()), (10_000, 12));
    }

    #[test]
    fn a_life_of_seconds_is_forgiven() {
        let mut backoff = Backoff::default();
        for _ in 0..100 {
            assert_eq!(backoff.after(Duration::from_millis(1500)), Duration::ZERO);
        }
        backoff.after(Duration::ZERO);
        backoff.after(Duration::ZERO);
        assert_eq!(backoff.after(Duration::from_secs(3600)), Duration::ZERO);
    }
}
