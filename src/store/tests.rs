//! Tests of the store as a whole; those of a part are with the part.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// A store in a temporary folder, with a run directory of its own.
pub(super) struct TestStore {
    pub(super) store: Store,
    pub(super) folder: tempfile::TempDir,
    pub(super) run: tempfile::TempDir,
}

pub(super) fn empty_store() -> TestStore {
    let folder = tempfile::tempdir().unwrap();
    let run = tempfile::tempdir().unwrap();
    let store = Store::init(folder.path()).unwrap().with_run_dir(run.path());
    TestStore { store, folder, run }
}

/// A store with image `debian` and instance `web-3` of it, with a blank local disk.
pub(super) fn store_with_image() -> TestStore {
    let t = empty_store();
    t.import("debian", &image_bytes()).unwrap();
    let spec = InstanceSpec { local_size: Some(8 << 20), ..InstanceSpec::of(name("debian")) };
    t.store.create_instance(&name("web-3"), &spec, &NoProgress).unwrap();
    t
}

fn name(text: &str) -> ObjectName {
    text.parse().unwrap()
}

/// 1 MiB: data, a hole's worth of zeroes, data.
fn image_bytes() -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    bytes[..5000].fill(0x11);
    bytes[(1 << 20) - 5000..].fill(0x22);
    bytes
}

impl TestStore {
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.run.path().join(name);
        File::create(&path).unwrap().write_all(bytes).unwrap();
        path
    }

    fn import(&self, image: &str, bytes: &[u8]) -> Result<Image> {
        let request = ImportRequest { source: self.file("source.img", bytes), ..ImportRequest::default() };
        self.store.import_image(&name(image), &request, &NoProgress)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn names(&self, folder: &str) -> Vec<String> {
        Dir::open_path(&self.path(folder)).unwrap().names().unwrap()
    }

    /// Everything in the store: paths, sizes and times of files.
    fn snapshot(&self) -> Vec<(PathBuf, u64, i64)> {
        fn walk(dir: &Path, found: &mut Vec<(PathBuf, u64, i64)>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                let metadata = entry.metadata().unwrap();
                if metadata.is_dir() {
                    walk(&entry.path(), found);
                } else {
                    found.push((entry.path(), metadata.len(), metadata.mtime_nsec()));
                }
            }
        }
        let mut found = Vec::new();
        walk(self.folder.path(), &mut found);
        found.sort();
        found
    }

    #[track_caller]
    fn refuses<T: std::fmt::Debug>(
        &self,
        kind: ErrorKind,
        reason: &str,
        action: impl FnOnce(&Store) -> Result<T>,
    ) {
        let before = self.snapshot();
        let error = action(&self.store).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(self.snapshot(), before, "a refusal changes nothing");
    }
}

/// Cancels once so many bytes are done.
struct CancelAfter {
    bytes: u64,
    done: AtomicU64,
    open: AtomicU64,
}

impl CancelAfter {
    fn new(bytes: u64) -> Self {
        Self { bytes, done: AtomicU64::new(0), open: AtomicU64::new(0) }
    }
}

impl Progress for CancelAfter {
    fn begin(&self, _what: &str, _total_bytes: Option<u64>) {
        self.open.fetch_add(1, Ordering::Relaxed);
    }
    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
    fn finish(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
    fn cancelled(&self) -> bool {
        self.done.load(Ordering::Relaxed) >= self.bytes
    }
}

mod creating {
    use super::*;

