//! The `cowdisk` command.

fn main() {}
