"""Load by `qemu-img bench`: QEMU's own block layer, with its drivers and caches, on a file."""

import os
import re
import time
from pathlib import Path

from .host import BenchError, run
from .results import Sample

STRIDE = 100 << 10


def measure(path: Path, driver: str, *, cache: str, aio: str, write: bool, count: int) -> Sample:
    """4 KiB requests per second at a stride of 100 KiB, 32 at once; writes count until they are durable."""
    words = ["-f", driver, "-t", cache, "-i", aio, "-c", count, "-d", 32, "-s", 4096, "-S", STRIDE]
    said = run("qemu-img", "bench", *words, *(["-w"] if write else []), path)
    found = re.search(r"completed in ([0-9.]+) seconds", said)
    if found is None:
        raise BenchError(f"qemu-img bench said nothing of its time: {said.strip()}")
    seconds = float(found.group(1))
    if write:
        before = time.perf_counter()
        fd = os.open(path, os.O_RDWR)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)
        seconds += time.perf_counter() - before
    return Sample(count / max(seconds, 0.001))


def fill(path: Path, size: int) -> None:
    """Writes all of a qcow2 disk."""
    commands = (f"write -q -P {1 + n % 255} {n << 24} {min(16 << 20, size - (n << 24))}" for n in range(-(-size >> 24)))
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "qcow2", "-t", "none", *words, path)
