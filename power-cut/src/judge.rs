//! Holds what a power cut has left against what had been promised.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::cut::Cut;
use crate::guest::put;
use crate::plan::{self, Content, DISK_SECTORS, Disk, STREAMS};
use crate::sector::{SECTOR_BYTES, describe};
use crate::store_plan::{InstanceState, KEEPER, LASTING, StoreState, store_steps};
use crate::{Doing, Result};

/// Sectors of a disk that are named in a report.
const NAMED: usize = 3;

/// What the recording was made with, and where to judge.
#[derive(Clone, Debug)]
pub struct Case {
    /// ext4 or xfs.
    pub fs: String,
    /// Of the guest's plan.
    pub seed: u64,
    /// Steps of each stream.
    pub steps: usize,
    /// Rounds of changes of the store.
    pub rounds: u64,
    /// Whether the guest's kernel served disks by itself.
    pub passthrough: bool,
    /// The program.
    pub cowdisk: PathBuf,
    /// A folder with an empty folder `run` in memory.
    pub work: PathBuf,
}

/// Everything that is wrong with `image`, which is changed; nothing if every promise is kept.
///
/// # Errors
/// If it cannot be judged at all.
pub fn judge(case: &Case, image: &Path, cut: &Cut, promised: &[usize]) -> Result<Vec<String>> {
    let host = Host::mount(case, image)?;
    let mut wrong = Vec::new();
    if let Err(what) = judge_store(case, &host, cut, promised, &mut wrong) {
        wrong.push(what);
    }
    let device = host.unmount()?;
    wrong.extend(fsck(&case.fs, &device)?);
    Ok(wrong)
}

fn judge_store(
    case: &Case,
    host: &Host<'_>,
    cut: &Cut,
    promised: &[usize],
    wrong: &mut Vec<String>,
) -> Result<()> {
    let steps = store_steps(case.rounds);
    let kept = promised[KEEPER];
    if kept == 0 && !host.store.join("cowdisk-store.json").exists() {
        host.cowdisk(&["init"])?;
    }
    if host.offers("check")? {
        host.cowdisk(&["check"])?;
    }
    let mounted = Mounted::mount(host)?;
    let found = mounted.state()?;
    let before = StoreState { made: true, ..StoreState::after(&steps[..kept]) };
    let after = StoreState { made: true, ..StoreState::after(&steps[..steps.len().min(kept + 1)]) };
    if found != before && found != after {
        wrong.push(format!("the store: {found:?}, which is neither {before:?} nor {after:?}"));
    }
    let left = std::fs::read_dir(host.store.join("tmp")).doing("read tmp")?.count();
    if left > 0 {
        wrong.push(format!("{left} half-made objects in tmp"));
    }
    for disk in Disk::ALL {
        if host.mountpoint.join(disk.path()).exists() {
            wrong.extend(judge_disk(case, host, disk, promised)?);
        }
    }
    for name in found.instances.keys().filter(|name| !LASTING.contains(&name.as_str())) {
        wrong.extend(judge_short_lived(case, host, name, found.instances[name].put)?);
    }
    if found.image {
        host.cowdisk(&["image", "verify"])?;
        still_works(host, cut)?;
    }
    mounted.unmount()
}

