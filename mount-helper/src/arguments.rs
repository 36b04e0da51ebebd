//! The arguments that mount(8) gives to a helper: `SPEC DIR [-s] [-f] [-n] [-v] [-o OPTS] [-t TYPE]`, in any order.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use crate::{Exit, Refusal};

const HELP: &str = "\
usage: mount.cowdisk STORE DIR [-s] [-f] [-n] [-v] [-o OPTION,...] [-t TYPE]
mount(8) runs this for: mount -t cowdisk STORE DIR
  -f  check the store, the directory and the options, and mount nothing
  -s  tolerate unknown options
  -v  say more
  -n  ignored";

/// Options that say something to mount(8), to init or to an administrator, and nothing to cowdisk; or that ask for what
/// holds anyway: a mount of cowdisk is always nosuid, nodev and noexec.
const NOT_FOR_US: [&[u8]; 21] = [
    b"rw",
    b"defaults",
    b"auto",
    b"noauto",
    b"user",
    b"nouser",
    b"users",
    b"owner",
    b"group",
    b"nofail",
    b"_netdev",
    b"nosuid",
    b"nodev",
    b"noexec",
    b"async",
    b"noatime",
    b"nodiratime",
    b"relatime",
    b"silent",
    b"loud",
    b"",
];

/// Beginnings of options that likewise are not for cowdisk.
const NOT_FOR_US_PREFIXES: [&[u8]; 5] = [b"x-", b"X-", b"comment=", b"user=", b"uhelper="];

/// What the arguments ask for.
#[derive(Debug)]
pub enum Task {
    /// Print a text.
    Tell(&'static str),
    /// Mount, or check whether that would go.
    Mount(Request),
}

/// One request to mount.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// The store's directory.
    pub store: OsString,
    /// The mountpoint.
    pub dir: OsString,
    /// Options for cowdisk, without those that are not for it.
    pub options: Vec<OsString>,
    /// Whether cowdisk shall ignore options that it does not know.
    pub sloppy: bool,
    /// Whether to check only.
    pub fake: bool,
    /// Whether cowdisk shall say more.
    pub verbose: bool,
}

/// Reads the arguments, without the program's name.
pub fn parse(arguments: Vec<OsString>) -> Result<Task, Refusal> {
    let usage = |message: String| Refusal::new(Exit::Usage, message);
    let mut operands = Vec::new();
    let mut options = Vec::new();
    let (mut sloppy, mut fake, mut verbose) = (false, false, false);
    let mut arguments = arguments.into_iter();
    let mut only_operands = false;
    while let Some(argument) = arguments.next() {
        let bytes = argument.as_bytes();
        if only_operands || bytes.len() < 2 || bytes[0] != b'-' {
            operands.push(argument);
            continue;
        }
        match bytes {
            b"--" => only_operands = true,
            b"--help" => return Ok(Task::Tell(HELP)),
            b"--version" => return Ok(Task::Tell(concat!("mount.cowdisk ", env!("CARGO_PKG_VERSION")))),
            _ if bytes.starts_with(b"--") => {
                return Err(usage(format!("unknown argument {}", argument.display())));
            }
            _ => {}
        }
        let mut letters = &bytes[1..];
        while let Some((&letter, rest)) = letters.split_first().filter(|_| !only_operands) {
            letters = rest;
            match letter {
                b's' => sloppy = true,
                b'f' => fake = true,
                b'v' => verbose = true,
                b'n' => {}
                b'h' => return Ok(Task::Tell(HELP)),
                b'V' => return Ok(Task::Tell(concat!("mount.cowdisk ", env!("CARGO_PKG_VERSION")))),
                b'o' | b't' => {
                    let value = if rest.is_empty() {
                        arguments
                            .next()
                            .ok_or_else(|| usage(format!("-{} needs a value", char::from(letter))))?
                    } else {
                        OsString::from_vec(rest.to_vec())
                    };
                    if letter == b'o' {
                        split_options(&value, &mut options);
                    }
                    letters = &[];
                }
                _ => return Err(usage(format!("unknown argument -{}", char::from(letter)))),
            }
        }
    }
    let [store, dir] = <[OsString; 2]>::try_from(operands)
        .map_err(|_| usage("give a store and a directory: mount.cowdisk STORE DIR".into()))?;
    if store.is_empty() || dir.is_empty() {
        return Err(usage("the names of the store and of the directory may not be empty".into()));
    }
    if options.iter().any(|option| option.as_bytes() == b"remount") {
        return Err(Refusal::new(
            Exit::Failed,
            format!("{}: cannot be remounted: unmount it, then mount it with the new options", dir.display()),
        ));
    }
    options.retain(|option| is_for_cowdisk(option));
    Ok(Task::Mount(Request { store, dir, options, sloppy, fake, verbose }))
}

/// Splits `list` at its commas, but not within double quotes, as mount(8) does.
fn split_options(list: &OsStr, options: &mut Vec<OsString>) {
    let mut quoted = false;
    let parts = list.as_bytes().split(|&byte| {
        quoted ^= byte == b'"';
        byte == b',' && !quoted
    });
    options.extend(parts.map(|part| OsString::from_vec(part.to_vec())));
}

fn is_for_cowdisk(option: &OsStr) -> bool {
    let option = option.as_bytes();
    !NOT_FOR_US.contains(&option) && !NOT_FOR_US_PREFIXES.iter().any(|prefix| option.starts_with(prefix))
}
