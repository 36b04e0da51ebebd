//! Flavors.

use super::*;

fn add(t: &TestStore, flavor: &str, local_size: u64, fs: FlavorFs) -> Result<Flavor> {
    t.store.add_flavor(&name(flavor), &FlavorSpec { local_size, fs }, &NoProgress)
}

#[test]
fn a_flavor_without_a_filesystem_needs_no_base() {
    let t = empty_store();
    let flavor = add(&t, "small", 1 << 30, FlavorFs::None).unwrap();
    assert_eq!(flavor.base, None);
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
        let flavor = add(&t, fs.as_str(), size, fs).unwrap();
        let (bytes, allocated) = t.store.base_usage(&flavor.base.unwrap()).unwrap();
        assert_eq!(bytes, size);
        assert!(allocated <= host_max, "{fs}: {allocated} bytes for a blank disk");
        let base = std::fs::read(t.path(&format!("bases/{}/base.raw", flavor.base.unwrap()))).unwrap();
        assert!(base[..4096].windows(10).any(|window| window == LOCAL_LABEL.as_bytes()), "{fs}: labelled");
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

/// A flavor's base could not be looked at again: after a restore without times no local disk over it ever opened.
#[test]
fn verify_mends_a_flavor_whose_base_was_only_touched() {
    let t = empty_store();
    t.import("debian", &image_bytes()).unwrap();
    let base = add(&t, "swapped", 1 << 20, FlavorFs::Swap).unwrap().base.unwrap();
    add(&t, "blank", 1 << 20, FlavorFs::None).unwrap();
    let spec = InstanceSpec { flavor: Some(name("swapped")), ..InstanceSpec::of(name("debian")) };
    t.store.create_instance(&name("web-3"), &spec, &NoProgress).unwrap();
    let open = || t.store.open_disk(&name("web-3"), DiskName::Local).map(drop);
    let path = t.path(&format!("bases/{base}/base.raw"));
    File::open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let error = open().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.hint().unwrap().contains("cowdisk flavor verify"), "{error:?}");
    t.store.verify_flavor(&name("blank"), &NoProgress).unwrap();
    t.store.verify_flavor(&name("swapped"), &NoProgress).unwrap();
    open().unwrap();

    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    File::options().write(true).open(&path).unwrap().write_all_at(&[0xff], 70_000).unwrap();
    let error = t.store.verify_flavor(&name("swapped"), &NoProgress).unwrap_err();
    assert!(error.to_string().contains("swapped") && error.hint().unwrap().contains("backup"), "{error:?}");
    assert_eq!(open().unwrap_err().kind(), ErrorKind::Corrupt);
}
