//! Names of objects and of an instance's disks.
//!
//! A name that has passed through here is safe as one component of a path: it is never `.` or `..`, holds no `/`, no
//! NUL and nothing outside ASCII, and leaves room for a suffix within the 255 bytes that a file name may have.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// The rule that every name of an image, a flavor or an instance follows, as users are told it.
pub const NAME_RULE: &str =
    "1 to 63 letters, digits, dots, underscores or hyphens (ASCII), the first one a letter or a digit";

/// Longest name, in bytes.
const NAME_BYTES_MAX: usize = 63;

/// Most characters of a refused name that are repeated in the message.
const QUOTED_CHARS_MAX: usize = 80;

/// The name of an image, a flavor or an instance: `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectName(String);

impl ObjectName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ObjectName {
    type Err = Error;

    /// Refuses with [`ErrorKind::Invalid`], quoting [`NAME_RULE`].
    fn from_str(text: &str) -> Result<Self> {
        let first_ok = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        let rest_ok = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if first_ok && rest_ok && text.len() <= NAME_BYTES_MAX {
            return Ok(Self(text.to_owned()));
        }
        let shown: String = text.chars().take(QUOTED_CHARS_MAX).collect();
        Err(Error::new(ErrorKind::Invalid, format!("name {shown:?}: must be {NAME_RULE}")))
    }
}

impl TryFrom<String> for ObjectName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ObjectName> for String {
    fn from(name: ObjectName) -> Self {
        name.0
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for ObjectName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// One of the disks of an instance. Its text is the name of the file that the mount shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DiskName {
    /// `disk`: the guest's root, `vda`.
    Root,
    /// `disk.local`: the guest's local disk, `vdb`.
    Local,
}

impl DiskName {
    /// Both, root first.
    pub const ALL: [Self; 2] = [Self::Root, Self::Local];

    /// `disk` or `disk.local`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Root => "disk",
            Self::Local => "disk.local",
        }
    }
}

impl FromStr for DiskName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|disk| disk.as_str() == text).ok_or_else(|| {
            let shown: String = text.chars().take(QUOTED_CHARS_MAX).collect();
            Error::new(ErrorKind::Invalid, format!("disk {shown:?}: must be disk or disk.local"))
        })
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_follows_the_rule_or_is_refused_quoting_it() {
        let longest = "a".repeat(63);
        for good in ["a", "0", "web-3", "debian_12.raw", "A..b", longest.as_str()] {
            assert_eq!(good.parse::<ObjectName>().unwrap().as_str(), good);
        }
        let too_long = "a".repeat(64);
        let far_too_long = "a/".repeat(10_000);
        for bad in [
            "",
            ".",
            "..",
            ".hidden",
            "-rf",
            "_x",
            "a/b",
            "../a",
            "a\0b",
            "a b",
            "a\n",
            "é",
            "a:b",
            too_long.as_str(),
            far_too_long.as_str(),
        ] {
            let error = bad.parse::<ObjectName>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(NAME_RULE), "{error}");
            assert!(error.to_string().len() < 400, "a long name must not flood the message");
        }
    }

    #[test]
    fn a_name_read_from_json_is_checked_as_well() {
        assert!(serde_json::from_str::<ObjectName>("\"web-3\"").is_ok());
        assert!(serde_json::from_str::<ObjectName>("\"../etc\"").is_err());
    }

    #[test]
    fn disks_are_named_as_in_the_mount() {
        assert_eq!("disk.local".parse::<DiskName>().unwrap(), DiskName::Local);
        assert_eq!(DiskName::Root.to_string(), "disk");
        assert!("disk.map".parse::<DiskName>().is_err());
    }
}
