"""Bar charts as the numbers that a template draws: bars in percent, nice axes, labels. Nothing here knows HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TICKS_MAX = 4
X_LABELS_MAX = 6
# Of the place of one bar: the gap to the next one.
GAP = 0.22


@dataclass(frozen=True)
class Part:
    """A part of a bar: from `bottom`, `height` high, both in percent of the axis; `kind` chooses its colour."""

    kind: str
    bottom: float
    height: float


@dataclass(frozen=True)
class Bar:
    """One bar, from `left`, `width` wide, in percent of the chart; `title` says its numbers."""

    left: float
    width: float
    parts: tuple[Part, ...]
    title: str


@dataclass(frozen=True)
class Tick:
    """A label at `at` percent of an axis. `minor`: not shown where there is little room; `end`: start, end or none."""

    at: float
    label: str
    minor: bool = False
    end: str = ""


@dataclass(frozen=True)
class Chart:
    """All that is drawn. `limit`: a line at this percentage, which no value may pass; below 0: no line."""

    title: str
    about: str
    bars: tuple[Bar, ...]
    y_ticks: tuple[Tick, ...]
    x_ticks: tuple[Tick, ...]
    legend: tuple[tuple[str, str], ...]
    limit: float = -1.0
    limit_label: str = ""


def bar_chart(
    title: str,
    about: str,
    labels: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float]]],
    titles: Sequence[str],
    text: Callable[[float], str],
    *,
    axis_max: float = 0.0,
    unit: float = 1.0,
    limit: tuple[str, float] | None = None,
) -> Chart:
    """A chart of stacked bars, one for each label.

    `series` are (kind, name for the legend, values), from the axis up. `text` says a number of the axis. `axis_max`: of
    a scale that is given, such as a share; 0: a nice number above the highest bar and the limit. `unit`: the axis steps
    in multiples of it, such as 3600 for hours. `limit`: (name, value) of a line.
    """
    sums = [sum(values) for values in zip(*(values for _, _, values in series), strict=True)]
    most = axis_max or max([*sums, limit[1] if limit else 0.0, 0.0])
    step = nice_step(most / unit) * unit
    top = axis_max or max(step, math.ceil(most / step - 1e-9) * step)
    place = 100 / max(1, len(labels))
    bars = []
    for index, title_of_bar in enumerate(titles):
        bottom, parts = 0.0, []
        for kind, _, values in series:
            height = 100 * values[index] / top
            if height > 0:
                parts.append(Part(kind, round(bottom, 3), round(height, 3)))
            bottom += height
        bars.append(Bar(round(index * place, 3), round(place, 3), tuple(parts), title_of_bar))
    return Chart(
        title=title,
        about=about,
        bars=tuple(bars),
        y_ticks=tuple(
            Tick(round(100 * number * step / top, 3), text(number * step)) for number in range(round(top / step) + 1)
        ),
        x_ticks=tuple(x_ticks(labels)),
        legend=tuple((kind, name) for kind, name, _ in series) if len(series) > 1 else (),
        limit=round(100 * limit[1] / top, 3) if limit and limit[1] else -1.0,
        limit_label=limit[0] if limit and limit[1] else "",
    )


def nice_step(most: float) -> float:
    """The distance of at most TICKS_MAX ticks up to `most`: 1, 2, 2.5 or 5 times a power of ten; whole from 1 on."""
    if most <= 0:
        return 1.0
    raw = most / TICKS_MAX
    power = 10.0 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if power < 10 else (1, 2, 2.5, 5, 10)
    return next(factor * power for factor in factors if factor * power >= raw * (1 - 1e-9))


def x_ticks(labels: Sequence[str]) -> list[Tick]:
    """Some of the labels, evenly spaced, each in the middle of its bar; every other one is minor."""
    every = max(1, math.ceil(len(labels) / X_LABELS_MAX))
    shown = range(len(labels) - 1, -1, -every)
    ticks = [
        Tick(round(100 * (index + 0.5) / len(labels), 3), labels[index], minor=number % 2 == 1, end=_end(index, labels))
        for number, index in enumerate(shown)
    ]
    return ticks[::-1]


def _end(index: int, labels: Sequence[str]) -> str:
    """Where a label at the edge would stand out of the chart."""
    edge = max(1, len(labels) // 16)
    return "start" if index < edge else "end" if index >= len(labels) - edge else ""
