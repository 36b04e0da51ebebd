//! A store in which somebody has put links, fifos, devices and folders where cowdisk's files belong: they are refused by
//! name, nothing waits for them, and what they lead to is not read, written or deleted.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::mounted::needs_mount;
use super::{Place, text};

/// Seconds after which a command counts as hanging.
const PATIENCE: &str = "60";

/// Commands that together read every file of a store; `{}` is the folder that everything is in.
const READING: &[&str] = &[
    "image list",
    "image show img",
    "image verify img",
    "image show booted",
    "flavor show fl",
    "instance list",
    "instance show inst",
    "instance show full",
    "map inst",
    "map full",
    "df",
    "status",
    "check --full",
];

/// Commands that write, make and delete.
const CHANGING: &[&str] = &[
    "instance create new --image img",
    "instance create booted --image booted",
    "image import more {}/img.raw",
    "check --repair",
    "instance remove inst",
    "instance remove full",
    "image remove booted",
    "image remove img",
    "flavor remove fl",
];

/// What stands in the place of a file or a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Impostor {
    /// A symbolic link to what was there, which now lies outside.
    Link,
    Fifo,
    Folder,
    /// `/dev/zero`, under another name: without an end.
    Device,
}

impl Impostor {
    fn words(self) -> &'static str {
        match self {
            Self::Link => "a symbolic link",
            Self::Fifo => "a fifo",
            Self::Folder => "a folder",
            Self::Device => "a device",
        }
    }

    fn put(self, path: &Path, original: &Path) {
        let works = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
        match self {
            Self::Link => symlink(original, path).unwrap(),
            Self::Fifo => works(Command::new("mkfifo").arg(path)),
            Self::Folder => fs::create_dir(path).unwrap(),
            Self::Device => works(Command::new("mknod").arg(path).args(["c", "1", "5"])),
        }
    }
}

/// A store with one file of every kind, from which each case gets a copy.
struct Template {
    place: Place,
    base: String,
    kernel: String,
}

impl Template {
    fn new() -> Self {
        let place = Place::furnished();
        place.works(&[
            "image",
            "import",
            "booted",
            &place.path("img.raw"),
            "--kernel",
            &place.path("kernel"),
        ]);
        let only = |folder: &str| {
            let mut names = fs::read_dir(place.path(folder)).unwrap();
            let name = names.next().unwrap().unwrap().file_name().into_string().unwrap();
            assert!(names.next().is_none(), "one entry in {folder}");
            name
        };
        let (base, kernel) = (only("store/bases"), only("store/boot"));
        let attributes = "{\"uid\":0,\"gid\":0,\"mode\":384,\"xattrs\":{}}\n";
        let files = ["instances/inst/disk.attr".to_owned(), "attrs/image-img.json".to_owned()];
        for file in files.into_iter().chain([format!("attrs/boot-{kernel}.json")]) {
            fs::write(place.path(&format!("store/{file}")), attributes).unwrap();
        }
        Self { place, base, kernel }
    }

    fn folders(&self) -> Vec<String> {
        let folders = ["bases", "boot", "images", "flavors", "instances", "attrs", "tmp", "instances/inst"];
        folders.into_iter().map(str::to_owned).chain([format!("bases/{}", self.base)]).collect()
    }

    fn files(&self) -> Vec<String> {
        let (base, kernel) = (&self.base, &self.kernel);
        let fixed = [
            "cowdisk-store.json",
            "lock",
            "daemon.lock",
            "run.json",
            "images/img.json",
            "flavors/fl.json",
            "instances/inst/instance.json",
            "instances/inst/disk.map",
            "instances/inst/disk.data",
            "instances/inst/disk.attr",
            "instances/full/disk.raw",
            "attrs/image-img.json",
        ];
        // What is kept of a kernel's owner is read by mounts only.
        let named =
            [format!("bases/{base}/base.raw"), format!("bases/{base}/base.json"), format!("boot/{kernel}")];
        fixed.into_iter().map(str::to_owned).chain(named).collect()
    }

    /// A copy of the store in which `file` is an impostor.
    fn case(&self, number: usize, file: &str, impostor: Impostor) -> Case<'_> {
        let folder = PathBuf::from(self.place.path(&format!("case-{number}")));
        let (store, outside) = (folder.join("store"), folder.join("outside"));
        fs::create_dir_all(&outside).unwrap();
        let copied = Command::new("cp").args(["-a", &self.place.path("store")]).arg(&store).status().unwrap();
        assert!(copied.success());
        // It forgives the base its new inode number.
        self.place.works(&["--store", store.to_str().unwrap(), "image", "verify", "img"]);
        let (path, original) = (store.join(file), outside.join("original"));
        if path.exists() {
            fs::rename(&path, &original).unwrap();
        } else {
            File::create(&original).unwrap();
        }
        impostor.put(&path, &original);
        let before = tree(&outside);
        Case { template: self, store, outside, path, before }
    }
}

/// Everything below a folder: mode, time of change, bytes.
fn tree(folder: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let stat = path.symlink_metadata().unwrap();
            let bytes = if stat.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            found.insert(path.clone(), (stat.permissions().mode(), stat.mtime(), stat.mtime_nsec(), bytes));
            if stat.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

struct Case<'a> {
    template: &'a Template,
    store: PathBuf,
    outside: PathBuf,
    path: PathBuf,
    before: BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)>,
}

