//! The XML of an instance's disks, and of a whole domain around them.
//!
//! Every attribute of a disk is there for a reason:
//!
//! - `type='raw'`: always stated. A guest can write a qcow2 header into its disk; nothing may ever probe it.
//! - `cache='none'`: the guest's disk is opened with O_DIRECT, so a block is never held twice in the host's memory. The base
//!   is still cached, once for all instances, by cowdisk itself.
//! - `io='native'`: Linux AIO, which the mount completes asynchronously and every host has. `io_uring` was some 10 % faster
//!   in fio at queue depth 32, but many hosts switch it off (`kernel.io_uring_disabled`), and a guest that asks for it does
//!   not start there.
//! - `discard='unmap'`: the guest's fstrim returns space to the host. `detect_zeroes` stays off: cowdisk looks for
//!   zeroes itself where that saves something.
//! - `error_policy='stop'`, `rerror_policy='stop'`: a host filesystem that is full, or a failed read, pauses the guest. After the
//!   cause is gone, `virsh resume` repeats the request; the guest has seen no error.
//! - 512-byte sectors over 4,096-byte physical blocks: tools in the guest then align to the blocks of the overlay, and an
//!   aligned write never copies from the base.
//! - `serial`: a name under `/dev/disk/by-id` in the guest.

use std::path::{Path, PathBuf};

use super::xml::Element;
use crate::error::{Error, ErrorKind, Result};

/// Which of an instance's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `disk`: the root disk, `vda`.
    Root,
    /// `disk.local`: the local disk, `vdb`.
    Local,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Role::Root => "root",
            Role::Local => "local",
        }
    }

    /// The disk's name in its instance's own domain.
    pub fn target(self) -> &'static str {
        match self {
            Role::Root => "vda",
            Role::Local => "vdb",
        }
    }

    /// The serial number of an instance's own disk in its own domain: the same for every instance, so that an image's
    /// fstab can name it.
    pub fn serial(self) -> String {
        format!("cowdisk-{}", self.word())
    }

    /// The serial number of the disk of `instance` in a foreign domain: 20 bytes is the most that virtio has room for,
    /// so the middle of a long name is left out.
    pub fn foreign_serial(self, instance: &str) -> String {
        const NAME_BYTES: usize = 14;
        let short = match (instance.get(..6), instance.get(instance.len().saturating_sub(8)..)) {
            (Some(head), Some(tail)) if instance.len() > NAME_BYTES => format!("{head}{tail}"),
            _ => instance.to_owned(),
        };
        format!("{short}-{}", self.word())
    }
}

/// One disk as a guest gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDisk {
    /// The file in the mount.
    pub path: PathBuf,
    /// `vda`, `vdb`, …
    pub target: String,
    /// What the guest reads as the disk's serial number, at most 20 bytes.
    pub serial: String,
}

impl GuestDisk {
    /// The `<disk>` element.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the path is not UTF-8.
    pub fn to_element(&self) -> Result<Element> {
        Ok(Element::new("disk")
            .with("type", "file")
            .with("device", "disk")
            .child(
                Element::new("driver")
                    .with("name", "qemu")
                    .with("type", "raw")
                    .with("cache", "none")
                    .with("error_policy", "stop")
                    .with("rerror_policy", "stop")
                    .with("io", "native")
                    .with("discard", "unmap"),
            )
            .child(Element::new("source").with("file", utf8(&self.path)?))
            .child(
                Element::new("blockio").with("logical_block_size", "512").with("physical_block_size", "4096"),
            )
            .child(Element::new("target").with("dev", self.target.as_str()).with("bus", "virtio"))
            .text_child("serial", self.serial.as_str()))
    }
}

/// Who executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor, through KVM.
    Kvm,
    /// QEMU's translator, TCG: slow, and works everywhere.
    Qemu,
}

impl Accelerator {
    /// libvirt's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Qemu => "qemu",
        }
    }
}

/// A kernel to boot directly, without the guest's boot loader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectBoot {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial ramdisk.
    pub ramdisk: Option<PathBuf>,
    /// The kernel's command line.
    pub append: String,
}

