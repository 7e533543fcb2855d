"""Public objects that are dropped without `close`: threads end, connections go, and stores go through."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from kvstore.client.client import Client
from kvstore.core.blocks import Reason
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from tests.support.daemon import DaemonProcess
from tests.support.fake_daemon import FakeDaemon
from tests.support.limits import make_config
from tests.support.models import build_tiny, fill, write_tiny
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=2, width=64)
TOKENS = list(range(600))
LAYERS = make_layers(LAYOUT, TOKENS)
SOON_S = 60.0


def held() -> tuple[set[int], set[str]]:
    """Threads of kvstore's and descriptors of sockets in this process."""
    gc.collect()
    threads = {one.native_id or 0 for one in threading.enumerate() if one.name == "kvstore-sender"}
    sockets = set()
    for fd in os.listdir("/dev/fd"):
        try:
            target = os.readlink(f"/dev/fd/{fd}")
        except OSError:
            continue
        sockets |= {target} if target.startswith("socket:") else set()
    return threads, sockets


def settled() -> tuple[set[int], set[str]]:
    """The same, when it has not changed for a second and no session's thread is left."""
    now, since = held(), time.monotonic()
    deadline = since + SOON_S
    while time.monotonic() < deadline and (now[0] or time.monotonic() < since + 1.0):
        time.sleep(0.05)
        if (later := held()) != now:
            now, since = later, time.monotonic()
    return now


def eventually_within(before: tuple[set[int], set[str]]) -> None:
    """Assert that nothing is left of what was dropped."""
    deadline = time.monotonic() + SOON_S
    while any(left := tuple(now - then for now, then in zip(held(), before, strict=True))):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model."""
    return str(write_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory, folder: str) -> WeightsDigest:
    """With the model known."""
    known = WeightsDigest(tmp_path_factory.mktemp("digests"))
    assert known.wait(folder, SOON_S)
    return known


def use_client(client: Client, folder: str, digests: WeightsDigest) -> Any:
    """A client that asked for something: admin verbs leave no connection, what workers ask does."""
    assert client.stats()["daemon"]["pid"]
    client._connection.ensure(SOON_S)
    return client


def use_session(client: Client, folder: str, digests: WeightsDigest) -> Any:
    """A session that stored and fetched; its client is dropped before it."""
    session = patient(client, make_namespace(LAYOUT))
    del client
    assert session.store(TOKENS, LAYERS, wait=True).stored_tokens == len(TOKENS)
    assert session.fetch(TOKENS)
    return session


def use_model_store(client: Client, folder: str, digests: WeightsDigest) -> Any:
    """A ModelStore that stored a cache."""
    model = build_tiny()
    store = ModelStore(client, digests)
    store.pin(folder)
    store.store((folder, None, None), TOKENS[:300], fill("llama", model, TOKENS[:300]))
    assert store.flush(SOON_S)
    return store


def use_prompt_cache(client: Client, folder: str, digests: WeightsDigest) -> Any:
    """A PromptCache that a server filled."""
    cache = kv.PromptCache(store=ModelStore(client, digests))
    tokens = [one + 1 for one in TOKENS[:300]]
    cache.insert_cache((folder, None, None), tokens, fill("llama", build_tiny(), tokens))
    return cache


def use_refused(client: Client, folder: str, digests: WeightsDigest) -> Any:
    """A PrefixStore that was given a cache without tokens, and said so."""
    model = build_tiny()
    store = kv.PrefixStore(folder, client.config.listen, digests=digests)
    with store.prefix(model, TOKENS[:300]) as (_, rest):
        assert rest
    return store


def use_prefix_store(client: Client, folder: str, digests: WeightsDigest) -> Any:
    """A PrefixStore that stored what a program computed."""
    model = build_tiny()
    store = kv.PrefixStore(folder, client.config.listen, digests=digests)
    with store.prefix(model, TOKENS[:300]) as (cache, rest):
        mx.eval(model(mx.array([rest]), cache=cache))
    return store


@pytest.mark.parametrize(
    "use",
    [use_client, use_session, use_model_store, use_prompt_cache, use_prefix_store, use_refused],
    ids=lambda use: use.__name__,
)
def test_dropping_an_object_returns_its_threads_and_descriptors(
    shared_daemon: DaemonProcess, folder: str, digests: WeightsDigest, use: Callable[..., Any]
) -> None:
    """Without `close`: nothing waits, and soon threads and sockets are those from before."""
    use(client_of(shared_daemon), folder, digests)  # what a process makes once and keeps, such as gRPC's own
    before = settled()
    made = [use(client_of(shared_daemon), folder, digests) for _ in range(3)]
    assert held()[1] - before[1]
    made.clear()
    eventually_within(before)


def test_stores_that_were_queued_go_through_before_the_thread_ends(shared_daemon: DaemonProcess) -> None:
    """Dropped right after a store that did not wait."""
    namespace = make_namespace(LAYOUT, "queued")
    session = patient(client_of(shared_daemon), namespace)
    for n_tokens in (300, 400, 600):
        assert session.store(TOKENS[:n_tokens], make_layers(LAYOUT, TOKENS[:n_tokens])).reason is Reason.OK
    del session
    with client_of(shared_daemon) as client:
        again, deadline = patient(client, namespace), time.monotonic() + SOON_S
        while again.match(TOKENS).n_tokens < len(TOKENS) - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert again.match(TOKENS).n_tokens == len(TOKENS) - 1


def test_a_daemon_that_hangs_does_not_keep_a_dropped_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was queued is dropped after a while, and what is under way ends at its own limit."""
    monkeypatch.setattr("kvstore.client.background.RETIRE_S", 0.2)
    monkeypatch.setattr("kvstore.client.uploader.BEGIN_S", 1.0)
    fake = FakeDaemon(make_namespace(LAYOUT)).start()
    try:
        client = Client(make_config(listen=fake.address, min_prefix_tokens=1))
        session = client.session(fake.namespace)
        fake.faults = {"hang_begin"}
        jobs = [session.store([number, *TOKENS], make_layers(LAYOUT, [number, *TOKENS])) for number in range(5)]
        assert all(job.reason is Reason.OK for job in jobs)
        budget = client._budget
        del session, client
        deadline = time.monotonic() + SOON_S
        while (budget.used_bytes or held()[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (budget.used_bytes, held()[0]) == (0, set())
        assert len(fake.uploads) <= 1
    finally:
        fake.close()
