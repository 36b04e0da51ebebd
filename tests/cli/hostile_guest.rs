//! A guest that writes what it likes to its disk: nothing takes the bytes for more than bytes, and nothing of another
//! guest's ever shows.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use rustix::fs::FallocateFlags;

use super::mounted::{Mounted, needs_mount};
use super::{Place, qcow2_with_backing_file, text};

const SECRET: &str = "/etc/shadow";

/// First bytes of a disk that say that it is an image of another format, over a file of the host.
fn headers() -> Vec<(&'static str, Vec<u8>)> {
    let vmdk = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"{SECRET}\" 0\n"
    );
    let mut qed = b"QED\0".to_vec();
    qed.extend([0; 60]);
    qed.extend(SECRET.as_bytes());
    let mut vhd = b"conectix".to_vec();
    vhd.resize(512, 0);
    vec![
        ("qcow2", qcow2_with_backing_file(SECRET)),
        ("vmdk", vmdk.into_bytes()),
        ("qed", qed),
        ("vhd", vhd),
        ("vhdx", b"vhdxfile".to_vec()),
        ("json", format!("json:{{\"file.filename\":\"{SECRET}\"}}").into_bytes()),
    ]
}

fn open(place: &Place, path: &str) -> File {
    File::options().read(true).write(true).open(place.path(path)).unwrap()
}

/// CVE-2008-2004 and its kind: a disk that was raw is probed, found to be an image, and shows its guest a file of the
/// host.
#[test]
fn a_header_written_to_a_disk_is_content_whatever_it_says() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    for (format, header) in headers() {
        for path in ["mnt/instances/inst/disk", "mnt/instances/inst/disk.local", "mnt/instances/full/disk"] {
            let disk = open(place, path);
            let size = disk.metadata().unwrap().len();
            disk.write_all_at(&header, 0).unwrap();
            disk.sync_all().unwrap();
            drop(disk);
            let disk = open(place, path);
            let mut found = vec![0; header.len()];
            disk.read_exact_at(&mut found, 0).unwrap();
            assert_eq!((found, disk.metadata().unwrap().len()), (header.clone(), size), "{format} in {path}");
        }
        let said: String = [
            &["libvirt", "xml", "inst"][..],
            &["libvirt", "xml", "full"],
            &["libvirt", "xml", "inst", "--domain", "--type", "qemu"],
            &["instance", "show", "inst", "--json"],
            &["map", "inst", "--output", "json"],
            &["check", "--full", "--json"],
            &["df", "--json"],
        ]
        .iter()
        .map(|arguments| place.works(arguments))
        .collect();
        assert!(!said.contains(SECRET) && !said.contains("backing"), "{format}: {said}");
        // Each of the disks in XML: inst has two, in two documents, full has one.
        assert_eq!(said.matches("type=\"raw\"").count(), 5, "{format}: {said}");
        assert_eq!(said.matches("<source file=").count(), 5, "{format}: {said}");
    }
    // Only the importer looks at what bytes say, and leads nowhere.
    open(place, "mnt/instances/inst/disk").write_all_at(&qcow2_with_backing_file(SECRET), 0).unwrap();
    let disk = place.path("mnt/instances/inst/disk");
    let refused = place.run(&["image", "import", "x", &disk]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("the image has a backing file"), "{}", text(&refused.stderr));
    place.works(&["image", "import", "x", &disk, "--format", "raw"]);
    let bytes = fs::read(place.path("mnt/images/x")).unwrap();
    assert_eq!(bytes, fs::read(&disk).unwrap(), "as they are");
}

/// CVE-2015-7548 and its kind.
#[test]
fn a_new_disk_shows_nothing_of_those_that_were_there_before() {
    needs_mount();
    const LEN: usize = 4 << 20;
    let mounted = Mounted::new();
    let place = &mounted.0;
    let fill = |path: &str, len: usize| {
        let disk = open(place, path);
        disk.write_all_at(&vec![0xee; len], 0).unwrap();
        disk.sync_all().unwrap();
    };
    let image = fs::read(place.path("img.raw")).unwrap();
    for round in 0..3 {
        fill("mnt/instances/inst/disk", image.len());
        fill("mnt/instances/inst/disk.local", LEN);
        fill("mnt/instances/full/disk", image.len());
        place.works(&["instance", "remove", "inst"]);
        place.works(&["instance", "remove", "full"]);
        place.works(&["instance", "create", "inst", "--image", "img", "--flavor", "fl"]);
        place.works(&["instance", "create", "full", "--image", "img", "--no-cow", "--root-size", "2M"]);
        assert!(fs::read(place.path("mnt/instances/inst/disk")).unwrap() == image, "round {round}");
        let local = fs::read(place.path("mnt/instances/inst/disk.local")).unwrap();
        assert!(local == vec![0; LEN], "round {round}");
        let full = fs::read(place.path("mnt/instances/full/disk")).unwrap();
        assert!(full[..image.len()] == image && full[image.len()..] == vec![0; 1 << 20], "round {round}");
        // Within one disk: what was discarded, and what a part of a block was written to, holds nothing old.
        fill("mnt/instances/inst/disk.local", LEN);
        let disk = open(place, "mnt/instances/inst/disk.local");
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(disk.as_fd(), punch, 0, LEN as u64).unwrap();
        disk.write_all_at(&[1; 7], 65_536 * 5 + 1001).unwrap();
        let local = fs::read(place.path("mnt/instances/inst/disk.local")).unwrap();
        let ones: Vec<usize> = (0..LEN).filter(|&at| local[at] != 0).collect();
        assert_eq!(ones, (0..7).map(|at| 65_536 * 5 + 1001 + at).collect::<Vec<_>>());
    }
}

#[test]
fn requests_at_the_ends_of_the_numbers_are_refused_and_change_nothing() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    for path in ["mnt/instances/inst/disk", "mnt/instances/full/disk"] {
        let disk = open(place, path);
        let size = disk.metadata().unwrap().len();
        let before = fs::read(place.path(path)).unwrap();
        let far = [size, size + 1, 1 << 44, (1 << 62) - 1, 1 << 62, (1 << 63) - 4096, (1 << 63) - 1];
        for offset in far {
            let mut byte = [7; 4096];
            assert!(!matches!(disk.read_at(&mut byte, offset), Ok(1..)), "read at {offset}");
            assert!(disk.write_at(&byte, offset).is_err(), "write at {offset}");
            for len in [1, 4096, u64::MAX >> 1] {
                let kinds = [
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    FallocateFlags::ZERO_RANGE,
                    FallocateFlags::empty(),
                ];
                for kind in kinds {
                    // Beyond the end there is nothing to punch: that may be no error.
                    let done = rustix::fs::fallocate(disk.as_fd(), kind, offset, len);
                    assert!(done.is_err() || kind == kinds[0], "{kind:?} of {len} at {offset}");
                }
            }
        }
        // Across the end: what lies before it may be written, nothing else.
        assert!(matches!(disk.write_at(&[before[before.len() - 1]; 4096], size - 1), Ok(1) | Err(_)));
        assert_eq!(disk.write_at(&[], 0).unwrap(), 0);
        assert_eq!(disk.read_at(&mut [], size).unwrap(), 0);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(rustix::fs::fallocate(disk.as_fd(), punch, 0, 0), Err(rustix::io::Errno::INVAL));
        assert!(disk.set_len(1 << 62).is_err() && disk.set_len((1 << 63) - 1).is_err());
        assert_eq!(disk.metadata().unwrap().len(), size);
        drop(disk);
        assert!(fs::read(place.path(path)).unwrap() == before, "{path}");
    }
}
