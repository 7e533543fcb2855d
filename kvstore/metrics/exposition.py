"""The Prometheus text exposition of what `Client.stats` answers. No library: the format is a line a number.

Counters are in tokens, bytes and seconds, and of the lifetime where the daemon keeps one, so that a restart is no
reset. There is no ratio: divide rates, as in rate(kvstore_hit_tokens_total) / rate(kvstore_prompt_tokens_total).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# Namespaces that have a label of their own, those with most prompt tokens first; the rest is one, called "other".
NAMESPACES_MAX = 64
ID_DIGITS = 12

Labels = Mapping[str, str]
Sample = tuple[Labels, float]

# name, field of Traffic, help
_TRAFFIC = (
    ("kvstore_prompt_tokens_total", "prompt_tokens", "Prompt tokens that workers asked for, without those in memory."),
    ("kvstore_hit_tokens_total", "hit_tokens", "Prompt tokens that were restored."),
    ("kvstore_saved_seconds_total", "saved_s", "Prefill that hits saved, less what restoring took."),
    ("kvstore_stored_tokens_total", "stored_tokens", "Tokens that were stored."),
    ("kvstore_written_bytes_total", "written_bytes", "Bytes written to disk for stores."),
    ("kvstore_reused_bytes_total", "reused_bytes", "Bytes not written, since they were stored already; estimated."),
)
# name, where it is in the answer, help
_GAUGES = (
    ("kvstore_disk_used_bytes", ("disk", "used_bytes"), "Bytes that the data directory takes."),
    ("kvstore_disk_budget_bytes", ("disk", "budget_bytes"), "Most bytes that it may take."),
    ("kvstore_disk_free_bytes", ("disk", "free_bytes"), "Free bytes on the volume."),
    ("kvstore_disk_free_floor_bytes", ("disk", "free_floor_bytes"), "Below this nothing is written."),
    ("kvstore_blobs", ("disk", "blobs"), "Files of blocks and checkpoints."),
    ("kvstore_quarantined_blobs", ("disk", "quarantined"), "Damaged files in quarantine."),
    ("kvstore_clients", ("load", "clients"), "Workers that called within the last seconds."),
    ("kvstore_calls", ("load", "calls"), "Calls of workers under way."),
    ("kvstore_uploads", ("load", "uploads"), "Stores under way."),
    ("kvstore_uptime_seconds", ("daemon", "uptime_s"), "Since the daemon started."),
)


def exposition(stats: Mapping[str, Any]) -> str:
    """All metrics as text."""
    return "".join(f"{line}\n" for line in _lines(stats))


def _lines(stats: Mapping[str, Any]) -> Iterator[str]:
    spaces = _namespaces(stats.get("namespaces", []))
    total = stats.get("lifetime", {})
    for name, field, about in _TRAFFIC:
        yield from _metric(name, "counter", about, _by_namespace(spaces, total, field))
    requests = [({"outcome": one}, total.get(one, 0)) for one in ("hits", "shortened", "misses", "in_memory")]
    yield from _metric("kvstore_requests_total", "counter", "Requests of workers by what they got.", requests)
    for name, key, label, about in (
        ("kvstore_miss_total", "miss_reasons", "reason", "Requests that got nothing, since start."),
        ("kvstore_shortened_total", "shortened_reasons", "reason", "Hits that gave less than is shared, since start."),
        ("kvstore_store_short_total", "store_reasons", "reason", "Stores that wrote less than all, since start."),
        ("kvstore_refused_total", "refusals", "limit", "Calls refused by a limit, since start."),
    ):
        yield from _metric(name, "counter", about, [({label: one}, n) for one, n in stats.get(key, {}).items()])
    evicted = [({"cause": cause}, one["bytes"]) for cause, one in stats.get("evictions", {}).items()]
    yield from _metric("kvstore_evicted_bytes_total", "counter", "Bytes evicted by cause, since start.", evicted)
    for name, (group, field), about in _GAUGES:
        if field in stats.get(group, {}):
            yield from _metric(name, "gauge", about, [({}, stats[group][field])])
    daemon = stats.get("daemon", {})
    known = {"version": daemon.get("version", ""), "state": daemon.get("state", "")}
    yield from _metric("kvstore_info", "gauge", "The daemon; always 1.", [(known, 1)])


def _namespaces(rows: Iterable[Mapping[str, Any]]) -> Sequence[tuple[Labels, Mapping[str, Any]]]:
    """Labels and traffic of the namespaces that have labels of their own."""
    known = [row for row in rows if row.get("traffic")]
    known.sort(key=lambda row: -row["traffic"].get("prompt_tokens", 0))
    shown = known[: NAMESPACES_MAX - 1]
    return [({"namespace": row["id"][:ID_DIGITS], "model": row["alias"]}, row["traffic"]) for row in shown]


def _by_namespace(
    spaces: Sequence[tuple[Labels, Mapping[str, Any]]], total: Mapping[str, Any], field: str
) -> Iterator[Sample]:
    """A counter by namespace; what is left of the total, also of namespaces that are gone, is `other`."""
    left = total.get(field, 0)
    for labels, traffic in spaces:
        value = traffic.get(field, 0)
        left -= value
        yield labels, value
    yield {"namespace": "other", "model": ""}, max(0, left)


def _metric(name: str, kind: str, about: str, samples: Iterable[Sample]) -> Iterator[str]:
    lines = [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    if lines:
        yield f"# HELP {name} {about}"
        yield f"# TYPE {name} {kind}"
        yield from lines


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}".rstrip("0").rstrip(".")
