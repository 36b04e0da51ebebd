//! Names that are numbers: of bases by content, of layers, of the sessions and boots in which a layer was written.

use std::fmt::{self, Write as _};
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
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
    bytes
        .iter()
        .try_for_each(|byte| f.write_char(digit(byte >> 4)).and_then(|()| f.write_char(digit(byte & 15))))
}

fn parse_hex<const N: usize>(what: &str, text: &str) -> Result<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    let are_hex = text.len() == 2 * N
        && bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)).all(|(byte, pair)| {
            let value = digit(pair[0]).zip(digit(pair[1])).map(|(high, low)| high << 4 | low);
            *byte = value.unwrap_or_default();
            value.is_some()
        });
    match are_hex {
        true => Ok(bytes),
        false => {
            let message = format!("{what} {text:?}: must be {} lower-case hex digits", 2 * N);
            Err(Error::new(ErrorKind::Invalid, message))
        }
    }
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
        let all: Vec<u8> = (0..=255).collect();
        for bytes in all.chunks_exact(16) {
            let id = LayerId(bytes.try_into().unwrap());
            assert_eq!(id.to_string().parse::<LayerId>().ok(), Some(id));
        }
        assert_eq!(
            BootId(*b"\0\x01\x09\x0a\x0f\x10\x7f\x80\x99\xa9\xfaABCDE").to_string(),
            "0001090a0f107f8099a9fa4142434445"
        );
        for bad in [
            "",
            "ab",
            &"AB".repeat(16),
            &"+b".repeat(16),
            &"é".repeat(16),
            &"g0".repeat(16),
            &"0G".repeat(16),
        ] {
            assert!(bad.parse::<LayerId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn random_ids_differ() {
        assert_ne!(LayerId::random().ok(), LayerId::random().ok());
    }
}
