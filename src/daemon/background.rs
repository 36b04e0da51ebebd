//! What a daemon does without being asked: flushing disks that were written, housekeeping of their maps, and watching the
//! space of the host's filesystem.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
    /// Guards what is wanted and who works; held for an instant, and while waiting for the next tick.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stop: bool,
    pause: bool,
    /// Threads that work.
    working: usize,
}

impl Stop {
    /// Does `work`, unless it is wanted to stop or to pause.
    fn work(&self, state: &mut MutexGuard<'_, State>, work: impl FnOnce()) {
        if state.stop || state.pause {
            return;
        }
        state.working += 1;
        MutexGuard::unlocked(state, || {
            let _working = Working(self);
            work();
        });
    }

    /// Does `first`, and `work` at each tick until it is wanted to stop.
    fn each_tick(&self, first: impl FnOnce(), mut work: impl FnMut()) {
        let mut state = self.state.lock();
        // A pause may come before it.
        let mut first = Some(first);
        loop {
            self.work(&mut state, || first.take().map_or_else(&mut work, |first| first()));
            if state.stop {
                return;
            }
            // Woken by whoever wants it to stop, and by the others' pauses, which do no harm.
            let tick = Instant::now() + TICK;
            while !state.stop && !self.changed.wait_until(&mut state, tick).timed_out() {}
        }
    }
}

/// A thread that works, until this is dropped, by a panic perhaps.
struct Working<'a>(&'a Stop);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.state.lock().working -= 1;
        self.0.changed.notify_all();
    }
}

impl Background {
    /// Starts them; disks that were written are flushed every `flush_seconds`, or never for 0.
    pub(super) fn start(fs: Arc<Fs>, flush_seconds: u32) -> Result<Self> {
        let mut background = Self { stop: Arc::new(Stop::default()), threads: Vec::new() };
        let watched = Arc::clone(&fs);
        let mut high_water = HighWater::default();
        // A thread of its own: a flush may take long where the host's disk is slow, and then it is filled no slower.
        background
            .spawn("space", move |stop| stop.each_tick(|| {}, || watch_space(&watched, &mut high_water)))?;
        let mut ticks = 0;
        background.spawn("background", move |stop| {
            let work = || {
                ticks += 1;
                if flush_seconds > 0 && ticks >= flush_seconds {
                    ticks = 0;
                    report("flush in the background", &fs.flush_dirty());
                }
                report("housekeeping", &fs.checkpoint_due());
            };
            stop.each_tick(|| fs.take_up(), work);
        })?;
        Ok(background)
    }

    /// Has them begin nothing more, and waits at most `patience` until they do nothing. Says whether that is so; if not,
    /// they go on.
    pub(super) fn pause(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut state = self.stop.state.lock();
        state.pause = true;
        while state.working > 0 && !self.stop.changed.wait_until(&mut state, until).timed_out() {}
        state.pause = state.working == 0;
        state.pause
    }

    /// Has them go on after a pause.
    pub(super) fn resume(&self) {
        self.stop.state.lock().pause = false;
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
        self.stop.state.lock().stop = true;
        self.stop.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a background thread panicked");
            }
        }
    }
}
