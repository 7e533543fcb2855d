"""The metrics of a daemon for Prometheus: one collector over what `Client.stats` answers, by prometheus-client.

Counters are in tokens, bytes and seconds, and count since the daemon started: they begin at 0 with each daemon, as
scrapers expect, and never go back in between. (Lifetime counters were rejected: a kill loses up to a minute of them,
and a scraper takes a counter that went back for one that began at 0, and adds all of it again.) There is no ratio:
divide rates, as in rate(kvstore_hit_tokens_total[1h]) / rate(kvstore_prompt_tokens_total[1h]).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.core.remote_words import RemoteState
from kvstore.core.text import NAME_CHARACTERS_MAX, plain_text
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

EXTRA = "pip install 'kvstore[metrics]'"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Namespaces that have a label of their own, with one called "other" for the rest. The daemon keeps to it as well.
LABELS_MAX = 64
OTHER = "other"
ID_DIGITS = 12
# The tier that a hit came from: the data directory, or the remote tier, from which it was read for the request.
DISK, REMOTE = "disk", "remote"

# name, field of Traffic, help
_TRAFFIC = (
    ("kvstore_prompt_tokens", "prompt_tokens", "Prompt tokens that workers asked for, without those in their memory."),
    ("kvstore_saved_seconds", "saved_s", "Prefill that hits saved, less what restoring took."),
    ("kvstore_stored_tokens", "stored_tokens", "Tokens that were stored."),
    ("kvstore_written_bytes", "written_bytes", "Bytes written to disk for stores."),
    ("kvstore_reused_bytes", "reused_bytes", "Bytes not written, since they were stored already; estimated."),
)
# name, field of the answer or of what `_counted` adds to it, label, help
_BY_CODE = (
    ("kvstore_requests", "outcomes", "outcome", "Requests of workers by what they got."),
    ("kvstore_miss", "miss_reasons", "reason", "Requests that got nothing."),
    ("kvstore_shortened", "shortened_reasons", "reason", "Hits that gave less than is shared."),
    ("kvstore_store_short", "store_reasons", "reason", "Stores that wrote less than all, or nothing."),
    ("kvstore_refused", "refusals", "limit", "Calls that a limit refused."),
    ("kvstore_evicted_bytes", "evicted", "cause", "Bytes on disk that were evicted."),
    ("kvstore_remote_unused", "unused_reasons", "reason", "Requests that were served without the remote tier."),
    ("kvstore_remote_not_pushed", "not_pushed", "reason", "Blobs that were not written to the remote tier."),
)
# name, where it is in the answer, help
_COUNTERS = (
    ("kvstore_served_bytes", ("bytes", "served"), "Stored bytes handed over to workers."),
    (
        "kvstore_held_back_stores",
        ("writes", "held_back_stores"),
        "Stores that admission or the write budget did not let write.",
    ),
    ("kvstore_held_back_bytes", ("writes", "held_back_bytes"), "Raw bytes of KV that they would have brought."),
    ("kvstore_reencoded_blocks", ("pressure", "blocks"), "Blocks that were re-encoded with fewer bits."),
    ("kvstore_reencoded_before_bytes", ("pressure", "before_bytes"), "What they took on disk before."),
    ("kvstore_reencoded_after_bytes", ("pressure", "after_bytes"), "What they took after it."),
    ("kvstore_reencoding_left_blocks", ("pressure", "left_blocks"), "Blocks that could not be, and stay as they are."),
    ("kvstore_remote_requests", ("remote", "requests"), "Requests to the remote tier."),
    ("kvstore_remote_read_bytes", ("remote", "read_bytes"), "Bytes read from the remote tier."),
    ("kvstore_remote_written_bytes", ("remote", "written_bytes"), "Bytes written to the remote tier."),
    ("kvstore_remote_pushed_blobs", ("remote", "pushed_blobs"), "Blobs written to the remote tier."),
    ("kvstore_remote_failed_calls", ("remote", "failed_calls"), "Calls to the remote tier that failed."),
    ("kvstore_remote_late_calls", ("remote", "late_calls"), "Calls to it that did not end within their time."),
)
# name, field of the answer, help
_HISTOGRAMS = (
    ("kvstore_fetch_seconds", "fetch_s", "From the plan of a fetch until its bytes were read."),
    ("kvstore_idle_before_eviction_seconds", "idle_s", "Since the last use of blocks that limits evicted."),
    ("kvstore_reuse_gap_seconds", "reuse_s", "Since the last use of the blocks that a fetch used."),
)
# name, where it is in the answer, help
_GAUGES = (
    ("kvstore_disk_used_bytes", ("disk", "used_bytes"), "Bytes that the data directory takes."),
    ("kvstore_disk_budget_bytes", ("disk", "budget_bytes"), "Most bytes that it may take."),
    ("kvstore_disk_free_bytes", ("disk", "free_bytes"), "Free bytes on the volume."),
    ("kvstore_disk_free_floor_bytes", ("disk", "free_floor_bytes"), "Below this nothing is written."),
    ("kvstore_blobs", ("disk", "blobs"), "Files of blocks and checkpoints."),
    ("kvstore_quarantined_blobs", ("disk", "quarantined"), "Damaged files in quarantine."),
    ("kvstore_write_budget_bytes", ("writes", "day_bytes"), "Most bytes that stores write in a day."),
    ("kvstore_write_budget_left_bytes", ("writes", "left_bytes"), "Of these, what may be written now."),
    ("kvstore_reencoding_error_max", ("pressure", "error_max"), "Largest relative error of a re-encoded block."),
    ("kvstore_clients", ("load", "clients"), "Workers that called within the last seconds."),
    ("kvstore_calls", ("load", "calls"), "Calls of workers under way."),
    ("kvstore_uploads", ("load", "uploads"), "Stores under way."),
    ("kvstore_uptime_seconds", ("daemon", "uptime_s"), "Since the daemon started."),
    ("kvstore_serving", ("daemon", "serving"), "1 if the daemon serves and stores, 0 if it is degraded."),
    ("kvstore_remote_serving", ("remote", "serving"), "1 if the remote tier serves, 0 if not."),
    ("kvstore_remote_full", ("remote", "full"), "1 if the remote tier has no room for what is to be written to it."),
    ("kvstore_remote_queued_bytes", ("remote", "queued_bytes"), "Bytes that wait to be written to the remote tier."),
)


def require_prometheus() -> None:
    """ConfigError that names the extra, where prometheus-client is not installed."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"metrics for Prometheus need prometheus-client; install it: {EXTRA}") from error


