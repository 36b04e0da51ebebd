//! The command line: nouns, verbs and their arguments.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use super::check::CheckArgs;
use super::doctor::DoctorArgs;
use super::scrub::ScrubArgs;
use super::values::{block_size, disk_size, map_target, memory_size, seconds, vcpus};
use crate::libvirt::domain::Accelerator;
use crate::store::{DiskName, FlavorFs, ObjectName, SourceFormat};

const AFTER_HELP: &str = "\
Sizes are bytes, or whole numbers with K, M, G or T: 512M, 10G.
Results go to stdout, all else to stderr. Exit code: 0 done, 1 failed, 2 wrong use.";

/// Copy-on-write disks for virtual machines.
#[derive(Debug, Parser)]
#[command(name = "cowdisk", version, after_help = AFTER_HELP)]
pub struct Cli {
    /// The directory of the store
    #[arg(
        long,
        global = true,
        env = "COWDISK_STORE",
        default_value = "/var/lib/cowdisk",
        value_name = "DIR"
    )]
    pub store: PathBuf,
    /// Say more: -v life cycle, -vv requests, -vvv blocks; without it COWDISK_LOG says how much
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Say nothing but errors and results, show no progress
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a store
    Init,
    /// Shared, read-only images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Local disks of a kind, shared like images
    #[command(subcommand)]
    Flavor(FlavorCommand),
    /// Instances: a root disk over an image, and perhaps a local disk
    #[command(subcommand)]
    Instance(InstanceCommand),
    /// Mount the store, and return once its disks can be read
    ///
    /// The daemon goes on in the background. It logs to daemon.log in the run directory, or to the file of the option
    /// log=FILE, as much as COWDISK_LOG says.
    Mount(MountArgs),
    /// Unmount a store: flush everything and wait for its daemon; tells who still has a disk open
    Umount {
        /// The mountpoint, or the directory of the store
        #[arg(value_name = "MNT")]
        mountpoint: PathBuf,
    },
    /// Show how a store is served: by which process, where, and how its disks fare
    ///
    /// More is told to programs, by HTTP on the socket control.sock in the run directory: GET /v1/status and /metrics.
    Status(StatusArgs),
    /// Replace the process that serves a store by one of the program that is installed now, while guests go on
    ///
    /// The program is the file at the path from which the store was mounted; nobody but root and the user of the daemon may
    /// be able to write to it. Requests wait for a moment. If the new process does not begin to serve, one of the old program
    /// does. The process that keeps the mount stays what it is until the store is unmounted.
    Upgrade(StatusArgs),
    /// Show what the store takes of the host's file system, what is left, and what is promised to disks
    ///
    /// What each instance takes is a column of: cowdisk instance list
    Df(Form),
    /// Show which parts of a disk are its own and which are its base's
    Map(MapArgs),
    /// Look for damage, and for what nothing needs any more; on a mounted store too
    ///
    /// Says of each finding whether data is at risk and what --repair does about it. Changes nothing without --repair.
    /// Exit code: 0 if there is nothing worse than a note, or if all else was mended; 1 if something asks for attention.
    Check(CheckArgs),
    /// Read all that the store holds, at a bounded rate, to find what the host's disk has lost; on a mounted store too
    ///
    /// Bases, kernels and ramdisks are compared with what was stored; a base that has changed is marked, and nothing opens
    /// over it any more. What guests wrote has no checksum: of it, what the disk cannot read is found. Ctrl-C ends it with
    /// what was found by then. Exit code: as of check, and 1 if it was interrupted.
    Scrub(ScrubArgs),
    /// Say what this host can do for cowdisk, and what to do about what it cannot
    ///
    /// Looks at the kernel, the rights of this user, the file system of the store, its run directory, its daemon, QEMU and
    /// libvirt. Changes nothing. Exit code: 0 if there is nothing worse than a warning; 1 if disks cannot be served.
    Doctor(DoctorArgs),
    /// Run instances as libvirt guests
    Libvirt(LibvirtArgs),
    /// Print a script that completes cowdisk's arguments in a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Whether to print JSON.
#[derive(Clone, Copy, Debug, Args)]
pub struct Form {
    /// Print JSON; sizes are bytes
    #[arg(long)]
    pub json: bool,
}

/// `cowdisk image …`
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Take a file into the store as an image
    Import(ImportArgs),
    /// List the images
    List(Form),
    /// Show an image
    Show {
        /// The image
        name: ObjectName,
        #[command(flatten)]
        form: Form,
    },
    /// Read an image, or all, and compare with what was imported
    Verify {
        /// The image; all images without it
        name: Option<ObjectName>,
    },
    /// Remove an image; refused while an instance is over it
    Remove {
        /// The image
        name: ObjectName,
    },
}

