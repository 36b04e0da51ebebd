//! The first process of the guest: mounts what a host has, serves a store and works on it until its plan is done. Then
//! the machine stops as it is, with nothing synced.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, chown};
use std::path::Path;
use std::process::Command;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::mount::MountFlags;
use rustix::system::RebootCommand;

use crate::aligned::Aligned;
use crate::plan::{self, Disk, Promise, STREAMS, Step, Way};
use crate::sector::{Label, SECTOR_BYTES};
use crate::store_plan::{KEEPER, SHORT_LIVED, StoreStep, store_steps};
use crate::{Doing, FS_BYTES, Result};

/// What the console says once all is done.
pub const DONE: &str = "power-cut: guest done";

const DISK: &str = "/dev/vda";
const STORE: &str = "/srv/store";
const MOUNTPOINT: &str = "/mnt";
const SOURCE: &str = "/run/image.raw";

/// What the kernel's command line asks of the guest.
#[derive(Clone, Debug)]
pub struct Order {
    /// The seed of everything.
    pub seed: u64,
    /// Steps of each stream.
    pub steps: usize,
    /// Rounds of changes of the store.
    pub rounds: u64,
    /// ext4 or xfs.
    pub fs: String,
    /// Whether streams sync, or only say so.
    pub honest: bool,
    /// Whether the kernel serves by itself the disks that are one file of the host.
    pub passthrough: bool,
}

impl Order {
    fn read() -> Result<Self> {
        let line = std::fs::read_to_string("/proc/cmdline").doing("read the command line")?;
        let value = |name: &str| {
            let found = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            found.ok_or(format!("no {name}= in the command line"))
        };
        Ok(Self {
            seed: value("cut.seed")?.parse().doing("cut.seed")?,
            steps: value("cut.steps")?.parse().doing("cut.steps")?,
            rounds: value("cut.rounds")?.parse().doing("cut.rounds")?,
            fs: value("cut.fs")?.to_owned(),
            honest: value("cut.honest")? == "yes",
            passthrough: value("cut.passthrough")? == "yes",
        })
    }
}

/// Does the whole job. Returns only if something failed, with what.
///
/// # Errors
/// Whatever fails: then the recording is worth nothing.
pub fn run() -> Result<()> {
    let order = prepare()?;
    let marks = Marks::open()?;
    let steps = store_steps(order.rounds);
    let served = steps.iter().position(|step| *step == StoreStep::Mount).map_or(0, |index| index + 1);
    for (index, step) in steps[..served].iter().enumerate() {
        change_store(&order, step)?;
        marks.promise(&order, KEEPER, index + 1)?;
    }
    std::thread::scope(|scope| {
        let (order, marks) = (&order, &marks);
        let mut workers: Vec<_> =
            (0..STREAMS.len()).map(|stream| scope.spawn(move || run_stream(order, marks, stream))).collect();
        let steps = &steps;
        workers.push(scope.spawn(move || {
            for (index, step) in steps.iter().enumerate().skip(served) {
                change_store(order, step)?;
                marks.promise(order, KEEPER, index + 1)?;
            }
            Ok(())
        }));
        for worker in workers {
            worker.join().map_err(|_| "a thread panicked".to_owned())??;
        }
        Ok::<_, String>(())
    })?;
    say(DONE);
    stop()
}

/// Says something on the console.
pub fn say(what: &str) {
    println!("{what}");
}

/// Stops the machine as it is.
///
/// # Errors
/// If it goes on.
pub fn stop() -> Result<()> {
    rustix::system::reboot(RebootCommand::Restart).doing("stop the machine")
}

fn prepare() -> Result<Order> {
    let mount = |source: &str, target: &str, fs: &str, options: &std::ffi::CStr| {
        std::fs::create_dir_all(target).doing(format!("make {target}"))?;
        rustix::mount::mount(source, target, fs, MountFlags::empty(), options)
            .doing(format!("mount {target}"))
    };
    mount("dev", "/dev", "devtmpfs", c"")?;
    mount("proc", "/proc", "proc", c"")?;
    mount("sys", "/sys", "sysfs", c"")?;
    mount("run", "/run", "tmpfs", c"")?;
    mount("tmp", "/tmp", "tmpfs", c"")?;
    let order = Order::read()?;
    // Their names begin with their turn.
    let folder = std::fs::read_dir("/modules").doing("read /modules")?;
    let mut modules: Vec<_> = folder.filter_map(|entry| Some(entry.ok()?.path())).collect();
    modules.sort();
    for module in modules {
        let file = File::open(&module).doing(format!("open {}", module.display()))?;
        rustix::system::finit_module(file.as_fd(), c"", 0).doing(format!("load {}", module.display()))?;
    }
    mount(DISK, "/srv", &order.fs, c"discard")?;
    std::fs::create_dir_all(MOUNTPOINT).doing("make the mountpoint")?;
    Ok(order)
}

/// Where promises are written: behind the file system, each worker's in a place of its own.
struct Marks(File);

impl Marks {
    /// Without O_DSYNC: a mark must make nothing durable that is not.
    fn open() -> Result<Self> {
        Ok(Self(open(Path::new(DISK), OFlags::DIRECT)?))
    }

    /// Says that the first `kept` steps of a worker are promised.
    fn promise(&self, order: &Order, worker: usize, kept: usize) -> Result<()> {
        let mut sector = Aligned::new(SECTOR_BYTES);
        mark(order.seed, worker, kept).fill(&mut sector);
        self.0.write_all_at(&sector, mark_place(worker)).doing("write a mark")
    }
}

