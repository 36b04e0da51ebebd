//! Reading and writing.

use std::os::unix::fs::{FileExt, MetadataExt};

use crate::mount::{Aligned, IMAGE_BYTES, KIB, MIB, TestMount, errno, image_bytes, name, open, open_with};

#[test]
fn a_new_disk_reads_as_its_image_followed_by_zeroes() {
    let mount = TestMount::new();
    let bytes = std::fs::read(mount.disk()).unwrap();
    assert_eq!(bytes.len() as u64, 8 * MIB);
    assert!(bytes[..IMAGE_BYTES as usize] == image_bytes(0, IMAGE_BYTES));
    assert!(bytes[IMAGE_BYTES as usize..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_is_written_at_any_alignment_is_read_back_and_nothing_else_changes() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    let mut expected = image_bytes(0, IMAGE_BYTES);
    expected.resize(8 * MIB as usize, 0);
    for (offset, len) in
        [(0, 1), (4095, 2), (511, 513), (100_000, 300_001), (8 * MIB - 1, 1), (3 * MIB - 7, 4096)]
    {
        let data: Vec<u8> = (0..len).map(|i| u8::try_from(i % 255).unwrap() ^ 0xa5).collect();
        file.write_all_at(&data, offset).unwrap();
        expected[offset as usize..][..len as usize].copy_from_slice(&data);
    }
    assert!(std::fs::read(mount.disk()).unwrap() == expected);
}

#[test]
fn reads_end_at_the_end_of_the_disk() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    let mut buffer = [7; 1000];
    assert_eq!(file.read_at(&mut buffer, 8 * MIB - 10).unwrap(), 10);
    assert_eq!(file.read_at(&mut buffer, 8 * MIB).unwrap(), 0);
    assert_eq!(file.read_at(&mut buffer, 1 << 50).unwrap(), 0);
}

#[test]
fn an_image_reads_as_it_was_imported() {
    let mount = TestMount::new();
    assert!(std::fs::read(mount.path("images/base")).unwrap() == image_bytes(0, IMAGE_BYTES));
    let file = std::fs::File::open(mount.path("images/base")).unwrap();
    let mut buffer = [0; 100];
    assert_eq!(file.read_at(&mut buffer, IMAGE_BYTES - 1).unwrap(), 1);
}

#[test]
fn writing_to_a_disk_leaves_its_image_and_other_instances_alone() {
    let mount = TestMount::new();
    mount.create("other");
    open(&mount.disk()).write_all_at(&vec![0xff; 8 * MIB as usize], 0).unwrap();
    let other = std::fs::read(mount.path("instances/other/disk")).unwrap();
    assert!(other[..IMAGE_BYTES as usize] == image_bytes(0, IMAGE_BYTES));
    assert!(std::fs::read(mount.path("images/base")).unwrap() == image_bytes(0, IMAGE_BYTES));
}

/// A shared mapping of a whole file.
#[allow(unsafe_code)]
fn map(file: &std::fs::File) -> memmap2::MmapMut {
    // SAFETY: the file keeps its size, and the test reads and writes through the mapping in one thread only.
    unsafe { memmap2::MmapMut::map_mut(file).unwrap() }
}

#[test]
fn buffered_direct_and_mapped_views_agree() {
    let mount = TestMount::new();
    let buffered = open(&mount.disk());
    let direct = open_with(&mount.disk(), libc::O_DIRECT).unwrap();
    let mut mapped = map(&buffered);
    let mut seen = Aligned::new(4096);
    for round in 0..20u8 {
        let offset = u64::from(round) * 96 * KIB;
        let at = offset as usize;

        buffered.write_all_at(&[round | 0x40; 4096], offset).unwrap();
        direct.read_exact_at(&mut seen, offset).unwrap();
        assert_eq!((seen[0], seen[4095]), (round | 0x40, round | 0x40), "direct after buffered");
        assert_eq!((mapped[at], mapped[at + 4095]), (round | 0x40, round | 0x40), "mapped after buffered");

        direct.write_all_at(&Aligned::filled(4096, round | 0x80), offset).unwrap();
        assert_eq!((mapped[at], mapped[at + 4095]), (round | 0x80, round | 0x80), "mapped after direct");
        let mut byte = [0];
        buffered.read_exact_at(&mut byte, offset + 4095).unwrap();
        assert_eq!(byte[0], round | 0x80, "buffered after direct");

        mapped[at..at + 4096].fill(round | 0xc0);
        direct.read_exact_at(&mut seen, offset).unwrap();
        assert_eq!((seen[0], seen[4095]), (round | 0xc0, round | 0xc0), "direct after mapped");
        buffered.read_exact_at(&mut byte, offset + 4095).unwrap();
        assert_eq!(byte[0], round | 0xc0, "buffered after mapped");
    }
}

#[test]
fn a_mapping_sees_a_punched_hole() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    let mut mapped = map(&file);
    mapped[..8192].fill(9);
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 1000, 5000).unwrap();
    assert_eq!((mapped[999], mapped[1000], mapped[5999], mapped[6000]), (9, 0, 0, 9));
}

