//! What the importer decides of a foreign image before `qemu-img` sees it.

use std::cell::Cell;

use cowdisk::store::SourceFormat;
use cowdisk::store::foreign::{self, DETECT_BYTES, ImageBytes};
use cowdisk::units::DISK_BYTES_MAX;
use cowdisk::{Error, ErrorKind, Result};

use super::input::Input;

/// Most that a parser may read of an image, in bytes, all reads together.
const READ_BYTES_MAX: usize = 64 << 20;

/// An image file, almost all hole, that watches its reader.
struct SparseImage<'a> {
    size: u64,
    pieces: Vec<(u64, &'a [u8])>,
    read: Cell<usize>,
}

impl<'a> SparseImage<'a> {
    /// A size, then pieces: where each lies, its length, its bytes.
    fn read_recipe(input: &mut Input<'a>) -> Self {
        let size = input.long() >> input.below(64);
        let mut pieces = Vec::new();
        for _ in 0..input.count(15) {
            // Whole sectors, or the last bytes: where the formats have their structures.
            let at = match input.byte() {
                255 => size.saturating_sub(input.below(4096)),
                _ => input.below(1 << 16) * 512,
            };
            let len = usize::try_from(input.below(1 << 12)).expect("small");
            pieces.push((at, input.bytes(len)));
        }
        Self { size, pieces, read: Cell::new(0) }
    }
}

impl ImageBytes for SparseImage<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read.set(self.read.get() + buf.len());
        assert!(self.read.get() <= READ_BYTES_MAX, "a parser reads and reads");
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= self.size);
        let end = end.ok_or_else(|| Error::new(ErrorKind::Io, "past the end"))?;
        buf.fill(0);
        for (at, bytes) in &self.pieces {
            let piece_end = at.saturating_add(bytes.len() as u64);
            let (from, to) = (offset.max(*at), end.min(piece_end));
            if from < to {
                let place = |position: u64, start: u64| usize::try_from(position - start).expect("within");
                buf[place(from, offset)..place(to, offset)]
                    .copy_from_slice(&bytes[place(from, *at)..place(to, *at)]);
            }
        }
        Ok(())
    }
}

/// An image: its format, then a recipe for a sparse file.
pub fn image_header(data: &[u8]) {
    let mut input = Input::new(data);
    let format = SourceFormat::ALL[usize::from(input.byte()) % SourceFormat::ALL.len()];
    let image = SparseImage::read_recipe(&mut input);
    let head = head_of(&image, DETECT_BYTES);
    let detected = foreign::detect(&head);
    match foreign::check(format, &image) {
        // The importer goes on only with what the magic says, or with raw bytes.
        Ok(_) if format != SourceFormat::Raw && detected != foreign::Detected::Known(format) => {}
        Ok(size) => {
            assert!(format == SourceFormat::Raw || size > 0 && size <= DISK_BYTES_MAX);
            assert!(!leads_out(format, &image), "{format} names another file");
        }
        Err(error) => assert!(matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Io), "{error}"),
    }
}

fn head_of(image: &SparseImage<'_>, len: usize) -> Vec<u8> {
    let len = usize::try_from(image.size).unwrap_or(usize::MAX).min(len);
    let mut head = vec![0; len];
    image.read_exact_at(0, &mut head).expect("within the file");
    head
}

/// Whether an image that was accepted says something, in the places where QEMU's readers look, that makes them open
/// another file. Written anew from the formats' documents, not with the parsers.
fn leads_out(format: SourceFormat, image: &SparseImage<'_>) -> bool {
    let head = head_of(image, 1 << 20);
    let big = |at: usize, len: usize| {
        head.get(at..at + len).unwrap_or_default().iter().fold(0u64, |n, &b| n << 8 | u64::from(b))
    };
    let holds = |text: &[u8]| head.windows(text.len()).any(|window| window.eq_ignore_ascii_case(text));
    match format {
        SourceFormat::Raw => false,
        SourceFormat::Qcow2 => big(8, 8) != 0 || big(4, 4) >= 3 && big(72, 8) & 4 != 0,
        SourceFormat::Vmdk => {
            let descriptor = &head[512.min(head.len())..(512 + 20 * 512).min(head.len())];
            let hint = b"parentFileNameHint";
            descriptor.windows(hint.len()).any(|window| window.eq_ignore_ascii_case(hint))
                || head.get(12..20).is_none_or(|capacity| capacity.iter().all(|&byte| byte == 0))
        }
        // A differencing VHDX names its parent in UTF-16 in a parent locator.
        SourceFormat::Vhdx => holds(b"r\0e\0l\0a\0t\0i\0v\0e\0_\0p\0a\0t\0h\0"),
        // Type 4 of a VDI is a differencing image.
        SourceFormat::Vdi => head.get(0x4c..0x50) == Some(&[4, 0, 0, 0]),
    }
}
