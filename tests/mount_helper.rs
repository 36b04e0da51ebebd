//! mount.cowdisk with the real cowdisk: called as mount(8) calls it, and by mount(8) itself from a command line and an
//! fstab. What it makes of its arguments is tested beside its source.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "a test fails by panicking, writes scratch files and says what it skips"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The helper, which cargo builds beside cowdisk if it builds the whole workspace, as it does by default.
fn helper() -> PathBuf {
    let cowdisk = Path::new(env!("CARGO_BIN_EXE_cowdisk"));
    let helper = cowdisk.with_file_name("mount-cowdisk");
    assert!(helper.exists(), "{} is not built: cargo build --workspace", helper.display());
    helper
}

/// A folder with a store `s` and an empty folder `m p`.
struct Place {
    folder: tempfile::TempDir,
    run: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let may = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
        assert!(may, "mounting needs root and /dev/fuse");
        let memory = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
        let place = Self { folder: tempfile::tempdir().unwrap(), run: tempfile::tempdir_in(memory).unwrap() };
        fs::create_dir(place.path("m p")).unwrap();
        let init = place.command(env!("CARGO_BIN_EXE_cowdisk"), &["--store", &place.path("s"), "init"]);
        assert_eq!(init.status.code(), Some(0));
        place
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Output {
        Command::new(program)
            .args(arguments)
            .current_dir(self.folder.path())
            .env("COWDISK_RUN_DIR", self.run.path())
            .env_remove("COWDISK_STORE")
            .env_remove("COWDISK_LOG")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn stderr(&self, output: &Output) -> String {
        String::from_utf8(output.stderr.clone()).unwrap().replace(&self.path(""), "{}/")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy", "--quiet", &self.path("m p")]).status();
    }
}

#[test]
fn returns_once_the_store_is_served() {
    let place = Place::new();
    let (store, mnt) = (place.path("s"), place.path("m p"));
    let output = place.command(helper(), &[&store, &mnt, "-o", "rw,nofail,threads=2"]);
    assert_eq!((output.status.code(), place.stderr(&output)), (Some(0), String::new()));
    assert!(Path::new(&mnt).join("instances").is_dir());
    let umount = place.command(env!("CARGO_BIN_EXE_cowdisk"), &["umount", &mnt]);
    assert_eq!((umount.status.code(), place.stderr(&umount)), (Some(0), String::new()));
}

#[test]
fn what_cowdisk_refuses_has_an_exit_code_of_mount() {
    let place = Place::new();
    let (store, mnt) = (place.path("s"), place.path("m p"));
    let rows: [(&[&str], i32, &str); 6] = [
        (&[&store, &mnt, "-f"], 0, ""),
        (&[&store, &mnt, "-f", "-s", "-o", "rw,bogus"], 0, ""),
        (
            &[&store, &mnt, "-o", "rw,bogus"],
            1,
            "cowdisk: mount option \"bogus\": not known\n\
             known: ro, rw, transport=NAME, threads=N, allow_other, noallow_other, flush=SECONDS, accept_loss, passthrough=auto|off, reserve=SIZE, high_water=PERCENT, log=FILE\n",
        ),
        (
            &["/nonexistent", &mnt],
            32,
            "cowdisk: store /nonexistent: no such folder\nmake one: cowdisk --store /nonexistent init\n",
        ),
        (
            &[&store, "/nonexistent", "-f"],
            32,
            "cowdisk: mountpoint /nonexistent: No such file or directory\n",
        ),
        (
            &[&store, &mnt, "-o", "rw,remount"],
            32,
            "mount.cowdisk: {}/m p: cannot be remounted: unmount it, then mount it with the new options\n",
        ),
    ];
    for (arguments, code, message) in rows {
        let output = place.command(helper(), arguments);
        assert_eq!(
            (output.status.code(), place.stderr(&output).as_str()),
            (Some(code), message),
            "{arguments:?}"
        );
        assert_eq!(fs::read_dir(&mnt).unwrap().count(), 0, "{arguments:?} must mount nothing");
    }
}

/// What mount(8) does, in a mount namespace of its own where the helper is installed. Prints a word and the exit code
/// for each step.
const SESSION: &str = r#"
mount -t tmpfs tmpfs /mnt && mkdir /mnt/up /mnt/work || exit 77
mount -t overlay overlay -o lowerdir=/usr/sbin,upperdir=/mnt/up,workdir=/mnt/work /usr/sbin || exit 77
ln -s "$HELPER" /usr/sbin/mount.cowdisk
ln -s mount.cowdisk /usr/sbin/mount.fuse.cowdisk
printf '%s %s cowdisk ro,nofail,x-systemd.automount,_netdev,noauto,comment=hi 0 0\n' "$PWD/s" "$PWD/m\\040p" > fstab
tell() { echo "$1 $?"; }
mount -t cowdisk "$PWD/s" "$PWD/m p" -o nofail; tell mount
ls "m p" | tr '\n' ' '
mount -o remount,ro "$PWD/m p"; tell remount
umount "m p"; tell umount
# umount(8) does not wait for the daemon.
for i in $(seq 100); do mount -f -t cowdisk "$PWD/s" "$PWD/m p" 2> /dev/null && break; sleep 0.1; done
mount -T fstab "$PWD/m p"; tell fstab
findmnt -n -o FSTYPE,SOURCE,OPTIONS "m p" | tr -s ' ' | cut -d , -f 1
umount "m p"; tell umount
for i in $(seq 100); do mount -f -t cowdisk "$PWD/s" "$PWD/m p" 2> /dev/null && break; sleep 0.1; done
mount -f -t cowdisk "$PWD/s" "$PWD/m p"; tell fake
mount -t cowdisk "$PWD/s" "$PWD/m p" -o bogus; tell bogus
"#;

#[test]
fn mount_8_mounts_from_a_command_line_and_from_an_fstab() {
    let place = Place::new();

    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", SESSION])
        .current_dir(place.folder.path())
        .env("HELPER", helper())
        .env("COWDISK_RUN_DIR", place.run.path())
        .env_remove("COWDISK_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("unshare, of util-linux");
    let has_overlay = output.status.code() != Some(77);
    assert!(has_overlay, "needs a private mount namespace with an overlay of /usr/sbin");
    let told = String::from_utf8(output.stdout.clone()).unwrap().replace(&place.path(""), "{}/");
    let wanted = [
        "mount 0",
        "boot images instances remount 32",
        "umount 0",
        "fstab 0",
        "fuse.cowdisk {}/s ro",
        "umount 0",
        "fake 0",
        "bogus 1",
    ];
    assert_eq!(told.lines().collect::<Vec<_>>(), wanted, "{}", place.stderr(&output));
    let messages = place.stderr(&output);
    assert!(messages.contains("mount.cowdisk: {}/m p: cannot be remounted"), "{messages}");
}