/// Reads a whole disk and compares each sector with all that it may hold.
fn judge_disk(case: &Case, host: &Host<'_>, disk: Disk, promised: &[usize]) -> Result<Vec<String>> {
    let by_kernel = disk.by_kernel(case.passthrough);
    let allowed = plan::allowed(case.seed, disk, by_kernel, case.steps, promised);
    let mut bytes = Vec::new();
    let path = host.mountpoint.join(disk.path());
    File::open(&path).doing(disk.path())?.read_to_end(&mut bytes).doing(format!("read {}", disk.path()))?;
    let mut wrong = Vec::new();
    let mut count = 0;
    for (sector, (found, index)) in (0..).zip(bytes.chunks(SECTOR_BYTES).zip(0..)) {
        let any = [Content::Zero];
        let contents = allowed.get::<usize>(index).map_or(&any[..], Vec::as_slice);
        if contents.iter().any(|content| content.bytes(case.seed, disk, sector) == found) {
            continue;
        }
        count += 1;
        if count <= NAMED {
            let of = |stream: &usize| (promised[*stream], promised[plan::single_writes_of(*stream)]);
            let streams: Vec<_> = disk.streams().iter().map(of).collect();
            wrong.push(format!(
                "{} sector {sector}: holds {}, not one of {contents:?}; promised {streams:?}",
                disk.path(),
                describe(found)
            ));
        }
    }
    if bytes.len() < usize::try_from(DISK_SECTORS).doing("size")? * SECTOR_BYTES {
        wrong.push(format!("{}: only {} bytes", disk.path(), bytes.len()));
    }
    if count > NAMED {
        wrong.push(format!("{}: {count} wrong sectors in all", disk.path()));
    }
    Ok(wrong)
}

/// The disk of an instance that was made meanwhile: the image, but for its first sector.
fn judge_short_lived(case: &Case, host: &Host<'_>, name: &str, was_put: bool) -> Result<Vec<String>> {
    let file = File::open(host.mountpoint.join("instances").join(name).join("disk")).doing(name)?;
    let mut wrong = Vec::new();
    for sector in [0, 1, 7, 8, 100] {
        let mut found = [0; SECTOR_BYTES];
        file.read_exact_at(&mut found, sector * 512).doing(name)?;
        let is_put = sector == 0 && was_put;
        let expected =
            if is_put { put(case.seed, name).bytes() } else { plan::image_sector(case.seed, sector) };
        if found != expected {
            wrong.push(format!("{name} sector {sector}: holds {}", describe(&found)));
        }
    }
    Ok(wrong)
}

/// A store that came through is also one that goes on.
fn still_works(host: &Host<'_>, cut: &Cut) -> Result<()> {
    host.cowdisk(&["instance", "create", "after", "--image", "base"])?;
    let path = host.mountpoint.join("instances/after/disk");
    let file = File::options().read(true).write(true).open(path).doing("open a new disk")?;
    let (written, mut found) = ([0x5a; 5000], [0; 5000]);
    let place = cut.seed % 4096;
    file.write_all_at(&written, place).and_then(|()| file.sync_all()).doing("write to a new disk")?;
    file.read_exact_at(&mut found, place).doing("read a new disk")?;
    if found == written { Ok(()) } else { Err("a new disk does not hold what is written to it".to_owned()) }
}

/// The host's file system on the image, mounted: its journal is replayed then.
struct Host<'a> {
    case: &'a Case,
    device: PathBuf,
    folder: PathBuf,
    store: PathBuf,
    mountpoint: PathBuf,
    run: PathBuf,
}

impl<'a> Host<'a> {
    fn mount(case: &'a Case, image: &Path) -> Result<Self> {
        let path = |name: &str| {
            let path = case.work.join(name);
            std::fs::create_dir_all(&path).doing(name).map(|()| path)
        };
        let (folder, mountpoint) = (path("host")?, path("mnt")?);
        // As after a boot: nothing is left of the guest's, nor of the last image's.
        let run = case.work.join("run").join(image.file_name().unwrap_or_default());
        std::fs::create_dir(&run).doing("make the run directory")?;
        let image = image.to_str().ok_or("the path of the image")?;
        let said = run_tool("losetup", &["--find", "--show", "--direct-io=on", image])
            .or_else(|_| run_tool("losetup", &["--find", "--show", image]))?;
        let device = PathBuf::from(said.trim());
        let host = Self { case, device, store: folder.join("store"), folder, mountpoint, run };
        rustix::mount::mount(&host.device, &host.folder, case.fs.as_str(), MountFlags::empty(), None)
            .doing(format!("mount the {} of the host", case.fs))?;
        Ok(host)
    }

