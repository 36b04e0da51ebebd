//! What a daemon tells about itself, and that whoever asks badly is refused and holds nobody up.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::mounted::{Mounted, needs_mount};
use super::{Place, text};

/// The one folder in the run directory that is the store's.
fn socket(place: &Place) -> PathBuf {
    let folder = fs::read_dir(place.run.path()).unwrap().next().unwrap().unwrap().path();
    folder.join("control.sock")
}

fn connect(place: &Place) -> UnixStream {
    let stream = UnixStream::connect(socket(place)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

/// Everything that comes back for `request`, until the connection ends.
fn ask(place: &Place, request: &[u8]) -> String {
    let mut stream = connect(place);
    // A daemon that has refused already no longer listens.
    let _ = stream.write_all(request);
    answer(stream)
}

fn answer(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    // What was not read when the other side closed resets the connection, after the answer.
    let _ = stream.read_to_end(&mut bytes);
    text(&bytes)
}

fn metric(page: &str, name: &str) -> u64 {
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in\n{page}")).parse().unwrap()
}

fn metrics(place: &Place) -> String {
    let response = ask(place, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n"), "{head}");
    body.to_owned()
}

#[test]
fn status_shows_a_mounted_and_an_unmounted_store() {
    needs_mount();
    let place = Place::furnished();
    assert!(place.works(&["status"]).ends_with("store: not mounted\n"));
    let status = place.json(&["status", "--json"]);
    assert_eq!((&status["mounted"], &status["daemon"]), (&false.into(), &serde_json::Value::Null));
    place.run(&["mount", "-o", "reserve=3M,threads=2", &place.path("mnt")]);
    let mounted = Mounted(place);
    let place = &mounted.0;
    let disk = mounted.open_disk();
    disk.write_all_at(&[7; 4096], 8192).unwrap();
    for arguments in [&["status", "--json"][..], &["status", "--json", &place.path("mnt")]] {
        let status = place.json(arguments);
        let daemon = &status["daemon"];
        assert_eq!((&status["mounted"], &daemon["instances"]), (&true.into(), &2.into()));
        assert_eq!(daemon["mountpoint"], place.path("mnt"));
        assert_eq!(daemon["host"]["reserve"], 3 << 20);
        assert!(daemon["options"].as_str().unwrap().contains("threads=2"));
        assert!(["dev_fuse", "io_uring", "fuser"].contains(&daemon["transport"].as_str().unwrap()));
        assert!(!daemon["transport_reason"].as_str().unwrap().is_empty());
        assert_eq!(daemon["disks"].as_array().unwrap().len(), 1);
        let disk = &daemon["disks"][0];
        assert_eq!((&disk["name"], &disk["state"]), (&"inst/disk".into(), &"open".into()));
        assert_eq!((&disk["handles"], &disk["size"]), (&1.into(), &(1 << 20).into()));
    }
    let shown = place.works(&["status"]);
    assert!(shown.contains("inst/disk  open"), "{shown}");
    drop(disk);
    mounted.umount();
    assert!(!socket(&mounted.0).exists(), "the socket goes with the daemon");
    let wrong = mounted.0.run(&["status", &mounted.0.path("mnt")]);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(text(&wrong.stderr).ends_with("mnt: no store is mounted there\n"), "{}", text(&wrong.stderr));
}

#[test]
fn a_disk_that_cannot_be_opened_is_shown_with_the_reason_until_it_can() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let disk = place.path("mnt/instances/inst/disk");
    let base = fs::read_dir(place.path("store/bases")).unwrap().next().unwrap().unwrap().path();
    let touched = Command::new("touch").args(["-d", "1999-12-31"]).arg(base.join("base.raw")).status();
    assert!(touched.unwrap().success());
    File::open(&disk).unwrap_err();
    let status = place.json(&["status", "--json"]);
    let shown = &status["daemon"]["disks"][0];
    assert_eq!((&shown["name"], &shown["state"]), (&"inst/disk".into(), &"refused".into()));
    assert!(shown["reason"].as_str().unwrap().contains("modification time"), "{shown}");
    place.works(&["image", "verify", "img"]);
    let open = File::open(&disk).unwrap();
    let status = place.json(&["status", "--json"]);
    assert_eq!(status["daemon"]["disks"][0]["state"], "open");
    drop(open);
    mounted.umount();
}

#[test]
fn metrics_count_what_guests_do() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let before = metrics(place);
    let writes = "cowdisk_requests_total{operation=\"write\",ending=\"done\"}";
    assert_eq!((metric(&before, writes), metric(&before, "cowdisk_disks{state=\"open\"}")), (0, 0));
    let disk = mounted.open_disk();
    for block in 0..5 {
        disk.write_all_at(&[7; 4096], block * 8192).unwrap();
    }
    let page = metrics(place);
    assert_eq!(metric(&page, "cowdisk_uncommitted_runs"), 5);
    disk.sync_all().unwrap();
    for _ in 0..2 {
        disk.write_all_at(&[7; 4096], 0).unwrap();
        disk.sync_all().unwrap();
    }
    assert_eq!(disk.write_all_at(&[7; 4096], 1 << 20).unwrap_err().raw_os_error(), Some(27));
    let page = metrics(place);
    assert_eq!(
        (metric(&page, writes), metric(&page, "cowdisk_bytes_total{operation=\"write\"}")),
        (7, 7 * 4096)
    );
    assert_eq!(metric(&page, "cowdisk_requests_total{operation=\"write\",ending=\"other_error\"}"), 1);
    assert!(metric(&page, "cowdisk_requests_total{operation=\"sync\",ending=\"done\"}") >= 2);
    // The new blocks with their data; that these have changed since; and what changed after that.
    assert_eq!(metric(&page, "cowdisk_commits_total{kind=\"record_with_data\"}"), 1);
    assert_eq!(metric(&page, "cowdisk_commits_total{kind=\"record\"}"), 1);
    assert!(metric(&page, "cowdisk_commits_total{kind=\"sync\"}") >= 1);
    assert_eq!(
        (metric(&page, "cowdisk_disks{state=\"open\"}"), metric(&page, "cowdisk_uncommitted_runs")),
        (1, 0)
    );
    drop(disk);
    // What a disk has done is counted after it was closed, too: counters never fall.
    while metric(&metrics(place), "cowdisk_disks{state=\"open\"}") > 0 {}
    assert!(metric(&metrics(place), "cowdisk_commits_total{kind=\"record\"}") >= 1);
    let host = rustix::fs::statvfs(place.path("store")).unwrap();
    assert_eq!(metric(&page, "cowdisk_host_bytes{kind=\"size\"}"), host.f_blocks * host.f_frsize);
    for name in ["cowdisk_build_info{version=\"0.1.0\"}", "cowdisk_instances", "cowdisk_host_nearly_full"] {
        metric(&page, name);
    }
    mounted.umount();
}

#[test]
fn who_serves_a_disk_is_shown_and_a_mount_says_why_the_kernel_will_not() {
    needs_mount();
    let place = Place::furnished();
    place.works(&["instance", "create", "copy", "--image", "img", "--no-cow"]);
    let mnt = place.path("mnt");
    let mount = |options: &str| text(&place.run(&["mount", "-o", options, &mnt]).stderr);
    assert_eq!(
        mount("transport=fuser,passthrough=auto"),
        "cowdisk: warn: no disk is left to the kernel: the transport fuser cannot\n"
    );
    place.works(&["umount", &mnt]);
    assert_eq!(mount("transport=dev_fuse,passthrough=auto"), "", "this needs Linux 6.9 and CAP_SYS_ADMIN");
    let mounted = Mounted(place);
    let place = &mounted.0;
    let open = |disk: &str| File::open(place.path(&format!("mnt/instances/{disk}"))).unwrap();
    let disks = (open("copy/disk"), open("inst/disk"));
    let daemon = &place.json(&["status", "--json"])["daemon"];
    assert_eq!(daemon["passthrough"], serde_json::json!({"on": true, "reason": null}));
    let shown =
        |number: usize| (&daemon["disks"][number]["served_by"], &daemon["disks"][number]["not_kernel"]);
    assert_eq!(shown(0), (&"kernel".into(), &serde_json::Value::Null));
    assert_eq!(shown(1), (&"daemon".into(), &"it is an overlay".into()));
    assert_eq!(metric(&metrics(place), "cowdisk_disks_served_by_kernel"), 1);
    let table = place.works(&["status"]);
    assert!(table.lines().any(|line| line.starts_with("copy/disk") && line.ends_with("kernel")), "{table}");
    drop(disks);
    mounted.umount();
}

/// Threads that wait would do the same, slower, and nobody would notice.
#[test]
fn direct_requests_side_by_side_are_done_while_no_thread_waits() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let count = || metric(&metrics(place), "cowdisk_async_requests_total");
    // By io_uring no write is done so.
    let work = if std::env::var("COWDISK_TRANSPORT").is_ok_and(|name| name == "io_uring") {
        "randrw"
    } else {
        "randwrite"
    };
    // An overlay, and a plain file.
    for path in ["mnt/instances/inst/disk", "mnt/instances/inst/disk.local"] {
        let path = place.path(path);
        let disk = fs::File::options().write(true).open(&path).unwrap();
        disk.write_all_at(&[7; 1 << 20], 0).unwrap();
        disk.sync_all().unwrap();
        let before = count();
        let fio = Command::new("fio")
            .args(["--name=side-by-side", "--rw", work, "--bs=4k", "--size=1M", "--loops=20", "--direct=1"])
            .args(["--ioengine=libaio", "--iodepth=32", "--fallocate=none"])
            .args(["--filename", &path])
            .output()
            .expect("fio is needed: scripts/install-deps");
        assert!(fio.status.success(), "{}", text(&fio.stderr));
        assert!(
            count() - before > 100,
            "{path}: are temporary files on a file system without direct I/O, or is fs.aio-max-nr used up?"
        );
    }
    mounted.umount();
}

