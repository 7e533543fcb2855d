"""The write budget and `admission` of a real daemon: live through `kvstore set`, over restarts and a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.client.client import Client, connect
from kvstore.client.results import Hit, StoreResult
from kvstore.client.session import Session
from kvstore.core.blocks import Reason
from kvstore.metrics.exposition import exposition
from kvstore.server.policy.admission import FILE
from tests.support.daemon import DaemonProcess, run_here
from tests.support.limits import small_config
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT, "admission")
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One for all tests of the module, with a budget of a GB a day: 11.6 kB a second."""
    folder = tmp_path_factory.mktemp("daemon")
    with DaemonProcess(folder / "data", profile="raw", write_bytes_per_day_max="1GB") as running:
        yield running


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    """One that takes what it sets back."""
    with connect(config=small_config(daemon.listen)) as client:
        yield client
        client.set("admission", "auto")
        client.set("write_bytes_per_day_max", "1GB")


def session_of(client: Client) -> Session:
    """A session that knows nothing of what is stored."""
    return client.session(NAMESPACE, **SLOW)


def store(client: Client, first: int) -> StoreResult:
    """Store 300 tokens from this one on."""
    tokens = list(range(first, first + 300))
    return session_of(client).store(tokens, make_layers(LAYOUT, tokens), wait=True)


def test_read_only_serves_hits_and_writes_nothing(daemon: DaemonProcess, client: Client) -> None:
    """Set live; the daemon is well, the reason is none that anything failed for, and an import is refused."""
    assert store(client, 0).durable
    client.set("admission", "read-only")
    blobs = daemon.blobs()
    result = store(client, 10_000)
    assert (result.reason, result.new_bytes, result.durable) == (Reason.READ_ONLY, 0, False)
    assert isinstance(session_of(client).fetch(range(301)), Hit)
    assert store(client, 0).reason is Reason.ALREADY_STORED
    assert daemon.blobs() == blobs and not daemon.unfinished()
    stats = client.stats()
    assert stats["daemon"]["state"] == "serving" and stats["store_reasons"]["read_only"] == 1
    client.set("admission", "always")
    assert store(client, 10_000).durable


def test_a_used_up_budget_is_a_reason_and_says_what_it_held_back(daemon: DaemonProcess, client: Client) -> None:
    """In stats, for people and for programs; raised, stores are taken at once."""
    answer = client.set("write_bytes_per_day_max", "1")
    assert (answer["before"], answer["value"]) == ("1000000000", "1")
    before, blobs = client.stats()["writes"], daemon.blobs()
    result = store(client, 20_000)
    assert (result.reason, result.stored_tokens) == (Reason.WRITE_BUDGET, 0)
    assert "write_bytes_per_day_max" in result.detail and daemon.blobs() == blobs
    stats = client.stats()
    writes = stats["writes"]
    assert (writes["day_bytes"], writes["left_bytes"]) == (1, 0)
    assert writes["held_back_stores"] == before["held_back_stores"] + 1
    assert writes["held_back_bytes"] == before["held_back_bytes"] + 300 * LAYOUT.token_bytes
    assert f"kvstore_held_back_stores_total {writes['held_back_stores']}.0" in exposition(stats).decode()
    said = run_here(["stats"], daemon.environ()).stdout
    assert "held back" in said and "write_budget" in said
    client.set("write_bytes_per_day_max", "1GB")
    assert store(client, 20_000).durable


def test_what_was_used_survives_a_restart_and_a_kill(daemon: DaemonProcess, client: Client) -> None:
    """A kill loses at most what was written since the file was: here it was written after the stores."""
    for first in range(30_000, 36_000, 300):
        assert store(client, first).durable
    daemon.restart()
    before = used(client)
    path = daemon.data_dir / "settings" / FILE
    client.set("write_bytes_per_day_max", str(before * 4))  # a hundredth of it is less than one store
    kept = path.stat().st_mtime_ns
    assert store(client, 40_000).durable
    while path.stat().st_mtime_ns == kept:
        time.sleep(0.05)
    written = used(client)
    daemon.kill()
    daemon.start()
    # Refilled meanwhile: a day's bytes by the time that passed, of the gigabyte that is configured.
    record: dict[str, Any] = json.loads(path.read_bytes())
    assert record["used_bytes"] >= written * 0.9 and written > 0
    age_s = time.time() - record["at_s"]
    assert used(client) >= record["used_bytes"] - 1e9 * (age_s + 5) / 86_400


def used(client: Client) -> int:
    """What was used of the day."""
    writes = client.stats()["writes"]
    return int(writes["day_bytes"]) - int(writes["left_bytes"])


def test_another_word_is_an_error_that_names_those_there_are(daemon: DaemonProcess) -> None:
    """With the exit code of a mistake in what was asked."""
    run = run_here(["set", "daemon", "admission=sometimes"], daemon.environ())
    assert run.returncode == 2 and "read-only" in run.stderr