/// A whole domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// The domain's name: the instance's.
    pub name: String,
    /// Who executes it.
    pub accelerator: Accelerator,
    /// Memory of the guest in bytes; rounded up to KiB.
    pub memory_bytes: u64,
    /// Number of virtual processors, at least 1.
    pub vcpus: u32,
    /// The kernel to boot; without one the guest boots from its root disk.
    pub boot: Option<DirectBoot>,
    /// The disks.
    pub disks: Vec<GuestDisk>,
    /// A network of libvirt to plug the guest into; without one it has no network.
    pub network: Option<String>,
    /// Where the serial console is also written to.
    pub console_log: Option<PathBuf>,
}

/// Free PCI Express slots for disks that are attached later. The machine has as many as it is started with.
const SPARE_PORTS: usize = 6;

impl Domain {
    /// The `<domain>` element.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if a path is not UTF-8.
    pub fn to_element(&self) -> Result<Element> {
        let cpu = match self.accelerator {
            Accelerator::Kvm => Element::new("cpu").with("mode", "host-passthrough").with("check", "none"),
            Accelerator::Qemu => Element::new("cpu").with("mode", "maximum").with("check", "none"),
        };
        Ok(Element::new("domain")
            .with("type", self.accelerator.word())
            .text_child("name", self.name.as_str())
            .child(
                Element::new("memory").with("unit", "KiB").text(self.memory_bytes.div_ceil(1024).to_string()),
            )
            .text_child("vcpu", self.vcpus.to_string())
            .child(self.os()?)
            .child(Element::new("features").child(Element::new("acpi")).child(Element::new("apic")))
            .child(cpu)
            .child(Element::new("clock").with("offset", "utc"))
            .text_child("on_poweroff", "destroy")
            .text_child("on_reboot", "restart")
            .text_child("on_crash", "destroy")
            .child(self.devices()?))
    }

    fn os(&self) -> Result<Element> {
        let os = Element::new("os")
            .child(Element::new("type").with("arch", "x86_64").with("machine", "q35").text("hvm"));
        let Some(boot) = &self.boot else {
            return Ok(os.child(Element::new("boot").with("dev", "hd")));
        };
        let mut os = os.text_child("kernel", utf8(&boot.kernel)?);
        if let Some(ramdisk) = &boot.ramdisk {
            os = os.text_child("initrd", utf8(ramdisk)?);
        }
        Ok(os.text_child("cmdline", boot.append.as_str()))
    }

    fn devices(&self) -> Result<Element> {
        let disks = self.disks.iter().map(GuestDisk::to_element).collect::<Result<Vec<_>>>()?;
        let root =
            Element::new("controller").with("type", "pci").with("index", "0").with("model", "pcie-root");
        let ports = (1..=self.disks.len() + FIXED_DEVICES + SPARE_PORTS).map(|index| {
            Element::new("controller")
                .with("type", "pci")
                .with("index", index.to_string())
                .with("model", "pcie-root-port")
        });
        let mut console = Element::new("serial").with("type", "pty");
        if let Some(log) = &self.console_log {
            console = console.child(Element::new("log").with("file", utf8(log)?).with("append", "off"));
        }
        let network = self.network.iter().map(|network| {
            Element::new("interface")
                .with("type", "network")
                .child(Element::new("source").with("network", network.as_str()))
                .child(Element::new("model").with("type", "virtio"))
        });
        Ok(Element::new("devices")
            .child(root)
            .children(ports)
            .child(Element::new("controller").with("type", "usb").with("model", "none"))
            .children(disks)
            .children(network)
            .child(console.child(Element::new("target").with("port", "0")))
            .child(
                Element::new("rng")
                    .with("model", "virtio")
                    .child(Element::new("backend").with("model", "random").text("/dev/urandom")),
            ))
    }
}

/// Virtio devices of every domain beside its disks: random numbers, memory balloon, perhaps a network card.
const FIXED_DEVICES: usize = 3;

/// The next free names for `count` disks on the virtio bus: `vdc`, `vdd`, … after `vdz` comes `vdaa`.
pub fn free_targets(used: &[String], count: usize) -> Vec<String> {
    (0..).map(target_name).filter(|name| !used.contains(name)).take(count).collect()
}

fn target_name(index: u32) -> String {
    let mut letters = Vec::new();
    let mut rest = index + 1;
    while rest > 0 {
        rest -= 1;
        letters.push(char::from_digit(rest % 26 + 10, 36).unwrap_or('a'));
        rest /= 26;
    }
    letters.iter().rev().fold("vd".to_owned(), |name, letter| name + &letter.to_string())
}

