//! Turning an image of another format into raw bytes, by `qemu-img`, after our own look at its header.
//!
//! `qemu-img` never gets a name that the user or the image chose: the source is its standard input, opened by us and
//! already looked at, and is named by a constant. That constant is a `json:` name because only there a backing file can
//! be ruled out, whatever the header says by the time that `qemu-img` reads it.
//!
//! Where we are root, `qemu-img` is not: it runs as a user that owns nothing but the draft's file. It opens its standard
//! input by name, so that user must have the right to read it; where he has not, he gets a copy that has no name.

use std::time::Duration;

use rustix::fs::{Gid, Mode, Uid};

use super::bases::BaseDraft;
use super::dir::MODE_READ_ONLY;
use super::foreign::{self, SourceFormat};
use super::progress::{Progress, Work};
use super::source::Source;
use super::tool::{Limits, RunAs, Tool, unprivileged_user};
use super::{copy, layout};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{FileStorage, Room, Storage};
use crate::units::SECTOR_BYTES;

/// Address space: `qemu-img` maps 0.6 GiB at its start and adds its caches of tables.
const ADDRESS_BYTES: u64 = 2 << 30;
/// Time for any image, and what is added for each of its bytes: the slowest case is compressed data, at tens of MiB a
/// second.
const CPU_SECONDS: u64 = 60;
const CPU_BYTES_PER_SECOND: u64 = 8 << 20;
const WALL_SECONDS: u64 = 600;
const WALL_BYTES_PER_SECOND: u64 = 2 << 20;

/// The name that the copy of a source has for a moment.
const COPY: &str = "source";

/// Converts `source` into the draft's file and returns the bytes of the disk, a multiple of 512. It is
/// stopped once `room` is used up.
pub(super) fn convert(
    source: &Source,
    format: SourceFormat,
    draft: &BaseDraft<'_>,
    room: &Room,
    progress: &dyn Progress,
) -> Result<u64> {
    let virtual_bytes = foreign::check(format, source).context(|| source.shown())?;
    let size = virtual_bytes.next_multiple_of(SECTOR_BYTES);
    let user = unprivileged_user();
    let copy = user.map(|user| copy_for(user, source, draft, room, progress)).transpose()?.flatten();
    let driver = if source.is_device() && copy.is_none() { "host_device" } else { "file" };
    let input = format!(
        "json:{{\"driver\":\"{format}\",\"backing\":null,\
         \"file\":{{\"driver\":\"{driver}\",\"filename\":\"/proc/self/fd/0\"}}}}"
    );
    let tool = Tool {
        program: "qemu-img",
        package: "qemu-utils",
        arguments: ["convert", "-p", "-O", "raw", &input, &format!("./{}", layout::BASE_RAW)]
            .map(str::to_owned)
            .into(),
        folder: draft.folder(),
        input: Some(copy.as_ref().map_or(source.file(), FileStorage::file)),
        run_as: RunAs::Nobody,
        limits: Limits {
            cpu_seconds: CPU_SECONDS + size / CPU_BYTES_PER_SECOND,
            address_bytes: ADDRESS_BYTES,
            file_bytes: size,
            wall: Duration::from_secs(WALL_SECONDS + size / WALL_BYTES_PER_SECOND),
        },
    };
    let work = Work::begin(progress, "convert", Some(size));
    let mut percentage = Percentage::default();
    if user.is_some() {
        draft.lend(user)?;
    }
    tool.run(room, progress, |bytes| {
        for hundredths in percentage.read(bytes) {
            work.advance(size / 10_000 * hundredths);
        }
    })
    .context(|| format!("convert {} from {format}", source.shown()))?;
    if user.is_some() {
        draft.lend(None)?;
    }
    let written = draft.file().size()?;
    if written > size || written + SECTOR_BYTES <= virtual_bytes {
        let message =
            format!("{}: its header says {virtual_bytes} bytes, qemu-img wrote {written}", source.shown());
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    draft.file().set_len(size)?;
    Ok(size)
}

/// A copy of a source that only its owner and the like may read, for a user who may not; it goes when it is closed.
fn copy_for(
    (uid, gid): (Uid, Gid),
    source: &Source,
    draft: &BaseDraft<'_>,
    room: &Room,
    progress: &dyn Progress,
) -> Result<Option<FileStorage>> {
    let mode = Mode::from_raw_mode(rustix::fs::fstat(source.file()).context(|| source.shown())?.st_mode);
    if mode.contains(Mode::ROTH) {
        return Ok(None);
    }
    let shown = || format!("copy {}", source.shown());
    let copy = draft.folder().create_file(COPY, MODE_READ_ONLY)?;
    draft.folder().unlink(COPY)?;
    if source.is_device() || !copy.clone_contents(source.file()) {
        let work = Work::begin(progress, "copy", Some(source.len()));
        copy::copy(source.file(), source.len(), &copy, room, &work).context(shown)?;
    }
    rustix::fs::fchown(&copy, Some(uid), Some(gid)).context(shown)?;
    Ok(Some(copy))
}

/// Reads what `qemu-img -p` prints: `    (12.34/100%)` again and again.
#[derive(Default)]
struct Percentage {
    text: Vec<u8>,
    done: u64,
}

impl Percentage {
    /// How many hundredths of a percent have been added, for each mark in `bytes`.
    fn read(&mut self, bytes: &[u8]) -> Vec<u64> {
        let mut steps = Vec::new();
        for &byte in bytes {
            match byte {
                b'(' => self.text.clear(),
                b'/' => {
                    let hundredths = self.hundredths().min(10_000);
                    steps.push(hundredths.saturating_sub(self.done));
                    self.done = self.done.max(hundredths);
                    self.text.clear();
                }
                _ if self.text.len() < 8 => self.text.push(byte),
                _ => {}
            }
        }
        steps
    }

    fn hundredths(&self) -> u64 {
        let digits: String =
            self.text.iter().filter(|byte| byte.is_ascii_digit()).map(|&b| char::from(b)).collect();
        if self.text.contains(&b'.') { digits.parse().unwrap_or(0) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_add_up_whatever_the_pieces() {
        let mut percentage = Percentage::default();
        let text = b"    (0.00/100%)\r    (12.34/100%)\r    (12.34/100%)\r    (100.00/100%)\r\n";
        let sum: u64 = text.chunks(3).flat_map(|piece| percentage.read(piece)).sum();
        assert_eq!(sum, 10_000);
        assert!(percentage.read(b"(((///garbage\0\xff").iter().all(|step| *step == 0));
    }
}
