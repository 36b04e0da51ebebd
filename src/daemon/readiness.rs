//! How a daemon in the background tells the command that started it that it serves, or why not.
//!
//! The command starts its own program again with stdout as a pipe and [`VARIABLE`] set, and reads one line of JSON from
//! it. The daemon writes that line when the first file can be read or when it has failed, then lets go of the terminal.
//! No descriptor is passed by number and nothing is forked by hand.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::link::ErrorWord;
use super::options::MountOptions;
use crate::error::{Context, Error, ErrorKind, Result};

/// Set to 1 in the environment of a daemon whose stdout is the pipe to the command that started it.
const VARIABLE: &str = "COWDISK_READY_ON_STDOUT";

/// The environment variable that chooses how much the command line logs. A daemon is given the level of whoever starts
/// it.
pub const LOG_VARIABLE: &str = "COWDISK_LOG";

/// Longest line that is read from a daemon, in bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// A daemon to be started in the background.
#[derive(Clone, Debug)]
pub struct SpawnRequest<'a> {
    /// The program; it is called as `PROGRAM --store STORE mount -f -o OPTIONS MOUNTPOINT`.
    pub program: &'a Path,
    /// The directory of the store.
    pub store: &'a Path,
    /// Where to mount it.
    pub mountpoint: &'a Path,
    /// How.
    pub options: &'a MountOptions,
    /// Takes whatever the daemon writes to its stderr.
    pub log: &'a Path,
}

/// What a daemon writes to the pipe.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    Ready,
    Failed(ErrorWord),
}

/// Starts the daemon, with `log_file` for what it says, and waits until it serves.
///
/// # Errors
/// The daemon's own error, with its kind and hint; or that it ended without a word, naming its log.
pub(super) fn start(request: &SpawnRequest<'_>, log_file: std::fs::File) -> Result<()> {
    let what = || format!("start the daemon {}", request.program.display());
    let mut command = Command::new(request.program);
    // Who logs nothing, such as a program without a logger, leaves it to the environment.
    if log::max_level() != log::LevelFilter::Off {
        command.env(LOG_VARIABLE, log::max_level().as_str().to_ascii_lowercase());
    }
    let mut child = command
        .arg("--store")
        .arg(request.store)
        .args(["mount", "-f", "-o"])
        .arg(request.options.to_string())
        .arg("--")
        .arg(request.mountpoint)
        .env(VARIABLE, "1")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log_file))
        .spawn()
        .context(what)?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        // The daemon closes its end after the line, so this does not wait for more.
        stdout.take(LINE_BYTES_MAX).read_to_string(&mut line).context(what)?;
    }
    match serde_json::from_str(line.trim()) {
        Ok(Word::Ready) => Ok(()),
        Ok(Word::Failed(word)) => {
            let _ = child.wait();
            Err(word.into_error())
        }
        Err(_) => {
            let status = child.wait().context(what)?;
            Err(Error::new(ErrorKind::Io, format!("the daemon ended before it served ({status})"))
                .with_hint(format!("its messages are in {}", request.log.display())))
        }
    }
}

/// Largest log that is continued; a larger one is begun anew, so that it cannot fill a tmpfs over the years.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// Opens the log of a daemon.
///
/// # Errors
/// Those of the host.
pub(super) fn open_log(path: &Path) -> Result<std::fs::File> {
    let what = || format!("open the log {}", path.display());
    let file = std::fs::File::options().create(true).append(true).open(path).context(what)?;
    if file.metadata().context(what)?.len() > LOG_BYTES_MAX {
        file.set_len(0).context(what)?;
    }
    Ok(file)
}

/// The way back to whoever started this process.
#[derive(Debug)]
pub struct Readiness {
    pipe: bool,
}

impl Readiness {
    /// Finds out how this process was started.
    pub fn from_environment() -> Self {
        Self { pipe: std::env::var_os(VARIABLE).is_some_and(|value| value == "1") }
    }

