"""The words of the remote tier: one table, which everything that shows them reads."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.cli.stats_text import remote_facts
from kvstore.cli.top_screen import Rates, Screen
from kvstore.cli.why import remote_words_of
from kvstore.core.remote_words import (
    CREATE_ONLY_WORDS,
    NOT_PUSHED,
    NOT_USED,
    WORDS,
    CreateOnly,
    RemoteReason,
    RemoteState,
    words_of,
)
from kvstore.metrics.exposition import exposition
from tests.test_top import drawn, stats


def remote(**changed: Any) -> dict[str, Any]:
    """The tier in an answer of `stats`, each reason counted once."""
    counts = ("requests", "read_bytes", "written_bytes", "pushed_blobs", "hits", "hit_tokens", "queued_blobs")
    return {
        **dict.fromkeys((*counts, "queued_bytes", "wrong_objects", "bytes_per_s", "latency_s"), 0),
        "state": "serving",
        "detail": "",
        "place": "the remote folder /share",
        "unused_reasons": {str(one): 1 for one in NOT_USED},
        "not_pushed": {str(one): 1 for one in NOT_PUSHED},
        "create_only": "honoured",
        **changed,
    }


def test_every_code_has_words_and_is_one_of_requests_or_of_blocks() -> None:
    """But a hit, and that there is nothing: these are counted nowhere."""
    assert set(RemoteReason) == WORDS.keys() == NOT_USED | NOT_PUSHED | {RemoteReason.HIT, RemoteReason.NOTHING}
    assert set(CreateOnly) == CREATE_ONLY_WORDS.keys()
    assert words_of("of_a_newer_daemon") == remote_words_of("of_a_newer_daemon") == "of_a_newer_daemon"


def test_stats_and_why_say_the_words_of_every_code() -> None:
    """Beside the code and its count."""
    facts = remote_facts(remote())
    for title, some in (("not used", NOT_USED), ("not pushed", NOT_PUSHED)):
        said = {(name, text) for name, text in facts if name.startswith(f"{title} (")}
        assert said == {(f"{title} ({one})", f"1  {WORDS[one]}") for one in some}
    assert all(remote_words_of(str(one)) == WORDS[one] for one in RemoteReason)
    assert remote_facts(remote(state=RemoteState.OFF)) == []


def test_metrics_have_a_label_for_every_code() -> None:
    """Under their two names."""
    pytest.importorskip("prometheus_client")
    text = exposition({**stats(), "remote": remote()}).decode()
    for name, some in (("unused", NOT_USED), ("not_pushed", NOT_PUSHED)):
        assert all(f'kvstore_remote_{name}_total{{reason="{one}"}} 1.0' in text for one in some)
    assert "kvstore_remote_serving 1.0" in text


def test_top_shows_why_the_tier_was_mostly_not_used() -> None:
    """With the number of requests."""
    screen = Screen("unix:/tmp/s")
    unused = {str(RemoteReason.LATE): 2, str(RemoteReason.NOT_WORTH): 5}
    screen.show(stats(remote=remote(unused_reasons=unused)), Rates())
    assert "not used 7, mostly not_worth_it" in drawn(screen, 160)
    screen.show(stats(remote=remote(unused_reasons={})), Rates())
    assert "not used" not in drawn(screen, 160)
