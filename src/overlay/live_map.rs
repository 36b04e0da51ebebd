//! The live map: the allocation map of an open overlay, in shared memory.
//!
//! A file on tmpfs, mapped shared, so that it outlives the daemon (a `kill -9` loses no answered write) but not the
//! host's boot. It is read without a lock and changed by compare-and-swap of 64-bit words. The file holds a header that
//! binds it to layer, session and boot, then one 4 KiB page per map page, of which the first 4,032 bytes are states.
//!
//! The file is as long as the largest disk needs and almost all hole. A page is *present* once its memory is reserved;
//! a page that is not present is all `Base` and is never touched, because touching it would allocate memory, and with a
//! full tmpfs raise SIGBUS. So growing a disk moves nothing, and an open disk costs memory only for the parts in use.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, SeekFrom};

use super::durable_map::Position;
use super::page_bits::PageBits;
use super::states::{Extent, PageWords, SparseStates, extent_from, word_pieces};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::{BlockState, BootId, LayerId, PAGE_BYTES, PAGE_WORDS, SessionId, StateWord};
use crate::units::BlockSpan;

#[cfg(target_endian = "big")]
compile_error!(
    "the live map's words are read by atomics and as little-endian bytes of the file: both must agree"
);

const MAGIC_VALUE: [u8; 8] = *b"COWLIVE1";
const HEADER_BYTES: usize = PAGE_BYTES;
/// Magic, layer, session, boot.
const BINDING_BYTES: usize = 8 + 3 * 16;
/// The word after them is not zero once the states cannot be trusted.
const TRUST_WORD: usize = BINDING_BYTES / 8;
const DISTRUSTED: u64 = 1;
/// The next two are the [`Position`] of the durable map that the states build upon.
const GENERATION_WORD: usize = TRUST_WORD + 1;
const SEQUENCE_WORD: usize = GENERATION_WORD + 1;

/// What a live map belongs to. One with another binding says nothing about the layer as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The layer.
    pub layer: LayerId,
    /// The session of the layer's superblock.
    pub session: SessionId,
    /// The boot of the host.
    pub boot: BootId,
}

impl Binding {
    fn encode(self) -> [u8; BINDING_BYTES] {
        let mut bytes = [0; BINDING_BYTES];
        bytes[..8].copy_from_slice(&MAGIC_VALUE);
        bytes[8..24].copy_from_slice(&self.layer.0);
        bytes[24..40].copy_from_slice(&self.session.0);
        bytes[40..56].copy_from_slice(&self.boot.0);
        bytes
    }
}

/// The running kernel's boot id.
///
/// # Errors
/// If `/proc` is not mounted or holds something else there.
pub fn current_boot() -> Result<BootId> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).context(|| format!("read {PATH}"))?;
    text.trim().replace('-', "").parse()
}

/// What was found in the place of a live map.
#[derive(Debug)]
pub enum TakeUp {
    /// The map that belongs to the layer as it is, and a copy of its states.
    Taken(LiveMap, SparseStates),
    /// That map, but a failed sync made it worthless.
    Distrusted,
    /// None, or one that belongs to something else.
    Missing,
}

/// The live map of one open overlay.
#[derive(Debug)]
pub struct LiveMap {
    path: PathBuf,
    file: File,
    map: MmapRaw,
    /// The pages whose memory is reserved, so that they may be touched.
    present: PageBits,
}

impl LiveMap {
    /// Makes the file anew, for `pages` pages, holding `states`. What was there before is removed.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if the tmpfs has no room for the states; [`ErrorKind::Busy`] if a live map that is there
    /// is in use.
    pub fn create(path: &Path, binding: Binding, pages: u64, states: &SparseStates) -> Result<Self> {
        if let Some(old) = open_if_there(path)? {
            lock(path, &old)?;
            remove_if_there(path)?;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).context(|| format!("create live map {}", path.display()))?;
        lock(path, &file)?;
        let live = Self::over(path, file, pages)?;
        live.reserve_bytes(0, HEADER_BYTES as u64)?;
        for (page, words) in states.pages() {
            live.reserve(page)?;
            for (place, &word) in live.words(page).expect("just reserved").iter().zip(words) {
                place.store(word, Ordering::Relaxed);
            }
        }
        // Last, so that a map that a crash cut short is bound to nothing.
        live.file
            .write_all_at(&binding.encode(), 0)
            .context(|| format!("write live map {}", path.display()))?;
        Ok(live)
    }

