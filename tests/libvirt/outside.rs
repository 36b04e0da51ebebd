//! What the host's own tools see of the disks that a guest has left.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::place::tool;

pub const MIB: u64 = 1 << 20;

/// Where a guest writes its files, on each filesystem.
const FOLDER: &str = "/var/lib/cowdisk-guest";

/// What the guest's step `write=NAME` writes: in every sector the name and the sector's number.
pub fn content(name: &str, bytes: u64) -> Vec<u8> {
    (0..bytes / 512)
        .flat_map(|sector| format!("{:<511}\n", format!("{name} {sector}")).into_bytes())
        .collect()
}

/// Its checksum, as the guest prints it.
pub fn sha256(bytes: &[u8]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
    let said = String::from_utf8(tool("sha256sum", &[file.path().to_str().unwrap()])).unwrap();
    said.split_whitespace().next().unwrap().to_owned()
}

/// Fails unless the ext4 on `disk` was unmounted cleanly and has no error.
pub fn assert_clean_ext4(disk: &Path) {
    let said = String::from_utf8(tool("e2fsck", &["-fn", path(disk)])).unwrap();
    assert!(!said.contains("recover"), "{}: unmounted uncleanly:\n{said}", disk.display());
}

/// Fails unless the XFS on `disk` was unmounted cleanly and has no error.
pub fn assert_clean_xfs(disk: &Path) {
    tool("xfs_repair", &["-n", "-f", path(disk)]);
}

/// Fails unless the ext4 on `disk` has the guest's file NAME with every byte that the guest wrote.
pub fn assert_holds(disk: &Path, name: &str, bytes: u64) {
    let found = tool("debugfs", &["-R", &format!("cat {FOLDER}/{name}"), path(disk)]);
    let expected = content(name, bytes);
    assert_eq!(found.len(), expected.len(), "{}: length of {name}", disk.display());
    let differs = found.chunks(512).zip(expected.chunks(512)).position(|(found, expected)| found != expected);
    if let Some(sector) = differs {
        let line = String::from_utf8_lossy(&found[sector * 512..][..32]).into_owned();
        panic!("{}: {name} has in sector {sector}: {line:?}", disk.display());
    }
}

/// The files that guests have written to the ext4 on `disk`, in order.
pub fn files_on(disk: &Path) -> Vec<String> {
    let said = tool("debugfs", &["-R", &format!("ls -p {FOLDER}"), path(disk)]);
    // Lines are /inode/mode/uid/gid/name/size/.
    let listed = String::from_utf8(said).unwrap();
    let names = listed.lines().filter_map(|line| line.split('/').nth(5).map(str::to_owned));
    let mut names: Vec<_> =
        names.filter(|name| !["", ".", "..", "SHA256SUMS"].contains(&name.as_str())).collect();
    names.sort();
    names
}

/// Fails unless the first bytes of `disk` are those of `image`, as many as the image has.
pub fn assert_same(disk: &Path, image: &Path) {
    let bytes = image.metadata().unwrap().size().to_string();
    tool("cmp", &["--bytes", &bytes, path(disk), path(image)]);
}

/// Bytes of the host's disk that a file takes.
pub fn allocated(file: &Path) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

/// Owner, group and permissions.
pub fn owner(file: &Path) -> (u32, u32, u32) {
    let found = file.metadata().unwrap();
    (found.uid(), found.gid(), found.mode() & 0o7777)
}

pub fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
