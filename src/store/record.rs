//! JSON records on disk, and the types in them.
//!
//! A record is untrusted when read: its size is bounded, an unknown field is refused, and every name, hash and size is
//! checked before it is used; the error names the file. **How records evolve:** the version of the store's superblock
//! covers all of them (`layout.rs` lists the versions). A new field is a new store version; a newer cowdisk reads older records (`serde(default)` for
//! what they lack), an older cowdisk refuses the newer store before it reads any record.

use std::fmt;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::atomic::{self, DraftFile};
use super::dir::{Dir, MODE_PRIVATE};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{FileStorage, Storage};

/// Largest record, in bytes, but for attributes.
pub(super) const RECORD_BYTES_MAX: usize = 64 << 10;

/// Reads and checks the record `parent/name`.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is none, [`ErrorKind::Corrupt`], naming the file, if it is not what it should be.
pub(super) fn read<T: DeserializeOwned>(parent: &Dir, name: &str, bytes_max: usize) -> Result<T> {
    let bytes = atomic::read_file(parent, name, bytes_max)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let file = parent.path_of(name).display().to_string();
        Error::caused(ErrorKind::Corrupt, format!("{file}: not a valid record"), error)
    })
}

/// The bytes of a record, for people to read as well.
pub(super) fn encode(record: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(record)
        .map_err(|error| Error::caused(ErrorKind::Invalid, "write a record as JSON", error))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// A draft that holds a record, synced.
pub(super) fn draft<'a>(tmp: &'a Dir, kind: &str, record: &impl Serialize) -> Result<DraftFile<'a>> {
    let bytes = encode(record)?;
    let draft = DraftFile::new(tmp, kind)?;
    draft.write_all(&bytes)?;
    Ok(draft)
}

/// Writes a record into a folder that is itself still a draft. The caller syncs the file.
pub(super) fn write_into_draft(folder: &Dir, name: &str, record: &impl Serialize) -> Result<FileStorage> {
    let bytes = encode(record)?;
    let file = folder.create_file(name, MODE_PRIVATE)?;
    file.write_at(0, &bytes)?;
    Ok(file)
}

/// The content of a kernel or a ramdisk: the BLAKE3 of its bytes. Shown as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BootFileId([u8; 32]);

impl BootFileId {
    /// The id of a file whose bytes have this BLAKE3 hash.
    pub fn from_bytes(hash: [u8; 32]) -> Self {
        Self(hash)
    }
}

impl fmt::Display for BootFileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&super::hex::encode(&self.0))
    }
}

impl fmt::Debug for BootFileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BootFileId({self})")
    }
}

impl FromStr for BootFileId {
    type Err = Error;

    /// Accepts exactly 64 lower-case hex digits.
    fn from_str(text: &str) -> Result<Self> {
        let hash = super::hex::decode(text).and_then(|bytes| bytes.try_into().ok());
        hash.map(Self).ok_or_else(|| Error::new(ErrorKind::Invalid, "content id: must be 64 hex digits"))
    }
}

impl TryFrom<String> for BootFileId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<BootFileId> for String {
    fn from(id: BootFileId) -> Self {
        id.to_string()
    }
}

/// A value in a record that is written as its text.
pub(super) mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(in crate::store) fn serialize<T: Display, S: Serializer>(
        value: &T,
        out: S,
    ) -> Result<S::Ok, S::Error> {
        out.collect_str(value)
    }

    pub(in crate::store) fn deserialize<'de, T, D>(input: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(input)?.parse().map_err(de::Error::custom)
    }
}

/// The same for a value that may be absent (`null`).
pub(super) mod as_optional_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(in crate::store) fn serialize<T: Display, S: Serializer>(
        value: &Option<T>,
        out: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => out.collect_str(value),
            None => out.serialize_none(),
        }
    }

    pub(in crate::store) fn deserialize<'de, T, D>(input: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        Option::<String>::deserialize(input)?.map(|text| text.parse().map_err(de::Error::custom)).transpose()
    }
}
