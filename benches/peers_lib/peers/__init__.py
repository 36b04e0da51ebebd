"""The peers: each gives disks over one base, and takes them away."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where peers work: a folder of the host, and in it a base that all bytes of `size` are written of."""

    folder: Path
    base: Path
    size: int
    seed: int


@dataclass(frozen=True)
class Disk:
    """A disk of one peer, open for work. `files`: what it lies in on the host; `pids`: who serves it."""

    path: Path
    files: tuple[Path, ...]
    pids: tuple[int, ...] = ()


class Peer(ABC):
    """A way to have a disk over a shared base."""

    name: str
    layered = True
    """Whether blocks that were never written are the base's; where they are not, a disk is filled before it is read."""

    @abstractmethod
    def disk(self) -> AbstractContextManager[Disk]:
        """A new disk, never written; gone afterwards."""
