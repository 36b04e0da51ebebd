//! A daemon's last words: whether everything was made durable when it ended.
//!
//! They are a file in the run directory, written before the daemon gives up its lock on the store and read by whoever
//! took the mount away and waited for that lock. The process id in it tells an old file from one of this daemon.

use std::io::Write;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, ErrorKind, Result};

/// Name of the file, in the run directory.
const FILE: &str = "daemon.farewell.json";

/// Longest file that is read, in bytes.
const BYTES_MAX: u64 = 1 << 20;

/// What a daemon leaves behind.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Farewell {
    pid: u32,
    /// Empty if every disk was flushed and closed.
    errors: Vec<String>,
}

impl Farewell {
    /// Writes what the daemon `pid` leaves behind: this process, or the one that keeps the mount.
    pub(super) fn write(run_dir: &Path, pid: u32, errors: &[Error]) -> Result<()> {
        let path = run_dir.join(FILE);
        let words = Self { pid, errors: errors.iter().map(ToString::to_string).collect() };
        let bytes = serde_json::to_vec(&words).expect("plain numbers and text");
        // Not atomic, and need not be: it is read only after the writer has given up its lock.
        let mut file = std::fs::File::create(&path).context(|| format!("write {}", path.display()))?;
        file.write_all(&bytes).context(|| format!("write {}", path.display()))
    }

    /// Reads what the daemon `pid` left behind.
    ///
    /// # Errors
    /// Its errors, if it had any; that it left none, if it was killed.
    pub(super) fn check(run_dir: &Path, pid: u32) -> Result<()> {
        match Self::read(run_dir) {
            Some(words) if words.pid == pid => match words.errors.as_slice() {
                [] => Ok(()),
                errors => Err(Error::new(
                    ErrorKind::Io,
                    format!("not all disks could be made durable: {}", errors.join("; ")),
                )),
            },
            _ => Self::missing(pid),
        }
    }

    /// What is said where the daemon `pid` left no words.
    ///
    /// # Errors
    /// Always.
    pub(super) fn missing(pid: u32) -> Result<()> {
        let text = format!("the daemon (process {pid}) ended before it had closed its disks");
        Err(Error::new(ErrorKind::Io, text).with_hint(
            "nothing is lost as long as the host stays up: opening a disk again takes up its live map",
        ))
    }

    fn read(run_dir: &Path) -> Option<Self> {
        use std::io::Read;
        let mut bytes = Vec::new();
        // Whoever unmounts may be another than whose folder this is: a fifo in it must not hold him up.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = std::fs::File::from(rustix::fs::open(run_dir.join(FILE), flags, Mode::empty()).ok()?);
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        file.take(BYTES_MAX).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::FileType;

    use super::*;

    #[test]
    fn only_the_words_of_that_very_daemon_count() {
        let folder = tempfile::tempdir().unwrap();
        let pid = std::process::id();
        assert!(Farewell::check(folder.path(), pid).is_err(), "no words are no good news");
        Farewell::write(folder.path(), pid, &[]).unwrap();
        assert!(Farewell::check(folder.path(), pid).is_ok());
        assert!(Farewell::check(folder.path(), pid + 1).is_err());
        Farewell::write(folder.path(), pid, &[Error::new(ErrorKind::Io, "close web-1/disk: it broke")])
            .unwrap();
        assert!(Farewell::check(folder.path(), pid).unwrap_err().to_string().contains("it broke"));
        std::fs::remove_file(folder.path().join(FILE)).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, folder.path().join(FILE), FileType::Fifo, Mode::RWXU, 0)
            .unwrap();
        assert!(Farewell::check(folder.path(), pid).is_err(), "a fifo is not waited for");
    }
}
