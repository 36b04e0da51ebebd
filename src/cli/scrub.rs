//! `cowdisk scrub …`.

use std::num::NonZeroU64;

use clap::Args;
use serde::Serialize;

use super::Session;
use super::args::Form;
use super::check::{
    FindingView, check_target, counted, finding_view, show_findings, summary, to_be_looked_at,
};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{CheckTarget, SCRUB_RATE_DEFAULT, SCRUB_RATE_MIN, ScrubReport, ScrubRequest, Store};
use crate::units::{HumanBytes, parse_size};

/// `cowdisk scrub …`
#[derive(Debug, Args)]
pub struct ScrubArgs {
    /// Only this instance, or disk, and the bases it is over; the whole store without it
    #[arg(value_name = "INSTANCE[/DISK]", value_parser = check_target)]
    pub targets: Vec<CheckTarget>,
    /// Read at most so many bytes a second, at least 64K; 0: as fast as the disk reads [default: 100M]
    #[arg(long, value_name = "SIZE", value_parser = rate, allow_negative_numbers = true)]
    pub rate: Option<u64>,
    #[command(flatten)]
    pub form: Form,
}

fn rate(text: &str) -> Result<u64> {
    match parse_size(text)? {
        rate @ (0 | SCRUB_RATE_MIN..) => Ok(rate),
        rate => Err(Error::new(
            ErrorKind::Invalid,
            format!("rate of {rate} bytes a second: must be 0 (no limit) or at least 64K"),
        )),
    }
}

/// A scrub as `--json` shows it. Sizes are bytes.
#[derive(Debug, Serialize)]
struct ReportView<'a> {
    store: String,
    /// Whether all was read and nothing asks for attention: exit code 0.
    clean: bool,
    /// Whether all was read; false if it was interrupted.
    complete: bool,
    bases: u64,
    bases_read: u64,
    boot_files: u64,
    boot_files_read: u64,
    disks: u64,
    disks_read: u64,
    disks_in_use: u64,
    bytes_read: u64,
    /// Files that could not be read past the host's cache.
    read_through_cache: u64,
    /// Whether the kernel refused a lower I/O priority.
    usual_priority: bool,
    findings: Vec<FindingView<'a>>,
}

/// Reads all, prints what was found, and fails if something of it asks for attention or if it was interrupted.
pub(super) fn run(session: &mut Session, args: ScrubArgs) -> Result<()> {
    let store = Store::open_as_it_is(&session.store)?;
    let rate = NonZeroU64::new(args.rate.unwrap_or(SCRUB_RATE_DEFAULT));
    let report = store.scrub(&ScrubRequest { only: args.targets, rate }, &session.progress()?)?;
    if args.form.json {
        session.output.json(&view(&store, &report))?;
    } else {
        show(session, &report)?;
    }
    session.output.flush()?;
    conclude(&store, &report)
}

fn view<'a>(store: &Store, report: &'a ScrubReport) -> ReportView<'a> {
    let check = &report.check;
    ReportView {
        store: store.dir().display().to_string(),
        clean: report.complete && check.is_clean(),
        complete: report.complete,
        bases: check.bases,
        bases_read: report.bases_read,
        boot_files: check.boot_files,
        boot_files_read: report.boot_files_read,
        disks: check.disks,
        disks_read: report.disks_read,
        disks_in_use: check.disks_in_use,
        bytes_read: report.bytes_read,
        read_through_cache: report.through_cache,
        usual_priority: report.usual_priority,
        findings: check.findings.iter().map(finding_view).collect(),
    }
}

fn show(session: &mut Session, report: &ScrubReport) -> Result<()> {
    show_findings(session, &report.check, |finding| match finding.kind {
        // What only a reading of the base can forgive.
        "base-changed" => "check --full --repair",
        _ => "check --repair",
    })?;
    session.output.line(&format!(
        "read: {}, {}, {}; {}",
        counted(report.bases_read, "base", "bases"),
        counted(report.boot_files_read, "boot file", "boot files"),
        counted(report.disks_read, "disk", "disks"),
        HumanBytes(report.bytes_read)
    ))?;
    if report.through_cache > 0 {
        let files = counted(report.through_cache, "file", "files");
        session.output.line(&format!(
            "note: the host's file system has no direct reads: {files} read through its cache, which may hide what its disk has lost"
        ))?;
    }
    session.output.line(&format!("found: {}", summary(&report.check)))
}

/// The exit code: 1 if something asks for attention, or if not all was read.
fn conclude(store: &Store, report: &ScrubReport) -> Result<()> {
    let shown = store.dir().display();
    match (report.complete, report.check.is_clean()) {
        (true, true) => Ok(()),
        (true, false) => {
            Err(Error::new(ErrorKind::Corrupt, format!("store {shown}: {}", to_be_looked_at(&report.check))))
        }
        (false, clean) => {
            let found = if clean { String::new() } else { format!("; {}", to_be_looked_at(&report.check)) };
            let message = format!("store {shown}: interrupted before all was read{found}");
            Err(Error::new(ErrorKind::Interrupted, message))
        }
    }
}
