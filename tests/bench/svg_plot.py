"""Lines over bits, logarithmic upwards, as an SVG that has the reader's colour scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 180, 50, 50
COLOURS = ("#8c959f", "#bf8700", "#8250df", "#1a7f37", "#2f81d8", "#cf222e")
STYLE = """
text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.note { font-size: 12px; fill: #59636e }
.grid { stroke: #d1d9e0; stroke-width: 1 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .note { fill: #9198a1 }
  .grid { stroke: #3d444d }
}
"""


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one line, in any order; y over 0."""

    name: str
    points: Sequence[tuple[float, float]]


def draw(series: Sequence[Series], title: str, below: str, note: str) -> str:
    """The picture."""
    xs = [x for one in series for x, _ in one.points]
    ys = [math.log10(y) for one in series for _, y in one.points]
    first, last = math.floor(min(xs)), math.ceil(max(xs))
    low, high = math.floor(min(ys)), math.ceil(max(ys))

    def at(x: float, log_y: float) -> tuple[float, float]:
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        up = TOP + (high - log_y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(up, 1)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"><style>{STYLE}</style>']
    out.append(f'<text x="{LEFT}" y="22">{escape(title)}</text>')
    out.append(f'<text x="{LEFT}" y="40" class="note">{escape(note)}</text>')
    for power in range(low, high + 1):
        (left, y), (right, _) = at(first, power), at(last, power)
        out.append(f'<line class="grid" x1="{left}" y1="{y}" x2="{right}" y2="{y}"/>')
        out.append(f'<text class="note" x="{left - 8}" y="{y + 4}" text-anchor="end">1e{power}</text>')
    for bits in range(first, last + 1):
        x, y = at(bits, low)
        out.append(f'<text class="note" x="{x}" y="{y + 18}" text-anchor="middle">{bits}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="note" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(below)}</text>')
    for number, (one, colour) in enumerate(zip(series, COLOURS, strict=False)):
        points = [at(x, math.log10(y)) for x, y in sorted(one.points)]
        path = " ".join(f"{x},{y}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in points]
        x, y = WIDTH - RIGHT + 16, TOP + 14 + 20 * number
        out.append(f'<rect x="{x}" y="{y - 9}" width="12" height="4" fill="{colour}"/>')
        out.append(f'<text x="{x + 18}" y="{y - 2}">{escape(one.name)}</text>')
    return "\n".join([*out, "</svg>", ""])
