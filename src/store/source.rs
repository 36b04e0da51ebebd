//! The file that the user wants imported: opened without waiting, looked at, and watched for changes while it is read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, Stat};

use super::foreign::{DETECT_BYTES, Detected, ImageBytes, SourceFormat, detect};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::units::{DISK_BYTES_MAX, HumanBytes};

/// An open source.
pub(super) struct Source {
    file: File,
    path: PathBuf,
    len: u64,
    is_device: bool,
    stat: Stat,
}

/// What may be a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accept {
    RegularFile,
    RegularFileOrBlockDevice,
}

impl Source {
    /// Opens `path`, which may go through symbolic links. Anything but a regular file (or a block device) is refused
    /// without waiting for it, and so is what is empty or larger than 16 TiB.
    pub(super) fn open(path: &Path, accept: Accept) -> Result<Self> {
        let shown = || path.display().to_string();
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = match rustix::fs::open(path, flags, Mode::empty()) {
            // A socket, or a device that is not there.
            Err(rustix::io::Errno::NXIO) => {
                return Err(wrong_kind(path, "a socket or an absent device", accept));
            }
            other => other.context(shown)?,
        };
        let stat = rustix::fs::fstat(&fd).context(shown)?;
        let is_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice if accept == Accept::RegularFileOrBlockDevice => true,
            FileType::Directory => return Err(wrong_kind(path, "a directory", accept)),
            FileType::Fifo => return Err(wrong_kind(path, "a fifo", accept)),
            FileType::CharacterDevice => return Err(wrong_kind(path, "a character device", accept)),
            FileType::BlockDevice => return Err(wrong_kind(path, "a block device", accept)),
            _ => return Err(wrong_kind(path, "something else", accept)),
        };
        rustix::fs::fcntl_setfl(&fd, OFlags::empty()).context(shown)?;
        let len = match is_device {
            true => rustix::fs::seek(&fd, rustix::fs::SeekFrom::End(0)).context(shown)?,
            false => stat.st_size.cast_unsigned(),
        };
        if len == 0 {
            return Err(Error::new(ErrorKind::Invalid, format!("{}: empty", shown())));
        }
        if len > DISK_BYTES_MAX {
            let message = format!("{}: {}, larger than 16 TiB", shown(), HumanBytes(len));
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(Self { file: fd.into(), path: path.to_owned(), len, is_device, stat })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes that are not holes; `None` for a device, which has none.
    pub(super) fn allocated(&self) -> Option<u64> {
        let blocks = self.stat.st_blocks.cast_unsigned();
        (!self.is_device).then(|| (blocks * 512).min(self.len))
    }

    pub(super) fn is_device(&self) -> bool {
        self.is_device
    }

    /// The path that the user gave, for messages.
    pub(super) fn shown(&self) -> String {
        self.path.display().to_string()
    }

    /// The last part of the path, for the record of where an image came from.
    pub(super) fn file_name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().chars().take(255).collect()
    }

    /// The format to import as: the stated one, if it agrees with the magic; else what the magic says.
    pub(super) fn format(&self, stated: Option<SourceFormat>) -> Result<SourceFormat> {
        let mut head = vec![0; usize::try_from(self.len).unwrap_or(usize::MAX).min(DETECT_BYTES)];
        self.read_exact_at(0, &mut head)?;
        let refuse = |message: String| Error::new(ErrorKind::Invalid, format!("{}: {message}", self.shown()));
        match (stated, detect(&head)) {
            (Some(SourceFormat::Raw), _) | (None, Detected::Nothing) => Ok(SourceFormat::Raw),
            (None, Detected::Known(found)) => Ok(found),
            (None, Detected::Foreign(what)) => Err(refuse(format!(
                "looks like {what}, which cannot be imported"
            ))
            .with_hint(
                "unpack or convert it to raw or qcow2, or state --format raw to import its bytes as they are",
            )),
            (Some(stated), Detected::Known(found)) if stated == found => Ok(found),
            (Some(stated), Detected::Known(found)) => {
                Err(refuse(format!("said to be {stated}, but it is {found}")))
            }
            (Some(stated), _) => Err(refuse(format!("said to be {stated}, but it does not begin like one"))),
        }
    }

