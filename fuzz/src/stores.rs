//! A store one of whose files holds anything at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use cowdisk::store::{
    DiskName, FileRef, FlavorFs, FlavorSpec, ImportRequest, InstanceSpec, NoProgress, ObjectName, Store,
};

use super::input::Input;
use super::layer::scratch;

/// A store with an image, a flavor and an instance, and what must stay as it is outside of it.
struct Victim {
    store: PathBuf,
    run: PathBuf,
    outside: PathBuf,
    /// The kernel's id of this boot.
    boot: String,
    /// Each file that may be replaced, with what belongs there.
    files: Vec<(PathBuf, Option<Vec<u8>>)>,
}

fn name(text: &str) -> ObjectName {
    text.parse().expect("a name")
}

impl Victim {
    fn new() -> Self {
        let folder = scratch().join("victim");
        fs::create_dir(&folder).expect("make a folder");
        let [store, run, outside, source] =
            ["store", "run", "outside", "image.raw"].map(|part| folder.join(part));
        fs::create_dir(&outside).expect("make a folder");
        fs::write(outside.join("kept"), "kept").expect("write a file");
        fs::write(&source, [7; 8192]).expect("write an image");
        let opened = Store::init(&store).expect("make a store").with_run_dir(&run);
        let request =
            ImportRequest { source: source.clone(), kernel: Some(source), ..ImportRequest::default() };
        let image = opened.import_image(&name("image"), &request, &NoProgress).expect("import");
        let flavor = FlavorSpec { local_size: 8192, fs: FlavorFs::None };
        opened.add_flavor(&name("flavor"), &flavor, &NoProgress).expect("add a flavor");
        let spec = InstanceSpec { flavor: Some(name("flavor")), ..InstanceSpec::of(name("image")) };
        opened.create_instance(&name("web"), &spec, &NoProgress).expect("create");
        opened.run_dir().expect("a run directory");
        let kernel = image.kernel.expect("it was given");
        let files = [
            "cowdisk-store.json".to_owned(),
            "images/image.json".to_owned(),
            "flavors/flavor.json".to_owned(),
            "instances/web/instance.json".to_owned(),
            format!("bases/{}/base.json", image.base),
            "instances/web/disk.attr".to_owned(),
            "attrs/image-image.json".to_owned(),
            format!("attrs/boot-{kernel}.json"),
            "run.json".to_owned(),
            "daemon.lock".to_owned(),
            "instances/web/disk.map".to_owned(),
            "tmp/image-0123".to_owned(),
        ];
        let files = files.map(|file| {
            let path = store.join(file);
            let bytes = fs::read(&path).ok();
            (path, bytes)
        });
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("the kernel's boot id");
        Self { store, run, outside, boot: boot.trim().to_owned(), files: files.into() }
    }

    fn exercise(&self) {
        let Ok(store) = Store::open(&self.store) else { return };
        let store = store.with_run_dir(&self.run);
        let _ = store.serving();
        // Whatever the store says, live maps stay in a folder of ours.
        if let Ok(run) = store.run_dir() {
            assert!(run.starts_with(&self.run), "{}", run.display());
        }
        let _ = (store.images(), store.flavors(), store.instances());
        let _ = store.verify_image(&name("image"), &NoProgress);
        if let Ok(image) = store.image(&name("image")) {
            assert!(image.size > 0 && image.size.is_multiple_of(512));
            let _ = image.kernel.map(|id| store.attributes(&FileRef::Boot(id)));
        }
        if let Ok(image) = store.image(&name("image"))
            && let Ok(attributes) = store.attributes(&FileRef::Image(image.name, image.base))
        {
            assert!(attributes.mode <= 0o7777);
        }
        if let Ok(instance) = store.instance(&name("web")) {
            for (disk, _) in instance.disks() {
                let _ = store.disk_status(&instance.name, disk);
                let _ = store.disk_map(&instance.name, disk);
                let _ = store.attributes(&FileRef::Disk(instance.name.clone(), instance.id, disk));
            }
        }
        if let Ok(disk) = store.open_disk(&name("web"), DiskName::Root) {
            let mut bytes = [0; 512];
            let _ = disk.read_at(0, &mut bytes);
            disk.close().expect("a disk that opened closes");
        }
    }

    fn restore(&self) {
        for (path, bytes) in &self.files {
            match bytes {
                Some(bytes) => replace(path, bytes),
                None => remove(path),
            }
        }
        assert_eq!(fs::read(self.outside.join("kept")).expect("it is kept"), b"kept");
        assert_eq!(
            fs::read_dir(&self.outside).expect("it is there").count(),
            1,
            "something was made outside"
        );
    }
}

fn replace(path: &Path, bytes: &[u8]) {
    remove(path);
    fs::write(path, bytes).expect("write a file of the store");
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path).expect("remove a folder"),
        Ok(_) => fs::remove_file(path).expect("remove a file"),
        Err(_) => {}
    }
}

/// Which file, then what is in it; or a link, a folder or a fifo in its place. `$RUN`, `$OUT`, `$STORE` and `$BOOT` in the
/// bytes stand for what the fuzzer cannot guess.
pub fn records(data: &[u8]) {
    static VICTIM: OnceLock<Mutex<Victim>> = OnceLock::new();
    let victim = VICTIM.get_or_init(|| Mutex::new(Victim::new()));
    let victim = victim.lock().expect("an earlier input has failed");
    let mut input = Input::new(data);
    let (path, _) = &victim.files[usize::from(input.byte()) % victim.files.len()];
    match input.byte() {
        0xfd => {
            remove(path);
            std::os::unix::fs::symlink(victim.outside.join("kept"), path).expect("make a link");
        }
        0xfe => {
            remove(path);
            fs::create_dir(path).expect("make a folder");
        }
        0xff => remove(path),
        _ => {
            let run_name = fs::read_dir(&victim.run).expect("it was made").flatten().next();
            let run_name = run_name.map(|entry| entry.file_name().to_string_lossy().into_owned());
            let mut bytes = input.rest().to_vec();
            for (word, value) in [
                (&b"$RUN"[..], run_name.unwrap_or_default()),
                (b"$OUT", victim.outside.display().to_string()),
                (b"$STORE", victim.store.display().to_string()),
                (b"$BOOT", victim.boot.clone()),
            ] {
                bytes = substitute(&bytes, word, value.as_bytes());
            }
            replace(path, &bytes);
        }
    }
    victim.exercise();
    victim.restore();
}

fn substitute(bytes: &[u8], word: &[u8], value: &[u8]) -> Vec<u8> {
    let mut done = Vec::new();
    let mut left = bytes;
    while let Some(at) = left.windows(word.len()).position(|window| window == word) {
        done.extend_from_slice(&left[..at]);
        done.extend_from_slice(value);
        left = &left[at + word.len()..];
    }
    done.extend_from_slice(left);
    done
}
