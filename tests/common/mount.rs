//! A store, mounted by a daemon in a process of its own, for tests of what the mount does.
//!
//! The daemon is this very test program, started again to run the one test `daemon_process`, which every test file that
//! uses this module has to have. So it needs no command line, and is a process that can be killed.

#![allow(dead_code, reason = "each test file uses another part")]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cowdisk::daemon::{self, MountOptions};
use cowdisk::store::{DiskName, ImportRequest, InstanceSpec, NoProgress, ObjectName, SourceFormat, Store};
use cowdisk::{Error, Result};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// Bytes of the image that every test store has.
pub const IMAGE_BYTES: u64 = 4 * MIB;

/// The image of every test store.
pub const IMAGE: &str = "base";

/// How long anything may take on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// Options that keep the background quiet, so that only what a test does is durable.
pub const QUIET: &str = "flush=0";

pub struct TestMount {
    pub store: Store,
    folder: tempfile::TempDir,
    run: tempfile::TempDir,
    options: String,
    /// Runs the daemon; none for the one who runs the tests.
    user: Option<u32>,
    /// Whether the daemon runs a copy of this program, which a test replaces.
    copied: bool,
    daemon: Option<Child>,
}

/// The byte at `offset` of the test image: never zero but in its third MiB, which is a hole.
pub fn image_byte(offset: u64) -> u8 {
    if (2 * MIB..3 * MIB).contains(&offset) { 0 } else { u8::try_from(offset / 7 % 251).unwrap() + 1 }
}

pub fn image_bytes(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(image_byte).collect()
}

pub fn name(text: &str) -> ObjectName {
    text.parse().unwrap()
}

impl TestMount {
    /// A mounted store with the image `base` and the instance `web` of it.
    pub fn new() -> Self {
        Self::with_options(QUIET)
    }

    pub fn with_options(options: &str) -> Self {
        let mut mount = Self::unmounted(options, &std::env::temp_dir());
        mount.mount().unwrap();
        mount
    }

    /// The same, not mounted, with its store below `parent`.
    pub fn unmounted(options: &str, parent: &Path) -> Self {
        Self::unmounted_with(options, parent, |_| {})
    }

    /// The same, with a store that a program of before has made: disks over nothing are overlays, too.
    pub fn unmounted_of_version_1(options: &str, parent: &Path) -> Self {
        Self::unmounted_with(options, parent, |store| {
            let path = store.join("cowdisk-store.json");
            let record = std::fs::read_to_string(&path).unwrap();
            let old = record.replace("\"version\": 2", "\"version\": 1");
            assert_ne!(old, record);
            File::create(path).unwrap().write_all(old.as_bytes()).unwrap();
        })
    }

    fn unmounted_with(options: &str, parent: &Path, change: impl FnOnce(&Path)) -> Self {
        assert!(
            Path::new("/dev/fuse").exists(),
            "/dev/fuse is missing: load the kernel's module (modprobe fuse) or start the container with it"
        );
        let folder = tempfile::tempdir_in(parent).unwrap();
        let run = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::create_dir(folder.path().join("mnt")).unwrap();
        let path = folder.path().join("store");
        Store::init(&path).unwrap();
        change(&path);
        let store = Store::open(&path).unwrap().with_run_dir(run.path());
        let source = folder.path().join("image.raw");
        let mut file = File::create(&source).unwrap();
        file.write_all(&image_bytes(0, 2 * MIB)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &image_bytes(3 * MIB, MIB), 3 * MIB).unwrap();
        let request = ImportRequest {
            source: source.clone(),
            format: Some(SourceFormat::Raw),
            ..ImportRequest::default()
        };
        store.import_image(&name(IMAGE), &request, &NoProgress).unwrap();
        std::fs::remove_file(source).unwrap();
        let mount =
            Self { store, folder, run, options: options.to_owned(), user: None, copied: false, daemon: None };
        mount.create("web");
        mount
    }

    /// Creates an instance with a root of 8 MiB over the image and a blank local disk of 16 MiB.
    pub fn create(&self, instance: &str) {
        let spec = InstanceSpec {
            root_size: Some(8 * MIB),
            local_size: Some(16 * MIB),
            ..InstanceSpec::of(name(IMAGE))
        };
        self.store.create_instance(&name(instance), &spec, &NoProgress).unwrap();
    }

    /// Gives everything to another user, who will run the daemon.
    pub fn give_to(&mut self, user: u32) {
        self.user = Some(user);
        let owner = format!("{user}:{user}");
        let status =
            Command::new("chown").arg("-R").arg(owner).arg(self.folder.path()).arg(self.run.path()).status();
        assert!(status.unwrap().success(), "giving files away needs root");
    }

