//! The process that serves a mounted store: starting it, its background work, signals, and taking the mount away.

mod options;

pub use options::{FLUSH_SECONDS, FLUSH_SECONDS_MAX, MountOptions, THREADS_MAX};