    /// Takes up the map that an earlier process left, with a private copy of its states, over a durable map that has come
    /// to `position`.
    ///
    /// # Errors
    /// If the file cannot be read; [`ErrorKind::Corrupt`] if it holds what no cowdisk writes; [`ErrorKind::Busy`] if it
    /// is in use.
    pub fn take_up(path: &Path, binding: Binding, position: Position, pages: u64) -> Result<TakeUp> {
        let Some(file) = open_if_there(path)? else { return Ok(TakeUp::Missing) };
        lock(path, &file)?;
        match read_header(path, &file, binding)? {
            Header::Trusted(noted) if noted.is_covered_by(position) => {}
            // The layer's files are older than this map: somebody put a backup of them in their place.
            Header::Trusted(_) | Header::Foreign => return Ok(TakeUp::Missing),
            Header::Distrusted => return Ok(TakeUp::Distrusted),
        }
        let states = read_pages(path, &file, pages)?;
        let live = Self::over(path, file, pages)?;
        for (page, _) in states.pages() {
            live.reserve(page)?;
        }
        Ok(TakeUp::Taken(live, states))
    }

    fn over(path: &Path, file: File, pages: u64) -> Result<Self> {
        let len = HEADER_BYTES as u64 + pages * PAGE_BYTES as u64;
        file.set_len(len).context(|| format!("size live map {}", path.display()))?;
        let len = usize::try_from(len).expect("at most 1.1 GiB: 16 TiB in blocks of 4 KiB");
        let map = MmapOptions::new()
            .len(len)
            .map_raw(&file)
            .context(|| format!("map live map {}", path.display()))?;
        let present = PageBits::new(pages);
        Ok(Self { path: path.to_owned(), file, map, present })
    }

    fn reserve_bytes(&self, offset: u64, len: u64) -> Result<()> {
        let reserve = || rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, len);
        rustix::io::retry_on_intr(reserve)
            .context(|| format!("reserve memory for live map {}", self.path.display()))
    }

    /// Reserves the memory of `page`; from then on it may be changed. Does nothing the second time.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if the tmpfs is full; nothing has changed then.
    pub fn reserve(&self, page: u64) -> Result<()> {
        if self.present.get(page) {
            return Ok(());
        }
        self.reserve_bytes(HEADER_BYTES as u64 + page * PAGE_BYTES as u64, PAGE_BYTES as u64)?;
        self.present.set(page);
        Ok(())
    }

    /// The words of `page`, or `None` for a page that is all `Base`.
    fn words(&self, page: u64) -> Option<&[AtomicU64; PAGE_WORDS]> {
        self.present.get(page).then(|| {
            let at =
                HEADER_BYTES + usize::try_from(page).expect("a page number that `present` has") * PAGE_BYTES;
            // SAFETY: `at` + 4,096 lies within the mapping, which was made with `pages` pages, lives as long as `self`
            // and is aligned to 4 KiB. Every access to it, here and in other processes, is of whole aligned words by
            // atomics or system calls. The memory is reserved, so touching it raises no signal as long as nobody else
            // cuts the file, which lies in a folder that only our own user can enter.
            unsafe { &*self.map.as_mut_ptr().add(at).cast::<[AtomicU64; PAGE_WORDS]>() }
        })
    }

    /// The longest run from block `start` on, up to `end` exclusive. Lock-free.
    pub fn extent(&self, start: u64, end: u64) -> Extent {
        extent_from(start, end, |page| {
            // Acquire: whoever sees a new state also sees the data that was written before it.
            self.words(page).map(|words| move |word: usize| words[word].load(Ordering::Acquire))
        })
    }

    /// Gives all blocks of `span` a new state.
    ///
    /// # Panics
    /// If a page of the span is not reserved.
    pub fn set(&self, span: BlockSpan, state: BlockState) {
        for piece in word_pieces(span) {
            let word = &self.words(piece.page).expect("reserved before it is changed")[piece.word];
            let with_state = |word| Some(StateWord(word).with(piece.start, piece.end, state).0);
            // Other threads change other blocks of the same word; the new state never fails to apply.
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, with_state);
        }
    }

    /// A copy of the words of `page`.
    pub fn snapshot(&self, page: u64) -> Box<PageWords> {
        let mut copy = Box::new([0; PAGE_WORDS]);
        if let Some(words) = self.words(page) {
            for (place, word) in copy.iter_mut().zip(words) {
                *place = word.load(Ordering::Acquire);
            }
        }
        copy
    }

    fn header_word(&self, word: usize) -> &AtomicU64 {
        assert!(word < HEADER_BYTES / 8);
        // SAFETY: the word lies within the header, the first 4 KiB of the mapping, which is aligned to 4 KiB, lives as
        // long as `self` and is reserved. After its creation the header is accessed by atomics and system calls only.
        unsafe { &*self.map.as_mut_ptr().cast::<AtomicU64>().add(word) }
    }

    /// Says that the states in this map may name data that a failed sync has lost: the next opening uses the durable
    /// map instead.
    pub fn distrust(&self) {
        self.header_word(TRUST_WORD).store(DISTRUSTED, Ordering::Release);
    }

    /// Notes how far the durable map has come: over an older one this map will not be taken up.
    pub fn note_durable(&self, position: Position) {
        self.header_word(GENERATION_WORD).store(position.generation, Ordering::Release);
        self.header_word(SEQUENCE_WORD).store(position.next_sequence, Ordering::Release);
    }

    /// Removes the file: the layer was closed cleanly.
    pub fn remove(self) -> Result<()> {
        remove_if_there(&self.path)
    }
}

