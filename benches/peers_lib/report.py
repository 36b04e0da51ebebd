"""What came out, written down: tables for people, CSV and JSON for programs."""

import csv
import json
from pathlib import Path

from .results import Figure, Row, Target

Facts = dict[str, str]


def number(value: float) -> str:
    """Two or three digits that matter."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3}f}"


def spread(found: Figure) -> str:
    median, low, high = found
    return f"{number(median)} ({number(low)}–{number(high)})"


def cell(row: Row, peer: str) -> str:
    if peer in row.failures:
        return "failed"
    if peer not in row.samples:
        return ""
    ratio = row.ratio(peer, (row.baseline,)) if row.baseline and peer != row.baseline else None
    return spread(ratio) if ratio else f"{spread(row.figure(peer))} {row.unit}"


def target_cell(row: Row) -> str:
    """Each target with what was reached of it; those of a local disk are in the list of targets only."""
    words = []
    for peer, target, reached, met in row.judged():
        if not peer.endswith(" local"):
            words.append(f"{target}: {'met' if met else f'**not met, {number(reached)}**'}")
    return "; ".join(words)


def peers_of(rows: list[Row]) -> list[str]:
    """In the order in which they come first."""
    return list(dict.fromkeys(peer for row in rows for peer in (*row.samples, *row.failures)))


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def group_table(rows: list[Row]) -> str:
    peers = peers_of(rows)
    lines = [[row.work, *(cell(row, peer) for peer in peers), target_cell(row)] for row in rows]
    return table(["work", *peers, "target of cowdisk"], lines)


def cpu_table(rows: list[Row]) -> str:
    """Microseconds per request; empty where none were counted."""
    peers = peers_of(rows)
    lines = []
    for row in rows:
        cells = [row.cpu(peer) if peer in row.samples else None for peer in peers]
        if any(cells):
            shown = [f"{found[0]:.1f} + {found[1] or 0:.1f}" if found else "" for found in cells]
            lines.append([row.work, *shown])
    return table(["CPU per request, µs: client + daemon", *peers], lines) if lines else ""


def judged(rows: list[Row]) -> list[tuple[Row, str, Target, float, bool]]:
    return [(row, *verdict) for row in rows for verdict in row.judged()]


def target_table(rows: list[Row], *, local: bool) -> str:
    """The targets of root disks, or those of local disks."""
    lines = [
        [f"{row.group}: {row.work}", peer, str(target), number(reached), "yes" if met else "**no**"]
        for row, peer, target, reached, met in judged(rows)
        if peer.endswith(" local") == local
    ]
    return table(["work", "who", "target", "reached", "met"], lines) if lines else ""


def markdown(rows: list[Row], groups: dict[str, str], facts: Facts) -> str:
    """The whole report; `groups` says of each what it measures."""
    parts = ["# cowdisk beside its peers\n", "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n"]
    parts.append(
        "Cells are medians of the rounds and, in brackets, their quartiles: × the first column's figure of the same "
        "round, and more is better, unless a unit stands behind.\n"
    )
    met = [verdict[-1] for verdict in judged(rows)]
    if met:
        parts.append(f"## Targets: {sum(met)} of {len(met)} met\n")
        parts += [target_table(rows, local=False), target_table(rows, local=True)]
    for group, about in groups.items():
        mine = [row for row in rows if row.group == group]
        if not mine:
            continue
        parts += [f"## {group}: {about}\n", group_table(mine)]
        if any(row.baseline for row in mine):
            parts.append(f"![{group}]({group}.svg)\n")
        if cpu := cpu_table(mine):
            parts.append(cpu)
        failures = [f"- {row.work}: {peer}: {why}" for row in mine for peer, why in row.failures.items()]
        if failures:
            parts.append("Failed:\n\n" + "\n".join(failures) + "\n")
    return "\n".join(parts)


def write_csv(path: Path, rows: list[Row]) -> None:
    """A line per sample."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "work", "peer", "round", "value", "unit", "client_cpu_us", "daemon_cpu_us"])
        for row in rows:
            for peer, turns in row.samples.items():
                for turn, sample in turns.items():
                    cpu = [sample.client_us, sample.daemon_us]
                    writer.writerow([row.group, row.work, peer, turn, sample.value, row.unit, *cpu])


def as_json(rows: list[Row], facts: Facts) -> str:
    def described(row: Row) -> dict[str, object]:
        peers = {}
        for peer in row.samples:
            median, low, high = row.figure(peer)
            ratio = row.ratio(peer, (row.baseline,)) if row.baseline else None
            peers[peer] = {"median": median, "quartiles": [low, high], "ratio": ratio[0] if ratio else None}
        targets = [
            {"peer": peer, "target": str(target), "reached": reached, "met": met}
            for peer, target, reached, met in row.judged()
        ]
        return {
            "group": row.group, "work": row.work, "unit": row.unit, "baseline": row.baseline, "peers": peers,
            "targets": targets, "failures": row.failures,
        }  # fmt: skip

    return json.dumps({"facts": facts, "rows": [described(row) for row in rows]}, indent=1, ensure_ascii=False) + "\n"
