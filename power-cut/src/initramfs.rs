//! The guest's first file system: an archive in cpio's format `newc`, which the kernel unpacks.

use std::io::Write;

use crate::{Doing, Result};

/// Writes an archive of executable files; a name may have folders, which are made.
///
/// # Errors
/// What cannot be read or written.
pub fn write(target: &mut impl Write, files: &[(String, std::path::PathBuf)]) -> Result<()> {
    let mut folders = Vec::new();
    for (name, path) in files {
        for (at, _) in name.match_indices('/') {
            let folder = &name[..at];
            if !folders.contains(&folder) {
                folders.push(folder);
                entry(target, folder, 0o040_755, &[])?;
            }
        }
        let content = std::fs::read(path).doing(format!("read {}", path.display()))?;
        entry(target, name, 0o100_755, &content)?;
    }
    entry(target, "TRAILER!!!", 0, &[])
}

fn entry(target: &mut impl Write, name: &str, mode: u32, content: &[u8]) -> Result<()> {
    // Inode, mode, uid, gid, links, mtime, size, device (4), length of the name with its zero, checksum.
    let fields = [0, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
    let mut head = b"070701".to_vec();
    for field in fields {
        head.extend(format!("{field:08x}").bytes());
    }
    head.extend(name.bytes());
    head.push(0);
    head.resize(head.len().next_multiple_of(4), 0);
    let end = vec![0; content.len().next_multiple_of(4) - content.len()];
    for part in [&head, content, &end] {
        target.write_all(part).doing("write the archive")?;
    }
    Ok(())
}
