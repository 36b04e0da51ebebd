//! The options of a mount, as `-o` and fstab give them.
//!
//! [`MountOptions::parse`] reads them, [`std::fmt::Display`] writes them in the same language, so that they survive the
//! way through a command line.

use std::fmt;
use std::path::PathBuf;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{HIGH_WATER_PERCENT, SpacePolicy};
use crate::transport::Transport;
use crate::units::parse_size;

/// Most threads that read requests; more would only wake each other.
pub const THREADS_MAX: usize = 64;

/// Seconds between two flushes of a disk that was written, unless the options say otherwise.
pub const FLUSH_SECONDS: u32 = 5;

/// Longest time between two flushes of a disk that was written, in seconds: an hour.
pub const FLUSH_SECONDS_MAX: u32 = 3600;

/// How a store is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Nothing below the mount can be changed.
    pub read_only: bool,
    /// How the kernel's requests are read and answered. `None`: see [`Choice::of`](crate::transport::Choice::of).
    pub transport: Option<Transport>,
    /// Threads that read requests, 1 to [`THREADS_MAX`]. `None`: [`Transport::threads`].
    pub threads: Option<usize>,
    /// Whether other users than the one who mounts may use the mount; file modes still apply to them. `None`: yes for
    /// root, no for anyone else (whom `fusermount3` only allows it if `/etc/fuse.conf` says `user_allow_other`).
    pub allow_other: Option<bool>,
    /// Seconds after which a written disk is flushed although its user asked for no flush; 0 turns that off.
    pub flush_seconds: u32,
    /// Whether a disk whose live map is gone goes back to its last completed flush; without it such a disk is refused.
    pub accept_loss: bool,
    /// Whether the kernel serves by itself, where it can, disks that are one file of the host.
    pub passthrough: bool,
    /// How much of the host's filesystem stays free, and when it is nearly full.
    pub space: SpacePolicy,
    /// Where a daemon in the background writes its messages; a file in the run directory if `None`.
    pub log: Option<PathBuf>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            transport: None,
            threads: None,
            allow_other: None,
            flush_seconds: FLUSH_SECONDS,
            accept_loss: false,
            passthrough: false,
            space: SpacePolicy::default(),
            log: None,
        }
    }
}

/// What an option is to the parser.
enum Meaning {
    Known,
    Unknown,
}

impl MountOptions {
    /// Threads that read requests of a mount by `transport`.
    pub fn threads(&self, transport: Transport) -> usize {
        self.threads.unwrap_or_else(|| transport.threads())
    }

    /// Reads comma-separated options; an empty text or empty options are fine, and of contradicting ones the last
    /// holds.
    ///
    /// Ours: `ro`, `rw`, `transport=NAME` (one of [`Transport::ALL`]), `threads=N`, `allow_other`, `noallow_other`, `flush=SECONDS`,
    /// `accept_loss`, `passthrough=auto`, `passthrough=off`, `reserve=SIZE`, `high_water=PERCENT`, `log=FILE`. Those that only
    /// concern mount(8), systemd or the caches of other filesystems are accepted and do nothing: `defaults`, `auto`, `noauto`,
    /// `nofail`, `user`, `users`, `owner`, `group` and their `no…`, `_netdev`, `x-…`, `comment=…`, `async`, `atime`, `noatime`,
    /// `relatime`, `nodiratime`. So are those that always hold: `nosuid`, `nodev`, `noexec`, `default_permissions`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], naming the option: one that is not known, a value out of range, and `suid`, `dev` and
    /// `exec`, which a mount of disks never grants.
    pub fn parse(text: &str) -> Result<Self> {
        let mut options = Self::default();
        for option in text.split(',').filter(|option| !option.is_empty()) {
            if let Meaning::Unknown = options.apply(option)? {
                return Err(Error::new(ErrorKind::Invalid, format!("mount option {option:?}: not known"))
                    .with_hint(
                        "known: ro, rw, transport=NAME, threads=N, allow_other, noallow_other, flush=SECONDS, accept_loss, \
                         passthrough=auto|off, reserve=SIZE, high_water=PERCENT, log=FILE",
                    ));
            }
        }
        Ok(options)
    }

