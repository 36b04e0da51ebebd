//! Bases, kernels and ramdisks, attributes and leftovers: whether each is there, as it was stored, and referred to.

use super::super::attrs::FileRef;
use super::super::bases::BaseCondition;
use super::super::record::BootFileId;
use super::super::{Store, atomic, layout};
use super::inventory::{Inventory, unknown};
use super::{CheckReport, CheckRequest, hint_or, is_gone, list, note_outcome, said};
use crate::error::{Error, ErrorKind, Result};
use crate::finding::{Finding, Remedy, Severity};
use crate::format::BaseId;
use crate::units::HumanBytes;

/// The kinds of what [`Store::repair_objects`] removes.
const REMOVABLE: [&str; 4] = ["base-unreferenced", "boot-unreferenced", "attributes-orphan", "leftover"];

impl Store {
    /// Looks at all that lies beside records and disks. The caller holds the store's lock, where there is one.
    pub(super) fn look_at_objects(
        &self,
        inventory: &Inventory,
        request: &CheckRequest,
        report: &mut CheckReport,
    ) -> Result<()> {
        for id in inventory.base_users.keys() {
            self.look_at_base(id, inventory, report);
        }
        for name in self.bases.names()? {
            match name.parse::<BaseId>() {
                Ok(id) if inventory.users_of(&id).is_empty() => {
                    let taken = self.base_usage(&id).map_or(0, |(_, taken)| taken);
                    let message = format!("nothing refers to it; it takes {}", HumanBytes(taken));
                    report.add(
                        "base-unreferenced",
                        Severity::Note,
                        format!("base {id}"),
                        message,
                        removal(inventory),
                    );
                }
                Ok(_) => {}
                Err(_) => unknown(report, layout::BASES, &name),
            }
        }
        self.look_at_boot_files(inventory, request, report)?;
        self.look_at_attribute_files(inventory, report)?;
        for name in self.tmp.names()? {
            if atomic::is_dead(&self.tmp, &name)? {
                let message = "left by a process that has died in the middle of a change";
                report.add(
                    "leftover",
                    Severity::Note,
                    format!("{}/{name}", layout::TMP),
                    message,
                    removal(inventory),
                );
            }
        }
        Ok(())
    }

    /// Says what is wrong with a base that something refers to.
    pub(super) fn look_at_base(&self, id: &BaseId, inventory: &Inventory, report: &mut CheckReport) {
        report.bases += 1;
        let object = format!("base {id}");
        let users = format!("needed by {}", list(inventory.users_of(id)));
        match self.base_condition(id) {
            Ok(BaseCondition::AsStored) => {}
            Ok(BaseCondition::Changed { what, hint }) => {
                let remedy = Remedy::Operator(format!("{hint}; so does check --full --repair"));
                report.add("base-changed", Severity::Damage, object, format!("{what}; {users}"), remedy);
            }
            Ok(BaseCondition::Damaged { what, hint }) => {
                let remedy = Remedy::Operator(hint.to_owned());
                report.add("base-damaged", Severity::Damage, object, format!("{what}; {users}"), remedy);
            }
            Ok(BaseCondition::NoRecord(error)) => {
                let remedy = Remedy::Operator(
                    "if its bytes are right, check --full --repair writes its record anew".to_owned(),
                );
                report.add(
                    "base-changed",
                    Severity::Damage,
                    object,
                    format!("{}; {users}", said(&error)),
                    remedy,
                );
            }
            // It is being replaced by the same bytes.
            Err(error) if error.kind() == ErrorKind::Busy => {}
            Err(error) => {
                let remedy = hint_or(
                    &error,
                    "bring it back from a backup of the store, or import the same image again; \
                     what a flavor made must come from a backup",
                );
                let gone = is_gone(&error) && !self.bases.has(&id.to_string()).unwrap_or(true);
                let what = if gone { "missing".to_owned() } else { said(&error) };
                report.add("base-missing", Severity::Damage, object, format!("{what}; {users}"), remedy);
            }
        }
    }

    /// What is wrong with bases, as far as that can be told without reading them, one error for each. Every disk over such a
    /// base is refused.
    ///
    /// # Errors
    /// Those of the host.
    pub fn base_faults(&self) -> Result<Vec<Error>> {
        let mut faults = Vec::new();
        for id in self.bases.names()?.iter().filter_map(|name| name.parse::<BaseId>().ok()) {
            match self.open_base(&id) {
                Err(error) if error.kind() == ErrorKind::Corrupt => faults.push(error),
                // Fine, or being removed or replaced.
                _ => {}
            }
        }
        Ok(faults)
    }

