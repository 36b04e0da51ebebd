//! The rules of ARCHITECTURE.md, read off the sources: which folder may use which, where a crate has its home, where
//! unsafe code may stand, who may change the host's disk, and how long a file may be.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders in order: each uses only those before it.
const LAYERS: [&str; 14] = [
    "error",
    "finding",
    "units",
    "format",
    "storage",
    "overlay",
    "store",
    "fs",
    "transport",
    "daemon",
    "libvirt",
    "inspect",
    "doctor",
    "cli",
];

/// Crates and the folders, or files, that may name them.
const HOMES: [(&str, &[&str]); 15] = [
    ("fuser", &["transport"]),
    ("io_uring", &["transport/dev_fuse/uring", "transport/dev_fuse/cold.rs"]),
    ("httparse", &["daemon/http.rs"]),
    ("clap", &["cli"]),
    ("clap_complete", &["cli"]),
    ("quick_xml", &["libvirt"]),
    ("indicatif", &["cli"]),
    ("memmap2", &["overlay/live_map.rs", "storage/aio.rs", "transport/dev_fuse/buffers.rs"]),
    ("blake3", &["format", "store"]),
    ("rayon", &["store"]),
    ("seccompiler", &["daemon/seccomp.rs"]),
    ("serde", &["store", "daemon", "libvirt", "inspect", "cli"]),
    ("serde_json", &["store", "daemon", "libvirt", "inspect", "cli"]),
    ("signal_hook", &["daemon", "cli"]),
    ("zerocopy", &["transport/dev_fuse"]),
];

const UNSAFE_HOMES: [&str; 8] = [
    "storage/aio.rs",
    "storage/extents.rs",
    "storage/io_priority.rs",
    "storage/lost_writes.rs",
    "overlay/live_map.rs",
    "transport/",
    "daemon/signals.rs",
    "daemon/seccomp.rs",
];

/// What changes the host's disk, or opens a file so that it can be changed.
const DISK_CHANGES: [&str; 34] = [
    "Access::ReadWrite",
    "DirBuilder",
    "File::create",
    "File::options",
    "OFlags::CREATE",
    "OFlags::RDWR",
    "OFlags::WRONLY",
    "OpenOptions",
    "fs::chmod",
    "fs::chown",
    "fs::copy",
    "fs::create_dir",
    "fs::fallocate",
    "fs::fchmod",
    "fs::fchown",
    "fs::fdatasync",
    "fs::fsetxattr",
    "fs::fsync",
    "fs::ftruncate",
    "fs::futimens",
    "fs::hard_link",
    "fs::ioctl_ficlone",
    "fs::link",
    "fs::mkdir",
    "fs::mknod",
    "fs::remove_",
    "fs::rename",
    "fs::set_permissions",
    "fs::symlink",
    "fs::unlink",
    "fs::utimens",
    "fs::write",
    "io::pwrite",
    "write_all_at",
];

/// Who does so beside the seam, and by what; `storage/host.rs` says why.
const BESIDE_THE_SEAM: [(&str, &[&str]); 16] = [
    ("overlay/live_map.rs", &["OpenOptions", "fs::fallocate", "fs::remove_", "write_all_at"]),
    ("store/marks.rs", &["OpenOptions", "fs::remove_"]),
    ("store/run_dir.rs", &["DirBuilder"]),
    ("store/bases.rs", &["fs::fchown"]),
    ("store/convert.rs", &["fs::fchown"]),
    ("store/disk.rs", &["Access::ReadWrite", "fs::remove_"]),
    ("store/dir.rs", &["Access::ReadWrite", "OFlags::CREATE", "OFlags::RDWR"]),
    ("store/lock.rs", &["write_all_at"]),
    ("store/sharing.rs", &["OFlags::RDWR"]),
    ("fs/ledger.rs", &["write_all_at"]),
    ("transport/mount.rs", &["File::options"]),
    ("daemon/control.rs", &["fs::remove_", "fs::set_permissions"]),
    ("daemon/readiness.rs", &["File::options"]),
    ("daemon/farewell.rs", &["File::create"]),
    ("daemon/confine.rs", &["File::options"]),
    ("libvirt/kvm.rs", &["File::create", "OpenOptions"]),
];

/// Longer files usually hide a second reason to change.
const LINES_MAX: usize = 500;

fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("read a source folder") {
            let path: PathBuf = entry.expect("a folder entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).expect("below src").display().to_string();
                found.push((name, fs::read_to_string(path).expect("read a source")));
            }
        }
    }
    assert!(found.len() > 20, "the sources are where they are expected");
    found
}

