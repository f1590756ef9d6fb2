"""A bar chart in SVG: how many times better than the reference, on a logarithmic scale. It reads in light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT = 860, 250, 70
BAR, GAP, HEAD, FOOT = 14, 14, 58, 26
TIMES = "\N{MULTIPLICATION SIGN}"
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600; font-size: 15px }
.quiet { fill: #656d76; font-size: 12px } .grid { stroke: #8c959f; stroke-opacity: .3 } .one { stroke: #656d76 }
.a { fill: #6e9ecf } .b { fill: #e0762f }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .quiet { fill: #9198a1 } .one { stroke: #9198a1 } }
"""


class Panel(NamedTuple):
    """`bars` has for each label one value (or None) for each of `series`."""

    title: str
    series: Sequence[str]
    bars: Sequence[tuple[str, Sequence[float | None]]]


def draw(panels: Sequence[Panel]) -> str:
    """The panels one below the other, all to one scale."""
    values = [value for panel in panels for _, bars in panel.bars for value in bars if value]
    low = math.floor(math.log2(min([1.0, *values])))
    high = max(1, math.ceil(math.log2(max([2.0, *values]))))

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(value) - low) / (high - low)

    parts: list[str] = []
    top = 0
    for panel in panels:
        bottom = top + HEAD + sum(len(bars) * BAR + GAP for _, bars in panel.bars)
        parts += _frame(panel, top, bottom, [2.0**power for power in range(low, high + 1)], x)
        y = top + HEAD
        for label, bars in panel.bars:
            middle = y + len(bars) * BAR / 2 + 4
            parts.append(f'<text x="{LEFT - 14}" y="{middle:.0f}" text-anchor="end">{escape(label)}</text>')
            for kind, value in zip("ab", bars, strict=True):
                parts += _bar(kind, y, value, x)
                y += BAR
            y += GAP
        top = bottom + FOOT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" role="img">'
    what = "; ".join(panel.title for panel in panels)
    return "\n".join([head, f"<title>{escape(what)}</title><style>{STYLE}</style>", *parts, "</svg>\n"])


def _frame(panel: Panel, top: int, bottom: int, ticks: Sequence[float], x: Callable[[float], float]) -> list[str]:
    parts = [f'<text class="title" x="0" y="{top + 18}">{escape(panel.title)}</text>']
    place = LEFT
    for kind, name in zip("ab", panel.series, strict=True):
        parts.append(f'<rect class="{kind}" x="{place}" y="{top + 30}" width="12" height="12" rx="2"/>')
        parts.append(f'<text x="{place + 18}" y="{top + 41}">{escape(name)}</text>')
        place += 40 + 8 * len(name)
    for tick in ticks:
        line = f'x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top + HEAD - 6}" y2="{bottom - 6}"'
        parts.append(f'<line class="{"one" if tick == 1 else "grid"}" {line}/>')
        parts.append(
            f'<text class="quiet" x="{x(tick):.1f}" y="{bottom + 8}" text-anchor="middle">{tick:g}{TIMES}</text>'
        )
    return parts


def _bar(kind: str, y: int, value: float | None, x: Callable[[float], float]) -> list[str]:
    """From 1 to the value: to the right where it is better, to the left where it is worse."""
    if not value:
        return []
    start, end = sorted([x(1), x(value)])
    return [
        f'<rect class="{kind}" x="{start:.1f}" y="{y + 1}" width="{max(end - start, 1):.1f}" height="{BAR - 2}" rx="2"/>',
        f'<text class="quiet" x="{end + 5:.1f}" y="{y + BAR - 3}">{value:.{0 if value >= 10 else 1}f}{TIMES}</text>',
    ]
