//! What the mount does, on a real mount: each test shows one behaviour, which its name says.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failed step fails the test")]
#![allow(clippy::cast_possible_truncation, reason = "tests run on 64 bits")]

#[path = "common/mount.rs"]
mod mount;

#[path = "fuse/access.rs"]
mod access;
#[path = "fuse/damage.rs"]
mod damage;
#[path = "fuse/data.rs"]
mod data;
#[path = "fuse/life.rs"]
mod life;
#[path = "fuse/posix.rs"]
mod posix;
#[path = "fuse/space.rs"]
mod space;

/// Not a test: the daemon of all others, see [`mount`].
#[test]
fn daemon_process() {
    mount::daemon_process();
}
