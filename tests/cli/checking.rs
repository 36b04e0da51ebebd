//! `cowdisk check`: what it says, and its exit codes.

use std::fs;

use super::{Place, text};

#[test]
fn a_store_that_is_whole_is_said_to_be() {
    let place = Place::furnished();
    let output = place.run(&["check", "--full"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    assert!(shown.starts_with("checked: ") && shown.ends_with("found: nothing\n"), "{shown}");
    let report = place.json(&["check", "inst", "--json"]);
    assert_eq!((&report["clean"], &report["findings"]), (&true.into(), &serde_json::json!([])));
    assert_eq!(report["disks"], 2);
}

#[test]
fn damage_is_named_with_what_to_do_and_makes_the_check_fail() {
    let place = Place::furnished();
    fs::write(place.path("store/instances/inst/instance.json"), "{").unwrap();
    let output = place.run(&["check"]);
    assert_eq!(output.status.code(), Some(1));
    let (shown, said) = (text(&output.stdout), text(&output.stderr));
    assert!(shown.contains("damage: instance inst: "), "{shown}");
    assert!(shown.contains("    data is lost or at risk; no repair: "), "{shown}");
    assert!(said.contains(": 1 finding to be looked at\n"), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&place.run(&["check", "--json"]).stdout).unwrap();
    assert_eq!((&report["clean"], &report["findings"][0]["repairable"]), (&false.into(), &false.into()));
}

#[test]
fn a_repair_mends_and_says_so() {
    let place = Place::furnished();
    let map = place.path("store/instances/inst/disk.map");
    let mut bytes = fs::read(&map).unwrap();
    bytes[100] ^= 1;
    fs::write(&map, &bytes).unwrap();
    let output = place.run(&["check", "inst/disk"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("mend what can be mended: cowdisk check --repair"));
    let output = place.run(&["check", "--repair", "inst/disk"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains("mended: writes it anew from the other copy"));
    assert!(text(&place.run(&["check"]).stdout).ends_with("found: nothing\n"));
}

#[test]
fn what_does_not_exist_cannot_be_checked() {
    let place = Place::furnished();
    for target in ["nobody", "inst/disk.other"] {
        let code = place.run(&["check", target]).status.code();
        assert!(matches!(code, Some(1 | 2)), "{target}: {code:?}");
    }
}