impl Case<'_> {
    /// Runs a command, which may fail but neither hang nor crash.
    fn run(&self, arguments: &str) -> Output {
        let place = &self.template.place;
        let arguments = arguments.replace("{}", place.path("").trim_end_matches('/'));
        let mut words =
            vec![PATIENCE, env!("CARGO_BIN_EXE_cowdisk"), "--store", self.store.to_str().unwrap()];
        words.extend(arguments.split(' '));
        let output = Command::new("timeout")
            .args(words)
            .env("COWDISK_RUN_DIR", place.run.path())
            .env("LC_ALL", "C")
            .output()
            .unwrap();
        let said = text(&output.stderr);
        let told = format!("cowdisk {arguments} with an impostor at {}: {said}", self.path.display());
        assert!(matches!(output.status.code(), Some(0..=2)), "{:?}: {told}", output.status);
        assert!(!said.contains("panicked"), "{told}");
        assert_eq!(tree(&self.outside), self.before, "what lies outside: {told}");
        output
    }

    /// Runs all commands; whether one of them said, of that very path, what it is.
    fn is_named(&self, impostor: Impostor) -> bool {
        let wanted = format!("{}: {}", self.path.display(), impostor.words());
        // A link could lead each of them out; the rest could only make them wait, which those that read show.
        let changing = if impostor == Impostor::Link { CHANGING } else { &CHANGING[..2] };
        READING.iter().chain(changing).fold(false, |named, arguments| {
            let output = self.run(arguments);
            named | text(&output.stderr).contains(&wanted) | text(&output.stdout).contains(&wanted)
        })
    }
}

fn refused_by_name(impostor: Impostor, places: impl Fn(&Template) -> Vec<String>) {
    let template = Template::new();
    for (number, file) in places(&template).iter().enumerate() {
        let case = template.case(number, file, impostor);
        assert!(case.is_named(impostor), "{impostor:?} at {file}: no command names it");
        fs::remove_dir_all(case.store.parent().unwrap()).unwrap();
    }
}

#[test]
fn a_link_in_the_place_of_a_file_is_refused_by_name_and_leads_nowhere() {
    refused_by_name(Impostor::Link, Template::files);
}

#[test]
fn a_link_in_the_place_of_a_folder_is_refused_by_name_and_leads_nowhere() {
    refused_by_name(Impostor::Link, Template::folders);
}

#[test]
fn a_fifo_in_the_place_of_a_file_is_refused_by_name_and_nothing_waits() {
    refused_by_name(Impostor::Fifo, Template::files);
}

#[test]
fn a_folder_in_the_place_of_a_file_is_refused_by_name() {
    refused_by_name(Impostor::Folder, Template::files);
}

#[test]
fn a_device_in_the_place_of_a_file_is_refused_by_name() {
    let probe = tempfile::tempdir().unwrap();
    let made = Command::new("mknod").arg(probe.path().join("zero")).args(["c", "1", "5"]).output().unwrap();
    assert!(made.status.success(), "needs root and devices: {}", text(&made.stderr));
    refused_by_name(Impostor::Device, Template::files);
}

#[test]
fn what_is_half_made_is_swept_without_following_links() {
    let template = Template::new();
    let case = template.case(0, "tmp/image-0123456789abcdef", Impostor::Link);
    let inner = case.store.join("tmp/instance-0123456789abcdef");
    fs::create_dir(&inner).unwrap();
    symlink(&case.outside, inner.join("disk.data")).unwrap();
    for arguments in READING.iter().chain(CHANGING) {
        case.run(arguments);
    }
    assert!(case.path.symlink_metadata().is_err() && !inner.exists(), "swept");
}

/// What the daemon opens by itself, at each mount or for a file of the mount.
#[test]
fn a_mount_refuses_links_by_name_too() {
    needs_mount();
    let template = Template::new();
    let at_start = ["cowdisk-store.json", "daemon.lock", "run.json", "bases", "instances", "tmp", "attrs"];
    for (number, file) in at_start.into_iter().enumerate() {
        let case = template.case(number, file, Impostor::Link);
        let output = case.run("mount {}/mnt");
        assert_eq!(output.status.code(), Some(1), "{file}");
        let wanted = format!("{}: a symbolic link", case.path.display());
        assert!(text(&output.stderr).contains(&wanted), "{file}: {}", text(&output.stderr));
    }
    let files = [
        ("instances/inst/disk.map", "instances/inst/disk"),
        ("instances/inst/disk.data", "instances/inst/disk"),
        ("instances/full/disk.raw", "instances/full/disk"),
        ("instances/inst", "instances/inst/disk"),
        ("bases/BASE", "images/img"),
        ("bases/BASE/base.raw", "images/img"),
        ("images/img.json", "images/img"),
        ("attrs/image-img.json", "images/img"),
        ("instances/inst/disk.attr", "instances/inst/disk"),
        ("boot/KERNEL", "boot/KERNEL"),
        ("attrs/boot-KERNEL.json", "boot/KERNEL"),
    ];
    for (number, (file, shown)) in files.into_iter().enumerate() {
        let real = |name: &str| name.replace("BASE", &template.base).replace("KERNEL", &template.kernel);
        let case = template.case(100 + number, &real(file), Impostor::Link);
        let log = case.outside.with_file_name("log");
        let mounted = case.run(&format!("mount -o log={} {{}}/mnt", log.display()));
        assert!(mounted.status.success(), "{file}: {}", text(&mounted.stderr));
        let opened = File::open(template.place.path(&format!("mnt/{}", real(shown)))).map(drop);
        let listed = fs::read_dir(template.place.path("mnt/instances")).map(Iterator::count);
        let unmounted = case.run("umount {}/mnt");
        assert!(unmounted.status.success(), "{file}: {}", text(&unmounted.stderr));
        assert!(opened.is_err(), "{file}");
        assert!(listed.unwrap() >= 1, "the rest is served");
        let wanted = format!("{}: a symbolic link", case.path.display());
        let log = fs::read_to_string(&log).unwrap();
        assert!(log.contains(&wanted), "{file}: {log}");
    }
}
