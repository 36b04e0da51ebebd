//! The kernel's structures of `/dev/fuse`, protocol 7.31 to 7.45, in the byte order of the host.
//!
//! Only what our transports read or write; names and fields are those of Linux's `include/uapi/linux/fuse.h`, which
//! is the specification. Every structure is plain bytes: reading one out of a request copies it and cannot go wrong but
//! for want of bytes.
#![allow(missing_docs)] // the kernel's names

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The version of the protocol that we speak: 7.31 is Linux 5.4's, the highest that every supported kernel has.
pub const MAJOR: u32 = 7;
/// The newest minor version of which we know all that we use.
pub const MINOR_MAX: u32 = 45;
/// The oldest minor version that we serve.
pub const MINOR_MIN: u32 = 31;

/// Bytes before the payload of a WRITE: [`InHeader`] and [`WriteIn`].
pub const WRITE_HEAD_BYTES: usize = size_of::<InHeader>() + size_of::<WriteIn>();

/// Operation codes, by the names of `enum fuse_opcode`.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const TMPFILE: u32 = 51;
}

/// Capabilities of INIT, `FUSE_*` of `fuse.h`; those above bit 31 travel in `flags2`.
pub mod capability {
    pub const ASYNC_READ: u64 = 1;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const PASSTHROUGH: u64 = 1 << 37;
    pub const HAS_RESEND: u64 = 1 << 39;
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// Flags of the answer to OPEN, `FOPEN_*`.
pub mod open_flag {
    pub const DIRECT_IO: u32 = 1;
    pub const NOFLUSH: u32 = 1 << 5;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    pub const PASSTHROUGH: u32 = 1 << 7;
}

/// Which fields of [`SetattrIn`] count, `FATTR_*`.
pub mod attribute {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// Tells the kernel to send again what was read and not answered, `FUSE_NOTIFY_RESEND`.
pub const NOTIFY_RESEND: i32 = 7;

/// Marks the number of a request that the kernel sends again, `FUSE_UNIQUE_RESEND`.
pub const RESENT: u64 = 1 << 63;

/// Commands of an io_uring to `/dev/fuse`, `enum fuse_uring_cmd`.
pub mod ring_command {
    pub const REGISTER: u32 = 1;
    pub const COMMIT_AND_FETCH: u32 = 2;
}

/// A write on behalf of a shared mapping's page, `FUSE_WRITE_CACHE`.
pub const WRITE_CACHE: u32 = 1;

/// Most bytes of a first argument that travels by io_uring, `FUSE_URING_OP_IN_OUT_SZ`.
pub const RING_ARGUMENT_BYTES: usize = 128;

/// What the kernel and we tell each other of a request that travels by io_uring, but for its payload:
/// `fuse_uring_req_header`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RingHead {
    /// An [`InHeader`] from the kernel, an [`OutHeader`] from us.
    pub in_out: [u8; 128],
    /// The request's first argument, if it has one.
    pub op_in: [u8; RING_ARGUMENT_BYTES],
    pub ent: RingEntInOut,
}
const _: () = assert!(size_of::<RingHead>() == 288);

macro_rules! structures {
    ($($(#[$meta:meta])* $name:ident $bytes:literal { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $(pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $bytes);
    )*};
}

structures! {
    /// Before every request.
    InHeader 40 {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16, padding: u16,
    }
    /// Before every answer: `error` is 0 or a negative errno.
    OutHeader 16 { len: u32, error: i32, unique: u64, }
    /// INIT as every kernel sends it; newer ones append `flags2` and reserved words.
    InitIn 16 { major: u32, minor: u32, max_readahead: u32, flags: u32, }
    InitOut 64 {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }
    ForgetIn 8 { nlookup: u64, }
    BatchForgetIn 8 { count: u32, dummy: u32, }
    ForgetOne 16 { nodeid: u64, nlookup: u64, }
    SetattrIn 88 {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    OpenIn 8 { flags: u32, open_flags: u32, }
    OpenOut 16 { fh: u64, open_flags: u32, backing_id: i32, }
    ReadIn 40 {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    WriteIn 40 {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    WriteOut 8 { size: u32, padding: u32, }
    ReleaseIn 24 { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    FsyncIn 16 { fh: u64, fsync_flags: u32, padding: u32, }
    SetxattrIn 8 { size: u32, flags: u32, }
    GetxattrIn 8 { size: u32, padding: u32, }
    GetxattrOut 8 { size: u32, padding: u32, }
    IoctlIn 32 { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, }
    IoctlOut 16 { result: i32, flags: u32, in_iovs: u32, out_iovs: u32, }
    FallocateIn 32 { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    LseekIn 24 { fh: u64, offset: u64, whence: u32, padding: u32, }
    LseekOut 8 { offset: u64, }
    Attr 88 {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    EntryOut 128 {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: Attr,
    }
    AttrOut 104 { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }
    StatfsOut 80 {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    /// `fuse_uring_ent_in_out`: `commit_id` names the request, `payload_sz` is the length of what is in the payload.
    RingEntInOut 32 { flags: u64, commit_id: u64, payload_sz: u32, padding: u32, reserved: u64, }
    /// Behind the first 48 bytes of a command: `fuse_uring_cmd_req`.
    RingCommand 24 { flags: u64, commit_id: u64, qid: u16, padding: [u8; 6], }
    /// Before each name that READDIR answers with; name and zeroes follow, to a multiple of 8 bytes.
    Dirent 24 { ino: u64, off: u64, namelen: u32, kind: u32, }
}
