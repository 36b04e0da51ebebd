"""The lives of disks and of the daemon: made, opened, removed, listed; started and stopped with many of them."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..bench import Bench
from ..host import pss_bytes, timed
from ..peers import Place
from ..peers.cowdisk import Store, StoreMaker
from ..peers.qemu_storage_daemon import QemuStorageDaemon
from ..peers.reflink import Reflink
from ..results import AtMost, Row, Sample

MIB = 1 << 20
IMAGE_BYTES = 20 << 30


def open_and_read(path: Path) -> float:
    """Milliseconds to open a file and to read its first 4 KiB."""
    before = time.perf_counter()
    fd = os.open(path, os.O_RDWR)
    try:
        os.pread(fd, 4096, 0)
    finally:
        os.close(fd)
    return (time.perf_counter() - before) * 1000


@dataclass(frozen=True)
class Way:
    """How one peer makes, opens and removes the disk of a name, each as its users do; milliseconds."""

    name: str
    create: Callable[[str], float]
    open: Callable[[str], float]
    remove: Callable[[str], float]
    create_all: Callable[[list[str]], float]


def one_by_one(create: Callable[[str], float]) -> Callable[[list[str]], float]:
    return lambda disks: sum(create(disk) for disk in disks)


def cowdisk_way(name: str, store: Store) -> Way:
    return Way(
        name,
        create=lambda disk: store.timed("instance", "create", disk, "--image", "base"),
        open=lambda disk: open_and_read(store.disk_path(disk)),
        remove=lambda disk: store.timed("instance", "remove", disk),
        create_all=lambda disks: store.timed("instance", "create", *disks, "--image", "base"),
    )


def qcow2_way(place: Place) -> Way:
    def path(disk: str) -> Path:
        return place.folder / f"{disk}.qcow2"

    def serve(disk: str) -> float:
        before = time.perf_counter()
        with QemuStorageDaemon(place, "io_uring").served(path(disk)) as served:
            open_and_read(served.path)
            return (time.perf_counter() - before) * 1000

    def create(disk: str) -> float:
        return timed("qemu-img", "create", "-q", "-f", "qcow2", "-b", place.base, "-F", "raw", path(disk))

    return Way(
        "qcow2, by qsd",
        create=create,
        open=serve,
        remove=lambda disk: timed("rm", path(disk)),
        create_all=one_by_one(create),
    )


def reflink_way(reflink: Reflink) -> Way:
    def path(disk: str) -> Path:
        return reflink.folder / f"{disk}.raw"

    def create(disk: str) -> float:
        return timed("cp", "--reflink=always", reflink.base, path(disk))

    return Way(
        reflink.name,
        create=create,
        open=lambda disk: open_and_read(path(disk)),
        remove=lambda disk: timed("rm", path(disk)),
        create_all=one_by_one(create),
    )


def ways_of(bench: Bench, place: Place, stack: ExitStack) -> list[Way]:
    """Each way over the place's image; the stores are mounted."""
    ways = []
    for name, maker in bench.makers.items():
        if bench.wants("disks", name):
            store = maker.make(place.folder / f"{name}-store")
            store.do("image", "import", "base", place.base, "--format", "raw")
            stack.enter_context(store.mounted())
            ways.append(cowdisk_way(name, store))
    ways.append(qcow2_way(place))
    for kind in ("xfs", "btrfs"):
        if bench.wants("disks", f"{kind} reflink"):
            ways.append(reflink_way(Reflink(place, kind, stack)))
    return ways


def measure_disks(bench: Bench) -> None:
    """One disk after the other, then very many, over an image of 20 GiB."""
    data_bytes = (128 if bench.quick else 1024) * MIB
    many = 100 if bench.quick else 1000
    with ExitStack() as stack:
        place = stack.enter_context(bench.place(bench.disk_folder, IMAGE_BYTES, data_bytes))
        ways = ways_of(bench, place, stack)
        base = next(iter(bench.makers))

        def row(title: str, step: Callable[[Way, str], float], *targets: AtMost) -> None:
            bench.row(
                Row("disks", title, "ms", higher_is_better=False, baseline=base, targets=targets),
                ways,
                lambda way, turn: Sample(step(way, f"disk-{turn}")),
                rounds=3 * bench.rounds,
            )

        row("create", lambda way, disk: way.create(disk), AtMost(5, "ms"))
        row("open, read 4 KiB", lambda way, disk: way.open(disk))
        row("remove", lambda way, disk: way.remove(disk))
        bench.row(
            Row("disks", f"create {many:,}", "s", False, base, (AtMost(5 * many / 1000, "s"),)),
            ways,
            lambda way, _: Sample(sum(way.create(f"many-{n}") for n in range(many)) / 1000),
            rounds=1,
        )
        bench.row(
            Row("disks", f"create {many:,}, by one command where there is one", "s", False, base),
            ways,
            lambda way, _: Sample(way.create_all([f"at-once-{n}" for n in range(many)]) / 1000),
            rounds=1,
        )


