//! Turning an image of another format into raw bytes, by `qemu-img`, after our own look at its header.
//!
//! `qemu-img` never gets a name that the user or the image chose: the source is its standard input, opened by us and
//! already looked at, and is named by a constant. That constant is a `json:` name because only there a backing file can
//! be ruled out, whatever the header says by the time that `qemu-img` reads it.

use std::time::Duration;

use super::bases::BaseDraft;
use super::foreign::{self, SourceFormat};
use super::layout;
use super::progress::{Progress, Work};
use super::source::Source;
use super::tool::{Limits, Tool};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::{Room, Storage};
use crate::units::SECTOR_BYTES;

/// Address space: `qemu-img` maps 0.6 GiB at its start and adds its caches of tables.
const ADDRESS_BYTES: u64 = 2 << 30;
/// Time for any image, and what is added for each of its bytes: the slowest case is compressed data, at tens of MiB a
/// second.
const CPU_SECONDS: u64 = 60;
const CPU_BYTES_PER_SECOND: u64 = 8 << 20;
const WALL_SECONDS: u64 = 600;
const WALL_BYTES_PER_SECOND: u64 = 2 << 20;

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
    let driver = if source.is_device() { "host_device" } else { "file" };
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
        input: Some(source.file()),
        limits: Limits {
            cpu_seconds: CPU_SECONDS + size / CPU_BYTES_PER_SECOND,
            address_bytes: ADDRESS_BYTES,
            file_bytes: size,
            wall: Duration::from_secs(WALL_SECONDS + size / WALL_BYTES_PER_SECOND),
        },
    };
    let work = Work::begin(progress, "convert", Some(size));
    let mut percentage = Percentage::default();
    tool.run(room, progress, |bytes| {
        for hundredths in percentage.read(bytes) {
            work.advance(size / 10_000 * hundredths);
        }
    })
    .context(|| format!("convert {} from {format}", source.shown()))?;
    let written = draft.file().size()?;
    if written > size || written + SECTOR_BYTES <= virtual_bytes {
        let message =
            format!("{}: its header says {virtual_bytes} bytes, qemu-img wrote {written}", source.shown());
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    draft.file().set_len(size)?;
    Ok(size)
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
