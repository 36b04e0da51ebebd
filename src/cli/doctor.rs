//! `cowdisk doctor`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::Session;
use super::args::Form;
use super::check::counted;
use super::output::{one_line, without_numbers};
use crate::doctor::{self, Line, Verdict};
use crate::error::{Error, ErrorKind, Result};

/// `cowdisk doctor …`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The directory of the store, or of one to be; that of --store without it
    #[arg(value_name = "STORE")]
    pub directory: Option<PathBuf>,
    #[command(flatten)]
    pub form: Form,
}

/// What was looked at, as `--json` shows it.
#[derive(Debug, Serialize)]
struct ReportView<'a> {
    store: String,
    /// Whether there is no problem: exit code 0.
    well: bool,
    lines: Vec<LineView<'a>>,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct LineView<'a> {
    topic: &'a str,
    /// `ok`, `warning` or `problem`.
    verdict: &'a str,
    message: &'a str,
    next: Option<&'a str>,
}

/// Prints what this host can do, and fails if disks cannot be served.
pub(super) fn run(session: &mut Session, args: DoctorArgs) -> Result<()> {
    let store = args.directory.unwrap_or_else(|| session.store.clone());
    let mut lines = doctor::examine(&store);
    lines.iter_mut().for_each(|line| line.message = without_numbers(&line.message));
    let count = |verdict| lines.iter().filter(|line| line.verdict == verdict).count() as u64;
    let (problems, warnings) = (count(Verdict::Problem), count(Verdict::Warning));
    if args.form.json {
        session.output.json(&ReportView {
            store: store.display().to_string(),
            well: problems == 0,
            lines: lines.iter().map(view).collect(),
        })?;
    } else {
        show(session, &lines)?;
        let warnings = counted(warnings, "warning", "warnings");
        session.output.line(&format!("found: {}, {warnings}", counted(problems, "problem", "problems")))?;
    }
    session.output.flush()?;
    match problems {
        0 => Ok(()),
        _ => {
            let message = format!("this host: {} to be solved", counted(problems, "problem", "problems"));
            Err(Error::new(ErrorKind::Unsupported, message))
        }
    }
}

fn view(line: &Line) -> LineView<'_> {
    LineView {
        topic: line.topic,
        verdict: line.verdict.as_str(),
        message: &line.message,
        next: line.next.as_deref(),
    }
}

/// A line for each thing, and below it the next step.
fn show(session: &mut Session, lines: &[Line]) -> Result<()> {
    let width = lines.iter().map(|line| line.topic.len()).max().unwrap_or_default();
    for line in lines {
        let verdict = line.verdict.as_str();
        session.output.line(&format!("{verdict:<7}  {:<width$}  {}", line.topic, one_line(&line.message)))?;
        if let Some(next) = &line.next {
            session.output.line(&format!("{:<7}  {:<width$}  to do: {next}", "", ""))?;
        }
    }
    Ok(())
}
