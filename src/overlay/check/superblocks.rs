//! The two copies of the superblock, side by side.

use crate::error::{ErrorKind, Result};
use crate::finding::{Finding, Remedy, Severity};
use crate::format::{CHECKSUM_BYTES, SUPERBLOCK_BYTES, SessionId, Superblock};
use crate::storage::Storage;
use crate::units::SECTOR_LEN;

type Copy = [u8; SUPERBLOCK_BYTES];

/// What both copies say.
#[derive(Debug)]
pub(super) struct Copies {
    /// The newer whole one, as an opening takes it; `None` if there is none that can be read.
    pub(super) newest: Option<Superblock>,
    /// The copy (0 or 1) that a repair writes anew.
    pub(super) to_rewrite: Option<u64>,
    /// What is wrong with them.
    pub(super) finding: Option<Finding>,
}

/// Reads and compares the copies.
///
/// # Errors
/// Those of the host.
pub(super) fn read(object: &str, map: &dyn Storage) -> Result<Copies> {
    let mut bytes = [[0; SUPERBLOCK_BYTES]; 2];
    for (at, copy) in (0..).step_by(SUPERBLOCK_BYTES).zip(&mut bytes) {
        map.read_at(at, copy)?;
    }
    let [first, second] = bytes.each_ref().map(Superblock::decode);
    let finding =
        |kind, severity, message: String, remedy| Some(Finding::new(kind, severity, object, message, remedy));
    for copy in [&first, &second] {
        if let Err(error) = copy
            && error.kind() == ErrorKind::Unsupported
        {
            let remedy = Remedy::Operator("check it with the cowdisk that wrote it".to_owned());
            let finding = finding("newer-format", Severity::Warning, error.to_string(), remedy);
            return Ok(Copies { newest: None, to_rewrite: None, finding });
        }
    }
    let rewrite = || Remedy::Repair("writes it anew from the other copy".to_owned());
    Ok(match (first, second) {
        (Err(error), Err(_)) => {
            let message = format!("no copy of the superblock is whole: {error}");
            let finding = finding("superblock-lost", Severity::Damage, message, super::from_backup());
            Copies { newest: None, to_rewrite: None, finding }
        }
        (Ok(one), Ok(two)) if one == two || begins_session(&two, &one) => {
            Copies { newest: Some(two), to_rewrite: None, finding: None }
        }
        (Ok(one), Ok(two)) if begins_session(&one, &two) => {
            Copies { newest: Some(one), to_rewrite: None, finding: None }
        }
        (Ok(one), Ok(two)) => {
            let (newest, other, to_rewrite) =
                if two.generation > one.generation { (two, one, 0) } else { (one, two, 1) };
            let by_a_crash = newest.generation == other.generation + 1 && newest.layer == other.layer;
            let (severity, message) = if by_a_crash {
                (Severity::Note, "a copy of the superblock is one writing behind, as a crash leaves it")
            } else {
                (Severity::Warning, "the copies of the superblock differ by more than a crash explains")
            };
            let finding = finding("superblock-stale", severity, message.to_owned(), rewrite());
            Copies { newest: Some(newest), to_rewrite: Some(to_rewrite), finding }
        }
        (one, two) => {
            let good = usize::from(one.is_err());
            let torn = is_torn(&bytes[1 - good], &bytes[good]);
            let (severity, message) = if torn {
                (Severity::Note, "a copy of the superblock is torn, as a crash leaves it")
            } else {
                (Severity::Warning, "a copy of the superblock is damaged; the other one is whole")
            };
            let finding = finding("superblock-copy", severity, message.to_owned(), rewrite());
            Copies { newest: one.or(two).ok(), to_rewrite: Some(1 - good as u64), finding }
        }
    })
}

/// Whether `newest` is what the beginning of a session writes after `other`: until the first commit that is as it should be.
fn begins_session(newest: &Superblock, other: &Superblock) -> bool {
    let begun = Superblock {
        generation: other.generation + 1,
        session: newest.session,
        boot: newest.boot,
        journal_bytes: newest.journal_bytes,
        contents_since: newest.contents_since,
        ..other.clone()
    };
    other.session == SessionId::NONE && newest.session != SessionId::NONE && *newest == begun
}

/// Whether a crash while `bad` was written explains it: it begins as the writing that `good` has and ends otherwise, or it
/// begins as the writing before or after that. (How it then ends nobody can tell: after two crashes in a row the writing
/// after lies over the one before.) Damage elsewhere, or to the very writing that `good` has, is none of its doing.
fn is_torn(bad: &Copy, good: &Copy) -> bool {
    let tail = SUPERBLOCK_BYTES - SECTOR_LEN;
    let middle_is_zero = bad[SECTOR_LEN..SUPERBLOCK_BYTES - CHECKSUM_BYTES].iter().all(|&byte| byte == 0);
    let (head_same, tail_same) = (bad[..SECTOR_LEN] == good[..SECTOR_LEN], bad[tail..] == good[tail..]);
    let distance = Superblock::generation_of(bad).abs_diff(Superblock::generation_of(good));
    middle_is_zero && (head_same && !tail_same || distance == 1)
}
