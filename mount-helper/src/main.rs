//! `mount.cowdisk`: what mount(8) runs for `mount -t cowdisk STORE DIR -o …` and for a line of fstab with type `cowdisk`.
//!
//! Installed as `/sbin/mount.cowdisk`; a link `/sbin/mount.fuse.cowdisk` to it lets it answer for `mount -t fuse.cowdisk` and
//! for `mount -o remount` as well, which otherwise end in libfuse's helper and a shell.
//!
//! It turns mount(8)'s convention into one call of `cowdisk mount` and that call's outcome into mount(8)'s exit codes.
//! It knows the command line of cowdisk and nothing else: whether the store is one, what an option means and when the
//! disks can be read is for cowdisk to say. mount(8) has decoded the octal escapes of fstab before it comes here, so a
//! backslash in a path is a backslash.

mod arguments;
mod command;

use std::ffi::OsString;
use std::process::ExitCode;

/// Exit codes of mount(8), see its manual page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The disks can be read.
    Mounted = 0,
    /// The helper was called in a wrong way.
    Usage = 1,
    /// Something on this system is missing, such as the cowdisk command.
    System = 2,
    /// cowdisk refused to mount, or failed to.
    Failed = 32,
}

/// Why nothing was mounted: the exit code and the line for the user. No line if cowdisk has said it already.
#[derive(Debug)]
pub struct Refusal {
    /// What mount(8) is told.
    pub exit: Exit,
    /// What the user is told.
    pub message: Option<String>,
}

impl Refusal {
    fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: Some(message.into()) }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let exit = match arguments::parse(arguments).and_then(|task| match task {
        arguments::Task::Tell(text) => {
            say(&mut std::io::stdout(), text);
            Ok(())
        }
        arguments::Task::Mount(request) => command::run(&request),
    }) {
        Ok(()) => Exit::Mounted,
        Err(refusal) => {
            if let Some(message) = refusal.message {
                say(&mut std::io::stderr(), &format!("mount.cowdisk: {}", one_line(&message)));
            }
            refusal.exit
        }
    };
    ExitCode::from(exit as u8)
}

/// Prints a line; nobody is left to tell when that fails.
fn say(to: &mut dyn std::io::Write, line: &str) {
    let _ = writeln!(to, "{line}");
}

/// A message holds names that a user chose: no control character of theirs may reach the terminal.
fn one_line(message: &str) -> String {
    message
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect()
}