    /// Fails if the source was changed since it was opened.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        let now = rustix::fs::fstat(&self.file).context(|| self.shown())?;
        let same_times = (now.st_mtime, now.st_mtime_nsec, now.st_ctime, now.st_ctime_nsec)
            == (self.stat.st_mtime, self.stat.st_mtime_nsec, self.stat.st_ctime, self.stat.st_ctime_nsec);
        // A device's times do not tell of its contents.
        if self.is_device || (now.st_size == self.stat.st_size && same_times) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Invalid, format!("{}: changed while it was read", self.shown()))
            .with_hint("import it once nothing writes to it any more"))
    }
}

fn wrong_kind(path: &Path, kind: &str, accept: Accept) -> Error {
    let wanted = match accept {
        Accept::RegularFile => "a regular file",
        Accept::RegularFileOrBlockDevice => "a regular file or a block device",
    };
    Error::new(ErrorKind::Invalid, format!("{}: {kind}, must be {wanted}", path.display()))
}

impl ImageBytes for Source {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buf, offset).context(|| format!("read {}", self.shown()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_with(folder: &Path, bytes: &[u8]) -> PathBuf {
        let path = folder.join("source.img");
        File::create(&path).unwrap().write_all(bytes).unwrap();
        path
    }

    #[test]
    fn what_is_no_image_is_refused_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let huge = folder.path().join("huge");
        File::create(&huge).unwrap().set_len(DISK_BYTES_MAX - 4096).unwrap();
        Source::open(&huge, Accept::RegularFile).unwrap();
        let empty = file_with(folder.path(), b"");
        for (path, reason) in [
            (fifo.as_path(), "fifo"),
            (socket.as_path(), "socket"),
            (folder.path(), "directory"),
            (Path::new("/dev/null"), "character device"),
            (empty.as_path(), "empty"),
        ] {
            let error = Source::open(path, Accept::RegularFileOrBlockDevice).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(reason), "{error}");
        }
        let absent = Source::open(&folder.path().join("absent"), Accept::RegularFile).err().unwrap();
        assert_eq!(absent.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn the_stated_format_must_agree_with_the_magic_unless_it_is_raw() {
        let folder = tempfile::tempdir().unwrap();
        let format = |bytes: &[u8], stated: Option<SourceFormat>| {
            Source::open(&file_with(folder.path(), bytes), Accept::RegularFile).unwrap().format(stated)
        };
        let qcow2 = b"QFI\xfb\0\0\0\x03";
        assert_eq!(format(qcow2, None).unwrap(), SourceFormat::Qcow2);
        assert_eq!(format(qcow2, Some(SourceFormat::Qcow2)).unwrap(), SourceFormat::Qcow2);
        assert_eq!(format(qcow2, Some(SourceFormat::Raw)).unwrap(), SourceFormat::Raw);
        assert!(format(qcow2, Some(SourceFormat::Vmdk)).is_err());
        assert_eq!(format(b"plain", None).unwrap(), SourceFormat::Raw);
        assert!(format(b"plain", Some(SourceFormat::Qcow2)).is_err());
        assert!(format(b"# Disk DescriptorFile", None).unwrap_err().hint().is_some());
        assert_eq!(format(b"# Disk DescriptorFile", Some(SourceFormat::Raw)).unwrap(), SourceFormat::Raw);
    }

    #[test]
    fn a_change_while_reading_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = file_with(folder.path(), b"before");
        let source = Source::open(&path, Accept::RegularFile).unwrap();
        source.check_unchanged().unwrap();
        File::options().append(true).open(&path).unwrap().write_all(b"!").unwrap();
        assert_eq!(source.check_unchanged().unwrap_err().kind(), ErrorKind::Invalid);
    }
}
