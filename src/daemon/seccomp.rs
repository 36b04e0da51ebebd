//! The system calls that a daemon never makes once it has mounted: they answer EPERM to whoever makes it try.
//!
//! It is a list of what is refused, not of what is allowed: another version of libc or another kernel then cannot break
//! a daemon that guests depend on. The filter costs some nanoseconds in each system call.
#![allow(unsafe_code)]

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::error::{Context, Error, ErrorKind, Result};

/// Refused with any arguments.
const REFUSED: &[i64] = &[
    // Other programs, other processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Other users.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    // Other file systems and namespaces. umount2 is not here: it ends the daemon.
    libc::SYS_mount,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_acct,
    libc::SYS_mknodat,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    // The kernel and the whole machine.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_personality,
    // Asynchronous calls, which a filter cannot see.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// Refused on this architecture only.
#[cfg(target_arch = "x86_64")]
const REFUSED_HERE: &[i64] =
    &[libc::SYS_kexec_file_load, libc::SYS_mknod, libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_HERE: &[i64] = &[];

/// Installs the filter for all threads of this process. No new privileges must be set.
///
/// # Errors
/// If the kernel has no filters.
pub(super) fn install() -> Result<()> {
    let wrong = |error| Error::caused(ErrorKind::Unsupported, "make a filter of system calls", error);
    let program = program().map_err(wrong)?;
    let len =
        program.len().try_into().map_err(|_| Error::new(ErrorKind::Unsupported, "a filter that long"))?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    let filter = |flags: libc::c_ulong| -> std::io::Result<()> {
        // SAFETY: `program` points to `len` instructions that outlive the call, of the layout of `sock_filter`, which
        // the crate declares as the kernel does. The kernel checks and copies them.
        match unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
        } {
            0 => Ok(()),
            -1 => Err(std::io::Error::last_os_error()),
            // The id of a thread that could not be brought along.
            _ => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
        }
    };
    // Kernels before 5.16 slow a filtered process down against one kind of speculation, unless told that it runs
    // nobody else's code.
    filter(libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW)
        .or_else(|_| filter(libc::SECCOMP_FILTER_FLAG_TSYNC))
        .context(|| "install a filter of system calls")
}

fn program() -> std::result::Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().chain(REFUSED_HERE).map(|&call| (call, Vec::new())).collect();
    let argument = |index, operator, value: i32| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, u64::from(value.cast_unsigned()))
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    // Sockets of this machine alone.
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        rules.insert(call, vec![argument(0, SeccompCmpOp::Ne, libc::AF_UNIX)?]);
    }
    // Threads, but no namespace in which one is root. (clone3, whose flags lie in memory, can make one; in it
    // nothing outside of it can be had, and mounting is refused.)
    let namespace = u64::from(libc::CLONE_NEWUSER.cast_unsigned());
    rules.insert(libc::SYS_clone, vec![argument(0, SeccompCmpOp::MaskedEq(namespace), libc::CLONE_NEWUSER)?]);
    let refusal = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, refusal, std::env::consts::ARCH.try_into()?)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Makes the child a child.
    const VARIABLE: &str = "COWDISK_TEST_CONFINED";

    /// Confines this very process, so it is run by the next test in one of its own.
    #[test]
    fn confined_process() {
        if std::env::var_os(VARIABLE).is_none() {
            return;
        }
        let denied = Some(libc::EPERM);
        let errno = |error: std::io::Error| error.raw_os_error();
        let before = Command::new("true").status().unwrap();
        assert!(before.success());
        let other_thread = std::thread::spawn(|| {
            std::thread::park();
            Command::new("true").status()
        });
        rustix::thread::set_no_new_privs(true).unwrap();
        install().unwrap();

        assert_eq!(Command::new("true").status().map_err(errno).unwrap_err(), denied, "execve");
        other_thread.thread().unpark();
        assert_eq!(other_thread.join().unwrap().map_err(errno).unwrap_err(), denied, "threads of before too");
        assert_eq!(std::net::TcpListener::bind("127.0.0.1:0").map_err(errno).unwrap_err(), denied, "inet");
        assert!(std::os::unix::net::UnixStream::pair().is_ok());
        let root = rustix::process::Uid::ROOT;
        assert_eq!(rustix::thread::set_thread_uid(root), Err(rustix::io::Errno::PERM));
        let flags = rustix::mount::MountFlags::empty();
        let mounted = rustix::mount::mount("none", "/nonexistent", "tmpfs", flags, None::<&std::ffi::CStr>);
        assert_eq!(mounted, Err(rustix::io::Errno::PERM), "an absent folder would be ENOENT");
        let unmounted = rustix::mount::unmount("/nonexistent", rustix::mount::UnmountFlags::empty());
        assert_ne!(unmounted, Err(rustix::io::Errno::PERM), "unmounting is not refused");
        // What serving needs still goes.
        std::thread::spawn(|| std::fs::read("/proc/self/status").unwrap()).join().unwrap();
        println!("confined");
    }

    #[test]
    fn refused_calls_fail_in_all_threads_and_the_rest_goes_on() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "daemon::seccomp::tests::confined_process", "--nocapture"])
            .env(VARIABLE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("confined\n"),
            "{said}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
