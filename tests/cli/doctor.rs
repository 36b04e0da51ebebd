//! `cowdisk doctor`: what it says, its exit codes, and that it leaves nothing behind.

use std::fs;

use serde_json::Value;

use super::mounted::{Mounted, needs_mount};
use super::{Place, text};

/// Runs it on a directory; returns what it prints as JSON, whose verdicts agree with the exit code.
fn examine(place: &Place, directory: &str) -> Value {
    let output = place.run(&["doctor", "--json", directory]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let lines = report["lines"].as_array().unwrap();
    for line in lines {
        let verdict = line["verdict"].as_str().unwrap();
        assert!(["ok", "warning", "problem"].contains(&verdict), "{line}");
        assert_eq!(line["next"].is_null(), verdict == "ok", "what is not well has a next step: {line}");
    }
    let problem = lines.iter().any(|line| line["verdict"] == "problem");
    assert_eq!(report["well"], !problem);
    assert_eq!(output.status.code(), Some(i32::from(problem)), "{report}");
    report
}

/// What it says of a topic.
fn line(report: &Value, topic: &str) -> (String, String) {
    let lines = report["lines"].as_array().unwrap();
    let line = lines.iter().find(|line| line["topic"] == topic);
    let line = line.unwrap_or_else(|| panic!("nothing of {topic} in {report:#}"));
    (line["verdict"].as_str().unwrap().to_owned(), line["message"].as_str().unwrap().to_owned())
}

#[test]
fn a_host_is_looked_at_and_nothing_is_left_behind() {
    needs_mount();
    let place = Place::furnished();
    let before = place.snapshot();
    let run_dirs = || fs::read_dir(place.run.path()).unwrap().count();
    let run_dirs_before = run_dirs();
    let report = examine(&place, &place.path("store"));
    for topic in ["fuse", "rights", "store"] {
        assert_eq!(line(&report, topic).0, "ok", "{report:#}");
    }
    for topic in [
        "kernel",
        "passthrough",
        "file system",
        "room",
        "run directory",
        "cold reads",
        "open files",
        "qemu-img",
        "libvirt",
        "kvm",
    ] {
        line(&report, topic);
    }
    assert!(line(&report, "daemon").1.ends_with("is not mounted"), "{report:#}");
    assert_eq!(place.snapshot(), before);
    assert_eq!(run_dirs(), run_dirs_before);
    let shown = text(&place.run(&["doctor"]).stdout);
    assert!(shown.lines().any(|line| line.starts_with("ok       fuse ")), "{shown}");
    assert!(shown.lines().last().unwrap().starts_with("found: "), "{shown}");
}

#[test]
fn a_place_without_a_store_is_looked_at_and_no_store_is_made() {
    let place = Place::new();
    let report = examine(&place, &place.path("no/store/here"));
    let (verdict, message) = line(&report, "store");
    assert_eq!(verdict, "warning");
    assert!(message.ends_with("no/store/here: there is no store yet"), "{message}");
    assert!(line(&report, "file system").1.contains(&place.path("").trim_end_matches('/').to_owned()));
    assert!(!fs::exists(place.path("no")).unwrap());
}

#[test]
fn a_damaged_store_is_a_problem() {
    let place = Place::furnished();
    assert_eq!(line(&examine(&place, &place.path("broken")), "store").0, "problem");
    let output = place.run(&["doctor", &place.path("broken")]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.starts_with("cowdisk: this host: ") && said.ends_with(" to be solved\n"), "{said}");
}

#[test]
fn a_mounted_store_is_told_of_with_its_daemon_and_its_disks() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let disk = fs::File::open(place.path("mnt/instances/inst/disk")).unwrap();
    let report = examine(place, &place.path("store"));
    let (verdict, message) = line(&report, "daemon");
    assert_eq!(verdict, "ok", "{message}");
    assert!(message.contains(&place.path("mnt")) && message.contains("transport "), "{message}");
    assert_eq!(line(&report, "disks"), ("ok".to_owned(), "1 in use".to_owned()));
    line(&report, "keeper");
    drop(disk);
}
