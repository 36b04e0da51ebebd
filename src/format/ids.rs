//! Names that are numbers: of bases by content, of layers, of the sessions and boots in which a layer was written.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

/// The identity of a base: BLAKE3 of its raw bytes, holes read as zeroes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BaseId(pub [u8; 32]);

/// The identity of a layer, random, given at its creation and never changed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub [u8; 16]);

/// One stretch of time in which a layer was open for writing, random. All zeroes: closed cleanly.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

/// One boot of the host, as the kernel names it. All zeroes: none.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BootId(pub [u8; 16]);

/// What an overlay was made over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseRef {
    /// Nothing: all zeroes.
    Blank,
    /// An image, by content.
    Image {
        /// The image's identity.
        id: BaseId,
        /// Bytes of the image.
        size: u64,
    },
}

impl LayerId {
    /// A new identity.
    ///
    /// # Errors
    /// If the kernel gives no random bytes.
    pub fn random() -> Result<Self> {
        random_bytes().map(Self)
    }
}

impl SessionId {
    /// No session: the layer was closed cleanly.
    pub const NONE: Self = Self([0; 16]);

    /// A new session.
    ///
    /// # Errors
    /// If the kernel gives no random bytes.
    pub fn random() -> Result<Self> {
        random_bytes().map(Self)
    }
}

impl BootId {
    /// No boot.
    pub const NONE: Self = Self([0; 16]);
}

fn random_bytes() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| Error::caused(ErrorKind::Io, "get random bytes", error))?;
    Ok(bytes)
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(what: &str, text: &str) -> Result<[u8; N]> {
    let invalid = || {
        Error::new(ErrorKind::Invalid, format!("{what} {text:?}: must be {} lower-case hex digits", 2 * N))
    };
    let digits = text.as_bytes();
    let lower_hex = |digit: &u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(digit);
    if digits.len() != 2 * N || !digits.iter().all(lower_hex) {
        return Err(invalid());
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| invalid())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| invalid())?;
    }
    Ok(bytes)
}

macro_rules! shown_as_hex {
    ($($name:ident: $what:literal),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }
        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self> {
                parse_hex($what, text).map(Self)
            }
        }
    )*};
}

shown_as_hex!(BaseId: "base id", LayerId: "layer id", SessionId: "session id", BootId: "boot id");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_and_read_as_hex() {
        let id = LayerId([0xab; 16]);
        assert_eq!(id.to_string(), "ab".repeat(16));
        assert_eq!(id.to_string().parse::<LayerId>().ok(), Some(id));
        for bad in ["", "ab", &"AB".repeat(16), &"+b".repeat(16), &"é".repeat(16)] {
            assert!(bad.parse::<LayerId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn random_ids_differ() {
        assert_ne!(LayerId::random().ok(), LayerId::random().ok());
    }
}
