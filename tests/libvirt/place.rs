//! A mounted store with the Debian guest's image, where libvirt's QEMU can reach it, and the guests that run from it.

use std::fs::{File, Permissions};
use std::io::{Read, Seek};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The image that every store has.
pub const IMAGE: &str = "debian";

/// What is under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_cowdisk");

/// How long a guest may take for anything, on a busy machine whose processor is emulated.
const PATIENCE: Duration = Duration::from_secs(240);

const PAUSE: Duration = Duration::from_millis(100);

const URI: &str = "qemu:///system";

/// Bytes of the filesystem of [`Place::on_small_host`]: sparse, and enough for the image twice.
const SMALL_HOST_BYTES: u64 = 2 << 30;

/// What is kept of it.
const SMALL_HOST_RESERVE: u64 = 16 << 20;

/// Ends what a test has started and removes what it has made, once its standard input ends: with the test, however that
/// ends. Its process group is its own, so that what kills a test does not kill it, and it keeps libvirt there meanwhile.
const JANITOR: &str = r#"
cat >/dev/null
domains=$1 folder=$2 run=$3 cowdisk=$4 result=0
for domain in $(virsh -q list --name | grep "^$domains-"); do
    virsh -q destroy "$domain" || result=1
done
if grep -qF " $folder/mnt " /proc/self/mountinfo; then
    timeout 60 "$cowdisk" umount "$folder/mnt" || { result=1; umount --lazy "$folder/mnt"; }
fi
if grep -qF " $folder/store " /proc/self/mountinfo; then
    umount "$folder/store" || { result=1; umount --lazy "$folder/store"; }
fi
rm -rf --one-file-system "$folder" "$run" || result=1
exit $result
"#;

/// A mounted store of a test's own.
pub struct Place {
    /// The folder that holds all of it, which QEMU's user may pass through.
    folder: PathBuf,
    run: PathBuf,
    /// What the names of the test's instances, and so of its domains, begin with.
    prefix: String,
    /// Where `scripts/guest-image` has put root.raw, vmlinuz and initrd.
    source: PathBuf,
    /// What it is mounted with.
    options: &'static str,
    janitor: Option<Child>,
    janitor_says: File,
}

impl Place {
    /// A mounted store that holds the image and three flavors: `ext4` of 1 GiB, `xfs` of 1 GiB, and `swap` of 64 MiB.
    pub fn new() -> Self {
        Self::with_options("rw")
    }

    /// The same, each time mounted with these options.
    pub fn with_options(options: &'static str) -> Self {
        let mut place = Self::unfurnished();
        place.options = options;
        place.furnish();
        place.mount();
        place
    }

