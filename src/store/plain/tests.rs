//! Of plain files, most of them on a disk of the host's.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

use super::*;
use crate::storage::{FileStorage, HostSpace};

fn disk() -> PlainDisk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    PlainDisk::open("web-3/disk", Box::new(FileStorage::new(file, "disk.raw"))).unwrap()
}

#[test]
fn bytes_come_back_and_zeroed_ones_take_no_space() {
    let disk = disk();
    disk.write_at(1000, &[7; 100_000]).unwrap();
    disk.flush().unwrap();
    let allocated = disk.allocated().unwrap();
    disk.zero(4000, 90_000).unwrap();
    assert!(disk.allocated().unwrap() < allocated);
    let mut buf = [1; 3];
    for (offset, expected) in [(999, [0, 7, 7]), (3998, [7, 7, 0]), (93_999, [0, 7, 7])] {
        disk.read_at(offset, &mut buf).unwrap();
        assert_eq!(buf, expected);
    }
    assert_eq!(disk.next_data(0).unwrap(), Some(0));
    assert_eq!(disk.next_data(200_000).unwrap(), None);
    assert_eq!(disk.next_hole(1 << 20).unwrap(), 1 << 20);
}

/// A file on a disk, of which a twentieth of 256 KiB is kept, and what is free of these.
fn on_disk() -> (PlainDisk, Arc<AtomicU64>) {
    let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let direct = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(file.path())
        .unwrap();
    let storage = FileStorage::new(file.into_file(), "disk.raw").with_direct(Some(direct));
    let free = Arc::new(AtomicU64::new(256 << 10));
    let available = Arc::clone(&free);
    let space = move || {
        let free = available.load(Ordering::Relaxed);
        Ok(HostSpace { total: 256 << 10, free, available: free })
    };
    let room = Arc::new(Room::new(space, Some(16 << 10)));
    (PlainDisk::open("web-3/disk.local", Box::new(storage)).unwrap().within(room), free)
}

#[test]
fn a_write_is_offered_only_with_room_for_all_of_it_which_it_keeps_until_its_end() {
    let (disk, free) = on_disk();
    assert!(disk.direct_file().is_some(), "/var/tmp is on no local disk");
    let offered = |offset, len| disk.place(Transfer::Write, offset, len);
    assert!(offered(0, 4096).is_none(), "nobody has looked at the host's file system yet");
    disk.write_by(Way::Direct, 0, &[1; 4096]).unwrap();
    for (offset, len) in [(0, 4096), (512, 512), ((1 << 20) - 512, 512)] {
        assert_eq!(offered(offset, len).unwrap().at, offset);
    }
    assert!(offered((1 << 20) - 512, 1024).is_none() && offered(0, 0).is_none());
    let held = offered(0, 128 << 10).unwrap();
    disk.room.look().unwrap();
    assert!(offered(128 << 10, 128 << 10).is_none(), "there is less than that above the reserve");
    drop(held);
    disk.room.look().unwrap();
    drop(offered(128 << 10, 128 << 10).unwrap());
    // A write by a thread that waits needs no room where it has space.
    free.store(16 << 10, Ordering::Relaxed);
    disk.room.look().unwrap();
    assert!(offered(0, 4096).is_none());
    disk.write_by(Way::Direct, 0, &[2; 4096]).unwrap();
    assert_eq!(disk.write_by(Way::Direct, 8192, &[2; 4096]).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(disk.place(Transfer::Read, 0, 4096).unwrap().at, 0);
}

/// Memory that direct I/O takes.
#[repr(align(4096))]
struct Page([u8; 4096]);

/// After one refusal some went through the cache, for whose pages the host refused more, until it held all they wrote.
/// What was preallocated has its space, though it shows as a hole.
#[test]
fn what_overwrites_goes_past_the_cache_though_the_host_has_refused_one() {
    let (disk, _) = on_disk();
    disk.write_at(0, &[1; 4096]).unwrap();
    disk.flush().and_then(|()| disk.storage.drop_cache()).unwrap();
    disk.preallocate(256 << 10, 4096).unwrap();
    for (offset, expected) in [(0, false), (256 << 10, false), (512 << 10, true)] {
        while !disk.trials.may_try() {}
        disk.trials.failed();
        disk.write_by(Way::Direct, offset, &Page([2; 4096]).0).unwrap();
        let is_cached = disk.read_now(Way::Cached, offset, &mut [0; 4096]).unwrap();
        assert_eq!(is_cached, expected, "the page at {offset}");
    }
}

/// A file that is being filled took a fifth of what one took that was filled through the cache.
#[test]
fn what_fills_a_file_goes_through_the_cache_and_lands_before_what_goes_directly() {
    let (disk, _) = on_disk();
    disk.trials.failed();
    disk.write_by(Way::Direct, 0, &[1; 8192]).unwrap();
    disk.write_by(Way::Direct, 512, &[2; 512]).unwrap();
    let mut seen = [0; 8192];
    disk.read_by(Way::Direct, 0, &mut seen).unwrap();
    assert!(seen[..512] == [1; 512] && seen[512..1024] == [2; 512] && seen[1024..] == [1; 7168]);
}

#[test]
fn no_write_is_offered_while_others_write_to_the_file_or_a_sync_has_failed() {
    let (disk, _) = on_disk();
    disk.write_at(0, &[1; 4096]).unwrap();
    assert!(disk.place(Transfer::Write, 0, 4096).is_some());
    disk.latch.close();
    assert!(disk.place(Transfer::Write, 0, 4096).is_none());
    let (disk, _) = on_disk();
    disk.write_at(0, &[1; 4096]).unwrap();
    disk.share();
    assert!(disk.place(Transfer::Write, 0, 4096).is_none());
}

#[test]
fn only_whole_pages_through_the_cache_count_as_memory_and_only_while_no_direct_write_is_under_way() {
    let (disk, _) = on_disk();
    let to_memory = |way, offset, len| disk.writes_to_memory(way, offset, len);
    assert!(to_memory(Way::Cached, 4096, 8192));
    for (way, offset, len) in [(Way::Direct, 0, 4096), (Way::Cached, 512, 4096), (Way::Cached, 0, 100)] {
        assert!(!to_memory(way, offset, len), "{way:?} {len} at {offset}");
    }
    let direct = disk.direct_file().unwrap();
    assert!(direct.gate.enter());
    assert!(!to_memory(Way::Cached, 4096, 8192));
    direct.gate.leave();
    assert!(to_memory(Way::Cached, 4096, 8192));
}

#[test]
fn nothing_reaches_beyond_the_end_and_only_growing_moves_it() {
    let disk = disk();
    for (offset, len) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 1)] {
        assert_eq!(disk.zero(offset, len).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(disk.preallocate(offset, len).unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    assert_eq!(disk.write_at((1 << 20) - 1, &[1, 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(disk.read_at((1 << 20) - 1, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
    for bad in [0, 512, (1 << 20) + 1, u64::MAX] {
        assert_eq!(disk.grow(bad).unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert_eq!(disk.size(), 1 << 20);
    disk.grow(2 << 20).unwrap();
    disk.write_at((2 << 20) - 1, &[9]).unwrap();
}