    /// Leaves the session of the terminal, so that neither its Ctrl-C nor its end reaches the daemon.
    pub(super) fn detach(&self) {
        if self.pipe {
            // Fails only for the leader of a process group, whom no terminal signals by accident.
            let _ = rustix::process::setsid();
        }
    }

    /// Says that files can be read.
    pub fn ready(&self) {
        self.say(&Word::Ready);
    }

    /// Says why not.
    pub fn failed(&self, error: &Error) {
        self.say(&Word::Failed(ErrorWord::from(error)));
    }

    fn say(&self, word: &Word) {
        if !self.pipe {
            return;
        }
        let mut line = serde_json::to_string(word).expect("a word is plain text");
        line.push('\n');
        // If nobody listens any more, nobody misses it.
        let mut stdout = std::io::stdout();
        let _ = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
        if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdout(null);
        }
    }
}

/// The program that runs now, for starting it again.
///
/// # Errors
/// If `/proc` is not there.
pub(super) fn own_program() -> Result<PathBuf> {
    std::env::current_exe().context(|| "find this program")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_as_they_were() {
        let error = Error::new(ErrorKind::Busy, "store /x: served already").with_hint("unmount it first");
        let line = serde_json::to_string(&Word::Failed(ErrorWord::from(&error))).unwrap();
        let Word::Failed(word) = serde_json::from_str(&line).unwrap() else {
            panic!("another word: {line}");
        };
        let heard = word.into_error();
        assert_eq!(heard.kind(), ErrorKind::Busy);
        assert_eq!(heard.to_string(), "store /x: served already");
        assert_eq!(heard.hint(), Some("unmount it first"));
        assert!(matches!(serde_json::from_str("\"ready\""), Ok(Word::Ready)));
    }

    /// What starting a program leads to that is a shell script.
    fn started(script: &str) -> (Result<()>, PathBuf, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let (log, program) = (folder.path().join("log"), folder.path().join("program"));
        let mut file = std::fs::File::create(&program).unwrap();
        write!(file, "#!/bin/sh\n{script}\n").unwrap();
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        drop(file);
        let request = SpawnRequest {
            program: &program,
            store: Path::new("/the/store"),
            mountpoint: Path::new("/the/mountpoint"),
            options: &MountOptions::parse("threads=2").unwrap(),
            log: &log,
        };
        (open_log(&log).and_then(|file| start(&request, file)), log, folder)
    }

    #[test]
    fn a_daemon_is_called_with_store_options_and_mountpoint_and_logs_to_its_file() {
        let (result, log, _folder) = started("echo \"$@\" >&2; echo '\"ready\"'");
        result.unwrap();
        let said = std::fs::read_to_string(log).unwrap();
        assert_eq!(said, "--store /the/store mount -f -o rw,threads=2,flush=5 -- /the/mountpoint\n");
    }

    /// A daemon in the background logged as if no `-v` had been given.
    #[test]
    fn a_daemon_logs_as_much_as_who_starts_it() {
        log::set_max_level(log::LevelFilter::Debug);
        let (result, log, _folder) = started("echo $COWDISK_LOG >&2; echo '\"ready\"'");
        log::set_max_level(log::LevelFilter::Off);
        result.unwrap();
        assert_eq!(std::fs::read_to_string(log).unwrap(), "debug\n");
    }

    #[test]
    fn the_error_of_a_daemon_becomes_ours() {
        let word = r#"{"failed":{"kind":"Busy","message":"mounted already","hint":"unmount it"}}"#;
        let error = started(&format!("echo '{word}'; exit 1")).0.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!((error.to_string().as_str(), error.hint()), ("mounted already", Some("unmount it")));
    }

    #[test]
    fn a_daemon_that_ends_without_a_word_is_an_error_that_names_the_log() {
        let (result, log, _folder) = started("exit 3");
        let error = result.unwrap_err();
        assert!(error.to_string().contains("ended before it served"), "{error}");
        assert!(error.hint().unwrap().contains(log.to_str().unwrap()));
    }
}
