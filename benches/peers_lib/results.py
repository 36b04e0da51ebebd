"""What was measured: samples in rows, ratios within a round, and whether a row meets its target."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

Figure = tuple[float, float, float]
"""Median, lower and upper quartile."""


@dataclass(frozen=True)
class Sample:
    """One measurement, in the unit of its row."""

    value: float
    client_us: float | None = None
    """CPU per request of the client, in µs."""
    daemon_us: float | None = None
    """CPU per request of the processes that serve the disk, in µs."""


@dataclass(frozen=True)
class AtLeast:
    """cowdisk does at least `factor` times as well as the best of `peers` in the same round."""

    factor: float
    peers: tuple[str, ...]

    def __str__(self) -> str:
        return f"≥ {self.factor:g} × {' / '.join(self.peers)}"


@dataclass(frozen=True)
class AtMost:
    """cowdisk's figure is at most `limit`, in the unit of the row."""

    limit: float
    unit: str

    def __str__(self) -> str:
        return f"≤ {self.limit:g} {self.unit}"


Target = AtLeast | AtMost

LOCAL = AtLeast(0.95, ("plain",))
"""What a local disk, which lies in one file, has to reach of every row that has a plain file beside it."""


def figure(values: list[float]) -> Figure:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


@dataclass
class Row:
    """One piece of work, by every peer that did it. `baseline`: whom the others are compared with, if anyone."""

    group: str
    work: str
    unit: str
    higher_is_better: bool = True
    baseline: str | None = None
    targets: tuple[Target, ...] = ()
    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)
    """By peer and round."""
    failures: dict[str, str] = field(default_factory=dict)
    """By peer, in words."""

    def add(self, peer: str, turn: int, sample: Sample) -> None:
        self.samples.setdefault(peer, {})[turn] = sample

    def figure(self, peer: str) -> Figure:
        return figure([sample.value for sample in self.samples[peer].values()])

    def cpu(self, peer: str) -> tuple[float, float | None] | None:
        """Medians of the CPU per request in µs: the client's, the daemon's."""
        samples = self.samples[peer].values()
        client = [sample.client_us for sample in samples if sample.client_us is not None]
        daemon = [sample.daemon_us for sample in samples if sample.daemon_us is not None]
        if not client:
            return None
        return statistics.median(client), statistics.median(daemon) if daemon else None

    def ratio(self, peer: str, others: tuple[str, ...]) -> Figure | None:
        """`peer` × the best of `others`, round by round."""
        pick = max if self.higher_is_better else min
        ratios = []
        for turn, sample in self.samples.get(peer, {}).items():
            rivals = [self.samples[other][turn].value for other in others if turn in self.samples.get(other, {})]
            if rivals and pick(rivals) > 0:
                ratios.append(sample.value / pick(rivals))
        return figure(ratios) if ratios else None

    def verdict(self, peer: str, target: Target) -> tuple[float, bool] | None:
        """What `peer` reaches of a target, and whether that is enough; None where it was not measured."""
        if peer not in self.samples:
            return None
        if isinstance(target, AtMost):
            value = self.figure(peer)[0]
            return value, value <= target.limit
        ratio = self.ratio(peer, target.peers)
        return None if ratio is None else (ratio[0], ratio[0] >= target.factor)

    def judged(self) -> list[tuple[str, Target, float, bool]]:
        """Every target of every cowdisk that was measured: who, which, what it reached, whether it is met."""
        found = []
        for peer in self.samples:
            if not peer.startswith("cowdisk"):
                continue
            for target in (LOCAL,) if peer.endswith(" local") else self.targets:
                verdict = self.verdict(peer, target)
                if verdict is not None:
                    found.append((peer, target, *verdict))
        return found
