//! Getting a `/dev/fuse` descriptor that is mounted somewhere, and taking the mount away again.
//!
//! The mount is made here and not by the crate `fuser`, so that it carries our own type and source, so that nothing but
//! an explicit [`unmount`] ever takes it away, and so that the descriptor can outlive the session that uses it. With
//! the privilege for it, mount(2) is called; without, `fusermount3`, which is setuid root on most systems.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::error::{Context, Error, ErrorKind, Result};

/// The device of the kernel's FUSE.
const DEVICE: &str = "/dev/fuse";

/// The type under which a store is mounted.
pub const FS_TYPE: &str = "fuse.cowdisk";

/// The setuid helper of libfuse that mounts for those who may not.
const HELPER: &str = "fusermount3";

/// What the kernel is told about a mount.
#[derive(Clone, Debug)]
pub struct MountRequest<'a> {
    /// What is mounted, shown in `/proc/mounts`: the directory of the store.
    pub source: &'a Path,
    /// An existing directory.
    pub mountpoint: &'a Path,
    /// Nothing can be changed through this mount.
    pub read_only: bool,
    /// Other users may enter; the kernel checks modes for everyone.
    pub allow_other: bool,
}

/// Mounts and returns the descriptor on which the kernel now waits for an answer to its INIT.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if there is no FUSE here, [`ErrorKind::Denied`] if this user may not mount.
pub fn mount(request: &MountRequest<'_>) -> Result<OwnedFd> {
    let device = open_device()?;
    match mount_directly(request, &device) {
        Ok(()) => Ok(device),
        Err(rustix::io::Errno::PERM) => mount_by_helper(request),
        Err(errno) => Err(Error::io(format!("mount {}", request.mountpoint.display()), errno.into())),
    }
}

/// Opens the kernel's device: a descriptor without a connection.
pub(super) fn open_device() -> Result<OwnedFd> {
    match File::options().read(true).write(true).open(DEVICE) {
        Ok(file) => Ok(file.into()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) || is_no_device(&error) => {
            Err(Error::caused(ErrorKind::Unsupported, format!("open {DEVICE}"), error)
                .with_hint("this kernel has no FUSE loaded: try `modprobe fuse`"))
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(Error::io(format!("open {DEVICE}"), error)
                .with_hint("mount as root, or let users use FUSE: chmod 0666 /dev/fuse"))
        }
        Err(error) => Err(Error::io(format!("open {DEVICE}"), error)),
    }
}

/// Whether this process can open the kernel's device.
///
/// # Errors
/// Those of [`mount`], with what can be done about them.
pub fn check_device() -> Result<()> {
    open_device().map(drop)
}

/// Whether this process could open the kernel's device again.
pub(super) fn may_open_device() -> bool {
    File::options().read(true).write(true).open(DEVICE).is_ok()
}

fn is_no_device(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO))
}

fn mount_directly(
    request: &MountRequest<'_>,
    device: &OwnedFd,
) -> std::result::Result<(), rustix::io::Errno> {
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    flags.set(MountFlags::RDONLY, request.read_only);
    let data = format!(
        "fd={},rootmode=40755,user_id={},group_id={},default_permissions{}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        if request.allow_other { ",allow_other" } else { "" },
    );
    let data = CString::new(data).expect("the options hold no NUL");
    rustix::mount::mount(request.source, request.mountpoint, FS_TYPE, flags, data.as_c_str())
}

/// Has `fusermount3` mount. It sends the descriptor over the socket whose number `_FUSE_COMMFD` names: its stdin.
fn mount_by_helper(request: &MountRequest<'_>) -> Result<OwnedFd> {
    let what = || format!("mount {} by {HELPER}", request.mountpoint.display());
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().context(what)?;
    let mut options = format!(
        "nosuid,nodev,noexec,default_permissions,{},subtype=cowdisk,fsname={}",
        if request.read_only { "ro" } else { "rw" },
        escape(request.source)?,
    );
    if request.allow_other {
        options.push_str(",allow_other");
    }
    let output = Command::new(HELPER)
        .arg("-o")
        .arg(options)
        .arg("--")
        .arg(request.mountpoint)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .output()
        .context(what)
        .map_err(|error| error.with_hint("mount as root, or install fuse3 and its fusermount3"))?;
    check(&output).context(what)?;
    receive_descriptor(&ours).context(what)
}

/// `fusermount3` splits its options at commas unless a backslash stands before one.
fn escape(path: &Path) -> Result<String> {
    let text = path.to_str().ok_or_else(|| {
        Error::new(ErrorKind::Invalid, format!("{}: {HELPER} needs a path in UTF-8", path.display()))
    })?;
    Ok(text.replace('\\', "\\\\").replace(',', "\\,"))
}

fn receive_descriptor(socket: &std::os::unix::net::UnixStream) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8];
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .context(|| "receive the descriptor")?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message
            && let Some(descriptor) = descriptors.next()
        {
            return Ok(descriptor);
        }
    }
    Err(Error::new(ErrorKind::Io, "it sent no descriptor"))
}

fn check(output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let line = said.lines().next().unwrap_or("it said nothing").trim();
    let error = Error::new(ErrorKind::Denied, line.trim_start_matches("fusermount3: "));
    Err(if said.contains("user_allow_other") {
        error.with_hint("mount with -o noallow_other, or put user_allow_other into /etc/fuse.conf")
    } else {
        error
    })
}

/// Takes a mount away.
///
/// # Errors
/// [`ErrorKind::Busy`] if a file in it is open or a process stands in it; nothing is changed then.
pub fn unmount(mountpoint: &Path) -> Result<()> {
    let what = || format!("unmount {}", mountpoint.display());
    match rustix::mount::unmount(mountpoint, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::PERM) => {
            let output = Command::new(HELPER).arg("-u").arg("--").arg(mountpoint).output().context(what)?;
            check(&output)
                .map_err(|error| if is_busy(&output) { busy(mountpoint) } else { error })
                .context(what)
        }
        Err(errno) => Err(Error::io(what(), errno.into())),
    }
}

fn is_busy(output: &Output) -> bool {
    String::from_utf8_lossy(&output.stderr).contains("busy")
}

fn busy(mountpoint: &Path) -> Error {
    Error::new(ErrorKind::Busy, format!("{} is in use", mountpoint.display()))
}
