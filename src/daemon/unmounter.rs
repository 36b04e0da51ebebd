//! Taking the mount away from inside a confined daemon.
//!
//! A process that has a keeper asks it. Otherwise, with the capability for it: it is put into effect for the moment of the call, in the calling thread. Without it only
//! the setuid `fusermount3` can unmount, and a confined process cannot run it. So a shell is started beforehand that runs it
//! each time it is asked to; it ends with the daemon, for its standard input does.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;

use super::identity;
use super::worker::KeeperLink;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::transport::mount;

/// For each line that it reads it tries to unmount, and answers with a line: `ok`, or what `fusermount3` says.
const SCRIPT: &str = r#"while read -r _; do
    if said=$(fusermount3 -u -- "$1" 2>&1); then echo ok; else printf '%s' "$said" | tr '\n' ' '; echo; fi
done"#;

/// What takes one mount away.
#[derive(Debug)]
pub(super) struct Unmounter {
    mountpoint: PathBuf,
    way: Way,
}

#[derive(Debug)]
enum Way {
    /// This process has the capability.
    Capability,
    /// Guards one request and its answer.
    Shell(Mutex<Shell>),
    Keeper(Arc<KeeperLink>),
}

#[derive(Debug)]
struct Shell {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Unmounter {
    /// To be called before the process is confined.
    ///
    /// # Errors
    /// If the shell cannot be started.
    pub(super) fn new(mountpoint: &Path) -> Result<Self> {
        let way = if identity::may_mount() {
            Way::Capability
        } else {
            Way::Shell(Mutex::new(Shell::start(mountpoint)?))
        };
        Ok(Self { mountpoint: mountpoint.to_owned(), way })
    }

    /// What asks the keeper.
    pub(super) fn by_keeper(mountpoint: PathBuf, keeper: Arc<KeeperLink>) -> Self {
        Self { mountpoint, way: Way::Keeper(keeper) }
    }

    /// Takes the mount away.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a file in it is open or a process stands in it; nothing is changed then.
    pub(super) fn unmount(&self) -> Result<()> {
        match &self.way {
            Way::Keeper(keeper) => keeper.unmount(),
            Way::Shell(shell) => {
                shell.lock().ask().context(|| format!("unmount {}", self.mountpoint.display()))
            }
            Way::Capability => identity::with_capabilities(|| mount::unmount(&self.mountpoint)),
        }
    }
}

impl Shell {
    fn start(mountpoint: &Path) -> Result<Self> {
        let what = || "start a shell for unmounting";
        let arguments: [OsString; 4] = ["-c".into(), SCRIPT.into(), "sh".into(), mountpoint.into()];
        let mut child = Command::new("/bin/sh")
            .args(arguments)
            .current_dir("/")
            // The Ctrl-C of a terminal is for us alone: at it, the mount is to be taken away.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context(what)?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let stdout = stdout.ok_or_else(|| Error::new(ErrorKind::Io, what()))?;
        Ok(Self { child, stdin, stdout: BufReader::new(stdout) })
    }

    fn ask(&mut self) -> Result<()> {
        let what = || "ask fusermount3";
        let mut answer = String::new();
        let stdin = self.stdin.as_mut().ok_or_else(|| Error::new(ErrorKind::Io, what()))?;
        stdin.write_all(b"\n").context(what)?;
        self.stdout.read_line(&mut answer).context(what)?;
        match answer.trim() {
            "ok" => Ok(()),
            said if said.contains("busy") => Err(Error::new(ErrorKind::Busy, "in use")),
            said => Err(Error::new(ErrorKind::Denied, said.trim_start_matches("fusermount3: "))),
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // It ends with its input.
        self.stdin = None;
        let _ = self.child.wait();
    }
}