    #[test]
    fn a_store_is_made_once_in_an_absent_or_empty_folder() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a/b");
        assert_eq!(Store::open(&path).unwrap_err().kind(), ErrorKind::NotFound);
        let uuid = Store::init(&path).unwrap().uuid().to_owned();
        assert_eq!(uuid.len(), 32);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o700);
        assert_eq!(Store::init(&path).unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(Store::open(&path).unwrap().uuid(), uuid);
        let foreign = scratch.path().join("foreign");
        std::fs::create_dir_all(foreign.join("photos")).unwrap();
        let error = Store::init(&foreign).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("photos"), "{error}");
        let error = Store::open(&foreign).unwrap_err();
        assert!(error.hint().unwrap().contains("init"), "{error}");
        let file = scratch.path().join("file");
        File::create(&file).unwrap();
        assert!(Store::init(&file).is_err());
    }

    #[test]
    fn an_interrupted_init_is_finished_by_the_next() {
        let scratch = tempfile::tempdir().unwrap();
        for part in ["bases", "images", "tmp", "lost+found"] {
            std::fs::create_dir(scratch.path().join(part)).unwrap();
        }
        File::create(scratch.path().join("tmp/superblock-1234")).unwrap();
        Store::init(scratch.path()).unwrap();
        let other = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(other.path().join("images/mine")).unwrap();
        assert_eq!(Store::init(other.path()).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn another_version_and_damage_are_told_apart() {
        let t = empty_store();
        let path = t.path("cowdisk-store.json");
        let good = std::fs::read_to_string(&path).unwrap();
        let put = |text: &str| File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
        put(&good.replace("\"version\": 1", "\"version\": 2").replace("uuid", "id"));
        let error = Store::open(t.folder.path()).unwrap_err();
        assert_eq!((error.kind(), error.hint()), (ErrorKind::Unsupported, Some("upgrade cowdisk")));
        for bad in [
            String::new(),
            "{}".to_owned(),
            good.replace("cowdisk-store", "other"),
            good.replace("\"version\": 1", "\"version\": 0"),
            good.replace("\"version\": 1", "\"version\": -1"),
            good.replace("uuid", "uid"),
            good.replace("\"uuid\": \"", "\"uuid\": \"zz"),
            " ".repeat(100_000),
        ] {
            put(&bad);
            let error = Store::open(t.folder.path()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            assert!(error.to_string().contains("cowdisk-store.json"), "{error}");
        }
        put(&good);
        Store::open(t.folder.path()).unwrap();
    }
}

mod importing {
    use super::*;

    #[test]
    fn an_image_is_its_bytes_rounded_up_to_sectors_read_only_and_sparse() {
        let t = empty_store();
        let mut bytes = image_bytes();
        bytes.push(0x33);
        let image = t.import("debian", &bytes).unwrap();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        assert_eq!((image.size, image.format), (bytes.len() as u64, SourceFormat::Raw));
        assert_eq!(image.base.0, *blake3::hash(&bytes).as_bytes());
        assert_eq!(t.store.image(&name("debian")).unwrap(), image);
        assert_eq!(t.store.images().unwrap(), std::slice::from_ref(&image));
        let path = t.path(&format!("bases/{}/base.raw", image.base));
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        let metadata = path.metadata().unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o400);
        assert!(metadata.blocks() * 512 < 64 << 10);
        t.store.verify_image(&name("debian"), &NoProgress).unwrap();
        assert_eq!(t.names("tmp"), [""; 0]);
    }

    #[test]
    fn the_same_content_is_stored_once_until_its_last_name_goes() {
        let t = empty_store();
        let one = t.import("one", &image_bytes()).unwrap();
        let two = t.import("two", &image_bytes()).unwrap();
        assert_eq!(one.base, two.base);
        assert_eq!(t.names("bases").len(), 1);
        t.store.remove_image(&name("one")).unwrap();
        assert_eq!(t.names("bases").len(), 1);
        t.store.remove_image(&name("two")).unwrap();
        assert_eq!(t.names("bases").len(), 0);
        t.refuses(ErrorKind::NotFound, "image two", |store| store.remove_image(&name("two")));
    }

    #[test]
    fn kernel_and_ramdisk_are_stored_by_content_and_go_with_the_last_image() {
        let t = empty_store();
        let kernel = t.file("vmlinuz", b"kernel");
        let request = |image: &[u8], ramdisk: &[u8]| ImportRequest {
            source: t.file("source.img", image),
            kernel: Some(kernel.clone()),
            ramdisk: Some(t.file("initrd", ramdisk)),
            ..ImportRequest::default()
        };
        let one = t.store.import_image(&name("one"), &request(b"1", b"ramdisk 1"), &NoProgress).unwrap();
        let two = t.store.import_image(&name("two"), &request(b"2", b"ramdisk 2"), &NoProgress).unwrap();
        assert_eq!(one.kernel, two.kernel);
        assert_eq!(t.store.boot_files().unwrap().len(), 3);
        let path = t.path(&format!("boot/{}", one.ramdisk.unwrap()));
        assert_eq!(std::fs::read(&path).unwrap(), b"ramdisk 1");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o400);
        t.store.verify_image(&name("one"), &NoProgress).unwrap();
        let copy = InstanceSpec { no_cow: true, ..InstanceSpec::of(name("one")) };
        let instance = t.store.create_instance(&name("copy"), &copy, &NoProgress).unwrap();
        assert_eq!(instance.kernel, one.kernel);
        t.store.remove_image(&name("two")).unwrap();
        t.store.remove_image(&name("one")).unwrap();
        assert_eq!(t.store.boot_files().unwrap().len(), 2, "the copy still boots from them");
        t.store.remove_instance(&name("copy")).unwrap();
        assert_eq!(t.store.boot_files().unwrap().len(), 0);
    }

    #[test]
    fn what_cannot_be_imported_is_refused_and_leaves_nothing() {
        let t = empty_store();
        t.import("taken", &image_bytes()).unwrap();
        let import = |request: ImportRequest| {
            move |store: &Store| store.import_image(&name("new"), &request, &NoProgress)
        };
        let of = |source: PathBuf| ImportRequest { source, ..ImportRequest::default() };
        let good = t.file("good", b"bytes");
        t.refuses(ErrorKind::Exists, "exists already", |store| {
            store.import_image(&name("taken"), &of(good.clone()), &NoProgress)
        });
        t.refuses(ErrorKind::NotFound, "absent", import(of(t.run.path().join("absent"))));
        t.refuses(ErrorKind::Invalid, "directory", import(of(t.run.path().to_owned())));
        t.refuses(ErrorKind::Invalid, "empty", import(of(t.file("empty", b""))));
        let stated = ImportRequest { format: Some(SourceFormat::Qcow2), ..of(good.clone()) };
        t.refuses(ErrorKind::Invalid, "said to be qcow2", import(stated));
        let no_kernel = ImportRequest { kernel: Some("/dev/null".into()), ..of(good.clone()) };
        t.refuses(ErrorKind::Invalid, "character device", import(no_kernel));
        let no_ramdisk = ImportRequest { kernel: Some(good.clone()), ramdisk: Some("/".into()), ..of(good) };
        t.refuses(ErrorKind::Invalid, "directory", import(no_ramdisk));
        let backed = t.file(
            "backed.qcow2",
            &[b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\x01\0\0\0\0\x05".as_slice(), &[0; 500]].concat(),
        );
        t.refuses(ErrorKind::Invalid, "backing file", import(of(backed)));
    }

    #[test]
    fn cancelling_leaves_nothing() {
        let t = empty_store();
        let source = t.run.path().join("big.img");
        File::create(&source).unwrap().set_len(1 << 40).unwrap();
        for bytes in [0, 64 << 20] {
            let progress = CancelAfter::new(bytes);
            let request = ImportRequest { source: source.clone(), ..ImportRequest::default() };
            t.refuses(ErrorKind::Interrupted, "interrupted", |store| {
                store.import_image(&name("new"), &request, &progress)
            });
            assert_eq!(progress.open.load(Ordering::Relaxed), 0, "each begin has its finish");
        }
    }

    #[test]
    fn other_formats_are_converted() {
        if std::process::Command::new("qemu-img").arg("--version").output().is_err() {
            println!("skipped: qemu-img is not installed");
            return;
        }
        let t = empty_store();
        let mut bytes = vec![0; 3 << 20];
        bytes[1 << 20..(1 << 20) + 70_000].fill(0x77);
        let raw = t.file("raw.img", &bytes);
        let plain = t.import("plain", &bytes).unwrap();
        for (format, options) in [
            ("qcow2", "compression_type=zlib"),
            ("qcow2", "compression_type=zstd,extended_l2=on,cluster_size=128k"),
            ("qcow2", "compat=0.10"),
            ("vmdk", "subformat=monolithicSparse"),
            ("vmdk", "subformat=streamOptimized"),
            ("vhdx", "subformat=dynamic"),
            ("vhdx", "subformat=fixed"),
            ("vdi", "static=off"),
            ("vdi", "static=on"),
        ] {
            let source = t.run.path().join("converted");
            let made = std::process::Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", format, "-o", options])
                .args([&raw, &source])
                .status();
            assert!(made.unwrap().success(), "{format} {options}");
            let request = ImportRequest { source: source.clone(), ..ImportRequest::default() };
            let progress = CancelAfter::new(u64::MAX);
            let image = t.store.import_image(&name("new"), &request, &progress).unwrap();
            assert_eq!(image.format.as_str(), format);
            assert_eq!(image.base, plain.base, "{format} {options}");
            t.store.remove_image(&name("new")).unwrap();
            std::fs::remove_file(source).unwrap();
        }
        assert_eq!(t.names("bases").len(), 1);
    }

    #[test]
    fn verify_names_what_has_changed() {
        let t = empty_store();
        let image = t.import("debian", &image_bytes()).unwrap();
        let path = t.path(&format!("bases/{}/base.raw", image.base));
        let verify = || t.store.verify_image(&name("debian"), &NoProgress);
        let touched = File::open(&path).unwrap();
        touched.set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(t.store.open_base(&image.base).unwrap_err().kind(), ErrorKind::Corrupt);
        verify().unwrap();
        t.store.open_base(&image.base).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0xff], 70_000).unwrap();
        let text = verify().unwrap_err().to_string();
        assert!(text.contains("debian") && text.contains("bytes have changed"), "{text}");
        file.set_len(4096).unwrap();
        assert!(verify().unwrap_err().to_string().contains("4096 bytes"));
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
        assert_eq!(verify().unwrap_err().kind(), ErrorKind::NotFound);
    }
}

