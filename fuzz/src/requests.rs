//! What the kernel would send through `/dev/fuse`.

use std::os::unix::ffi::OsStrExt as _;

use cowdisk::transport::dev_fuse::request::{Malformed, Operation, forgets, parse};

/// The bytes as one request: refused, or understood as no more than they hold.
pub fn fuse_request(data: &[u8]) {
    let plain = |name: &std::ffi::OsStr| assert!(!name.as_bytes().contains(&0) && name.len() < data.len());
    match parse(data) {
        Ok(request) => {
            assert_eq!(usize::try_from(request.header.len).ok(), Some(data.len()));
            assert!(!request.operation.name().is_empty());
            match request.operation {
                Operation::Write(arguments, payload) => {
                    assert_eq!(usize::try_from(arguments.size).ok(), Some(payload.len()));
                }
                Operation::BatchForget(all) => assert!(forgets(all).count() * 16 <= data.len()),
                Operation::Lookup(name) | Operation::Getxattr { name, .. } | Operation::Removexattr(name) => {
                    plain(name)
                }
                Operation::Setxattr { name, value, .. } => {
                    plain(name);
                    assert!(value.len() < data.len());
                }
                _ => {}
            }
        }
        Err(Malformed::Headless) => assert!(data.len() < 40),
        Err(Malformed::Body { .. }) => assert!(data.len() >= 40),
    }
}
