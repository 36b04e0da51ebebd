"""Reflink copies on XFS and on btrfs, in a loop device over a file of the same host file system."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from ..host import loop_mount, run
from . import Disk, Peer, Place


class Reflink(Peer):
    """`base`: what is copied onto the new file system once, and from there shared; the place's own unless given."""

    def __init__(self, place: Place, kind: str, stack: ExitStack, base: Path | None = None):
        self.name, self.numbers = f"{kind} reflink", count()
        source = base or place.base
        data_bytes = source.stat().st_blocks * 512
        image, folder = place.folder / f"{kind}.img", place.folder / kind
        # The base, and as many disks in full as are there at once.
        self.folder = stack.enter_context(loop_mount(kind, image, folder, 6 * data_bytes + (2 << 30)))
        self.base = self.folder / "base.raw"
        run("cp", "--sparse=always", source, self.base)
        # The copies are to share what is on the disk, and what waits to be written is not.
        os.sync()

    @contextmanager
    def disk(self) -> Iterator[Disk]:
        path = self.folder / f"clone-{next(self.numbers)}.raw"
        run("cp", "--reflink=always", self.base, path)
        try:
            yield Disk(path, (path, self.base))
        finally:
            path.unlink()
