//! Kills processes that change a store at random moments (`kill -9`) and looks, after each, whether the next opening
//! finds the store as it was before or after each change, and nothing half-made.
//!
//! The process that is killed is this test itself, started again with a variable in its environment.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cowdisk::ErrorKind;
use cowdisk::store::{
    DiskName, FlavorFs, FlavorSpec, ImportRequest, InstanceSpec, NoProgress, ObjectName, Store,
};

const STORE: &str = "COWDISK_TEST_CRASH_STORE";
const ROUNDS: u64 = 40;
const IMAGES: u64 = 3;

fn name(text: &str) -> ObjectName {
    text.parse().expect("a valid name")
}

/// Numbers that are the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Makes and removes objects until it is killed. Any error but those that follow from who refers to whom is a failure.
fn change_without_end(folder: &Path, seed: u64) {
    let store = Store::open(&folder.join("store")).expect("open the store").with_run_dir(folder.join("run"));
    let mut random = Random(seed | 1);
    loop {
        let number = random.below(IMAGES);
        let (image, flavor) = (name(&format!("image-{number}")), name("flavor"));
        let instance = name(&format!("instance-{}", random.below(4)));
        let request = ImportRequest {
            source: folder.join(format!("source-{}", random.below(IMAGES))),
            kernel: Some(folder.join(format!("source-{number}"))),
            ..ImportRequest::default()
        };
        let spec = InstanceSpec {
            flavor: Some(flavor.clone()),
            no_cow: random.below(3) == 0,
            ..InstanceSpec::of(image.clone())
        };
        let result = match random.below(7) {
            0 | 1 => store.import_image(&image, &request, &NoProgress).map(drop),
            2 => store.remove_image(&image),
            3 | 4 => store.create_instance(&instance, &spec, &NoProgress).map(drop),
            5 => store.remove_instance(&instance),
            _ => match random.below(2) {
                0 => store.remove_flavor(&flavor),
                _ => {
                    let spec = FlavorSpec { local_size: 1 << 20, fs: FlavorFs::Swap };
                    store.add_flavor(&flavor, &spec, &NoProgress).map(drop)
                }
            },
        };
        if let Err(error) = result {
            let expected = [ErrorKind::NotFound, ErrorKind::Exists, ErrorKind::Busy];
            assert!(expected.contains(&error.kind()), "{error:?}");
        }
    }
}

/// Everything that is named is there and whole; everything that is there is named.
fn check(folder: &Path) {
    let path = folder.join("store");
    let store = Store::open(&path).expect("open the store after a crash").with_run_dir(folder.join("run"));
    let (mut bases, mut boot_files) = (BTreeSet::new(), BTreeSet::new());
    for image in store.images().expect("list the images") {
        store.verify_image(&image.name, &NoProgress).expect("an image is whole");
        bases.insert(image.base.to_string());
        boot_files.extend(image.kernel.map(|id| id.to_string()));
    }
    for flavor in store.flavors().expect("list the flavors") {
        bases.extend(flavor.base.map(|id| id.to_string()));
    }
    for instance in store.instances().expect("list the instances") {
        boot_files.extend(instance.kernel.map(|id| id.to_string()));
        for disk in [DiskName::Root, DiskName::Local] {
            let disk = store.open_disk(&instance.name, disk).expect("a disk opens");
            disk.read_at(0, &mut [0; 4096]).expect("a disk can be read");
            disk.close().expect("a disk closes");
        }
    }
    let names = |part: &str| -> BTreeSet<String> {
        let entries = std::fs::read_dir(path.join(part)).expect("list a folder of the store");
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
    };
    assert_eq!(names("tmp"), BTreeSet::new(), "nothing half-made is left");
    assert_eq!(names("bases"), bases);
    assert_eq!(names("boot"), boot_files);
}

#[test]
fn a_killed_process_leaves_each_change_done_or_not_begun() {
    if let Some(folder) = std::env::var_os(STORE) {
        let seed = std::env::var("COWDISK_TEST_CRASH_SEED").expect("a seed").parse().expect("a number");
        change_without_end(Path::new(&folder), seed);
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(folder.path().join("run")).expect("a run directory");
    for number in 0..IMAGES {
        let mut source = File::create(folder.path().join(format!("source-{number}"))).expect("a source");
        source.write_all(&vec![u8::try_from(number).expect("small"); 300_000]).expect("a source");
    }
    Store::init(&folder.path().join("store")).expect("a store");
    let mut random = Random(0x9e37_79b9);
    for round in 0..ROUNDS {
        let mut workers: Vec<_> = (0..2)
            .map(|worker| {
                Command::new(std::env::current_exe().expect("this test"))
                    .args(["--exact", "a_killed_process_leaves_each_change_done_or_not_begun"])
                    .env(STORE, folder.path())
                    .env("COWDISK_TEST_CRASH_SEED", (round * 2 + worker + 1).to_string())
                    .stdout(Stdio::null())
                    .spawn()
                    .expect("start a worker")
            })
            .collect();
        std::thread::sleep(Duration::from_micros(20_000 + random.below(80_000)));
        for worker in &mut workers {
            assert_eq!(
                worker.try_wait().expect("look at a worker"),
                None,
                "round {round}: a worker has failed"
            );
            worker.kill().expect("kill a worker");
            worker.wait().expect("wait for a worker");
        }
        check(folder.path());
    }
}
