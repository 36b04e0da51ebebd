//! clap's errors in the form of all others: one line, and a hint on a second.

use std::error::Error as _;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind as ClapKind};
use clap::{Command, CommandFactory as _};

use super::args::Cli;
use crate::error::{Error, ErrorKind};

/// What clap found: a text that was asked for (help, version), or a wrong use.
pub enum Finding {
    /// For stdout; exit 0.
    Text(String),
    /// For stderr; exit 2.
    Wrong(Error),
}

/// Sorts out what clap reports about `arguments`, the first of which is the program.
pub fn finding(error: &clap::Error, arguments: &[OsString]) -> Finding {
    let text = error.render().to_string();
    if matches!(error.kind(), ClapKind::DisplayHelp | ClapKind::DisplayVersion) {
        return Finding::Text(text);
    }
    let wrong = Error::new(ErrorKind::Invalid, message(error, &text));
    Finding::Wrong(match hint(error, &text, arguments) {
        Some(hint) => wrong.with_hint(hint),
        None => wrong,
    })
}

fn message(error: &clap::Error, text: &str) -> String {
    match (error.kind(), error.source()) {
        (ClapKind::MissingRequiredArgument, _) => {
            format!("missing {}", values(error, ContextKind::InvalidArg).join(" "))
        }
        (ClapKind::MissingSubcommand, _) => "no command given".into(),
        (ClapKind::InvalidSubcommand, _) => {
            format!("no such command: {}", values(error, ContextKind::InvalidSubcommand).join(" "))
        }
        (ClapKind::ValueValidation, Some(source)) => {
            format!("{}: {source}", values(error, ContextKind::InvalidArg).join(" "))
        }
        // The first paragraph, which clap may have broken into lines.
        _ => {
            let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
            let paragraph = lines.collect::<Vec<_>>().join(" ");
            paragraph.strip_prefix("error: ").unwrap_or(&paragraph).to_owned()
        }
    }
}

/// clap's own suggestion, else what the command that was meant takes; none where the message says it all.
fn hint(error: &clap::Error, text: &str, arguments: &[OsString]) -> Option<String> {
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: "));
    match error.kind() {
        _ if tip.is_some() => tip.map(str::to_owned),
        ClapKind::ValueValidation | ClapKind::InvalidValue => None,
        ClapKind::MissingSubcommand | ClapKind::InvalidSubcommand => {
            let command = command_meant(arguments);
            let names = command.get_subcommands().map(Command::get_name).filter(|name| *name != "help");
            let names: Vec<&str> = names.collect();
            Some(format!("commands of {}: {}", name(&command), names.join(", ")))
        }
        _ => {
            let usage = command_meant(arguments).render_usage().to_string();
            Some(usage.lines().map(str::trim).collect::<Vec<_>>().join(" ").replacen("Usage", "usage", 1))
        }
    }
}

/// The deepest command that `arguments` name.
fn command_meant(arguments: &[OsString]) -> Command {
    let mut command = Cli::command();
    command.build();
    for argument in arguments.iter().skip(1) {
        if let Some(inner) = argument.to_str().and_then(|name| command.find_subcommand(name)) {
            command = inner.clone();
        }
    }
    command
}

fn name(command: &Command) -> &str {
    command.get_bin_name().unwrap_or_else(|| command.get_name())
}

fn values(error: &clap::Error, kind: ContextKind) -> Vec<String> {
    match error.get(kind) {
        Some(ContextValue::Strings(values)) => values.clone(),
        Some(ContextValue::String(value)) => vec![value.clone()],
        _ => Vec::new(),
    }
}
