//! Importing and copying where there is no room for it.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use cowdisk::ErrorKind;
use cowdisk::store::{ImportRequest, InstanceSpec, NoProgress, SourceFormat, Store};

use crate::host::{Kind, SmallHost};
use crate::mount::{MIB, name};

/// A file of `mib` MiB without a zero in it.
fn source(path: &Path, mib: u64) {
    let mut file = File::create(path).unwrap();
    for number in 0..mib {
        file.write_all(&vec![u8::try_from(number % 255).unwrap() + 1; MIB as usize]).unwrap();
    }
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_copied_and_nothing_is_left() {
    let host = SmallHost::new(Kind::Ext4);
    let store = Store::init(&host.path().join("store")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("image.raw");
    source(&raw, 120);
    let request =
        ImportRequest { source: raw.clone(), format: Some(SourceFormat::Raw), ..Default::default() };
    let before = host.available();
    let error = store.import_image(&name("large"), &request, &NoProgress).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let text = error.to_string();
    assert!(text.contains("needs 120 MiB") && text.contains("kept in reserve"), "{text}");
    assert!(error.hint().is_some());
    assert!(host.available() + MIB > before);

    source(&raw, 60);
    store.import_image(&name("fits"), &request, &NoProgress).unwrap();
    let spec = InstanceSpec { no_cow: true, ..InstanceSpec::of(name("fits")) };
    let error = store.create_instance(&name("copy"), &spec, &NoProgress).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("needs 60 MiB"), "{error}");
    assert!(store.instance_names().unwrap().is_empty());
}

#[test]
fn a_conversion_that_runs_out_of_room_is_stopped_at_the_reserve_and_leaves_nothing() {
    let host = SmallHost::new(Kind::Ext4);
    let store = Store::init(&host.path().join("store")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (raw, packed) = (folder.path().join("image.raw"), folder.path().join("image.qcow2"));
    source(&raw, 120);
    let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
    let status = Command::new("qemu-img").args(convert).arg(&raw).arg(&packed).status();
    assert!(status.expect("qemu-img: run scripts/install-deps test").success());
    let before = host.available();
    let request = ImportRequest { source: packed, ..Default::default() };
    let error = store.import_image(&name("packed"), &request, &NoProgress).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(host.available() + MIB > before, "{} of {before} are left", host.available());
    assert!(store.image_names().unwrap().is_empty());
}
