"""The table of targets and the pictures in README.md, between two marks."""

import shutil
from pathlib import Path

from .host import BenchError
from .report import Facts, judged, target_table
from .results import Row

BEGIN, END = "<!-- benches/peers: begin -->", "<!-- benches/peers: end -->"
FIGURES = Path("docs/figures")


def section(rows: list[Row], facts: Facts, pictures: list[str]) -> str:
    machine = f"{facts['machine']}, Linux {facts['kernel']}, {facts['host file system']}"
    local = [met for _, peer, _, _, met in judged(rows) if peer.endswith(" local")]
    shown = " · ".join(f"[{name}]({FIGURES}/{name}.svg)" for name in pictures)
    return (
        f"{BEGIN}\n"
        f"By `{facts['command']}`, {facts['date']}, {machine}; load before {facts['load before']}:\n\n"
        f"{target_table(rows, local=False)}\n"
        f"A local disk is at least 0.95 × the plain file in {sum(local)} of {len(local)} rows. As pictures: {shown}.\n"
        f"{END}"
    )


def update(repository: Path, out: Path, rows: list[Row], facts: Facts) -> None:
    """Raises BenchError if README.md has no marks."""
    path = repository / "README.md"
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise BenchError(f"README.md has no lines {BEGIN} and {END}")
    (repository / FIGURES).mkdir(parents=True, exist_ok=True)
    pictures = sorted(picture.stem for picture in out.glob("*.svg"))
    for name in pictures:
        shutil.copyfile(out / f"{name}.svg", repository / FIGURES / f"{name}.svg")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(before + section(rows, facts, pictures) + after, encoding="utf-8")
