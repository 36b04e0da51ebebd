//! What the kernel and we agree on at the beginning.

use super::wire::{InitIn, InitOut, MAJOR, MINOR_MAX, MINOR_MIN, capability as can};
use crate::error::{Error, ErrorKind, Result};

/// Largest read or write of one request, in bytes: 256 pages, what the kernel sends at most without a sysctl.
pub const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// Asynchronous requests under way in the whole mount, beyond which the kernel holds further ones back. Enough for 32
/// disks at queue depth 32.
const BACKGROUND_MAX: u16 = 1024;

/// What we take of what the kernel offers. None is needed: a kernel without one of them is slower, or cannot map files.
const WANTED: u64 = can::ASYNC_READ
    | can::BIG_WRITES
    | can::MAX_PAGES
    | can::ASYNC_DIO
    // Without it the kernel asks for security.capability before each write.
    | can::HANDLE_KILLPRIV_V2
    | can::PARALLEL_DIROPS
    | can::DO_READDIRPLUS
    | can::READDIRPLUS_AUTO
    | can::INIT_EXT
    // Shared mappings of files that bypass the page cache.
    | can::DIRECT_IO_ALLOW_MMAP
    | can::HAS_RESEND;

/// How many file systems may lie one upon the other under a file that the kernel serves by itself, ours included: it must
/// lie on a file system of the host's disk.
const STACK_DEPTH: u32 = 1;

/// How requests are to travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Road {
    /// By reads and writes of `/dev/fuse`.
    Device {
        /// Whether the kernel may serve files by itself.
        passthrough: bool,
    },
    /// By io_uring. The kernel holds all requests back until every queue has an entry.
    Rings,
}

/// The answer to the kernel's offer. `None`: it speaks a newer major version and will ask again with ours.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if it speaks none that we do, or does not offer the `road`.
pub fn negotiate(offer: &InitIn, flags2: u32, road: Road) -> Result<Option<InitOut>> {
    if offer.major > MAJOR {
        return Ok(None);
    }
    if offer.major < MAJOR || offer.minor < MINOR_MIN {
        let message =
            format!("the kernel speaks FUSE {}.{}, older than {MAJOR}.{MINOR_MIN}", offer.major, offer.minor);
        return Err(Error::new(ErrorKind::Unsupported, message).with_hint("use Linux 5.4 or newer"));
    }
    let wanted = match road {
        Road::Device { passthrough: false } => WANTED,
        Road::Device { passthrough: true } => WANTED | can::PASSTHROUGH,
        Road::Rings => WANTED | can::OVER_IO_URING,
    };
    let taken = wanted & (u64::from(flags2) << 32 | u64::from(offer.flags));
    if road == Road::Rings && taken & can::OVER_IO_URING == 0 {
        return Err(Error::new(ErrorKind::Unsupported, "the kernel does not offer FUSE over io_uring")
            .with_hint("mount with -o transport=dev_fuse"));
    }
    let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).expect("masked to 32 bits");
    log::info!("kernel's FUSE {}.{}, capabilities {taken:#x}", offer.major, offer.minor);
    Ok(Some(InitOut {
        major: MAJOR,
        minor: offer.minor.min(MINOR_MAX),
        max_readahead: offer.max_readahead.min(REQUEST_BYTES_MAX),
        flags: half(taken),
        max_background: BACKGROUND_MAX,
        congestion_threshold: BACKGROUND_MAX / 4 * 3,
        max_write: REQUEST_BYTES_MAX,
        time_gran: 1,
        max_pages: 256,
        flags2: half(taken >> 32),
        max_stack_depth: if taken & can::PASSTHROUGH != 0 { STACK_DEPTH } else { 0 },
        ..InitOut::default()
    }))
}

/// Whether the kernel can send again what was read from `/dev/fuse` and not answered: Linux 6.9 and newer.
pub fn can_resend(agreed: &InitOut) -> bool {
    u64::from(agreed.flags2) << 32 & can::HAS_RESEND != 0
}

/// Whether the kernel can serve files by itself: Linux 6.9 and newer, where it was asked for.
pub fn can_pass_through(agreed: &InitOut) -> bool {
    u64::from(agreed.flags2) << 32 & can::PASSTHROUGH != 0
}

