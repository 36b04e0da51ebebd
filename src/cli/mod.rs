//! The command `cowdisk`: arguments, commands, output, logger.
//!
//! Errors go to stderr as one line, `cowdisk: ` and the chain of what was being done, and perhaps a second line with the
//! next step. Exit codes: 0 done; 1 failed; 2 wrong use, which is a command line that makes no sense and any other request that
//! is wrong in itself ([`ErrorKind::Invalid`]). An operation that is interrupted by a signal has failed: 1.

mod args;
mod check;
mod df;
mod doctor;
mod images;
mod instances;
mod libvirt;
mod logger;
mod map;
mod mount;
mod output;
mod progress;
mod scrub;
mod status;
mod upgrade;
mod usage;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use args::{Cli, Command};
use output::Output;
use progress::TerminalProgress;
use usage::Finding;

use crate::daemon;
use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;

/// What every command gets.
struct Session {
    store: PathBuf,
    quiet: bool,
    output: Output,
}

impl Session {
    fn open_store(&self) -> Result<Store> {
        Store::open(&self.store)
    }

    fn progress(&self) -> Result<TerminalProgress> {
        TerminalProgress::new(self.quiet)
    }

    /// Tells what was done, unless the user wants quiet.
    fn done(&mut self, line: &str) -> Result<()> {
        if self.quiet { Ok(()) } else { self.output.line(line) }
    }
}

/// Reads the command line, does what it says and returns the exit code.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let result = match Cli::try_parse_from(&arguments) {
        Ok(cli) => run(cli),
        Err(error) => match usage::finding(&error, &arguments) {
            Finding::Text(text) => print(&text),
            Finding::Wrong(error) => Err(error),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::show_error(&error);
            exit_code(&error)
        }
    }
}

fn exit_code(error: &Error) -> ExitCode {
    match error.kind() {
        ErrorKind::Invalid => ExitCode::from(2),
        _ => ExitCode::from(1),
    }
}

fn print(text: &str) -> Result<()> {
    let mut output = Output::new();
    output.text(text)?;
    output.flush()
}

fn run(cli: Cli) -> Result<()> {
    logger::start(cli.verbose, cli.quiet)?;
    let mut session = Session { store: cli.store, quiet: cli.quiet, output: Output::new() };
    // Mounting and virsh need root itself, or ask what root may; what they do in the store they do as its owner, or read it.
    if !matches!(
        cli.command,
        Command::Mount(_) | Command::Umount { .. } | Command::Libvirt(_) | Command::Doctor(_) | Command::Init
    ) {
        daemon::become_owner(&session.store, daemon::Keep::Nothing)?;
    }
    match cli.command {
        Command::Init => init(&mut session),
        Command::Image(command) => images::image(&mut session, command),
        Command::Flavor(command) => images::flavor(&mut session, command),
        Command::Instance(command) => instances::run(&mut session, command),
        Command::Mount(args) => mount::mount(&session, &args),
        Command::Umount { mountpoint } => mount::unmount(&mountpoint),
        Command::Status(args) => status::run(&mut session, &args),
        Command::Upgrade(args) => upgrade::run(&mut session, &args),
        Command::Df(form) => df::run(&mut session, form),
        Command::Map(args) => map::run(&mut session, &args),
        Command::Check(args) => check::run(&mut session, args),
        Command::Scrub(args) => scrub::run(&mut session, args),
        Command::Doctor(args) => doctor::run(&mut session, args),
        Command::Libvirt(args) => libvirt::run(&mut session, args),
        Command::Completions { shell } => completions(&mut session, shell),
    }?;
    session.output.flush()
}

fn init(session: &mut Session) -> Result<()> {
    let store = Store::init(&session.store)?;
    session.done(&format!("store {}: made", store.dir().display()))
}

fn completions(session: &mut Session, shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "cowdisk", &mut script);
    session.output.text(&String::from_utf8_lossy(&script))
}