/// The mark of a worker, a sector like all others.
pub fn mark(seed: u64, worker: usize, kept: usize) -> Label {
    Label { seed, disk: u64::MAX, sector: worker as u64, writer: kept as u64 }
}

fn mark_place(worker: usize) -> u64 {
    FS_BYTES + worker as u64 * 4096
}

fn open(path: &Path, flags: OFlags) -> Result<File> {
    let flags = i32::try_from(flags.bits()).doing("flags")?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .doing(format!("open {}", path.display()))
}

fn run_stream(order: &Order, marks: &Marks, stream: usize) -> Result<()> {
    let path = Path::new(MOUNTPOINT).join(STREAMS[stream].path());
    let direct = open(&path, OFlags::DIRECT)?;
    let buffered = open(&path, OFlags::empty())?;
    let through = open(&path, OFlags::DSYNC)?;
    let by_kernel = STREAMS[stream].by_kernel(order.passthrough);
    check_server(STREAMS[stream], by_kernel)?;
    for (index, step) in plan::steps(order.seed, stream, order.steps).iter().enumerate() {
        let failed = || format!("stream {stream}, step {index}, {step:?}");
        match *step {
            Step::Write(span, way) => {
                let file = match way {
                    Way::Direct => &direct,
                    Way::Through if order.honest => &through,
                    Way::Buffered | Way::Through => &buffered,
                };
                let data = plan::content(order.seed, stream, index, span);
                file.write_all_at(&data, span.start * 512).doing(failed())?;
            }
            Step::Discard(span) => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&buffered, flags, span.start * 512, (span.end - span.start) * 512)
                    .doing(failed())?;
            }
            Step::Sync { .. } if !order.honest => {}
            Step::Sync { data_only: true } => buffered.sync_data().doing(failed())?,
            Step::Sync { data_only: false } => direct.sync_all().doing(failed())?,
        }
        match step.promise(by_kernel) {
            Promise::Nothing => {}
            Promise::Itself => marks.promise(order, plan::single_writes_of(stream), index + 1)?,
            Promise::All => marks.promise(order, stream, index + 1)?,
        }
    }
    Ok(())
}

/// Checks that a disk that is open is served by whom it should be: otherwise something else would be tried.
fn check_server(disk: Disk, by_kernel: bool) -> Result<()> {
    let said = cowdisk(&["status"])?;
    let name = disk.path().trim_start_matches("instances/");
    let line = said.lines().find(|line| line.split_whitespace().next() == Some(name));
    let line = line.ok_or_else(|| format!("{name} is not in use: {said}"))?;
    if line.trim_end().ends_with(" kernel") == by_kernel {
        return Ok(());
    }
    Err(format!("{name} is served by somebody else: {said}"))
}

fn change_store(order: &Order, step: &StoreStep) -> Result<()> {
    let disk = |name: &str| Path::new(MOUNTPOINT).join("instances").join(name).join("disk");
    match step {
        StoreStep::Init => cowdisk(&["init"]).map(drop),
        StoreStep::Import => {
            write_image(order.seed)?;
            cowdisk(&["image", "import", "base", SOURCE, "--format", "raw"]).map(drop)
        }
        StoreStep::Create(name) => {
            let bytes = (plan::DISK_SECTORS * 512).to_string();
            let mut arguments = vec!["instance", "create", name, "--image", "base"];
            match name.as_str() {
                "web" => arguments.extend(["--root-size", &bytes, "--local-size", &bytes]),
                "plain" => arguments.extend(["--root-size", &bytes, "--no-cow"]),
                _ => {}
            }
            cowdisk(&arguments).map(drop)
        }
        StoreStep::Mount => {
            let options = if order.passthrough { "flush=2,passthrough=auto" } else { "flush=2" };
            cowdisk(&["mount", MOUNTPOINT, "-o", options]).map(drop)
        }
        StoreStep::Put(name) => {
            let file = open(&disk(name), OFlags::empty())?;
            file.write_all_at(&put(order.seed, name).bytes(), 0).doing("write a first sector")?;
            file.sync_data().doing("sync a first sector")
        }
        StoreStep::Chown(name, owner) => chown(disk(name), Some(*owner), None).doing("change an owner"),
        StoreStep::Grow(bytes) => open(&disk("web"), OFlags::empty())?.set_len(*bytes).doing("grow a disk"),
        StoreStep::Remove(name) => cowdisk(&["instance", "remove", name]).map(drop),
    }
}

/// The first sector of a short-lived instance's disk.
pub fn put(seed: u64, name: &str) -> Label {
    let writer = name.bytes().fold(0, |number, byte| number << 8 | u64::from(byte));
    Label { seed, disk: SHORT_LIVED, sector: 0, writer }
}

fn write_image(seed: u64) -> Result<()> {
    let file = File::create(SOURCE).doing("make the image")?;
    for sector in 0..plan::IMAGE_SECTORS {
        let bytes = plan::image_sector(seed, sector);
        if bytes != [0; 512] {
            file.write_all_at(&bytes, sector * 512).doing("write the image")?;
        }
    }
    file.set_len(plan::IMAGE_SECTORS * 512).doing("end the image")
}

fn cowdisk(arguments: &[&str]) -> Result<String> {
    let what = format!("cowdisk {}", arguments.join(" "));
    let output =
        Command::new("/bin/cowdisk").args(["--store", STORE]).args(arguments).output().doing(&what)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{what}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
}
