//! The command line: exact messages and exit codes, and that a bad input leaves the store as it was.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "a test fails by panicking, writes scratch files and says what it skips"
)]

#[path = "cli/bad_inputs.rs"]
mod bad_inputs;
#[path = "cli/checking.rs"]
mod checking;
#[path = "cli/confined.rs"]
mod confined;
#[path = "cli/doctor.rs"]
mod doctor;
#[path = "cli/hostile_guest.rs"]
mod hostile_guest;
#[path = "cli/hostile_store.rs"]
mod hostile_store;
#[path = "cli/mounted.rs"]
mod mounted;
#[path = "cli/scrubbing.rs"]
mod scrubbing;
#[path = "cli/space.rs"]
mod space;
#[path = "cli/status.rs"]
mod status;
#[path = "cli/upgrading.rs"]
mod upgrading;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use bad_inputs::{BAD_INPUTS, Bad};
use cowdisk::store::NAME_RULE;

/// A folder with a store in it, and a run directory in memory.
struct Place {
    folder: tempfile::TempDir,
    run: tempfile::TempDir,
}

impl Place {
    /// With an empty store.
    fn new() -> Self {
        let memory = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
        let place = Self { folder: tempfile::tempdir().unwrap(), run: tempfile::tempdir_in(memory).unwrap() };
        place.works(&["init"]);
        place
    }

    /// With a store that has something of everything, and files to import.
    fn furnished() -> Self {
        let place = Self::new();
        place.make_files();
        place.works(&["image", "import", "img", &place.path("img.raw")]);
        place.works(&["flavor", "add", "fl", "--local-size", "4M", "--fs", "none"]);
        place.works(&["instance", "create", "inst", "--image", "img", "--flavor", "fl"]);
        place.works(&["instance", "create", "full", "--image", "img", "--no-cow"]);
        place.works(&["instance", "show", "inst"]);
        place.works(&["map", "inst"]);
        place
    }

    fn make_files(&self) {
        let image = File::create(self.path("img.raw")).unwrap();
        image.set_len(1 << 20).unwrap();
        image.write_all_at(&[0x5a; 65536], 131_072).unwrap();
        File::create(self.path("empty")).unwrap();
        fs::write(self.path("kernel"), "a kernel").unwrap();
        fs::write(self.path("text"), "just text").unwrap();
        for folder in ["mnt", "nonempty/inside", "not-a-store", "newer", "broken"] {
            fs::create_dir_all(self.path(folder)).unwrap();
        }
        fs::write(self.path("qcow2-head"), b"QFI\xfb\0\0\0\x03").unwrap();
        fs::write(self.path("qcow2-backed"), qcow2_with_backing_file("/etc/passwd")).unwrap();
        assert!(Command::new("mkfifo").arg(self.path("fifo")).status().unwrap().success());
        // A store of a version to come, and one with a damaged superblock.
        let superblock = fs::read_to_string(self.path("store/cowdisk-store.json")).unwrap();
        let newer =
            superblock.replace("\"version\": 2", "\"version\": 3").replace("\"version\":2", "\"version\":3");
        assert_ne!(newer, superblock);
        fs::write(self.path("newer/cowdisk-store.json"), newer).unwrap();
        fs::write(self.path("broken/cowdisk-store.json"), "{\"magic\":").unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cowdisk"));
        command
            .args(arguments)
            .env("COWDISK_STORE", self.path("store"))
            .env("COWDISK_RUN_DIR", self.run.path())
            .env_remove("COWDISK_LOG")
            .env("LC_ALL", "C")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs what must succeed and returns its stdout.
    fn works(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "cowdisk {arguments:?}: {}", text(&output.stderr));
        let said = text(&output.stderr);
        // The file system that the tests run on may itself be nearly full.
        let said: Vec<_> = said.lines().filter(|line| !line.starts_with(space::NEARLY_FULL)).collect();
        assert!(said.is_empty(), "cowdisk {arguments:?}: nothing on stderr, but {said:?}");
        text(&output.stdout)
    }

    /// Runs what prints JSON.
    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.works(arguments)).unwrap()
    }

    /// Every file and folder of the store: kind and mode, and its bytes.
    fn snapshot(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let mut found = BTreeMap::new();
        collect(Path::new(&self.path("store")), &mut found);
        found
    }
}

