//! `cowdisk df`, and the warning that other commands give.

use serde::Serialize;

use super::Session;
use super::args::Form;
use super::images::sized;
use crate::daemon::HostStatus;
use crate::error::Result;
use crate::store::{SpaceNow, Store, Usage};
use crate::units::HumanBytes;

/// A store's use of space as `--json` shows it. Sizes are bytes.
#[derive(Debug, Serialize)]
struct UsageView {
    host: HostStatus,
    instances: u64,
    disks: u64,
    promised: u64,
    taken: TakenView,
    /// What full copies instead of overlays would take above that.
    saved: u64,
    /// Instances that are damaged and not counted.
    unreadable: Vec<String>,
}

/// What a store takes, by what it is.
#[derive(Debug, Serialize)]
struct TakenView {
    total: u64,
    overlays: u64,
    maps: u64,
    independent: u64,
    bases: u64,
    boot: u64,
    unfinished: u64,
}

/// Prints what the store takes.
pub(super) fn run(session: &mut Session, form: Form) -> Result<()> {
    let store = session.open_store()?;
    let usage = store.usage()?;
    if form.json {
        session.output.json(&UsageView::of(&usage))?
    } else {
        show(session, &usage)?
    }
    warn(&usage.space);
    Ok(())
}

/// Warns if the host's file system is nearly full. What cannot be looked up is no reason to fail what was done.
pub(super) fn warn_if_high(store: &Store) {
    match store.space() {
        Ok(now) => warn(&now),
        Err(error) => log::warn!("{error}"),
    }
}

fn warn(now: &SpaceNow) {
    if now.is_high() {
        log::warn!("{}", now.sentence());
    }
}

fn show(session: &mut Session, usage: &Usage) -> Result<()> {
    let now = &usage.space;
    let state = if now.is_high() { ", nearly full" } else { "" };
    let times = u128::from(usage.promised) * 10 / u128::from(now.host.total.max(1));
    let promised = format!(
        "{} to {} disks of {} instances, {}.{} times the host's file system",
        HumanBytes(usage.promised),
        usage.disks,
        usage.instances,
        times / 10,
        times % 10
    );
    let human = |bytes: u64| HumanBytes(bytes).to_string();
    session.output.properties(&[
        ("host's file system", sized(now.host.total)),
        ("  used", format!("{}, {} %{state}", human(now.used()), now.used_percent())),
        ("  available", human(now.host.available)),
        ("  in reserve", human(now.reserve)),
        ("  left for disks", human(now.left())),
        ("promised", promised),
        ("taken", human(usage.taken())),
        ("  overlays", human(usage.overlays)),
        ("  maps", human(usage.maps)),
        ("  independent disks", human(usage.independent)),
        ("  images and flavors", human(usage.bases)),
        ("  kernels, ramdisks", human(usage.boot)),
        ("  half-made", human(usage.unfinished)),
        ("saved by sharing", human(usage.saved)),
    ])
}

impl UsageView {
    fn of(usage: &Usage) -> Self {
        let now = &usage.space;
        Self {
            host: HostStatus::from(now),
            instances: usage.instances,
            disks: usage.disks,
            promised: usage.promised,
            taken: TakenView {
                total: usage.taken(),
                overlays: usage.overlays,
                maps: usage.maps,
                independent: usage.independent,
                bases: usage.bases,
                boot: usage.boot,
                unfinished: usage.unfinished,
            },
            saved: usage.saved,
            unreadable: usage.unreadable.iter().map(ToString::to_string).collect(),
        }
    }
}