#[test]
fn what_was_written_through_a_mapping_is_there_after_it_is_closed() {
    let mount = TestMount::new();
    {
        let mut mapped = map(&open(&mount.disk()));
        mapped[5 * MIB as usize..][..3 * 4096].fill(0x5a);
    }
    let mut seen = vec![0; 3 * 4096];
    open(&mount.disk()).read_exact_at(&mut seen, 5 * MIB).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0x5a));
}

#[test]
fn parallel_direct_writes_land_where_they_belong() {
    const THREADS: u64 = 8;
    const BLOCK: u64 = 12 * KIB;
    let mount = TestMount::new();
    let path = mount.local();
    let blocks = 16 * MIB / BLOCK;
    let content = |block: u64, round: u8| u8::try_from(block * 31 % 200).unwrap() + round;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let path = &path;
            scope.spawn(move || {
                let file = open_with(path, libc::O_DIRECT).unwrap();
                for round in 0..3 {
                    for block in (thread..blocks).step_by(THREADS as usize) {
                        let data = Aligned::filled(BLOCK as usize, content(block, round));
                        file.write_all_at(&data, block * BLOCK).unwrap();
                        let mut seen = Aligned::new(BLOCK as usize);
                        file.read_exact_at(&mut seen, block * BLOCK).unwrap();
                        assert!(seen.iter().all(|byte| *byte == content(block, round)));
                    }
                }
            });
        }
    });
    let bytes = std::fs::read(path).unwrap();
    for block in 0..blocks {
        let range = (block * BLOCK) as usize..((block + 1) * BLOCK) as usize;
        assert!(bytes[range].iter().all(|byte| *byte == content(block, 2)), "block {block}");
    }
}

#[test]
fn threads_that_share_a_block_do_not_overwrite_each_other() {
    let mount = TestMount::new();
    let file = open(&mount.disk());
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let file = &file;
            scope.spawn(move || {
                for block in 0..64 {
                    let data = [u8::try_from(thread).unwrap() + 1; 512];
                    file.write_all_at(&data, block * 4096 + thread * 512).unwrap();
                }
            });
        }
    });
    let bytes = std::fs::read(mount.disk()).unwrap();
    for sector in 0..64 * 8 {
        let expected = u8::try_from(sector % 8).unwrap() + 1;
        assert!(bytes[sector * 512..][..512].iter().all(|byte| *byte == expected), "sector {sector}");
    }
}

/// The bytes of one travel through the host's page cache and those of the other past it: a page that was read for one must
/// not be written back over what the other has written since.
#[test]
fn direct_and_buffered_writers_of_one_page_do_not_overwrite_each_other() {
    const ROUNDS: u8 = 12;
    const BLOCKS: u64 = 32;
    let mount = TestMount::new();
    for path in [mount.disk(), mount.local()] {
        let files = [open(&path), open_with(&path, libc::O_DIRECT).unwrap()];
        for round in 0..ROUNDS {
            std::thread::scope(|scope| {
                for sector in 0..8u64 {
                    let file = &files[sector as usize % 2];
                    scope.spawn(move || {
                        let data = Aligned::filled(512, round * 8 + sector as u8 + 1);
                        for block in 0..BLOCKS {
                            file.write_all_at(&data, block * 4096 + sector * 512).unwrap();
                        }
                    });
                }
                scope.spawn(|| files[0].sync_data().unwrap());
            });
            for file in &files {
                let mut bytes = Aligned::new(BLOCKS as usize * 4096);
                file.read_exact_at(&mut bytes, 0).unwrap();
                for (sector, bytes) in bytes.chunks(512).enumerate() {
                    let expected = round * 8 + (sector % 8) as u8 + 1;
                    assert!(bytes.iter().all(|byte| *byte == expected), "round {round} sector {sector}");
                }
            }
        }
        files[0].sync_all().unwrap();
    }
}

#[test]
fn direct_io_works_at_512_bytes() {
    let mount = TestMount::new();
    let direct = open_with(&mount.disk(), libc::O_DIRECT).unwrap();
    direct.write_all_at(&Aligned::filled(512, 0x77), 512 * 3).unwrap();
    let mut seen = Aligned::new(1024);
    direct.read_exact_at(&mut seen, 512 * 3).unwrap();
    assert!(seen[..512].iter().all(|byte| *byte == 0x77));
    assert_eq!(seen[512..], image_bytes(2048, 512));
}

#[test]
fn direct_io_below_512_bytes_is_refused() {
    let mount = TestMount::new();
    for path in [mount.disk(), mount.local()] {
        let direct = open_with(&path, libc::O_DIRECT).unwrap();
        for (offset, len) in [(0, 1), (0, 511), (0, 513), (1, 512), (256, 512)] {
            let mut buffer = Aligned::new(len);
            assert_eq!(errno(direct.read_at(&mut buffer, offset)), libc::EINVAL, "read {len} at {offset}");
            assert_eq!(errno(direct.write_at(&buffer, offset)), libc::EINVAL, "write {len} at {offset}");
        }
    }
}

