"""The boot storm: many readers of one base, each by a disk of its own; and what of it lies in the host's memory."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from ..bench import Bench
from ..host import cached_bytes, evict
from ..peers import Disk, Peer, Place
from ..requests import at_once, read_all
from ..results import AtMost, Row, Sample

GROUP = "storm"
READERS = (1, 8, 32)


def measure(bench: Bench) -> None:
    size = (16 if bench.quick else 64) << 20
    with ExitStack() as stack:
        place = stack.enter_context(bench.place(bench.disk_folder, size))
        peers = bench.peers(GROUP, place, stack, reflinks=True)
        peers = [peer for peer in peers if peer.layered or peer.name == "plain"]
        for readers in READERS:
            for direct in (True, False):
                measure_readers(bench, place, peers, readers, direct)


def measure_readers(bench: Bench, place: Place, peers: list[Peer], readers: int, direct: bool) -> None:
    """Two rows of the same runs: how fast all read, and how many copies of the base the page cache then holds.

    The plain file is one that all share.
    """
    copies: dict[tuple[str, int], float] = {}
    how = f"{readers} reader{'s' if readers > 1 else ''}, {'O_DIRECT' if direct else 'buffered'}"

    def storm(peer: Peer, turn: int) -> Sample:
        with ExitStack() as stack:
            if peer.layered:
                disks = [stack.enter_context(peer.disk()) for _ in range(readers)]
            else:
                disks = [Disk(place.base, (place.base,))] * readers
            files = {file for disk in disks for file in (*disk.files, disk.path)}
            evict(files)
            jobs: list[Callable[[], None]] = [partial(read_all, disk.path, direct) for disk in disks]
            seconds = at_once(jobs)
            copies[peer.name, turn] = cached_bytes(files) / place.size
            return Sample(readers * place.size / seconds / (1 << 20))

    bench.row(Row(GROUP, f"read all, {how}", "MiB/s", baseline="plain"), peers, storm)
    targets = (AtMost(1.1, "×"),) if direct else ()
    row = Row(GROUP, f"copies in the page cache, {how}", "×", higher_is_better=False, targets=targets)
    measured = [peer for peer in peers if any(name == peer.name for name, _ in copies)]
    bench.row(row, measured, lambda peer, turn: Sample(copies[peer.name, turn]))


GROUPS = ((GROUP, "many readers of one base, each by a disk of its own; nothing cached before", measure),)
