//! Moments in time as the store's records hold them: RFC 3339 in UTC, whole seconds.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

const SECONDS_OF_DAY: i64 = 86_400;

/// Seconds since 1970-01-01T00:00:00Z, shown as `2025-11-23T06:10:00Z`. Years 0000 to 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp {
    unix_seconds: i64,
}

impl Timestamp {
    /// Now, as the host's clock says; 1970 if the clock is before it.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { unix_seconds: i64::try_from(since.as_secs()).unwrap_or(0) }
    }

    /// A moment by its seconds since 1970; `None` outside the years 0000 to 9999.
    pub(super) fn from_unix_seconds(unix_seconds: i64) -> Option<Self> {
        const FIRST: i64 = -62_167_219_200;
        const LAST: i64 = 253_402_300_799;
        (FIRST..=LAST).contains(&unix_seconds).then_some(Self { unix_seconds })
    }

    /// Seconds since 1970-01-01T00:00:00Z.
    pub fn unix_seconds(self) -> i64 {
        self.unix_seconds
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar (Hinnant's `days_from_civil`: years begin in March, so
/// that the leap day is the last of its year).
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// The date (year, month, day) that is `days` after 1970-01-01.
fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = date_of(self.unix_seconds.div_euclid(SECONDS_OF_DAY));
        let second = self.unix_seconds.rem_euclid(SECONDS_OF_DAY);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

impl FromStr for Timestamp {
    type Err = Error;

    /// Accepts exactly what `Display` prints.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = || Error::new(ErrorKind::Invalid, "time: must be written like 2025-11-23T06:10:00Z");
        if text.len() != "2025-11-23T06:10:00Z".len() || !text.is_ascii() {
            return Err(invalid());
        }
        let number = |from: usize, to: usize| text[from..to].parse::<i64>().map_err(|_| invalid());
        let days = days_of(number(0, 4)?, number(5, 7)?, number(8, 10)?);
        let second = number(11, 13)? * 3600 + number(14, 16)? * 60 + number(17, 19)?;
        let parsed = Self { unix_seconds: days * SECONDS_OF_DAY + second };
        if parsed.to_string() == text { Ok(parsed) } else { Err(invalid()) }
    }
}

impl TryFrom<String> for Timestamp {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Timestamp> for String {
    fn from(timestamp: Timestamp) -> Self {
        timestamp.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_shown_as_rfc_3339() {
        for (unix_seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_763_878_200, "2025-11-23T06:10:00Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(Timestamp { unix_seconds }.to_string(), text);
            assert_eq!(text.parse::<Timestamp>().unwrap().unix_seconds(), unix_seconds);
        }
    }

    #[test]
    fn moments_end_with_the_years_of_four_digits() {
        let shown = |seconds| Timestamp::from_unix_seconds(seconds).map(|moment| moment.to_string());
        assert_eq!(shown(-62_167_219_200).as_deref(), Some("0000-01-01T00:00:00Z"));
        assert_eq!(shown(253_402_300_799).as_deref(), Some("9999-12-31T23:59:59Z"));
        assert_eq!((shown(-62_167_219_201), shown(253_402_300_800), shown(i64::MAX)), (None, None, None));
    }

    #[test]
    fn anything_but_a_real_moment_in_that_form_is_refused() {
        for bad in [
            "",
            "2025-11-23",
            "2025-13-01T00:00:00Z",
            "2025-02-29T00:00:00Z",
            "2025-11-23T24:00:00Z",
            "2025-11-23 06:10:00Z",
            "2025-11-23T06:10:00+",
            "+025-11-23T06:10:00Z",
            "2025-11-23T06:10:0éZ",
        ] {
            assert!(bad.parse::<Timestamp>().is_err(), "{bad:?} must be refused");
        }
    }
}
