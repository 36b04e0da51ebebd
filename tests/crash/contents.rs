//! Commits of a few new blocks, whose records have their contents, and what they must never bring back.

use cowdisk::format::{JOURNAL_OFFSET, SUPERBLOCK_BYTES, Superblock};
use cowdisk::overlay::{BaseImage, Overlay, read_superblock};
use cowdisk::units::Geometry;

use crate::common::record::{Choice, Event, Files, Image, Log, SharedLog};
use crate::oracle::Mark;
use crate::run::files;
use crate::{DATA, LAYER, MAP};

const BLOCK: usize = 4096;
const DISK: u64 = 4 << 20;

/// A layer over nothing on a host whose power can be cut.
struct Host {
    folder: tempfile::TempDir,
    log: SharedLog<Mark>,
}

impl Host {
    /// With an overlay that was written to and flushed, so that its session has begun and nothing waits for a sync.
    fn new() -> (Self, Overlay) {
        let log = Log::new(vec![Image::default(), Image::default()]);
        let geometry = Geometry::new(DISK, BLOCK as u32, 0).expect("valid");
        Overlay::create(&files(&log), LAYER, geometry, BaseImage::blank().reference()).expect("create");
        let host = Self { folder: tempfile::tempdir_in("/dev/shm").expect("a folder in memory"), log };
        let overlay = host.open();
        put(&overlay, 1000, 9);
        overlay.flush().expect("flush");
        (host, overlay)
    }

    fn open(&self) -> Overlay {
        let live = self.folder.path().join("live");
        Overlay::open_accepting_loss("test", files(&self.log), BaseImage::blank(), &live).expect("open")
    }

    /// As a power cut leaves it: of what is not durable that reaches the disk which is chosen.
    fn after_cut(&self, choice: &Choice) -> (Self, Overlay) {
        let log = self.log.lock();
        let mut now = Files::new(&log.start);
        log.events.iter().enumerate().for_each(|(number, event)| now.step(number, event));
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let host = Self { folder, log: Log::new(now.left(choice)) };
        let overlay = host.open();
        (host, overlay)
    }

    /// Cuts the power.
    fn cut(self, overlay: Overlay, choice: &Choice) -> (Self, Overlay) {
        drop(overlay);
        self.after_cut(choice)
    }

    fn data_syncs(&self) -> usize {
        self.log.lock().events.iter().filter(|event| matches!(event, Event::Sync(DATA))).count()
    }

    fn superblock(&self) -> Superblock {
        read_superblock(files(&self.log).map.as_ref()).expect("a superblock")
    }
}

fn put(overlay: &Overlay, block: u64, byte: u8) {
    overlay.write_at(block * BLOCK as u64, &[byte; BLOCK]).expect("write");
}

fn put_and_flush(overlay: &Overlay, block: u64, byte: u8) {
    put(overlay, block, byte);
    overlay.flush().expect("flush");
}

fn byte(overlay: &Overlay, block: u64) -> u8 {
    let mut bytes = [0; BLOCK];
    overlay.read_at(block * BLOCK as u64, &mut bytes).expect("read");
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "block {block} is in parts");
    bytes[0]
}

fn all_choices() -> [Choice; 4] {
    [Choice::Lost, Choice::All, Choice::File(DATA), Choice::File(MAP)]
}

/// The first commit of a session, too: one sync of the map file, which has all.
#[test]
fn a_sessions_first_commit_of_a_new_block_syncs_one_file() {
    let log = Log::new(vec![Image::default(), Image::default()]);
    let geometry = Geometry::new(DISK, BLOCK as u32, 0).expect("valid");
    Overlay::create(&files(&log), LAYER, geometry, BaseImage::blank().reference()).expect("create");
    let host = Host { folder: tempfile::tempdir_in("/dev/shm").expect("a folder in memory"), log };
    let (overlay, before) = (host.open(), host.log.lock().events.len());
    put_and_flush(&overlay, 3, 1);
    let syncs = |event: &&Event<Mark>| matches!(event, Event::Sync(_) | Event::Through(_));
    let made: Vec<String> = {
        let log = host.log.lock();
        log.events[before..].iter().filter(syncs).map(|event| format!("{event:?}")).collect()
    };
    assert_eq!(made, [format!("Sync({MAP})")]);
    for choice in all_choices() {
        let (_host, overlay) = host.after_cut(&choice);
        assert_eq!([3, 4].map(|block| byte(&overlay, block)), [1, 0], "{choice:?}");
    }
}

