//! `cowdisk check …`.

use clap::Args;
use serde::Serialize;

use super::Session;
use super::args::{Form, MapTarget};
use super::values::map_target;
use crate::error::{Error, ErrorKind, Result};
use crate::finding::{Finding, Outcome, Remedy, Severity};
use crate::store::{CheckReport, CheckRequest, CheckTarget, Store};

/// `cowdisk check …`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Only this instance, or disk, and the bases it is over; the whole store without it
    #[arg(value_name = "INSTANCE[/DISK]", value_parser = check_target)]
    pub targets: Vec<CheckTarget>,
    /// Mend what can be mended without losing data; leaves disks in use alone
    #[arg(long)]
    pub repair: bool,
    /// Read all bases, kernels and ramdisks and compare them with what was stored
    #[arg(long)]
    pub full: bool,
    #[command(flatten)]
    pub form: Form,
}

pub(super) fn check_target(text: &str) -> Result<CheckTarget> {
    let MapTarget { instance, disk } = map_target(text)?;
    Ok(CheckTarget { instance, disk: text.contains('/').then_some(disk) })
}

/// A finding as `--json` shows it.
#[derive(Debug, Serialize)]
pub(super) struct FindingView<'a> {
    kind: &'a str,
    /// `note`, `warning` or `damage`.
    severity: &'a str,
    object: &'a str,
    message: &'a str,
    data_at_risk: bool,
    /// Whether `--repair` can mend it.
    repairable: bool,
    /// What a repair does, what the operator can do, or why nothing has to be done.
    remedy: &'a str,
    /// `left`, `mended` or `failed`.
    outcome: &'a str,
    /// Why the repair failed.
    error: Option<&'a str>,
}

/// A check as `--json` shows it.
#[derive(Debug, Serialize)]
struct ReportView<'a> {
    store: String,
    /// Whether nothing asks for attention: exit code 0.
    clean: bool,
    disks: u64,
    disks_in_use: u64,
    bases: u64,
    boot_files: u64,
    findings: Vec<FindingView<'a>>,
}

/// Checks, prints what was found, and fails if something of it asks for attention.
pub(super) fn run(session: &mut Session, args: CheckArgs) -> Result<()> {
    let store = Store::open_as_it_is(&session.store)?;
    let request = CheckRequest { only: args.targets, full: args.full, repair: args.repair };
    let report = store.check(&request, &session.progress()?)?;
    if args.form.json {
        session.output.json(&view(&store, &report))?;
    } else {
        show(session, &report)?;
    }
    conclude(session, &store, &report)
}

fn view<'a>(store: &Store, report: &'a CheckReport) -> ReportView<'a> {
    ReportView {
        store: store.dir().display().to_string(),
        clean: report.is_clean(),
        disks: report.disks,
        disks_in_use: report.disks_in_use,
        bases: report.bases,
        boot_files: report.boot_files,
        findings: report.findings.iter().map(finding_view).collect(),
    }
}

/// A finding for programs.
pub(super) fn finding_view(finding: &Finding) -> FindingView<'_> {
    let (outcome, error) = match &finding.outcome {
        Outcome::Left => ("left", None),
        Outcome::Mended => ("mended", None),
        Outcome::Failed(error) => ("failed", Some(error.as_str())),
    };
    FindingView {
        kind: finding.kind,
        severity: finding.severity.as_str(),
        object: &finding.object,
        message: &finding.message,
        data_at_risk: finding.severity.data_at_risk(),
        repairable: finding.can_be_repaired(),
        remedy: finding.remedy.text(),
        outcome,
        error,
    }
}

/// What was found, and how much was checked.
fn show(session: &mut Session, report: &CheckReport) -> Result<()> {
    show_findings(session, report, |_| "--repair")?;
    let mut counts = vec![
        counted(report.disks, "disk", "disks"),
        counted(report.bases, "base", "bases"),
        counted(report.boot_files, "boot file", "boot files"),
    ];
    if report.disks_in_use > 0 {
        counts.push(format!("{} in use", counted(report.disks_in_use, "disk", "disks")));
    }
    session.output.line(&format!("checked: {}", counts.join(", ")))?;
    session.output.line(&format!("found: {}", summary(report)))
}

/// Each finding on one line, and on a second one whether data is at risk and what becomes of it. `mender` says which command,
/// or option, mends what can be mended.
pub(super) fn show_findings(
    session: &mut Session,
    report: &CheckReport,
    mender: impl Fn(&Finding) -> &'static str,
) -> Result<()> {
    for finding in &report.findings {
        session.output.line(&super::output::one_line(&finding.to_string()))?;
        session.output.line(&super::output::one_line(&format!(
            "    {}; {}",
            risk(finding),
            prospect(finding, mender(finding))
        )))?;
    }
    Ok(())
}

pub(super) fn counted(count: u64, one: &str, more: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { more })
}

/// How many findings of which severity.
pub(super) fn summary(report: &CheckReport) -> String {
    let count = |severity, one, more| {
        let count = report.count(severity);
        (count > 0).then(|| counted(count as u64, one, more))
    };
    let counts: Vec<String> = [
        count(Severity::Damage, "damage", "damages"),
        count(Severity::Warning, "warning", "warnings"),
        count(Severity::Note, "note", "notes"),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mended = report.findings.iter().filter(|finding| finding.outcome == Outcome::Mended).count();
    match (counts.is_empty(), mended) {
        (true, _) => "nothing".to_owned(),
        (false, 0) => counts.join(", "),
        (false, mended) => format!("{}; {mended} mended", counts.join(", ")),
    }
}

fn risk(finding: &Finding) -> &'static str {
    match finding.severity {
        Severity::Damage => "data is lost or at risk",
        Severity::Warning => "no data is lost",
        Severity::Note => "no data is at risk",
    }
}

fn prospect(finding: &Finding, mender: &str) -> String {
    let text = finding.remedy.text();
    match (&finding.outcome, &finding.remedy) {
        (Outcome::Mended, _) => format!("mended: {text}"),
        (Outcome::Failed(error), Remedy::Repair(_)) => format!("the repair failed: {error}"),
        (Outcome::Failed(error), _) => format!("{text} ({error})"),
        (Outcome::Left, Remedy::Repair(_)) => format!("{mender} {text}"),
        (Outcome::Left, Remedy::Operator(_)) => format!("no repair: {text}"),
        (Outcome::Left, Remedy::Nothing(_)) => text.to_owned(),
    }
}

/// How many findings ask for attention.
pub(super) fn to_be_looked_at(report: &CheckReport) -> String {
    let open = report.findings.iter().filter(|finding| finding.is_open()).count();
    format!("{} to be looked at", counted(open as u64, "finding", "findings"))
}

/// The exit code: 1 if something asks for attention.
fn conclude(session: &mut Session, store: &Store, report: &CheckReport) -> Result<()> {
    if report.is_clean() {
        return Ok(());
    }
    session.output.flush()?;
    let repairable = report.findings.iter().any(|finding| finding.is_open() && finding.can_be_repaired());
    let message = format!("store {}: {}", store.dir().display(), to_be_looked_at(report));
    let error = Error::new(ErrorKind::Corrupt, message);
    Err(if repairable && !report.findings.iter().any(|finding| finding.outcome != Outcome::Left) {
        error.with_hint("mend what can be mended: cowdisk check --repair")
    } else {
        error
    })
}