/// What is in the place of a live map.
#[derive(Debug)]
pub enum Look {
    /// The map that belongs to the layer as it is: a copy of its states.
    Bound(SparseStates),
    /// That map, but a failed sync made it worthless.
    Distrusted,
    /// None, or one that belongs to something else.
    Missing,
}

/// Reads a live map, which another process may be changing; changes nothing. With a `position`, the one that the durable
/// map has come to, a map that builds upon a later one is not the layer's.
///
/// # Errors
/// If the file cannot be read; [`ErrorKind::Corrupt`] if it holds what no cowdisk writes.
pub fn look(path: &Path, binding: Binding, position: Option<Position>, pages: u64) -> Result<Look> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Look::Missing),
        Err(error) => return Err(Error::io(format!("open live map {}", path.display()), error)),
    };
    match read_header(path, &file, binding)? {
        Header::Trusted(noted) if position.is_none_or(|position| noted.is_covered_by(position)) => {
            read_pages(path, &file, pages).map(Look::Bound)
        }
        Header::Trusted(_) | Header::Foreign => Ok(Look::Missing),
        Header::Distrusted => Ok(Look::Distrusted),
    }
}

/// Whether a live map of `layer` is at `path` that no opening of the layer will take up, now that the layer has no session and
/// its durable map has come to `position`: one that builds upon nothing later, or one of an earlier boot.
///
/// # Errors
/// If it cannot be read.
pub fn is_left(path: &Path, layer: LayerId, position: Position) -> Result<bool> {
    match File::open(path) {
        Ok(file) => is_left_in(path, &file, layer, position),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(format!("open live map {}", path.display()), error)),
    }
}

/// Whether a live map of `layer` and of this boot is at `path` that builds upon a later durable map than one that has come to
/// `position`.
///
/// # Errors
/// If it cannot be read.
pub fn is_ahead(path: &Path, layer: LayerId, position: Position) -> Result<bool> {
    let Some(file) = open_if_there(path)? else { return Ok(false) };
    let Some(header) = read_header_bytes(path, &file)? else { return Ok(false) };
    let of_boot = header[40..56] == current_boot()?.0;
    let ours = header[..8] == MAGIC_VALUE && header[8..24] == layer.0;
    Ok(ours && of_boot && !noted_position(&header).is_covered_by(position))
}

