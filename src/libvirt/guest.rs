//! An instance of a mounted store as a guest: its domain, and plugging its disks into other domains.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::domain::{Accelerator, DirectBoot, Domain, GuestDisk, Role, free_targets};
use super::virsh::Virsh;
use super::xml::Element;
use crate::error::{Context as _, Error, ErrorKind, Result};

/// The kernel's command line where none is given: the root disk as a whole is the root filesystem.
const DEFAULT_APPEND: &str = "root=/dev/vda rw console=ttyS0";

/// How often libvirt is asked whether something has happened.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// An instance whose disks domains may have, whether it can be seen in a mount or not.
#[derive(Clone, Debug)]
pub struct Guest {
    name: String,
    mountpoint: Option<PathBuf>,
}

/// The disks and boot files of an instance, as a mount shows them.
#[derive(Clone, Debug)]
pub struct MountedInstance {
    guest: Guest,
    folder: PathBuf,
    disks: Vec<(Role, PathBuf)>,
}

/// What the user wants of a guest; what is `None` is chosen.
#[derive(Clone, Debug, Default)]
pub struct GuestOptions {
    /// The kernel to boot instead of the instance's.
    pub kernel: Option<PathBuf>,
    /// The initial ramdisk to boot with.
    pub ramdisk: Option<PathBuf>,
    /// The kernel's command line.
    pub append: Option<String>,
    /// A network of libvirt.
    pub network: Option<String>,
    /// Where the serial console is written to.
    pub console_log: Option<PathBuf>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Number of virtual processors.
    pub vcpus: u32,
}

impl MountedInstance {
    /// The instance `name` in the store mounted at `mountpoint`, an absolute path.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the mount does not show it.
    pub fn find(mountpoint: &Path, name: &str) -> Result<Self> {
        let folder = mountpoint.join("instances").join(name);
        let all = [(Role::Root, folder.join("disk")), (Role::Local, folder.join("disk.local"))];
        let mut disks = Vec::new();
        for (role, path) in all {
            if path.try_exists().context(|| format!("look at {}", path.display()))? {
                disks.push((role, path));
            }
        }
        if disks.is_empty() {
            return Err(Error::new(ErrorKind::NotFound, format!("{}: not in the mount", folder.display())));
        }
        Ok(Self { guest: Guest::new(name, Some(mountpoint)), folder, disks })
    }

    /// Its disks in its own domain: `vda`, and `vdb` where it has a local disk.
    pub fn own_disks(&self) -> Vec<GuestDisk> {
        let disk = |(role, path): &(Role, PathBuf)| GuestDisk {
            path: path.clone(),
            target: role.target().to_owned(),
            serial: role.serial(),
        };
        self.disks.iter().map(disk).collect()
    }

    /// Its own domain.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a ramdisk or a command line without a kernel; [`ErrorKind::NotFound`] for a kernel
    /// or ramdisk that is not there.
    pub fn domain(&self, options: &GuestOptions, accelerator: Accelerator) -> Result<Domain> {
        Ok(Domain {
            name: self.guest.name.clone(),
            accelerator,
            memory_bytes: options.memory_bytes,
            vcpus: options.vcpus,
            boot: self.boot(options)?,
            disks: self.own_disks(),
            network: options.network.clone(),
            console_log: options.console_log.clone(),
        })
    }

    fn boot(&self, options: &GuestOptions) -> Result<Option<DirectBoot>> {
        let (kernel, ramdisk) = match &options.kernel {
            Some(kernel) => (Some(resolve(kernel)?), None),
            None => (self.own_file("kernel")?, self.own_file("ramdisk")?),
        };
        let ramdisk = options.ramdisk.as_deref().map(resolve).transpose()?.or(ramdisk);
        match kernel {
            Some(kernel) => {
                let append = options.append.clone().unwrap_or_else(|| DEFAULT_APPEND.to_owned());
                Ok(Some(DirectBoot { kernel, ramdisk, append }))
            }
            None if options.ramdisk.is_some() || options.append.is_some() => Err(Error::new(
                ErrorKind::Invalid,
                format!("instance {}: a ramdisk or command line needs a kernel", self.guest.name),
            )
            .with_hint("give --kernel, or import the image with its kernel")),
            None => Ok(None),
        }
    }