fn collect(folder: &Path, found: &mut BTreeMap<PathBuf, (u32, Vec<u8>)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        let bytes = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        found.insert(path.clone(), (metadata.permissions().mode(), bytes));
        if metadata.is_dir() {
            collect(&path, found);
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The header of a qcow2 of version 3 that names a backing file.
fn qcow2_with_backing_file(name: &str) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 18];
    let mut put = |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(8, &[0, 0, 0, 0, 0, 0, 2, 0]);
    put(16, &[0, 0, 0, u8::try_from(name.len()).unwrap()]);
    put(20, &[0, 0, 0, 16]);
    put(24, &[0, 0, 0, 0, 0, 16, 0, 0]);
    put(36, &[0, 0, 0, 1]);
    put(40, &[0, 0, 0, 0, 0, 3, 0, 0]);
    put(48, &[0, 0, 0, 0, 0, 1, 0, 0]);
    put(56, &[0, 0, 0, 1]);
    put(96, &[0, 0, 0, 4]);
    put(100, &[0, 0, 0, 104]);
    put(512, name.as_bytes());
    bytes
}

#[test]
fn a_bad_input_gets_one_clear_line_and_leaves_the_store_as_it_was() {
    let place = Place::furnished();
    let before = place.snapshot();
    let folder = place.folder.path().to_str().unwrap();
    let long = "a".repeat(64);
    let fill = |text: &str| text.replace("{}", folder).replace("LONG", &long).replace("RULE", NAME_RULE);
    let mut wrong = String::new();
    for Bad { arguments, code, stderr } in BAD_INPUTS {
        let words: Vec<String> =
            arguments.split(' ').filter(|word| !word.is_empty()).map(|word| fill(unquote(word))).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let started = Instant::now();
        let output = place.run(&words);
        assert!(started.elapsed() < Duration::from_secs(10), "{words:?} took {:?}", started.elapsed());
        let found = text(&output.stderr);
        if output.status.code() != Some(*code) || found != fill(stderr) + "\n" || !output.stdout.is_empty() {
            let found = found.replace(folder, "{}").replace(&long, "LONG").replace(NAME_RULE, "RULE");
            let code = output.status.code().unwrap_or(-1);
            wrong += &format!("    bad({arguments:?}, {code}, {:?}),\n", found.trim_end_matches('\n'));
        }
        assert!(found.starts_with("cowdisk: "), "{words:?}: {found:?}");
        assert!(found.lines().count() <= 2, "{words:?}: more than a line and a hint: {found:?}");
        assert!(!found.contains(|c: char| c.is_control() && c != '\n'), "{words:?}: {found:?}");
        assert_eq!(place.snapshot(), before, "{words:?} changed the store");
    }
    assert!(BAD_INPUTS.len() >= 45);
    assert!(wrong.is_empty(), "these rows are not as the table says, but:\n{wrong}");
}

/// Words that the table cannot write as they are.
fn unquote(word: &str) -> &str {
    match word {
        "EMPTY" => "",
        "SPACE" => "a b",
        "CONTROL" => "a\nb\u{1b}[31m",
        word => word,
    }
}

#[test]
fn what_libvirt_refuses_is_told_in_a_line() {
    let place = Place::furnished();
    Command::new("virsh").arg("--version").output().expect("virsh, of libvirt-clients");
    // libvirt's test driver has one running domain, `test`; the other URI is of a socket that is not there.
    let nowhere = format!("qemu+unix:///system?socket={}", place.path("nope"));
    let rows: [(&[&str], &str); 5] = [
        (&["-c", "test:///default", "stop", "inst"], "stop instance inst: instance inst: not running"),
        (&["-c", "test:///default", "detach", "test", "inst"], "domain test: has no disk of instance inst"),
        (
            &["-c", "test:///default", "detach", "nope", "inst"],
            "domain nope: not found\nsee what there is: virsh list --all",
        ),
        (
            &["-c", "test:///default", "detach", "-nope\n", "inst"],
            "unexpected argument '-n' found\nto pass '-n' as a value, use '-- -n'",
        ),
        (
            &["-c", &nowhere, "stop", "inst"],
            "stop instance inst: virsh domstate: Failed to connect socket to '{}/nope': No such file or directory\n\
             is libvirtd running? --connect URI chooses another libvirt",
        ),
    ];
    for (arguments, message) in rows {
        let output = place.run(&[&["libvirt"], arguments].concat());
        let found = text(&output.stderr).replace(&place.path(""), "{}/");
        assert_eq!(found, format!("cowdisk: {message}\n"), "{arguments:?}");
        assert_ne!(output.status.code(), Some(0));
    }
}

