//! The bytes of bases, kernels and ramdisks against their names, which are their hashes.

use std::fs::File;

use super::super::Store;
use super::super::bases::{Contents, READ_TWICE, READ_TWICE_HINT, compare_contents};
use super::super::progress::Progress;
use super::super::record::BootFileId;
use super::inventory::Inventory;
use super::{CheckReport, CheckRequest, hash_from_disk, is_gone, note_outcome, said};
use crate::error::{Context, ErrorKind, Result};
use crate::finding::{Finding, Outcome, Remedy, Severity};
use crate::format::BaseId;

/// Hashes a file: what it is, the file, a descriptor of its own, and how many bytes it has.
pub(super) type HashFile<'a> = dyn FnMut(&str, &File, u64) -> Result<[u8; 32]> + 'a;

/// How contents are read, and what is done about what is found.
pub(super) struct ContentCheck<'a> {
    /// Reads them.
    pub(super) hash: &'a mut HashFile<'a>,
    /// Whether a base that has the right bytes, but does not look as it was stored, is accepted.
    pub(super) accept: bool,
    /// Whether a base that has other bytes is marked, so that nothing opens over it.
    pub(super) mark: bool,
}

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
        // As a scrub reads: a base that it has marked must not be accepted for what the host's cache still has of it.
        let mut hash =
            |what: &str, file: &File, len| hash_from_disk(file, len, &format!("check {what}"), progress);
        let mut how = ContentCheck { hash: &mut hash, accept: request.repair, mark: request.repair };
        for id in inventory.base_users.keys() {
            self.check_base_content(id, inventory, &mut how, report)?;
        }
        for id in inventory.boot_users.keys() {
            self.check_boot_file_content(id, inventory, &mut how, report)?;
        }
        Ok(())
    }

    /// Reads a base, and names all that need it if it is not what it should be.
    pub(super) fn check_base_content(
        &self,
        id: &BaseId,
        inventory: &Inventory,
        how: &mut ContentCheck<'_>,
        report: &mut CheckReport,
    ) -> Result<()> {
        // Known by now if it fails: missing, or being replaced. Held until it is judged, so that what is marked is what
        // was read.
        let Ok(file) = self.base_file(id) else { return Ok(()) };
        let object = format!("base {id}");
        let contents = file
            .metadata()
            .context(|| "look up a base")
            .and_then(|metadata| compare_contents(id.0, || (how.hash)(&object, &file, metadata.len())));
        let users = inventory.users_of(id).join(", ");
        let known = report.findings.iter().position(|finding| finding.object == object);
        match contents {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                let remedy = Remedy::Operator(
                    "check the host's disk; the base must come from a backup, or from importing the image again".to_owned(),
                );
                let message = format!("{}; needed by {users}", said(&error));
                report.add("read-error", Severity::Damage, object, message, remedy);
            }
            Ok(Contents::RightAtSecond) => {
                let remedy = Remedy::Operator(READ_TWICE_HINT.to_owned());
                let message = format!("{READ_TWICE}; needed by {users}");
                report.add("read-unsteady", Severity::Warning, object, message, remedy);
            }
            Ok(Contents::Right) => {
                if let Some(finding) = known.and_then(|at| report.findings.get_mut(at)) {
                    self.accept(id, finding, how.accept);
                }
            }
            Ok(Contents::Other(found)) => {
                if let Some(at) = known {
                    report.findings.remove(at);
                }
                let found = BaseId(found);
                let message = format!("its bytes have changed, their hash is now {found}; needed by {users}");
                report.findings.push(self.rotten(id, object, message, how.mark));
            }
        }
        Ok(())
    }

    /// Reads a kernel or a ramdisk.
    pub(super) fn check_boot_file_content(
        &self,
        id: &BootFileId,
        inventory: &Inventory,
        how: &mut ContentCheck<'_>,
        report: &mut CheckReport,
    ) -> Result<()> {
        let object = format!("boot file {id}");
        let hash = self.open_boot_file(id).and_then(|file| {
            let len = file.metadata().context(|| format!("look up {object}"))?.len();
            (how.hash)(&object, &file, len)
        });
        let what = match hash {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            // Known by now, or removed meanwhile.
            Err(error) if is_gone(&error) => return Ok(()),
            Ok(found) if BootFileId::from_bytes(found) == *id => return Ok(()),
            Ok(_) => "its bytes have changed".to_owned(),
            Err(error) => said(&error),
        };
        let remedy = Remedy::Operator(
            "remove it and import the image with it again, or bring it back from a backup".to_owned(),
        );
        let users = inventory.boot_users.get(id).map_or_else(String::new, |users| users.join(", "));
        report.add("boot-damaged", Severity::Damage, object, format!("{what}; needed by {users}"), remedy);
        Ok(())
    }

    /// A base that did not look as it was stored, but whose bytes are right.
    fn accept(&self, id: &BaseId, finding: &mut Finding, accept: bool) {
        finding.severity = Severity::Warning;
        finding.message += "; its bytes are right";
        finding.remedy = Remedy::Repair("accepts it as it is now".to_owned());
        if accept {
            note_outcome(finding, self.accept_base(id));
        }
    }

    fn rotten(&self, id: &BaseId, object: String, message: String, mark: bool) -> Finding {
        let advice = super::super::bases::DAMAGED_HINT.to_owned();
        let mut finding =
            Finding::new("base-damaged", Severity::Damage, object, message, Remedy::Operator(advice));
        // Marked, so that nothing opens over it until it is whole again.
        if mark && let Err(error) = self.mark_base_damaged(id) {
            finding.outcome = Outcome::Failed(said(&error));
        }
        finding
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::bases::BaseCondition;
    use super::super::super::progress::NoProgress;
    use super::super::super::tests::{TestStore, store_with_image};
    use super::*;
    use crate::error::Error;

    /// A check of the one base of the store, with `readings` for what it reads: `None` is the right bytes.
    fn check(t: &TestStore, repair: bool, readings: Vec<Option<Result<[u8; 32]>>>) -> (BaseId, Vec<Finding>) {
        let request = CheckRequest { full: true, repair, ..CheckRequest::default() };
        let mut report = CheckReport::default();
        let inventory = t.store.take_inventory(&request, &mut report).unwrap();
        let id = *inventory.base_users.keys().next().unwrap();
        let mut readings = readings.into_iter();
        let mut hash = |_: &str, _: &File, _| readings.next().unwrap().unwrap_or(Ok(id.0));
        let mut how = ContentCheck { hash: &mut hash, accept: repair, mark: repair };
        t.store.check_base_content(&id, &inventory, &mut how, &mut report).unwrap();
        assert!(readings.next().is_none(), "read less often than expected");
        (id, report.findings)
    }

    fn eio() -> Option<Result<[u8; 32]>> {
        Some(Err(Error::new(ErrorKind::Io, "read it")))
    }

    /// One bit that flipped on its way locked out every disk over the base.
    #[test]
    fn a_base_is_marked_only_if_it_is_wrong_twice() {
        for first in [Some(Ok([1; 32])), eio()] {
            let t = store_with_image();
            let (id, findings) = check(&t, true, vec![first, None]);
            assert_eq!((findings[0].kind, findings[0].severity), ("read-unsteady", Severity::Warning));
            t.store.open_base(&id).unwrap();
        }
        let t = store_with_image();
        let (id, findings) = check(&t, true, vec![Some(Ok([1; 32])), Some(Ok([1; 32]))]);
        assert_eq!(findings[0].kind, "base-damaged");
        assert!(matches!(t.store.base_condition(&id), Ok(BaseCondition::Damaged { .. })));
    }

    /// What a scrub had found on the disk was forgiven for what the cache had.
    #[test]
    fn contents_are_read_from_the_disk_and_not_from_the_cache() {
        let t = store_with_image();
        let request = CheckRequest { full: true, ..CheckRequest::default() };
        let id = t.store.image(&"debian".parse().unwrap()).unwrap().base;
        let storage = |store: &Store| crate::storage::FileStorage::new(store.base_file(&id).unwrap(), "base");
        let is_cached = || {
            let mut byte = [0];
            crate::storage::Storage::read_now(&storage(&t.store), 0, &mut byte).unwrap()
        };
        let drop_cache = || {
            let storage = storage(&t.store);
            storage.sync_all().unwrap();
            // Waits for what is being read ahead.
            crate::storage::Storage::read_at(&storage, 0, &mut [0; 8192]).unwrap();
            crate::storage::Storage::drop_cache(&storage).unwrap();
        };
        drop_cache();
        t.store.check(&request, &NoProgress).unwrap();
        assert!(!is_cached(), "read through the cache, or temporary files are on one without direct reads");
        drop_cache();
        t.store.verify_base(&id, &NoProgress).unwrap();
        assert!(!is_cached(), "read through the cache");
    }
}
