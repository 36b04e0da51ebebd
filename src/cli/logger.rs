//! Log records to stderr, one a line, as `cowdisk: warn: …`.

use std::io::Write as _;

use log::{LevelFilter, Log, Metadata, Record};

use super::output::one_line;
use crate::daemon::LOG_VARIABLE;
use crate::error::{Error, ErrorKind, Result};

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("cowdisk") || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            let message = one_line(&record.args().to_string());
            // One write a record: records of several threads and processes do not mix.
            let line = format!("cowdisk: {level}: {message}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Starts logging: warnings and errors, more with each `-v`, errors only with `-q`; without either what `COWDISK_LOG`
/// says (`off`, `error`, `warn`, `info`, `debug`, `trace`).
///
/// # Errors
/// [`ErrorKind::Invalid`] if `COWDISK_LOG` is none of them.
pub fn start(verbose: u8, quiet: bool) -> Result<()> {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::Error,
        (false, 0) => level_of_environment()?,
        (false, 1) => LevelFilter::Info,
        (false, 2) => LevelFilter::Debug,
        (false, _) => LevelFilter::Trace,
    };
    // Fails only if there is a logger already.
    let _ = log::set_logger(&Logger);
    log::set_max_level(level);
    Ok(())
}

fn level_of_environment() -> Result<LevelFilter> {
    match std::env::var_os(LOG_VARIABLE) {
        None => Ok(LevelFilter::Warn),
        Some(text) if text.is_empty() => Ok(LevelFilter::Warn),
        Some(text) => text.to_str().and_then(|text| text.parse().ok()).ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                format!("{LOG_VARIABLE}={}: must be off, error, warn, info, debug or trace", text.display()),
            )
        }),
    }
}
