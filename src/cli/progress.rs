//! A progress bar on a terminal, and Ctrl-C.
//!
//! While a [`TerminalProgress`] lives, SIGINT, SIGTERM and SIGHUP ask the operation to stop, which then undoes what it
//! has done; a second one ends the process at once, and the store sweeps at its next opening what was left.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::error::{Context as _, Result};
use crate::store::Progress;

/// Shows one bar at a time: bytes done, rate, time remaining. Shows nothing if stderr is no terminal, or if asked so.
pub struct TerminalProgress {
    visible: bool,
    bar: Mutex<Option<ProgressBar>>,
    cancelled: Arc<AtomicBool>,
    signals: Vec<SigId>,
}

impl TerminalProgress {
    /// Takes over the signals.
    ///
    /// # Errors
    /// If the operating system refuses the signal handlers.
    pub fn new(quiet: bool) -> Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let mut progress = Self {
            visible: !quiet && std::io::stderr().is_terminal(),
            bar: Mutex::new(None),
            cancelled: Arc::clone(&cancelled),
            signals: Vec::new(),
        };
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // The order matters: the first signal only sets the flag, the second one finds it set.
            let second = signal_hook::flag::register_conditional_default(signal, Arc::clone(&cancelled));
            progress.signals.push(second.context(|| "watch for Ctrl-C")?);
            let first = signal_hook::flag::register(signal, Arc::clone(&cancelled));
            progress.signals.push(first.context(|| "watch for Ctrl-C")?);
        }
        Ok(progress)
    }
}

impl Drop for TerminalProgress {
    fn drop(&mut self) {
        self.finish();
        for signal in self.signals.drain(..) {
            signal_hook::low_level::unregister(signal);
        }
    }
}

impl Progress for TerminalProgress {
    fn begin(&self, what: &str, total_bytes: Option<u64>) {
        if !self.visible {
            return;
        }
        let (bar, template) = match total_bytes {
            Some(total) => (
                ProgressBar::new(total),
                "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
            ),
            None => (ProgressBar::new_spinner(), "{msg} {binary_bytes}, {binary_bytes_per_sec}"),
        };
        let style = ProgressStyle::with_template(template).expect("the template is a constant");
        bar.set_style(style.progress_chars("=> "));
        bar.set_message(super::output::one_line(what));
        if let Some(old) = self.bar.lock().replace(bar) {
            old.finish_and_clear();
        }
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.bar.lock() {
            bar.inc(bytes);
        }
    }

    fn finish(&self) {
        if let Some(bar) = self.bar.lock().take() {
            bar.finish_and_clear();
        }
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