#[test]
fn a_few_new_blocks_are_committed_without_a_sync_of_the_data() {
    let (host, overlay) = Host::new();
    let (syncs, before) = (host.data_syncs(), overlay.commit_counts());
    put(&overlay, 3, 1);
    put(&overlay, 500, 2);
    overlay.flush().expect("flush");
    assert_eq!(overlay.commit_counts().records_with_contents, before.records_with_contents + 1);
    assert_eq!(host.data_syncs(), syncs);
    for choice in all_choices() {
        let (host, overlay) = host.after_cut(&choice);
        assert_eq!([1000, 3, 500, 4].map(|block| byte(&overlay, block)), [9, 1, 2, 0], "{choice:?}");
        put(&overlay, 7, 3);
        overlay.close().expect("close");
        assert_eq!(host.superblock().contents_since, None, "a program that knows of no contents can read it");
        let mut journal = vec![0; host.superblock().journal_bytes as usize];
        files(&host.log).map.read_at(JOURNAL_OFFSET, &mut journal).expect("read");
        assert!(journal.iter().all(|&byte| byte == 0), "and finds no record that it takes for damage");
    }
}

#[test]
fn a_flushed_overwrite_of_what_the_journal_has_is_not_undone() {
    for choice in all_choices() {
        for (placed, alone) in [(false, false), (false, true), (true, false), (true, true)] {
            let (host, overlay) = Host::new();
            put_and_flush(&overlay, 3, 1);
            if placed {
                // As by AIO: past the overlay.
                files(&host.log).data.write_at(3 * BLOCK as u64, &[2; BLOCK]).expect("write");
                overlay.placed_write_ended();
            } else {
                put(&overlay, 3, 2);
            }
            if alone {
                overlay.flush().expect("flush");
            }
            put_and_flush(&overlay, 4, 3);
            let (_host, overlay) = host.cut(overlay, &choice);
            assert_eq!([3, 4].map(|block| byte(&overlay, block)), [2, 3], "{choice:?}, {placed}, {alone}");
        }
    }
}

/// Programs that know of no contents took what earlier sessions had left in the journal for damage.
#[test]
fn a_closed_layer_has_no_records_with_contents_left_whatever_its_sessions_came_to() {
    let (host, overlay) = Host::new();
    let journal_is_empty = |host: &Host| {
        assert_eq!(host.superblock().contents_since, None);
        let mut journal = vec![0; host.superblock().journal_bytes as usize];
        files(&host.log).map.read_at(JOURNAL_OFFSET, &mut journal).expect("read");
        journal.iter().all(|&byte| byte == 0)
    };
    (0..20).for_each(|block| put_and_flush(&overlay, block, 1));
    overlay.checkpoint().expect("checkpoint");
    overlay.close().expect("close");
    assert!(journal_is_empty(&host), "after a close");
    // Cut off right after a checkpoint: the next opening ends the session.
    let overlay = host.open();
    (20..30).for_each(|block| put_and_flush(&overlay, block, 2));
    overlay.checkpoint().expect("checkpoint");
    let (host, overlay) = host.cut(overlay, &Choice::Lost);
    assert!(journal_is_empty(&host), "after an opening that had nothing to put back");
    assert_eq!([0, 19, 20, 29, 30].map(|block| byte(&overlay, block)), [1, 1, 2, 2, 0]);
    overlay.close().expect("close");
    // Cut off with records, closed by a later session that made none.
    let overlay = host.open();
    (30..40).for_each(|block| put_and_flush(&overlay, block, 3));
    let (host, overlay) = host.cut(overlay, &Choice::Lost);
    put(&overlay, 40, 4);
    overlay.close().expect("close");
    assert!(journal_is_empty(&host), "after the close that follows a crash");
}

