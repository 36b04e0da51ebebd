//! How fast a scrub reads: a token bucket.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use super::super::super::progress::Work;
use crate::error::Result;

/// What may be read at once after a pause, in time at the full rate.
const BURST: Duration = Duration::from_millis(100);
/// The longest sleep without a look at whether the user wants to stop.
const NAP: Duration = Duration::from_millis(50);

/// When all that was read so far is paid for, at a rate of bytes a second.
#[derive(Debug)]
struct Bucket {
    bytes_per_second: NonZeroU64,
    /// Since the start.
    paid_at: Duration,
}

impl Bucket {
    /// Counts `bytes` that were read by `now`, since the start; how long nothing may be read from now on.
    fn take(&mut self, now: Duration, bytes: u64) -> Duration {
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        let price = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        self.paid_at = self.paid_at.max(now.saturating_sub(BURST)).saturating_add(price);
        self.paid_at.saturating_sub(now)
    }
}

/// Keeps reading below a rate.
#[derive(Debug)]
pub(super) struct Pace {
    start: Instant,
    /// `None`: no limit.
    bucket: Option<Bucket>,
}

impl Pace {
    /// At most so many bytes a second; `None`: no limit.
    pub(super) fn new(bytes_per_second: Option<NonZeroU64>) -> Self {
        let bucket =
            bytes_per_second.map(|bytes_per_second| Bucket { bytes_per_second, paid_at: Duration::ZERO });
        Self { start: Instant::now(), bucket }
    }

    /// Counts `bytes` that were read, and waits until the next may be.
    pub(super) fn keep(&mut self, bytes: u64, work: &Work<'_>) -> Result<()> {
        work.check()?;
        let Some(bucket) = &mut self.bucket else { return Ok(()) };
        let mut left = bucket.take(self.start.elapsed(), bytes);
        while !left.is_zero() {
            let nap = left.min(NAP);
            std::thread::sleep(nap);
            left -= nap;
            work.check()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket() -> Bucket {
        Bucket { bytes_per_second: NonZeroU64::new(1000).unwrap(), paid_at: Duration::ZERO }
    }

    #[test]
    fn reading_is_paid_for_at_the_rate() {
        let mut bucket = bucket();
        let second = Duration::from_secs(1);
        assert_eq!(bucket.take(Duration::ZERO, 1000), second);
        assert_eq!(bucket.take(second, 500), second / 2);
        assert_eq!(bucket.take(second, 500), second, "what is not paid yet adds up");
    }

    #[test]
    fn a_pause_allows_a_short_burst_and_no_more() {
        let mut bucket = bucket();
        let hour = Duration::from_secs(3600);
        assert_eq!(bucket.take(hour, 100), Duration::ZERO);
        assert_eq!(bucket.take(hour, 1000), Duration::from_secs(1));
    }

    #[test]
    fn no_number_of_bytes_overflows() {
        assert!(bucket().take(Duration::MAX, u64::MAX) <= Duration::MAX);
        let fast = NonZeroU64::new(u64::MAX).unwrap();
        let mut bucket = Bucket { bytes_per_second: fast, paid_at: Duration::ZERO };
        assert_eq!(bucket.take(Duration::ZERO, u64::MAX), Duration::from_secs(1));
    }
}
