"""Caches with window and state layers against a real daemon in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client.client import Client, connect
from kvstore.client.results import Hit
from kvstore.client.session import Session
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.layers import Layout
from tests.support.checkpoints import (
    assert_cache,
    checkpoint_place,
    hybrid_layout,
    make_cache,
    pure_layout,
    state_bytes,
)
from tests.support.daemon import DaemonProcess
from tests.support.limits import small_config
from tests.support.synthetic import make_namespace

TOKENS = list(range(1000, 1700))
WAYS = (("packed", "path"), ("packed", "stream"), ("dense", "stream"))
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}
LAYOUTS = {"hybrid": hybrid_layout(), "pure": pure_layout()}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon on an empty directory, at its default profile."""
    with DaemonProcess(tmp_path / "data") as running:
        yield running


def client_of(daemon: DaemonProcess) -> Client:
    """A client whose limits do not decide a test."""
    return connect(config=small_config(daemon.listen))


def store(session: Session, layout: Layout, tokens: list[int]) -> None:
    """Store a cache of these tokens, checkpoint included."""
    result = session.store(tokens, make_cache(layout, tokens), wait=True)
    assert (result.stored_tokens, result.reason, result.durable) == (len(tokens), Reason.OK, True)


def check(session: Session, layout: Layout, prompt: list[int], n_tokens: int, reason: Reason) -> None:
    """Every way of fetching gives the cache at this position, or none."""
    for representation, transport in WAYS:
        answer = session.fetch(prompt, representation, transport)  # type: ignore[arg-type]
        assert (answer.n_tokens, answer.reason) == (n_tokens, reason)
        if n_tokens:
            assert isinstance(answer, Hit)
            assert (answer.source.transport, answer.source.representation) == (transport, representation)
            assert_cache(answer.layers, layout, prompt[:n_tokens])


@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpoints_survive_a_restart_and_serve_exact_positions_only(daemon: DaemonProcess, name: str) -> None:
    """Stored at three positions by one client, fetched by another; between them the next lower one answers."""
    layout = LAYOUTS[name]
    namespace = make_namespace(layout)
    with client_of(daemon) as writer:
        session = writer.session(namespace, "raw", **SLOW)
        for n_tokens in (40, 512, 700):
            store(session, layout, TOKENS[:n_tokens])
    daemon.restart()
    with client_of(daemon) as reader:
        session = reader.session(namespace, "raw", **SLOW)
        check(session, layout, [*TOKENS, 5], 700, Reason.OK)
        check(session, layout, TOKENS, 512, Reason.NO_CHECKPOINT)
        check(session, layout, [*TOKENS[:512], 9, 9], 512, Reason.UNKNOWN_PREFIX)
        check(session, layout, [*TOKENS[:300], 9, 9], 40, Reason.NO_CHECKPOINT)
        check(session, layout, TOKENS[:30], 0, Reason.NO_CHECKPOINT)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_is_added_where_the_tokens_are_held(daemon: DaemonProcess, name: str) -> None:
    """At a position inside what was stored without one: only the states are written, and only once."""
    layout = LAYOUTS[name]
    with client_of(daemon) as client:
        session = client.session(make_namespace(layout), "raw", **SLOW)
        early = make_cache(layout, TOKENS, states_at=600)
        if name == "hybrid":
            assert session.store(TOKENS, early, wait=True).reason is Reason.NO_CHECKPOINT
            assert session.fetch(TOKENS).reason is Reason.NO_CHECKPOINT
        else:
            store(session, layout, TOKENS)
        store(session, layout, TOKENS[:600])
        again = client.session(make_namespace(layout), "raw", **SLOW)
        result = again.store(TOKENS[:600], make_cache(layout, TOKENS[:600]), wait=True)
        assert (result.reason, result.new_bytes) == (Reason.ALREADY_STORED, 0)
        check(session, layout, TOKENS, 600, Reason.NO_CHECKPOINT)


def test_a_loop_of_thirty_calls_keeps_few_checkpoints_and_its_hits(daemon: DaemonProcess) -> None:
    """Every call continues where the one before it ended; then the thinking of all calls is stripped, and it hits."""
    layout = LAYOUTS["hybrid"]
    asked, thinking, call = TOKENS[:300], list(range(9000, 9150)), list(range(8000, 8040))
    with client_of(daemon) as client:
        session = client.session(make_namespace(layout), "raw", **SLOW)
        loop = list(asked)
        store(session, layout, loop)
        for turn in range(30):
            assert session.match([*loop, -1, -1]).n_tokens == len(loop)
            loop += [turn, *thinking, *call]
            store(session, layout, loop)
        disk = client.stats()["disk"]
        assert disk["checkpoints"] <= 8
        stripped = [*asked, *(token for turn in range(30) for token in (turn, *call))]
        check(session, layout, stripped, 300, Reason.NO_CHECKPOINT)


def test_states_are_exact_whatever_the_profile(daemon: DaemonProcess) -> None:
    """Quantized tokens beside them; a session that asks for exact tokens gets none of it."""
    layout = LAYOUTS["hybrid"]
    namespace = make_namespace(layout)
    with client_of(daemon) as client:
        store(client.session(namespace, "affine4", **SLOW), layout, TOKENS)
        hit = client.session(namespace, **SLOW).fetch([*TOKENS, 5])
        assert isinstance(hit, Hit)
        assert state_bytes(hit.layers) == state_bytes(make_cache(layout, TOKENS))
        assert not client.session(namespace, "raw", **SLOW).fetch([*TOKENS, 5])


def test_a_damaged_checkpoint_gives_the_next_lower_one_and_goes_to_quarantine(daemon: DaemonProcess) -> None:
    """The daemon hears of it and does not offer it again."""
    layout = LAYOUTS["hybrid"]
    namespace = make_namespace(layout)
    key, _, _ = checkpoint_place(namespace.root, pack_tokens(TOKENS))
    with client_of(daemon) as client:
        session = client.session(namespace, "raw", **SLOW)
        store(session, layout, TOKENS[:600])
        store(session, layout, TOKENS)
        (path,) = (one for one in daemon.blobs() if one.name.startswith(key.hex()))
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        hit = session.fetch([*TOKENS, 5])
        assert (hit.n_tokens, hit.reason) == (600, Reason.CORRUPT)
        assert session.flush(60)
        check(session, layout, [*TOKENS, 5], 600, Reason.NO_CHECKPOINT)
        assert client.stats()["disk"]["quarantined"] == 1


def test_what_a_worker_cannot_offer_is_seen_in_the_daemons_statistics(daemon: DaemonProcess) -> None:
    """People ask the daemon why nothing is stored; only the worker knows."""
    with client_of(daemon) as client:
        client.count_refusal(Reason.UNSUPPORTED_LAYER)
        deadline = time.monotonic() + 120
        while "unsupported_layer" not in client.stats()["store_reasons"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.stats()["store_reasons"] == {"unsupported_layer": 1}