class Crowd:
    """A store with as many instances of a small image as were asked for so far."""

    def __init__(self, place: Place, maker: StoreMaker, name: str):
        self.name, self.instances = name, 0
        self.store = maker.make(place.folder / f"{name}-store")
        self.store.do("image", "import", "base", place.base, "--format", "raw")

    def grow(self, instances: int) -> None:
        names = [f"guest-{n}" for n in range(self.instances, instances)]
        if names:
            self.store.do("instance", "create", *names, "--image", "base")
        self.instances = max(instances, self.instances)

    def paths(self, count: int) -> list[Path]:
        return [self.store.disk_path(f"guest-{n}") for n in range(count)]


def measure_daemon(bench: Bench) -> None:
    """Start, stop, listing and memory with more and more instances."""
    counts = (1, 100, 1000) if bench.quick else (1, 100, 1000, 10000)
    with ExitStack() as stack:
        place = stack.enter_context(bench.place(bench.disk_folder, 16 * MIB))
        crowds = [Crowd(place, maker, name) for name, maker in bench.makers.items() if bench.wants("daemon", name)]
        for count in counts:
            for crowd in crowds:
                crowd.grow(count)
            measure_crowds(bench, crowds, count)


def measure_crowds(bench: Bench, crowds: list[Crowd], count: int) -> None:
    opened = min(count, 1000)

    def row(title: str, unit: str, measure: Callable[[Crowd], float], *targets: AtMost) -> None:
        work = f"{title}, {count:,} instances"
        measured = Row("daemon", work, unit, higher_is_better=False, targets=targets)
        bench.row(measured, crowds, lambda crowd, _: Sample(measure(crowd)))

    def stop(crowd: Crowd) -> float:
        crowd.store.mount()
        return crowd.store.umount()

    def start(crowd: Crowd) -> float:
        try:
            return crowd.store.mount()
        finally:
            crowd.store.umount()

    def idle_memory(crowd: Crowd) -> float:
        with crowd.store.mounted():
            for path in crowd.paths(count):
                path.stat()
            return pss_bytes(crowd.store.pids()) / MIB

    def open_some(crowd: Crowd) -> tuple[float, float]:
        """Milliseconds to open the disks and to read from each, and MiB of the daemon with all of them open."""
        with crowd.store.mounted(), ExitStack() as files:
            before = time.perf_counter()
            for path in crowd.paths(opened):
                file = files.enter_context(open(path, "r+b", buffering=0))
                file.read(4096)
            milliseconds = (time.perf_counter() - before) * 1000
            return milliseconds, pss_bytes(crowd.store.pids()) / MIB

    def stat_all(crowd: Crowd) -> float:
        with crowd.store.mounted():
            before = time.perf_counter()
            for path in crowd.paths(count):
                path.stat()
            return (time.perf_counter() - before) * 1000

    def list_mount(crowd: Crowd) -> float:
        with crowd.store.mounted():
            before = time.perf_counter()
            os.listdir(crowd.store.mountpoint / "instances")
            return (time.perf_counter() - before) * 1000

    row("start", "ms", start)
    row("stop", "ms", stop)
    listed = [AtMost(200, "ms")] if count == 10000 else []
    row("cowdisk instance list", "ms", lambda crowd: crowd.store.timed("instance", "list"), *listed)
    row("readdir of the mount", "ms", list_mount, *listed)
    row("stat of every disk", "ms", stat_all)
    row("memory, none open", "MiB", idle_memory)
    row(f"open {opened:,} and read 4 KiB of each", "ms", lambda crowd: open_some(crowd)[0])
    at_most = [AtMost(64, "MiB")] if opened == 1000 else []
    row(f"memory, {opened:,} open", "MiB", lambda crowd: open_some(crowd)[1], *at_most)


GROUPS = (
    ("disks", "disks over an image of 20 GiB; × cowdisk's time", measure_disks),
    ("daemon", "a mount with many instances", measure_daemon),
)
