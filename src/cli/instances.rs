//! `cowdisk instance …`.

use serde::Serialize;

use super::Session;
use super::args::{CreateArgs, Form, InstanceCommand};
use super::df::warn_if_high;
use super::images::sized;
use crate::error::Result;
use crate::store::{InstanceSpec, InstanceStatus, ObjectName, Store};
use crate::units::HumanBytes;

/// An instance as `--json` shows it. Sizes are bytes.
#[derive(Debug, Serialize)]
struct InstanceView {
    name: ObjectName,
    image: ObjectName,
    flavor: Option<ObjectName>,
    cow: bool,
    kernel: Option<String>,
    ramdisk: Option<String>,
    created: String,
    disks: Vec<DiskView>,
}

/// A disk as `--json` shows it. Sizes are bytes.
#[derive(Debug, Serialize)]
struct DiskView {
    name: String,
    size: u64,
    /// What its data and its map take of the host's disk.
    allocated: u64,
    map_allocated: u64,
    block_size: Option<u32>,
    base: Option<String>,
}

/// Does what `command` says.
pub(super) fn run(session: &mut Session, command: InstanceCommand) -> Result<()> {
    let store = session.open_store()?;
    match command {
        InstanceCommand::Create(args) => create(session, &store, args),
        InstanceCommand::List(form) => list(session, &store, form),
        InstanceCommand::Show { name, form } => {
            let view = InstanceView::of(&store.instance_status(&name)?);
            if form.json { session.output.json(&view) } else { view.show(session) }
        }
        InstanceCommand::Remove { name } => {
            store.remove_instance(&name)?;
            session.done(&format!("instance {name}: removed"))
        }
    }
}

fn create(session: &mut Session, store: &Store, args: CreateArgs) -> Result<()> {
    let CreateArgs { names, image, flavor, root_size, local_size, block_size, no_cow } = args;
    let spec = InstanceSpec { image, flavor, root_size, local_size, block_bytes: block_size, no_cow };
    let wanted: Vec<_> = names.into_iter().map(|name| (name, spec.clone())).collect();
    let progress = session.progress()?;
    store.create_instances(&wanted, &progress, |instance| {
        let disks: Vec<String> =
            instance.disks().map(|(name, disk)| format!("{name} of {}", HumanBytes(disk.size))).collect();
        session.done(&format!("instance {}: created, {}", instance.name, disks.join(", ")))
    })?;
    warn_if_high(store);
    Ok(())
}

fn list(session: &mut Session, store: &Store, form: Form) -> Result<()> {
    let found = store.instance_statuses()?;
    let views = found.iter().map(InstanceView::of);
    if form.json {
        return session.output.json(&views.collect::<Vec<_>>());
    }
    let rows: Vec<Vec<String>> = views.map(|view| view.row()).collect();
    let header = ["NAME", "IMAGE", "FLAVOR", "DISK", "DISK.LOCAL", "TAKES", "CREATED"];
    session.output.table(&header, &[3, 4, 5], &rows)
}

impl InstanceView {
    fn of(found: &InstanceStatus) -> Self {
        let InstanceStatus { instance, disks } = found;
        let disks = instance.disks().zip(disks).map(|((name, disk), status)| DiskView {
            name: name.to_string(),
            size: status.size,
            allocated: status.data_allocated + status.map_allocated,
            map_allocated: status.map_allocated,
            block_size: disk.block_bytes,
            base: disk.base.map(|base| base.to_string()),
        });
        Self {
            name: instance.name.clone(),
            image: instance.image.clone(),
            flavor: instance.flavor.clone(),
            cow: instance.cow,
            kernel: instance.kernel.map(|id| id.to_string()),
            ramdisk: instance.ramdisk.map(|id| id.to_string()),
            created: instance.created.to_string(),
            disks: disks.collect(),
        }
    }

    fn row(&self) -> Vec<String> {
        let size = |name: &str| {
            let disk = self.disks.iter().find(|disk| disk.name == name);
            disk.map_or_else(|| "-".to_owned(), |disk| HumanBytes(disk.size).to_string())
        };
        vec![
            self.name.to_string(),
            self.image.to_string(),
            self.flavor.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            size("disk"),
            size("disk.local"),
            HumanBytes(self.disks.iter().map(|disk| disk.allocated).sum()).to_string(),
            self.created.clone(),
        ]
    }

    fn show(&self, session: &mut Session) -> Result<()> {
        let or_none = |id: Option<String>| id.unwrap_or_else(|| "-".to_owned());
        let mut properties = vec![
            ("name", self.name.to_string()),
            ("image", self.image.to_string()),
            ("flavor", or_none(self.flavor.as_ref().map(ToString::to_string))),
            ("kernel", or_none(self.kernel.clone())),
            ("ramdisk", or_none(self.ramdisk.clone())),
            ("created", self.created.clone()),
        ];
        for disk in &self.disks {
            let kind = match disk.block_size {
                Some(block) => format!("overlay in blocks of {}", HumanBytes(block.into())),
                None => "independent file".to_owned(),
            };
            let base = disk.base.as_deref().unwrap_or("blank");
            properties.extend([
                ("disk", disk.name.clone()),
                ("  size", sized(disk.size)),
                ("  takes", sized(disk.allocated)),
                ("  kind", kind),
                ("  base", base.to_owned()),
            ]);
        }
        session.output.properties(&properties)
    }
}
