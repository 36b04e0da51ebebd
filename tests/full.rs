//! A full host: what fails, what goes on, and what is still there afterwards, on real filesystems in loop devices.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failed step fails the test")]
#![allow(clippy::cast_possible_truncation, reason = "tests run on 64 bits")]

#[path = "common/mount.rs"]
mod mount;

#[path = "full/host.rs"]
#[allow(dead_code, reason = "it knows more kinds of hosts")]
mod host;
#[path = "full/importing.rs"]
mod importing;
#[path = "full/writing.rs"]
mod writing;

/// Not a test: the daemon of all others, see [`mount`].
#[test]
fn daemon_process() {
    mount::daemon_process();
}
