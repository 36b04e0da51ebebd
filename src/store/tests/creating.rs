//! Making and opening stores.

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
    assert!(good.contains("\"version\": 2"), "{good}");
    put(&good.replace("\"version\": 2", "\"version\": 3").replace("uuid", "id"));
    let error = Store::open(t.folder.path()).unwrap_err();
    assert_eq!((error.kind(), error.hint()), (ErrorKind::Unsupported, Some("upgrade cowdisk")));
    for bad in [
        String::new(),
        "{}".to_owned(),
        good.replace("cowdisk-store", "other"),
        good.replace("\"version\": 2", "\"version\": 0"),
        good.replace("\"version\": 2", "\"version\": -1"),
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
