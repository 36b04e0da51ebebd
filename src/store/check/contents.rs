//! The bytes of bases, kernels and ramdisks against their names, which are their hashes.

use super::super::progress::{Progress, Work};
use super::super::record::BootFileId;
use super::super::{Store, copy};
use super::inventory::Inventory;
use super::{CheckReport, CheckRequest, is_gone, list, note_outcome, said};
use crate::error::{Context, ErrorKind, Result};
use crate::finding::{Finding, Outcome, Remedy, Severity};
use crate::format::BaseId;

impl Store {
    /// Reads what the inventory refers to, if the request is for a full check.
    pub(super) fn check_contents(
        &self,
        inventory: &Inventory,
        request: &CheckRequest,
        progress: &dyn Progress,
        report: &mut CheckReport,
    ) -> Result<()> {
        if !request.full {
            return Ok(());
        }
        for id in inventory.base_users.keys() {
            self.check_base_content(id, inventory, request.repair, progress, report)?;
        }
        for (id, users) in &inventory.boot_users {
            match self.verify_boot_file(id, progress) {
                Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                // Known by now, or removed meanwhile.
                Err(error) if is_gone(&error) => {}
                Err(error) => add_bad_boot_file(id, users, said(&error), report),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn check_base_content(
        &self,
        id: &BaseId,
        inventory: &Inventory,
        repair: bool,
        progress: &dyn Progress,
        report: &mut CheckReport,
    ) -> Result<()> {
        let hash = match self.base_file(id) {
            // Known by now: missing, or being replaced.
            Err(_) => return Ok(()),
            Ok(file) => {
                let hashed = file.metadata().context(|| "look up a base").and_then(|metadata| {
                    let work = Work::begin(progress, &format!("check base {id}"), Some(metadata.len()));
                    copy::hash(&file, metadata.len(), &work)
                });
                hashed.map(BaseId)
            }
        };
        let object = format!("base {id}");
        let users = list(inventory.users_of(id));
        let known = report.findings.iter().position(|finding| finding.object == object);
        match hash {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                let remedy = Remedy::Operator(
                    "check the host's disk; the base must come from a backup, or from importing the image again".to_owned(),
                );
                let message = format!("{}; needed by {users}", said(&error));
                report.add("read-error", Severity::Damage, object, message, remedy);
            }
            Ok(found) if found == *id => {
                if let Some(finding) = known.and_then(|at| report.findings.get_mut(at)) {
                    self.accept(id, finding, repair);
                }
            }
            Ok(found) => {
                if let Some(at) = known {
                    report.findings.remove(at);
                }
                let message = format!("its bytes have changed, their hash is now {found}; needed by {users}");
                report.findings.push(self.rotten(id, object, message, repair));
            }
        }
        Ok(())
    }

    /// A base that did not look as it was stored, but whose bytes are right.
    fn accept(&self, id: &BaseId, finding: &mut Finding, repair: bool) {
        finding.severity = Severity::Warning;
        finding.message += "; its bytes are right";
        finding.remedy = Remedy::Repair("accepts it as it is now".to_owned());
        if repair {
            note_outcome(finding, self.accept_base(id));
        }
    }

    fn rotten(&self, id: &BaseId, object: String, message: String, repair: bool) -> Finding {
        let advice = super::super::bases::DAMAGED_HINT.to_owned();
        let mut finding =
            Finding::new("base-damaged", Severity::Damage, object, message, Remedy::Operator(advice));
        // Marked, so that nothing opens over it until it is whole again.
        if repair && let Err(error) = self.mark_base_damaged(id) {
            finding.outcome = Outcome::Failed(said(&error));
        }
        finding
    }
}

fn add_bad_boot_file(id: &BootFileId, users: &[String], what: String, report: &mut CheckReport) {
    let remedy = Remedy::Operator(
        "remove it and import the image with it again, or bring it back from a backup".to_owned(),
    );
    let message = format!("{what}; needed by {}", list(users));
    report.add("boot-damaged", Severity::Damage, format!("boot file {id}"), message, remedy);
}