    /// The same, with its store on an ext4 of its own that has `left` bytes left to fill, with what is made by `furnish`
    /// besides the rest already in it.
    pub fn on_small_host(left: u64, furnish: impl FnOnce(&Self)) -> Self {
        let place = Self::unfurnished();
        let (device, store) = (place.folder.join("host"), place.store());
        File::create(&device).unwrap().set_len(SMALL_HOST_BYTES).unwrap();
        std::fs::create_dir(&store).unwrap();
        tool("mkfs.ext4", &["-q", "-F", device.to_str().unwrap()]);
        tool("mount", &["-t", "ext4", "-o", "loop", device.to_str().unwrap(), store.to_str().unwrap()]);
        place.furnish();
        place.mount_with(&format!("flush=1,reserve={SMALL_HOST_RESERVE}"));
        furnish(&place);
        let stat = rustix::fs::statvfs(&store).unwrap();
        let ballast = File::create(store.join("lost+found/ballast")).unwrap();
        let bytes = stat.f_bavail * stat.f_frsize - SMALL_HOST_RESERVE - left;
        rustix::fs::fallocate(ballast, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
        place
    }

    /// A folder, and whoever cleans it up.
    fn unfurnished() -> Self {
        require();
        let source = guest_image();
        let folder = tempfile::Builder::new().prefix("cowdisk-test-").tempdir_in("/var/tmp").unwrap().keep();
        std::fs::set_permissions(&folder, Permissions::from_mode(0o711)).unwrap();
        let run = tempfile::Builder::new().prefix("cowdisk-test-").tempdir_in("/dev/shm").unwrap().keep();
        let unique = folder.file_name().unwrap().to_str().unwrap().replace(".tmp", "");
        let janitor_says = tempfile::tempfile().unwrap();
        let janitor = Command::new(script("libvirtd"))
            .args(["run", "sh", "-c", JANITOR, "janitor", &unique])
            .args([&folder, &run, Path::new(PROGRAM)])
            .env("LIBVIRT_DEFAULT_URI", URI)
            .env_remove("VIRSH_DEFAULT_CONNECT_URI")
            .stdin(Stdio::piped())
            .stdout(janitor_says.try_clone().unwrap())
            .stderr(janitor_says.try_clone().unwrap())
            .process_group(0)
            .spawn()
            .unwrap();
        let place =
            Self { folder, run, prefix: unique, source, options: "rw", janitor: Some(janitor), janitor_says };
        std::fs::create_dir(place.mountpoint()).unwrap();
        place
    }

    /// Makes the store, its image and its flavors.
    fn furnish(&self) {
        self.cowdisk(&["init"]);
        self.import();
        self.cowdisk(&["flavor", "add", "ext4", "--local-size", "1G"]);
        self.cowdisk(&["flavor", "add", "xfs", "--local-size", "1G", "--fs", "xfs"]);
    }

    fn store(&self) -> PathBuf {
        self.folder.join("store")
    }

    fn import(&self) {
        let [root, kernel, ramdisk] =
            ["root.raw", "vmlinuz", "initrd"].map(|name| self.source.join(name).display().to_string());
        self.cowdisk(&["image", "import", IMAGE, &root, "--kernel", &kernel, "--ramdisk", &ramdisk]);
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.folder.join("mnt")
    }

    pub fn mount(&self) {
        self.mount_with(self.options);
    }

    fn mount_with(&self, options: &str) {
        // By a copy that only root may change: no other is run by an upgrade.
        let program = self.folder.join("cowdisk");
        if !program.exists() {
            std::fs::copy(PROGRAM, &program).unwrap();
            std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        }
        let mountpoint = self.mountpoint();
        let arguments = ["mount", "-o", options, mountpoint.to_str().unwrap()];
        succeeded("cowdisk mount", &self.command_of(&program, &arguments).output().unwrap());
    }

    /// What the daemon tells of itself.
    pub fn status(&self) -> cowdisk::daemon::Status {
        let end = Instant::now() + PATIENCE;
        loop {
            match cowdisk::daemon::status(&self.opened_store()) {
                Ok(status) => return status.expect("mounted"),
                // Between two processes there is nobody to answer.
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until something becomes true.
    pub fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < end, "waited in vain: {what}; disks: {:?}", self.status().disks);
            std::thread::sleep(PAUSE);
        }
    }

    /// The disks in use that the kernel serves by itself, `INSTANCE/DISK`, in order.
    pub fn served_by_kernel(&self) -> Vec<String> {
        let disks = self.status().disks.into_iter().filter(|disk| disk.served_by == "kernel");
        let prefix = self.name("");
        let mut names: Vec<_> = disks.map(|disk| disk.name.replacen(&prefix, "", 1)).collect();
        names.sort();
        names
    }

    /// `kill -9` of the process that answers; the one that keeps the mount has another take over.
    pub fn kill_worker(&self) {
        kill(self.status().pid);
    }

    /// Has another process take over in order, as `cowdisk upgrade` does; again if the host's disk is too busy.
    pub fn upgrade(&self) {
        let end = Instant::now() + PATIENCE;
        while let Err(error) = cowdisk::daemon::upgrade(&self.opened_store()) {
            assert!(error.kind() == cowdisk::ErrorKind::Busy && Instant::now() < end, "{error}");
        }
    }

    /// Unmounts, which takes every disk to the host's disk, and mounts anew.
    pub fn remount(&self) {
        self.cowdisk(&["umount", self.mountpoint().to_str().unwrap()]);
        self.mount();
    }

    fn opened_store(&self) -> cowdisk::store::Store {
        cowdisk::store::Store::open(&self.folder.join("store")).unwrap()
    }

    /// `kill -9` of all processes of the daemon; the dead mount stays.
    pub fn kill_daemon(&self) {
        let store = self.opened_store();
        let worker = self.status().pid;
        let end = Instant::now() + PATIENCE;
        // The one that keeps the mount first, for it would have another one take over.
        let mut next = store.serving().unwrap();
        while let Some(serving) = next {
            kill(serving.pid);
            kill(worker);
            assert!(Instant::now() < end, "the daemon goes on after it was killed");
            std::thread::sleep(PAUSE);
            next = store.serving().unwrap();
        }
    }

    /// The name of an instance, and of its domain, that nobody else has.
    pub fn name(&self, instance: &str) -> String {
        format!("{}-{instance}", self.prefix)
    }

    /// Makes an instance with the rest of the arguments of `cowdisk instance create`.
    pub fn create(&self, instance: &str, arguments: &[&str]) {
        let name = self.name(instance);
        self.cowdisk(&[&["instance", "create", &name, "--image", IMAGE], arguments].concat());
    }

    /// A disk in the mount.
    pub fn disk(&self, instance: &str, disk: &str) -> PathBuf {
        self.mountpoint().join("instances").join(self.name(instance)).join(disk)
    }

    /// A file of another kind, where QEMU can reach it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What was imported.
    pub fn source_image(&self) -> PathBuf {
        self.source.join("root.raw")
    }

    /// The store's own file with what was imported.
    pub fn base_image(&self) -> PathBuf {
        let bases = std::fs::read_dir(self.store().join("bases")).unwrap();
        let files = bases.map(|base| base.unwrap().path().join("base.raw"));
        let size = self.source_image().metadata().unwrap().size();
        let same = |file: &Path| {
            file.metadata().unwrap().size() == size && file_starts_alike(file, &self.source_image())
        };
        files.into_iter().find(|file| same(file)).expect("the base is in the store")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.command_of(Path::new(PROGRAM), arguments)
    }

    fn command_of(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("COWDISK_STORE", self.store())
            .env("COWDISK_RUN_DIR", &self.run)
            .env("LIBVIRT_DEFAULT_URI", URI)
            .env_remove("VIRSH_DEFAULT_CONNECT_URI")
            .env_remove("COWDISK_LOG")
            .env("LC_ALL", "C")
            .stdin(Stdio::null());
        command
    }

    /// Runs `cowdisk`, which must succeed, and returns its output.
    pub fn cowdisk(&self, arguments: &[&str]) -> String {
        succeeded(&format!("cowdisk {}", arguments.join(" ")), &self.command(arguments).output().unwrap())
    }

    /// Runs `cowdisk`, which must fail with exit code 1, and returns what it says.
    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        let says = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "cowdisk {}: {says}", arguments.join(" "));
        says
    }

    /// Starts an instance as a guest that does `job`, in the words of `scripts/guest/cowdisk-guest`.
    pub fn start(&self, instance: &str, job: &str) -> Guest<'_> {
        let domain = self.name(instance);
        let console = self.folder.join(format!("{instance}.console"));
        // Without no_timer_check a kernel may give up on the timer of an emulated machine that gets too little time.
        let append = format!(
            "console=ttyS0 quiet no_timer_check panic=-1 root=/dev/vda ro init=/usr/local/sbin/cowdisk-guest cowdisk.job={job}"
        );
        let log = console.to_str().unwrap();
        self.cowdisk(&["libvirt", "start", &domain, "--append", &append, "--console-log", log]);
        Guest { place: self, domain, console }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(mut janitor) = self.janitor.take() else { return };
        drop(janitor.stdin.take());
        let status = janitor.wait();
        if std::thread::panicking() || status.as_ref().is_ok_and(|status| status.success()) {
            return;
        }
        let mut says = String::new();
        let _ = self.janitor_says.rewind().and_then(|()| self.janitor_says.read_to_string(&mut says));
        panic!("cannot clean up: {status:?}: {says}");
    }
}

