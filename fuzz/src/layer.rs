//! Whole layers: opened, read through, written to, closed, opened again.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cowdisk::ErrorKind;
use cowdisk::format::{BlockState, BootId, PAGE_BYTES, SessionId};
use cowdisk::overlay::{MapReader, Overlay};

use super::input::Input;
use super::recipe::{JOURNALED, LAYER, Recipe, SESSION, sectors};

/// A folder in memory for live maps and stores; made once for each process, whose end leaves it for the next to remove.
pub fn scratch() -> &'static Path {
    static SCRATCH: OnceLock<PathBuf> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let shared = Path::new("/dev/shm");
        let parent = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        let prefix = "cowdisk-fuzz-";
        for old in std::fs::read_dir(&parent).expect("read the folder in memory").flatten() {
            let name = old.file_name().to_string_lossy().into_owned();
            let pid = name.strip_prefix(prefix).and_then(|pid| pid.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                // Another process may remove it at the same time.
                let _ = std::fs::remove_dir_all(old.path());
            }
        }
        let folder = parent.join(format!("{prefix}{}", std::process::id()));
        // Of an earlier process with this id.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).expect("make a folder in memory");
        folder
    })
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
    }
}

/// A layer without a live map, then changes of a guest.
pub fn layer(data: &[u8]) {
    let mut input = Input::new(data);
    let recipe = Recipe::read(&mut input, None);
    let live = scratch().join("layer");
    remove(&live);
    let reader = MapReader::open("fuzz", recipe.map(), &live);
    let overlay = match Overlay::open("fuzz", recipe.files(), recipe.base(), &live) {
        Err(error) => {
            assert!(!recipe.honest, "an honest layer is refused: {error}");
            assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{error}");
            return;
        }
        Ok(overlay) => overlay,
    };
    let reader = reader.expect("what opens can be inspected");
    let seen = |block| reader.extent(block).state;
    if overlay.geometry() == recipe.geometry {
        check_contents(&recipe, &overlay, &seen);
        if recipe.honest {
            recipe.interesting().iter().for_each(|&block| assert_eq!(seen(block), recipe.state(block)));
        }
    }
    write_and_reopen(&recipe, &mut input, overlay, &live);
    remove(&live);
}

/// Each interesting block reads as its state says.
fn check_contents(recipe: &Recipe, overlay: &Overlay, state: &dyn Fn(u64) -> BlockState) {
    if recipe.files().data.size().expect("memory") < recipe.geometry.data_bytes() {
        return;
    }
    for block in recipe.interesting() {
        for at in sectors(recipe.geometry, block) {
            let mut found = [0xee; 512];
            overlay.read_at(at, &mut found).expect("within the disk");
            let expected = recipe.sector(state(block), block, at);
            let put_back =
                recipe.is_journaled(block) && state(block) == BlockState::Data && found == [JOURNALED; 512];
            assert!(put_back || found == expected, "block {block}, byte {at}: {:?}", state(block));
        }
    }
}

/// What a guest writes to a layer that has opened is there after a flush and another opening, and nothing else changes.
fn write_and_reopen(recipe: &Recipe, input: &mut Input<'_>, overlay: Overlay, live: &Path) {
    let size = overlay.size();
    let blocks = recipe.interesting();
    let watched: Vec<u64> = blocks
        .iter()
        .flat_map(|&block| sectors(recipe.geometry, block))
        .filter(|at| at + 512 <= size)
        .collect();
    let read = |overlay: &Overlay, at: u64| {
        let mut sector = [0; 512];
        overlay.read_at(at, &mut sector).expect("within the disk");
        sector
    };
    let mut expected: Vec<[u8; 512]> = watched.iter().map(|&at| read(&overlay, at)).collect();
    for _ in 0..input.count(6) {
        let at = watched.get(usize::from(input.byte())).copied().unwrap_or(0);
        let len = 512 * (1 + input.below(64)).min((size - at) / 512);
        let bytes = input.byte();
        if bytes == 0 {
            overlay.zero(at, len).expect("room in memory");
        } else {
            overlay.write_at(at, &vec![bytes; usize::try_from(len).expect("small")]).expect("room in memory");
        }
        for (place, sector) in watched.iter().zip(&mut expected) {
            for (byte, held) in (*place..).zip(sector.iter_mut()) {
                if (at..at + len).contains(&byte) {
                    *held = bytes;
                }
            }
        }
        if input.count(3) == 0 {
            overlay.flush().expect("memory syncs");
        }
    }
    if input.count(1) == 0 {
        overlay.close().expect("memory syncs");
    } else {
        // As if the daemon had been killed: the live map is taken up.
        drop(overlay);
    }
    let overlay =
        Overlay::open("fuzz again", recipe.files(), recipe.base(), live).expect("what was open opens");
    assert_eq!(overlay.size(), size);
    for (&at, sector) in watched.iter().zip(&expected) {
        assert!(read(&overlay, at) == *sector, "byte {at} after opening again");
    }
    overlay.close().expect("memory syncs");
}