def exposition(stats: Mapping[str, Any]) -> bytes:
    """All metrics in Prometheus' text format. ConfigError where prometheus-client is not installed."""
    require_prometheus()
    from prometheus_client.exposition import generate_latest

    text: bytes = generate_latest(StatsCollector(stats))
    return text


class StatsCollector:
    """Makes metrics of one answer of `Client.stats`."""

    def __init__(self, stats: Mapping[str, Any]) -> None:
        from prometheus_client import metrics_core

        self._core = metrics_core
        self._stats = _counted(stats)

    def collect(self) -> Iterator[Metric]:
        """Every metric; what an older daemon does not say is left out."""
        yield from self._traffic()
        for name, field, label, about in _BY_CODE:
            if field in self._stats:
                yield self._counter(name, about, [label], [([code], n) for code, n in self._stats[field].items()])
        for family, table in ((self._core.CounterMetricFamily, _COUNTERS), (self._core.GaugeMetricFamily, _GAUGES)):
            for name, (group, field), about in table:
                if field in self._stats.get(group, {}):
                    yield family(name, about, value=self._stats[group][field])
        for name, field, about in _HISTOGRAMS:
            found = self._stats.get(field) or {}
            if counts := list(itertools.accumulate(found.get("counts", []))):
                bounds = [f"{bound:g}" for bound in found["bounds"]] + ["+Inf"]
                buckets = list(zip(bounds, counts, strict=True))
                yield self._core.HistogramMetricFamily(name, about, buckets=buckets, sum_value=found["sum"])
        info = self._core.GaugeMetricFamily("kvstore_info", "The daemon; always 1.", labels=["version"])
        info.add_metric([self._stats["daemon"].get("version", "")], 1)
        yield info

    def _counter(
        self, name: str, about: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], float]]
    ) -> Metric:
        """A counter with labels; `rows` are their values and its own."""
        metric = self._core.CounterMetricFamily(name, about, labels=labels)
        for values, count in rows:
            metric.add_metric(values, count)
        return metric

    def _traffic(self) -> Iterator[Metric]:
        names, rows = ("namespace", "model"), list(self._labelled())
        hits = []
        for labels, traffic in rows:
            remote = traffic.get("remote_tokens", 0)
            hits.append(((*labels, DISK), traffic.get("hit_tokens", 0) - remote))
            if remote:
                hits.append(((*labels, REMOTE), remote))
        yield self._counter("kvstore_hit_tokens", "Prompt tokens that were restored.", (*names, "tier"), hits)
        for name, field, about in _TRAFFIC:
            yield self._counter(name, about, names, [(labels, traffic.get(field, 0)) for labels, traffic in rows])

    def _labelled(self) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
        """(namespace, model) and traffic, of at most LABELS_MAX, the last of them the rest."""
        rest: dict[str, float] = {}
        for number, row in enumerate(self._stats.get("labelled", [])):
            if row["namespace_id"] and number < LABELS_MAX - 1:
                alias = plain_text(row["alias"], NAME_CHARACTERS_MAX)
                yield (row["namespace_id"][:ID_DIGITS], alias), row["traffic"]
            else:
                rest = {field: rest.get(field, 0) + value for field, value in row["traffic"].items()}
        if rest:
            yield (OTHER, ""), rest


def _counted(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The answer, with what follows from it; nothing of a remote tier where there is none."""
    daemon, remote, since = stats.get("daemon", {}), stats.get("remote") or {}, stats.get("since_start", {})
    state = remote.get("state", RemoteState.OFF)
    if state == RemoteState.OFF:
        remote = {}
    is_there = state in (RemoteState.SERVING, RemoteState.FULL)
    return {
        **stats,
        "daemon": {**daemon, "serving": daemon.get("state") == "serving"},
        "remote": {**remote, "serving": is_there, "full": state == RemoteState.FULL} if remote else {},
        "outcomes": {outcome: since.get(outcome, 0) for outcome in ("hits", "shortened", "misses", "in_memory")},
        "evicted": {cause: one["bytes"] for cause, one in stats.get("evictions", {}).items()},
        **{field: remote[field] for field in ("unused_reasons", "not_pushed") if remote},
    }
