//! Instances of which the root is an overlay and the local disk, which is over nothing, a plain file; and stores of before,
//! in which both are overlays.

use super::*;

fn write_read(t: &TestStore, instance: &str, disk: DiskName) {
    let open = t.store.open_disk(&name(instance), disk).unwrap();
    open.write_at(70_000, b"written").unwrap();
    open.flush().unwrap();
    open.close().unwrap();
    let mut bytes = [0; 7];
    let open = t.store.open_disk(&name(instance), disk).unwrap();
    open.read_at(70_000, &mut bytes).unwrap();
    open.close().unwrap();
    assert_eq!(bytes, *b"written");
}

#[test]
fn a_local_disk_over_nothing_is_a_plain_file_beside_a_root_that_is_an_overlay() {
    let t = store_with_image();
    let spec = InstanceSpec {
        local_size: Some(8 << 20),
        block_bytes: Some(16 << 10),
        ..InstanceSpec::of(name("debian"))
    };
    t.store.create_instance(&name("web-4"), &spec, &NoProgress).unwrap();
    let instance = t.store.instance(&name("web-4")).unwrap();
    assert!(instance.cow);
    assert_eq!(instance.root.block_bytes, Some(16 << 10));
    assert_eq!(instance.local, Some(InstanceDisk { base: None, size: 8 << 20, block_bytes: None }));
    let mut files = t.names("instances/web-4");
    files.sort();
    assert_eq!(files, ["disk.data", "disk.local.raw", "disk.map", "instance.json"]);
    let raw = t.path("instances/web-4/disk.local.raw").metadata().unwrap();
    assert_eq!((raw.len(), raw.blocks(), raw.permissions().mode() & 0o777), (8 << 20, 0, 0o600));

    write_read(&t, "web-4", DiskName::Root);
    write_read(&t, "web-4", DiskName::Local);
    let status = t.store.instance_status(&name("web-4")).unwrap();
    let [root, local] = &status.disks[..] else { panic!("{status:?}") };
    assert!(root.cow && root.map_allocated > 0 && root.data_allocated > 0, "{root:?}");
    assert!(!local.cow && local.map_allocated == 0 && local.data_allocated > 0, "{local:?}");
    assert_eq!(*local, t.store.disk_status(&name("web-4"), DiskName::Local).unwrap());
    let map = t.store.disk_map(&name("web-4"), DiskName::Local).unwrap();
    assert_eq!((map.base, map.block_bytes, map.extents.len()), (None, None, 3));
    assert_eq!(map.extents[1].kind, DiskExtentKind::Data);
    let usage = t.store.usage().unwrap();
    assert_eq!((usage.instances, usage.disks, usage.promised), (2, 4, (2 << 20) + (16 << 20)));
    assert_eq!(usage.independent, local.data_allocated);
    assert!(usage.overlays > 0 && usage.maps > 0, "{usage:?}");

    let now = rustix::fs::Timespec { tv_sec: 1_000_000, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
    for (disk, file) in [(DiskName::Root, "disk.data"), (DiskName::Local, "disk.local.raw")] {
        t.store.set_disk_times_of(&name("web-4"), instance.id, disk, &times).unwrap();
        assert_eq!(t.path("instances/web-4").join(file).metadata().unwrap().mtime(), 1_000_000, "{file}");
    }
    t.refuses(ErrorKind::Busy, "web-4", |store| store.remove_image(&name("debian")));
    t.store.remove_instance(&name("web-4")).unwrap();
    t.store.remove_instance(&name("web-3")).unwrap();
    t.store.remove_image(&name("debian")).unwrap();
}

#[test]
fn a_flavor_without_a_filesystem_gives_a_plain_file_and_one_with_a_filesystem_an_overlay() {
    let t = store_with_image();
    let add = |flavor: &str, fs| {
        t.store.add_flavor(&name(flavor), &FlavorSpec { local_size: 1 << 20, fs }, &NoProgress).unwrap()
    };
    let base = add("swapped", FlavorFs::Swap).base;
    add("blank", FlavorFs::None);
    for (instance, flavor, expected) in [("a", "blank", (None, None)), ("b", "swapped", (base, Some(4096)))] {
        let spec = InstanceSpec { flavor: Some(name(flavor)), ..InstanceSpec::of(name("debian")) };
        let made = t.store.create_instance(&name(instance), &spec, &NoProgress).unwrap();
        let local = made.local.unwrap();
        assert_eq!((local.base, local.block_bytes), expected, "{flavor}");
        let status = t.store.instance_status(&name(instance)).unwrap();
        assert_eq!(status.disks[1].cow, base.is_some() && local.base.is_some());
        write_read(&t, instance, DiskName::Local);
    }
    t.store.remove_flavor(&name("blank")).unwrap();
    t.refuses(ErrorKind::Busy, "overlays need it: b", |store| store.remove_flavor(&name("swapped")));
}

#[test]
fn a_plain_local_disk_that_is_open_is_neither_opened_again_nor_removed() {
    let t = store_with_image();
    let disk = t.store.open_disk(&name("web-3"), DiskName::Local).unwrap();
    t.refuses(ErrorKind::Busy, "web-3/disk.local", |store| store.open_disk(&name("web-3"), DiskName::Local));
    t.refuses(ErrorKind::Busy, "web-3/disk.local", |store| store.remove_instance(&name("web-3")));
    drop(disk);
    t.store.remove_instance(&name("web-3")).unwrap();
}

/// It was taken for one that had been removed meanwhile, and left out without a word.
#[test]
fn an_instance_of_which_a_disk_is_missing_is_told_of_where_space_is_counted() {
    let t = store_with_image();
    for file in ["disk.local.raw", "disk.data"] {
        let path = t.path("instances/web-3").join(file);
        let aside = t.path("instances/web-3/aside");
        rustix::fs::rename(&path, &aside).unwrap();
        let usage = t.store.usage().unwrap();
        assert_eq!((usage.instances, usage.unreadable), (0, vec![name("web-3")]), "{file}");
        rustix::fs::rename(&aside, &path).unwrap();
    }
    assert_eq!(t.store.usage().unwrap().instances, 1);
}

#[test]
fn many_instances_with_plain_local_disks_are_made_together() {
    let t = store_with_image();
    let spec = InstanceSpec { local_size: Some(1 << 20), ..InstanceSpec::of(name("debian")) };
    let wanted: Vec<_> = (0..20).map(|number| (name(&format!("ci-{number}")), spec.clone())).collect();
    t.store.create_instances(&wanted, &NoProgress, |_| Ok(())).unwrap();
    write_read(&t, "ci-7", DiskName::Local);
    write_read(&t, "ci-19", DiskName::Root);
    assert_eq!(super::checking::check(&t), []);
}

/// Nothing of it changes but that newer programs go on with it.
#[test]
fn a_store_of_version_1_goes_on_with_overlays_only() {
    let t = store_of_version_1();
    t.import("debian", &image_bytes()).unwrap();
    let spec = InstanceSpec { local_size: Some(8 << 20), ..InstanceSpec::of(name("debian")) };
    for instance in ["web-3", "web-4"] {
        let made = t.store.create_instance(&name(instance), &spec, &NoProgress).unwrap();
        assert_eq!(made.local, Some(InstanceDisk { base: None, size: 8 << 20, block_bytes: Some(4096) }));
        write_read(&t, instance, DiskName::Local);
    }
    let status = t.store.instance_status(&name("web-3")).unwrap();
    assert!(status.disks.iter().all(|disk| disk.cow && disk.map_allocated > 0), "{status:?}");
    assert_eq!(super::checking::check(&t), []);
    t.store.remove_instance(&name("web-4")).unwrap();
    let record = std::fs::read_to_string(t.path("cowdisk-store.json")).unwrap();
    assert!(record.contains("\"version\": 1"), "{record}");

    // To a program of before this would be damage, and so it is here.
    let path = t.path("instances/web-3/instance.json");
    let good = std::fs::read_to_string(&path).unwrap();
    let (root, local) = good.split_once("\"local\"").unwrap();
    let mixed = format!("{root}\"local\"{}", local.replace("4096", "null"));
    File::create(&path).unwrap().write_all(mixed.as_bytes()).unwrap();
    assert_eq!(t.store.instance(&name("web-3")).unwrap_err().kind(), ErrorKind::Corrupt);
}

/// What came with it from a store of before.
#[test]
fn an_overlay_over_nothing_goes_on_in_a_store_of_version_2() {
    let t = store_of_version_1();
    t.import("debian", &image_bytes()).unwrap();
    let spec = InstanceSpec { local_size: Some(8 << 20), ..InstanceSpec::of(name("debian")) };
    t.store.create_instance(&name("web-3"), &spec, &NoProgress).unwrap();
    write_read(&t, "web-3", DiskName::Local);
    // Nobody knows of what version a store is that has lost its superblock; whatever is in it can be read afterwards.
    std::fs::remove_file(t.path("cowdisk-store.json")).unwrap();
    assert!(super::checking::repair(&t).is_clean());
    let record = std::fs::read_to_string(t.path("cowdisk-store.json")).unwrap();
    assert!(record.contains("\"version\": 2"), "{record}");
    let store = Store::open(t.folder.path()).unwrap().with_run_dir(t.run.path());
    let t = TestStore { store, ..t };
    write_read(&t, "web-3", DiskName::Local);
    assert!(t.store.instance_status(&name("web-3")).unwrap().disks[1].cow);
    t.store.create_instance(&name("web-4"), &spec, &NoProgress).unwrap();
    assert!(!t.store.instance_status(&name("web-4")).unwrap().disks[1].cow);
    assert_eq!(super::checking::check(&t), []);
}

#[test]
fn a_record_of_a_plain_disk_with_a_base_beside_an_overlay_is_damage() {
    let t = store_with_image();
    let base = t.store.image(&name("debian")).unwrap().base;
    let path = t.path("instances/web-3/instance.json");
    let good = std::fs::read_to_string(&path).unwrap();
    let (root, local) = good.split_once("\"local\"").unwrap();
    for bad in [
        format!("{root}\"local\"{}", local.replacen("\"base\": null", &format!("\"base\": \"{base}\""), 1)),
        format!("{}\"local\"{local}", root.replace("4096", "null")),
        good.replace("\"cow\": true", "\"cow\": false"),
    ] {
        assert_ne!(bad, good);
        File::create(&path).unwrap().write_all(bad.as_bytes()).unwrap();
        let error = t.store.instance(&name("web-3")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    File::create(&path).unwrap().write_all(good.as_bytes()).unwrap();
    t.store.instance(&name("web-3")).unwrap();
}
