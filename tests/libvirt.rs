//! Debian guests under a real libvirt, on disks of a real mount: what they write, and what the host then sees.
//!
//! They need root, /dev/fuse, QEMU and a libvirt, and fail without: `scripts/test --test libvirt` sees to all of it. The
//! libvirt has its defaults, so QEMU runs as a user of its own, in a mount namespace of its own, and owns its disks meanwhile.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a failed step fails the test")]
#![allow(missing_docs, reason = "the names say it")]

#[path = "libvirt/outside.rs"]
mod outside;
#[path = "libvirt/place.rs"]
mod place;

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use outside::{
    MIB, allocated, assert_clean_ext4, assert_clean_xfs, assert_holds, assert_same, content, files_on, owner,
    path, sha256,
};
use place::{Guest, IMAGE, Place, tool, virsh};

#[test]
fn guests_over_one_image_keep_what_they_write_and_nothing_else() {
    let place = Place::new();
    for instance in ["a", "b", "hot", "idle"] {
        place.create(instance, &["--flavor", "ext4"]);
    }
    // Not root's, so that it can be told whether libvirt gives the disk back to its owner.
    let owned = (1234, 5678, 0o640);
    chown(&place.disk("a", "disk"), owned);

    let a = place.start(
        "a",
        "disks,write=alpha:8,fill=64,wait=vdd,disks,use=vdc,use=vdd,write=gamma:4,leave=vdc,leave=vdd,gone=vdd,drop,trim,verify",
    );
    let b = place.start("b", "write=beta:4,verify,hang");
    a.wait_for("cowdisk-guest: filled /mnt/local");
    b.wait_for("cowdisk-guest: hanging");
    assert_ne!(owner(&place.disk("a", "disk")).0, owned.0, "QEMU's user owns the disk of a running guest");
    check_what_is_refused(&place, &a, &b);

    let filled = ["disk", "disk.local"].map(|disk| allocated(&place.disk("a", disk)));
    resize(&a, "vdb", "1536M");
    hot_attach_and_detach(&place, &a);
    let a_said = a.wait_until_off();
    b.stop();

    let trimmed = ["disk", "disk.local"].map(|disk| allocated(&place.disk("a", disk)));
    for (filled, trimmed) in filled.into_iter().zip(trimmed) {
        // Since it was filled gamma has been written, too, but nothing else of that size.
        assert!(
            trimmed + 56 * MIB < filled,
            "of {filled} bytes {trimmed} are left after 64 MiB were trimmed"
        );
    }
    assert_eq!(owner(&place.disk("a", "disk")), owned, "after the guest the disk has its owner again");
    let checksum = sha256(&content("alpha", 8 * MIB));
    assert_eq!(a_said.matches(&format!("/alpha bytes={} sha256={checksum}", 8 * MIB)).count(), 2, "{a_said}");

    // From now on by a daemon that has seen nothing of all that.
    place.remount();
    for disk in ["disk", "disk.local"] {
        for instance in ["a", "b", "hot", "idle"] {
            assert_clean_ext4(&place.disk(instance, disk));
        }
        assert_holds(&place.disk("a", disk), "alpha", 8 * MIB);
        assert_holds(&place.disk("a", disk), "gamma", 4 * MIB);
        assert_holds(&place.disk("b", disk), "beta", 4 * MIB);
        assert_holds(&place.disk("hot", disk), "gamma", 4 * MIB);
        assert_eq!(files_on(&place.disk("a", disk)), ["alpha", "gamma"]);
        assert_eq!(files_on(&place.disk("b", disk)), ["beta"]);
        assert_eq!(files_on(&place.disk("hot", disk)), ["gamma"]);
    }
    assert_same(&place.disk("idle", "disk"), &place.source_image());
    assert_same(&place.base_image(), &place.source_image());
    place.cowdisk(&["image", "verify", IMAGE]);
    let map = place.cowdisk(&["map", &place.name("idle"), "--output", "json"]);
    assert!(!map.contains("\"depth\":0,\"present\":true"), "nothing of the idle disk is its own:\n{map}");
}

