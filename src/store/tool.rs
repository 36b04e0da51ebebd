//! Running another program under limits: `qemu-img` over bytes that nobody trusts, `mkfs` over our own.
//!
//! The limits are set by `prlimit(1)` and `setpriv(1)` of util-linux, an essential package of Debian, which set them
//! and then become the program. So they hold before its first instruction, the child has the same process id all along,
//! and it dies with us, all without unsafe code between fork and exec. The program gets no terminal, an environment of
//! four variables, and a working directory by descriptor. One that reads what nobody trusts does not run as root.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Gid, Pid, Resource, Signal, Uid, WaitId, WaitIdOptions, getrlimit};

use super::dir::Dir;
use super::progress::{Progress, check_cancelled};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::Room;

/// Where programs are looked for besides `PATH`: an unprivileged user's often lacks the first two.
const USUAL_FOLDERS: &str = "/usr/sbin:/sbin:/usr/bin:/bin";
/// The user and the group that own nothing: Linux's overflow ids.
const NOBODY: u32 = 65534;
/// Most bytes of a program's messages that are kept.
const MESSAGES_BYTES_MAX: usize = 4096;
/// How often the program is looked at, at most and at least.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// How often a reader of its pipes looks whether the program has ended.
const PIPE_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// The most that a pipe holds, unless root makes it larger: `/proc/sys/fs/pipe-max-size`.
const PIPE_BYTES_MAX: usize = 1 << 20;

/// What a program may use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Seconds of processor time.
    pub(super) cpu_seconds: u64,
    /// Bytes of address space.
    pub(super) address_bytes: u64,
    /// Bytes of the largest file that it may write.
    pub(super) file_bytes: u64,
    /// Time until it is killed.
    pub(super) wall: Duration,
}

/// Whom a program that root starts runs as. Without root there is nothing to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunAs {
    /// Ourselves.
    Us,
    /// [`unprivileged_user`]: without capabilities, and reading and writing only what was handed over.
    Nobody,
}

/// The user and group that [`RunAs::Nobody`] means; `None` if we are not root ourselves.
pub(super) fn unprivileged_user() -> Option<(Uid, Gid)> {
    let root = rustix::process::geteuid().is_root();
    root.then(|| (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY)))
}

/// A program to run.
pub(super) struct Tool<'a> {
    /// Its name.
    pub(super) program: &'a str,
    /// The Debian package that has it.
    pub(super) package: &'a str,
    pub(super) arguments: Vec<String>,
    pub(super) folder: &'a Dir,
    pub(super) input: Option<&'a File>,
    pub(super) limits: Limits,
    pub(super) run_as: RunAs,
}

