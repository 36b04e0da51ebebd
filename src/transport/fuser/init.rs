//! What the kernel and we agree on at the beginning.

use fuser::{InitFlags, KernelConfig};

/// Largest read or write of one request, in bytes: 256 pages, what the kernel sends at most without a sysctl.
const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// Asynchronous requests under way in the whole mount, beyond which the kernel holds further ones back. Enough for 32
/// disks at queue depth 32.
const BACKGROUND_MAX: u16 = 1024;

/// What the kernel offers and we take. None is needed: a kernel without one of them is slower, or cannot map files.
const WANTED: InitFlags = InitFlags::FUSE_ASYNC_DIO
    // Without it the kernel asks for security.capability before each write.
    .union(InitFlags::FUSE_HANDLE_KILLPRIV_V2)
    // Shared mappings of files that bypass the page cache.
    .union(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_DO_READDIRPLUS)
    .union(InitFlags::FUSE_READDIRPLUS_AUTO);

/// Answers the kernel's offer.
pub(super) fn negotiate(config: &mut KernelConfig) -> std::io::Result<()> {
    let offered = WANTED & config.capabilities();
    if config.add_capabilities(offered).is_err()
        || config.set_max_write(REQUEST_BYTES_MAX).is_err()
        || config.set_max_background(BACKGROUND_MAX).is_err()
        || config.set_congestion_threshold(BACKGROUND_MAX / 4 * 3).is_err()
    {
        return Err(std::io::Error::from_raw_os_error(libc::EPROTO));
    }
    log::info!("kernel's FUSE {:?}, capabilities {offered:?}", config.kernel_abi());
    Ok(())
}
