//! Signals that ask the daemon to end.

use std::thread::JoinHandle;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::error::{Context, Result};

/// Passes signals on as long as it lives.
#[derive(Debug)]
pub struct SignalWatch {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalWatch {
    /// Calls `on_signal`, in a thread of its own, with the name of each SIGTERM, SIGINT and SIGHUP that comes, none of
    /// which ends the process any more.
    ///
    /// # Errors
    /// If the host refuses the handlers or the thread.
    pub fn start(on_signal: impl Fn(&'static str) + Send + 'static) -> Result<Self> {
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context(|| "watch for signals")?;
        let handle = signals.handle();
        let thread = std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for signal in signals.forever() {
                    on_signal(match signal {
                        SIGTERM => "SIGTERM",
                        SIGINT => "SIGINT",
                        _ => "SIGHUP",
                    });
                }
            })
            .context(|| "start a thread")?;
        Ok(Self { handle, thread: Some(thread) })
    }
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported by the panic hook; there is nothing left to save here.
            let _ = thread.join();
        }
    }
}