/// `cowdisk image import …`
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The image's name
    pub name: ObjectName,
    /// The file to import
    pub file: PathBuf,
    /// Its format: raw, qcow2, vmdk, vhdx or vdi; without it the file's first bytes tell
    #[arg(long)]
    pub format: Option<SourceFormat>,
    /// A kernel to boot the image with
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// An initial ramdisk for the kernel
    #[arg(long, value_name = "FILE")]
    pub ramdisk: Option<PathBuf>,
}

/// `cowdisk flavor …`
#[derive(Debug, Subcommand)]
pub enum FlavorCommand {
    /// Make a flavor: its blank, formatted local disk is made once and shared
    Add {
        /// The flavor's name
        name: ObjectName,
        /// Size of the local disk
        #[arg(long, value_name = "SIZE", value_parser = disk_size, allow_negative_numbers = true)]
        local_size: u64,
        /// What it is formatted with: ext4, xfs, swap or none
        #[arg(long, default_value = "ext4")]
        fs: FlavorFs,
    },
    /// List the flavors
    List(Form),
    /// Show a flavor
    Show {
        /// The flavor
        name: ObjectName,
        #[command(flatten)]
        form: Form,
    },
    /// Read a flavor's blank disk, or those of all, and compare with what was made
    Verify {
        /// The flavor; all flavors without it
        name: Option<ObjectName>,
    },
    /// Remove a flavor; refused while the local disk of an instance is over it
    Remove {
        /// The flavor
        name: ObjectName,
    },
}

/// `cowdisk instance …`
#[derive(Debug, Subcommand)]
pub enum InstanceCommand {
    /// Make instances
    ///
    /// Many at once take a fraction of the time that each alone would: `instance create ci-{1..100} --image debian`.
    Create(CreateArgs),
    /// List the instances
    List(Form),
    /// Show an instance
    Show {
        /// The instance
        name: ObjectName,
        #[command(flatten)]
        form: Form,
    },
    /// Remove an instance and its disks; refused while one is open
    Remove {
        /// The instance
        name: ObjectName,
    },
}

/// `cowdisk instance create …`
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The instances' names
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<ObjectName>,
    /// The image that its root disk is over
    #[arg(long)]
    pub image: ObjectName,
    /// The flavor that its local disk is of; without flavor and --local-size there is no local disk
    #[arg(long)]
    pub flavor: Option<ObjectName>,
    /// Size of the root disk, at least the image's; the image's size without it
    #[arg(long, value_name = "SIZE", value_parser = disk_size, allow_negative_numbers = true)]
    pub root_size: Option<u64>,
    /// Size of the local disk, at least the flavor's. Without a flavor that has a file system the disk is blank, and a file
    /// of its own
    #[arg(long, value_name = "SIZE", value_parser = disk_size, allow_negative_numbers = true)]
    pub local_size: Option<u64>,
    /// Unit of copy-on-write, of the disks that are overlays: a power of two from 4K to 64K [default: 4K]
    #[arg(long, value_name = "SIZE", value_parser = block_size, allow_negative_numbers = true, conflicts_with = "no_cow")]
    pub block_size: Option<u32>,
    /// Make full, independent disks instead of overlays
    #[arg(long)]
    pub no_cow: bool,
}

/// `cowdisk mount …`
#[derive(Debug, Args)]
pub struct MountArgs {
    /// An existing, empty directory
    #[arg(value_name = "MNT")]
    pub mountpoint: PathBuf,
    /// Serve in the foreground
    #[arg(short, long)]
    pub foreground: bool,
    /// Options, separated by commas: ro, transport=NAME, threads=N, flush=SECONDS, allow_other, noallow_other, accept_loss,
    /// passthrough=auto|off, reserve=SIZE, high_water=PERCENT, log=FILE. With passthrough=auto the kernel serves full copies and
    /// blank local disks by itself where it can; that needs transport=dev_fuse
    #[arg(short, value_name = "OPT,…", allow_hyphen_values = true)]
    pub options: Vec<String>,
    /// Check the store, the mountpoint and the options, and mount nothing
    #[arg(long, conflicts_with = "foreground")]
    pub check: bool,
    /// Ignore options that are not known, as `mount -s` asks
    #[arg(long)]
    pub sloppy: bool,
}

/// `cowdisk status …` and `cowdisk upgrade …`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// A mountpoint; without it the store is meant
    #[arg(value_name = "MNT")]
    pub mountpoint: Option<PathBuf>,
    #[command(flatten)]
    pub form: Form,
}