#[test]
fn an_argument_that_is_not_text_is_refused() {
    use std::os::unix::ffi::OsStrExt as _;
    let place = Place::new();
    let name = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    let output = place.command(&["image", "show"]).arg(name).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).starts_with("cowdisk: invalid UTF-8 was detected"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_bad_environment_is_told_like_a_bad_argument() {
    let place = Place::new();
    let output = place.command(&["image", "list"]).env("COWDISK_LOG", "loud").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        text(&output.stderr),
        "cowdisk: COWDISK_LOG=loud: must be off, error, warn, info, debug or trace\n"
    );
    let output = place.command(&["image", "list"]).env("COWDISK_STORE", "").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}

#[test]
fn help_and_version_go_to_stdout() {
    let place = Place::new();
    for arguments in [
        &["--help"][..],
        &["help", "scrub"],
        &["image", "import", "-h"],
        &["libvirt", "--help"],
        &["libvirt", "xml", "-h"],
    ] {
        assert!(place.works(arguments).contains("Usage: cowdisk"), "{arguments:?}");
    }
    assert_eq!(place.works(&["--version"]), format!("cowdisk {}\n", env!("CARGO_PKG_VERSION")));
    assert!(place.works(&["completions", "bash"]).contains("complete"));
}

#[test]
fn what_is_made_is_told_in_a_line_and_not_when_quiet() {
    let place = Place::new();
    place.make_files();
    assert_eq!(
        place.works(&["image", "import", "img", &place.path("img.raw")]),
        "image img: imported from raw, 1 MiB, takes 64 KiB\n"
    );
    assert_eq!(place.works(&["-q", "flavor", "add", "fl", "--local-size", "4M", "--fs", "none"]), "");
    assert_eq!(
        place.works(&["instance", "create", "inst", "--image", "img", "--flavor", "fl", "--root-size", "1G"]),
        "instance inst: created, disk of 1 GiB, disk.local of 4 MiB\n"
    );
    assert_eq!(
        place.works(&["instance", "create", "small", "--image", "img"]),
        "instance small: created, disk of 1 MiB\n",
        "neither flavor nor --local-size: no local disk"
    );
    assert_eq!(place.works(&["image", "verify"]), "image img: as it was imported\n");
    assert_eq!(place.works(&["flavor", "verify"]), "flavor fl: as it was made\n");
    for name in ["inst", "small"] {
        assert_eq!(place.works(&["instance", "remove", name]), format!("instance {name}: removed\n"));
    }
    assert_eq!(place.works(&["flavor", "remove", "fl"]), "flavor fl: removed\n");
    assert_eq!(place.works(&["image", "remove", "img"]), "image img: removed\n");
    assert_eq!(place.works(&["image", "list", "--json"]), "[]\n");
}

