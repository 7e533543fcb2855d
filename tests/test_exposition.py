"""What Prometheus reads, made from an answer of `stats`, and read back by the library's own parser."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from kvstore.cli.stats_text import remote_facts
from kvstore.errors import ConfigError
from kvstore.metrics.exposition import LABELS_MAX, exposition
from kvstore.wire.convert import message_to_dict
from kvstore.wire.v1 import kvstore_pb2 as pb

parser = pytest.importorskip("prometheus_client.parser")

NAMES = {
    "kvstore_prompt_tokens_total",
    "kvstore_hit_tokens_total",
    "kvstore_miss_total",
    "kvstore_saved_seconds_total",
    "kvstore_written_bytes_total",
    "kvstore_reused_bytes_total",
    "kvstore_evicted_bytes_total",
    "kvstore_fetch_seconds_bucket",
    "kvstore_idle_before_eviction_seconds_bucket",
    "kvstore_reuse_gap_seconds_bucket",
}
TIMES = {"bounds": [0.1, 1.0], "counts": [3, 0, 2], "sum": 7.5}


def stats(namespaces: int = 1, alias: str = "small-lm") -> dict[str, Any]:
    """An answer of a daemon with so many namespaces, each with 10 hit tokens."""
    labelled = [
        {
            "namespace_id": f"{number:012x}{0:052x}",
            "alias": alias,
            "traffic": {"prompt_tokens": 20 + number, "hit_tokens": 10, "saved_s": 0.25},
        }
        for number in range(namespaces)
    ]
    return {
        "daemon": {"version": "0.1.0", "state": "serving", "uptime_s": 5},
        "disk": {"used_bytes": 1, "budget_bytes": 2},
        "labelled": labelled,
        "since_start": {"hits": 3, "misses": 1},
        "miss_reasons": {"unknown_prefix": 1},
        "evictions": {"budget": {"blocks": 1, "bytes": 4096}},
        **dict.fromkeys(("fetch_s", "idle_s", "reuse_s"), TIMES),
    }


def samples(answer: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Values by name and labels."""
    families = parser.text_string_to_metric_families(exposition(answer).decode())
    found = [sample for family in families for sample in family.samples]
    return {(one.name, ",".join(f"{key}={one.labels[key]}" for key in sorted(one.labels))): one.value for one in found}


def test_the_metrics_are_in_tokens_seconds_and_bytes_and_none_is_a_ratio() -> None:
    """By these names, each with what it says."""
    found = samples(stats())
    assert {name for name, _ in found} >= NAMES
    assert found["kvstore_hit_tokens_total", "model=small-lm,namespace=000000000000,tier=disk"] == 10
    assert found["kvstore_miss_total", "reason=unknown_prefix"] == 1
    assert found["kvstore_evicted_bytes_total", "cause=budget"] == 4096
    assert (found["kvstore_serving", ""], found["kvstore_info", "version=0.1.0"]) == (1, 1)
    assert not [name for name, _ in found if "ratio" in name or "rate" in name or "share" in name]
    assert samples({**stats(), "daemon": {"state": "degraded"}})["kvstore_serving", ""] == 0


def test_histograms_are_cumulative() -> None:
    """Each bucket holds those before it; the last one all."""
    found = samples(stats())
    buckets = [found["kvstore_fetch_seconds_bucket", f"le={bound}"] for bound in ("0.1", "1", "+Inf")]
    assert buckets == [3, 3, 5]
    assert (found["kvstore_fetch_seconds_count", ""], found["kvstore_fetch_seconds_sum", ""]) == (5, 7.5)


def test_at_most_64_namespaces_have_labels() -> None:
    """The rest is one, and together they are all."""
    labelled = stats(200)["labelled"]
    labelled.append({"namespace_id": "", "alias": "", "traffic": {"prompt_tokens": 7, "hit_tokens": 3}})
    found = samples({**stats(), "labelled": labelled})
    hits = {labels: value for (name, labels), value in found.items() if name == "kvstore_hit_tokens_total"}
    assert len(hits) == LABELS_MAX and sum(hits.values()) == 2003
    assert hits["model=,namespace=other,tier=disk"] == 2003 - 10 * (LABELS_MAX - 1)


def test_a_name_cannot_end_its_label() -> None:
    """Quotes, backslashes and newlines are escaped; what a terminal obeys is said, not done."""
    text = exposition(stats(alias='a"} 1\nevil 2\\\x1b[2J')).decode()
    assert "\x1b" not in text and not [line for line in text.splitlines() if line.startswith("evil")]
    assert ("kvstore_prompt_tokens_total", 'model=a"} 1\\nevil 2\\\\x1b[2J,namespace=000000000000') in samples(
        stats(alias='a"} 1\nevil 2\\\x1b[2J')
    )


def test_calls_to_the_remote_tier_that_failed_or_were_late_are_told() -> None:
    """To scrapers as counters; to people where there are any."""
    told = {"failed_calls": 3, "late_calls": 2}
    remote = {**message_to_dict(pb.RemoteStats(state="serving", place="s3://bucket")), **told}
    found = samples({**stats(), "remote": remote})
    assert (found["kvstore_remote_failed_calls_total", ""], found["kvstore_remote_late_calls_total", ""]) == (3, 2)
    assert ("calls", "3 failed, 2 took longer than they may") in remote_facts(remote)
    assert "calls" not in dict(remote_facts({**remote, **dict.fromkeys(told, 0)}))


def test_an_older_daemon_has_fewer_numbers() -> None:
    """What it does not say is left out."""
    found = samples({"daemon": {}, "disk": {}})
    assert not [name for name, _ in found if name.startswith(("kvstore_disk", "kvstore_fetch", "kvstore_hit"))]


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong usage, one sentence."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"kvstore\[metrics\]"):
        exposition(stats())
