"""A worker far from its daemon: TLS over a link whose round trip is longer than a fetch waits for a connection."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.client.client import Client, connect
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.core.blocks import Reason
from kvstore.core.limits import Limits
from tests.e2e.test_access import LAYOUT, NAMESPACE, TOKENS, serving, started, tls
from tests.support.proxy import SlowProxy
from tests.support.servers import wait_until
from tests.support.synthetic import make_layers

__all__ = ["tls"]

DELAY_S = 0.05  # each way
OUTAGE_S = 12.0
# The connection's limit is the default of 50 ms; the others are not what is tested.
LIMITS = {"stall_ms": 30_000, "total_ms": 60_000}


@pytest.fixture
def proxy(tmp_path_factory: pytest.TempPathFactory, tls: Path) -> Iterator[SlowProxy]:
    """A slow link to a daemon that is asked for a token."""
    with started(serving(tmp_path_factory, tls / "daemon"), tls) as daemon:
        made = SlowProxy(int(daemon.listen.rpartition(":")[2]), DELAY_S)
        yield made
        made.cut()


@pytest.fixture
def client(proxy: SlowProxy, tls: Path) -> Iterator[Client]:
    """A client at its other end."""
    listen, limits = f"127.0.0.1:{proxy.port}", Limits(min_prefix_tokens=1)
    config = Config(listen=listen, tls_dir=str(tls / "worker"), limits=limits)
    with connect(config=config) as made:
        yield made


def is_hit(session: Session) -> bool:
    """Whether the stored prompt is fetched now; the pause is that between two requests."""
    time.sleep(0.2)
    return bool(session.fetch(TOKENS))


def test_after_an_outage_a_slow_link_is_used_again(proxy: SlowProxy, client: Client) -> None:
    """Requests go on during the outage, as they do in life; afterwards they hit, all of a wave, and stores are kept."""
    session = client.session(NAMESPACE, "raw", **LIMITS)  # type: ignore[arg-type]
    assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
    wait_until(lambda: is_hit(session), 60, lambda: "no hit over a slow link")
    proxy.cut()
    back_at = time.monotonic() + OUTAGE_S
    while time.monotonic() < back_at:
        assert not is_hit(session)
    proxy.mend()
    wait_until(lambda: is_hit(session), 60, lambda: f"no hit after the outage: {session.stats.misses}")
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(lambda _: bool(session.fetch(TOKENS)), range(16)))
    more = [*TOKENS, 7]
    assert session.store(more, make_layers(LAYOUT, more), wait=True).durable


def test_a_store_waits_for_an_answer_that_a_fetch_does_not_wait_for(proxy: SlowProxy, client: Client) -> None:
    """What fetches miss for want of an answer refuses no store: only a check that has failed does."""
    session = client.session(NAMESPACE, "raw", connect_ms=0, **LIMITS)  # type: ignore[arg-type]
    reasons = {session.fetch(TOKENS).reason for _ in range(8)}
    assert reasons <= {Reason.UNAVAILABLE, Reason.CIRCUIT_OPEN}
    assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
