//! `cowdisk image …` and `cowdisk flavor …`.

use serde::Serialize;

use super::Session;
use super::args::{FlavorCommand, Form, ImageCommand, ImportArgs};
use crate::error::Result;
use crate::format::BaseId;
use crate::store::{Flavor, FlavorSpec, Image, ImportRequest, ObjectName, Store};
use crate::units::HumanBytes;

/// An image as `--json` shows it. Sizes are bytes.
#[derive(Debug, Serialize)]
struct ImageView {
    name: ObjectName,
    size: u64,
    /// What the base takes of the host's disk, all names of the same content together.
    allocated: u64,
    base: String,
    format: String,
    source_name: String,
    kernel: Option<String>,
    ramdisk: Option<String>,
    created: String,
}

/// A flavor as `--json` shows it. Sizes are bytes.
#[derive(Debug, Serialize)]
struct FlavorView {
    name: ObjectName,
    local_size: u64,
    fs: String,
    /// What the base takes of the host's disk.
    allocated: u64,
    base: Option<String>,
    created: String,
}

/// Does what `command` says.
pub(super) fn image(session: &mut Session, command: ImageCommand) -> Result<()> {
    let store = session.open_store()?;
    match command {
        ImageCommand::Import(args) => import(session, &store, args),
        ImageCommand::List(form) => list_images(session, &store, form),
        ImageCommand::Show { name, form } => {
            let view = ImageView::of(&store, &store.image(&name)?)?;
            if form.json { session.output.json(&view) } else { view.show(session) }
        }
        ImageCommand::Verify { name } => verify_images(session, &store, name),
        ImageCommand::Remove { name } => {
            store.remove_image(&name)?;
            session.done(&format!("image {name}: removed"))
        }
    }
}

fn import(session: &mut Session, store: &Store, args: ImportArgs) -> Result<()> {
    let ImportArgs { name, file, format, kernel, ramdisk } = args;
    let request = ImportRequest { source: file, format, kernel, ramdisk };
    let image = store.import_image(&name, &request, &session.progress()?)?;
    let view = ImageView::of(store, &image)?;
    let (size, allocated) = (HumanBytes(view.size), HumanBytes(view.allocated));
    session.done(&format!("image {name}: imported from {}, {size}, takes {allocated}", view.format))
}

fn list_images(session: &mut Session, store: &Store, form: Form) -> Result<()> {
    let images = store.images()?;
    let views = images.iter().map(|image| ImageView::of(store, image)).collect::<Result<Vec<_>>>()?;
    if form.json {
        return session.output.json(&views);
    }
    let rows: Vec<Vec<String>> = views.iter().map(ImageView::row).collect();
    session.output.table(&["NAME", "SIZE", "TAKES", "BASE", "BOOT", "CREATED"], &[1, 2], &rows)
}

fn verify_images(session: &mut Session, store: &Store, name: Option<ObjectName>) -> Result<()> {
    let names = name.map_or_else(|| store.image_names(), |name| Ok(vec![name]))?;
    let progress = session.progress()?;
    for name in names {
        store.verify_image(&name, &progress)?;
        session.done(&format!("image {name}: as it was imported"))?;
    }
    Ok(())
}

fn verify_flavors(session: &mut Session, store: &Store, name: Option<ObjectName>) -> Result<()> {
    let names = name.map_or_else(|| store.flavor_names(), |name| Ok(vec![name]))?;
    let progress = session.progress()?;
    for name in names {
        store.verify_flavor(&name, &progress)?;
        session.done(&format!("flavor {name}: as it was made"))?;
    }
    Ok(())
}

impl ImageView {
    fn of(store: &Store, image: &Image) -> Result<Self> {
        Ok(Self {
            name: image.name.clone(),
            size: image.size,
            allocated: allocated(store, &image.base)?,
            base: image.base.to_string(),
            format: image.format.to_string(),
            source_name: image.source_name.clone(),
            kernel: image.kernel.map(|id| id.to_string()),
            ramdisk: image.ramdisk.map(|id| id.to_string()),
            created: image.created.to_string(),
        })
    }

