//! The program that workers are started from: the one that the keeper itself is, or the one that has since taken its place.
//!
//! Where that place is, the keeper finds out once, at its start, before anybody can tell it anything. Nobody names a program to
//! it, so nobody who may only ask for an upgrade chooses what runs.

use std::fs::{File, Metadata};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Error, ErrorKind, Result};

/// The program that is running, whatever has become of its file.
const OWN: &str = "/proc/self/exe";

/// Bits of a mode that let others than the owner write.
const OTHERS_WRITE: u32 = 0o022;

const STICKY: u32 = 0o1000;

/// Where a program was found, and the very file.
#[derive(Debug)]
pub(super) struct Program {
    path: PathBuf,
    file: File,
}

impl Program {
    /// The one that this process runs.
    ///
    /// # Errors
    /// If `/proc` is not there.
    pub(super) fn own() -> Result<Self> {
        let what = || "find this program";
        let path = std::fs::read_link(OWN).context(what)?;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let file = rustix::fs::open(OWN, flags, Mode::empty()).context(what)?;
        Ok(Self { path, file: file.into() })
    }

    /// The one that is in the place of this one now.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] if others than root and the user of this process could have put it there, or could change it.
    pub(super) fn successor(&self) -> Result<Self> {
        let what = || format!("program {}", self.path.display());
        check_folders(&self.path)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&self.path, flags, Mode::empty()).context(what)?);
        let found = file.metadata().context(what)?;
        if !found.is_file() {
            return Err(Error::new(ErrorKind::Unsupported, format!("{}: not a regular file", what())));
        }
        if !is_safe(&found) {
            return Err(unsafe_place(&what()));
        }
        Ok(Self { path: self.path.clone(), file })
    }

    /// Where it was found.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its file, opened for running it and nothing else.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

/// Checks that nobody else may put another file at `path`, which is absolute and without links, as the kernel tells it.
fn check_folders(path: &Path) -> Result<()> {
    for folder in path.ancestors().skip(1) {
        let what = || format!("folder {}", folder.display());
        let found = folder.symlink_metadata().context(what)?;
        // In a sticky folder nobody else may take the place of a file of ours.
        let is_sticky = found.permissions().mode() & STICKY != 0 && is_ours(&found);
        if !found.is_dir() || !(is_safe(&found) || is_sticky) {
            return Err(unsafe_place(&what()));
        }
    }
    Ok(())
}

fn is_ours(found: &Metadata) -> bool {
    found.uid() == 0 || found.uid() == rustix::process::geteuid().as_raw()
}

/// Whether nobody but root and the user of this process may write to it. Where there are access control lists, the bits of
/// the group are the most that they give.
fn is_safe(found: &Metadata) -> bool {
    is_ours(found) && found.permissions().mode() & OTHERS_WRITE == 0
}

fn unsafe_place(what: &str) -> Error {
    let user = rustix::process::geteuid().as_raw();
    let who = if user == 0 { "root".to_owned() } else { format!("root and user {user}") };
    Error::new(ErrorKind::Denied, format!("{what}: others than {who} may write to it")).with_hint(
        "a program is run only from where nobody else can change it: see to its owner and its mode",
    )
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_program_is_refused_where_others_may_change_it_or_put_another_in_its_place() {
        assert!(rustix::process::geteuid().is_root(), "needs root");
        let folder = tempfile::tempdir().unwrap();
        let above = folder.path().canonicalize().unwrap().join("above");
        let path = above.join("program");
        std::fs::create_dir(&above).unwrap();
        chmod(&above, 0o755);
        std::fs::copy("/bin/true", &path).unwrap();
        chmod(&path, 0o755);
        let own = Program { file: File::open("/bin/true").unwrap(), path: path.clone() };
        let found = own.successor().unwrap();
        assert_eq!(found.file().metadata().unwrap().ino(), path.metadata().unwrap().ino());
        let refused = |why: &str| {
            let error = own.successor().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied, "{why}: {error}");
            assert!(error.to_string().ends_with("others than root may write to it"), "{error}");
        };
        for (mode, other) in [(0o775, "its group"), (0o757, "everybody")] {
            chmod(&path, mode);
            refused(other);
            chmod(&path, 0o755);
            chmod(&above, mode);
            refused(other);
            chmod(&above, 0o755);
        }
        for place in [&path, &above] {
            chown(place, Some(4321), None).unwrap();
            refused("another owner");
            chown(place, Some(0), None).unwrap();
        }
        chmod(&above, 0o1777);
        own.successor().unwrap();
        chmod(&above, 0o755);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(own.successor().unwrap_err().kind(), ErrorKind::NotFound);
        symlink("/bin/true", &path).unwrap();
        assert_eq!(own.successor().unwrap_err().kind(), ErrorKind::Unsupported, "a link leads anywhere");
    }
}
