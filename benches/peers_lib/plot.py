"""A group as a picture: for each row, each peer's ratio to the first as a bar, with its quartiles."""

from html import escape

from .report import number, peers_of
from .results import Row

COLOURS = ("#0b7a75", "#7fc8c2", "#b5651d", "#d9a066", "#5b5f97", "#8d99ae", "#a23b72", "#c9ada7")
BAR, GAP, LABEL, PLOT, WIDTH = 12, 14, 330, 480, 900
MOST = 2.0
"""The axis ends here; longer bars are cut, and their number says how long they are."""


def text(x: float, y: float, words: str, extra: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {extra}>{escape(words)}</text>'


def bar(row: Row, peer: str, colour: str, y: float) -> list[str]:
    ratio = row.ratio(peer, (row.baseline,)) if row.baseline else None
    if ratio is None:
        return []
    median, low, high = ratio
    end, left, right = (LABEL + PLOT * min(value, MOST) / MOST for value in (median, low, high))
    middle = y + BAR / 2
    return [
        f'<rect x="{LABEL}" y="{y:.0f}" width="{end - LABEL:.1f}" height="{BAR - 2}" fill="{colour}"/>',
        f'<path d="M{left:.1f} {middle - 1:.1f}H{right:.1f}" stroke="#222" stroke-width="1.5"/>',
        text(max(end, right) + 4, y + BAR - 3, number(median)),
    ]


def svg(title: str, rows: list[Row]) -> str:
    """Bars to the right of 1 are better than the baseline where more is better, and worse where less is."""
    baselines = {row.baseline for row in rows}
    peers = [peer for peer in peers_of(rows) if peer not in baselines]
    body, y = [], 60.0
    for row in rows:
        body.append(text(LABEL - 8, y + BAR, row.work, 'text-anchor="end"'))
        for peer in peers:
            if peer in row.samples:
                body += bar(row, peer, COLOURS[peers.index(peer) % len(COLOURS)], y)
                y += BAR
        y += GAP
    grid = []
    for n in range(5):
        x, value = LABEL + PLOT * n / 4, MOST * n / 4
        colour = "#444" if value == 1 else "#ddd"
        grid.append(f'<path d="M{x:.0f} 50V{y:.0f}" stroke="{colour}" stroke-width="1"/>')
        grid.append(text(x, 46, f"{value:g} ×", 'text-anchor="middle"'))
    x = 8.0
    for peer in peers:
        colour = COLOURS[peers.index(peer) % len(COLOURS)]
        body.append(f'<rect x="{x:.0f}" y="22" width="10" height="10" fill="{colour}"/>')
        body.append(text(x + 14, 31, peer))
        x += 30 + 6.5 * len(peer)
    head = text(8, 15, title, 'font-weight="bold"')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 10:.0f}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="#fff"/>\n{head}\n'
        + "\n".join(grid + body)
        + "\n</svg>\n"
    )
