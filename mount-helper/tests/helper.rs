//! mount.cowdisk as mount(8) calls it, over a `cowdisk` that only records how it was called.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and writes scratch files"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

/// A folder with a copy of the helper and, beside it, a `cowdisk` that writes its arguments, one a line, and what it
/// finds on stdin to `called`, prints `words` to stderr and exits with `code`.
fn folder_with_fake_cowdisk(words: &str, code: i32) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(env!("CARGO_BIN_EXE_mount-cowdisk"), folder.path().join("mount.cowdisk")).unwrap();
    let script = format!(
        "#!/bin/sh\ncd \"$(dirname \"$0\")\"\nprintf '%s\\n' \"$@\" > called\ncat > stdin\necho '{words}' >&2\nexit {code}\n"
    );
    place_program(&folder.path().join("cowdisk"), &script);
    folder
}

fn place_program(path: &Path, text: &str) {
    // Written under another name and moved, so that no test's fork holds it open for writing while it is run.
    let draft = path.with_extension("draft");
    fs::write(&draft, text).unwrap();
    fs::set_permissions(&draft, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(Command::new("cp").arg(&draft).arg(path).status().unwrap().success());
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(folder.join("mount.cowdisk")).args(arguments).env("PATH", "/usr/bin:/bin").output().unwrap()
}

fn called(folder: &Path) -> Vec<String> {
    fs::read_to_string(folder.join("called")).unwrap().lines().map(str::to_owned).collect()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn calls_cowdisk_mount_with_the_store_and_the_directory() {
    let folder = folder_with_fake_cowdisk("", 0);
    let output = run(folder.path(), &["/var/lib/cowdisk", "/mnt/vm disks", "-o", "rw"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(called(folder.path()), ["--store", "/var/lib/cowdisk", "mount", "--", "/mnt/vm disks"]);
    assert_eq!(fs::read(folder.path().join("stdin")).unwrap(), b"", "stdin is /dev/null");
}

#[test]
fn drops_options_that_are_not_for_cowdisk_and_passes_the_others() {
    let folder = folder_with_fake_cowdisk("", 0);
    let options = "rw,nofail,_netdev,user,users,noauto,x-systemd.automount,X-mount.mkdir,comment=a=b,nosuid,nodev,\
                   noexec,noatime,defaults,ro,threads=4,name=\"a,b\"";
    run(folder.path(), &["-o", options, "S", "D", "-onofail", "-t", "cowdisk"]);
    assert_eq!(
        called(folder.path()),
        ["--store", "S", "mount", "-o", "ro,threads=4,name=\"a,b\"", "--", "D"]
    );
}

#[test]
fn passes_flags_in_any_place_and_bundled() {
    let folder = folder_with_fake_cowdisk("", 0);
    run(folder.path(), &["S", "D", "-sfnv", "-o", "rw,hocus"]);
    assert_eq!(
        called(folder.path()),
        ["-v", "--store", "S", "mount", "--check", "--sloppy", "-o", "hocus", "--", "D"]
    );
    run(folder.path(), &["-n", "-s", "-o", "rw", "--", "S", "-D"]);
    assert_eq!(called(folder.path()), ["--store", "S", "mount", "--sloppy", "--", "-D"]);
}

#[test]
fn keeps_backslashes_for_mount_has_decoded_the_escapes() {
    let folder = folder_with_fake_cowdisk("", 0);
    run(folder.path(), &["/srv/a\\040b", "/mnt/c d"]);
    assert_eq!(called(folder.path()), ["--store", "/srv/a\\040b", "mount", "--", "/mnt/c d"]);
}

#[test]
fn tells_the_outcome_of_cowdisk_in_exit_codes_of_mount() {
    for (cowdisk, mount) in [(0, 0), (1, 32), (2, 1), (77, 32)] {
        let folder = folder_with_fake_cowdisk("cowdisk: words of its own", cowdisk);
        let output = run(folder.path(), &["S", "D"]);
        assert_eq!(output.status.code(), Some(mount), "cowdisk exits {cowdisk}");
        assert_eq!(stderr(&output), "cowdisk: words of its own\n", "cowdisk has said it: no second message");
    }
}

#[test]
fn says_when_cowdisk_is_killed() {
    let folder = folder_with_fake_cowdisk("", 0);
    place_program(&folder.path().join("cowdisk"), "#!/bin/sh\nkill -9 $$\n");
    let output = run(folder.path(), &["S", "D"]);
    assert_eq!(output.status.code(), Some(32));
    assert!(stderr(&output).contains("was killed: signal: 9"), "{}", stderr(&output));
}

#[test]
fn refuses_a_wrong_call_with_exit_code_1_and_one_line() {
    let folder = folder_with_fake_cowdisk("", 0);
    let rows: [(&[&str], &str); 9] = [
        (&[], "give a store and a directory: mount.cowdisk STORE DIR"),
        (&["S"], "give a store and a directory: mount.cowdisk STORE DIR"),
        (&["S", "D", "E"], "give a store and a directory: mount.cowdisk STORE DIR"),
        (&["S", "D", "-o"], "-o needs a value"),
        (&["S", "D", "-t"], "-t needs a value"),
        (&["S", "D", "-x"], "unknown argument -x"),
        (&["S", "D", "--bogus"], "unknown argument --bogus"),
        (&["S", "D", "--bo\ngus\u{1b}[m"], "unknown argument --bo\\ngus\\u{1b}[m"),
        (&["", "D"], "the names of the store and of the directory may not be empty"),
    ];
    for (arguments, message) in rows {
        let output = run(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert_eq!(stderr(&output), format!("mount.cowdisk: {message}\n"));
        assert!(!folder.path().join("called").exists(), "{arguments:?} must not reach cowdisk");
    }
}

#[test]
fn refuses_to_remount() {
    let folder = folder_with_fake_cowdisk("", 0);
    let output = run(folder.path(), &["S", "/mnt", "-o", "rw,remount,ro"]);
    assert_eq!(output.status.code(), Some(32));
    assert_eq!(
        stderr(&output),
        "mount.cowdisk: /mnt: cannot be remounted: unmount it, then mount it with the new options\n"
    );
    assert!(!folder.path().join("called").exists());
}

#[test]
fn finds_cowdisk_in_path_and_says_when_it_is_nowhere() {
    let folder = folder_with_fake_cowdisk("", 0);
    let elsewhere = tempfile::tempdir().unwrap();
    fs::copy(env!("CARGO_BIN_EXE_mount-cowdisk"), elsewhere.path().join("helper")).unwrap();
    let helper = |path: &str| {
        Command::new(elsewhere.path().join("helper")).args(["S", "D"]).env("PATH", path).output().unwrap()
    };
    let path = format!("{}:/usr/bin:/bin", folder.path().display());
    assert_eq!(helper(&path).status.code(), Some(0));
    assert_eq!(called(folder.path()), ["--store", "S", "mount", "--", "D"]);
    let installed = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
    if installed.iter().any(|folder| Path::new(folder).join("cowdisk").exists()) {
        eprintln!("cowdisk is installed here: not tried what happens without it");
        return;
    }
    let output = helper("/nonexistent:relative");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(stderr(&output), "mount.cowdisk: the command cowdisk is not installed\n");
}

#[test]
fn prints_help_and_version() {
    let folder = folder_with_fake_cowdisk("", 0);
    let output = run(folder.path(), &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("usage: mount.cowdisk STORE DIR"));
    assert_eq!(run(folder.path(), &["-V"]).stdout, b"mount.cowdisk 0.1.0\n");
}
