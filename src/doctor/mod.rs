//! What this host can do for cowdisk, and what stands in the way: looked up and tried, without changing anything.
//!
//! What has to be tried on a file system is tried on a file without a name, which is gone when it is closed, whatever
//! happens. Nothing is started but programs that tell their version or their state, and a guest of 512 bytes that tries KVM.

mod kernel;
mod place;
mod tools;

use std::path::Path;

/// How well something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Something does not work, or not as well as it could; disks do.
    Warning,
    /// Disks cannot be served, or not safely.
    Problem,
}

impl Verdict {
    /// One lower-case word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// A word of its own for each thing, for programs.
    pub topic: &'static str,
    /// How well it is.
    pub verdict: Verdict,
    /// What was found, in lower case, without a full stop.
    pub message: String,
    /// The next step, unless it is well.
    pub next: Option<String>,
}

impl Line {
    fn ok(topic: &'static str, message: impl Into<String>) -> Self {
        Self { topic, verdict: Verdict::Ok, message: message.into(), next: None }
    }

    fn warning(topic: &'static str, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self { topic, verdict: Verdict::Warning, message: message.into(), next: Some(next.into()) }
    }

    fn problem(topic: &'static str, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self { topic, verdict: Verdict::Problem, message: message.into(), next: Some(next.into()) }
    }
}

/// Looks at the host, and at `store`, which need not be there.
pub fn examine(store: &Path) -> Vec<Line> {
    let mut lines = kernel::look();
    lines.extend(place::look(store));
    lines.extend(tools::look());
    lines
}
