//! The system calls that a daemon never makes once it has mounted: they answer EPERM to whoever makes it try.
//!
//! It is a list of what is refused, not of what is allowed: another version of libc or another kernel then cannot break
//! a daemon that guests depend on. Calls of another architecture (32 bit) kill the process, and those of x32, which are the
//! same calls under other numbers, are refused as a whole. docs/SECURITY.md says what the filter costs.
//!
//! io_uring is allowed, for small reads of bases and for the transport of that name. What it does a filter cannot see; but it has no operation that runs a program,
//! mounts, or changes whose rights this process has.
#![allow(unsafe_code)]

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    sock_filter,
};

use crate::error::{Context, Error, ErrorKind, Result};

/// Numbers that are the same everywhere.
const SYS_QUOTACTL_FD: i64 = 443;
const SYS_OPEN_TREE_ATTR: i64 = 467;
const SYS_CLONE3: u32 = 435;

/// Requests of fcntl(2) and ioctl(2) that name whom the kernel signals when a file becomes ready, and by which signal.
const F_SETOWN: u64 = 8;
const F_SETSIG: u64 = 10;
const F_SETOWN_EX: u64 = 15;
const FIOSETOWN: u64 = 0x8901;
const SIOCSPGRP: u64 = 0x8902;

/// Flags of clone(2) that make a namespace.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// From here on numbers are those of x32.
const X32: u32 = 0x4000_0000;

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
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_send_signal,
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
    SYS_QUOTACTL_FD,
    SYS_OPEN_TREE_ATTR,
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
    // Signals and limits of this process alone: libc ends it by tgkill, and reads its limits as those of process 0.
    let own = std::process::id().cast_signed();
    rules.insert(libc::SYS_tgkill, vec![argument(0, SeccompCmpOp::Ne, own)?]);
    rules.insert(libc::SYS_prlimit64, vec![argument(0, SeccompCmpOp::Ne, 0)?]);
    // What types into a terminal, or has the kernel send signals in our name. The kernel takes the request as 32 bits.
    let second = |values: &[u64]| -> std::result::Result<Vec<_>, seccompiler::BackendError> {
        let refused = values.iter().map(|&value| {
            SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
                .and_then(|condition| SeccompRule::new(vec![condition]))
        });
        refused.collect()
    };
    rules.insert(libc::SYS_ioctl, second(&[libc::TIOCSTI, libc::TIOCLINUX, FIOSETOWN, SIOCSPGRP])?);
    rules.insert(libc::SYS_fcntl, second(&[F_SETOWN, F_SETSIG, F_SETOWN_EX])?);
    // Threads, but no namespaces: one flag is enough to be refused.
    let namespaces = NAMESPACES
        .iter()
        .map(|&flag| argument(0, SeccompCmpOp::MaskedEq(u64::from(flag.cast_unsigned())), flag));
    rules.insert(libc::SYS_clone, namespaces.collect::<std::result::Result<_, _>>()?);
    let refusal = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let listed: BpfProgram =
        SeccompFilter::new(rules, SeccompAction::Allow, refusal, std::env::consts::ARCH.try_into()?)?
            .try_into()?;
    Ok(by_number().into_iter().chain(listed).collect())
}