    fn row(&self) -> Vec<String> {
        let boot = match (&self.kernel, &self.ramdisk) {
            (Some(_), Some(_)) => "kernel, ramdisk",
            (Some(_), None) => "kernel",
            (None, Some(_)) => "ramdisk",
            (None, None) => "-",
        };
        vec![
            self.name.to_string(),
            HumanBytes(self.size).to_string(),
            HumanBytes(self.allocated).to_string(),
            short(&self.base),
            boot.to_owned(),
            self.created.clone(),
        ]
    }

    fn show(&self, session: &mut Session) -> Result<()> {
        let or_none = |id: &Option<String>| id.clone().unwrap_or_else(|| "-".to_owned());
        session.output.properties(&[
            ("name", self.name.to_string()),
            ("size", sized(self.size)),
            ("takes", sized(self.allocated)),
            ("base", self.base.clone()),
            ("kernel", or_none(&self.kernel)),
            ("ramdisk", or_none(&self.ramdisk)),
            ("imported from", format!("{} ({})", self.source_name, self.format)),
            ("created", self.created.clone()),
        ])
    }
}

/// Does what `command` says.
pub(super) fn flavor(session: &mut Session, command: FlavorCommand) -> Result<()> {
    let store = session.open_store()?;
    match command {
        FlavorCommand::Add { name, local_size, fs } => {
            let flavor = store.add_flavor(&name, &FlavorSpec { local_size, fs }, &session.progress()?)?;
            let view = FlavorView::of(&store, &flavor)?;
            let (size, allocated) = (HumanBytes(local_size), HumanBytes(view.allocated));
            session.done(&format!("flavor {name}: added, {size} of {fs}, takes {allocated}"))
        }
        FlavorCommand::List(form) => list_flavors(session, &store, form),
        FlavorCommand::Show { name, form } => {
            let view = FlavorView::of(&store, &store.flavor(&name)?)?;
            if form.json { session.output.json(&view) } else { view.show(session) }
        }
        FlavorCommand::Verify { name } => verify_flavors(session, &store, name),
        FlavorCommand::Remove { name } => {
            store.remove_flavor(&name)?;
            session.done(&format!("flavor {name}: removed"))
        }
    }
}

fn list_flavors(session: &mut Session, store: &Store, form: Form) -> Result<()> {
    let flavors = store.flavors()?;
    let views = flavors.iter().map(|flavor| FlavorView::of(store, flavor)).collect::<Result<Vec<_>>>()?;
    if form.json {
        return session.output.json(&views);
    }
    let rows: Vec<Vec<String>> = views.iter().map(FlavorView::row).collect();
    session.output.table(&["NAME", "LOCAL SIZE", "FS", "TAKES", "CREATED"], &[1, 3], &rows)
}

impl FlavorView {
    fn of(store: &Store, flavor: &Flavor) -> Result<Self> {
        Ok(Self {
            name: flavor.name.clone(),
            local_size: flavor.local_size,
            fs: flavor.fs.to_string(),
            allocated: flavor.base.map_or(Ok(0), |base| allocated(store, &base))?,
            base: flavor.base.map(|base| base.to_string()),
            created: flavor.created.to_string(),
        })
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            HumanBytes(self.local_size).to_string(),
            self.fs.clone(),
            HumanBytes(self.allocated).to_string(),
            self.created.clone(),
        ]
    }

    fn show(&self, session: &mut Session) -> Result<()> {
        session.output.properties(&[
            ("name", self.name.to_string()),
            ("local size", sized(self.local_size)),
            ("filesystem", self.fs.clone()),
            ("takes", sized(self.allocated)),
            ("base", self.base.clone().unwrap_or_else(|| "-".to_owned())),
            ("created", self.created.clone()),
        ])
    }
}

/// Bytes that a base takes of the host's disk.
fn allocated(store: &Store, base: &BaseId) -> Result<u64> {
    // Not by opening it: what is damaged is listed as well.
    store.base_usage(base).map(|(_, allocated)| allocated)
}

/// The first twelve digits of a content's name: enough to tell contents apart by eye.
fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// A size for people, and exactly.
pub(super) fn sized(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", HumanBytes(bytes))
}