/// Everything that would take a disk away from a running guest, or give it to two.
fn check_what_is_refused(place: &Place, a: &Guest<'_>, b: &Guest<'_>) {
    let says = place.refused(&["libvirt", "attach", &b.domain, &a.domain]);
    assert!(says.contains("Failed to get \"write\" lock"), "{says}");
    let disks = String::from_utf8(virsh(&["domblklist", &b.domain]).stdout).unwrap();
    assert_eq!(disks.lines().filter(|line| line.contains("vd")).count(), 2, "none stays attached:\n{disks}");

    let says = place.refused(&["libvirt", "start", &a.domain]);
    assert!(says.contains("already exists"), "{says}");
    let says = place.refused(&["instance", "remove", &a.domain]);
    assert!(says.contains("open elsewhere"), "{says}");
    let says = place.refused(&["image", "remove", IMAGE]);
    assert!(says.contains(&a.domain), "{says}");

    let says = place.refused(&["umount", path(&place.mountpoint())]);
    for part in ["qemu-system", path(&place.disk("a", "disk")), path(&place.disk("b", "disk.local"))] {
        assert!(says.contains(part), "no {part} in: {says}");
    }
}

/// Makes a running guest's disk larger.
fn resize(guest: &Guest<'_>, disk: &str, size: &str) {
    let output = virsh(&["blockresize", &guest.domain, disk, size]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Gives the guest, which waits for them, two more disks, and takes them away once it has used them.
fn hot_attach_and_detach(place: &Place, guest: &Guest<'_>) {
    let hot = place.name("hot");
    let says = place.cowdisk(&["libvirt", "attach", &guest.domain, &hot]);
    assert!(says.contains("vdc, vdd"), "{says}");
    let says = place.refused(&["libvirt", "attach", &guest.domain, &hot]);
    assert!(says.contains("attached to domain"), "{says}");
    guest.wait_for("cowdisk-guest: there is vdd");
    guest.wait_for(&format!("cowdisk-guest: disk vdb bytes={}", 1536 * MIB));
    guest.wait_for("cowdisk-guest: unmounted vdd");
    place.cowdisk(&["libvirt", "detach", &guest.domain, &hot]);
    guest.wait_for("cowdisk-guest: gone is vdd");
    let says = place.refused(&["libvirt", "detach", &guest.domain, &hot]);
    assert!(says.contains("has no disk of instance"), "{says}");
}

#[test]
fn a_guest_finds_again_what_it_had_synced_when_its_plug_was_pulled() {
    let place = Place::new();
    place.create("overlay", &["--flavor", "xfs", "--block-size", "64K"]);
    place.create("full", &["--flavor", "ext4", "--no-cow", "--root-size", "1500M"]);
    let disks = [("overlay", "disk"), ("overlay", "disk.local"), ("full", "disk"), ("full", "disk.local")];

    let guests = ["overlay", "full"].map(|instance| place.start(instance, "disks,write=before:8,hang"));
    for guest in guests {
        guest.wait_for("cowdisk-guest: hanging");
        guest.pull_the_plug();
    }
    place.remount();
    let guests = ["overlay", "full"].map(|instance| place.start(instance, "verify,write=after:2,verify"));
    for guest in guests {
        let console = guest.wait_until_off();
        assert_eq!(console.matches("cowdisk-guest: verified").count(), 4, "{console}");
    }

    place.remount();
    for (instance, disk) in disks {
        let file = place.disk(instance, disk);
        assert_eq!(owner(&file), (0, 0, 0o600), "{instance}/{disk}");
        if (instance, disk) == ("overlay", "disk.local") {
            assert_clean_xfs(&file);
        } else {
            assert_clean_ext4(&file);
            assert_holds(&file, "before", 8 * MIB);
            assert_holds(&file, "after", 2 * MIB);
        }
    }
    assert_same(&place.base_image(), &place.source_image());
}

#[test]
fn a_guest_finds_again_what_it_had_written_when_the_daemon_was_killed_under_it() {
    let place = Place::new();
    for (instance, arguments) in
        [("overlay", &["--flavor", "ext4"][..]), ("full", &["--flavor", "ext4", "--no-cow"])]
    {
        place.create(instance, arguments);
    }
    let writes: Vec<_> = (0..100).map(|number| format!("write=file-{number}:4")).collect();
    let guests = ["overlay", "full"].map(|instance| (instance, place.start(instance, &writes.join(","))));
    for (_, guest) in &guests {
        guest.wait_for("cowdisk-guest: wrote /mnt/local/var/lib/cowdisk-guest/file-2 ");
    }
    place.kill_daemon();
    let mut written = Vec::new();
    for (instance, guest) in guests {
        let console = guest.wait_until_stopped();
        let reported = |folder: &str| console.matches(&format!("cowdisk-guest: wrote {folder}")).count();
        written.push((instance, reported("/var/"), reported("/mnt/local/var/")));
        guest.pull_the_plug();
    }

    place.mount();
    let guests = ["overlay", "full"].map(|instance| place.start(instance, "verify"));
    for ((instance, on_root, on_local), guest) in written.into_iter().zip(guests) {
        let console = guest.wait_until_off();
        assert_eq!(console.matches("cowdisk-guest: verified").count(), 2, "{console}");
        for (disk, count) in [("disk", on_root), ("disk.local", on_local)] {
            assert!(count >= 3, "{instance}/{disk}: only {count} files were written");
            for number in 0..count {
                assert_holds(&place.disk(instance, disk), &format!("file-{number}"), 4 * MIB);
            }
            assert_clean_ext4(&place.disk(instance, disk));
        }
    }
}

/// Starts guests of the instances `overlay` and `full`, that each write so many files to each of their disks and then do
/// what is left of their jobs.
fn start_writers<'a>(place: &'a Place, files: usize, then: [&str; 2]) -> [(&'static str, Guest<'a>); 2] {
    let writes: Vec<_> = (0..files).map(|number| format!("write=file-{number}:1")).collect();
    let start =
        |instance, then: &str| (instance, place.start(instance, &format!("{},{then}", writes.join(","))));
    [start("overlay", then[0]), start("full", then[1])]
}

/// Kills the daemon's process that serves, and upgrades it, in turns: after every second of the files, while each guest in turn is
/// in the middle of writing. Calls `each` after each time, with how often that was so before.
fn replace_under(guests: &[(&str, Guest<'_>)], place: &Place, files: usize, each: impl Fn(usize)) {
    let rounds = files / 2 - 1;
    for round in 0..rounds {
        let file = format!("cowdisk-guest: wrote /mnt/local/var/lib/cowdisk-guest/file-{} ", round * 2);
        guests[round % guests.len()].1.wait_for(&file);
        if round % 2 == 0 {
            place.kill_worker()
        } else {
            place.upgrade()
        }
        each(round);
    }
    let keeper = place.status().keeper.expect("it is kept");
    let (kills, upgrades) = (rounds.div_ceil(2), rounds / 2);
    assert_eq!((keeper.restarts as usize, keeper.upgrades as usize), (kills, upgrades));
}

/// Fails unless both guests verified all that they had written, and the host finds it, too, after a remount.
fn assert_nothing_noticed(place: &Place, guests: [(&str, Guest<'_>); 2], files: usize) {
    for (instance, guest) in guests {
        let console = guest.wait_until_off();
        assert_eq!(console.matches("cowdisk-guest: verified").count(), 2, "{instance}: {console}");
    }
    place.remount();
    for instance in ["overlay", "full"] {
        for disk in ["disk", "disk.local"] {
            assert_clean_ext4(&place.disk(instance, disk));
            for number in 0..files {
                assert_holds(&place.disk(instance, disk), &format!("file-{number}"), MIB);
            }
        }
    }
    assert_same(&place.base_image(), &place.source_image());
}

#[test]
fn guests_notice_nothing_when_the_daemon_is_killed_and_upgraded_under_them() {
    let (place, files) = (Place::new(), 14);
    place.create("overlay", &["--flavor", "ext4"]);
    place.create("full", &["--flavor", "ext4", "--no-cow"]);
    let guests = start_writers(&place, files, ["verify"; 2]);
    replace_under(&guests, &place, files, |_| {});
    assert_nothing_noticed(&place, guests, files);
}

/// The same, and libvirt's other changes of disks, while the kernel serves by itself all but the root disk of the first guest.
#[test]
fn guests_notice_nothing_of_all_that_while_the_kernel_serves_their_disks() {
    let (place, files) = (Place::with_options("passthrough=auto"), 8);
    place.create("full", &["--flavor", "ext4", "--no-cow"]);
    for instance in ["overlay", "hot"] {
        // A local disk over nothing is a plain file; one that a flavor has formatted is an overlay of that.
        place.create(instance, &["--local-size", "1G"]);
        tool("mkfs.ext4", &["-q", "-F", path(&place.disk(instance, "disk.local"))]);
    }
    let more = "wait=vdd,disks,use=vdc,use=vdd,write=gamma:4,leave=vdc,leave=vdd,gone=vdd,verify";
    let guests = start_writers(&place, files, [more, "verify"]);
    let overlay = &guests[0].1;
    replace_under(&guests, &place, files, |round| {
        // The next death, or upgrade, finds a disk that QEMU has opened anew, to read only.
        if round == 1 {
            commit_snapshot(overlay, "vdb");
        }
        // The next process opens at once what was open for writing.
        place.wait_until("the kernel serves them", || {
            place.served_by_kernel() == ["full/disk", "full/disk.local", "overlay/disk.local"]
        });
        if round == 0 {
            take_snapshot(&place, overlay, "vdb");
        }
    });
    resize(overlay, "vdb", "1536M");
    hot_attach_and_detach(&place, overlay);
    assert_nothing_noticed(&place, guests, files);
    assert_holds(&place.disk("overlay", "disk.local"), "gamma", 4 * MIB);
    for disk in ["disk", "disk.local"] {
        assert_clean_ext4(&place.disk("hot", disk));
        assert_holds(&place.disk("hot", disk), "gamma", 4 * MIB);
    }
}

/// Has a running guest write to a file of QEMU's over one of its disks from now on.
fn take_snapshot(place: &Place, guest: &Guest<'_>, disk: &str) {
    let over = format!("{disk},snapshot=external,file={}", path(&place.beside("snapshot.qcow2")));
    let output = virsh(&[
        "snapshot-create-as",
        &guest.domain,
        "--no-metadata",
        "--disk-only",
        "--diskspec",
        "vda,snapshot=no",
        "--diskspec",
        &over,
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Takes what it has written there to the disk, to which it writes again.
fn commit_snapshot(guest: &Guest<'_>, disk: &str) {
    let output = virsh(&["blockcommit", &guest.domain, disk, "--active", "--wait", "--pivot"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The host's filesystem fills up under a guest: QEMU stops it, others go on, and once there is room it goes on, too.
#[test]
fn a_guest_on_a_full_host_waits_and_goes_on_when_there_is_room_again() {
    let place = Place::on_small_host(60 * MIB, |place| {
        place.create("writer", &["--flavor", "ext4"]);
        for (instance, mib) in [("other", 1), ("large", 192)] {
            place.create(instance, &["--local-size", "256M"]);
            let disk = open(&place.disk(instance, "disk.local"));
            disk.write_all_at(&content(instance, mib * MIB), 0).unwrap();
            disk.sync_all().unwrap();
        }
    });
    // 128 MiB on both disks, twice of what is left.
    let guest = place.start("writer", "write=alpha:4,fill=64,write=beta:4,verify");
    guest.wait_until_paused();

    let other = open(&place.disk("other", "disk.local"));
    other.write_all_at(&[2; 65536], 0).unwrap();
    other.sync_all().unwrap();
    let refused = other.write_all_at(&[3; 65536 * 64], 64 * MIB).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(28), "{refused}");
    let mut seen = [0; 65536];
    other.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen.iter().all(|byte| *byte == 2));
    drop(other);
    let said = place.cowdisk(&["df"]);
    assert!(said.contains("nearly full"), "{said}");

    place.cowdisk(&["instance", "remove", &place.name("large")]);
    guest.resume();
    let console = guest.wait_until_off();
    assert_eq!(console.matches("cowdisk-guest: verified").count(), 2, "{console}");
    place.remount();
    for disk in ["disk", "disk.local"] {
        let file = place.disk("writer", disk);
        assert_clean_ext4(&file);
        for (name, mib) in [("alpha", 4), ("big", 64), ("beta", 4)] {
            assert_holds(&file, name, mib * MIB);
        }
    }
    assert_same(&place.base_image(), &place.source_image());
}

fn open(disk: &Path) -> File {
    File::options().read(true).write(true).open(disk).unwrap()
}

fn chown(file: &Path, (user, group, mode): (u32, u32, u32)) {
    std::os::unix::fs::chown(file, Some(user), Some(group)).unwrap();
    std::fs::set_permissions(file, Permissions::from_mode(mode)).unwrap();
}