    /// Like [`MountOptions::parse`], but an option that is not known is passed over (`mount -s`).
    ///
    /// # Errors
    /// As [`MountOptions::parse`], except for unknown options.
    pub fn parse_tolerant(text: &str) -> Result<Self> {
        let mut options = Self::default();
        for option in text.split(',').filter(|option| !option.is_empty()) {
            options.apply(option)?;
        }
        Ok(options)
    }

    fn apply(&mut self, option: &str) -> Result<Meaning> {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option, None),
        };
        match (key, value) {
            ("ro", None) => self.read_only = true,
            ("rw", None) => self.read_only = false,
            ("transport", Some(value)) => {
                let transport = value.parse::<Transport>().context(|| format!("mount option {option:?}"))?;
                self.transport = Some(transport);
            }
            ("threads", Some(value)) => self.threads = Some(in_range(option, value, 1, THREADS_MAX)?),
            ("flush", Some(value)) => self.flush_seconds = in_range(option, value, 0, FLUSH_SECONDS_MAX)?,
            ("allow_other", None) => self.allow_other = Some(true),
            ("noallow_other", None) => self.allow_other = Some(false),
            ("accept_loss", None) => self.accept_loss = true,
            ("passthrough", Some("auto")) => self.passthrough = true,
            ("passthrough", Some("off")) => self.passthrough = false,
            ("passthrough", _) => {
                let message = format!("mount option {option:?}: must be auto or off");
                return Err(Error::new(ErrorKind::Invalid, message));
            }
            ("reserve", Some(value)) => {
                let size = parse_size(value).context(|| format!("mount option {option:?}"))?;
                self.space.reserve = Some(size);
            }
            ("high_water", Some(value)) => self.space.high_water_percent = in_range(option, value, 1, 100)?,
            ("log", Some(path)) if path.starts_with('/') => self.log = Some(PathBuf::from(path)),
            ("log", _) => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("mount option {option:?}: not an absolute path"),
                ));
            }
            ("suid" | "dev" | "exec", None) => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("mount option {option:?}: a mount of disks is always nosuid, nodev and noexec"),
                ));
            }
            ("remount", None) => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    "mount option \"remount\": unmount and mount again",
                ));
            }
            ("defaults" | "auto" | "noauto" | "nofail" | "_netdev" | "async", None)
            | ("user" | "users" | "nouser" | "nousers" | "owner" | "noowner" | "group" | "nogroup", None)
            | ("atime" | "noatime" | "relatime" | "norelatime" | "nodiratime" | "diratime", None)
            | ("nosuid" | "nodev" | "noexec" | "default_permissions", None)
            | ("user" | "comment", Some(_)) => {}
            (key, _) if key.starts_with("x-") || key.starts_with("X-") => {}
            _ => return Ok(Meaning::Unknown),
        }
        Ok(Meaning::Known)
    }

    /// Whether other users may use the mount, for a daemon that runs as root or not.
    pub fn allows_other(&self, root: bool) -> bool {
        self.allow_other.unwrap_or(root)
    }
}

fn in_range<N>(option: &str, value: &str, min: N, max: N) -> Result<N>
where
    N: std::str::FromStr + PartialOrd + fmt::Display,
{
    match value.parse::<N>() {
        Ok(number) if number >= min && number <= max => Ok(number),
        _ => Err(Error::new(
            ErrorKind::Invalid,
            format!("mount option {option:?}: must be a whole number from {min} to {max}"),
        )),
    }
}