fn layer_of(name: &str) -> Option<usize> {
    let top = name.split('/').next().expect("never empty").trim_end_matches(".rs");
    LAYERS.iter().position(|layer| *layer == top)
}

/// Names after `crate::` in code, each with its line number. Comments may speak of anything.
fn crate_names(source: &str) -> Vec<(usize, String)> {
    let mut names = Vec::new();
    for (number, line) in (1..).zip(source.lines()) {
        let code = line.split("//").next().expect("never empty");
        for piece in code.split("crate::").skip(1) {
            let name: String = piece.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            names.push((number, name));
        }
    }
    names
}

fn complain(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn a_folder_uses_only_folders_before_it() {
    let mut complaints = Vec::new();
    for (name, source) in sources() {
        let Some(layer) = layer_of(&name) else { continue };
        for (line, used) in crate_names(&source) {
            if LAYERS.iter().position(|layer| *layer == used).is_some_and(|used| used > layer) {
                complaints.push(format!("src/{name}:{line}: uses {used}, which comes later"));
            }
        }
    }
    complain(&complaints);
}

#[test]
fn a_crate_is_named_only_in_its_home() {
    let mut complaints = Vec::new();
    for (name, source) in sources() {
        for (number, line) in (1..).zip(source.lines()) {
            let code = line.split("//").next().expect("never empty");
            for (krate, homes) in HOMES {
                let named = code.match_indices(&format!("{krate}::")).any(|(at, _)| {
                    !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
                });
                if named && !homes.iter().any(|home| name.starts_with(home)) {
                    complaints.push(format!("src/{name}:{number}: {krate} has its home in {homes:?}"));
                }
            }
        }
    }
    complain(&complaints);
}

#[test]
fn unsafe_code_stands_only_where_it_may() {
    let mut complaints = Vec::new();
    for (name, source) in sources() {
        let allowed = UNSAFE_HOMES.iter().any(|home| name.starts_with(home));
        if source.contains("allow(unsafe_code)") && !allowed {
            complaints.push(format!("src/{name}: unsafe code"));
        }
    }
    complain(&complaints);
}

#[test]
fn the_hosts_disk_is_changed_through_one_seam() {
    let mut complaints = Vec::new();
    for (name, source) in sources() {
        if name == "storage/host.rs" || name.contains("/tests/") || name.ends_with("/tests.rs") {
            continue;
        }
        let beside = BESIDE_THE_SEAM.iter().find(|(file, _)| *file == name);
        let allowed = beside.map_or(&[][..], |(_, allowed)| *allowed);
        let (code, _tests) = source.split_once("#[cfg(test)]\nmod tests").unwrap_or((&source, ""));
        for (number, line) in (1..).zip(code.lines()) {
            let line = line.split("//").next().expect("never empty");
            for change in DISK_CHANGES {
                if line.contains(change) && !allowed.contains(&change) {
                    complaints
                        .push(format!("src/{name}:{number}: {change}, and not through storage/host.rs"));
                }
            }
        }
    }
    complain(&complaints);
}

#[test]
fn files_are_short() {
    let mut complaints = Vec::new();
    for (name, source) in sources() {
        let lines = source.lines().count();
        if lines > LINES_MAX && !name.ends_with("tests.rs") {
            complaints.push(format!("src/{name}: {lines} lines"));
        }
    }
    complain(&complaints);
}

/// Every `file::test` that docs/SECURITY.md names is there: `::test` alone is of the file named before it.
#[test]
fn the_tests_that_the_threat_model_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/SECURITY.md")).expect("read docs/SECURITY.md");
    let mut source = String::new();
    let mut named = 0;
    // Every other piece lies between backticks.
    for word in text.split('`').skip(1).step_by(2) {
        let (file, test) = word.split_once("::").unwrap_or((word, ""));
        if file.ends_with(".rs") && file.contains('/') {
            let path =
                if file.starts_with("daemon/") { root.join("src").join(file) } else { root.join(file) };
            source = fs::read_to_string(path).unwrap_or_else(|error| panic!("{word}: {error}"));
        } else if !file.is_empty() {
            continue;
        }
        if !test.is_empty() {
            assert!(source.contains(&format!("fn {test}(")), "no test {word}");
            named += 1;
        }
    }
    assert!(named >= 20, "the tests are found: {named}");
}
