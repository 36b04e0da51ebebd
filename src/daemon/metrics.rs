//! A daemon's figures in the text format of Prometheus.
//!
//! Names of instances and disks are no labels: there may be thousands, and they come and go. Counters begin at zero with
//! the process that serves.

use std::fmt::Write;

use super::status::Identity;
use crate::error::Result;
use crate::fs::{DiskState, Ending, Fs, Operation};

/// Type of the text, as a scraper expects it.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// A text of metrics that grows.
#[derive(Default)]
struct Page(String);

impl Page {
    /// Begins a metric.
    fn metric(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string never fails.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Adds a value of it. Labels are constants of ours, so nothing in them needs escaping.
    fn value(&mut self, name: &str, labels: &str, value: u64) {
        let _ = match labels {
            "" => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }

    /// A metric of one value.
    fn single(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.metric(name, kind, help);
        self.value(name, "", value);
    }
}

/// The figures as they are now.
pub(super) fn page(identity: &Identity, fs: &Fs) -> Result<String> {
    let mut page = Page::default();
    page.metric("cowdisk_build_info", "gauge", "Version of the daemon.");
    page.value("cowdisk_build_info", concat!("version=\"", env!("CARGO_PKG_VERSION"), "\""), 1);
    let name = "cowdisk_transport_info";
    page.metric(name, "gauge", "What reads the kernel's requests, and why that.");
    let choice = identity.transport();
    let labels = format!("transport=\"{}\",reason=\"{}\"", choice.transport, choice.reason);
    page.value(name, &labels, 1);
    let started = u64::try_from(identity.started().unix_seconds()).unwrap_or(0);
    page.single("cowdisk_start_time_seconds", "gauge", "When it began to serve, since 1970.", started);
    if let Some(keeper) = identity.keeper() {
        let help = "How often another process took over from one that had died.";
        page.single("cowdisk_restarts_total", "counter", help, keeper.restarts.into());
        let help = "How often another process took over in order.";
        page.single("cowdisk_upgrades_total", "counter", help, keeper.upgrades.into());
        let name = "cowdisk_keeper_info";
        page.metric(name, "gauge", "Version of the process that keeps the mount.");
        // Of a keeper that may be older, but still one of ours: a version needs no escaping.
        page.value(name, &format!("version=\"{}\"", keeper.version), 1);
    }
    requests(&mut page, fs);
    disks(&mut page, fs);
    page.single(
        "cowdisk_open_files",
        "gauge",
        "Files and directories that are open.",
        fs.open_files() as u64,
    );
    page.single("cowdisk_instances", "gauge", "Instances of the store.", fs.count_instances()? as u64);
    host(&mut page, fs)?;
    Ok(page.0)
}

fn requests(page: &mut Page, fs: &Fs) {
    let name = "cowdisk_requests_total";
    page.metric(name, "counter", "Requests that have ended, by what they were and how they ended.");
    for operation in Operation::ALL {
        for (ending, count) in Ending::ALL.into_iter().zip(fs.request_counts(operation).endings) {
            let labels = format!("operation=\"{}\",ending=\"{}\"", operation.as_str(), ending.as_str());
            page.value(name, &labels, count);
        }
    }
    let help = "Reads and writes that the host's disk did while no thread waited for them.";
    page.single("cowdisk_async_requests_total", "counter", help, fs.asynchronous_requests());
    let name = "cowdisk_bytes_total";
    page.metric(name, "counter", "Bytes of requests that ended well.");
    for operation in [Operation::Read, Operation::Write, Operation::Allocate] {
        let labels = format!("operation=\"{}\"", operation.as_str());
        page.value(name, &labels, fs.request_counts(operation).bytes);
    }
}

fn disks(page: &mut Page, fs: &Fs) {
    let (disks, commits) = fs.disk_figures();
    let count =
        |wanted: fn(&DiskState) -> bool| disks.iter().filter(|disk| wanted(&disk.state)).count() as u64;
    let name = "cowdisk_disks";
    page.metric(name, "gauge", "Disks that are in use or could not be opened, by what becomes of them.");
    page.value(name, "state=\"open\"", count(|state| *state == DiskState::Open));
    page.value(name, "state=\"changing\"", count(|state| *state == DiskState::Changing));
    page.value(name, "state=\"latched\"", count(|state| *state == DiskState::Latched));
    page.value(name, "state=\"refused\"", count(|state| matches!(state, DiskState::Refused(_))));
    let by_kernel = disks.iter().filter(|disk| disk.served_by.backing().is_some()).count() as u64;
    let help = "Disks that are open, and whose reads and writes the kernel serves.";
    page.single("cowdisk_disks_served_by_kernel", "gauge", help, by_kernel);
    let runs = disks.iter().map(|disk| disk.uncommitted_runs as u64).sum();
    page.single("cowdisk_uncommitted_runs", "gauge", "Runs of blocks changed since the last commits.", runs);
    let name = "cowdisk_commits_total";
    page.metric(
        name,
        "counter",
        "What made writes durable: syncs of data alone, journal records after one, records with the data, checkpoints.",
    );
    page.value(name, "kind=\"sync\"", commits.syncs);
    page.value(name, "kind=\"record\"", commits.records);
    page.value(name, "kind=\"record_with_data\"", commits.records_with_contents);
    page.value(name, "kind=\"checkpoint\"", commits.checkpoints);
}

fn host(page: &mut Page, fs: &Fs) -> Result<()> {
    let now = fs.look_at_space()?;
    let name = "cowdisk_host_bytes";
    page.metric(name, "gauge", "Space of the host's filesystem under the store.");
    page.value(name, "kind=\"size\"", now.host.total);
    page.value(name, "kind=\"used\"", now.used());
    page.value(name, "kind=\"available\"", now.host.available);
    page.value(name, "kind=\"reserve\"", now.reserve);
    page.value(name, "kind=\"left\"", now.left());
    let help = "1 if the high-water mark is reached, or little more than the reserve is left.";
    page.single("cowdisk_host_nearly_full", "gauge", help, now.is_high().into());
    Ok(())
}
