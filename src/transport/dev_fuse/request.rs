//! Requests of the kernel: bytes to plain types. No I/O; nothing that the bytes say is trusted.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use zerocopy::FromBytes;

use super::wire::{
    BatchForgetIn, FallocateIn, ForgetIn, ForgetOne, FsyncIn, GetxattrIn, InHeader, InitIn, IoctlIn, LseekIn,
    OpenIn, ReadIn, ReleaseIn, SetattrIn, SetxattrIn, WriteIn, opcode,
};

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Who asks, about which inode, and the number that the answer must bear.
    pub header: InHeader,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// What is asked. Names are as the kernel sends them: without a zero byte, of any encoding, perhaps empty.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the kernel's operations
pub enum Operation<'a> {
    /// The first request of a connection, and the capabilities above bit 31 if the kernel has any.
    Init(InitIn, u32),
    Lookup(&'a OsStr),
    Forget(u64),
    /// Each as [`forgets`] tells them.
    BatchForget(&'a [u8]),
    Getattr,
    Setattr(SetattrIn),
    Readlink,
    Open(OpenIn),
    Read(ReadIn),
    /// The payload is as long as the request says.
    Write(WriteIn, &'a [u8]),
    Statfs,
    Release(ReleaseIn),
    Fsync(FsyncIn),
    Setxattr {
        name: &'a OsStr,
        value: &'a [u8],
        flags: u32,
    },
    Getxattr {
        name: &'a OsStr,
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr(&'a OsStr),
    Flush,
    Opendir,
    Readdir(ReadIn),
    Readdirplus(ReadIn),
    Releasedir(ReleaseIn),
    Fsyncdir,
    /// Nobody waits for some request any more.
    Interrupt,
    Ioctl(IoctlIn),
    Fallocate(FallocateIn),
    Lseek(LseekIn),
    /// Something that would change the tree.
    ChangeTree,
    /// The connection ends.
    Destroy,
    /// What we do not know, or do not do.
    Unknown,
}

impl Operation<'_> {
    /// Its name in the log, as that of the kernel's operation code.
    pub fn name(&self) -> String {
        // The variant's own name, before whatever it holds.
        let text = format!("{self:?}");
        text.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default().to_uppercase()
    }
}

/// A request that cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Not even its header is whole: nothing to answer to.
    Headless,
    /// Too short, or inconsistent, for its operation: to be answered with EINVAL under this number.
    Body {
        /// The request's number.
        unique: u64,
        /// Its operation.
        opcode: u32,
    },
}

/// Understands the bytes of one read of `/dev/fuse`.
///
/// # Errors
/// [`Malformed`] if they are not a whole request.
pub fn parse(bytes: &[u8]) -> Result<Request<'_>, Malformed> {
    let (header, body) = InHeader::read_from_prefix(bytes).map_err(|_| Malformed::Headless)?;
    let malformed = Malformed::Body { unique: header.unique, opcode: header.opcode };
    if usize::try_from(header.len) != Ok(bytes.len()) {
        return Err(malformed);
    }
    // Extensions lie behind the arguments. None was negotiated, so none is expected; they are cut off all the same.
    let extension = usize::from(header.total_extlen) * 8;
    let body = body.len().checked_sub(extension).and_then(|len| body.get(..len)).ok_or(malformed)?;
    let operation = parse_operation(header.opcode, body).ok_or(malformed)?;
    Ok(Request { header, operation })
}

fn parse_operation(code: u32, body: &[u8]) -> Option<Operation<'_>> {
    Some(match code {
        opcode::INIT => {
            let (init, rest) = InitIn::read_from_prefix(body).ok()?;
            let flags2 = u32::read_from_prefix(rest).map_or(0, |(flags2, _)| flags2);
            Operation::Init(init, flags2)
        }
        opcode::LOOKUP => Operation::Lookup(name(body)?.0),
        opcode::FORGET => Operation::Forget(arguments::<ForgetIn>(body)?.nlookup),
        opcode::BATCH_FORGET => {
            let (head, rest) = BatchForgetIn::read_from_prefix(body).ok()?;
            let len = usize::try_from(head.count).ok()?.checked_mul(size_of::<ForgetOne>())?;
            Operation::BatchForget(rest.get(..len)?)
        }
        opcode::GETATTR => Operation::Getattr,
        opcode::SETATTR => Operation::Setattr(arguments(body)?),
        opcode::READLINK => Operation::Readlink,
        opcode::OPEN => Operation::Open(arguments(body)?),
        opcode::READ => Operation::Read(arguments(body)?),
        opcode::WRITE => {
            let (write, payload) = WriteIn::read_from_prefix(body).ok()?;
            Operation::Write(write, payload.get(..usize::try_from(write.size).ok()?)?)
        }
        opcode::STATFS => Operation::Statfs,
        opcode::RELEASE => Operation::Release(arguments(body)?),
        opcode::FSYNC => Operation::Fsync(arguments(body)?),
        opcode::SETXATTR => {
            let (set, rest) = SetxattrIn::read_from_prefix(body).ok()?;
            let (name, rest) = name(rest)?;
            let value = rest.get(..usize::try_from(set.size).ok()?)?;
            Operation::Setxattr { name, value, flags: set.flags }
        }
        opcode::GETXATTR => {
            let (get, rest) = GetxattrIn::read_from_prefix(body).ok()?;
            Operation::Getxattr { name: name(rest)?.0, size: get.size }
        }
        opcode::LISTXATTR => Operation::Listxattr { size: arguments::<GetxattrIn>(body)?.size },
        opcode::REMOVEXATTR => Operation::Removexattr(name(body)?.0),
        opcode::FLUSH => Operation::Flush,
        opcode::OPENDIR => Operation::Opendir,
        opcode::READDIR => Operation::Readdir(arguments(body)?),
        opcode::READDIRPLUS => Operation::Readdirplus(arguments(body)?),
        opcode::RELEASEDIR => Operation::Releasedir(arguments(body)?),
        opcode::FSYNCDIR => Operation::Fsyncdir,
        opcode::INTERRUPT => Operation::Interrupt,
        opcode::IOCTL => Operation::Ioctl(arguments(body)?),
        opcode::FALLOCATE => Operation::Fallocate(arguments(body)?),
        opcode::LSEEK => Operation::Lseek(arguments(body)?),
        opcode::SYMLINK
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::LINK
        | opcode::CREATE
        | opcode::TMPFILE => Operation::ChangeTree,
        opcode::DESTROY => Operation::Destroy,
        _ => Operation::Unknown,
    })
}

