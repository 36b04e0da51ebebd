//! Running virsh, and telling its errors in one line.

use std::io::{Read, Write as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::xml::Element;
use crate::error::{Context as _, Error, ErrorKind, Result};

/// How long a call may take. libvirt answers in tens of milliseconds; starting a guest takes about a second.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// How often a running virsh is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// libvirt at one connection URI, by way of virsh.
#[derive(Clone, Debug)]
pub struct Virsh {
    program: String,
    uri: Option<String>,
}

impl Virsh {
    /// virsh at `uri`. Without one: what libvirt's own environment variables say, else the system's libvirt for root
    /// and the session's for others.
    pub fn new(uri: Option<&str>) -> Self {
        let by_environment = ["VIRSH_DEFAULT_CONNECT_URI", "LIBVIRT_DEFAULT_URI"]
            .iter()
            .any(|name| std::env::var_os(name).is_some());
        let uri = match uri {
            Some(uri) => Some(uri.to_owned()),
            None if by_environment => None,
            None if rustix::process::geteuid().is_root() => Some("qemu:///system".into()),
            None => Some("qemu:///session".into()),
        };
        Self { program: "virsh".into(), uri }
    }

    /// Starts a transient domain.
    ///
    /// # Errors
    /// What libvirt says.
    pub fn create(&self, xml: &str) -> Result<()> {
        self.run(&["create", "--file=/dev/stdin"], Some(xml)).map(drop)
    }

    /// Plugs a device into a running domain.
    ///
    /// # Errors
    /// What libvirt says.
    pub fn attach(&self, domain: &str, device_xml: &str) -> Result<()> {
        self.run(
            &["attach-device", &domain_argument(domain), "--file=/dev/stdin", "--live"],
            Some(device_xml),
        )
        .map(drop)
    }

    /// Asks a running domain to let go of the disk `target`. It is gone when [`Virsh::dump`] no longer tells of it.
    ///
    /// # Errors
    /// What libvirt says.
    pub fn detach(&self, domain: &str, target: &str) -> Result<()> {
        self.run(&["detach-disk", &domain_argument(domain), &format!("--target={target}"), "--live"], None)
            .map(drop)
    }

    /// The live XML of a domain.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such domain.
    pub fn dump(&self, domain: &str) -> Result<Element> {
        let text = self.run(&["dumpxml", &domain_argument(domain)], None)?;
        Element::parse(&text).context(|| format!("virsh dumpxml {domain}"))
    }

    /// Whether there is such a domain, and it is not shut off.
    ///
    /// # Errors
    /// What libvirt says, but for a domain that does not exist.
    pub fn is_running(&self, domain: &str) -> Result<bool> {
        Ok(self.state(domain)?.is_some_and(|state| state != "shut off"))
    }

    /// libvirt's word for what a domain does: `running`, `paused`, `shut off`, …; `None` if there is no such domain.
    ///
    /// # Errors
    /// What libvirt says, but for a domain that does not exist.
    pub fn state(&self, domain: &str) -> Result<Option<String>> {
        match self.run(&["domstate", &domain_argument(domain)], None) {
            Ok(state) => Ok(Some(state.trim().to_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks the guest to power off.
    ///
    /// # Errors
    /// What libvirt says.
    pub fn shutdown(&self, domain: &str) -> Result<()> {
        self.run(&["shutdown", &domain_argument(domain)], None).map(drop)
    }

    /// Ends the domain at once, as by pulling its plug.
    ///
    /// # Errors
    /// What libvirt says.
    pub fn destroy(&self, domain: &str) -> Result<()> {
        self.run(&["destroy", &domain_argument(domain)], None).map(drop)
    }

    /// Runs virsh with `arguments`, the first of which is its command, and returns what it prints.
    fn run(&self, arguments: &[&str], stdin: Option<&str>) -> Result<String> {
        let command = arguments.first().copied().unwrap_or_default();
        let mut process = Command::new(&self.program);
        process.arg("--quiet");
        if let Some(uri) = &self.uri {
            process.arg(format!("--connect={uri}"));
        }
        process.args(arguments);
        // Its messages are read below.
        process.env("LC_ALL", "C").env_remove("LANGUAGE");
        log::debug!("run {process:?}");
        let (status, stdout, stderr) = run(process, stdin).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::new(ErrorKind::Unsupported, "virsh is not installed")
                .with_hint("install libvirt's client: apt-get install libvirt-clients"),
            _ => error.context(format!("virsh {command}")),
        })?;
        if status.success() {
            return Ok(stdout);
        }
        Err(failure(arguments, status, &stderr))
    }
}

/// Before a domain's name.
const DOMAIN: &str = "--domain=";

/// A domain's name as one argument, even if it begins with a dash.
fn domain_argument(domain: &str) -> String {
    format!("{DOMAIN}{domain}")
}

/// Runs a process to its end or to the time limit; returns its status and what it printed.
fn run(mut command: Command, stdin: Option<&str>) -> Result<(ExitStatus, String, String)> {
    let mut child = command
        .stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(|| "start")?;
    let (input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        let output = scope.spawn(|| read_all(output));
        let errors = scope.spawn(|| read_all(errors));
        if let (Some(mut pipe), Some(text)) = (input, stdin) {
            // A process that ends without reading says itself why.
            let _ = pipe.write_all(text.as_bytes());
        }
        let status = wait(&mut child);
        let texts = (output.join().unwrap_or_default(), errors.join().unwrap_or_default());
        Ok((status?, texts.0, texts.1))
    })
}

fn read_all(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn wait(child: &mut Child) -> Result<ExitStatus> {
    let deadline = Instant::now() + TIME_LIMIT;
    loop {
        if let Some(status) = child.try_wait().context(|| "wait")? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::new(
                ErrorKind::Io,
                format!("no answer from libvirt within {} seconds", TIME_LIMIT.as_secs()),
            ));
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// The error for a failed call: virsh's last line, which names the cause, without what is only framing.
fn failure(arguments: &[&str], status: ExitStatus, stderr: &str) -> Error {
    let command = arguments.first().copied().unwrap_or_default();
    let lines: Vec<&str> = stderr.lines().filter_map(|line| line.strip_prefix("error: ")).collect();
    let last = stderr.lines().map(str::trim).rfind(|line| !line.is_empty());
    let cause = match lines.last().copied().or(last) {
        Some(cause) => {
            cause.strip_prefix("internal error: ").unwrap_or(cause).trim_end_matches('.').to_owned()
        }
        None => status.to_string(),
    };
    let all = lines.join("\n");
    if all.contains("failed to get domain") || all.contains("Domain not found") {
        let domain = arguments.iter().find_map(|argument| argument.strip_prefix(DOMAIN)).unwrap_or("?");
        return Error::new(ErrorKind::NotFound, format!("domain {domain}: not found"))
            .with_hint("see what there is: virsh list --all");
    }
    let kind = if all.contains("already exists") || all.contains("already active") {
        ErrorKind::Exists
    } else if all.contains("get \"write\" lock") {
        ErrorKind::Busy
    } else {
        ErrorKind::Io
    };
    let error = Error::new(kind, format!("virsh {command}: {cause}"));
    match HINTS.iter().find(|(words, _)| all.contains(words)) {
        Some((_, hint)) => error.with_hint(*hint),
        None => error,
    }
}

/// Words of libvirt and what to do about them.
const HINTS: [(&str, &str); 6] = [
    ("failed to connect to the hypervisor", "is libvirtd running? --connect URI chooses another libvirt"),
    ("Permission denied", "every folder above the mountpoint must be open (o+x) to QEMU's user"),
    ("Network not found", "see what there is: virsh net-list --all"),
    ("is not active", "start the network: virsh net-start NAME"),
    ("domaintype=kvm", "this host has no KVM for guests: leave --type away, or say --type qemu"),
    ("failed to initialize kvm", "this host has no KVM for guests: leave --type away, or say --type qemu"),
];

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    fn failure_of(stderr: &str) -> Error {
        failure(&["create", "--domain=web-1"], ExitStatus::from_raw(256), stderr)
    }

    #[test]
    fn the_cause_is_told_in_one_line() {
        let error = failure_of(
            "error: Failed to create domain from /dev/stdin\nerror: operation failed: domain 'web-1' already exists with uuid 1\n\n",
        );
        assert_eq!(
            error.to_string(),
            "virsh create: operation failed: domain 'web-1' already exists with uuid 1"
        );
        assert_eq!(error.kind(), ErrorKind::Exists);
        assert_eq!(failure_of("").to_string(), "virsh create: exit status: 1");
        assert_eq!(failure_of("odd words\n").to_string(), "virsh create: odd words");
    }

    #[test]
    fn a_missing_domain_is_not_found() {
        let error = failure_of("error: failed to get domain 'web-1'\n");
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (ErrorKind::NotFound, "domain web-1: not found")
        );
    }

    #[test]
    fn a_libvirt_that_does_not_answer_has_a_hint() {
        let error = failure_of(
            "error: failed to connect to the hypervisor\nerror: Failed to connect socket to '/run/libvirt/libvirt-sock': No such file or directory\n",
        );
        assert!(error.to_string().ends_with("No such file or directory"), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.starts_with("is libvirtd running?")));
        let error = failure_of(
            "error: Failed to create domain from /dev/stdin\nerror: Requested operation is not valid: network 'default' is not active\n",
        );
        assert_eq!(error.hint(), Some("start the network: virsh net-start NAME"));
    }

    #[test]
    fn a_missing_virsh_says_what_to_install() {
        let virsh = Virsh { program: "/nonexistent/virsh".into(), uri: None };
        let error = virsh.is_running("x").unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (ErrorKind::Unsupported, "virsh is not installed")
        );
    }
}
