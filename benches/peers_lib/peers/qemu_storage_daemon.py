"""qemu-storage-daemon: a qcow2 overlay as a raw file by FUSE, one process per disk, past the host's page cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ..host import exported, program, run
from . import Disk, Peer, Place


def make_qcow2(path: Path, base: Path, options: str = "") -> None:
    """An empty qcow2 overlay over a raw base."""
    words = ["-o", options] if options else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, "-b", base, "-F", "raw", path)


class QemuStorageDaemon(Peer):
    """`aio`: how it reaches the host's files, io_uring or native."""

    def __init__(self, place: Place, aio: str):
        self.name, self.place, self.aio, self.numbers = f"qsd {aio}", place, aio, count()

    @contextmanager
    def disk(self) -> Iterator[Disk]:
        overlay = self.place.folder / f"qsd-{self.aio}-{next(self.numbers)}.qcow2"
        make_qcow2(overlay, self.place.base)
        try:
            with self.served(overlay) as disk:
                yield disk
        finally:
            overlay.unlink()

    @contextmanager
    def served(self, overlay: Path) -> Iterator[Disk]:
        """An overlay that is there already."""
        with (
            exported(overlay.with_suffix(".export")) as export,
            program(
                "qemu-storage-daemon",
                "--blockdev", self.blockdev(overlay),
                "--export", f"type=fuse,id=export,node-name=disk,mountpoint={export},writable=on",
                ready=lambda: export.stat().st_size > 0,
                log=overlay.with_suffix(".log"),
            ) as pid,
        ):  # fmt: skip
            yield Disk(export, (overlay, self.place.base), (pid,))

    def blockdev(self, overlay: Path) -> str:
        below = f"driver=file,cache.direct=on,aio={self.aio}"
        file = ",".join(f"file.{word}" for word in f"{below},filename={overlay}".split(","))
        backing = ",".join(f"backing.file.{word}" for word in f"{below},filename={self.place.base}".split(","))
        common = "driver=qcow2,node-name=disk,discard=unmap,cache.direct=on"
        return f"{common},{file},backing.driver=raw,backing.read-only=on,{backing}"
