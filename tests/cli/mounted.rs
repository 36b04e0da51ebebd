//! Commands on a mounted store.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Place, text};

/// A furnished place whose store is mounted on `mnt`, and unmounted when dropped.
pub struct Mounted(pub Place);

impl Mounted {
    pub fn new() -> Self {
        Self::of(Place::furnished())
    }

    /// Mounts the store of a place.
    pub fn of(place: Place) -> Self {
        assert_eq!(place.works(&["mount", &place.path("mnt")]), "");
        Self(place)
    }

    /// The root disk of the instance of a furnished place, open as a hypervisor has it.
    pub fn open_disk(&self) -> File {
        File::options().read(true).write(true).open(self.0.path("mnt/instances/inst/disk")).unwrap()
    }

    /// Waits until the daemon has ended after a signal.
    pub fn wait_until_ended(&self, pid: u64) {
        let end = Instant::now() + Duration::from_secs(60);
        while fs::read_link(format!("/proc/{pid}/exe")).is_ok() {
            assert!(Instant::now() < end, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn umount(&self) {
        assert_eq!(self.0.works(&["umount", &self.0.path("mnt")]), "");
    }

    /// Runs what must fail; returns its stderr with `{}` for the folder.
    fn fails(&self, arguments: &[&str]) -> String {
        let output = self.0.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        text(&output.stderr).replace(&self.0.path(""), "{}/")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whatever the test left behind, nothing of it may outlive the test.
        let mnt = self.0.path("mnt");
        if self.0.run(&["umount", &mnt]).status.code() != Some(0) {
            let _ = Command::new("umount").args(["--lazy", &mnt]).stderr(Stdio::null()).status();
        }
    }
}

/// Fails where nothing can be mounted.
#[track_caller]
pub fn needs_mount() {
    let may = rustix::process::geteuid().is_root() && fs::metadata("/dev/fuse").is_ok();
    assert!(may, "mounting needs root and /dev/fuse");
}

#[test]
fn a_mount_can_be_read_at_once_and_an_unmount_leaves_all_durable() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let disk = mounted.open_disk();
    let mut bytes = [0; 8];
    disk.read_exact_at(&mut bytes, 131_072).unwrap();
    assert_eq!(bytes, [0x5a; 8]);
    disk.write_all_at(&[7; 4096], 4096).unwrap();
    let map = place.json(&["map", "inst", "--output", "json"]);
    assert_eq!(
        (&map[1]["start"], &map[1]["depth"]),
        (&4096.into(), &0.into()),
        "the map of a disk in use is live"
    );
    drop(disk);
    place.works(&["instance", "create", "late", "--image", "img"]);
    assert!(fs::metadata(place.path("mnt/instances/late/disk")).is_ok(), "a new instance is there at once");
    place.works(&["instance", "remove", "late"]);
    assert!(fs::metadata(place.path("mnt/instances/late")).is_err(), "and a removed one is gone");
    mounted.umount();
    assert_eq!(fs::read_dir(place.path("mnt")).unwrap().count(), 0);
    assert_eq!(place.json(&["map", "inst", "--output", "json"]), map);
}

#[test]
fn a_mount_warns_of_bases_over_which_disks_are_refused() {
    needs_mount();
    let place = Place::furnished();
    let base = place.json(&["image", "show", "img", "--json"])["base"].as_str().unwrap().to_owned();
    let file = File::open(place.path(&format!("store/bases/{base}/base.raw"))).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    let output = place.run(&["mount", &place.path("mnt")]);
    let opened = File::open(place.path("mnt/instances/inst/disk"));
    place.works(&["umount", &place.path("mnt")]);
    assert_eq!(output.status.code(), Some(0));
    let said = text(&output.stderr);
    assert!(said.contains(&format!("cowdisk: warn: base {base}: its modification time was ")), "{said}");
    assert!(said.contains("; every disk over it is refused, and cowdisk check names them\n"), "{said}");
    opened.unwrap_err();
}

#[test]
fn a_disk_in_use_is_neither_removed_nor_unmounted_nor_served_twice() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let path = place.path("mnt/instances/inst/disk");
    // Another process, as a guest would be: `read` holds the disk open until its stdin ends.
    let mut holder = Command::new("sh")
        .args(["-c", "exec 3<\"$0\"; echo open; read line", &path])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_output(&mut holder);
    let refusal = mounted.fails(&["instance", "remove", "inst"]);
    assert!(refusal.starts_with("cowdisk: remove instance inst: disk inst/disk: "), "{refusal}");
    let refusal = mounted.fails(&["umount", &place.path("mnt")]);
    let wanted = format!("process {} (sh) uses {{}}/mnt/instances/inst/disk", holder.id());
    assert!(refusal.starts_with("cowdisk: {}/mnt is in use: ") && refusal.contains(&wanted), "{refusal}");
    fs::create_dir(place.path("mnt2")).unwrap();
    let refusal = mounted.fails(&["mount", &place.path("mnt2")]);
    assert!(refusal.contains("{}/mnt"), "tells where the store is mounted: {refusal}");
    let refusal = mounted.fails(&["mount", "--check", &place.path("mnt2")]);
    assert!(refusal.contains("serves it on {}/mnt already"), "{refusal}");
    drop(holder.stdin.take());
    holder.wait().unwrap();
    mounted.umount();
    let refusal = mounted.fails(&["umount", &place.path("mnt")]);
    assert_eq!(refusal, "cowdisk: {}/mnt: no store is mounted there\n");
}

fn wait_for_output(child: &mut Child) {
    use std::io::Read as _;
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn a_mount_in_the_foreground_ends_with_its_mount() {
    needs_mount();
    let place = Place::furnished();
    let mut daemon = place.command(&["mount", "-f", &place.path("mnt"), "-o", "ro"]).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while fs::metadata(place.path("mnt/instances/inst/disk")).is_err() {
        assert!(Instant::now() < deadline, "the mount never came");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(File::options().write(true).open(place.path("mnt/instances/inst/disk")).is_err(), "read-only");
    place.works(&["umount", &place.path("mnt")]);
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn the_xml_of_a_mounted_instance_is_what_libvirt_wants() {
    needs_mount();
    let mounted = Mounted::new();
    let place = &mounted.0;
    let disks = place.works(&["libvirt", "xml", "inst"]);
    for (file, target) in [("disk", "vda"), ("disk.local", "vdb")] {
        let source = format!("<source file=\"{}\"/>", place.path(&format!("mnt/instances/inst/{file}")));
        assert!(disks.contains(&source), "{disks}");
        assert!(disks.contains(&format!("<target dev=\"{target}\" bus=\"virtio\"/>")), "{disks}");
    }
    assert_eq!(place.works(&["libvirt", "xml", "full"]).matches("<disk ").count(), 1);
    let arguments =
        ["libvirt", "xml", "inst", "--domain", "--type", "qemu", "--memory", "1G", "--vcpus", "3"];
    let kernel = place.path("kernel");
    let domain = place.works(&[&arguments[..], &["--kernel", &kernel, "--append", "a=<&>"]].concat());
    assert!(domain.contains("<memory unit=\"KiB\">1048576</memory>") && domain.contains("<vcpu>3</vcpu>"));
    assert!(domain.contains(&format!("<kernel>{kernel}</kernel>")), "{domain}");
    assert!(domain.contains("<cmdline>a=&lt;&amp;&gt;</cmdline>"), "{domain}");
    fs::write(place.path("domain.xml"), domain).unwrap();
    let checked = Command::new("virsh")
        .args(["-c", "test:///default", "define", "--validate", &place.path("domain.xml")])
        .output();
    let output = checked.expect("virsh, of libvirt-clients");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mut output = mounted.fails(&["libvirt", "start", "inst", "--kernel", &place.path("nope")]);
    assert_eq!(output, "cowdisk: {}/nope: No such file or directory\n");
    let refused = place.run(&["libvirt", "start", "inst", "--append", "quiet"]);
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(
        text(&refused.stderr),
        "cowdisk: instance inst: a ramdisk or command line needs a kernel\n\
         give --kernel, or import the image with its kernel\n"
    );
    let control = place.run(&["libvirt", "start", "inst", "--kernel", &kernel, "--append", "a\nb"]);
    output = text(&control.stderr);
    assert_eq!(
        output,
        "cowdisk: start instance inst: \"a\\nb\": XML for libvirt cannot carry the character '\\n'\n"
    );
}
