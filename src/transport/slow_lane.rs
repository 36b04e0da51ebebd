//! Threads for requests that wait for the host's disk, such as a sync, so that reads and writes do not queue up behind
//! them, nor the requests of one file behind those of another.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::error::{Context, Result};

type Task = Box<dyn FnOnce() + Send>;

/// A fixed number of threads that run tasks: those of one file in the order in which they come and never on more than
/// half of the threads, and first those of the file with the fewest under way. Dropping it waits for all of them.
#[derive(Debug)]
pub struct SlowLane {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Guards which tasks wait and which run; held for an instant.
    queue: Mutex<Queue>,
    /// A task came or ended, or no more will come.
    changed: Condvar,
    /// No task waits or runs.
    idle: Condvar,
}

struct Queue {
    /// By the inode number of their file, in the order in which they came. As many as the kernel sends requests.
    waiting: VecDeque<(u64, Task)>,
    /// How many tasks of a file run, at least 1.
    running: HashMap<u64, usize>,
    /// Most tasks of one file that run at once.
    file_max: usize,
    /// No more tasks will come.
    ended: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("waiting", &self.waiting.len()).field("running", &self.running).finish()
    }
}

impl Queue {
    /// The task to run next, if one may run now; it counts as running.
    fn take(&mut self) -> Option<(u64, Task)> {
        let running = |file: &u64| self.running.get(file).copied().unwrap_or(0);
        let under_way = || self.waiting.iter().map(|(file, _)| running(file));
        // Mostly the first; only files that are served already are compared with each other.
        let (at, under_way) = match under_way().position(|under_way| under_way == 0) {
            Some(at) => (at, 0),
            None => under_way().enumerate().min_by_key(|(_, under_way)| *under_way)?,
        };
        if under_way >= self.file_max {
            return None;
        }
        let (file, task) = self.waiting.remove(at)?;
        *self.running.entry(file).or_insert(0) += 1;
        Some((file, task))
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// A task of `file` has ended.
    fn end(&mut self, file: u64) {
        match self.running.get_mut(&file) {
            Some(running) if *running > 1 => *running -= 1,
            _ => drop(self.running.remove(&file)),
        }
    }
}

impl SlowLane {
    /// Starts `threads` threads.
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub fn start(threads: usize) -> Result<Self> {
        let queue = Queue {
            waiting: VecDeque::new(),
            running: HashMap::new(),
            file_max: (threads / 2).max(1),
            ended: false,
        };
        let shared =
            Arc::new(Shared { queue: Mutex::new(queue), changed: Condvar::new(), idle: Condvar::new() });
        // Made first, so that those that have started end if one cannot.
        let mut lane = Self { shared, threads: Vec::new() };
        for number in 0..threads {
            let shared = Arc::clone(&lane.shared);
            let thread =
                std::thread::Builder::new().name(format!("slow-{number}")).spawn(move || work(&shared));
            lane.threads.push(thread.context(|| "start a thread")?);
        }
        Ok(lane)
    }

    /// Has a thread run `task`, a request about the file with the inode number `file`.
    pub fn run(&self, file: u64, task: impl FnOnce() + Send + 'static) {
        self.shared.queue.lock().waiting.push_back((file, Box::new(task)));
        self.shared.changed.notify_one();
    }

    /// Waits until no task waits or runs, at most until `until`, and says whether that is so.
    pub fn finish(&self, until: Option<Instant>) -> bool {
        let mut queue = self.shared.queue.lock();
        while !queue.is_idle() {
            match until {
                None => self.shared.idle.wait(&mut queue),
                Some(until) if self.shared.idle.wait_until(&mut queue, until).timed_out() => break,
                Some(_) => {}
            }
        }
        queue.is_idle()
    }
}

fn work(shared: &Shared) {
    let mut queue = shared.queue.lock();
    loop {
        if let Some((file, task)) = queue.take() {
            parking_lot::MutexGuard::unlocked(&mut queue, || {
                // A task answers for its own panics; should one get through, the thread must still serve the next.
                drop(catch_unwind(AssertUnwindSafe(task)));
            });
            queue.end(file);
            if queue.is_idle() {
                shared.idle.notify_all();
            }
            // This thread takes the next one itself; at the end the others must see that nothing is left.
            if queue.ended {
                shared.changed.notify_all();
            }
        } else if queue.ended && queue.waiting.is_empty() {
            return;
        } else {
            shared.changed.wait(&mut queue);
        }
    }
}

impl Drop for SlowLane {
    fn drop(&mut self) {
        self.shared.queue.lock().ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread for slow requests panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn every_task_has_run_when_the_lane_is_gone() {
        let done = Arc::new(AtomicUsize::new(0));
        let lane = SlowLane::start(3).unwrap();
        for number in 0..100 {
            let done = Arc::clone(&done);
            lane.run(number % 3, move || {
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        drop(lane);
        assert_eq!(done.load(Ordering::SeqCst), 100);
    }

    #[test]
    fn a_panic_in_a_task_does_not_cost_the_thread() {
        let lane = SlowLane::start(1).unwrap();
        let (sender, receiver) = channel();
        lane.run(1, || panic!("on purpose"));
        lane.run(1, move || sender.send(7).unwrap());
        assert_eq!(receiver.recv().unwrap(), 7);
    }

    #[test]
    fn tasks_run_side_by_side() {
        let lane = SlowLane::start(2).unwrap();
        let barrier = Arc::new(std::sync::Barrier::new(3));
        for file in 0..2 {
            let barrier = Arc::clone(&barrier);
            lane.run(file, move || {
                barrier.wait();
            });
        }
        barrier.wait();
    }

    #[test]
    fn it_has_finished_when_nothing_waits_or_runs() {
        let lane = SlowLane::start(1).unwrap();
        assert!(lane.finish(None));
        let (go, gate) = channel::<()>();
        lane.run(1, move || gate.recv().unwrap());
        lane.run(2, || {});
        assert!(!lane.finish(Some(Instant::now() + std::time::Duration::from_millis(20))));
        go.send(()).unwrap();
        assert!(lane.finish(None));
        assert!(lane.shared.queue.lock().is_idle());
    }

    /// Sixteen durable writes of one guest took all threads, and every other guest's sync waited for them.
    #[test]
    fn tasks_of_one_file_leave_half_of_the_threads_to_others() {
        let lane = SlowLane::start(4).unwrap();
        let (begun, beginnings) = channel();
        let gate = Arc::new(std::sync::Barrier::new(3));
        for _ in 0..4 {
            let (begun, gate) = (begun.clone(), Arc::clone(&gate));
            lane.run(1, move || {
                begun.send(()).unwrap();
                gate.wait();
            });
        }
        beginnings.recv().unwrap();
        beginnings.recv().unwrap();
        let (done, other) = channel();
        lane.run(2, move || done.send(()).unwrap());
        other.recv().unwrap();
        assert!(beginnings.try_recv().is_err(), "a third task of the first file began");
        gate.wait();
        beginnings.recv().unwrap();
        beginnings.recv().unwrap();
        gate.wait();
    }
}