/// A path as libvirt's XML wants it.
fn utf8(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| Error::new(ErrorKind::Invalid, format!("{path:?}: a path for libvirt must be UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> GuestDisk {
        GuestDisk {
            path: "/srv/vm/instances/web-1/disk".into(),
            target: "vda".into(),
            serial: Role::Root.serial(),
        }
    }

    fn domain() -> Domain {
        Domain {
            name: "web-1".into(),
            accelerator: Accelerator::Qemu,
            memory_bytes: 512 << 20,
            vcpus: 2,
            boot: None,
            disks: vec![disk()],
            network: None,
            console_log: None,
        }
    }

    #[test]
    fn a_disk_is_raw_uncached_and_unmaps() {
        assert_eq!(
            disk().to_element().unwrap().to_xml().unwrap(),
            r#"<disk type="file" device="disk">
  <driver name="qemu" type="raw" cache="none" error_policy="stop" rerror_policy="stop" io="native" discard="unmap"/>
  <source file="/srv/vm/instances/web-1/disk"/>
  <blockio logical_block_size="512" physical_block_size="4096"/>
  <target dev="vda" bus="virtio"/>
  <serial>cowdisk-root</serial>
</disk>
"#
        );
    }

    #[test]
    fn a_domain_without_a_kernel_boots_from_its_disk() {
        let xml = domain().to_element().unwrap().to_xml().unwrap();
        assert!(xml.contains("<boot dev=\"hd\"/>"), "{xml}");
        assert!(!xml.contains("<kernel>") && !xml.contains("<interface"), "{xml}");
    }

    #[test]
    fn a_domain_with_a_kernel_boots_it_directly() {
        let boot = DirectBoot {
            kernel: "/srv/vm/boot/aa".into(),
            ramdisk: Some("/srv/vm/boot/bb".into()),
            append: "root=/dev/vda quiet & <on>".into(),
        };
        let xml = Domain { boot: Some(boot), ..domain() }.to_element().unwrap().to_xml().unwrap();
        assert!(xml.contains("<kernel>/srv/vm/boot/aa</kernel>"), "{xml}");
        assert!(xml.contains("<initrd>/srv/vm/boot/bb</initrd>"), "{xml}");
        assert!(xml.contains("<cmdline>root=/dev/vda quiet &amp; &lt;on&gt;</cmdline>"), "{xml}");
        assert!(!xml.contains("<boot "), "{xml}");
    }

    #[test]
    fn libvirt_finds_a_full_domain_valid() {
        use std::io::Write as _;
        let domain = Domain {
            accelerator: Accelerator::Kvm,
            boot: Some(DirectBoot {
                kernel: "/srv/vm/boot/aa".into(),
                ramdisk: Some("/srv/vm/boot/bb".into()),
                append: "root=/dev/vda quiet".into(),
            }),
            network: Some("default".into()),
            console_log: Some("/run/cowdisk/web-1-console.log".into()),
            ..domain()
        };
        for domain in [domain, self::domain()] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(domain.to_element().unwrap().to_xml().unwrap().as_bytes()).unwrap();
            // libvirt's test driver needs no daemon; it checks against libvirt's schema.
            let checked = std::process::Command::new("virsh")
                .args(["-c", "test:///default", "define", "--validate", "--file"])
                .arg(file.path())
                .output()
                .expect("virsh, of libvirt-clients");
            assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        }
    }

    #[test]
    fn targets_follow_those_in_use() {
        let used = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(free_targets(&[], 2), ["vda", "vdb"]);
        assert_eq!(free_targets(&used(&["vda", "vdc", "sda"]), 2), ["vdb", "vdd"]);
        assert_eq!(target_name(25), "vdz");
        assert_eq!(target_name(26), "vdaa");
        assert_eq!(target_name(26 + 26 * 26), "vdaaa");
    }

    #[test]
    fn a_serial_fits_virtio() {
        assert_eq!(Role::Local.foreign_serial("web-1"), "web-1-local");
        let long = Role::Local.foreign_serial("a-very-long-name-of-a-runner-0017");
        assert_eq!(long, "a-veryner-0017-local");
        assert!(long.len() <= 20);
    }
}
