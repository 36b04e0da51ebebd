//! A small filesystem in a file, to be filled to its last block.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::FallocateFlags;

use crate::mount::MIB;

/// Bytes of a new filesystem that are left to fill. What else the smallest ones have somebody else's file takes.
const LEFT_BYTES: u64 = 96 * MIB;

/// A kind of host filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
    Btrfs,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// What makes it, and its size: little more than the smallest that each of them takes.
    fn mkfs(self) -> (&'static [&'static str], u64) {
        match self {
            // As on a usual host, a part is kept for root.
            Self::Ext4 => (&["mkfs.ext4", "-q", "-F"], 192 * MIB),
            Self::Xfs => (&["mkfs.xfs", "-q", "-f"], 320 * MIB),
            // Data and metadata share their space, as btrfs does by itself on small disks.
            Self::Btrfs => (&["mkfs.btrfs", "-q", "--mixed"], 160 * MIB),
        }
    }
}

/// A filesystem of a test's own, taken away when dropped.
pub struct SmallHost {
    pub kind: Kind,
    folder: tempfile::TempDir,
}

impl SmallHost {
    pub fn new(kind: Kind) -> Self {
        let (_, bytes) = kind.mkfs();
        let host = Self::of(kind, bytes);
        let spare = File::create(host.spare()).unwrap();
        let bytes = host.available() - LEFT_BYTES;
        rustix::fs::fallocate(spare, FallocateFlags::empty(), 0, bytes).unwrap();
        host
    }

    /// One of `bytes`, which is empty.
    fn of(kind: Kind, bytes: u64) -> Self {
        let host = Self { kind, folder: tempfile::tempdir().unwrap() };
        std::fs::create_dir(host.path()).unwrap();
        let (mkfs, _) = kind.mkfs();
        File::create(host.image()).unwrap().set_len(bytes).unwrap();
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(host.image()));
        mount(&host.image(), &host.path(), kind);
        host
    }

    /// One of 1 GiB, empty, whose disk has no cache of the host under it, as a real one.
    pub fn on_direct_disk(kind: Kind) -> Self {
        let host = Self::of(kind, 1 << 30);
        let device = host.device();
        run(Command::new("losetup").arg("--direct-io=on").arg(&device));
        let mut list = Command::new("losetup");
        list.args(["--noheadings", "--raw", "--output", "DIO"]).arg(&device);
        let said = list.output().unwrap().stdout;
        assert_eq!(said.trim_ascii(), b"1", "{} cannot bypass the cache under it", host.image().display());
        host
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("host")
    }

    fn device(&self) -> String {
        let mut find = Command::new("findmnt");
        find.args(["-n", "-o", "SOURCE", "--mountpoint"]).arg(self.path());
        String::from_utf8(find.output().unwrap().stdout).unwrap().trim().to_owned()
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// Bytes that others than root may take.
    pub fn available(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.path()).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// The reserve that is kept of it by default.
    pub fn reserve(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.path()).unwrap();
        stat.f_blocks * stat.f_frsize / 20
    }

    /// Fills it from outside, as root, until not one block is left; returns the file that does.
    pub fn fill(&self) -> PathBuf {
        let (ballast, path) =
            tempfile::Builder::new().prefix("ballast").tempfile_in(self.path()).unwrap().keep().unwrap();
        let (mut at, mut len) = (0, 64 * MIB);
        while len >= 4096 {
            match rustix::fs::fallocate(&ballast, FallocateFlags::empty(), at, len) {
                Ok(()) => at += len,
                Err(_) => len /= 2,
            }
        }
        path
    }

    /// Has more room: XFS becomes twice as large; on the others a file of somebody else's goes, for growing ext4 needs a
    /// privilege that not every root has.
    pub fn make_room(&self) {
        if self.kind != Kind::Xfs {
            return std::fs::remove_file(self.spare()).unwrap();
        }
        let (_, bytes) = self.kind.mkfs();
        File::options().write(true).open(self.image()).unwrap().set_len(2 * bytes).unwrap();
        run(Command::new("losetup").args(["--set-capacity", &self.device()]));
        run(Command::new("xfs_growfs").arg(self.path()));
    }

    fn spare(&self) -> PathBuf {
        self.path().join("spare")
    }

    /// What a power cut in this moment would leave: a filesystem of its own with what is on the disk, and not what is in
    /// the host's memory only.
    pub fn after_power_cut(&self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let copy = Self { kind: self.kind, folder };
        std::fs::create_dir(copy.path()).unwrap();
        run(Command::new("cp").arg("--sparse=always").arg(self.image()).arg(copy.image()));
        mount(&copy.image(), &copy.path(), self.kind);
        copy
    }
}

fn mount(image: &Path, path: &Path, kind: Kind) {
    let options = if kind == Kind::Xfs { "loop,nouuid" } else { "loop" };
    run(Command::new("mount").args(["-t", kind.name(), "-o", options]).arg(image).arg(path));
}

fn run(command: &mut Command) {
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.output().unwrap_or_else(|error| panic!("{program}: {error}: run scripts/install-deps test"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}: {said}(these tests need root)", output.status);
}

impl Drop for SmallHost {
    fn drop(&mut self) {
        // Its loop device goes with it.
        let _ = rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH);
    }
}
