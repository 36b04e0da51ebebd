//! What a daemon does without being asked: flushing disks that were written, housekeeping of their maps, and watching the
//! space of the host's filesystem.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::error::{Context, Error, Result};
use crate::fs::Fs;
use crate::store::{HighWater, WaterMove};

/// How often there is something to do.
const TICK: Duration = Duration::from_secs(1);

/// The background threads; dropping it stops them.
#[derive(Debug)]
pub(super) struct Background {
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Stop {
    /// Guards whether to stop; held for an instant, and while waiting for the next tick.
    wanted: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    /// Does `work` at each tick until it is wanted to stop.
    fn each_tick(&self, mut work: impl FnMut()) {
        let mut wanted = self.wanted.lock();
        while !*wanted {
            self.changed.wait_for(&mut wanted, TICK);
            if *wanted {
                return;
            }
            MutexGuard::unlocked(&mut wanted, &mut work);
        }
    }
}

impl Background {
    /// Starts them; disks that were written are flushed every `flush_seconds`, or never for 0.
    pub(super) fn start(fs: Arc<Fs>, flush_seconds: u32) -> Result<Self> {
        let mut background = Self { stop: Arc::new(Stop::default()), threads: Vec::new() };
        let watched = Arc::clone(&fs);
        let mut high_water = HighWater::default();
        // A thread of its own: a flush may take long where the host's disk is slow, and then it is filled no slower.
        background.spawn("space", move |stop| stop.each_tick(|| watch_space(&watched, &mut high_water)))?;
        let mut ticks = 0;
        background.spawn("background", move |stop| {
            fs.take_up();
            stop.each_tick(|| {
                ticks += 1;
                if flush_seconds > 0 && ticks >= flush_seconds {
                    ticks = 0;
                    report("flush in the background", &fs.flush_dirty());
                }
                report("housekeeping", &fs.checkpoint_due());
            });
        })?;
        Ok(background)
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce(&Stop) + Send + 'static) -> Result<()> {
        let stop = Arc::clone(&self.stop);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&stop));
        self.threads.push(thread.context(|| "start a thread")?);
        Ok(())
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
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a background thread panicked");
            }
        }
    }
}
