//! Instances and their disks.

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
    let maps: Vec<_> = std::fs::read_dir(t.store.run_dir().unwrap()).unwrap().collect();
    assert_eq!(maps.len(), 0, "its live maps are gone too");
    t.refuses(ErrorKind::NotFound, "web-3", |store| store.remove_instance(&name("web-3")));
}

/// Disks were opened by name after their instance's id had been looked at: one removed and made anew in between was
/// served in place of the old one.
#[test]
fn a_disk_asked_for_by_id_is_never_that_of_a_later_instance() {
    let t = store_with_image();
    let (web, root) = (name("web-3"), DiskName::Root);
    let first = t.store.instance(&web).unwrap().id;
    t.store.open_disk_of(&web, first, root).unwrap().close().unwrap();
    t.store.remove_instance(&web).unwrap();
    t.store.create_instance(&web, &InstanceSpec::of(name("debian")), &NoProgress).unwrap();
    let second = t.store.instance(&web).unwrap().id;
    let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
    t.refuses(ErrorKind::NotFound, "web-3", |store| store.open_disk_of(&web, first, root));
    t.refuses(ErrorKind::NotFound, "web-3", |store| store.disk_status_of(&web, first, root));
    t.refuses(ErrorKind::NotFound, "web-3", |store| store.set_disk_times_of(&web, first, root, &times));
    t.store.set_disk_times_of(&web, second, root, &times).unwrap();
    assert_eq!(t.store.disk_status_of(&web, second, root).unwrap().size, 1 << 20);
    t.store.open_disk_of(&web, second, root).unwrap();
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
    refuses(ErrorKind::Invalid, "multiple of 512", InstanceSpec { root_size: Some((2 << 20) + 1), ..of() });
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

/// Cancels when it is asked for the n-th time.
struct CancelAtLook(std::sync::atomic::AtomicU64);

impl CancelAtLook {
    fn new(look: u64) -> Self {
        Self(look.into())
    }
}

impl Progress for CancelAtLook {
    fn begin(&self, _what: &str, _total_bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
    fn cancelled(&self) -> bool {
        self.0.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) == 1
    }
}

#[test]
fn many_instances_are_made_together_or_not_at_all() {
    let t = store_with_image();
    let wanted = |names: &[&str]| -> Vec<(ObjectName, InstanceSpec)> {
        names.iter().map(|text| (name(text), InstanceSpec::of(name("debian")))).collect()
    };
    t.refuses(ErrorKind::Exists, "web-3", |store| {
        store.create_instances(&wanted(&["a", "b", "web-3"]), &NoProgress, |_| Ok(()))
    });
    t.refuses(ErrorKind::Invalid, "named twice", |store| {
        store.create_instances(&wanted(&["a", "b", "a"]), &NoProgress, |_| Ok(()))
    });
    t.refuses(ErrorKind::Interrupted, "interrupted", |store| {
        store.create_instances(&wanted(&["a", "b", "c"]), &CancelAtLook::new(3), |_| Ok(()))
    });
    let names: Vec<String> = (0..150).map(|number| format!("ci-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut told = Vec::new();
    t.store
        .create_instances(&wanted(&names), &NoProgress, |made| {
            told.push(made.clone());
            Ok(())
        })
        .unwrap();
    assert!(told.iter().map(|made| made.name.as_str()).eq(names));
    for made in &told {
        assert_eq!(t.store.instance(&made.name).unwrap(), *made);
    }
    let disk = t.store.open_disk(&name("ci-149"), DiskName::Root).unwrap();
    disk.write_at(0, &[7; 4096]).unwrap();
    disk.close().unwrap();
}

#[test]
fn a_map_tells_where_each_byte_comes_from_while_the_disk_is_open() {
    let t = store_with_image();
    let disk = t.store.open_disk(&name("web-3"), DiskName::Root).unwrap();
    disk.write_at(8192, &[5; 4096]).unwrap();
    disk.zero(0, 4096).unwrap();
    let map = t.store.disk_map(&name("web-3"), DiskName::Root).unwrap();
    let found: Vec<_> = map.extents.iter().map(|extent| (extent.offset, extent.len, extent.kind)).collect();
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
    assert_eq!(local.extents, [DiskExtent { offset: 0, len: 8 << 20, kind: DiskExtentKind::Zero }]);
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
        ("4096", "null"),
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
        assert_eq!(t.store.open_disk(&name("web-3"), DiskName::Root).unwrap_err().kind(), ErrorKind::Corrupt);
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
                match store.create_instance(&name("race"), &InstanceSpec::of(name("debian")), &NoProgress) {
                    Ok(_) => _ = won.fetch_add(1, Ordering::Relaxed),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Exists, "{error}"),
                }
            });
        }
    });
    assert_eq!(won.load(Ordering::Relaxed), 1);
    assert_eq!(t.names("tmp").len(), 0);
}

/// Instances that threads share among them are listed as one by one.
#[test]
fn a_long_list_is_whole_and_in_order() {
    let t = store_with_image();
    let made = t.path("instances/web-3");
    let record = std::fs::read_to_string(made.join("instance.json")).unwrap();
    let id = t.store.instance(&name("web-3")).unwrap().id;
    for n in 0..1500 {
        let folder = t.path(&format!("instances/vm-{n}"));
        std::fs::create_dir(&folder).unwrap();
        for file in ["disk.map", "disk.data", "disk.local.raw"] {
            std::fs::hard_link(made.join(file), folder.join(file)).unwrap();
        }
        let own = record.replace(&id.to_string(), &format!("{n:032x}"));
        let file = File::create(folder.join("instance.json")).unwrap();
        file.write_all_at(own.as_bytes(), 0).unwrap();
    }
    let listed = t.store.instance_statuses().unwrap();
    assert_eq!(listed.len(), 1501);
    assert!(listed.is_sorted_by(|one, next| one.instance.name < next.instance.name));
    let one_by_one = |found: &InstanceStatus| t.store.instance_status(&found.instance.name).unwrap();
    assert!(listed.iter().all(|found| *found == one_by_one(found)));
    for file in ["disk.local.raw", "disk.data"] {
        std::fs::remove_file(t.path("instances/vm-700").join(file)).unwrap();
        let message = format!("vm-700/{file}: missing");
        t.refuses(ErrorKind::NotFound, &message, |store| store.instance_statuses());
    }
}

/// A write that a process had under way when it was killed could land after newer ones of the next process.
#[test]
fn a_disk_is_not_opened_while_a_request_of_a_dead_process_may_be_under_way() {
    let t = store_with_image();
    let spec = InstanceSpec { no_cow: true, ..InstanceSpec::of(name("debian")) };
    t.store.create_instance(&name("full"), &spec, &NoProgress).unwrap();
    for (instance, file) in [("web-3", "disk.data"), ("full", "disk.raw")] {
        let path = t.path(&format!("instances/{instance}/{file}"));
        let held = File::options().read(true).write(true).open(path).unwrap();
        crate::storage::aio::hold(&held).unwrap();
        let (opened, word) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let disk = t.store.open_disk(&name(instance), DiskName::Root).unwrap();
                opened.send(disk.close()).unwrap();
            });
            let early = word.recv_timeout(std::time::Duration::from_millis(50));
            assert!(early.is_err(), "not waited for; or temporary files are on no local disk");
            drop(held);
            word.recv().unwrap().unwrap();
        });
    }
}