#[test]
fn json_has_stable_fields_and_sizes_in_bytes() {
    let place = Place::furnished();
    let keys =
        |value: &serde_json::Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    let images = place.json(&["image", "list", "--json"]);
    let image = &images[0];
    assert_eq!(
        keys(image),
        ["allocated", "base", "created", "format", "kernel", "name", "ramdisk", "size", "source_name"]
    );
    assert_eq!((&image["size"], &image["allocated"]), (&1_048_576.into(), &65_536.into()));
    assert_eq!(*image, place.json(&["image", "show", "img", "--json"]));
    let flavor = place.json(&["flavor", "show", "fl", "--json"]);
    assert_eq!(keys(&flavor), ["allocated", "base", "created", "fs", "local_size", "name"]);
    assert_eq!(flavor["local_size"], 4_194_304);
    assert_eq!(place.json(&["flavor", "list", "--json"])[0], flavor);
    let instance = place.json(&["instance", "show", "inst", "--json"]);
    assert_eq!(keys(&instance), ["cow", "created", "disks", "flavor", "image", "kernel", "name", "ramdisk"]);
    assert_eq!(
        keys(&instance["disks"][0]),
        ["allocated", "base", "block_size", "map_allocated", "name", "size"]
    );
    assert_eq!(instance["disks"][0]["base"], image["base"]);
    assert_eq!(instance["disks"][1]["name"], "disk.local");
    // A blank local disk is a plain file, and what `cow` says is of the root.
    let kinds =
        ["/cow", "/disks/0/block_size", "/disks/1/block_size", "/disks/1/base", "/disks/1/map_allocated"];
    let kinds = kinds.map(|path| instance.pointer(path).unwrap());
    assert_eq!(
        kinds,
        [&true.into(), &4096.into(), &serde_json::Value::Null, &serde_json::Value::Null, &0.into()]
    );
    let shown = place.works(&["instance", "show", "inst"]);
    assert!(
        shown.contains("overlay in blocks of 4 KiB\n") && shown.contains("independent file\n"),
        "{shown}"
    );
    let instances = place.json(&["instance", "list", "--json"]);
    assert_eq!(instances.as_array().unwrap().len(), 2);
    assert_eq!(instances[0]["name"], "full");
    assert_eq!(instances[0]["cow"], false);
    assert_eq!(instances[1], instance);
}

#[test]
fn tables_are_aligned() {
    let place = Place::furnished();
    let table = place.works(&["instance", "list"]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3);
    let column = lines[0].find("IMAGE").unwrap();
    assert!(lines[1..].iter().all(|line| line[column..].starts_with("img")), "{table}");
    assert!(place.works(&["image", "show", "img"]).contains("size           1 MiB (1048576 bytes)\n"));
}

#[test]
fn a_map_is_the_same_as_that_of_qemu_img() {
    let place = Place::furnished();
    let map = place.works(&["map", "inst"]);
    assert!(map.ends_with(
        "inst/disk: 1 MiB in blocks of 4 KiB, 3 extents: 0 B data, 0 B zero, 64 KiB base, 960 KiB in neither\n"
    ), "{map}");
    let ours = place.json(&["map", "inst", "--output", "json"]);
    assert_eq!(ours.as_array().unwrap().len(), 3);
    let qemu_img = |arguments: &[&str]| Command::new("qemu-img").args(arguments).output();
    let overlay = place.path("overlay.qcow2");
    let made =
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &place.path("img.raw"), &overlay]);
    made.expect("qemu-img, of qemu-utils");
    let theirs = qemu_img(&["map", "-f", "qcow2", "--output=json", &overlay]).unwrap();
    assert_eq!(ours, serde_json::from_slice::<serde_json::Value>(&theirs.stdout).unwrap());
    let theirs = qemu_img(&["map", "-f", "raw", "--output=json", &place.path("img.raw")]).unwrap();
    let ours = place.json(&["map", "full/disk", "--output", "json"]);
    assert_eq!(ours, serde_json::from_slice::<serde_json::Value>(&theirs.stdout).unwrap());
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::furnished();
    for arguments in
        [&["map", "inst"][..], &["completions", "zsh"], &["--help"], &["instance", "list", "--json"]]
    {
        let mut child =
            place.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{arguments:?}");
    }
}

#[test]
fn a_stdout_that_cannot_be_written_fails() {
    let place = Place::furnished();
    for arguments in [&["map", "inst"][..], &["image", "list"], &["--version"]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = place.command(arguments).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(text(&output.stderr), "cowdisk: write to stdout: No space left on device\n");
    }
}

#[test]
fn an_interrupted_import_leaves_nothing() {
    let place = Place::new();
    let chunk = vec![0xa5; 8 << 20];
    let file = File::create(place.path("big.raw")).unwrap();
    for index in 0..64 {
        file.write_all_at(&chunk, index * (8 << 20)).unwrap();
    }
    let before = place.snapshot();
    let mut child = place
        .command(&["image", "import", "big", &place.path("big.raw")])
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while fs::read_dir(place.path("store/tmp")).unwrap().count() == 0 {
        assert!(Instant::now() < deadline, "the import never began");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = child.wait().unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(
        stderr.starts_with("cowdisk: import image big: ") && stderr.ends_with(": interrupted\n"),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1);
    assert_eq!(place.snapshot(), before);
}
