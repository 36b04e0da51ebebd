//! Threads for requests that wait for the host's disk, such as a sync, so that reads and writes do not queue up behind
//! them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;

use crate::error::{Context, Result};

type Task = Box<dyn FnOnce() + Send>;

/// A fixed number of threads that run tasks in the order in which they come. Dropping it waits for all of them.
#[derive(Debug)]
pub struct SlowLane {
    /// `None` only while it is dropped.
    tasks: Option<Sender<Task>>,
    threads: Vec<JoinHandle<()>>,
}

impl SlowLane {
    /// Starts `threads` threads.
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub fn start(threads: usize) -> Result<Self> {
        let (tasks, queue) = channel::<Task>();
        // Guards the receiving end: one thread at a time waits for the next task.
        let queue = Arc::new(Mutex::new(queue));
        let threads = (0..threads)
            .map(|number| {
                let queue = Arc::clone(&queue);
                std::thread::Builder::new().name(format!("slow-{number}")).spawn(move || work(&queue))
            })
            .collect::<std::io::Result<Vec<_>>>()
            .context(|| "start a thread")?;
        Ok(Self { tasks: Some(tasks), threads })
    }

    /// Has a thread run `task`.
    pub fn run(&self, task: impl FnOnce() + Send + 'static) {
        if let Some(tasks) = &self.tasks {
            // Cannot fail: the threads live as long as this sender.
            let _ = tasks.send(Box::new(task));
        }
    }
}

fn work(queue: &Mutex<Receiver<Task>>) {
    loop {
        // A statement of its own, so that the lock is free before the task runs.
        let task = queue.lock().recv();
        match task {
            // A task answers for its own panics; should one get through, the thread must still serve the next.
            Ok(task) => drop(catch_unwind(AssertUnwindSafe(task))),
            Err(_no_more) => return,
        }
    }
}

impl Drop for SlowLane {
    fn drop(&mut self) {
        self.tasks = None;
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

    use super::*;

    #[test]
    fn every_task_has_run_when_the_lane_is_gone() {
        let done = Arc::new(AtomicUsize::new(0));
        let lane = SlowLane::start(3).unwrap();
        for _ in 0..100 {
            let done = Arc::clone(&done);
            lane.run(move || {
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
        lane.run(|| panic!("on purpose"));
        lane.run(move || sender.send(7).unwrap());
        assert_eq!(receiver.recv().unwrap(), 7);
    }

    #[test]
    fn tasks_run_side_by_side() {
        let lane = SlowLane::start(2).unwrap();
        let barrier = Arc::new(std::sync::Barrier::new(3));
        for _ in 0..2 {
            let barrier = Arc::clone(&barrier);
            lane.run(move || {
                barrier.wait();
            });
        }
        barrier.wait();
    }
}
