"""Prometheus' text format, made from an answer of `stats`."""

from __future__ import annotations

import re
from typing import Any

from kvstore.metrics.exposition import NAMESPACES_MAX, exposition

LINE = re.compile(r'[a-z_]+(\{([a-z]+="([^"\\\n]|\\.)*",?)+\})? [0-9.]+')


def stats(namespaces: int = 1, alias: str = "small-lm") -> dict[str, Any]:
    """An answer of a daemon with so many namespaces, each with 10 hit tokens."""
    rows = [
        {"id": f"{number:012x}{0:052x}", "alias": alias, "traffic": {"prompt_tokens": 20 + number, "hit_tokens": 10}}
        for number in range(namespaces)
    ]
    total = {"hits": 3, "misses": 1, "prompt_tokens": 10**6, "hit_tokens": 10 * namespaces + 5, "saved_s": 1.25}
    return {
        "daemon": {"version": "0.1.0", "state": "serving", "uptime_s": 5},
        "disk": {"used_bytes": 1, "budget_bytes": 2},
        "namespaces": rows,
        "lifetime": total,
        "miss_reasons": {"unknown_prefix": 1},
        "evictions": {"budget": {"blocks": 1, "bytes": 4096}},
    }


def samples(text: str) -> dict[str, str]:
    """Values by name and labels."""
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_every_line_is_a_sample_or_about_the_next() -> None:
    """And each metric says what it is before its samples; text ends with a newline."""
    text = exposition(stats())
    assert text.endswith("\n")
    for line in text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or LINE.fullmatch(line), line
    found = samples(text)
    assert found['kvstore_miss_total{reason="unknown_prefix"}'] == "1"
    assert found['kvstore_evicted_bytes_total{cause="budget"}'] == "4096"
    assert "ratio" not in text and "share" not in text


def test_namespaces_and_the_rest_add_up_to_the_total() -> None:
    """What namespaces that are gone had is in `other`."""
    found = samples(exposition(stats()))
    parts = [float(value) for name, value in found.items() if name.startswith("kvstore_hit_tokens_total{")]
    assert parts == [10, 5] and found['kvstore_hit_tokens_total{namespace="other",model=""}'] == "5"


def test_at_most_64_namespaces_have_labels() -> None:
    """Those that are asked for most; the others are one."""
    found = samples(exposition(stats(200)))
    labels = [name for name in found if name.startswith("kvstore_prompt_tokens_total{")]
    assert len(labels) == NAMESPACES_MAX
    assert f'namespace="{199:012x}"' in labels[0]


def test_a_name_cannot_end_its_label() -> None:
    """Quotes, backslashes and newlines are escaped."""
    text = exposition(stats(alias='a"b\\c\nd'))
    assert 'model="a\\"b\\\\c\\nd"' in text
    assert all(line.startswith("#") or LINE.fullmatch(line) for line in text.splitlines())


def test_an_older_daemon_has_fewer_numbers() -> None:
    """What it does not say is left out, or zero."""
    text = exposition({"daemon": {}, "disk": {}, "namespaces": [{"id": "ab", "alias": ""}]})
    assert 'kvstore_hit_tokens_total{namespace="other",model=""} 0' in text and "kvstore_disk" not in text
