//! `cowdisk libvirt …`.

use std::path::PathBuf;
use std::time::Duration;

use super::Session;
use super::args::{GuestArgs, LibvirtArgs, LibvirtCommand};
use crate::daemon;
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::libvirt::domain::{Domain, GuestDisk};
use crate::libvirt::guest::{Guest, GuestOptions, MountedInstance};
use crate::libvirt::kvm;
use crate::libvirt::virsh::Virsh;
use crate::store::{ObjectName, Store};

/// Memory of a guest for which none is stated, in bytes.
const MEMORY_BYTES: u64 = 512 << 20;

/// Does what the command says.
pub(super) fn run(session: &mut Session, args: LibvirtArgs) -> Result<()> {
    let virsh = Virsh::new(args.connect.as_deref());
    // What is read of the store afterwards is read by descriptors, of regular files beneath its folder.
    let store = daemon::as_owner(&session.store, || session.open_store())?;
    match args.command {
        LibvirtCommand::Xml { instance, domain, guest } => xml(session, &store, &instance, domain, guest),
        LibvirtCommand::Start { instance, guest } => {
            let domain = domain(&store, &instance, guest)?;
            let what = || format!("start instance {instance}");
            virsh
                .create(&domain.to_element()?.to_xml().context(what)?)
                .map_err(|error| match error.kind() {
                    ErrorKind::Exists => error.with_hint("stop that domain first, or attach the disks to it"),
                    _ => error,
                })
                .context(what)?;
            let kind = domain.accelerator.word();
            session
                .done(&format!("instance {instance}: started, {kind}; its console: virsh console {instance}"))
        }
        LibvirtCommand::Stop { instance, timeout, force } => {
            guest(&store, &instance)?
                .stop(&virsh, force, Duration::from_secs(timeout))
                .context(|| format!("stop instance {instance}"))?;
            session.done(&format!("instance {instance}: stopped"))
        }
        LibvirtCommand::Attach { domain, instance } => {
            let disks = mounted(&store, &instance)?.attach(&virsh, &domain)?;
            let targets: Vec<String> = disks.into_iter().map(|disk| disk.target).collect();
            session.done(&format!("domain {domain}: instance {instance} attached as {}", targets.join(", ")))
        }
        LibvirtCommand::Detach { domain, instance, timeout } => {
            let targets = guest(&store, &instance)?.detach(&virsh, &domain, Duration::from_secs(timeout))?;
            session
                .done(&format!("domain {domain}: instance {instance} detached from {}", targets.join(", ")))
        }
    }
}

fn xml(
    session: &mut Session,
    store: &Store,
    instance: &ObjectName,
    whole_domain: bool,
    guest: GuestArgs,
) -> Result<()> {
    if whole_domain {
        let xml = domain(store, instance, guest)?.to_element()?.to_xml()?;
        return session.output.text(&xml);
    }
    if guest.any() {
        return Err(Error::new(ErrorKind::Invalid, "options of a guest only go with --domain"));
    }
    for disk in mounted(store, instance)?.own_disks().iter().map(GuestDisk::to_element) {
        session.output.text(&disk?.to_xml()?)?;
    }
    Ok(())
}

/// Where the store is mounted.
fn mountpoint(store: &Store) -> Result<Option<PathBuf>> {
    let server = store.serving()?.filter(|server| !server.mountpoint.as_os_str().is_empty());
    Ok(server.map(|server| server.mountpoint))
}

/// The instance as the mount shows it.
fn mounted(store: &Store, instance: &ObjectName) -> Result<MountedInstance> {
    store.instance(instance)?;
    let mountpoint = mountpoint(store)?.ok_or_else(|| {
        let dir = store.dir().display();
        Error::new(ErrorKind::NotFound, format!("store {dir}: not mounted"))
            .with_hint(format!("mount it: cowdisk --store {dir} mount MNT"))
    })?;
    MountedInstance::find(&mountpoint, instance.as_str())
}

/// The instance as domains may have it, even when the mount is gone.
fn guest(store: &Store, instance: &ObjectName) -> Result<Guest> {
    store.instance(instance)?;
    Ok(Guest::new(instance.as_str(), mountpoint(store)?.as_deref()))
}

fn domain(store: &Store, instance: &ObjectName, guest: GuestArgs) -> Result<Domain> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(Error::new(ErrorKind::Unsupported, "whole domains are only made for x86-64")
            .with_hint("put the disks of `cowdisk libvirt xml` into a domain of your own"));
    }
    let mounted = mounted(store, instance)?;
    // Root's daemon of consoles writes there, following links.
    let run_dir = store.own_run_dir()?;
    let options = GuestOptions {
        kernel: guest.kernel,
        ramdisk: guest.ramdisk,
        append: guest.append,
        network: guest.network,
        console_log: Some(match guest.console_log {
            Some(path) => std::path::absolute(&path).context(|| format!("{}", path.display()))?,
            None => run_dir.join(format!("{instance}-console.log")),
        }),
        memory_bytes: guest.memory.unwrap_or(MEMORY_BYTES),
        vcpus: guest.vcpus.unwrap_or(1),
    };
    let accelerator = guest.accelerator.map_or_else(|| kvm::accelerator(&run_dir), Into::into);
    mounted.domain(&options, accelerator)
}
