//! What a daemon does without being asked: flushing disks that were written, housekeeping of their maps, and watching the
//! space of the host's filesystem.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::error::{Context, Error, Result};
use crate::fs::Fs;
use crate::store::{HighWater, WaterMove};

/// How often housekeeping looks whether there is something to do.
const TICK: Duration = Duration::from_secs(1);

/// The background thread; dropping it stops it.
#[derive(Debug)]
pub(super) struct Background {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Stop {
    /// Guards whether to stop; held for an instant, and while waiting for the next tick.
    wanted: Mutex<bool>,
    changed: Condvar,
}

impl Background {
    /// Starts it; disks that were written are flushed every `flush_seconds`, or never for 0.
    pub(super) fn start(fs: Arc<Fs>, flush_seconds: u32) -> Result<Self> {
        let stop = Arc::new(Stop::default());
        let watched = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("background".to_owned())
            .spawn(move || work(&fs, &watched, flush_seconds))
            .context(|| "start a thread")?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

fn work(fs: &Fs, stop: &Stop, flush_seconds: u32) {
    let mut ticks = 0u32;
    let mut high_water = HighWater::default();
    let mut wanted = stop.wanted.lock();
    while !*wanted {
        stop.changed.wait_for(&mut wanted, TICK);
        if *wanted {
            return;
        }
        parking_lot::MutexGuard::unlocked(&mut wanted, || {
            ticks += 1;
            if flush_seconds > 0 && ticks >= flush_seconds {
                ticks = 0;
                report("flush in the background", &fs.flush_dirty());
            }
            report("housekeeping", &fs.checkpoint_due());
            watch_space(fs, &mut high_water);
        });
    }
}

/// Looks how full the host's filesystem is and logs when it is nearly full, and when no longer.
fn watch_space(fs: &Fs, high_water: &mut HighWater) {
    match fs.look_at_space() {
        Ok(now) => match high_water.note(&now) {
            Some(WaterMove::Rose) => log::warn!("{}", now.sentence()),
            Some(WaterMove::Fell) => log::info!("no longer nearly full: {}", now.sentence()),
            None => {}
        },
        Err(error) => log::warn!("{error}"),
    }
}

/// Logs what may cost data.
pub(super) fn report(what: &str, errors: &[Error]) {
    for error in errors {
        log::error!("{what}: {error}");
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        *self.stop.wanted.lock() = true;
        self.stop.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the background thread panicked");
        }
    }
}