impl Tool<'_> {
    /// Runs the program to its end, unless what it writes uses up `room`. Each piece of its output is handed to `output`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the program is not there, naming its package; [`ErrorKind::Interrupted`] if the
    /// user cancels (the program is then dead); [`ErrorKind::NoSpace`]; [`ErrorKind::Io`] with its own words if it fails.
    pub(super) fn run(
        &self,
        room: &Room,
        progress: &dyn Progress,
        mut output: impl FnMut(&[u8]) + Send,
    ) -> Result<()> {
        let mut command = self.command()?;
        let child = command.spawn().context(|| format!("run {}", self.program))?;
        let mut child = Running { child, is_reaped: false };
        let (stdout, stderr) = (child.child.stdout.take(), child.child.stderr.take());
        let started = Instant::now();
        let has_ended = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if let Some(stdout) = stdout {
                    read_all(stdout, has_ended, |bytes| output(bytes));
                }
            });
            let messages = scope.spawn(move || {
                let mut kept = Vec::new();
                if let Some(stderr) = stderr {
                    read_all(stderr, has_ended, |bytes| keep_last(&mut kept, bytes));
                }
                kept
            });
            let ended = self.wait(&child.child, started, room, progress);
            // Whatever it has started goes with it, and the threads end even if some of that got away with a pipe.
            let status = child.end().context(|| format!("wait for {}", self.program));
            has_ended.store(true, Ordering::Release);
            let messages = messages.join().unwrap_or_default();
            ended.and_then(|()| self.judge(status?, &messages))
        })
    }

    fn command(&self) -> Result<Command> {
        let program = find(self.program).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("{}: not installed", self.program))
                .with_hint(format!("install the Debian package {0}: apt-get install {0}", self.package))
        })?;
        let helper = |name: &str| {
            find(name).ok_or_else(|| {
                Error::new(ErrorKind::Unsupported, format!("{name}: not installed"))
                    .with_hint("install the Debian package util-linux")
            })
        };
        let limit = |resource, wanted: u64| match getrlimit(resource).maximum {
            Some(most) => wanted.min(most),
            None => wanted,
        };
        let Limits { cpu_seconds, address_bytes, file_bytes, .. } = self.limits;
        let input = match self.input {
            Some(file) => Stdio::from(file.try_clone().context(|| "share a file with a program")?),
            None => Stdio::null(),
        };
        let mut command = Command::new(helper("prlimit")?);
        command
            // The first is a signal that says why, the second a kill.
            .arg(format!(
                "--cpu={}:{}",
                limit(Resource::Cpu, cpu_seconds),
                limit(Resource::Cpu, cpu_seconds + 1)
            ))
            .arg(format!("--as={}", limit(Resource::As, address_bytes)))
            .arg(format!("--fsize={}", limit(Resource::Fsize, file_bytes)))
            .args(["--core=0", "--"])
            .arg(helper("setpriv")?)
            .args(["--pdeathsig", "KILL", "--no-new-privs"]);
        if let (RunAs::Nobody, Some((uid, gid))) = (self.run_as, unprivileged_user()) {
            // With the user id the capabilities go, and without new privileges no program brings them back.
            command.args([format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".to_owned()]);
        }
        command
            .arg("--")
            .arg(program)
            .args(&self.arguments)
            .env_clear()
            .env("PATH", USUAL_FOLDERS)
            .env("LC_ALL", "C")
            // Of glibc: one arena of memory instead of one for each thread, which would use up the address space.
            .env("MALLOC_ARENA_MAX", "1")
            .env("HOME", "/nonexistent")
            .current_dir(format!("/proc/self/fd/{}", self.folder.as_fd().as_raw_fd()))
            // A group of its own: Ctrl-C reaches us alone, and a kill all that the program may start.
            .process_group(0)
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }

    /// Waits for the end of the program, whose id stays its own until it is asked for its status.
    fn wait(&self, child: &Child, started: Instant, room: &Room, progress: &dyn Progress) -> Result<()> {
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let id = WaitId::Pid(id.ok_or(rustix::io::Errno::SRCH).context(|| self.program)?);
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let mut pause = PAUSE_MIN;
        loop {
            let ended = rustix::process::waitid(id.clone(), options);
            if ended.context(|| format!("wait for {}", self.program))?.is_some() {
                return Ok(());
            }
            check_cancelled(progress)?;
            // It writes without asking, but the filesystem counts what it takes.
            room.look()?;
            let _taken = room.take(1).context(|| self.program)?;
            if started.elapsed() > self.limits.wall {
                return Err(self.exceeded("time", format!("{} s", self.limits.wall.as_secs())));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn judge(&self, status: ExitStatus, messages: &[u8]) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        let signal = status.signal();
        if signal == Some(Signal::XCPU.as_raw()) {
            return Err(self.exceeded("processor time", format!("{} s", self.limits.cpu_seconds)));
        }
        if signal == Some(Signal::XFSZ.as_raw()) {
            return Err(self.exceeded("file size", format!("{} bytes", self.limits.file_bytes)));
        }
        let said = one_line(messages);
        let how = match (signal, status.code()) {
            (Some(signal), _) => format!("killed by signal {signal}"),
            (None, Some(code)) => format!("exit code {code}"),
            (None, None) => "failed".to_owned(),
        };
        let kind = if said.contains("No space left on device") { ErrorKind::NoSpace } else { ErrorKind::Io };
        let message = if said.is_empty() { how } else { format!("{how}: {said}") };
        Err(Error::new(kind, format!("{}: {message}", self.program)))
    }

    fn exceeded(&self, what: &str, limit: String) -> Error {
        Error::new(ErrorKind::Invalid, format!("{}: stopped at its limit of {what} ({limit})", self.program))
    }
}

/// A child that does not outlive its owner.
struct Running {
    child: Child,
    /// Its id may be another process's by now.
    is_reaped: bool,
}

impl Running {
    /// Ends the program, if it has not ended by itself, and all that it has started in its group; says how it ended.
    fn end(&mut self) -> std::io::Result<ExitStatus> {
        if self.is_reaped {
            return self.child.wait();
        }
        // Not waited for yet, so the ids are still its own.
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.kill();
        let status = self.child.wait()?;
        self.is_reaped = true;
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Reads until the pipe ends, or nothing is left in it when the program has ended: a process that it has started, and that
/// got away, could hold the pipe open for ever. Such a one cannot go on writing for ever either.
fn read_all(mut pipe: impl Read + AsFd, has_ended: &AtomicBool, mut each: impl FnMut(&[u8])) {
    let mut buf = [0; 1024];
    let mut left = PIPE_BYTES_MAX;
    while left > 0 {
        let ended = has_ended.load(Ordering::Acquire);
        let waiting = if ended { Timespec::default() } else { PIPE_PAUSE };
        let mut awaited = [PollFd::new(&pipe, PollFlags::IN)];
        match poll(&mut awaited, Some(&waiting)) {
            Ok(0) if ended => return,
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return,
        }
        let Ok(count @ 1..) = pipe.read(&mut buf) else { return };
        each(&buf[..count]);
        if ended {
            left = left.saturating_sub(count);
        }
    }
}

/// Appends, and forgets what is too long ago.
fn keep_last(kept: &mut Vec<u8>, bytes: &[u8]) {
    kept.extend_from_slice(bytes);
    kept.drain(..kept.len().saturating_sub(MESSAGES_BYTES_MAX));
}

/// A program's messages as one line without control characters.
fn one_line(messages: &[u8]) -> String {
    let text = String::from_utf8_lossy(messages);
    let lines = text.split(|c: char| c.is_control()).map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("; ")
}

/// The path of a program, if it is installed.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let folders = path.split(':').chain(USUAL_FOLDERS.split(':')).filter(|folder| folder.starts_with('/'));
    folders.map(|folder| Path::new(folder).join(program)).find(|path| {
        path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::super::progress::NoProgress;
    use super::*;

    const LIMITS: Limits =
        Limits { cpu_seconds: 5, address_bytes: 1 << 30, file_bytes: 1 << 20, wall: Duration::from_secs(20) };

    fn run(script: &str, limits: Limits, progress: &dyn Progress) -> (Result<()>, String) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let dir = Dir::open_path(folder.path()).unwrap();
        let tool = Tool {
            program: "sh",
            package: "dash",
            arguments: vec!["-c".into(), script.into()],
            folder: &dir,
            input: None,
            limits,
            run_as: RunAs::Nobody,
        };
        let mut said = Vec::new();
        let result = tool.run(&Room::unlimited(), progress, |bytes| said.extend_from_slice(bytes));
        (result, String::from_utf8(said).unwrap())
    }

    #[test]
    fn a_program_runs_in_its_folder_with_nothing_to_read() {
        let (result, said) = run("touch here && ls && cat", LIMITS, &NoProgress);
        result.unwrap();
        assert_eq!(said, "here\n");
    }

    /// `qemu-img` used to read images that nobody trusts as root.
    #[test]
    fn it_does_not_run_as_root_and_still_dies_with_us() {
        assert!(unprivileged_user().is_some(), "needs root");
        let script = "id -u; id -G; grep -c 'Cap\\(Prm\\|Eff\\|Amb\\):.*[1-9a-f]' /proc/self/status; exec setpriv --dump";
        let (result, said) = run(script, LIMITS, &NoProgress);
        result.unwrap();
        assert!(said.starts_with("65534\n65534\n0\n"), "{said}");
        assert!(said.contains("no_new_privs: 1"), "{said}");
        assert!(said.to_lowercase().contains("parent death signal: kill"), "{said}");
    }

    #[test]
    fn its_own_words_are_in_the_error_on_one_line() {
        let (result, _) = run("echo one >&2; printf 'two\\033[1m\\n' >&2; exit 3", LIMITS, &NoProgress);
        let text = result.unwrap_err().to_string();
        assert!(text.starts_with("sh: exit code 3: one; two"), "{text}");
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn limits_stop_it() {
        let (result, _) = run("head -c 2000000 /dev/zero > big", LIMITS, &NoProgress);
        assert!(result.is_err());
        let busy = Limits { cpu_seconds: 1, ..LIMITS };
        let (result, _) = run("while :; do :; done", busy, &NoProgress);
        assert!(result.unwrap_err().to_string().contains("processor time"));
        let idle = Limits { wall: Duration::from_millis(100), ..LIMITS };
        let (result, _) = run("sleep 60", idle, &NoProgress);
        assert!(result.unwrap_err().to_string().contains("limit of time"));
        let (result, _) =
            run("sleep 1; head -c 100000 /dev/urandom | tr -dc a >&2; exit 1", LIMITS, &NoProgress);
        assert!(result.unwrap_err().to_string().len() < 2 * MESSAGES_BYTES_MAX);
    }

    /// A child of a program that had been taken over held its pipes, and the import waited for it without end.
    #[test]
    fn what_it_leaves_behind_is_neither_waited_for_nor_spared() {
        let in_its_group = "sleep 1000 & echo $!; echo word >&2; exit 3";
        let got_away = "setsid sh -c 'echo $$; touch away; exec sleep 1000' & \
            until [ -e away ]; do sleep 0.01; done; echo word >&2; exit 3";
        for (script, survives) in [(in_its_group, false), (got_away, true)] {
            let (result, said) = run(script, LIMITS, &NoProgress);
            let pid: i32 = said.trim().parse().unwrap();
            let is_alive = || {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                // The state comes after the name in parentheses; a zombie has ended.
                stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
            };
            assert_eq!(result.unwrap_err().to_string(), "sh: exit code 3: word");
            if survives {
                assert!(is_alive(), "it has a group of its own");
                rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
            }
            while is_alive() {
                std::thread::sleep(PAUSE_MAX);
            }
        }
    }

    #[test]
    fn cancelling_kills_it() {
        struct Cancelled;
        impl Progress for Cancelled {
            fn begin(&self, _: &str, _: Option<u64>) {}
            fn advance(&self, _: u64) {}
            fn finish(&self) {}
            fn cancelled(&self) -> bool {
                true
            }
        }
        let started = Instant::now();
        let (result, _) = run("sleep 60", LIMITS, &Cancelled);
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Interrupted);
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_program_that_is_missing_names_its_package() {
        let folder = tempfile::tempdir().unwrap();
        let dir = Dir::open_path(folder.path()).unwrap();
        let tool = Tool {
            program: "mkfs.never",
            package: "neverprogs",
            arguments: vec![],
            folder: &dir,
            input: None,
            limits: LIMITS,
            run_as: RunAs::Us,
        };
        let error = tool.run(&Room::unlimited(), &NoProgress, |_| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.hint().unwrap().contains("neverprogs"));
    }
}
