"""Taking turns: every round of a row lets each peer do the work once, so that a busy machine hurts all alike."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Protocol, TypeVar

from .host import BenchError, make_image
from .peers import Peer, Place
from .peers.cowdisk import Cowdisk, CowdiskLocal, CowdiskPassed, StoreMaker
from .peers.nbdkit import Nbdkit
from .peers.plain import Plain
from .peers.qemu_storage_daemon import QemuStorageDaemon
from .peers.reflink import Reflink
from .results import Row, Sample


class Named(Protocol):
    """A peer, or one way of it to do something."""

    @property
    def name(self) -> str: ...


Doer = TypeVar("Doer", bound=Named)

QSD = ("qsd io_uring", "qsd native")
LEFT_OUT_WHEN_QUICK = ("nbdkit cow", "btrfs reflink")
"""Unless they are asked for."""


@dataclass(frozen=True)
class Choice:
    """What `--only GROUP/PEER/WORK` lets through: a group, what a peer begins with, what a row contains; or nothing."""

    group: str = ""
    peer: str = ""
    work: str = ""

    @classmethod
    def parse(cls, text: str) -> Choice:
        parts = text.split("/")
        if len(parts) > 3:
            raise BenchError(f"--only {text}: more than GROUP/PEER/WORK")
        return cls(*parts)

    def takes(self, group: str, peer: str, work: str) -> bool:
        return self.group in ("", group) and peer.startswith(self.peer) and self.work in work


@dataclass
class Bench:
    """One run: its settings, and the rows so far."""

    disk_folder: Path
    memory_folder: Path
    makers: dict[str, StoreMaker]
    """By the name of the peer: one per transport."""
    quick: bool
    rounds: int
    seconds: float
    seed: int
    choices: tuple[Choice, ...]
    rows: list[Row] = field(default_factory=list)
    folders: Iterator[int] = field(default_factory=count)

    @property
    def disk_bytes(self) -> int:
        return (128 if self.quick else 256) << 20

    def wants(self, group: str, peer: str = "", work: str = "") -> bool:
        """Whether this is part of the run. Empty: whether any peer, any work of it may be."""
        choices = self.choices or (Choice(),)
        return any(choice.takes(group, peer or choice.peer, work or choice.work) for choice in choices)

    @contextmanager
    def place(self, folder: Path, size: int, data_bytes: int | None = None) -> Iterator[Place]:
        """A new folder below `folder` with a base of `size` bytes: all of them data, or `data_bytes`."""
        own = folder / f"place-{next(self.folders)}"
        own.mkdir()
        base = own / "base.raw"
        try:
            make_image(base, size, size if data_bytes is None else data_bytes, self.seed)
            yield Place(own, base, size, self.seed)
        finally:
            shutil.rmtree(own)

    def peers(self, group: str, place: Place, stack: ExitStack, *, reflinks: bool) -> list[Peer]:
        """Those that this run wants of a group, the plain file first; all are gone when `stack` is closed."""
        known: dict[str, Callable[[], Peer]] = {}
        for name, maker in self.makers.items():
            local = f"{name} local"
            known[name] = partial(Cowdisk, name, place, maker, stack)
            known[local] = partial(CowdiskLocal, local, place, maker, stack)
            if maker.can_pass:
                passed = f"{name} passed local"
                known[passed] = partial(CowdiskPassed, passed, place, maker, stack)
        known["qsd io_uring"] = lambda: QemuStorageDaemon(place, "io_uring")
        known["qsd native"] = lambda: QemuStorageDaemon(place, "native")
        known["nbdkit cow"] = lambda: Nbdkit(place)
        if reflinks:
            known["xfs reflink"] = lambda: Reflink(place, "xfs", stack)
            known["btrfs reflink"] = lambda: Reflink(place, "btrfs", stack)
        passed = tuple(f"{name} passed local" for name in self.makers)
        all_peers = not self.quick or any(choice.peer for choice in self.choices)
        left_out = () if all_peers else (*LEFT_OUT_WHEN_QUICK, *passed)
        peers: list[Peer] = [Plain("plain", place)]
        for name, make in known.items():
            if self.wants(group, name) and name not in left_out:
                try:
                    peers.append(make())
                except BenchError as error:
                    if name.startswith("cowdisk"):
                        raise
                    say(f"{group}: without {name}: {error}")
        return peers

    def row(
        self, row: Row, peers: Iterable[Doer], measure: Callable[[Doer, int], Sample], rounds: int | None = None
    ) -> None:
        """Measures one row, round by round; a peer that fails is left out of the rest of it.

        Each round begins with another peer: who reads first may find the host's disk colder than those who follow.
        """
        started = time.monotonic()
        peers = [peer for peer in peers if peer.name == row.baseline or self.wants(row.group, peer.name, row.work)]
        if not peers or (peers[0].name == "plain" and len(peers) == 1):
            return
        for turn in range(rounds or self.rounds):
            first = turn % len(peers)
            for peer in peers[first:] + peers[:first]:
                if peer.name in row.failures:
                    continue
                try:
                    row.add(peer.name, turn, measure(peer, turn))
                except (BenchError, OSError, subprocess.SubprocessError) as failure:
                    row.failures[peer.name] = str(failure)
                    say(f"{row.group}: {row.work}: {peer.name}: {failure}")
        self.finish(row, started)

    def finish(self, row: Row, started: float) -> None:
        """Keeps a row, and says what came out."""
        if not row.samples:
            return
        self.rows.append(row)
        figures = []
        for peer in row.samples:
            ratio = row.ratio(peer, (row.baseline,)) if row.baseline else None
            figures.append(f"{peer} {ratio[0]:.2f}" if ratio else f"{peer} {row.figure(peer)[0]:,.1f} {row.unit}")
        say(f"{row.group}: {row.work}: {', '.join(figures)} [{time.monotonic() - started:.1f} s]")


def say(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)