/// The same of reads of a base.
#[test]
fn reads_side_by_side_of_what_the_host_has_not_in_memory_are_done_while_no_thread_waits() {
    needs_mount();
    if std::env::var("COWDISK_TRANSPORT").is_ok_and(|name| !name.is_empty() && name != "dev_fuse") {
        // By the others threads wait.
        return;
    }
    let mounted = Mounted::new();
    let place = &mounted.0;
    let bases = fs::read_dir(place.path("store/bases")).unwrap();
    let bases: Vec<_> =
        bases.map(|base| fs::File::open(base.unwrap().path().join("base.raw")).unwrap()).collect();
    let count = || metric(&metrics(place), "cowdisk_async_requests_total");
    let before = count();
    // Where the image has data. A read that finds another one's page is not among them, so not each round tells.
    for _ in 0..100 {
        for base in &bases {
            rustix::fs::fadvise(base, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
        let fio = Command::new("fio")
            .args([
                "--name=cold",
                "--rw=randread",
                "--bs=4k",
                "--offset=128k",
                "--size=64k",
                "--direct=1",
                "--readonly",
            ])
            .args(["--ioengine=libaio", "--iodepth=32", "--filename", &place.path("mnt/instances/inst/disk")])
            .output()
            .expect("fio is needed: scripts/install-deps");
        assert!(fio.status.success(), "{}", text(&fio.stderr));
        if count() > before {
            return mounted.umount();
        }
    }
    panic!("needs Linux 6.1, kernel.io_uring_disabled=0, and temporary files on ext4, XFS or btrfs");
}

#[test]
fn whoever_asks_badly_is_refused_and_holds_nobody_up() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let socket = socket(place).metadata().unwrap();
    assert_eq!((socket.mode() & 0o777, socket.uid()), (0o600, 0));
    let garbage: Vec<u8> = (0..=255u8).cycle().take(100_000).collect();
    let long = [b"GET /metrics HTTP/1.1\r\nX: ".as_slice(), &vec![b'y'; 1 << 20]].concat();
    for (request, code) in [
        (garbage.as_slice(), "400"),
        (&long, "431"),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"GET /store/../../etc/passwd HTTP/1.1\r\n\r\n", "404"),
        (b"\0\0\0\0", "400"),
    ] {
        let answer = ask(place, request);
        assert!(answer.is_empty() || answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
    }
    // As many as are answered at once say nothing; one more is refused, and guests notice nothing.
    let silent: Vec<UnixStream> = (0..8).map(|_| connect(place)).collect();
    let refused = answer(connect(place));
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    let disk = mounted.open_disk();
    disk.write_all_at(&[7; 4096], 0).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    // They are not waited for without end; then there is a turn for others again.
    for stream in silent {
        let late = answer(stream);
        assert!(late.starts_with("HTTP/1.1 408 "), "{late}");
    }
    while !ask(place, b"GET /v1/status HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 ") {}
    // Whoever hangs up in the middle, too.
    for _ in 0..100 {
        // Some find all turns taken, and their connection closed.
        let _ = connect(place).write_all(b"GET /v1/st");
    }
    while !ask(place, b"GET /v1/status HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 ") {}
    mounted.umount();
}

#[test]
fn a_socket_that_a_killed_daemon_left_is_replaced() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let daemon = || place.json(&["status", "--json"])["daemon"].clone();
    let pid = || daemon()["pid"].as_i64().unwrap();
    let first = pid();
    // The one that keeps the mount first, for it would have another one take over.
    for pid in [daemon()["keeper"]["pid"].as_i64(), Some(first)].into_iter().flatten() {
        let process = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    }
    // While its process ends it is neither there nor gone.
    while !text(&place.run(&["status"]).stdout).ends_with("not mounted\n") {}
    assert!(socket(place).exists());
    place.works(&["mount", &place.path("mnt")]);
    assert_ne!(pid(), first);
    mounted.umount();
}
