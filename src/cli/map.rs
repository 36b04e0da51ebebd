//! `cowdisk map …`.

use super::Session;
use super::args::{MapArgs, MapForm, MapTarget};
use crate::error::{Error, ErrorKind, Result};
use crate::inspect::map::{self, Summary};
use crate::store::DiskMap;
use crate::units::HumanBytes;

/// Prints the map of a disk.
pub(super) fn run(session: &mut Session, args: &MapArgs) -> Result<()> {
    let MapTarget { instance, disk } = &args.target;
    let map = session.open_store()?.disk_map(instance, *disk)?;
    let form = if args.json { MapForm::Json } else { args.output };
    match form {
        MapForm::Json => json(session, &map),
        MapForm::Human => {
            session.output.line(map::HEADING)?;
            for line in map::lines(&map) {
                session.output.line(&line.to_string())?;
            }
            let size = HumanBytes(map.size);
            let blocks = match map.block_bytes {
                Some(bytes) => format!(" in blocks of {}", HumanBytes(bytes.into())),
                None => String::new(),
            };
            session.output.line(&format!("{instance}/{disk}: {size}{blocks}, {}", Summary::of(&map)))
        }
    }
}

/// One extent a line, as qemu-img prints them.
fn json(session: &mut Session, map: &DiskMap) -> Result<()> {
    let mut separator = "[";
    for extent in map::qemu_extents(map) {
        let extent = serde_json::to_string(&extent)
            .map_err(|error| Error::caused(ErrorKind::Invalid, "write JSON", error))?;
        session.output.text(separator)?;
        session.output.text(&extent)?;
        separator = ",\n";
    }
    session.output.line("]")
}
