"""A sparse file of the host, on its disk or in tmpfs: no layer at all, so what all others are compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from . import Disk, Peer, Place


class Plain(Peer):
    """Where others are read over their base, that is the base itself."""

    layered = False

    def __init__(self, name: str, place: Place):
        self.name, self.place, self.numbers = name, place, count()

    @contextmanager
    def disk(self) -> Iterator[Disk]:
        path = self.place.folder / f"plain-{next(self.numbers)}.raw"
        with open(path, "wb") as file:
            file.truncate(self.place.size)
        try:
            yield Disk(path, (path,))
        finally:
            path.unlink()
