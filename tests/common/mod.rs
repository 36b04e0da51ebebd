//! What several test programs share. Each uses a part of it.
#![allow(dead_code, clippy::cast_possible_truncation)]

pub mod boot;
pub mod host;
pub mod layer;
pub mod live;
pub mod record;
pub mod sim;
pub mod tree;
