//! Power cuts of a machine that serves cowdisk: a sample of what `scripts/power-cut` does, which says how it works.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::path::Path;
use std::process::{Command, Stdio};

fn power_cut(arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/power-cut");
    let output = Command::new(script)
        .args(["--dynamic", "--fs", "ext4", "--recordings", "1", "--steps", "120"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{said}{complained}", output.status);
    said
}

#[test]
fn everything_promised_is_there_after_power_cuts() {
    let said = power_cut(&["--cuts", "12"]);
    assert!(said.contains("right: linear 4 of 4, subset 4 of 4, torn 4 of 4"), "{said}");
}

#[test]
fn everything_promised_is_there_after_power_cuts_where_the_kernel_serves_disks() {
    let said = power_cut(&["--passthrough", "--cuts", "6"]);
    assert!(said.contains("right: linear 2 of 2, subset 2 of 2, torn 2 of 2"), "{said}");
}

/// What finds no liar finds nothing.
#[test]
fn a_writer_that_promises_without_syncing_is_found_out() {
    let said = power_cut(&["--cuts", "6", "--without-sync"]);
    assert!(said.contains("not one of"), "{said}");
}