    /// The file behind the link `name`, if the instance has it.
    fn own_file(&self, name: &str) -> Result<Option<PathBuf>> {
        match resolve(&self.folder.join(name)) {
            Ok(path) => Ok(Some(path)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Plugs the disks into a running domain, at its next free names; returns those. Either all are plugged in or none.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the domain has one of them already; what libvirt says.
    pub fn attach(&self, virsh: &Virsh, domain: &str) -> Result<Vec<GuestDisk>> {
        let live = virsh.dump(domain)?;
        if let Some(target) = self.guest.targets_in(&live).first() {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("instance {}: attached to domain {domain} already, as {target}", self.guest.name),
            ));
        }
        let targets = free_targets(&targets(&live), self.disks.len());
        let mut attached = Vec::new();
        for ((role, path), target) in self.disks.iter().zip(targets) {
            let disk =
                GuestDisk { path: path.clone(), target, serial: role.foreign_serial(&self.guest.name) };
            if let Err(error) = virsh.attach(domain, &disk.to_element()?.to_xml()?) {
                for disk in attached.iter().map(|disk: &GuestDisk| &disk.target) {
                    if let Err(error) = virsh.detach(domain, disk) {
                        log::warn!("domain {domain}: take {disk} back: {error}");
                    }
                }
                return Err(with_namespace_hint(error)
                    .context(format!("attach {} to domain {domain}", path.display())));
            }
            attached.push(disk);
        }
        Ok(attached)
    }
}

impl Guest {
    /// The instance `name` of the store that is, or last was, mounted at `mountpoint`; `None` if that is not known.
    pub fn new(name: &str, mountpoint: Option<&Path>) -> Self {
        Self { name: name.to_owned(), mountpoint: mountpoint.map(Path::to_owned) }
    }

    /// Unplugs the disks from a running domain and waits until the guest has let go of them; returns their names.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the domain has none of them; [`ErrorKind::Busy`] if the guest keeps one longer than
    /// `patience`.
    pub fn detach(&self, virsh: &Virsh, domain: &str, patience: Duration) -> Result<Vec<String>> {
        let targets = self.targets_in(&virsh.dump(domain)?);
        if targets.is_empty() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("domain {domain}: has no disk of instance {}", self.name),
            ));
        }
        for target in &targets {
            virsh.detach(domain, target).context(|| format!("detach {target} from domain {domain}"))?;
        }
        let deadline = Instant::now() + patience;
        loop {
            let left = self.targets_in(&virsh.dump(domain)?);
            if left.is_empty() {
                return Ok(targets);
            }
            if Instant::now() >= deadline {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("domain {domain}: its guest has not let go of {} yet", left.join(" and ")),
                )
                .with_hint("unmount it in the guest; libvirt takes it away as soon as the guest lets go"));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Powers its own domain off: asks the guest and waits, or with `force` pulls the plug.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it does not run; [`ErrorKind::Invalid`] if a domain of its name runs that is not its
    /// own; [`ErrorKind::Busy`] if the guest is paused, or does not power off within `patience`.
    pub fn stop(&self, virsh: &Virsh, force: bool, patience: Duration) -> Result<()> {
        let name = &self.name;
        let not_running = || Error::new(ErrorKind::NotFound, format!("instance {name}: not running"));
        if !virsh.is_running(name)? {
            return Err(not_running());
        }
        let live = match virsh.dump(name) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(not_running()),
            live => live?,
        };
        if self.targets_in(&live).is_empty() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("domain {name}: does not use the disks of instance {name}"),
            ));
        }
        if force {
            return virsh.destroy(name);
        }
        if virsh.state(name)?.is_some_and(|state| state == "paused") {
            let message = format!("instance {name}: its guest is paused and cannot power off");
            return Err(Error::new(ErrorKind::Busy, message)
                .with_hint(format!("let it go on: virsh resume {name}; or pull the plug with --force")));
        }
        virsh.shutdown(name)?;
        let deadline = Instant::now() + patience;
        while virsh.is_running(name)? {
            if Instant::now() >= deadline {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("instance {name}: has not powered off after {} seconds", patience.as_secs()),
                )
                .with_hint("wait longer with --timeout, or pull the plug with --force"));
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// The names under which a domain has disks of this instance.
    fn targets_in(&self, domain: &Element) -> Vec<String> {
        let ours = |disk: &&Element| {
            let file = disk.find("source").and_then(|source| source.attribute("file"));
            file.is_some_and(|file| self.owns(Path::new(file)))
        };
        disks(domain).filter(ours).filter_map(target).collect()
    }

    /// Whether a file is a disk of this instance; without a known mountpoint any file that is named like one is.
    fn owns(&self, file: &Path) -> bool {
        ["disk", "disk.local"].iter().any(|disk| {
            let path = Path::new("instances").join(&self.name).join(disk);
            match &self.mountpoint {
                Some(mountpoint) => file == mountpoint.join(path),
                None => file.ends_with(path),
            }
        })
    }
}