mod flavoring {
    use super::*;

    fn add(t: &TestStore, flavor: &str, local_size: u64, fs: FlavorFs) -> Result<Flavor> {
        t.store.add_flavor(&name(flavor), &FlavorSpec { local_size, fs }, &NoProgress)
    }

    #[test]
    fn a_flavor_without_a_filesystem_needs_no_base() {
        let t = empty_store();
        let flavor = add(&t, "small", 1 << 30, FlavorFs::None).unwrap();
        assert_eq!(flavor.base_ref(), crate::format::BaseRef::Blank);
        assert_eq!(t.store.flavor(&name("small")).unwrap(), flavor);
        assert_eq!(t.names("bases").len(), 0);
        t.store.remove_flavor(&name("small")).unwrap();
        assert_eq!(t.store.flavors().unwrap(), []);
    }

    #[test]
    fn a_filesystem_is_made_once_sparse_and_labelled() {
        let t = empty_store();
        for (fs, size, host_max) in [
            (FlavorFs::Ext4, 2 << 30, 4 << 20),
            (FlavorFs::Xfs, 1 << 30, 1 << 20),
            (FlavorFs::Swap, 64 << 20, 64 << 10),
        ] {
            let flavor = match add(&t, fs.as_str(), size, fs) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {
                    println!("skipped: {error}");
                    continue;
                }
                flavor => flavor.unwrap(),
            };
            let (bytes, allocated) = t.store.base_usage(&flavor.base.unwrap()).unwrap();
            assert_eq!(bytes, size);
            assert!(allocated <= host_max, "{fs}: {allocated} bytes for a blank disk");
            let base = std::fs::read(t.path(&format!("bases/{}/base.raw", flavor.base.unwrap()))).unwrap();
            assert!(
                base[..4096].windows(10).any(|window| window == LOCAL_LABEL.as_bytes()),
                "{fs}: labelled"
            );
            t.store.verify_base(&flavor.base.unwrap(), &NoProgress).unwrap();
        }
        assert_eq!(t.names("tmp"), [""; 0]);
    }

    #[test]
    fn sizes_out_of_range_are_refused_with_the_minimum() {
        let t = empty_store();
        t.refuses(ErrorKind::Invalid, "at least 16 MiB", |_| add(&t, "f", 8 << 20, FlavorFs::Ext4));
        t.refuses(ErrorKind::Invalid, "at least 300 MiB", |_| add(&t, "f", 299 << 20, FlavorFs::Xfs));
        t.refuses(ErrorKind::Invalid, "multiple of 512", |_| add(&t, "f", (20 << 20) + 1, FlavorFs::Ext4));
        t.refuses(ErrorKind::Invalid, "disk size", |_| add(&t, "f", 0, FlavorFs::None));
        t.refuses(ErrorKind::Invalid, "disk size", |_| add(&t, "f", 17 << 40, FlavorFs::None));
        add(&t, "f", 512, FlavorFs::None).unwrap();
        t.refuses(ErrorKind::Exists, "exists already", |_| add(&t, "f", 512, FlavorFs::None));
    }

    #[test]
    fn a_flavor_stays_while_an_overlay_needs_its_base() {
        let t = empty_store();
        t.import("debian", &image_bytes()).unwrap();
        add(&t, "swapped", 1 << 20, FlavorFs::Swap).unwrap();
        let spec = InstanceSpec { flavor: Some(name("swapped")), ..InstanceSpec::of(name("debian")) };
        t.store.create_instance(&name("web-3"), &spec, &NoProgress).unwrap();
        t.refuses(ErrorKind::Busy, "web-3", |store| store.remove_flavor(&name("swapped")));
        t.refuses(ErrorKind::Invalid, "smaller than that of flavor", |store| {
            let spec = InstanceSpec { local_size: Some(512 << 10), ..spec.clone() };
            store.create_instance(&name("web-4"), &spec, &NoProgress)
        });
        t.store.remove_instance(&name("web-3")).unwrap();
        t.store.remove_flavor(&name("swapped")).unwrap();
        assert_eq!(t.names("bases").len(), 1);
    }
}