    fn look_at_boot_files(
        &self,
        inventory: &Inventory,
        request: &CheckRequest,
        report: &mut CheckReport,
    ) -> Result<()> {
        for (id, users) in &inventory.boot_users {
            report.boot_files += 1;
            if let Err(error) = self.open_boot_file(id) {
                let remedy = Remedy::Operator(
                    "bring it back from a backup of the store, or import the image with it again".to_owned(),
                );
                let what = if is_gone(&error) { "missing".to_owned() } else { said(&error) };
                let message = format!("{what}; needed by {}", list(users));
                report.add("boot-missing", Severity::Damage, format!("boot file {id}"), message, remedy);
            }
            let attributes = format!("{}/{}", layout::ATTRS, layout::boot_attributes_file(id));
            self.look_at_attributes(&FileRef::Boot(*id), attributes, request, report);
        }
        for name in self.boot.names()? {
            match name.parse::<BootFileId>() {
                Ok(id) if !inventory.boot_users.contains_key(&id) => {
                    let object = format!("boot file {id}");
                    report.add(
                        "boot-unreferenced",
                        Severity::Note,
                        object,
                        "nothing refers to it",
                        removal(inventory),
                    );
                }
                Ok(_) => {}
                Err(_) => unknown(report, layout::BOOT, &name),
            }
        }
        Ok(())
    }

    fn look_at_attribute_files(&self, inventory: &Inventory, report: &mut CheckReport) -> Result<()> {
        for name in self.attrs.names()? {
            let orphan = match (layout::image_of_attributes(&name), layout::boot_of_attributes(&name)) {
                (Some(image), _) => !self.images.has(&layout::record_file(&image))?,
                (None, Some(boot_file)) => !inventory.boot_users.contains_key(&boot_file),
                (None, None) => {
                    unknown(report, layout::ATTRS, &name);
                    continue;
                }
            };
            if orphan {
                let object = format!("{}/{name}", layout::ATTRS);
                let message = "attributes of what does not exist any more";
                report.add("attributes-orphan", Severity::Note, object, message, removal(inventory));
            }
        }
        Ok(())
    }

    /// Says whether the attributes of a file can be read, and forgets them if not and if asked to.
    pub(super) fn look_at_attributes(
        &self,
        file: &FileRef,
        object: String,
        request: &CheckRequest,
        report: &mut CheckReport,
    ) {
        let Err(error) = self.attributes(file) else { return };
        if is_gone(&error) {
            return;
        }
        let mut finding = unreadable_attributes(object, &error);
        if request.repair && finding.can_be_repaired() {
            note_outcome(&mut finding, self.forget_attributes_of(file));
        }
        report.findings.push(finding);
    }

    /// Removes what nothing refers to and what the dead have left, counting anew under the store's lock.
    pub(super) fn repair_objects(&self, report: &mut CheckReport) {
        let removable = |kind| REMOVABLE.contains(&kind);
        let mut findings = report
            .findings
            .iter_mut()
            .filter(|finding| removable(finding.kind) && finding.can_be_repaired())
            .peekable();
        if findings.peek().is_none() {
            return;
        }
        let result = self.remove_what_nothing_needs();
        for finding in findings {
            let result = result.as_ref().map_err(|error| Error::new(error.kind(), said(error)));
            note_outcome(finding, result.copied());
        }
    }

    fn remove_what_nothing_needs(&self) -> Result<()> {
        let lock = self.lock()?;
        if !self.remove_unreferenced(&lock)? {
            let message = "something of it is being read, or a record cannot be read";
            return Err(Error::new(ErrorKind::Busy, message));
        }
        atomic::sweep(&self.tmp, || Ok(true))
    }
}

/// Attributes that cannot be read. Only those that are damaged are forgotten: others may be read the next time.
fn unreadable_attributes(object: String, error: &Error) -> Finding {
    let (kind, remedy) = if error.kind() == ErrorKind::Corrupt {
        let remedy = "forgets them: owner and mode are again as nobody has changed them";
        ("attributes", Remedy::Repair(remedy.to_owned()))
    } else {
        ("read-error", hint_or(error, "check the host's disk and its limits; they are left as they are"))
    };
    Finding::new(kind, Severity::Warning, object, said(error), remedy)
}

/// What becomes of what nothing refers to.
fn removal(inventory: &Inventory) -> Remedy {
    if inventory.complete {
        Remedy::Repair("removes it".to_owned())
    } else {
        Remedy::Nothing("it is kept: a record that cannot be read may refer to it".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any error but "not found" made a repair unlink the record: good owners and modes were gone.
    #[test]
    fn attributes_that_cannot_be_read_just_now_are_not_forgotten() {
        for kind in [ErrorKind::Io, ErrorKind::Denied, ErrorKind::Busy, ErrorKind::Unsupported] {
            let error = Error::new(kind, "read disk.attr");
            let finding = unreadable_attributes("disk web-3/disk".to_owned(), &error);
            assert_eq!(finding.kind, "read-error");
            assert!(!finding.can_be_repaired(), "{finding:?}");
        }
        let damaged = Error::new(ErrorKind::Corrupt, "disk.attr: not a valid record");
        assert!(unreadable_attributes("disk web-3/disk".to_owned(), &damaged).can_be_repaired());
    }
}