/// A path without links, as libvirt and its confinement want it.
fn resolve(path: &Path) -> Result<PathBuf> {
    path.canonicalize().context(|| format!("{}", path.display()))
}

fn disks(domain: &Element) -> impl Iterator<Item = &Element> {
    domain.find("devices").into_iter().flat_map(|devices| devices.all("disk"))
}

fn target(disk: &Element) -> Option<String> {
    Some(disk.find("target")?.attribute("dev")?.to_owned())
}

fn targets(domain: &Element) -> Vec<String> {
    disks(domain).filter_map(target).collect()
}

/// A guest has a mount namespace of its own and sees the mounts that were there when it started.
fn with_namespace_hint(error: Error) -> Error {
    if error.to_string().contains("No such file or directory") {
        return error.with_hint(
            "a guest that was started before the store was mounted cannot see the mount: start the guest again",
        );
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounted() -> (tempfile::TempDir, MountedInstance) {
        let folder = tempfile::tempdir().unwrap();
        let instance = folder.path().join("instances/web-1");
        std::fs::create_dir_all(&instance).unwrap();
        for name in ["disk", "disk.local"] {
            std::fs::File::create(instance.join(name)).unwrap();
        }
        let found = MountedInstance::find(folder.path(), "web-1").unwrap();
        (folder, found)
    }

    fn options() -> GuestOptions {
        GuestOptions { memory_bytes: 512 << 20, vcpus: 1, ..GuestOptions::default() }
    }

    #[test]
    fn the_disks_are_vda_and_vdb() {
        let (_folder, instance) = mounted();
        let targets: Vec<String> = instance.own_disks().into_iter().map(|disk| disk.target).collect();
        assert_eq!(targets, ["vda", "vdb"]);
    }

    #[test]
    fn boot_files_of_the_instance_are_resolved() {
        let (folder, instance) = mounted();
        assert_eq!(instance.domain(&options(), Accelerator::Qemu).unwrap().boot, None);
        let boot = folder.path().canonicalize().unwrap().join("boot");
        std::fs::create_dir(&boot).unwrap();
        for name in ["kernel", "ramdisk"] {
            std::fs::File::create(boot.join(name)).unwrap();
            let link = Path::new("../../boot").join(name);
            std::os::unix::fs::symlink(link, folder.path().join("instances/web-1").join(name)).unwrap();
        }
        let found = instance.domain(&options(), Accelerator::Qemu).unwrap().boot.unwrap();
        assert_eq!(found.kernel, boot.join("kernel"));
        assert_eq!(found.ramdisk, Some(boot.join("ramdisk")));
        assert_eq!(found.append, DEFAULT_APPEND);
        // Another kernel does not go with the instance's ramdisk.
        let other = GuestOptions { kernel: Some("/dev/null".into()), ..options() };
        assert_eq!(instance.domain(&other, Accelerator::Qemu).unwrap().boot.unwrap().ramdisk, None);
    }

    #[test]
    fn a_command_line_without_a_kernel_is_refused() {
        let (_folder, instance) = mounted();
        let options = GuestOptions { append: Some("quiet".into()), ..options() };
        assert_eq!(instance.domain(&options, Accelerator::Qemu).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn disks_of_the_instance_are_found_in_a_domain() {
        let (folder, instance) = mounted();
        let xml = format!(
            "<domain><devices><disk><source file='/x'/><target dev='vda'/></disk>\
             <disk><source file='{}/instances/web-1/disk'/><target dev='vdc'/></disk>\
             <disk device='cdrom'><target dev='sda'/></disk></devices></domain>",
            folder.path().display()
        );
        let domain = Element::parse(&xml).unwrap();
        assert_eq!(instance.guest.targets_in(&domain), ["vdc"]);
        assert_eq!(Guest::new("web-1", None).targets_in(&domain), ["vdc"]);
        assert!(Guest::new("web-1", Some(Path::new("/elsewhere"))).targets_in(&domain).is_empty());
        assert!(Guest::new("eb-1", None).targets_in(&domain).is_empty());
        assert_eq!(targets(&domain), ["vda", "vdc", "sda"]);
    }
}
