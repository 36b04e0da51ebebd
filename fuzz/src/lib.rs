//! What cowdisk makes of hostile bytes: for each target of `cargo fuzz` a function that takes any bytes and asserts what
//! must hold for all of them.
//!
//! The functions need nothing of the fuzzer: `tests/fuzz_corpus.rs` of cowdisk calls them with the corpus. Most read
//! their bytes as a recipe and make from it what cowdisk is given, with checksums that fit, so that a change of one byte
//! reaches the code behind the checksums.

mod formats;
mod images;
mod input;
mod layer;
mod recipe;
mod requests;
mod stores;
mod texts;

pub use formats::{journal, map_page, superblock};
pub use images::image_header;
pub use layer::{layer, live_map};
pub use requests::fuse_request;
pub use stores::records;
pub use texts::{http, names, options};

/// A target: its name, and what runs it.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 11] = [
    ("superblock", superblock),
    ("map_page", map_page),
    ("journal", journal),
    ("layer", layer),
    ("live_map", live_map),
    ("image_header", image_header),
    ("records", records),
    ("names", names),
    ("options", options),
    ("http", http),
    ("fuse_request", fuse_request),
];
