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

use cowdisk::store::{
    DiskName, FlavorFs, FlavorSpec, ImportRequest, InstanceSpec, NoProgress, ObjectName, Store,
};
use cowdisk::{ErrorKind, Result};

const STORE: &str = "COWDISK_TEST_CRASH_STORE";
const ROUNDS: u64 = 30;
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
    let mut random = Random(seed | 1);
    loop {
        // Each time anew: opening sweeps what the dead left, and must spare what the other worker is making.
        let store =
            Store::open(&folder.join("store")).expect("open the store").with_run_dir(folder.join("run"));
        let number = random.below(IMAGES);
        let (image, flavor) = (name(&format!("image-{number}")), name("flavor"));
        let instance = name(&format!("instance-{}", random.below(3)));
        let request = ImportRequest {
            source: folder.join(format!("source-{}", random.below(IMAGES))),
            kernel: Some(folder.join(format!("source-{number}"))),
            ..ImportRequest::default()
        };
        let spec = InstanceSpec {
            flavor: (random.below(2) == 0).then(|| flavor.clone()),
            local_size: Some(1 << 20),
            no_cow: random.below(3) == 0,
            ..InstanceSpec::of(image.clone())
        };
        // What exists is removed instead, so that most rounds change something.
        let or_remove = |made: Result<()>, remove: &dyn Fn() -> Result<()>| match made {
            Err(error) if error.kind() == ErrorKind::Exists => remove(),
            made => made,
        };
        let result = match random.below(3) {
            0 => or_remove(store.import_image(&image, &request, &NoProgress).map(drop), &|| {
                store.remove_image(&image)
            }),
            1 => or_remove(store.create_instance(&instance, &spec, &NoProgress).map(drop), &|| {
                store.remove_instance(&instance)
            }),
            _ => {
                let spec = FlavorSpec { local_size: 1 << 20, fs: FlavorFs::Swap };
                or_remove(store.add_flavor(&flavor, &spec, &NoProgress).map(drop), &|| {
                    store.remove_flavor(&flavor)
                })
            }
        };
        if let Err(error) = result {
            // Of objects, that is, not of files that were taken from under it.
            let missing = error.kind() == ErrorKind::NotFound && error.to_string().ends_with(": not found");
            assert!(missing || [ErrorKind::Exists, ErrorKind::Busy].contains(&error.kind()), "{error:?}");
        }
    }
}

/// Everything that is named is there and whole; everything that is there is named.
fn check(folder: &Path) {
    let path = folder.join("store");
    // A child of the killed process holds its files for another moment.
    for _ in 0..200 {
        Store::open(&path).expect("open the store after a crash");
        if names(&path, "tmp").is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let store = Store::open(&path).expect("open the store again").with_run_dir(folder.join("run"));
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
    assert_eq!(names(&path, "tmp"), BTreeSet::new(), "nothing half-made is left");
    assert_eq!(names(&path, "bases"), bases);
    assert_eq!(names(&path, "boot"), boot_files);
}

fn names(store: &Path, part: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(store.join(part)).expect("list a folder of the store");
    entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
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
        source.write_all(&vec![u8::try_from(number).expect("small"); 3_000_000]).expect("a source");
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
        std::thread::sleep(Duration::from_micros(30_000 + random.below(300_000)));
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