#[test]
#[allow(unsafe_code)]
fn the_alignment_of_direct_io_is_told_to_whoever_asks() {
    use std::os::fd::AsRawFd;
    let mount = TestMount::new();
    let file = open(&mount.disk());
    let mut answer = [0u32; 3];
    // SAFETY: XFS_IOC_DIOINFO writes three u32.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), 0x800C_581E, answer.as_mut_ptr()) };
    assert_eq!(done, 0);
    assert_eq!(answer[..2], [512, 512]);
    assert!(answer[2] >= 1 << 20);
    let mut sector = 0i32;
    // SAFETY: BLKSSZGET writes one int.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), 0x1268, &mut sector) };
    assert_eq!((done, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::ENOTTY)));
}

#[test]
fn writing_asks_the_daemon_for_nothing_but_the_writes() {
    let mount = TestMount::new();
    for flags in [0, libc::O_DIRECT] {
        let file = open_with(&mount.disk(), flags).unwrap();
        file.write_all_at(&Aligned::new(4096), 0).unwrap();
        let before = mount.log().lines().count();
        for block in 0..100 {
            file.write_all_at(&Aligned::new(4096), block * 4096).unwrap();
        }
        let log = mount.log();
        let modules = ["fuser::request", "dev_fuse::serve", "dev_fuse::uring::serve"];
        let is_request = |line: &&str| modules.iter().any(|module| line.contains(module));
        let requests: Vec<_> = log.lines().skip(before).filter(is_request).collect();
        let writes = requests.iter().filter(|line| line.contains("WRITE ")).count();
        assert_eq!((writes, requests.len()), (100, 100), "{requests:#?}");
    }
}

#[test]
fn a_megabyte_travels_in_one_request() {
    let mount = TestMount::new();
    let direct = open_with(&mount.disk(), libc::O_DIRECT).unwrap();
    let mut buffer = Aligned::new(MIB as usize);
    direct.write_all_at(&buffer, 0).unwrap();
    direct.read_exact_at(&mut buffer, MIB).unwrap();
    let log = mount.log();
    let one = |what: &str| log.lines().filter(|line| line.contains(what)).count();
    assert_eq!((one("WRITE "), one("READ ")), (1, 1), "{log}");
    assert!(log.contains("size 1048576"), "{log}");
}

#[test]
fn closing_a_file_asks_nothing_of_the_daemon() {
    let mount = TestMount::new();
    drop(open(&mount.disk()));
    assert!(!mount.log().contains("FLUSH "));
}

#[test]
fn an_independent_disk_is_served_under_the_same_name() {
    use cowdisk::store::{InstanceSpec, NoProgress};
    let mount = TestMount::new();
    let spec = InstanceSpec { root_size: Some(8 * MIB), no_cow: true, ..InstanceSpec::of(name("base")) };
    mount.store.create_instance(&name("copy"), &spec, &NoProgress).unwrap();
    let path = mount.path("instances/copy/disk");
    let file = open(&path);
    assert_eq!(file.metadata().unwrap().size(), 8 * MIB);
    file.write_all_at(b"of its own", 12345).unwrap();
    file.set_len(9 * MIB).unwrap();
    let mut expected = image_bytes(0, IMAGE_BYTES);
    expected[12345..12355].copy_from_slice(b"of its own");
    expected.resize(9 * MIB as usize, 0);
    assert!(std::fs::read(&path).unwrap() == expected);
    assert_eq!(errno(file.write_at(b"x", 9 * MIB)), libc::EFBIG);
}

/// By io_uring the kernel has entries for so many requests of a processor; all others wait for one to be answered.
#[test]
fn more_requests_at_once_than_a_transport_takes_on_are_all_answered() {
    const THREADS: u64 = 200;
    const OWN: u64 = 64 * KIB;
    let mount = TestMount::new();
    let begin = std::sync::Barrier::new(THREADS as usize);
    std::thread::scope(|scope| {
        for number in 0..THREADS {
            let (begin, mount) = (&begin, &mount);
            scope.spawn(move || {
                let file = open_with(&mount.local(), libc::O_DIRECT).unwrap();
                let mut buffer = Aligned::new(4096);
                begin.wait();
                for step in 0..8 {
                    let (offset, byte) = (number * OWN + step * 8 * KIB, u8::try_from(number).unwrap());
                    buffer.fill(byte);
                    file.write_all_at(&buffer, offset).unwrap();
                    if step % 4 == 3 {
                        file.sync_data().unwrap();
                    }
                    buffer.fill(255);
                    file.read_exact_at(&mut buffer, offset).unwrap();
                    assert!(buffer.iter().all(|found| *found == byte), "thread {number}, offset {offset}");
                }
            });
        }
    });
}