    /// Leaves the device, which goes when its last user does.
    fn unmount(&self) -> Result<Device> {
        let device = Device(self.device.clone());
        rustix::mount::unmount(&self.folder, UnmountFlags::empty())
            .doing("unmount the host's file system")?;
        Ok(device)
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        Command::new(&self.case.cowdisk)
            .arg("--store")
            .arg(&self.store)
            .args(arguments)
            .env("COWDISK_RUN_DIR", &self.run)
            .env_remove("COWDISK_LOG")
            .output()
            .doing("start cowdisk")
    }

    fn cowdisk(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let says = String::from_utf8_lossy(&output.stderr);
        Err(format!("cowdisk {}: {}: {says}", arguments.join(" "), output.status))
    }

    /// Whether there is such a command.
    fn offers(&self, command: &str) -> Result<bool> {
        Ok(self.run(&[command, "--help"])?.status.success())
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        // Does nothing but after a failure.
        let _ = rustix::mount::unmount(&self.folder, UnmountFlags::DETACH);
        let _ = std::fs::remove_dir_all(&self.run);
    }
}

/// A loop device; detached when dropped.
struct Device(PathBuf);

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).output();
    }
}

/// The store, served; taken away when dropped.
struct Mounted<'a, 'b>(&'a Host<'b>);

impl<'a, 'b> Mounted<'a, 'b> {
    fn mount(host: &'a Host<'b>) -> Result<Self> {
        let mountpoint = host.mountpoint.to_str().ok_or("the path of the mountpoint")?;
        host.cowdisk(&["mount", mountpoint])?;
        Ok(Self(host))
    }

    fn unmount(self) -> Result<()> {
        let mountpoint = self.0.mountpoint.to_str().ok_or("the path of the mountpoint")?;
        self.0.cowdisk(&["umount", mountpoint]).map(drop)
    }

    /// What is to be seen of the store.
    fn state(&self) -> Result<StoreState> {
        let host = self.0;
        let mut instances = BTreeMap::new();
        let mut web_bytes = 0;
        for entry in std::fs::read_dir(host.mountpoint.join("instances")).doing("read instances")? {
            let entry = entry.doing("read instances")?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = entry.path().join("disk");
            let metadata = path.metadata().doing(format!("stat {}", path.display()))?;
            if name == "web" {
                web_bytes = metadata.len();
            }
            let mut first = [0; SECTOR_BYTES];
            File::open(&path)
                .and_then(|file| file.read_exact_at(&mut first, 0))
                .doing(format!("read {name}"))?;
            let put = first == put(host.case.seed, &name).bytes();
            instances.insert(name, InstanceState { owner: metadata.uid(), put });
        }
        let image = host.mountpoint.join("images/base").exists();
        Ok(StoreState { made: true, image, instances, web_bytes })
    }
}

impl Drop for Mounted<'_, '_> {
    fn drop(&mut self) {
        if let Some(mountpoint) = self.0.mountpoint.to_str() {
            let _ = self.0.run(&["umount", mountpoint]);
        }
    }
}

/// What the file system's own check says, if it is not content.
fn fsck(fs: &str, device: &Device) -> Result<Vec<String>> {
    let device = device.0.to_str().ok_or("the path of the device")?;
    let result = match fs {
        "ext4" => run_tool("e2fsck", &["-fn", device]),
        _ => run_tool("xfs_repair", &["-n", device]),
    };
    Ok(result.err().into_iter().collect())
}

fn run_tool(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).env("LC_ALL", "C").output().doing(program)?;
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        return Ok(said.into_owned());
    }
    Err(format!("{program} {}: {}: {said}{complained}", arguments.join(" "), output.status))
}

/// The number of numbers by which marks go: of streams, of who works on the store, and of streams' single writes.
pub const WORKERS: usize = 2 * STREAMS.len() + 1;
