//! The host's processors: the kernel's FUSE has a queue for each that there may ever be.

use std::collections::BTreeSet;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::error::{Context, Error, ErrorKind, Result};

/// Those that there may ever be.
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// Those on which anything can run now.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// How many there may ever be.
///
/// # Errors
/// If the host does not say it as we know it.
pub fn count_possible() -> Result<u16> {
    let count = read(POSSIBLE)?.len();
    u16::try_from(count).map_err(|_| Error::new(ErrorKind::Unsupported, format!("{count} processors")))
}

/// Those on which anything can run now.
///
/// # Errors
/// As of [`count_possible`].
pub fn online() -> Result<BTreeSet<u16>> {
    read(ONLINE)
}

fn read(path: &str) -> Result<BTreeSet<u16>> {
    let text = std::fs::read_to_string(path).context(|| format!("read {path}"))?;
    parse(&text).ok_or_else(|| Error::new(ErrorKind::Unsupported, format!("{path}: not understood")))
}

/// Reads a list of ranges (`0-3,8`).
fn parse(text: &str) -> Option<BTreeSet<u16>> {
    let mut found = BTreeSet::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
        if first > last || last == u16::MAX {
            return None;
        }
        found.extend(first..=last);
    }
    Some(found)
}

/// Keeps the calling thread on these.
///
/// # Errors
/// If none of them is there, or ours.
pub fn stay_on(processors: &[u16]) -> std::io::Result<()> {
    let mut set = CpuSet::new();
    for processor in processors {
        if usize::from(*processor) < CpuSet::MAX_CPU {
            set.set((*processor).into());
        }
    }
    Ok(sched_setaffinity(None, &set)?)
}

/// Whether threads of this process may run on each of these.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if not.
pub fn require(processors: &BTreeSet<u16>) -> Result<()> {
    let try_all = || processors.iter().find(|processor| stay_on(&[**processor]).is_err());
    // A thread of its own, which has nothing to do afterwards.
    let refused = std::thread::scope(|scope| scope.spawn(try_all).join());
    match refused {
        Ok(None) => Ok(()),
        Ok(Some(processor)) => {
            let message = format!("requests come from processor {processor}, which this process may not use");
            Err(Error::new(ErrorKind::Unsupported, message)
                .with_hint("let the daemon use all processors (cpuset)"))
        }
        Err(_) => Err(Error::new(ErrorKind::Io, "a thread panicked, which is a bug in cowdisk")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_understood_or_refused() {
        for (text, found) in
            [("0\n", vec![0]), ("0-3\n", vec![0, 1, 2, 3]), ("0-1,8-9,12", vec![0, 1, 8, 9, 12])]
        {
            assert_eq!(parse(text), Some(found.into_iter().collect()));
        }
        for text in ["", "x", "3-1", "0-65535", "1-"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn this_host_has_processors_and_no_other_can_be_used() {
        let online = online().unwrap();
        assert!(!online.is_empty() && online.len() <= usize::from(count_possible().unwrap()));
        let error = require(&[1023].into()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        // The thread that asks stays where it was.
        assert!(std::thread::available_parallelism().unwrap().get() <= online.len());
    }
}
