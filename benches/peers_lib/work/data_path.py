"""What a guest's requests cost: `hot` in memory, `disk` past the host's caches, `commit` with a sync after each."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from .. import fio
from ..bench import QSD, Bench
from ..fio import Load
from ..host import evict
from ..peers import Disk, Peer
from ..peers.plain import Plain
from ..requests import fill, punch
from ..results import AtLeast, Row, Sample, Target

MIB = 1 << 20


@dataclass(frozen=True)
class Work:
    """A row: what is done to a disk in which state.

    `new`: a disk for each measurement of its own, never written. `base`, `half` and `full`: nothing, every other block
    or everything overwritten before; one disk for all measurements.
    """

    title: str
    state: str
    load: Load
    targets: tuple[Target, ...] = ()
    quick: bool = True


def random_work(rw: str, state: str, depth: int, jobs: int = 1, *targets: Target, quick: bool = True) -> Work:
    what = {"randread": "read", "randwrite": "write"}[rw]
    shown = f"QD{depth}" if jobs == 1 else f"{jobs} × QD{depth}"
    load = Load(rw, depth=depth, jobs=jobs, once=state == "new")
    return Work(f"4 KiB random {what}, {state}, {shown}", state, load, targets, quick)


def sequential_work(rw: str, state: str, *targets: Target, quick: bool = True) -> Work:
    load = Load(rw, block=MIB, depth=4)
    return Work(f"1 MiB sequential {rw}, {state}, QD4", state, load, targets, quick)


def buffered_work(rw: str, state: str, block: int = 4096, jobs: int = 1) -> Work:
    size = "4 KiB" if block == 4096 else "1 MiB"
    load = Load(rw, block=block, jobs=jobs, direct=False, once=state == "new")
    clients = "" if jobs == 1 else f", {jobs} jobs"
    return Work(f"{size} {rw}, {state}, buffered{clients}", state, load, quick=False)


HOT = (
    random_work("randread", "base", 1, 1, AtLeast(2, QSD)),
    random_work("randread", "base", 32, 1, AtLeast(3, QSD), AtLeast(0.5, ("plain",))),
    random_work("randread", "base", 1, 4, quick=False),
    random_work("randread", "base", 32, 4, quick=False),
    random_work("randread", "half", 32, quick=False),
    random_work("randread", "full", 1, quick=False),
    random_work("randread", "full", 32, quick=False),
    random_work("randwrite", "full", 1, quick=False),
    random_work("randwrite", "full", 32),
    random_work("randwrite", "full", 1, 4, quick=False),
    random_work("randwrite", "full", 32, 4, quick=False),
    random_work("randwrite", "new", 1, quick=False),
    random_work("randwrite", "new", 32),
    sequential_work("read", "base", quick=False),
    sequential_work("read", "half", quick=False),
    sequential_work("read", "full", quick=False),
    sequential_work("write", "full", quick=False),
    sequential_work("write", "new", quick=False),
    buffered_work("randread", "base"),
    buffered_work("randread", "base", jobs=4),
    buffered_work("randwrite", "full"),
    buffered_work("read", "base", MIB),
    buffered_work("write", "full", MIB),
)

DISK = (
    random_work("randread", "base", 1, quick=False),
    random_work("randread", "base", 32),
    random_work("randread", "half", 32, quick=False),
    random_work("randread", "full", 32),
    random_work("randread", "full", 32, 4, quick=False),
    random_work("randwrite", "full", 1, quick=False),
    random_work("randwrite", "full", 32, 1, AtLeast(0.95, ("plain",))),
    random_work("randwrite", "full", 32, 4, quick=False),
    random_work("randwrite", "new", 32, 1, AtLeast(0.6, ("plain",))),
    sequential_work("read", "base", AtLeast(0.95, ("plain",))),
    sequential_work("read", "full", AtLeast(0.95, ("plain",)), quick=False),
    sequential_work("write", "full", AtLeast(0.95, ("plain",))),
    sequential_work("write", "new", quick=False),
    buffered_work("randread", "base"),
    buffered_work("randwrite", "full"),
    buffered_work("read", "base", MIB),
    buffered_work("write", "new", MIB),
)

COMMIT = (
    Work("4 KiB write + fdatasync, full", "full", Load("randwrite", sync_each=True), (AtLeast(0.9, ("plain",)),)),
    Work(
        "4 KiB write + fdatasync, new",
        "new",
        Load("randwrite", sync_each=True, once=True),
        (AtLeast(0.75, ("plain",)),),
    ),
)


class Shelf:
    """Disks in a state, each made when it is first asked for and kept for all rows of a group."""

    def __init__(self, bench: Bench, stack: ExitStack):
        self.bench, self.stack = bench, stack
        self.kept: dict[tuple[str, str], Disk] = {}

    @contextmanager
    def lent(self, peer: Peer, state: str) -> Iterator[Disk]:
        if state == "new":
            with peer.disk() as disk:
                yield disk
            return
        if isinstance(peer, Plain) and state == "base":
            yield Disk(peer.place.base, (peer.place.base,))
            return
        state = state if peer.layered else "full"
        if (peer.name, state) not in self.kept:
            disk = self.stack.enter_context(peer.disk())
            self.prepare(disk, state)
            self.kept[peer.name, state] = disk
        yield self.kept[peer.name, state]

    def prepare(self, disk: Disk, state: str) -> None:
        size, seed = self.bench.disk_bytes, self.bench.seed + 1
        if state == "half":
            fio.write_every_other_block(disk.path, size, seed)
        elif state == "full":
            fill(disk.path, size, seed)


def measure(bench: Bench, group: str, works: tuple[Work, ...], *, hot: bool) -> None:
    works = tuple(work for work in works if (work.quick or not bench.quick) and bench.wants(group, work=work.title))
    folder = bench.memory_folder if hot else bench.disk_folder
    with ExitStack() as stack:
        place = stack.enter_context(bench.place(folder, bench.disk_bytes))
        peers = bench.peers(group, place, stack, reflinks=not hot)
        shelf = Shelf(bench, stack)
        for work in works:

            def once(peer: Peer, turn: int, work: Work = work) -> Sample:
                with shelf.lent(peer, work.state) as disk:
                    if not hot:
                        evict(disk.files)
                    seed = bench.seed + turn
                    return fio.measure(disk.path, place.size, work.load, bench.seconds, seed, disk.pids)

            bench.row(Row(group, work.title, "/s", baseline="plain", targets=work.targets), peers, once)


def measure_discard(bench: Bench) -> None:
    """Discards of blocks that are the disk's own."""
    end = 64 * MIB
    with ExitStack() as stack:
        place = stack.enter_context(bench.place(bench.disk_folder, bench.disk_bytes))
        peers = bench.peers("discard", place, stack, reflinks=True)
        for title, length in (("4 KiB", 4096), ("1 MiB", MIB)):

            def once(peer: Peer, turn: int, length: int = length) -> Sample:
                with peer.disk() as disk:
                    fill(disk.path, end, bench.seed)
                    rate = punch(disk.path, end, length=length, seconds=bench.seconds, seed=bench.seed + turn)
                    return Sample(rate)

            bench.row(Row("discard", f"{title} at random, own blocks", "/s", baseline="plain"), peers, once)


GROUPS = (
    ("hot", "requests with base and data in tmpfs", lambda bench: measure(bench, "hot", HOT, hot=True)),
    ("disk", "requests past the host's caches", lambda bench: measure(bench, "disk", DISK, hot=False)),
    (
        "commit",
        "a sync after each write, which nbdkit's filter does not pass on",
        lambda bench: measure(bench, "commit", COMMIT, hot=False),
    ),
    ("discard", "holes punched", measure_discard),
)
