//! `cowdisk upgrade`.

use super::Session;
use super::args::StatusArgs;
use super::status::store_meant;
use crate::daemon;
use crate::error::Result;
use crate::store::Store;

/// Has another process take over, and prints what came of it.
pub(super) fn run(session: &mut Session, args: &StatusArgs) -> Result<()> {
    let dir = store_meant(session, args)?;
    // It may be another store than that whose owner we are by now.
    let upgraded = daemon::as_owner(&dir, || daemon::upgrade(&Store::open(&dir)?))?;
    if args.form.json {
        return session.output.json(&upgraded);
    }
    let (from, to) = (&upgraded.from, &upgraded.to);
    let versions =
        if from == to { format!("cowdisk {to}, as before") } else { format!("cowdisk {to} after {from}") };
    session.done(&format!(
        "store {}: served by another process ({versions}); requests waited for {} ms",
        dir.display(),
        upgraded.pause_milliseconds
    ))
}
