//! `mount.cowdisk`: what mount(8) runs for `mount -t cowdisk`.

fn main() {}