/// Refuses what a list of single numbers cannot, before that list.
fn by_number() -> [sock_filter; 5] {
    let instruction = |code: u32, jt, jf, k| sock_filter {
        code: code.try_into().expect("the codes of BPF have 16 bits"),
        jt,
        jf,
        k,
    };
    let errno = |errno: i32| libc::SECCOMP_RET_ERRNO | errno.cast_unsigned();
    [
        // The number of the call: it comes first in `seccomp_data`.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, errno(libc::EPERM)),
        // Its flags lie in memory, where no filter sees them. A libc that is told that it is not there takes clone.
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, SYS_CLONE3),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, errno(libc::ENOSYS)),
    ]
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Makes the child a child.
    const VARIABLE: &str = "COWDISK_TEST_CONFINED";
    /// What must not be typed.
    static TYPED: u8 = b'x';

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
        let number = |call: libc::c_long| {
            // SAFETY: without arguments that point anywhere none of these calls touches memory of ours.
            unsafe { libc::syscall(call, 0, 0, 0, 0, 0, 0) };
            std::io::Error::last_os_error().raw_os_error()
        };
        let cloned = |flag: libc::c_int| {
            // SAFETY: refused; were it not, a child without a stack of its own would begin as fork(2) begins one.
            let child = unsafe { libc::syscall(libc::SYS_clone, flag | libc::SIGCHLD, 0, 0, 0, 0) };
            if child == 0 {
                std::process::exit(1);
            }
            std::io::Error::last_os_error().raw_os_error()
        };
        for flag in NAMESPACES {
            assert_eq!(cloned(flag), denied, "clone with {flag:#x}");
        }
        assert_eq!(number(libc::SYS_clone3), Some(libc::ENOSYS), "clone3");
        if cfg!(target_arch = "x86_64") {
            // execve of x32; a kernel without it says ENOSYS.
            assert_eq!(number(0x4000_0000 + 520), denied, "x32");
        }
        let parent = rustix::process::getppid().unwrap();
        assert_eq!(rustix::process::test_kill_process(parent), Err(rustix::io::Errno::PERM), "signals");
        let core = rustix::process::Resource::Core;
        let none =
            rustix::process::Rlimit { current: Some(0), maximum: rustix::process::getrlimit(core).maximum };
        assert!(rustix::process::prlimit(None, core, none).is_ok(), "limits of its own");
        let other = rustix::process::prlimit(Some(parent), core, none);
        assert!(matches!(other, Err(rustix::io::Errno::PERM)), "limits of others");
        assert_ne!(number(libc::SYS_io_uring_setup), denied, "io_uring serves the data path");
        // SAFETY: the request reads one byte of the local, if at all.
        let typed = unsafe { libc::ioctl(0, libc::TIOCSTI, &raw const TYPED) };
        assert_eq!((typed, std::io::Error::last_os_error().raw_os_error()), (-1, denied), "TIOCSTI");
        let file = std::fs::File::open("/dev/null").unwrap();
        let asked = |call: libc::c_long, request: u64| {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            // SAFETY: refused; were it not, an argument of 0 is a number, or an address that the kernel finds bad.
            unsafe { libc::syscall(call, fd, request, 0) };
            std::io::Error::last_os_error().raw_os_error()
        };
        for request in [F_SETOWN, F_SETSIG, F_SETOWN_EX] {
            assert_eq!(asked(libc::SYS_fcntl, request), denied, "fcntl {request}");
        }
        for request in [FIOSETOWN, SIOCSPGRP] {
            assert_eq!(asked(libc::SYS_ioctl, request), denied, "ioctl {request:#x}");
        }
        assert!(file.try_clone().is_ok(), "fcntl for the rest");
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

    /// Reads in one measurement, each of 4 KiB of a file in the cache.
    const READS: u64 = 100_000;
    const MEASURED: &str = "COWDISK_TEST_MEASURED";

    /// Measures in a process of its own, for a filter stays.
    #[test]
    fn measured_process() {
        let Some(filtered) = std::env::var_os(MEASURED) else { return };
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &[7; 4096]).unwrap();
        if filtered == "yes" {
            rustix::thread::set_no_new_privs(true).unwrap();
            install().unwrap();
        }
        let mut buf = [0; 4096];
        // Time on a processor alone, so that others on the machine count less.
        let used = || {
            let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
            text.split(' ').next().unwrap().parse::<u64>().unwrap()
        };
        let before = used();
        for _ in 0..READS {
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut buf, 0).unwrap();
        }
        println!("nanoseconds: {}", (used() - before) / READS);
    }

    #[test]
    #[ignore = "prints what docs/SECURITY.md quotes; asserts no time"]
    fn what_the_filter_costs() {
        let measure = |filtered: &str| {
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "daemon::seccomp::tests::measured_process", "--nocapture"])
                .env(MEASURED, filtered)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let number = said.lines().find_map(|line| line.split("nanoseconds: ").nth(1));
            number.unwrap_or_else(|| panic!("{said}")).parse::<u64>().unwrap()
        };
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for _ in 0..21 {
            without.push(measure("no"));
            with.push(measure("yes"));
        }
        let median = |figures: &mut Vec<u64>| {
            figures.sort_unstable();
            figures[figures.len() / 2]
        };
        let (without, with) = (median(&mut without), median(&mut with));
        println!("pread of 4 KiB, medians of 21: {without} ns without the filter, {with} ns with it");
    }
}