/// A running domain.
pub struct Guest<'a> {
    place: &'a Place,
    pub domain: String,
    console: PathBuf,
}

impl Guest<'_> {
    /// Everything that the guest has said.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.console).unwrap()).into_owned()
    }

    /// Waits until the guest has said a line with `words`, and returns that line from there.
    pub fn wait_for(&self, words: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let runs = self.is_running();
            let console = self.console();
            if let Some(line) = line_with(&console, words) {
                return line;
            }
            let trouble =
                ["cowdisk-guest: job failed", "Kernel panic"].iter().find(|&&words| console.contains(words));
            assert!(trouble.is_none() && runs, "{}: no {words:?} in its console:\n{console}", self.domain);
            assert!(Instant::now() < end, "{}: waited in vain for {words:?}:\n{console}", self.domain);
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until the guest has done its job and its domain is gone; returns the console.
    pub fn wait_until_off(self) -> String {
        self.wait_for("cowdisk-guest: job done");
        let end = Instant::now() + PATIENCE;
        while self.is_running() {
            assert!(Instant::now() < end, "{}: does not power off:\n{}", self.domain, self.console());
            std::thread::sleep(PAUSE);
        }
        self.console()
    }

    /// Waits until QEMU has stopped the guest because its disks fail; returns the console.
    pub fn wait_until_stopped(&self) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let state = virsh(&["domstate", &self.domain]);
            assert!(state.status.success(), "{}: gone:\n{}", self.domain, self.console());
            if state.stdout.starts_with(b"paused") {
                return self.console();
            }
            assert!(Instant::now() < end, "{}: goes on without its disks:\n{}", self.domain, self.console());
            std::thread::sleep(PAUSE);
        }
    }

    /// Asks the guest to power off, and waits.
    pub fn stop(self) -> String {
        self.place.cowdisk(&["libvirt", "stop", &self.domain, "--timeout", "240"]);
        assert!(!self.is_running());
        self.console()
    }

    /// Ends it without asking.
    pub fn pull_the_plug(self) {
        self.place.cowdisk(&["libvirt", "stop", &self.domain, "--force"]);
        assert!(!self.is_running());
    }

    /// Waits until QEMU has stopped the guest because a disk failed.
    pub fn wait_until_paused(&self) {
        let end = Instant::now() + PATIENCE;
        let state = || String::from_utf8(virsh(&["domstate", "--reason", &self.domain]).stdout).unwrap();
        while state().trim() != "paused (I/O error)" {
            assert!(
                Instant::now() < end,
                "{}: never paused but {}:\n{}",
                self.domain,
                state(),
                self.console()
            );
            std::thread::sleep(PAUSE);
        }
    }

    /// Has it go on; what failed is tried again.
    pub fn resume(&self) {
        succeeded("virsh resume", &virsh(&["resume", &self.domain]));
    }

    fn is_running(&self) -> bool {
        virsh(&["domstate", &self.domain]).status.success()
    }
}

