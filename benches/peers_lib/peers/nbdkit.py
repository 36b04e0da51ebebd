"""nbdkit's filter cow over the base, behind nbdfuse: two processes per disk; writes go to a temporary file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from ..host import exported, program
from . import Disk, Peer, Place


class Nbdkit(Peer):
    name = "nbdkit cow"

    def __init__(self, place: Place):
        self.place, self.numbers = place, count()

    @contextmanager
    def disk(self) -> Iterator[Disk]:
        stem = self.place.folder / f"nbdkit-{next(self.numbers)}"
        socket = stem.with_suffix(".sock")
        with (
            exported(stem.with_suffix(".raw")) as export,
            program(
                "nbdkit", "--foreground", "--unix", socket, "--filter=cow", "file", self.place.base,
                ready=socket.exists,
                env={**os.environ, "TMPDIR": str(self.place.folder)},
                log=stem.with_suffix(".server.log"),
            ) as server,
            program(
                "nbdfuse", export, "--unix", socket,
                ready=lambda: export.stat().st_size > 0,
                log=stem.with_suffix(".client.log"),
            ) as client,
        ):  # fmt: skip
            yield Disk(export, (self.place.base,), (server, client))
        socket.unlink(missing_ok=True)
