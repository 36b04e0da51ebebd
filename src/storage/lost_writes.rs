//! What the host could not write of what waited in its cache.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// Where no file has anything: nothing is waited for.
const NOWHERE: libc::off64_t = libc::off64_t::MAX - 1;

/// Fails if the host has failed to write anything back to the disk since `file` was opened, last synced, or asked this: like
/// a sync it says so once. Writes nothing and waits for nothing.
pub fn check(file: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: it takes no pointer.
    let result =
        unsafe { libc::sync_file_range(file.as_raw_fd(), NOWHERE, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE) };
    match result {
        0 => Ok(()),
        // Not retried after EINTR, as no sync is: what it knew it has said.
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_file_of_which_nothing_was_lost_is_as_it_should_be_and_no_file_is_an_error() {
        let mut file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all(&[1; 8192]).unwrap();
        assert_eq!(check(file.as_fd()), Ok(()));
        let (reader, _writer) = std::io::pipe().unwrap();
        assert_eq!(check(reader.as_fd()), Err(Errno::SPIPE));
    }
}
