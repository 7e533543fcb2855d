"""Two daemons with a remote tier between them: what one stores the other restores, and no fault of it is an error."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.client import Client
from kvstore.client.results import Hit
from kvstore.core.keys import Namespace
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.sessions import Rows, assert_same, client_of, hit_rows, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=4, heads=2, width=64)
# Slow enough that restoring is worth it on any machine.
SLOW = 20.0
TOKENS = list(range(1500))
DONE_S = 60.0


def wait_for(what: Callable[[], bool]) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + DONE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def remote_of(client: Client) -> dict[str, Any]:
    """What Stats says of the tier."""
    found: dict[str, Any] = client.stats()["remote"]
    return found


def wait_serving(client: Client) -> None:
    """Wait until the tier answers."""
    wait_for(lambda: remote_of(client)["state"] == "serving")


def fetched(client: Client, namespace: Namespace, tokens: Sequence[int] = TOKENS) -> Any:
    """The answer to a caller that computes slowly."""
    return patient(client, namespace).fetch(tokens, prefill_tokens_per_s=SLOW)


def pushed(client: Client, namespace: Namespace, tokens: Sequence[int] = TOKENS) -> Rows:
    """Store a prompt, ask for it again, and wait until it was pushed; what the fetch gave."""
    wait_serving(client)
    before = remote_of(client)["pushed_blobs"]
    assert patient(client, namespace).store(tokens, make_layers(LAYOUT, tokens), wait=True).durable
    hit = fetched(client, namespace, tokens)
    assert isinstance(hit, Hit)
    blobs = -(-len(tokens) // 256)
    wait_for(lambda: remote_of(client)["pushed_blobs"] >= before + blobs)
    return hit_rows(hit)


@contextmanager
def pair(tmp_path: Path, **config: object) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Two daemons that share a folder which is marked."""
    remote = f"file://{tmp_path / 'share'}"
    one = DaemonProcess(tmp_path / "one", remote=remote)
    other = DaemonProcess(tmp_path / "other", remote=remote, **config)
    assert run_cli(["config", "remote-init"], one.environ()).returncode == 0
    with one, other:
        yield one, other


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """A pair that tests share; each has a namespace of its own."""
    with pair(tmp_path_factory.mktemp("pair")) as found:
        yield found


def test_what_one_stores_the_other_restores_bit_by_bit_also_after_both_restart(tmp_path: Path) -> None:
    """By file, since what was read lies in its own directory then; and nothing is read twice."""
    namespace = make_namespace(LAYOUT, "shared-lm")
    with pair(tmp_path) as (one, other):
        with client_of(one) as client:
            want = pushed(client, namespace)
        for daemon in (one, other):
            daemon.stop()
            daemon.start()
        with client_of(other) as client:
            wait_serving(client)
            session = patient(client, namespace)
            assert session.match(TOKENS, prefill_tokens_per_s=SLOW).n_tokens == len(TOKENS) - 1
            hit = fetched(client, namespace)
            assert (hit.n_tokens, hit.source.transport) == (len(TOKENS) - 1, "path")
            assert_same(hit_rows(hit), want, LAYOUT)
            moved = remote_of(client)
            assert (moved["hits"], moved["hit_tokens"]) == (1, len(TOKENS) - 1)
            assert client.stats()["since_start"]["remote_tokens"] == len(TOKENS) - 1
            (row,) = json.loads(run_cli(["why", "--last", "1", "--json"], other.environ()).stdout)["found"]
            assert row["remote"] == "hit"
            again = fetched(client, namespace)
            assert_same(hit_rows(again), want, LAYOUT)
            assert remote_of(client)["read_bytes"] == moved["read_bytes"]