/// Such a flush had no room in the journal for its word that contents do not count any more, and wrote it behind the
/// journal, where nobody reads it.
#[test]
fn a_flushed_overwrite_is_not_undone_where_the_journal_is_full() {
    for choice in all_choices() {
        let (host, overlay) = Host::new();
        let record_bytes = 2 * BLOCK as u64;
        let records = host.superblock().journal_bytes / record_bytes;
        // The first one is there.
        (1..records).for_each(|block| put_and_flush(&overlay, block, 1));
        let counts = overlay.commit_counts();
        assert_eq!((counts.records_with_contents, counts.checkpoints), (records, 0), "the journal is full");
        put_and_flush(&overlay, 3, 2);
        let (_host, overlay) = host.cut(overlay, &choice);
        assert_eq!([3, 4].map(|block| byte(&overlay, block)), [2, 1], "{choice:?}");
    }
}

#[test]
fn a_flush_after_a_reservation_of_space_makes_it_durable() {
    let (host, overlay) = Host::new();
    overlay.preallocate(0, 8 * BLOCK as u64).expect("preallocate");
    let syncs = host.data_syncs();
    put_and_flush(&overlay, 3, 1);
    assert_eq!(host.data_syncs(), syncs + 1);
}

#[test]
fn a_block_that_was_discarded_and_written_with_many_others_is_not_undone() {
    for choice in all_choices() {
        let (host, overlay) = Host::new();
        put_and_flush(&overlay, 3, 1);
        overlay.zero(3 * BLOCK as u64, BLOCK as u64).expect("discard");
        overlay.write_at(0, &[2; 100 * BLOCK]).expect("write");
        overlay.flush().expect("flush");
        let (_host, overlay) = host.cut(overlay, &choice);
        assert_eq!(byte(&overlay, 3), 2, "{choice:?}");
    }
}

#[test]
fn what_was_discarded_gets_no_contents_back() {
    for choice in all_choices() {
        let (host, overlay) = Host::new();
        put_and_flush(&overlay, 3, 1);
        overlay.zero(3 * BLOCK as u64, BLOCK as u64).expect("discard");
        overlay.flush().expect("flush");
        put_and_flush(&overlay, 4, 2);
        let (host, overlay) = host.cut(overlay, &choice);
        assert_eq!([3, 4].map(|block| byte(&overlay, block)), [0, 2], "{choice:?}");
        assert_eq!(files(&host.log).data.next_data(3 * BLOCK as u64).expect("seek"), Some(4 * BLOCK as u64));
    }
}

#[test]
fn what_a_crash_brought_back_does_not_come_back_again_over_later_writes() {
    for choice in all_choices() {
        let (host, overlay) = Host::new();
        put_and_flush(&overlay, 3, 1);
        let (host, overlay) = host.cut(overlay, &Choice::Lost);
        assert_eq!(byte(&overlay, 3), 1);
        put_and_flush(&overlay, 3, 2);
        let (host, overlay) = host.cut(overlay, &choice);
        assert_eq!(byte(&overlay, 3), 2, "{choice:?}");
        // An overwrite that a session begins with, cut off at once.
        put(&overlay, 3, 3);
        let (_host, overlay) = host.cut(overlay, &Choice::Lost);
        assert_eq!(byte(&overlay, 3), 2, "{choice:?}");
    }
}

#[test]
fn a_dead_daemons_cache_is_newer_than_the_journal() {
    let (host, overlay) = Host::new();
    put_and_flush(&overlay, 3, 1);
    put(&overlay, 3, 2);
    drop(overlay);
    let overlay = host.open();
    assert_eq!(byte(&overlay, 3), 2);
    put_and_flush(&overlay, 4, 3);
    let (_host, overlay) = host.cut(overlay, &Choice::Lost);
    assert_eq!(byte(&overlay, 3), 2);
}

#[test]
fn a_session_that_knows_of_no_contents_ends_without_any() {
    let (host, overlay) = Host::new();
    drop(overlay);
    let map = files(&host.log).map;
    let older = Superblock { contents_since: None, ..host.superblock() };
    for copy in 0..2 {
        map.write_durable_at(copy * SUPERBLOCK_BYTES as u64, &older.encode()).expect("write");
    }
    let overlay = host.open();
    overlay.flush().expect("flush");
    put_and_flush(&overlay, 3, 1);
    put_and_flush(&overlay, 4, 2);
    assert_eq!(overlay.commit_counts().records_with_contents, 0);
    let (_host, overlay) = host.cut(overlay, &Choice::Lost);
    assert_eq!([3, 4].map(|block| byte(&overlay, block)), [1, 2]);
}
