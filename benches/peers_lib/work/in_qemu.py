"""qcow2 inside QEMU, without FUSE, beside QEMU's raw driver on cowdisk's file."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count, product

from .. import qemu_img
from ..bench import Bench
from ..host import evict, warm
from ..peers import Disk, Peer, Place
from ..peers.cowdisk import Cowdisk
from ..peers.plain import Plain
from ..peers.qemu_storage_daemon import make_qcow2
from ..requests import fill
from ..results import AtLeast, Row, Sample, Target

GROUP = "qemu"
CACHES = (("none", "native"), ("none", "io_uring"), ("writeback", "io_uring"))
"""Cache modes and ways to reach a file; QEMU refuses native with a writeback cache."""
FIRST_WRITE = (AtLeast(0.6, ("plain",)), AtLeast(6, ("qcow2",)), AtLeast(2.5, ("qcow2 extended_l2",)))


class Qcow2(Peer):
    """An overlay that QEMU itself opens."""

    def __init__(self, name: str, place: Place, options: str = ""):
        self.name, self.place, self.options, self.numbers = name, place, options, count()

    @contextmanager
    def disk(self) -> Iterator[Disk]:
        path = self.place.folder / f"{self.name.replace(' ', '-')}-{next(self.numbers)}.qcow2"
        make_qcow2(path, self.place.base, self.options)
        try:
            yield Disk(path, (path, self.place.base))
        finally:
            path.unlink()


class InQemu:
    """The peers of the group, and what `qemu-img bench` is told to do to each."""

    def __init__(self, bench: Bench, place: Place, stack: ExitStack):
        self.bench, self.place = bench, place
        self.peers: list[Peer] = [Plain("plain", place)]
        for name, maker in bench.makers.items():
            if bench.wants(GROUP, name):
                self.peers.append(Cowdisk(name, place, maker, stack))
        self.peers.append(Qcow2("qcow2", place))
        self.peers.append(Qcow2("qcow2 extended_l2", place, "cluster_size=128k,extended_l2=on"))
        self.full = {}
        for peer in self.peers:
            if bench.wants(GROUP, peer.name) or peer.name == "plain":
                disk = stack.enter_context(peer.disk())
                self.overwrite(peer, disk)
                self.full[peer.name] = disk

    def overwrite(self, peer: Peer, disk: Disk) -> None:
        size, seed = self.place.size, self.bench.seed + 1
        if isinstance(peer, Qcow2):
            qemu_img.fill(disk.path, size)
        else:
            fill(disk.path, size, seed)

    def row(self, title: str, targets: tuple[Target, ...], measure: Callable[[Peer], Sample]) -> None:
        row = Row(GROUP, title, "/s", baseline="plain", targets=targets)
        self.bench.row(row, self.peers, lambda peer, _: measure(peer))

    def read(self, cache: str, aio: str, hot: bool, peer: Peer) -> Sample:
        if isinstance(peer, Plain):
            base = Disk(self.place.base, (self.place.base,))
            return self.load(peer, base, cache, aio, write=False, hot=hot)
        with peer.disk() as disk:
            return self.load(peer, disk, cache, aio, write=False, hot=hot)

    def write(self, cache: str, aio: str, new: bool, peer: Peer) -> Sample:
        if not new:
            return self.load(peer, self.full[peer.name], cache, aio, write=True, hot=False)
        with peer.disk() as disk:
            return self.load(peer, disk, cache, aio, write=True, hot=False)

    def load(self, peer: Peer, disk: Disk, cache: str, aio: str, *, write: bool, hot: bool) -> Sample:
        evict(disk.files)
        if hot:
            warm(disk.files)
        driver = "qcow2" if isinstance(peer, Qcow2) else "raw"
        requests = self.place.size // qemu_img.STRIDE
        # Once over the disk, so that no block and no cluster has its turn twice; more of those that move nothing.
        times = 4 if hot and not write else 1
        return qemu_img.measure(disk.path, driver, cache=cache, aio=aio, write=write, count=requests * times)


def measure(bench: Bench) -> None:
    with ExitStack() as stack:
        place = stack.enter_context(bench.place(bench.disk_folder, bench.disk_bytes))
        group = InQemu(bench, place, stack)
        for (cache, aio), hot in product(CACHES, (True, False)):
            targets = (AtLeast(2 if hot else 0.9, ("qcow2",)),) if cache == "none" else ()
            title = f"4 KiB read, base {'hot' if hot else 'cold'}, {cache}, {aio}"
            group.row(title, targets, partial(group.read, cache, aio, hot))
        for (cache, aio), new in product(CACHES, (True, False)):
            title = f"4 KiB {'first write' if new else 'overwrite'}, {cache}, {aio}"
            group.row(title, FIRST_WRITE if cache == "none" and new else (), partial(group.write, cache, aio, new))


GROUPS = ((GROUP, "qemu-img bench: qcow2 in QEMU beside raw on the files, 32 at once, stride 100 KiB", measure),)
