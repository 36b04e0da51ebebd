//! `cowdisk upgrade`: what it says. What it does, `tests/upgrade.rs` tries.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::mounted::{Mounted, needs_mount};
use super::{Place, text};

#[test]
fn an_upgrade_tells_the_versions_and_for_how_long_guests_waited() {
    needs_mount();
    let place = Place::furnished();
    let refused = place.run(&["upgrade"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).ends_with("/store: not mounted\n"), "{}", text(&refused.stderr));
    // Its own, for only from where nobody else may write is a program run.
    let program = place.path("cowdisk");
    fs::copy(env!("CARGO_BIN_EXE_cowdisk"), &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let mount = place.path("mnt");
    let mounted = Command::new(&program)
        .args(["--store", &place.path("store"), "mount", "-o", "transport=dev_fuse", &mount])
        .env("COWDISK_RUN_DIR", place.run.path())
        .env_remove("COWDISK_LOG")
        .output()
        .unwrap();
    assert!(mounted.status.success(), "{}", text(&mounted.stderr));
    let mounted = Mounted(place);
    let place = &mounted.0;
    let pid = || place.json(&["status", "--json"])["daemon"]["pid"].as_u64().unwrap();

    let first = pid();
    let said = place.works(&["upgrade"]);
    let version = env!("CARGO_PKG_VERSION");
    let wanted =
        format!("store: served by another process (cowdisk {version}, as before); requests waited for ");
    assert!(said.contains(&wanted) && said.ends_with(" ms\n"), "{said}");
    let second = pid();
    assert_ne!(first, second);
    assert_eq!(place.works(&["-q", "upgrade", &mount]), "");
    let told = place.json(&["upgrade", &mount, "--json"]);
    assert_eq!((&told["from"], &told["to"]), (&version.into(), &version.into()));
    assert!(told["pause_milliseconds"].is_u64());
    assert!(place.works(&["status"]).contains(", upgraded the daemon 3 times, replaced it 0 times"));

    fs::set_permissions(&program, Permissions::from_mode(0o777)).unwrap();
    let third = pid();
    let refused = place.run(&["upgrade"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = text(&refused.stderr);
    let wanted = format!("cowdisk: program {program}: others than root may write to it\n");
    assert!(said.starts_with(&wanted), "{said}");
    assert_eq!(pid(), third);
    mounted.umount();
}