impl fmt::Display for MountOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.read_only { "ro" } else { "rw" };
        write!(f, "{access}")?;
        if let Some(threads) = self.threads {
            write!(f, ",threads={threads}")?;
        }
        write!(f, ",flush={}", self.flush_seconds)?;
        if let Some(transport) = self.transport {
            write!(f, ",transport={transport}")?;
        }
        match self.allow_other {
            Some(true) => f.write_str(",allow_other")?,
            Some(false) => f.write_str(",noallow_other")?,
            None => {}
        }
        if self.accept_loss {
            f.write_str(",accept_loss")?;
        }
        if self.passthrough {
            f.write_str(",passthrough=auto")?;
        }
        if let Some(reserve) = self.space.reserve {
            write!(f, ",reserve={reserve}")?;
        }
        if self.space.high_water_percent != HIGH_WATER_PERCENT {
            write!(f, ",high_water={}", self.space.high_water_percent)?;
        }
        match &self.log {
            Some(path) => write!(f, ",log={}", path.display()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_options_are_read() {
        let options = MountOptions::parse(
            "ro,transport=fuser,threads=3,noallow_other,flush=0,accept_loss,passthrough=auto,reserve=2G,high_water=80,\
             log=/var/log/cowdisk.log",
        )
        .unwrap();
        assert!(options.read_only);
        assert_eq!((options.transport, options.threads), (Some(Transport::Fuser), Some(3)));
        assert_eq!(options.allow_other, Some(false));
        assert_eq!(options.flush_seconds, 0);
        assert!(
            options.passthrough
                && !MountOptions::parse("passthrough=auto,passthrough=off").unwrap().passthrough
        );
        assert!(options.accept_loss && !MountOptions::default().accept_loss);
        assert_eq!(options.space, SpacePolicy { reserve: Some(2 << 30), high_water_percent: 80 });
        assert_eq!(options.log, Some(PathBuf::from("/var/log/cowdisk.log")));
    }

    #[test]
    fn options_of_fstab_change_nothing() {
        let fstab =
            "defaults,nofail,_netdev,user,users,noauto,x-systemd.automount,comment=disks,nosuid,,noatime";
        assert_eq!(MountOptions::parse(fstab).unwrap(), MountOptions::default());
        assert_eq!(MountOptions::parse("").unwrap(), MountOptions::default());
    }

    #[test]
    fn the_last_of_two_contradicting_options_holds() {
        assert!(!MountOptions::parse("ro,rw").unwrap().read_only);
        assert!(MountOptions::parse("rw,ro").unwrap().read_only);
    }

    #[test]
    fn a_refused_option_is_named() {
        let bad = [
            "suid",
            "dev",
            "exec",
            "remount",
            "transport=nfs",
            "threads=0",
            "threads=65",
            "threads=x",
            "threads",
            "flush=-1",
            "ro=1",
            "flush=3601",
            "reserve",
            "reserve=",
            "reserve=-1",
            "reserve=10%",
            "reserve=99999999999T",
            "passthrough",
            "passthrough=on",
            "high_water=0",
            "high_water=101",
            "log=relative",
            "log",
            "size=3",
            "nonsense",
        ];
        for option in bad {
            let error = MountOptions::parse(&format!("rw,{option}")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(&format!("{option:?}")), "{error} does not name {option}");
        }
    }

    #[test]
    fn a_tolerant_reader_passes_over_the_unknown_only() {
        assert!(MountOptions::parse_tolerant("nonsense,ro").unwrap().read_only);
        assert!(MountOptions::parse_tolerant("nonsense,exec").is_err());
    }

    #[test]
    fn written_options_read_back_the_same() {
        for text in [
            "ro,transport=fuser,threads=7,allow_other,flush=9,log=/x",
            "transport=io_uring",
            "noallow_other,passthrough=auto",
            "reserve=0,high_water=1",
            "reserve=3M,high_water=100",
            "",
        ] {
            let options = MountOptions::parse(text).unwrap();
            assert_eq!(MountOptions::parse(&options.to_string()).unwrap(), options);
        }
    }
}