mod instancing {
    use super::*;

    fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xcc; len];
        disk.read_at(offset, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn an_overlay_shows_the_image_and_keeps_what_is_written() {
        let t = store_with_image();
        let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
        assert_eq!(read(&disk, 0, 1 << 20), image_bytes());
        disk.write_at(100_000, b"written").unwrap();
        disk.grow(2 << 20).unwrap();
        disk.flush().unwrap();
        disk.close().unwrap();
        let again = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
        assert_eq!(read(&again, 100_000, 7), b"written");
        assert_eq!((again.size(), read(&again, (2 << 20) - 1, 1)), (2 << 20, vec![0]));
        assert_eq!(t.store.disk_status(&name("web-3"), DiskName::Root).unwrap().size, 2 << 20);
        let local = t.store.open_disk(&name("web-3"), DiskName::Local).unwrap();
        assert_eq!((local.size(), read(&local, 0, 4096)), (8 << 20, vec![0; 4096]));
        t.store.verify_image(&name("debian"), &NoProgress).unwrap();
    }

    #[test]
    fn what_the_last_daemon_answered_is_there_without_a_flush() {
        let t = store_with_image();
        let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
        disk.write_at(0, b"answered").unwrap();
        drop(disk);
        let again = Store::open(t.folder.path()).unwrap().open_disk(&name("web-3"), DiskName::Root).unwrap();
        assert_eq!(read(&again, 0, 8), b"answered");
    }

    #[test]
    fn an_open_disk_is_neither_opened_again_nor_removed() {
        let t = store_with_image();
        let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
        t.refuses(ErrorKind::Busy, "web-3/disk", |store| store.open_disk(&name("web-3"), DiskName::Root));
        t.refuses(ErrorKind::Busy, "web-3/disk", |store| store.remove_instance(&name("web-3")));
        let serving = t.store.serve_lock(Path::new("/mnt/vm")).unwrap();
        let error = t.store.remove_instance(&name("web-3")).unwrap_err();
        assert!(error.hint().unwrap().contains("/mnt/vm"), "{error}");
        drop((disk, serving));
        t.store.remove_instance(&name("web-3")).unwrap();
        assert_eq!(t.names("instances").len() + t.names("tmp").len(), 0);
        let maps: Vec<_> = std::fs::read_dir(t.run.path().join(t.store.uuid())).unwrap().collect();
        assert_eq!(maps.len(), 0, "its live maps are gone too");
        t.refuses(ErrorKind::NotFound, "web-3", |store| store.remove_instance(&name("web-3")));
    }

    #[test]
    fn an_image_stays_while_an_overlay_needs_it() {
        let t = store_with_image();
        t.refuses(ErrorKind::Busy, "web-3", |store| store.remove_image(&name("debian")));
        t.import("twin", &image_bytes()).unwrap();
        t.refuses(ErrorKind::Busy, "web-3", |store| store.remove_image(&name("debian")));
        t.store.remove_image(&name("twin")).unwrap();
        t.store.remove_instance(&name("web-3")).unwrap();
        let base = t.store.open_base(&t.store.image(&name("debian")).unwrap().base).unwrap();
        t.refuses(ErrorKind::Busy, "open", |store| store.remove_image(&name("debian")));
        drop(base);
        t.store.remove_image(&name("debian")).unwrap();
        assert_eq!(t.names("bases").len() + t.names("images").len() + t.names("tmp").len(), 0);
    }

    #[test]
    fn a_copy_is_independent_of_its_image() {
        let t = empty_store();
        t.import("debian", &image_bytes()).unwrap();
        let spec = InstanceSpec {
            root_size: Some(4 << 20),
            local_size: Some(1 << 20),
            no_cow: true,
            ..InstanceSpec::of(name("debian"))
        };
        let instance = t.store.create_instance(&name("web-3"), &spec, &NoProgress).unwrap();
        assert!(!instance.cow);
        t.store.remove_image(&name("debian")).unwrap();
        let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
        assert_eq!(read(&disk, 0, 1 << 20), image_bytes());
        assert_eq!(disk.size(), 4 << 20);
        disk.write_at(0, b"own").unwrap();
        t.refuses(ErrorKind::Busy, "web-3/disk", |store| store.open_disk(&name("web-3"), DiskName::Root));
        disk.close().unwrap();
        let map = t.store.disk_map(&name("web-3"), DiskName::Root).unwrap();
        assert_eq!(map.extents.first().unwrap().kind, DiskExtentKind::Data);
        assert_eq!(map.extents.last().unwrap().kind, DiskExtentKind::Zero);
        let status = t.store.disk_status(&name("web-3"), DiskName::Root).unwrap();
        assert!(!status.cow && status.data_allocated < 64 << 10);
        t.store.remove_instance(&name("web-3")).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_refused_and_leaves_nothing() {
        let t = store_with_image();
        let of = || InstanceSpec::of(name("debian"));
        let refuses = |kind, reason: &str, spec: InstanceSpec| {
            for no_cow in [false, true] {
                let spec = InstanceSpec { no_cow, ..spec.clone() };
                t.refuses(kind, reason, |store| store.create_instance(&name("new"), &spec, &NoProgress));
            }
        };
        refuses(ErrorKind::NotFound, "image nobody", InstanceSpec::of(name("nobody")));
        refuses(ErrorKind::NotFound, "flavor nobody", InstanceSpec { flavor: Some(name("nobody")), ..of() });
        refuses(ErrorKind::Invalid, "smaller than image", InstanceSpec { root_size: Some(512), ..of() });
        refuses(
            ErrorKind::Invalid,
            "multiple of 512",
            InstanceSpec { root_size: Some((2 << 20) + 1), ..of() },
        );
        refuses(ErrorKind::Invalid, "16 TiB", InstanceSpec { root_size: Some(17 << 40), ..of() });
        refuses(ErrorKind::Invalid, "local disk", InstanceSpec { local_size: Some(0), ..of() });
        refuses(ErrorKind::Invalid, "block size", InstanceSpec { block_bytes: Some(1000), ..of() });
        t.refuses(ErrorKind::Exists, "exists already", |store| {
            store.create_instance(&name("web-3"), &of(), &NoProgress)
        });
        let no_cow = InstanceSpec { no_cow: true, ..of() };
        t.refuses(ErrorKind::Interrupted, "interrupted", |store| {
            store.create_instance(&name("new"), &no_cow, &CancelAfter::new(0))
        });
        t.refuses(ErrorKind::NotFound, "nobody", |store| store.open_disk(&name("nobody"), DiskName::Root));
    }

    #[test]
    fn a_map_tells_where_each_byte_comes_from_while_the_disk_is_open() {
        let t = store_with_image();
        let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
        disk.write_at(8192, &[5; 4096]).unwrap();
        disk.zero(0, 4096).unwrap();
        let map = t.store.disk_map(&name("web-3"), DiskName::Root).unwrap();
        let found: Vec<_> =
            map.extents.iter().map(|extent| (extent.offset, extent.len, extent.kind)).collect();
        let end = (1 << 20) - 8192;
        assert_eq!(
            found,
            [
                (0, 4096, DiskExtentKind::Zero),
                (4096, 4096, DiskExtentKind::Base),
                (8192, 4096, DiskExtentKind::Data),
                (12288, end - 12288, DiskExtentKind::BaseZero),
                (end, 8192, DiskExtentKind::Base),
            ]
        );
        assert_eq!((map.size, map.block_bytes), (1 << 20, Some(4096)));
        let local = t.store.disk_map(&name("web-3"), DiskName::Local).unwrap();
        assert_eq!(local.extents, [DiskExtent { offset: 0, len: 8 << 20, kind: DiskExtentKind::BaseZero }]);
    }

    #[test]
    fn damage_to_a_record_is_told_with_the_file_and_stops_no_removal() {
        let t = store_with_image();
        let path = t.path("instances/web-3/instance.json");
        let good = std::fs::read_to_string(&path).unwrap();
        for (from, to) in [
            ("{", ""),
            ("debian", "../debian"),
            ("\"cow\": true", "\"cow\": false"),
            ("\"cow\"", "\"cow2\""),
            ("1048576", "1048577"),
            ("4096", "4095"),
        ] {
            File::create(&path).unwrap().write_all(good.replacen(from, to, 1).as_bytes()).unwrap();
            let error = t.store.instance(&name("web-3")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{from}: {error}");
            assert!(error.to_string().contains("instance.json"), "{error}");
            assert_eq!(t.store.instance_names().unwrap(), [name("web-3")]);
            assert!(t.store.remove_image(&name("debian")).is_err(), "what refers to the base is not known");
        }
        t.store.remove_instance(&name("web-3")).unwrap();
        t.store.remove_image(&name("debian")).unwrap();
    }

    #[test]
    fn links_inside_the_store_are_not_followed() {
        let t = store_with_image();
        let secret = t.file("secret", &[7; 4096]);
        for part in ["disk.map", "disk.data"] {
            let path = t.path("instances/web-3").join(part);
            let kept = t.path("kept");
            std::fs::hard_link(&path, &kept).unwrap();
            std::fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink(&secret, &path).unwrap();
            assert_eq!(
                t.store.open_disk(&name("web-3"), DiskName::Root).unwrap_err().kind(),
                ErrorKind::Corrupt
            );
            std::fs::remove_file(&path).unwrap();
            std::fs::hard_link(&kept, &path).unwrap();
            std::fs::remove_file(&kept).unwrap();
        }
        std::os::unix::fs::symlink(t.path("instances/web-3"), t.path("instances/link")).unwrap();
        assert!(t.store.open_disk(&name("link"), DiskName::Root).is_err());
        assert_eq!(std::fs::read(&secret).unwrap(), [7; 4096]);
    }

    #[test]
    fn two_creators_of_one_name_have_one_winner() {
        let t = store_with_image();
        let won = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let store = Store::open(t.folder.path()).unwrap();
                    match store.create_instance(&name("race"), &InstanceSpec::of(name("debian")), &NoProgress)
                    {
                        Ok(_) => _ = won.fetch_add(1, Ordering::Relaxed),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::Exists, "{error}"),
                    }
                });
            }
        });
        assert_eq!(won.load(Ordering::Relaxed), 1);
        assert_eq!(t.names("tmp").len(), 0);
    }
}

