//! What users and other programs write: names, sizes, options, arguments, requests to the control socket.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use cowdisk::ErrorKind;
use cowdisk::daemon::{
    FLUSH_SECONDS_MAX, MountOptions, REQUEST_BYTES_MAX, Request, THREADS_MAX, read_request,
};
use cowdisk::format::{BaseId, LayerId};
use cowdisk::store::{BootFileId, DiskName, FlavorFs, ObjectName, SourceFormat, Timestamp};
use cowdisk::units::{HumanBytes, parse_size};
use mount_cowdisk::arguments::{self, Task};

use super::input::Input;

/// What is read must show as it was written.
fn comes_back<T: std::str::FromStr<Err = cowdisk::Error> + ToString>(text: &str) {
    match text.parse::<T>() {
        Ok(value) => assert_eq!(value.to_string(), text),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid),
    }
}

/// Names, ids, sizes, moments: the bytes as text.
pub fn names(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    comes_back::<ObjectName>(&text);
    comes_back::<DiskName>(&text);
    comes_back::<SourceFormat>(&text);
    comes_back::<FlavorFs>(&text);
    comes_back::<BootFileId>(&text);
    comes_back::<BaseId>(&text);
    comes_back::<LayerId>(&text);
    comes_back::<Timestamp>(&text);
    if let Ok(name) = text.parse::<ObjectName>() {
        let name = name.as_str();
        // One component of a path, of any program that reads it, with room for a suffix; never an option.
        assert!(!name.is_empty() && name.len() <= 63 && name.is_ascii());
        assert!(!name.contains(['/', '\0', '\\', ' ', '\n']) && !name.starts_with(['.', '-']));
        assert!(is_plain(name));
    }
    if let Ok(size) = parse_size(&text) {
        assert_eq!(parse_size(&size.to_string()).ok(), Some(size));
        assert!(!HumanBytes(size).to_string().is_empty());
    }
}

/// Whether a name needs no escape in JSON, XML or a shell.
fn is_plain(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Mount options as text, and the arguments of a mount helper, parted by zeroes.
pub fn options(data: &[u8]) {
    let mut input = Input::new(data);
    let tolerant = input.byte() & 1 == 1;
    let bytes = input.rest();
    let text = String::from_utf8_lossy(bytes);
    let parse = if tolerant { MountOptions::parse_tolerant } else { MountOptions::parse };
    match parse(&text) {
        Ok(options) => {
            assert!(
                options.threads.is_none_or(|threads| (1..=THREADS_MAX).contains(&threads))
                    && options.flush_seconds <= FLUSH_SECONDS_MAX
            );
            assert!(options.log.as_ref().is_none_or(|log| log.is_absolute()));
            assert_eq!(MountOptions::parse(&options.to_string()).expect("our own words"), options);
        }
        Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid, "{error}"),
    }
    let words = bytes.split(|&byte| byte == 0).map(|word| OsString::from_vec(word.to_vec()));
    if let Ok(Task::Mount(request)) = arguments::parse(words.collect()) {
        assert!(!request.store.is_empty() && !request.dir.is_empty());
        assert!(request.options.iter().all(|option| !option.is_empty() && option != "remount"));
    }
}

/// A request to the control socket, as it comes: read again after each piece, until it is whole or refused.
pub fn http(data: &[u8]) {
    // A first byte that says how long the pieces are, and words that a fuzzer would be long in finding.
    let mut input = Input::new(data);
    let (piece, prefix) = (usize::from(input.byte()) + 1, input.byte());
    let mut bytes = match prefix % 4 {
        0 => b"GET /metrics HTTP/1.1\r\n".to_vec(),
        1 => b"GET /v1/status HTTP/1.0\r\nContent-Length: 0\r\n".to_vec(),
        2 => b"POST /v1/status HTTP/1.1\r\nTransfer-Encoding: chunked\r\n".to_vec(),
        _ => Vec::new(),
    };
    bytes.extend_from_slice(input.rest());
    let all = read_request(&bytes);
    let mut seen = 0;
    let by_pieces = loop {
        seen = (seen + piece).min(bytes.len());
        match read_request(&bytes[..seen]) {
            Request::Incomplete if seen < bytes.len() => {}
            answer => break answer,
        }
    };
    assert!(all != Request::Incomplete || bytes.len() < REQUEST_BYTES_MAX, "no end of waiting");
    // Pieces matter only where what follows a whole request, or its lateness, makes it too long.
    if bytes.len() < REQUEST_BYTES_MAX {
        assert_eq!(by_pieces, all);
    }
    if let Request::Whole(_) = all {
        assert!(bytes.starts_with(b"GET ") || bytes.starts_with(b"\r\n") || bytes.starts_with(b"\n"));
    }
}
