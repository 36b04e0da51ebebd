//! What is taken, left and promised.

use std::fs;
use std::os::unix::fs::FileExt as _;

use super::mounted::{Mounted, needs_mount};
use super::{Place, text};

/// What is said when the file system that the tests run on is nearly full.
pub const NEARLY_FULL: &str = "cowdisk: warn: the host's filesystem is";

#[test]
fn df_adds_up_what_is_promised_and_taken() {
    let place = Place::furnished();
    place.works(&["instance", "create", "more", "--image", "img", "--root-size", "1G"]);
    let df = place.json(&["df", "--json"]);
    let number = |path: &str| df.pointer(path).and_then(serde_json::Value::as_u64).unwrap();
    // img is 1 MiB, of which 64 KiB are data; inst has a local disk of 4 MiB.
    assert_eq!(number("/promised"), (1 << 20) + (4 << 20) + (1 << 20) + (1 << 30));
    assert_eq!((number("/instances"), number("/disks")), (3, 4));
    assert!(number("/taken/bases") >= 65536 && number("/taken/bases") < 131_072);
    assert!(number("/saved") >= 65536 && number("/saved") < 131_072, "two overlays share one base");
    assert!(number("/taken/independent") >= 65536);
    assert!(number("/taken/maps") > 0);
    let parts = ["overlays", "maps", "independent", "bases", "boot", "unfinished"];
    assert_eq!(
        number("/taken/total"),
        parts.iter().map(|part| number(&format!("/taken/{part}"))).sum::<u64>()
    );
    let host = rustix::fs::statvfs(place.path("store")).unwrap();
    assert_eq!(number("/host/size"), host.f_blocks * host.f_frsize);
    assert_eq!(number("/host/left"), number("/host/available").saturating_sub(number("/host/reserve")));
    let shown = text(&place.run(&["df"]).stdout);
    let row = shown.lines().find(|line| line.starts_with("promised")).unwrap();
    assert!(
        row.contains("1 GiB to 4 disks of 3 instances, 0.") && row.ends_with("times the host's file system"),
        "{row}"
    );
}

#[test]
fn df_passes_over_a_damaged_instance_and_names_it() {
    let place = Place::furnished();
    fs::write(place.path("store/instances/inst/instance.json"), "{").unwrap();
    let output = place.run(&["df", "--json"]);
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("instance inst is not counted: "), "{}", text(&output.stderr));
    let df: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&df["unreadable"][0], &df["instances"]), (&"inst".into(), &1.into()));
}

/// What a mounted store was told holds for the commands beside it, too.
#[test]
fn commands_keep_the_reserve_of_the_mount_and_warn_above_its_mark() {
    needs_mount();
    let place = Place::furnished();
    let quiet = text(&place.run(&["df"]).stderr);
    let output = place.run(&["mount", "-o", "reserve=5M,high_water=1", &place.path("mnt")]);
    assert!(output.status.success());
    let mounted = Mounted(place);
    let place = &mounted.0;
    assert!(text(&output.stderr).starts_with(NEARLY_FULL), "{}", text(&output.stderr));
    let output = place.run(&["df", "--json"]);
    let df: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(df["host"]["reserve"], 5 << 20);
    assert_eq!((&df["host"]["high_water_percent"], &df["host"]["nearly_full"]), (&1.into(), &true.into()));
    assert!(text(&output.stderr).contains("5 MiB are kept in reserve"));
    let output = place.run(&["instance", "create", "another", "--image", "img"]);
    assert!(output.status.success());
    assert!(text(&output.stderr).starts_with(NEARLY_FULL));
    mounted.umount();
    assert_eq!(text(&mounted.0.run(&["df"]).stderr), quiet);
}

/// Only the reserve is left: whoever would take of it is refused, and told so.
#[test]
fn a_store_without_room_refuses_new_instances_and_images() {
    needs_mount();
    let mounted = Mounted(Place::furnished());
    let place = &mounted.0;
    place.run(&["mount", "-o", "reserve=16777215T", &place.path("mnt")]);
    for arguments in [
        &["instance", "create", "new", "--image", "img"][..],
        &["instance", "create", "new", "--image", "img", "--no-cow"],
        &["image", "import", "new", &place.path("text")],
    ] {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let said = text(&output.stderr);
        assert!(said.contains("kept in reserve") && said.lines().count() == 2, "{said}");
    }
    let disk = mounted.open_disk();
    assert_eq!(disk.write_all_at(&[1; 4096], 0).unwrap_err().raw_os_error(), Some(28));
    disk.sync_all().unwrap();
    drop(disk);
    mounted.umount();
}
