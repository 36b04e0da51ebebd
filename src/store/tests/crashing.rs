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
