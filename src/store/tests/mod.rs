//! Tests of the store as a whole; those of a part are with the part.

mod checking;
mod crashing;
mod creating;
mod flavoring;
mod hosts;
mod importing;
mod instancing;
mod plain_blanks;
mod repairing;
mod scrubbing;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// A store in a temporary folder, with a run directory of its own.
pub(super) struct TestStore {
    pub(super) store: Store,
    pub(super) folder: tempfile::TempDir,
    pub(super) run: tempfile::TempDir,
}

pub(super) fn empty_store() -> TestStore {
    let folder = tempfile::tempdir().unwrap();
    let run = tempfile::tempdir().unwrap();
    let store = Store::init(folder.path()).unwrap().with_run_dir(run.path());
    TestStore { store, folder, run }
}

/// A store that a program of before has made.
pub(super) fn store_of_version_1() -> TestStore {
    let t = empty_store();
    let path = t.path("cowdisk-store.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("\"version\": 2", "\"version\": 1");
    File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
    let store = Store::open(t.folder.path()).unwrap().with_run_dir(t.run.path());
    TestStore { store, ..t }
}

/// A store with image `debian` and instance `web-3` of it, with a blank local disk.
pub(super) fn store_with_image() -> TestStore {
    let t = empty_store();
    t.import("debian", &image_bytes()).unwrap();
    let spec = InstanceSpec { local_size: Some(8 << 20), ..InstanceSpec::of(name("debian")) };
    t.store.create_instance(&name("web-3"), &spec, &NoProgress).unwrap();
    t
}

fn name(text: &str) -> ObjectName {
    text.parse().unwrap()
}

/// Imports the image `debian` with a kernel.
fn import_with_kernel(t: &TestStore) -> Image {
    let request = ImportRequest {
        source: t.file("source.img", &image_bytes()),
        kernel: Some(t.file("vmlinuz", b"a kernel")),
        ..ImportRequest::default()
    };
    t.store.import_image(&name("debian"), &request, &NoProgress).unwrap()
}

/// 1 MiB: data, a hole's worth of zeroes, data.
fn image_bytes() -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    bytes[..5000].fill(0x11);
    bytes[(1 << 20) - 5000..].fill(0x22);
    bytes
}

impl TestStore {
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.run.path().join(name);
        File::create(&path).unwrap().write_all(bytes).unwrap();
        path
    }

    fn import(&self, image: &str, bytes: &[u8]) -> Result<Image> {
        let request = ImportRequest { source: self.file("source.img", bytes), ..ImportRequest::default() };
        self.store.import_image(&name(image), &request, &NoProgress)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn names(&self, folder: &str) -> Vec<String> {
        Dir::open_path(&self.path(folder)).unwrap().names().unwrap()
    }

    /// Everything in the store: paths, sizes and times of files.
    fn snapshot(&self) -> Vec<(PathBuf, u64, i64)> {
        fn walk(dir: &Path, found: &mut Vec<(PathBuf, u64, i64)>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                let metadata = entry.metadata().unwrap();
                if metadata.is_dir() {
                    walk(&entry.path(), found);
                } else {
                    found.push((entry.path(), metadata.len(), metadata.mtime_nsec()));
                }
            }
        }
        let mut found = Vec::new();
        walk(self.folder.path(), &mut found);
        found.sort();
        found
    }

    #[track_caller]
    fn refuses<T: std::fmt::Debug>(
        &self,
        kind: ErrorKind,
        reason: &str,
        action: impl FnOnce(&Store) -> Result<T>,
    ) {
        let before = self.snapshot();
        let error = action(&self.store).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(self.snapshot(), before, "a refusal changes nothing");
    }
}

/// Cancels once so many bytes are done.
struct CancelAfter {
    bytes: u64,
    done: AtomicU64,
    open: AtomicU64,
}

impl CancelAfter {
    fn new(bytes: u64) -> Self {
        Self { bytes, done: AtomicU64::new(0), open: AtomicU64::new(0) }
    }
}

impl Progress for CancelAfter {
    fn begin(&self, _what: &str, _total_bytes: Option<u64>) {
        self.open.fetch_add(1, Ordering::Relaxed);
    }
    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
    fn finish(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
    fn cancelled(&self) -> bool {
        self.done.load(Ordering::Relaxed) >= self.bytes
    }
}
