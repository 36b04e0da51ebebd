//! Reboots that need none: a mount namespace of this thread's own in which `/proc/sys/kernel/random/boot_id` is a file
//! of ours. Needs root.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use rustix::thread::UnshareFlags;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The boots of this thread, and of those that it starts from now on.
#[derive(Debug)]
pub struct Boots {
    file: File,
    number: u64,
    _folder: tempfile::TempDir,
}

impl Boots {
    /// Gives this thread a namespace of its own, in its first boot.
    pub fn new() -> Self {
        // SAFETY: only the mounts become this thread's own, and with them its working directory and umask; no other
        // thread's descriptors or memory are touched.
        #[allow(unsafe_code)]
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
            .expect("a mount namespace of its own: this test must run as root");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .expect("mounts that nobody else sees");
        keep_few_mounts();
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let path = folder.path().join("boot_id");
        let file = File::create_new(&path).expect("a file for the boot's id");
        let mut boots = Self { file, number: 0, _folder: folder };
        boots.next();
        mount_bind(&path, BOOT_ID).expect("our boot's id in place of the kernel's");
        boots
    }

    /// The host boots again.
    pub fn next(&mut self) {
        self.number += 1;
        let id = format!("{:08x}-0000-4000-8000-{:012x}\n", std::process::id(), self.number);
        self.file.write_all_at(id.as_bytes(), 0).expect("write the boot's id");
    }
}

/// Detaches all that this test does not need. A copy of what another test mounted would keep its daemon or its device
/// busy after it has unmounted it.
fn keep_few_mounts() {
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").expect("the mounts");
    for line in mounts.lines() {
        let mountpoint = line.split(' ').nth(4).expect("a mountpoint");
        if !["/", "/proc", "/dev", "/dev/shm"].contains(&mountpoint) {
            // It may lie in another one that is gone already.
            let _ = unmount(Path::new(mountpoint), UnmountFlags::DETACH);
        }
    }
}