fn line_with(console: &str, words: &str) -> Option<String> {
    // The last line may not be whole yet.
    let whole = &console[..console.rfind('\n')? + 1];
    whole.lines().find_map(|line| line.find(words).map(|at| line[at..].trim_end().to_owned()))
}

pub fn virsh(arguments: &[&str]) -> Output {
    Command::new("virsh").args(["-q", "-c", URI]).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// Runs a tool, which must succeed, and returns its output.
pub fn tool(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}: run scripts/install-deps test"));
    succeeded(&format!("{program} {}", arguments.join(" ")), &output);
    output.stdout
}

fn succeeded(what: &str, output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{stdout}{stderr}", output.status);
    stdout
}

fn file_starts_alike(one: &Path, other: &Path) -> bool {
    let start = |path: &Path| {
        let mut bytes = vec![0; 1 << 16];
        File::open(path).unwrap().read_exact(&mut bytes).unwrap();
        bytes
    };
    start(one) == start(other)
}

/// What these tests cannot do without. They never skip: a green run is to mean that guests ran.
fn require() {
    const HOW: &str = "scripts/test --test libvirt sees to all that these tests need";
    assert!(rustix::process::geteuid().is_root(), "guests are run as root: {HOW}");
    assert!(
        Path::new("/dev/fuse").exists(),
        "there is no /dev/fuse: load the kernel's module fuse, or give it to the container"
    );
    let version = Command::new("virsh").args(["-q", "-c", URI, "uri"]).stdin(Stdio::null()).output();
    match version {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("no libvirt answers: {}{HOW}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => panic!("virsh: {error}: {HOW}"),
    }
}

/// The folder with the Debian guest; made now if it is not there.
fn guest_image() -> PathBuf {
    let said = tool(script("guest-image").to_str().unwrap(), &[]);
    PathBuf::from(String::from_utf8(said).unwrap().trim_end())
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}

/// `kill -9`, if it is still there.
fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}