/// What a BATCH_FORGET has the server forget.
pub fn forgets(bytes: &[u8]) -> impl Iterator<Item = ForgetOne> {
    bytes.chunks_exact(size_of::<ForgetOne>()).filter_map(|one| ForgetOne::read_from_bytes(one).ok())
}

/// The arguments at the beginning of a body.
fn arguments<T: FromBytes>(body: &[u8]) -> Option<T> {
    T::read_from_prefix(body).ok().map(|(arguments, _)| arguments)
}

/// The name at the beginning of `bytes`, which a zero byte ends, and what follows.
fn name(bytes: &[u8]) -> Option<(&OsStr, &[u8])> {
    let end = bytes.iter().position(|&byte| byte == 0)?;
    Some((OsStr::from_bytes(&bytes[..end]), &bytes[end + 1..]))
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let header = InHeader { len, opcode, unique: 9, nodeid: 1, ..InHeader::default() };
        [header.as_bytes(), body].concat()
    }

    fn is_body_malformed(bytes: &[u8], code: u32) -> bool {
        parse(bytes).err() == Some(Malformed::Body { unique: 9, opcode: code })
    }

    #[test]
    fn a_write_has_the_payload_that_it_says() {
        let write = WriteIn { fh: 3, offset: 4096, size: 5, ..WriteIn::default() };
        let bytes = request(opcode::WRITE, &[write.as_bytes(), b"hello"].concat());
        let Operation::Write(found, payload) = parse(&bytes).unwrap().operation else { panic!("a write") };
        assert_eq!((found, payload), (write, &b"hello"[..]));
        let short = request(opcode::WRITE, &[write.as_bytes(), b"hell"].concat());
        assert!(is_body_malformed(&short, opcode::WRITE));
    }

    #[test]
    fn names_end_at_a_zero_byte_and_must_have_one() {
        let bytes = request(opcode::LOOKUP, b"disk\0");
        assert!(matches!(parse(&bytes).unwrap().operation, Operation::Lookup(name) if name == "disk"));
        assert!(is_body_malformed(&request(opcode::LOOKUP, b"disk"), opcode::LOOKUP));
        let set = SetxattrIn { size: 2, flags: 1 };
        let bytes = request(opcode::SETXATTR, &[set.as_bytes(), b"user.a\0xy"].concat());
        let Operation::Setxattr { name, value, flags: 1 } = parse(&bytes).unwrap().operation else {
            panic!("a setxattr")
        };
        assert_eq!((name, value), (OsStr::new("user.a"), &b"xy"[..]));
    }

    #[test]
    fn a_count_that_the_bytes_do_not_hold_is_refused() {
        let one = ForgetOne { nodeid: 5, nlookup: 2 };
        for (count, good) in [(1, true), (2, false), (u32::MAX, false)] {
            let head = BatchForgetIn { count, dummy: 0 };
            let bytes = request(opcode::BATCH_FORGET, &[head.as_bytes(), one.as_bytes()].concat());
            match parse(&bytes) {
                Ok(Request { operation: Operation::BatchForget(all), .. }) if good => {
                    assert_eq!(forgets(all).collect::<Vec<_>>(), [one]);
                }
                other => assert!(!good && other.is_err(), "{other:?}"),
            }
        }
    }

    #[test]
    fn every_prefix_of_every_operation_is_understood_or_refused() {
        let body: Vec<u8> = (0..200).collect();
        for code in 0..64 {
            for len in 0..body.len() {
                let bytes = request(code, &body[..len]);
                let _ = parse(&bytes);
                let extended = InHeader { total_extlen: 9, ..InHeader::read_from_prefix(&bytes).unwrap().0 };
                let _ = parse(&[extended.as_bytes(), &body[..len]].concat());
            }
        }
        assert_eq!(parse(&[0; 39]).err(), Some(Malformed::Headless));
        let mut lying = request(opcode::STATFS, b"");
        lying.push(0);
        assert!(is_body_malformed(&lying, opcode::STATFS));
    }
}
