"""What `kvstore bench` found, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.cli.common import print_facts, print_table

if TYPE_CHECKING:
    from kvstore.bench.cases import Report
    from kvstore.bench.codec_costs import CodecRow
    from kvstore.bench.eviction import EvictionRow


def print_report(report: Report) -> None:
    """The table for people, then the numbers that are not times."""
    cells = []
    for row in report.rows():
        times = [short_time_text(row[name]) for name in ("p50_s", "p90_s", "p99_s", "max_s")]
        speed = f"{row['bytes_per_s'] / 1e9:.2f}" if row["nbytes"] else ""
        ratio = f"{row['ratio']:.2f} x {row['ceiling']}" if row["ratio"] is not None else ""
        cells.append((row["name"], *times, speed, ratio, f"{row['at_most']:g}" if row["at_most"] else ""))
    columns = ("case", "P50", "P90", "P99", "max", "GB/s", "ratio", "at most")
    title = ", ".join(f"{key} {value}" for key, value in report.shape.items())
    print_table(columns, cells, title=f"{report.bench}: {title}", numbers=" nnnnn n")
    if report.facts:
        print_facts("also", [(name, f"{value:.3f}") for name, value in report.facts.items()])


def short_time_text(seconds: float) -> str:
    """A time of seconds or less: `1.25 s`, `12.5 ms`, `1.250 ms`."""
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.1f} ms"
        if seconds >= 0.01
        else f"{1e3 * seconds:.3f} ms"
    )


def print_codecs(rows: Sequence[CodecRow], of_dtype: str, title: str) -> None:
    """A table of what profiles make of KV. `of_dtype`: heading of the bytes as a share of those of the dtype."""
    cells = [
        (
            row.profile,
            str(row.seq_len),
            str(row.head_dim),
            f"{row.nbytes / 1e6:.1f}",
            f"{row.of_dtype:.3f}",
            f"{row.of_float32:.3f}",
            f"{row.mean_error:.2%}",
            f"{row.max_error:.2f}",
            short_time_text(row.encode_s),
            short_time_text(row.decode_s),
            f"{row.encode_peak_bytes / 1e6:.0f}",
            f"{row.decode_peak_bytes / 1e6:.0f}",
        )
        for row in rows
    ]
    columns = ("profile", "tokens", "width", "MB", of_dtype, "of float32", "mean error", "max error")
    print_table(
        (*columns, "quantize", "dequantize", "peak MB", "peak MB back"),
        cells,
        title=f"{title}; errors of the root mean square",
        numbers=" nnnnnnnnnnn",
    )


def print_evictions(rows: Sequence[EvictionRow], trace: str) -> None:
    """A table of what policies keep of `trace`, the name of its file."""
    cells = [
        (
            row.policy,
            row.admission,
            f"{row.budget_share:.0%}",
            f"{row.hit_share:.3f}",
            f"{row.optimum_hit_share:.3f}",
            f"{row.written_per_reused:.2f}" if row.written_per_reused is not None else "",
        )
        for row in rows
    ]
    columns = ("policy", "admission", "budget", "hit", "optimum", "written / reused")
    print_table(columns, cells, title=f"{trace}: shares of blocks", numbers="  nnnn")
