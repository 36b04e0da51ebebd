//! Images.

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
    let import =
        |request: ImportRequest| move |store: &Store| store.import_image(&name("new"), &request, &NoProgress);
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
    std::process::Command::new("qemu-img").arg("--version").output().expect("qemu-img, of qemu-utils");
    let t = empty_store();
    let mut bytes = vec![0; 3 << 20];
    bytes[1 << 20..(1 << 20) + 70_000].fill(0x77);
    let raw = t.file("raw.img", &bytes);
    let plain = t.import("plain", &bytes).unwrap();
    // So that each conversion's own file becomes the base.
    t.store.remove_image(&name("plain")).unwrap();
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
        // Every other one can be read by its owner only: `qemu-img` need not be the owner.
        let mode = if options.len() % 2 == 0 { 0o600 } else { 0o644 };
        std::fs::set_permissions(&source, std::fs::Permissions::from_mode(mode)).unwrap();
        let request = ImportRequest { source: source.clone(), ..ImportRequest::default() };
        let progress = CancelAfter::new(u64::MAX);
        let image = t.store.import_image(&name("new"), &request, &progress).unwrap();
        assert_eq!(image.format.as_str(), format);
        assert_eq!(image.base, plain.base, "{format} {options}");
        let base = t.path("bases").join(image.base.to_string());
        assert_eq!(t.names(base.to_str().unwrap()), ["base.json", "base.raw"]);
        for (path, mode) in [(base.clone(), 0o700), (base.join("base.raw"), 0o400)] {
            let found = path.metadata().unwrap();
            let owner = rustix::process::geteuid().as_raw();
            assert_eq!((found.uid(), found.mode() & 0o7777), (owner, mode), "{}", path.display());
        }
        t.store.remove_image(&name("new")).unwrap();
        std::fs::remove_file(source).unwrap();
    }
    assert_eq!(t.names("bases").len(), 0);
}

/// While it is being converted, a draft belongs to another user.
#[test]
fn a_conversion_that_fails_or_is_interrupted_leaves_nothing() {
    let t = empty_store();
    let raw = t.file("raw.img", &vec![0x77; 8 << 20]);
    let source = t.run.path().join("source.qcow2");
    let made = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &source])
        .status();
    assert!(made.unwrap().success(), "qemu-img is needed: scripts/install-deps");
    // Not for others to read, on another filesystem: the source is copied for the user who converts it.
    std::fs::set_permissions(&source, std::fs::Permissions::from_mode(0o600)).unwrap();
    let request = ImportRequest { source: source.clone(), ..ImportRequest::default() };
    for bytes in [0, 1 << 20, 5 << 20] {
        let progress = CancelAfter::new(bytes);
        t.refuses(ErrorKind::Interrupted, "interrupted", |store| {
            store.import_image(&name("new"), &request, &progress)
        });
    }
    // Its table of clusters lies where none may: only qemu-img notices.
    File::options().write(true).open(&source).unwrap().write_all_at(&[1], 47).unwrap();
    t.refuses(ErrorKind::Io, "qemu-img: exit code 1", |store| {
        store.import_image(&name("new"), &request, &NoProgress)
    });
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
    let text = verify().unwrap_err().to_string();
    assert!(text.contains("its size was 1048576 bytes, is 4096"), "{text}");
    std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    assert_eq!(verify().unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_base_that_changed_is_refused_with_what_changed() {
    let t = empty_store();
    let base = t.import("debian", &image_bytes()).unwrap().base;
    let path = t.path(&format!("bases/{base}/base.raw"));
    let refusal = || {
        let error = t.store.open_base(&base).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        (error.to_string(), error.hint().unwrap().to_owned())
    };
    let file = File::open(&path).unwrap();
    let stored = file.metadata().unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    let (text, hint) = refusal();
    assert!(text.contains("its modification time was 20"), "{text}");
    assert!(text.ends_with(", is 1970-01-01T00:00:00.000000000Z"), "{text}");
    assert!(hint.contains("cowdisk image verify"), "{hint}");

    // Another file with the same size, the same time and, as it happens, the same bytes.
    let copy = path.with_file_name("copy");
    std::fs::copy(&path, &copy).unwrap();
    File::open(&copy).unwrap().set_modified(stored.modified().unwrap()).unwrap();
    rustix::fs::renameat(rustix::fs::CWD, &copy, rustix::fs::CWD, &path).unwrap();
    let inode = std::fs::metadata(&path).unwrap().ino();
    let (text, hint) = refusal();
    let expected = format!("base {base}: its inode number was {}, is {inode}", stored.ino());
    assert_eq!(text, expected);
    assert!(hint.contains("cowdisk image verify"), "{hint}");
    t.store.verify_image(&name("debian"), &NoProgress).unwrap();
    t.store.open_base(&base).unwrap();

    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let (text, hint) = refusal();
    assert!(text.contains("its size was 1048576 bytes, is 4096; its modification time was"), "{text}");
    assert!(hint.contains("importing the same image again"), "{hint}");
}

#[test]
fn importing_again_repairs_a_damaged_base() {
    let t = store_with_image();
    let image = t.store.image(&name("debian")).unwrap();
    let path = t.path(&format!("bases/{}/base.raw", image.base));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&[0xff], 70_000).unwrap();
    file.set_modified(modified).unwrap();
    t.store.open_base(&image.base).unwrap();
    assert_eq!(t.store.verify_image(&name("debian"), &NoProgress).unwrap_err().kind(), ErrorKind::Corrupt);
    let error = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "from now on nothing opens over it: {error}");
    t.import("again", &image_bytes()).unwrap();
    t.store.verify_image(&name("debian"), &NoProgress).unwrap();
    t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
    assert_eq!(t.names("bases").len(), 1);

    std::fs::remove_file(path.with_file_name("base.json")).unwrap();
    assert_eq!(t.store.open_base(&image.base).unwrap_err().kind(), ErrorKind::Corrupt);
    t.import("once-more", &image_bytes()).unwrap();
    t.store.verify_image(&name("debian"), &NoProgress).unwrap();
}