/// How requests travel.
pub fn road(agreed: &InitOut) -> Road {
    match u64::from(agreed.flags2) << 32 & can::OVER_IO_URING {
        0 => Road::Device { passthrough: can_pass_through(agreed) },
        _ => Road::Rings,
    }
}

/// Checks what a process before this one has agreed on: this one must be able to keep to it.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if it is not.
pub fn check_agreed(agreed: &InitOut) -> Result<()> {
    let version = agreed.major == MAJOR && (MINOR_MIN..=MINOR_MAX).contains(&agreed.minor);
    if version && agreed.max_write <= REQUEST_BYTES_MAX {
        return Ok(());
    }
    let message = format!(
        "the kernel was promised FUSE {}.{} with requests of {} bytes, which this version cannot take over",
        agreed.major, agreed.minor, agreed.max_write
    );
    Err(Error::new(ErrorKind::Unsupported, message))
}

/// What to say to a kernel of a newer major version.
pub fn our_version() -> InitOut {
    InitOut { major: MAJOR, minor: MINOR_MAX, ..InitOut::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: Road = Road::Device { passthrough: false };

    #[test]
    fn only_what_is_offered_is_taken() {
        let offer = InitIn { major: 7, minor: 38, max_readahead: 131_072, flags: u32::MAX };
        let answer = negotiate(&offer, 0, DEVICE).unwrap().unwrap();
        assert_eq!((answer.minor, answer.flags2, answer.max_readahead), (38, 0, 131_072));
        assert_ne!(u64::from(answer.flags) & can::ASYNC_DIO, 0);
        let newer = negotiate(&InitIn { minor: 99, ..offer }, u32::MAX, DEVICE).unwrap().unwrap();
        let flags2 = u64::from(newer.flags2) << 32;
        assert_eq!((newer.minor, flags2), (MINOR_MAX, can::DIRECT_IO_ALLOW_MMAP | can::HAS_RESEND));
        assert!(can_resend(&newer) && !can_resend(&answer));
        let bare = negotiate(&InitIn { flags: 0, ..offer }, 0, DEVICE).unwrap().unwrap();
        assert_eq!((bare.flags, bare.flags2), (0, 0));
    }

    #[test]
    fn rings_are_taken_only_where_they_are_wanted_and_offered() {
        let offer = InitIn { major: 7, minor: 45, max_readahead: 0, flags: u32::MAX };
        for wanted in [DEVICE, Road::Device { passthrough: true }, Road::Rings] {
            assert_eq!(road(&negotiate(&offer, u32::MAX, wanted).unwrap().unwrap()), wanted);
        }
        let error = negotiate(&offer, 0, Road::Rings).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn the_kernel_serves_files_only_where_it_offers_that_and_is_asked() {
        let offer = InitIn { major: 7, minor: 45, max_readahead: 0, flags: u32::MAX };
        let asked = Road::Device { passthrough: true };
        for (flags2, road, passes) in [
            (u32::MAX, asked, true),
            (u32::MAX, DEVICE, false),
            (u32::MAX, Road::Rings, false),
            (0, asked, false),
        ] {
            let answer = negotiate(&offer, flags2, road).unwrap().unwrap();
            assert_eq!((can_pass_through(&answer), answer.max_stack_depth), (passes, u32::from(passes)));
        }
    }

    #[test]
    fn other_versions_are_asked_again_or_refused() {
        let offer = InitIn { major: 8, minor: 0, ..InitIn::default() };
        assert_eq!(negotiate(&offer, 0, DEVICE).unwrap(), None);
        for (major, minor) in [(7, 30), (6, 99)] {
            let error = negotiate(&InitIn { major, minor, ..offer }, 0, DEVICE).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
    }

    #[test]
    fn what_an_older_process_promised_must_be_kept_to() {
        let offer = InitIn { major: 7, minor: 45, max_readahead: 0, flags: u32::MAX };
        let agreed = negotiate(&offer, u32::MAX, DEVICE).unwrap().unwrap();
        check_agreed(&agreed).unwrap();
        for other in [
            InitOut { max_write: REQUEST_BYTES_MAX + 1, ..agreed },
            InitOut { minor: MINOR_MAX + 1, ..agreed },
            InitOut::default(),
        ] {
            assert_eq!(check_agreed(&other).unwrap_err().kind(), ErrorKind::Unsupported);
        }
    }
}