/// Removes the live map at `path` if [`is_left`] still says so and nobody has it open. The caller sees to it that nobody
/// opens the layer.
///
/// # Errors
/// [`ErrorKind::Busy`] if it is in use; those of the host.
pub fn remove_left(path: &Path, layer: LayerId, position: Position) -> Result<()> {
    let Some(file) = open_if_there(path)? else { return Ok(()) };
    lock(path, &file)?;
    match is_left_in(path, &file, layer, position)? {
        true => remove_if_there(path),
        false => {
            let message = format!("live map {}: has changed since it was looked at", path.display());
            Err(Error::new(ErrorKind::Busy, message))
        }
    }
}

fn is_left_in(path: &Path, file: &File, layer: LayerId, position: Position) -> Result<bool> {
    let Some(header) = read_header_bytes(path, file)? else { return Ok(false) };
    let boot = current_boot()?;
    let ours = header[..8] == MAGIC_VALUE && header[8..24] == layer.0;
    Ok(ours && (header[40..56] != boot.0 || noted_position(&header).is_covered_by(position)))
}

/// What the header of a live map says.
enum Header {
    /// Bound to the layer as it is; the states build upon a durable map that had come so far.
    Trusted(Position),
    /// Bound to it, but a failed sync made it worthless.
    Distrusted,
    /// Bound to something else, or to nothing.
    Foreign,
}

fn read_header(path: &Path, file: &File, binding: Binding) -> Result<Header> {
    let Some(header) = read_header_bytes(path, file)? else { return Ok(Header::Foreign) };
    Ok(if header[..BINDING_BYTES] != binding.encode() {
        Header::Foreign
    } else if header_word(&header, TRUST_WORD) != 0 {
        Header::Distrusted
    } else {
        Header::Trusted(noted_position(&header))
    })
}

/// The header; `None` if the file is too short to have one.
fn read_header_bytes(path: &Path, file: &File) -> Result<Option<[u8; HEADER_BYTES]>> {
    let mut header = [0; HEADER_BYTES];
    match file.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        other => other.map(|()| Some(header)).context(|| format!("read live map {}", path.display())),
    }
}

fn header_word(header: &[u8; HEADER_BYTES], word: usize) -> u64 {
    u64::from_le_bytes(header[word * 8..][..8].try_into().expect("8 bytes"))
}

/// How far the durable map had come that the states build upon.
fn noted_position(header: &[u8; HEADER_BYTES]) -> Position {
    let word = |word| header_word(header, word);
    Position { generation: word(GENERATION_WORD), next_sequence: word(SEQUENCE_WORD) }
}

fn read_pages(path: &Path, file: &File, pages: u64) -> Result<SparseStates> {
    let name = path.display();
    let mut states = SparseStates::default();
    let mut at = HEADER_BYTES as u64;
    while let Some(data) = next_data(file, at).context(|| format!("read live map {name}"))? {
        let page = (data - HEADER_BYTES as u64) / PAGE_BYTES as u64;
        if page >= pages {
            break;
        }
        at = HEADER_BYTES as u64 + page * PAGE_BYTES as u64;
        let mut bytes = [0; PAGE_BYTES];
        match file.read_exact_at(&mut bytes, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let message = format!("live map {name}: cut short in page {page}");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            other => other.context(|| format!("read live map {name}"))?,
        }
        let mut words = Box::new([0; PAGE_WORDS]);
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("chunks of 8"));
        }
        if !words.iter().all(|&word| StateWord(word).is_valid()) {
            let message = format!("live map {name}: page {page} has a block in the reserved state 3");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        states.insert_page(page, words);
        at += PAGE_BYTES as u64;
    }
    Ok(states)
}

fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(found) => Ok(Some(found.max(offset))),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn open_if_there(path: &Path) -> Result<Option<File>> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("open live map {}", path.display()), error)),
    }
}

/// One process at a time. The layer's own lock sees to that, but not where a whole store was copied, file by file or as
/// a snapshot, and both copies, of one layer id, are served.
fn lock(path: &Path, file: &File) -> Result<()> {
    match rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let message = format!("live map {}: in use by another process", path.display());
            Err(Error::new(ErrorKind::Busy, message).with_hint("is a copy of this store being served?"))
        }
        other => other.context(|| format!("lock live map {}", path.display())),
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.context(|| format!("remove live map {}", path.display())),
    }
}
