//! Host filesystems that are full, that cannot hold a store, or that can share blocks. They are mounted here, which
//! only root may.

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::*;

/// A filesystem on a temporary folder until dropped.
struct Mounted {
    folder: tempfile::TempDir,
}

impl Mounted {
    fn new(kind: &str, options: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        mount("none", folder.path(), kind, MountFlags::empty(), options.as_c_str())
            .unwrap_or_else(|errno| panic!("mounting {kind} needs root: {errno}"));
        Self { folder }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.folder.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_filesystem_without_holes_is_refused_by_name() {
    let mounted = Mounted::new("ramfs", "mode=700");
    let path = mounted.folder.path().join("store");
    let error = Store::init(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("ramfs") && error.hint().is_some(), "{error}");
    assert!(!path.exists(), "nothing is left");
}

#[test]
fn a_full_host_filesystem_is_told_and_nothing_is_left() {
    let mounted = Mounted::new("tmpfs", "mode=700,size=4m");
    let store = Store::init(mounted.folder.path()).unwrap();
    let t = store_with_image();
    let big = t.file("big", &[7; 8 << 20]);
    let request = ImportRequest { source: big, ..ImportRequest::default() };
    let used = || rustix::fs::statvfs(mounted.folder.path()).unwrap().f_bfree;
    let free = used();
    let error = store.import_image(&name("big"), &request, &NoProgress).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(error.to_string().contains("needs 8 MiB") && error.hint().is_some(), "{error}");
    assert_eq!((store.images().unwrap(), used()), (vec![], free));

    let small = ImportRequest { source: t.file("small", &[7; 3 << 20]), ..ImportRequest::default() };
    store.import_image(&name("small"), &small, &NoProgress).unwrap();
    let free = used();
    let copy = InstanceSpec { no_cow: true, ..InstanceSpec::of(name("small")) };
    let error = store.create_instance(&name("copy"), &copy, &NoProgress).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert_eq!((store.instances().unwrap(), used()), (vec![], free));
    store.create_instance(&name("overlay"), &InstanceSpec::of(name("small")), &NoProgress).unwrap();
}