/// The removal of a predecessor's attributes was not made durable: a crash could hand them to the new image.
#[test]
fn an_image_is_not_imported_before_the_attributes_of_its_predecessor_are_gone_for_good() {
    let mut t = empty_store();
    File::create(t.path("attrs/image-debian.json")).unwrap();
    t.store.attrs = Dir::open_unsyncable(&t.path("attrs")).unwrap();
    t.import("debian", &image_bytes()).unwrap_err();
    assert_eq!(t.names("images").len() + t.names("bases").len(), 0);
    // They have no name any more, but whether that is durable nobody knows: once, that was taken for gone.
    assert!(t.names("attrs").is_empty());
    t.import("debian", &image_bytes()).unwrap_err();
    assert_eq!(t.names("tmp").len(), 2, "the signs that something is to be done");
    t.store.attrs = Dir::open_path(&t.path("attrs")).unwrap();
    t.import("debian", &image_bytes()).unwrap();
    Store::open(t.folder.path()).unwrap();
    assert_eq!(t.names("tmp").len(), 0);
}

/// The damaged base used to be removed before the new one came, so that a crash left overlays without any.
#[test]
fn a_base_that_is_being_repaired_is_never_gone() {
    let t = store_with_image();
    let path = t.path(&format!("bases/{}/base.raw", t.store.image(&name("debian")).unwrap().base));
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut gone = 0;
            while !done.load(Ordering::Relaxed) {
                gone += u32::from(!path.exists());
            }
            gone
        });
        for _ in 0..50 {
            let file = File::open(&path).unwrap();
            file.set_modified(std::time::UNIX_EPOCH).unwrap();
            drop(file);
            t.import("again", &image_bytes()).unwrap();
            t.store.remove_image(&name("again")).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(watch.join().unwrap(), 0);
    });
    t.store.open_disk(&name("web-3"), DiskName::Root).unwrap().close().unwrap();
    assert_eq!(t.names("tmp"), [""; 0]);
}

#[test]
fn images_that_name_other_files_are_refused_as_qemu_writes_them() {
    std::process::Command::new("qemu-img").arg("--version").output().expect("qemu-img, of qemu-utils");
    let t = empty_store();
    let secret = t.file("secret.raw", &[0x5e; 1 << 20]);
    let secret = secret.to_str().unwrap();
    let data_file = format!("data_file={}/data", t.run.path().display());
    for (reason, file, arguments) in [
        ("backing file", "a.qcow2", &["-f", "qcow2", "-b", secret, "-F", "raw"][..]),
        ("backing file", "b.qcow2", &["-f", "qcow2", "-o", "compat=0.10", "-b", secret, "-F", "raw"]),
        ("another file", "c.qcow2", &["-f", "qcow2", "-o", &data_file]),
        ("another file", "d.qcow2", &["-f", "qcow2", "-o", &format!("{data_file},data_file_raw=on")]),
        ("qcow (version 1)", "e.qcow", &["-f", "qcow"]),
        ("qed", "f.qed", &["-f", "qed"]),
        ("vhd", "g.vhd", &["-f", "vpc"]),
        ("vmdk descriptor", "h.vmdk", &["-f", "vmdk", "-o", "subformat=monolithicFlat"]),
        ("vmdk descriptor", "i.vmdk", &["-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"]),
    ] {
        let source = t.run.path().join(file);
        let mut command = std::process::Command::new("qemu-img");
        let made = command.arg("create").arg("-q").args(arguments).arg(&source).arg("1M").status();
        if !made.unwrap().success() {
            println!("skipped: this qemu-img does not make {file}");
            continue;
        }
        let request = ImportRequest { source: source.clone(), ..ImportRequest::default() };
        t.refuses(ErrorKind::Invalid, reason, |store| {
            store.import_image(&name("new"), &request, &NoProgress)
        });
        let stated = ImportRequest { format: Some(SourceFormat::Raw), ..request };
        t.store.import_image(&name("bytes"), &stated, &NoProgress).unwrap();
        t.store.remove_image(&name("bytes")).unwrap();
    }
}