/// `cowdisk map …`
#[derive(Debug, Args)]
pub struct MapArgs {
    /// The disk: INSTANCE or INSTANCE/disk for the root disk, INSTANCE/disk.local for the local one
    #[arg(value_name = "INSTANCE[/DISK]", value_parser = map_target)]
    pub target: MapTarget,
    /// A table for people, or the fields of `qemu-img map --output=json`
    #[arg(long, value_enum, default_value_t = MapForm::Human)]
    pub output: MapForm,
    /// The same as --output json
    #[arg(long, conflicts_with = "output")]
    pub json: bool,
}

/// One disk of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapTarget {
    /// The instance.
    pub instance: ObjectName,
    /// Its disk.
    pub disk: DiskName,
}

/// How a map is printed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum MapForm {
    /// A table.
    Human,
    /// What `qemu-img map --output=json` prints.
    Json,
}

/// `cowdisk libvirt …`
#[derive(Debug, Args)]
pub struct LibvirtArgs {
    /// The libvirt to talk to; else LIBVIRT_DEFAULT_URI, else qemu:///system for root and qemu:///session for others
    #[arg(long, short = 'c', global = true, value_name = "URI")]
    pub connect: Option<String>,
    #[command(subcommand)]
    pub command: LibvirtCommand,
}

/// What to do with libvirt. The store must be mounted for all of it.
#[derive(Debug, Subcommand)]
pub enum LibvirtCommand {
    /// Print the <disk> elements of an instance, or a whole domain
    Xml {
        /// The instance
        instance: ObjectName,
        /// A whole domain instead
        #[arg(long)]
        domain: bool,
        #[command(flatten)]
        guest: GuestArgs,
    },
    /// Run an instance as a transient domain of its name
    ///
    /// It exists in libvirt as long as it runs. For a persistent one: cowdisk libvirt xml --domain NAME | virsh define
    /// /dev/stdin
    Start {
        /// The instance
        instance: ObjectName,
        #[command(flatten)]
        guest: GuestArgs,
    },
    /// Ask the guest to power off, and wait until it has
    Stop {
        /// The instance
        instance: ObjectName,
        /// How long to wait
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = seconds, allow_negative_numbers = true)]
        timeout: u64,
        /// Pull the plug instead
        #[arg(long)]
        force: bool,
    },
    /// Plug an instance's disks into a running domain
    Attach {
        /// The domain: name, id or UUID
        domain: String,
        /// The instance
        instance: ObjectName,
    },
    /// Unplug an instance's disks from a running domain
    Detach {
        /// The domain: name, id or UUID
        domain: String,
        /// The instance
        instance: ObjectName,
        /// How long the guest may take to let go of a disk
        #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = seconds, allow_negative_numbers = true)]
        timeout: u64,
    },
}

/// What a guest is made of beside its disks.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// Boot this kernel; else the instance's, if its image has one; else the boot loader on the disk
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The kernel's initial ramdisk; else the instance's, if the kernel is the instance's too
    #[arg(long, value_name = "FILE")]
    pub ramdisk: Option<PathBuf>,
    /// The kernel's command line [default: root=/dev/vda rw console=ttyS0]
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Memory [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = memory_size, allow_negative_numbers = true)]
    pub memory: Option<u64>,
    /// Virtual processors [default: 1]
    #[arg(long, value_name = "N", value_parser = vcpus, allow_negative_numbers = true)]
    pub vcpus: Option<u32>,
    /// Plug the guest into this network of libvirt; without it the guest has none
    #[arg(long, value_name = "NAME")]
    pub network: Option<String>,
    /// Write the serial console to this file as well [default: a file in the run directory]
    #[arg(long, value_name = "FILE")]
    pub console_log: Option<PathBuf>,
    /// Who executes the guest [default: kvm where a guest boots by it, else qemu]
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    pub accelerator: Option<AcceleratorArg>,
}

impl GuestArgs {
    /// Whether any of them was given.
    pub fn any(&self) -> bool {
        let Self { kernel, ramdisk, append, memory, vcpus, network, console_log, accelerator } = self;
        kernel.is_some()
            || ramdisk.is_some()
            || append.is_some()
            || memory.is_some()
            || vcpus.is_some()
            || network.is_some()
            || console_log.is_some()
            || accelerator.is_some()
    }
}

/// [`Accelerator`] as an argument.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum AcceleratorArg {
    /// The processor, by KVM.
    Kvm,
    /// QEMU's translator.
    Qemu,
}

impl From<AcceleratorArg> for Accelerator {
    fn from(argument: AcceleratorArg) -> Self {
        match argument {
            AcceleratorArg::Kvm => Self::Kvm,
            AcceleratorArg::Qemu => Self::Qemu,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
