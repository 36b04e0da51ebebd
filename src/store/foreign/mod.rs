//! What an image file of another format says about itself, before any tool opens it.
//!
//! Each parser is a function over bytes. It looks for one thing: anything that would make a reader of the image go
//! beyond the image itself (a backing file, a data file, a parent, another extent), or that we do not know. Such an
//! image is refused; what is left is converted by `qemu-img` under limits. All bytes are untrusted: every offset and
//! length is checked before it indexes, divides or allocates.

mod qcow2;
mod vdi;
mod vhdx;
mod vmdk;

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::units::DISK_BYTES_MAX;

/// How many bytes from the start of a file [`detect`] wants to see.
pub const DETECT_BYTES: usize = 4096;

/// Most bytes that a parser reads at once.
const READ_BYTES_MAX: usize = 1 << 20;

/// The format of an image file that is imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceFormat {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
    /// VMware's, in one file: monolithicSparse or streamOptimized.
    Vmdk,
    /// Hyper-V's VHDX.
    Vhdx,
    /// VirtualBox's VDI.
    Vdi,
}

impl SourceFormat {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vhdx, Self::Vdi];

    /// The name, as `qemu-img` and `--format` have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
        }
    }
}

impl fmt::Display for SourceFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SourceFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.as_str() == text).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("format {text:?}: must be raw, qcow2, vmdk, vhdx or vdi"))
        })
    }
}

/// An image file as its parser sees it.
pub trait ImageBytes {
    /// Bytes of the file.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes at `offset`; fails if they are not all there.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
}

/// What the first bytes of a file look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detected {
    /// No magic that we know: raw.
    Nothing,
    /// A format that can be imported.
    Known(SourceFormat),
    /// A format that is known and cannot be imported.
    Foreign(&'static str),
}

/// Looks for a magic in the first bytes of a file (up to [`DETECT_BYTES`] are looked at).
pub fn detect(head: &[u8]) -> Detected {
    const MAGICS: [(usize, &[u8], Detected); 16] = [
        (0, b"QFI\xfb\0\0\0\x01", Detected::Foreign("qcow (version 1)")),
        (0, b"QFI\xfb", Detected::Known(SourceFormat::Qcow2)),
        (0, b"KDMV", Detected::Known(SourceFormat::Vmdk)),
        (0, b"vhdxfile", Detected::Known(SourceFormat::Vhdx)),
        (0x40, b"\x7f\x10\xda\xbe", Detected::Known(SourceFormat::Vdi)),
        (0, b"COWD", Detected::Foreign("vmdk of an ESX server (COWD)")),
        (0, b"# Disk DescriptorFile", Detected::Foreign("vmdk descriptor, which names other files")),
        (0, b"conectix", Detected::Foreign("vhd (dynamic)")),
        (0, b"QED\0", Detected::Foreign("qed")),
        (0, b"WithoutFreeSpace", Detected::Foreign("parallels")),
        (0, b"WithouFreSpacExt", Detected::Foreign("parallels")),
        (0, b"\x1f\x8b\x08", Detected::Foreign("a gzip archive")),
        (0, b"\xfd7zXZ\0", Detected::Foreign("an xz archive")),
        (0, b"\x28\xb5\x2f\xfd", Detected::Foreign("a zstd archive")),
        (0, b"BZh", Detected::Foreign("a bzip2 archive")),
        (0, b"PK\x03\x04", Detected::Foreign("a zip archive")),
    ];
    let found = MAGICS.iter().find(|(at, magic, _)| head.get(*at..at + magic.len()) == Some(*magic));
    found.map_or(Detected::Nothing, |(_, _, detected)| *detected)
}

