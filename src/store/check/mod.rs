//! The verifier of a whole store, and its repair.
//!
//! A check changes nothing and works on a mounted store too. What refers to what is read under the store's lock, so that
//! no change is seen half-done; disks and contents are read without any lock, but for the shared one that every reader of
//! a base holds. What is found is plain data ([`Finding`]); that something is wrong is no error of the check.
//!
//! A repair takes the lock of what it mends, looks again under it, and changes the store only as every other command
//! does (`atomic.rs`), so that a crash at any point leaves it no worse. It never removes what may be somebody's data: files
//! that the store does not know are left alone, and nothing counts as unreferenced while a record cannot be read.

mod contents;
mod disks;
mod inventory;
mod live_maps;
mod objects;
mod scrub;

use std::path::Path;
use std::sync::Arc;

pub(super) use scrub::hash_from_disk;
pub use scrub::{SCRUB_RATE_DEFAULT, SCRUB_RATE_MIN, ScrubReport, ScrubRequest};

use super::Store;
use super::names::{DiskName, ObjectName};
use super::progress::Progress;
use super::run_dir;
use super::superblock::{self, Identity};
use crate::error::{Error, ErrorKind, Result};
use crate::finding::{Finding, Outcome, Remedy, Severity};
use crate::storage::{Host, RealHost};

/// One disk of an instance, or all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckTarget {
    /// The instance.
    pub instance: ObjectName,
    /// The disk; `None`: all.
    pub disk: Option<DiskName>,
}

/// What to check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckRequest {
    /// Only these disks, and the bases that they are over; empty: the whole store.
    pub only: Vec<CheckTarget>,
    /// Read bases, kernels and ramdisks and compare them with their names.
    pub full: bool,
    /// Mend what can be mended.
    pub repair: bool,
}

/// What a check has done and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What is not as it should be, the worst first.
    pub findings: Vec<Finding>,
    /// How many bases were checked.
    pub bases: u64,
    /// How many kernels and ramdisks were checked.
    pub boot_files: u64,
    /// How many disks were checked.
    pub disks: u64,
    /// How many of these disks were in use; they are not repaired.
    pub disks_in_use: u64,
}

impl CheckReport {
    /// How many findings are of this severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }

    /// Whether nothing asks for attention: there are notes at most, or all else is mended.
    pub fn is_clean(&self) -> bool {
        !self.findings.iter().any(Finding::is_open)
    }

    fn sort(&mut self) {
        self.findings
            .sort_by(|one, two| two.severity.cmp(&one.severity).then_with(|| one.object.cmp(&two.object)));
    }

    fn add(
        &mut self,
        kind: &'static str,
        severity: Severity,
        object: impl Into<String>,
        message: impl Into<String>,
        remedy: Remedy,
    ) {
        self.findings.push(Finding::new(kind, severity, object, message, remedy));
    }
}

impl Store {
    /// Opens the store in `dir` as [`Store::open`] does, but leaves what is half-made where it is: for a check. A store
    /// that has lost its superblock opens as well, and the check says so.
    ///
    /// # Errors
    /// Those of [`Store::open`].
    pub fn open_as_it_is(dir: &Path) -> Result<Self> {
        Self::open_as_it_is_on(Arc::new(RealHost), dir)
    }

    /// [`Store::open_as_it_is`] by way of `host`, through which a repair changes the store.
    ///
    /// # Errors
    /// Those of [`Store::open`].
    pub fn open_as_it_is_on(host: Arc<dyn Host>, dir: &Path) -> Result<Self> {
        Self::open_unswept(host, dir, |root, fault| {
            let lost = matches!(fault.kind(), ErrorKind::NotFound | ErrorKind::Corrupt);
            if !lost || !superblock::is_store_without(root) {
                return Err(fault);
            }
            let uuid = run_dir::noted_uuid(root).unwrap_or_default();
            Ok((Identity::without_superblock(uuid), fault))
        })
    }

    /// Checks the store, or some of its disks, and repairs it if asked to.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if a disk that was asked for does not exist; [`ErrorKind::Interrupted`]; those of the
    /// host where nothing can be said without it. What is wrong with the store is a finding, not an error.
    pub fn check(&self, request: &CheckRequest, progress: &dyn Progress) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        let inventory = self.take_inventory(request, &mut report)?;
        self.check_disks(&inventory, request, progress, &mut report)?;
        self.check_contents(&inventory, request, progress, &mut report)?;
        if request.repair {
            self.repair_objects(&mut report);
        }
        report.sort();
        Ok(report)
    }
}

/// Notes what came of a repair.
fn note_outcome(finding: &mut Finding, result: Result<()>) {
    finding.outcome = match result {
        Ok(()) => Outcome::Mended,
        Err(error) => Outcome::Failed(error.to_string()),
    };
}

/// An error as what a finding says.
fn said(error: &Error) -> String {
    error.to_string()
}

/// What the operator can do about an error: its own hint, or else this.
fn hint_or(error: &Error, otherwise: &str) -> Remedy {
    Remedy::Operator(error.hint().unwrap_or(otherwise).to_owned())
}

/// Words for a message: the first few, and how many more there are.
fn list(words: &[String]) -> String {
    const SHOWN_MAX: usize = 5;
    let shown = words.iter().take(SHOWN_MAX).cloned().collect::<Vec<_>>().join(", ");
    match words.len().saturating_sub(SHOWN_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn is_gone(error: &Error) -> bool {
    error.kind() == ErrorKind::NotFound
}
