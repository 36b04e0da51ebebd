//! Finding the cowdisk command, running it, and telling its outcome in mount(8)'s words.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mount_cowdisk::arguments::Request;
use mount_cowdisk::{Exit, Refusal};

/// Where cowdisk is looked for beside the helper's own folder and PATH: mount(8) may run with a minimal PATH.
const FOLDERS: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Exit code of cowdisk for a wrong request: an option, a name, a path that it does not take.
const COWDISK_USAGE: i32 = 2;

/// Runs `cowdisk mount` and returns once the disks can be read.
pub fn run(request: &Request) -> Result<(), Refusal> {
    let program = find().ok_or_else(|| Refusal::new(Exit::System, "the command cowdisk is not installed"))?;
    let status =
        Command::new(&program).args(arguments(request)).stdin(Stdio::null()).status().map_err(|error| {
            Refusal::new(Exit::System, format!("cannot run {}: {error}", program.display()))
        })?;
    // cowdisk has printed its own message already.
    match status.code() {
        Some(0) => Ok(()),
        Some(COWDISK_USAGE) => Err(Refusal { exit: Exit::Usage, message: None }),
        Some(_) => Err(Refusal { exit: Exit::Failed, message: None }),
        None => Err(Refusal::new(Exit::Failed, format!("{} was killed: {status}", program.display()))),
    }
}

fn arguments(request: &Request) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    if request.verbose {
        arguments.push("-v".into());
    }
    arguments.extend(["--store".into(), request.store.clone(), "mount".into()]);
    if request.fake {
        arguments.push("--check".into());
    }
    if request.sloppy {
        arguments.push("--sloppy".into());
    }
    if !request.options.is_empty() {
        arguments.extend(["-o".into(), request.options.join(OsStr::new(","))]);
    }
    arguments.extend(["--".into(), request.dir.clone()]);
    arguments
}

/// cowdisk beside this very program, else in PATH, else in the usual folders.
fn find() -> Option<PathBuf> {
    let own = std::env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path: Vec<PathBuf> = std::env::split_paths(&path).filter(|folder| folder.is_absolute()).collect();
    own.into_iter()
        .chain(path)
        .chain(FOLDERS.iter().map(PathBuf::from))
        .map(|folder| folder.join("cowdisk"))
        .find(|program| is_program(program))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}
