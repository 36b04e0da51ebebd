//! Looking into disks: which bytes come from where.

pub mod map;