fn boot() -> BootId {
    static BOOT: OnceLock<BootId> = OnceLock::new();
    *BOOT.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("the kernel's boot id");
        text.trim().replace('-', "").parse().expect("hex digits")
    })
}

/// A layer of this boot with a live map of any bytes, in whose header what binds it may be made to fit.
pub fn live_map(data: &[u8]) {
    let mut input = Input::new(data);
    let binding = match input.count(3) {
        0 => (SessionId(*b"another session!"), boot()),
        _ => (SESSION, boot()),
    };
    let live_bytes = read_live_map(&mut input);
    let recipe = Recipe::read(&mut input, Some(binding));
    let live = scratch().join("live");
    remove(&live);
    write_sparse(&live, &live_bytes);

    let reader = MapReader::open("fuzz", recipe.map(), &live);
    match Overlay::open("fuzz", recipe.files(), recipe.base(), &live) {
        Err(error) => {
            let known = [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::NoSpace];
            assert!(known.contains(&error.kind()), "{error}");
        }
        Ok(overlay) => {
            let reader = reader.expect("what opens can be inspected");
            if overlay.geometry() == recipe.geometry && live_bytes.fits {
                check_contents(&recipe, &overlay, &|block| reader.extent(block).state);
            }
            write_and_reopen(&recipe, &mut input, overlay, &live);
        }
    }
    remove(&live);
}

struct LiveBytes {
    fits: bool,
    header: [u8; PAGE_BYTES],
    pages: Vec<(u64, Vec<u8>)>,
    len: Option<u64>,
}

fn read_live_map(input: &mut Input<'_>) -> LiveBytes {
    let mut header = [0; PAGE_BYTES];
    let fits = input.count(3) > 0;
    if fits {
        header[..8].copy_from_slice(b"COWLIVE1");
        header[8..24].copy_from_slice(&LAYER.0);
        header[24..40].copy_from_slice(&SESSION.0);
        header[40..56].copy_from_slice(&boot().0);
        for word in [64, 72] {
            header[word] = input.byte() & 3;
        }
        header[56] = u8::from(input.byte() == 0xff);
    } else {
        let bytes = input.bytes(128);
        header[..bytes.len()].copy_from_slice(bytes);
    }
    let mut pages = Vec::new();
    for _ in 0..input.count(4) {
        let bits = input.count(18);
        let page = input.below(1 << bits);
        let len = usize::try_from(input.below(PAGE_BYTES as u64 + 1)).expect("small");
        let fill = input.byte();
        let bytes = match fill {
            // One state everywhere.
            0 | 0x55 | 0xaa => vec![fill; PAGE_BYTES],
            _ => input.bytes(len).to_vec(),
        };
        pages.push((page, bytes));
    }
    let len = (input.count(7) == 0).then(|| input.below(1 << 31));
    LiveBytes { fits, header, pages, len }
}

fn write_sparse(path: &Path, live: &LiveBytes) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).expect("make a live map");
    file.write_all_at(&live.header, 0).expect("write a live map");
    for (page, bytes) in &live.pages {
        file.write_all_at(bytes, (1 + page) * PAGE_BYTES as u64).expect("write a live map");
    }
    if let Some(len) = live.len {
        file.set_len(len).expect("size a live map");
    }
}
