//! What a check finds, as plain data.

use std::fmt;

/// How bad a finding is. Ordered: what is worse is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Untidy, space that can be had back, or what a crash leaves and the next use mends. Nothing is at risk.
    Note,
    /// Something that stands behind the data is gone, or something does not work; no data is lost yet.
    Warning,
    /// Data is lost or at risk.
    Damage,
}

impl Severity {
    /// One lower-case word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Damage => "damage",
        }
    }

    /// Whether data is lost or at risk.
    pub fn data_at_risk(self) -> bool {
        self == Self::Damage
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What becomes of a finding. The text begins in lower case and has no full stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// A repair does this.
    Repair(String),
    /// No repair can help; this is what the operator can do.
    Operator(String),
    /// Nothing has to be done, and this is why.
    Nothing(String),
}

impl Remedy {
    /// The text.
    pub fn text(&self) -> &str {
        match self {
            Self::Repair(text) | Self::Operator(text) | Self::Nothing(text) => text,
        }
    }
}

/// What a repair has done about a finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No repair was asked for, or none is possible.
    Left,
    /// It is mended.
    Mended,
    /// The repair failed, for this reason; what it was to repair is as it was.
    Failed(String),
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// A word of its own for each kind of finding, for programs.
    pub kind: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it is about, such as `disk web-1/disk` or `base 9f2c…`.
    pub object: String,
    /// What is wrong, in lower case, without a full stop.
    pub message: String,
    /// What becomes of it.
    pub remedy: Remedy,
    /// What a repair has done.
    pub outcome: Outcome,
}

impl Finding {
    /// A finding about `object`, not repaired.
    pub fn new(
        kind: &'static str,
        severity: Severity,
        object: impl Into<String>,
        message: impl Into<String>,
        remedy: Remedy,
    ) -> Self {
        Self {
            kind,
            severity,
            object: object.into(),
            message: message.into(),
            remedy,
            outcome: Outcome::Left,
        }
    }

    /// Whether a repair can mend it.
    pub fn can_be_repaired(&self) -> bool {
        matches!(self.remedy, Remedy::Repair(_))
    }

    /// Whether it still asks for attention: more than a note, and not mended.
    pub fn is_open(&self) -> bool {
        self.severity > Severity::Note && self.outcome != Outcome::Mended
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.severity, self.object, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_or_a_mended_finding_asks_for_no_attention() {
        let finding = |severity, outcome| {
            let remedy = Remedy::Repair("puts it right".to_owned());
            Finding { outcome, ..Finding::new("kind", severity, "disk a/disk", "torn", remedy) }
        };
        assert!(!finding(Severity::Note, Outcome::Left).is_open());
        assert!(finding(Severity::Warning, Outcome::Left).is_open());
        assert!(finding(Severity::Damage, Outcome::Failed("no room".to_owned())).is_open());
        assert!(!finding(Severity::Damage, Outcome::Mended).is_open());
        assert_eq!(finding(Severity::Damage, Outcome::Left).to_string(), "damage: disk a/disk: torn");
    }
}