/// Checks that an image of `format` refers to nothing outside itself and returns the bytes of its virtual disk.
///
/// # Errors
/// [`ErrorKind::Invalid`], saying what the image has that is refused.
pub fn check(format: SourceFormat, image: &dyn ImageBytes) -> Result<u64> {
    let size = match format {
        SourceFormat::Raw => return Ok(image.size()),
        SourceFormat::Qcow2 => qcow2::check(image)?,
        SourceFormat::Vmdk => vmdk::check(image)?,
        SourceFormat::Vhdx => vhdx::check(image)?,
        SourceFormat::Vdi => vdi::check(image)?,
    };
    if size == 0 || size > DISK_BYTES_MAX {
        return Err(refused(format!("virtual size of {size} bytes: must be 1 byte to 16 TiB")));
    }
    Ok(size)
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// A header is shorter than its fields.
fn truncated() -> Error {
    refused("the header is cut short")
}

/// Reads `len` bytes at `offset`, or as many as the file has from there.
fn read_up_to(image: &dyn ImageBytes, offset: u64, len: usize) -> Result<Vec<u8>> {
    let left = usize::try_from(image.size().saturating_sub(offset)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; len.min(left).min(READ_BYTES_MAX)];
    image.read_exact_at(offset, &mut bytes)?;
    Ok(bytes)
}

/// Reads exactly `len` bytes at `offset`.
fn read_exact(image: &dyn ImageBytes, offset: u64, len: usize) -> Result<Vec<u8>> {
    let bytes = read_up_to(image, offset, len)?;
    if bytes.len() == len { Ok(bytes) } else { Err(truncated()) }
}

/// `len` bytes at `at` of a header.
fn slice(bytes: &[u8], at: usize, len: usize) -> Result<&[u8]> {
    at.checked_add(len).and_then(|end| bytes.get(at..end)).ok_or_else(truncated)
}

/// A little-endian number of `width` bytes, at most 8.
fn little(bytes: &[u8], at: usize, width: usize) -> Result<u64> {
    Ok(slice(bytes, at, width)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// A big-endian number of `width` bytes, at most 8.
fn big(bytes: &[u8], at: usize, width: usize) -> Result<u64> {
    Ok(slice(bytes, at, width)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    impl ImageBytes for Vec<u8> {
        fn size(&self) -> u64 {
            self.len() as u64
        }

        fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            let at = usize::try_from(offset).map_err(|_| truncated())?;
            buf.copy_from_slice(slice(self, at, buf.len())?);
            Ok(())
        }
    }

    /// Puts `value` into `width` bytes at `at`, least significant byte first.
    pub(super) fn put_little(bytes: &mut [u8], at: usize, width: usize, value: u64) {
        bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }

    /// The same, most significant byte first.
    pub(super) fn put_big(bytes: &mut [u8], at: usize, width: usize, value: u64) {
        put_little(bytes, at, width, value);
        bytes[at..at + width].reverse();
    }

    /// Every prefix and every single-byte change of a good image is accepted or refused, never a panic.
    pub(super) fn survives_any_damage(
        format: SourceFormat,
        good: &[u8],
        interesting: impl IntoIterator<Item = usize>,
    ) {
        for len in (0..good.len().min(8192)).chain([good.len() / 2, good.len() - 1]) {
            let _ = check(format, &good[..len].to_vec());
        }
        let mut image = good.to_vec();
        for at in interesting {
            for value in [0, 1, 0x7f, 0x80, 0xff, good[at] ^ 1, good[at] ^ 0x10] {
                image[at] = value;
                if let Ok(size) = check(format, &image) {
                    assert!(size > 0 && size <= DISK_BYTES_MAX);
                }
            }
            image[at] = good[at];
        }
    }

    #[test]
    fn magics_are_told_apart_and_anything_else_is_raw() {
        assert_eq!(detect(b""), Detected::Nothing);
        assert_eq!(detect(&[0; DETECT_BYTES]), Detected::Nothing);
        assert_eq!(detect(b"QFI\xfb\0\0\0\x03"), Detected::Known(SourceFormat::Qcow2));
        assert!(matches!(detect(b"QFI\xfb\0\0\0\x01"), Detected::Foreign(_)));
        assert_eq!(detect(b"KDMV"), Detected::Known(SourceFormat::Vmdk));
        assert!(matches!(detect(b"# Disk DescriptorFile\n"), Detected::Foreign(_)));
        assert_eq!(detect(b"\x1f\x8b\x08\0disk.raw"), Detected::Foreign("a gzip archive"));
        let mut vdi = [0; 512];
        vdi[0x40..0x44].copy_from_slice(b"\x7f\x10\xda\xbe");
        assert_eq!(detect(&vdi), Detected::Known(SourceFormat::Vdi));
        assert_eq!(detect(&vdi[..0x43]), Detected::Nothing);
    }

    #[test]
    fn formats_are_named_as_qemu_names_them() {
        for format in SourceFormat::ALL {
            assert_eq!(format.to_string().parse::<SourceFormat>().unwrap(), format);
        }
        assert!("vpc".parse::<SourceFormat>().is_err());
    }
}
