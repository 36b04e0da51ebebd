//! The bytes of bases, kernels and ramdisks against their names, which are their hashes.

use std::fs::File;

use super::super::Store;
use super::super::bases::{Contents, DAMAGED_HINT, READ_TWICE, READ_TWICE_HINT, compare_contents};
use super::super::progress::Progress;
use super::super::record::BootFileId;
use super::inventory::Inventory;
use super::{CheckReport, CheckRequest, hash_from_disk, hint_or, is_gone, note_outcome, said};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::finding::{Finding, Outcome, Remedy, Severity};
use crate::format::BaseId;

/// What to do about a base that cannot be read and is not marked.
const UNREADABLE_HINT: &str = "check the host's disk; if that does not help, check --full --repair marks the base, upon which \
     nothing opens over it and importing the same image again replaces it; what a flavor made must come from a backup";

/// Hashes a file: what it is, the file, a descriptor of its own, and how many bytes it has.
pub(super) type HashFile<'a> = dyn FnMut(&str, &File, u64) -> Result<[u8; 32]> + 'a;

/// How contents are read, and what is done about what is found.
pub(super) struct ContentCheck<'a> {
    /// Reads them.
    pub(super) hash: &'a mut HashFile<'a>,
    /// Whether a base that has other bytes is marked, so that nothing opens over it.
    pub(super) mark: bool,
    /// Whether a base that has the right bytes, but does not look as it was stored, is accepted, and one that cannot be read
    /// is marked, so that importing its image again replaces it.
    pub(super) repair: bool,
}