mod crashing {
    use super::*;

    /// What a process that was killed in the middle leaves behind.
    fn leave_sign(t: &TestStore) {
        File::create(t.path("tmp/image-0123")).unwrap();
    }

    #[test]
    fn the_next_opening_removes_what_nothing_refers_to() {
        let t = store_with_image();
        let kept = t.names("bases");
        let orphan = "ab".repeat(32);
        std::fs::create_dir(t.path("bases").join(&orphan)).unwrap();
        File::create(t.path("bases").join(&orphan).join("base.raw")).unwrap();
        File::create(t.path("boot").join(&orphan)).unwrap();
        File::create(t.path("attrs/image-gone.json")).unwrap();
        File::create(t.path("attrs/image-debian.json")).unwrap();
        Store::open(t.folder.path()).unwrap();
        assert_eq!(t.names("bases").len(), 2, "without a sign nothing is counted");
        leave_sign(&t);
        Store::open(t.folder.path()).unwrap();
        assert_eq!(t.names("bases"), kept);
        assert_eq!(t.names("boot").len() + t.names("tmp").len(), 0);
        assert_eq!(t.names("attrs"), ["image-debian.json"]);
    }

    #[test]
    fn nothing_is_removed_while_a_record_cannot_be_read() {
        let t = store_with_image();
        let before = t.names("bases");
        let record = t.path("images/debian.json");
        let good = std::fs::read(&record).unwrap();
        File::create(&record).unwrap();
        leave_sign(&t);
        Store::open(t.folder.path()).unwrap();
        assert_eq!((t.names("bases"), t.names("tmp").len()), (before, 1));
        File::create(&record).unwrap().write_all(&good).unwrap();
        Store::open(t.folder.path()).unwrap();
        assert_eq!(t.names("tmp").len(), 0);
    }

    #[test]
    fn a_removed_instance_that_was_not_deleted_is_deleted_later() {
        let t = store_with_image();
        std::fs::create_dir(t.path("tmp/removed-0123")).unwrap();
        File::create(t.path("tmp/removed-0123/disk.data")).unwrap();
        Store::open(t.folder.path()).unwrap();
        assert_eq!(t.names("tmp").len(), 0);
        t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
    }
}
