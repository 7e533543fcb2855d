"""A report as an SVG: one bar a case, its P50, with a line to its P99. Needs the extra `plot`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.bench.cases import Report
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAR_INCHES = 0.4


def require_matplotlib() -> None:
    """ConfigError when matplotlib is not installed."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; install it with: pip install 'kvstore[plot]'") from error


def plot(report: Report, path: Path) -> None:
    """Write the file. ConfigError when matplotlib is not installed or the file cannot be written."""
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = report.rows()
    figure = Figure(figsize=(9, 1.2 + BAR_INCHES * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    names = [row["name"] for row in rows]
    medians_ms = [1e3 * row["p50_s"] for row in rows]
    tails_ms = [1e3 * (row["p99_s"] - row["p50_s"]) for row in rows]
    axes.barh(names, medians_ms, xerr=[[0.0] * len(rows), tails_ms], color="#4477aa", ecolor="#888888")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds: P50, and a line to P99")
    axes.set_title(
        f"kvstore bench {report.bench}: {', '.join(f'{key} {value}' for key, value in report.shape.items())}"
    )
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG. ConfigError when the file cannot be written."""
    try:
        figure.savefig(path, format="svg")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