    /// Has the daemon run a copy of this program, see [`TestMount::install`].
    pub fn copied(mut self) -> Self {
        self.copied = true;
        self.install("");
        self
    }

    /// Where that copy is.
    pub fn copy_path(&self) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join("program")
    }

    /// Puts another copy into the place of that one, as a package would: the same, but that it finds `note` at its end.
    pub fn install(&self, note: &str) {
        let fresh = self.folder.path().join("program.fresh");
        std::fs::copy(std::env::current_exe().unwrap(), &fresh).unwrap();
        OpenOptions::new().append(true).open(&fresh).unwrap().write_all(note.as_bytes()).unwrap();
        std::fs::set_permissions(&fresh, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        rustix::fs::rename(fresh, self.copy_path()).unwrap();
    }

    /// Runs a shell's command as the user who runs the daemon.
    pub fn shell(&self, script: &str) -> std::process::Output {
        let user = self.user.unwrap_or(0);
        Command::new("sh").arg("-c").arg(script).uid(user).gid(user).current_dir("/").output().unwrap()
    }

    /// Mounts the store.
    pub fn mount(&mut self) -> std::result::Result<(), String> {
        let daemon = self.start(&self.mountpoint(), &self.options.clone())?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Starts a daemon and waits until it serves, or returns what it said.
    pub fn start(&self, mountpoint: &Path, options: &str) -> std::result::Result<Child, String> {
        let ready = self.run.path().join("ready");
        let said = self.run.path().join("said");
        for path in [&ready, &said] {
            let _ = std::fs::remove_file(path);
        }
        let mut command = Command::new(self.program());
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        let mut child = command
            .args(["daemon_process", "--exact", "--nocapture", "--test-threads=1"])
            .env("TEST_STORE", self.store.dir())
            .env("TEST_MOUNTPOINT", mountpoint)
            .env("TEST_OPTIONS", options)
            .env("TEST_READY", &ready)
            .env("TEST_SAID", &said)
            .env("TEST_LOG", self.log_path())
            .env("COWDISK_RUN_DIR", self.run.path())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let end = Instant::now() + LONG;
        while Instant::now() < end {
            if ready.exists() {
                return Ok(child);
            }
            if let Some(status) = child.try_wait().unwrap() {
                return Err(std::fs::read_to_string(said).unwrap_or_else(|_| status.to_string()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = child.kill();
        let _ = child.wait();
        panic!("the daemon did not serve within {LONG:?}");
    }

    /// This program, where the daemon's user can run it.
    fn program(&self) -> PathBuf {
        if self.user.is_some() {
            self.install("");
        } else if !self.copied {
            return std::env::current_exe().unwrap();
        }
        self.copy_path()
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join("mnt")
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.mountpoint().join(path)
    }

    /// The root disk of the instance that every test store has.
    pub fn disk(&self) -> PathBuf {
        self.path("instances/web/disk")
    }

    /// Its local disk.
    pub fn local(&self) -> PathBuf {
        self.path("instances/web/disk.local")
    }

    /// The store's own file behind a disk's data.
    pub fn host_file(&self, file: &str) -> PathBuf {
        self.store.dir().join("instances/web").join(file)
    }

    pub fn log_path(&self) -> PathBuf {
        self.run.path().join("log")
    }

    /// The daemon's log, with a line for each request of the kernel.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("mounted").id()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Whether the daemon ends by itself within `patience`, and how.
    pub fn ends_within(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let end = Instant::now() + patience;
        while Instant::now() < end {
            if let Some(status) = self.daemon.as_mut().expect("mounted").try_wait().unwrap() {
                self.daemon = None;
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// Takes the mount away as `cowdisk umount` does.
    pub fn unmount(&mut self) -> Result<()> {
        daemon::unmount(&self.mountpoint())?;
        let status = self.ends_within(LONG).expect("the daemon ends with its mount");
        assert!(status.success(), "the daemon ended with {status}:\n{}", self.log());
        Ok(())
    }

    pub fn remount(&mut self) {
        self.unmount().unwrap();
        self.mount().unwrap();
    }

    /// `kill -9` of all processes of the daemon; the dead mount stays.
    pub fn kill(&mut self) {
        let workers = children_of(self.pid());
        let mut daemon = self.daemon.take().expect("mounted");
        // First of all, for it would have another one take over.
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        workers.into_iter().for_each(kill_and_wait);
    }

    /// `kill -9` of the process that keeps the mount alone.
    pub fn kill_keeper(&mut self) {
        let mut daemon = self.daemon.take().expect("mounted");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// The process that answers requests for the one that keeps the mount; waits until there is one.
    pub fn worker(&self) -> u32 {
        self.wait_until("another process", || !children_of(self.pid()).is_empty());
        children_of(self.pid())[0]
    }

    /// Waits until something becomes true.
    pub fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + LONG;
        while !condition() {
            assert!(Instant::now() < end, "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until nobody has a disk open, so that its files are what the daemon left.
    pub fn wait_until_closed(&self, disk: DiskName) {
        self.wait_until("disk closed", || {
            self.store.open_disk(&name("web"), disk).and_then(|disk| disk.close()).is_ok()
        });
    }
}

/// The processes that another one has started.
pub fn children_of(pid: u32) -> Vec<u32> {
    let parent = |stat: &str| stat.rsplit(") ").next()?.split(' ').nth(1)?.parse::<u32>().ok();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter(|number| {
            let stat = std::fs::read_to_string(format!("/proc/{number}/stat"));
            stat.is_ok_and(|stat| parent(&stat) == Some(pid))
        })
        .collect()
}

/// `kill -9`; returns when the process, which need not be ours, has ended.
pub fn kill_and_wait(pid: u32) {
    use rustix::process::{Pid, PidfdFlags, Signal};
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return };
    let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
    let mut awaited = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut awaited, None)).unwrap();
}

impl Drop for TestMount {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            if daemon::unmount(&self.mountpoint()).is_err() {
                let workers = children_of(daemon.id());
                let _ = daemon.kill();
                workers.into_iter().for_each(kill_and_wait);
            }
            let _ = daemon.wait();
        }
        let dead = rustix::mount::UnmountFlags::DETACH;
        while rustix::mount::unmount(self.mountpoint(), dead).is_ok() {}
        if std::thread::panicking()
            && let Ok(log) = std::fs::read_to_string(self.log_path())
        {
            let lines: Vec<_> = log.lines().collect();
            eprintln!("the end of the daemon's log:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
}

/// The body of the test `daemon_process`: serves if it was started by [`TestMount::start`], else does nothing.
pub fn daemon_process() {
    daemon_process_that(|_line| {});
}

/// The same, which does something with each line of its log.
pub fn daemon_process_that(does: fn(&str)) {
    let Some(store) = std::env::var_os("TEST_STORE") else { return };
    let path = |variable: &str| PathBuf::from(std::env::var_os(variable).expect("set by TestMount::start"));
    let log = OpenOptions::new().create(true).append(true).open(path("TEST_LOG")).unwrap();
    log::set_boxed_logger(Box::new(FileLogger(log, does))).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    let served = serve(Path::new(&store), &path("TEST_MOUNTPOINT"), &path("TEST_READY"));
    if let Err(error) = served {
        let mut said = File::create(path("TEST_SAID")).unwrap();
        write!(said, "{error}\n{}", error.hint().unwrap_or_default()).unwrap();
        std::process::exit(1);
    }
    std::process::exit(0);
}

fn serve(store: &Path, mountpoint: &Path, ready: &Path) -> Result<()> {
    let options = MountOptions::parse(&std::env::var("TEST_OPTIONS").unwrap())?;
    daemon::run(store, mountpoint, &options, || {
        File::create(ready).unwrap();
    })
}

struct FileLogger(File, fn(&str));

impl log::Log for FileLogger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        !metadata.target().starts_with("fuser::session")
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format!("{} {}: {}\n", record.level(), record.target(), record.args());
        let _ = (&self.0).write_all(line.as_bytes());
        (self.1)(&line);
    }

    fn flush(&self) {}
}

pub fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

pub fn open_with(path: &Path, flags: i32) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}

/// What a file holds at `offset`.
pub fn read_at(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut seen = vec![0; len];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut seen, offset).unwrap();
    seen
}

/// The errno of a result that should be an error.
pub fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().expect("an error of the system")
}

pub fn errno_of<T: std::fmt::Debug>(result: rustix::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error()
}

/// A buffer for direct I/O.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start, len }
    }

    pub fn filled(len: usize, byte: u8) -> Self {
        let mut buffer = Self::new(len);
        buffer.fill(byte);
        buffer
    }
}

impl std::ops::Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// A failed step of a test of tools, with what the tool said.
pub fn check_output(what: &str, output: &std::process::Output) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{what}: {}\n{stdout}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    stdout
}

pub fn text_of(error: &Error) -> String {
    format!("{error}\n{}", error.hint().unwrap_or_default())
}
