"""Load by fio: what a guest's disk controller does to a file."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .host import cpu_seconds, run
from .results import Sample


@dataclass(frozen=True)
class Load:
    """A pattern of requests. `rw` is fio's word for it; `block` in bytes; `jobs` clients of `depth` requests each."""

    rw: str
    block: int = 4096
    depth: int = 1
    jobs: int = 1
    direct: bool = True
    sync_each: bool = False
    """fdatasync after each write."""
    once: bool = False
    """No block twice, and no end before all have had their turn but the time."""

    @property
    def writes(self) -> bool:
        return "write" in self.rw


def measure(path: Path, size: int, load: Load, seconds: float, seed: int, pids: Iterable[int]) -> Sample:
    """Requests per second. Writes count from the first until all of them are durable."""
    pids = tuple(pids)
    engine = "io_uring" if load.depth > 1 else "psync"
    words = [
        "--name=load", f"--filename={path}", f"--size={size}", f"--rw={load.rw}", f"--bs={load.block}",
        f"--iodepth={load.depth}", f"--numjobs={load.jobs}", f"--direct={int(load.direct)}", f"--ioengine={engine}",
        f"--runtime={int(seconds * 1000)}ms", f"--randseed={seed}", "--invalidate=0", "--group_reporting",
        "--fallocate=none", "--thread", "--output-format=json",
    ]  # fmt: skip
    if load.writes:
        # Bounded, so that what a peer has buffered meanwhile can be made durable in a time like the others'.
        words += ["--end_fsync=1", f"--io_size={size // load.jobs}"]
    else:
        words.append("--time_based")
    if load.rw.startswith("rand") and not load.once:
        words.append("--norandommap")
    if load.sync_each:
        words.append("--fdatasync=1")
    before = cpu_seconds(pids)
    said = run("fio", *words)
    daemon = cpu_seconds(pids) - before
    job = json.loads(said[said.index("{") :])["jobs"][0]
    side = job["write" if load.writes else "read"]
    count = max(1, side["total_ios"])
    client = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] * 1000
    return Sample(side["iops"], client / count, daemon * 1e6 / count if pids else None)


def write_every_other_block(path: Path, size: int, seed: int) -> None:
    """Writes blocks 0, 2, 4, … of 4 KiB each, many at once: one at a time takes some peers minutes."""
    run(
        "fio", "--name=half", f"--filename={path}", f"--size={size}", "--rw=write:4k", "--bs=4k", "--iodepth=32",
        "--direct=1", "--ioengine=io_uring", f"--randseed={seed}", "--invalidate=0", "--fallocate=none", "--thread",
        "--end_fsync=1",
    )  # fmt: skip
