"""A disk of 16 TiB whose own blocks lie scattered: time to open it, and the memory that it takes."""

import os
import random
import time
from contextlib import ExitStack
from pathlib import Path

from ..bench import Bench
from ..host import pss_bytes
from ..peers.cowdisk import StoreMaker
from ..results import Row, Sample

GROUP = "huge"
MIB = 1 << 20
# What ext4 can hold in one file.
DISK_BYTES = (16 << 40) - 4096


class Huge:
    """One cowdisk's disk, its blocks written before the first row."""

    def __init__(self, name: str, maker: StoreMaker, folder: Path, base: Path, places: list[int]):
        self.name, self.places = name, places
        self.store = maker.make(folder / f"{name}-store")
        self.store.do("image", "import", "base", base, "--format", "raw")
        self.store.do("instance", "create", "huge", "--image", "base", "--root-size", DISK_BYTES)
        self.path = self.store.disk_path("huge")

    def write(self) -> float:
        """First writes per second, one at a time, until they are durable."""
        with self.store.mounted():
            fd = os.open(self.path, os.O_WRONLY)
            try:
                before = time.perf_counter()
                for at in self.places:
                    os.pwrite(fd, b"\x5a" * 4096, at)
                os.fsync(fd)
                return len(self.places) / (time.perf_counter() - before)
            finally:
                os.close(fd)

    def open(self) -> tuple[float, float, float, float]:
        """Milliseconds to open and to read a block; MiB of the daemon before and after; milliseconds of a flush."""
        with self.store.mounted():
            pids = self.store.pids()
            unopened = pss_bytes(pids) / MIB
            before = time.perf_counter()
            fd = os.open(self.path, os.O_RDWR)
            try:
                os.pread(fd, 4096, self.places[0])
                milliseconds = (time.perf_counter() - before) * 1000
                opened = pss_bytes(pids) / MIB
                os.pwrite(fd, b"\x5b" * 4096, self.places[1])
                before = time.perf_counter()
                os.fsync(fd)
                return milliseconds, unopened, opened, (time.perf_counter() - before) * 1000
            finally:
                os.close(fd)


def measure(bench: Bench) -> None:
    blocks = 2_000 if bench.quick else 20_000
    step = DISK_BYTES // blocks // 4096 * 4096
    places = [n * step for n in range(blocks)]
    random.Random(bench.seed).shuffle(places)
    with ExitStack() as stack:
        place = stack.enter_context(bench.place(bench.disk_folder, MIB))
        disks = [
            Huge(name, maker, place.folder, place.base, places)
            for name, maker in bench.makers.items()
            if bench.wants(GROUP, name)
        ]
        row = Row(GROUP, f"first write to each of {blocks:,} scattered blocks", "/s")
        bench.row(row, disks, lambda disk, _: Sample(disk.write()), rounds=1)
        found = {disk.name: [disk.open() for _ in range(bench.rounds)] for disk in disks}

        def column(title: str, unit: str, number: int) -> None:
            row = Row(GROUP, title, unit, higher_is_better=False)
            bench.row(row, disks, lambda disk, turn: Sample(found[disk.name][turn][number]))

        column("open it and read a block", "ms", 0)
        column("memory before", "MiB", 1)
        column("memory with it open", "MiB", 2)
        column("overwrite a block and flush", "ms", 3)


GROUPS = ((GROUP, "a disk of 16 TiB less 4 KiB", measure),)
