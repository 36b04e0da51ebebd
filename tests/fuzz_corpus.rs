//! The corpus of the fuzz targets, run by the stable compiler: what was found once stays mended.

#![allow(clippy::disallowed_methods)] // the targets write the hostile files of a store

use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
mod targets;

/// Runs all inputs of a target; a failure names the input.
#[track_caller]
fn replay(name: &str) {
    let (_, target) = targets::TARGETS.iter().find(|(found, _)| *found == name).expect("a target");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut inputs: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("read {}: {error}", folder.display()))
        .map(|entry| entry.expect("an entry of the corpus").path())
        .collect();
    inputs.sort();
    assert!(inputs.len() >= 5, "{}: the corpus is where it is expected", folder.display());
    for path in inputs {
        let bytes = std::fs::read(&path).expect("read an input");
        let result = std::panic::catch_unwind(|| target(&bytes));
        assert!(result.is_ok(), "the input was {}", path.display());
    }
}

macro_rules! replayed {
    ($($test:ident: $target:literal;)*) => {$(
        #[test]
        fn $test() {
            replay($target);
        }
    )*};
}

replayed! {
    superblocks_are_refused_or_come_back: "superblock";
    map_pages_are_refused_or_come_back: "map_page";
    journal_records_are_refused_or_come_back: "journal";
    layers_are_refused_or_read_right: "layer";
    live_maps_are_refused_or_read_right: "live_map";
    images_are_refused_or_lead_nowhere: "image_header";
    stores_are_refused_or_served_from_inside: "records";
    names_are_refused_or_come_back: "names";
    options_are_refused_or_come_back: "options";
    requests_are_refused_or_understood: "http";
    requests_are_refused_or_hold_what_they_say: "fuse_request";
}
