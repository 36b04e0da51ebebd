//! What processes that died left behind.

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

/// An instance without its record used to count as no reference at all: its image could be removed, or was swept, and
/// the overlay was left without its base.
#[test]
fn nothing_is_removed_while_an_instance_lacks_its_record() {
    let t = store_with_image();
    t.store
        .add_flavor(&name("f"), &FlavorSpec { local_size: 1 << 20, fs: FlavorFs::Swap }, &NoProgress)
        .unwrap();
    let before = t.names("bases");
    let record = t.path("instances/web-3/instance.json");
    let good = std::fs::read(&record).unwrap();
    std::fs::remove_file(&record).unwrap();
    t.refuses(ErrorKind::Corrupt, "web-3/instance.json: missing", |store| store.instances());
    t.refuses(ErrorKind::Corrupt, "web-3/instance.json", |store| store.remove_image(&name("debian")));
    t.refuses(ErrorKind::Corrupt, "web-3/instance.json", |store| store.remove_flavor(&name("f")));
    // As if it had never been imported: now only the overlay knows the base.
    std::fs::remove_file(t.path("images/debian.json")).unwrap();
    leave_sign(&t);
    Store::open(t.folder.path()).unwrap();
    assert_eq!((t.names("bases"), t.names("tmp").len()), (before, 1));
    File::create(&record).unwrap().write_all(&good).unwrap();
    t.store.open_disk(&name("web-3"), DiskName::Root).unwrap().close().unwrap();
    std::fs::remove_file(&record).unwrap();
    t.store.remove_instance(&name("web-3")).unwrap();
    t.store.remove_flavor(&name("f")).unwrap();
}

#[test]
fn a_base_stays_if_only_the_overlay_itself_names_it() {
    let t = store_with_image();
    let before = t.names("bases");
    let record = t.path("instances/web-3/instance.json");
    let other = std::fs::read_to_string(&record).unwrap().replace(&before[0], &"ab".repeat(32));
    File::create(&record).unwrap().write_all(other.replace("debian", "other").as_bytes()).unwrap();
    t.refuses(ErrorKind::Busy, "web-3", |store| store.remove_image(&name("debian")));
    std::fs::remove_file(t.path("images/debian.json")).unwrap();
    leave_sign(&t);
    Store::open(t.folder.path()).unwrap();
    assert_eq!((t.names("bases"), t.names("tmp").len()), (before, 0));
    t.store.open_disk(&name("web-3"), DiskName::Root).unwrap().close().unwrap();
}
