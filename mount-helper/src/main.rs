//! `mount.cowdisk`: what mount(8) runs for `mount -t cowdisk STORE DIR -o …` and for a line of fstab with type `cowdisk`.
//!
//! Installed as `/sbin/mount.cowdisk`; a link `/sbin/mount.fuse.cowdisk` to it lets it answer for `mount -t fuse.cowdisk` and
//! for `mount -o remount` as well, which otherwise end in libfuse's helper and a shell.
//!
//! It turns mount(8)'s convention into one call of `cowdisk mount` and that call's outcome into mount(8)'s exit codes.
//! It knows the command line of cowdisk and nothing else: whether the store is one, what an option means and when the
//! disks can be read is for cowdisk to say. mount(8) has decoded the octal escapes of fstab before it comes here, so a
//! backslash in a path is a backslash.

mod command;

use std::ffi::OsString;
use std::process::ExitCode;

use mount_cowdisk::{Exit, arguments};

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
