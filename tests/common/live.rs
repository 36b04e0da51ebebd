//! Copies of live maps: what a run directory that outlives the host's boot would still hold.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;

/// The contents of a live map's file: its length, and its pages that are there.
#[derive(Clone)]
pub struct LiveCopy {
    len: u64,
    pages: Vec<(u64, Vec<u8>)>,
}

impl fmt::Debug for LiveCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a live map")
    }
}

impl LiveCopy {
    /// Copies a file, if it is there.
    pub fn of(path: &Path) -> Option<Self> {
        let file = File::open(path).ok()?;
        let len = file.metadata().expect("the size of a live map").len();
        let mut pages = Vec::new();
        let mut at = 0;
        while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
            let hole = rustix::fs::seek(&file, SeekFrom::Hole(data)).expect("the end of data");
            let mut bytes = vec![0; (hole - data) as usize];
            file.read_exact_at(&mut bytes, data).expect("read a live map");
            pages.push((data, bytes));
            at = hole;
        }
        Some(Self { len, pages })
    }

    /// Puts a copy, or nothing, in a file's place.
    pub fn put(copy: Option<&Self>, path: &Path) {
        let _ = std::fs::remove_file(path);
        if let Some(copy) = copy {
            let file = File::create_new(path).expect("put a live map in its place");
            file.set_len(copy.len).expect("size a live map");
            for (at, bytes) in &copy.pages {
                file.write_all_at(bytes, *at).expect("write a live map");
            }
        }
    }
}