impl ContentCheck<'_> {
    fn hash(&mut self, what: &str, file: &File) -> Result<[u8; 32]> {
        let metadata = file.metadata().context(|| format!("look up {what}"))?;
        (self.hash)(what, file, metadata.len())
    }
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
        let mut how = ContentCheck { hash: &mut hash, mark: request.repair, repair: request.repair };
        for id in inventory.base_users.keys() {
            self.check_base_content(id, inventory, &mut how, report)?;
        }
        for id in inventory.boot_users.keys() {
            self.check_boot_file_content(id, inventory, &mut how, report)?;
        }
        Ok(())
    }

    /// Reads a base, and names all that need it if it is not what it should be. Answers whether all of it was read.
    pub(super) fn check_base_content(
        &self,
        id: &BaseId,
        inventory: &Inventory,
        how: &mut ContentCheck<'_>,
        report: &mut CheckReport,
    ) -> Result<bool> {
        let object = format!("base {id}");
        // Held until it is judged, so that what is marked is what was read.
        let file = match self.base_file(id) {
            Ok(file) => file,
            Err(error) => {
                add_unopened(object, &error, report);
                return Ok(false);
            }
        };
        let contents = compare_contents(id.0, || how.hash(&object, &file));
        let users = inventory.users_of(id).join(", ");
        let known = report.findings.iter().position(|finding| finding.object == object);
        let is_read = contents.is_ok();
        match contents {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                let message = format!("{}; needed by {users}", said(&error));
                report.findings.push(self.unreadable(id, object, message, &error, how.repair));
            }
            Ok(Contents::RightAtSecond) => {
                let remedy = Remedy::Operator(READ_TWICE_HINT.to_owned());
                let message = format!("{READ_TWICE}; needed by {users}");
                report.add("read-unsteady", Severity::Warning, object, message, remedy);
            }
            Ok(Contents::Right) => {
                if let Some(finding) = known.and_then(|at| report.findings.get_mut(at)) {
                    self.accept(id, finding, how.repair);
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
        Ok(is_read)
    }

    /// Reads a kernel or a ramdisk. Answers whether all of it was read.
    pub(super) fn check_boot_file_content(
        &self,
        id: &BootFileId,
        inventory: &Inventory,
        how: &mut ContentCheck<'_>,
        report: &mut CheckReport,
    ) -> Result<bool> {
        let object = format!("boot file {id}");
        let file = match self.open_boot_file(id) {
            Ok(file) => file,
            Err(error) => {
                add_unopened(object, &error, report);
                return Ok(false);
            }
        };
        let hash = how.hash(&object, &file);
        let is_read = hash.is_ok();
        let (kind, what) = match hash {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Ok(found) if BootFileId::from_bytes(found) == *id => return Ok(true),
            Ok(_) => ("boot-damaged", "its bytes have changed".to_owned()),
            Err(error) => ("read-error", said(&error)),
        };
        let remedy = Remedy::Operator(
            "remove it and import the image with it again, or bring it back from a backup".to_owned(),
        );
        let users = inventory.boot_users.get(id).map_or_else(String::new, |users| users.join(", "));
        report.add(kind, Severity::Damage, object, format!("{what}; needed by {users}"), remedy);
        Ok(is_read)
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

    /// A base that cannot be read. One that is not marked counts as whole, and an import would keep it.
    fn unreadable(&self, id: &BaseId, object: String, message: String, error: &Error, mark: bool) -> Finding {
        let mark = mark && error.kind() == ErrorKind::Io;
        let advice = match mark {
            true => format!("check the host's disk; the base is marked as damaged; {DAMAGED_HINT}"),
            false => UNREADABLE_HINT.to_owned(),
        };
        let mut finding =
            Finding::new("read-error", Severity::Damage, object, message, Remedy::Operator(advice));
        if mark && let Err(error) = self.mark_base_damaged(id) {
            finding.outcome = Outcome::Failed(said(&error));
        }
        finding
    }

    fn rotten(&self, id: &BaseId, object: String, message: String, mark: bool) -> Finding {
        let advice = DAMAGED_HINT.to_owned();
        let mut finding =
            Finding::new("base-damaged", Severity::Damage, object, message, Remedy::Operator(advice));
        // Marked, so that nothing opens over it until it is whole again.
        if mark && let Err(error) = self.mark_base_damaged(id) {
            finding.outcome = Outcome::Failed(said(&error));
        }
        finding
    }
}

/// What is said of a file that was not opened, and so not read. What is missing is known by now, as is what is something
/// else than a file.
fn add_unopened(object: String, error: &Error, report: &mut CheckReport) {
    let known = report.findings.iter().any(|finding| finding.object == object);
    if is_gone(error) || known {
        return;
    }
    if error.kind() == ErrorKind::Busy {
        let remedy = Remedy::Nothing("it is being removed or replaced; read it again later".to_owned());
        report.add("not-read", Severity::Note, object, format!("not read: {}", said(error)), remedy);
    } else {
        let remedy = hint_or(error, "check the host's disk and its limits, and read it again");
        report.add("read-error", Severity::Damage, object, format!("not read: {}", said(error)), remedy);
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::bases::BaseCondition;
    use super::super::super::progress::NoProgress;
    use super::super::super::tests::{TestStore, store_with_image};
    use super::*;

    /// A check of the one base of the store, with `readings` for what it reads: `None` is the right bytes.
    fn check(t: &TestStore, repair: bool, readings: Vec<Option<Result<[u8; 32]>>>) -> (BaseId, Vec<Finding>) {
        let request = CheckRequest { full: true, repair, ..CheckRequest::default() };
        let mut report = CheckReport::default();
        let inventory = t.store.take_inventory(&request, &mut report).unwrap();
        let id = *inventory.base_users.keys().next().unwrap();
        let mut readings = readings.into_iter();
        let mut hash = |_: &str, _: &File, _| readings.next().unwrap().unwrap_or(Ok(id.0));
        let mut how = ContentCheck { hash: &mut hash, mark: repair, repair };
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

    /// It counted as whole, so importing the image again, as was advised, threw the good copy away.
    #[test]
    fn a_base_that_cannot_be_read_is_replaced_by_importing_its_image_again() {
        use std::os::unix::fs::MetadataExt;
        let t = store_with_image();
        let inode = |id: &BaseId| t.store.base_file(id).unwrap().metadata().unwrap().ino();
        let (id, findings) = check(&t, false, vec![eio(), eio()]);
        assert_eq!((findings[0].kind, findings[0].severity), ("read-error", Severity::Damage));
        assert!(findings[0].remedy.text().contains("check --full --repair"), "{findings:?}");
        t.store.open_base(&id).unwrap();
        let (_, findings) = check(&t, true, vec![eio(), eio()]);
        assert!(findings[0].remedy.text().contains("importing the same image again"), "{findings:?}");
        t.store.open_base(&id).unwrap_err();
        let before = inode(&id);
        let source = t.run.path().join("source.raw");
        std::io::Write::write_all(
            &mut File::create(&source).unwrap(),
            &std::fs::read(t.folder.path().join(format!("bases/{id}/base.raw"))).unwrap(),
        )
        .unwrap();
        let request = super::super::super::ImportRequest { source, ..Default::default() };
        t.store.import_image(&"again".parse().unwrap(), &request, &NoProgress).unwrap();
        t.store.open_base(&id).unwrap();
        assert_ne!(inode(&id), before);
    }

    /// What a scrub had found on the disk was forgiven for what the cache had.
    #[test]
    fn contents_are_read_from_the_disk_and_not_from_the_cache() {
        let t = store_with_image();
        let request = CheckRequest { full: true, ..CheckRequest::default() };
        let id = t.store.image(&"debian".parse().unwrap()).unwrap().base;
        let storage = |store: &Store| crate::storage::FileStorage::new(store.base_file(&id).unwrap(), "base");
        // The host may keep for a moment what it was told to drop, or be reading ahead: seen uncached once is enough, for
        // who reads through the cache leaves it there each time.
        let leaves_cache_empty = |work: &dyn Fn()| {
            (0..50).any(|_| {
                let storage = storage(&t.store);
                storage.sync_all().unwrap();
                // Waits for what is being read ahead.
                crate::storage::Storage::read_at(&storage, 0, &mut [0; 8192]).unwrap();
                crate::storage::Storage::drop_cache(&storage).unwrap();
                work();
                !crate::storage::Storage::read_now(&storage, 0, &mut [0]).unwrap()
            })
        };
        assert!(
            leaves_cache_empty(&|| drop(t.store.check(&request, &NoProgress).unwrap())),
            "read through the cache, or temporary files are on one without direct reads"
        );
        assert!(
            leaves_cache_empty(&|| t.store.verify_base(&id, &NoProgress).unwrap()),
            "read through the cache"
        );
    }
}
