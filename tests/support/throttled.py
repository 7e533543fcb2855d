"""Time to first token of prompts that only the other daemon has, over a link that is throttled.

The worker is one that computes `rate` tokens a second: it says so, as workers do, and what the fetch does not give it
is counted at that speed. The fetch is timed, from the call until every byte is in its arrays, hit or miss.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore.client.client import Client
from kvstore.core.layers import Layout
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.fault_proxy import FaultProxy, wait_for
from tests.support.moto_server import new_bucket, s3_server
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_namespace

# Pushing is not what is timed.
FAST_PUSHES = {"remote_push_bytes_per_s_max": 1 << 30}


@dataclass(frozen=True, slots=True)
class FirstToken:
    """One request. `local`: tokens that were here before it. `ratio`: to computing all of the prompt."""

    n_tokens: int
    rate: float
    local: int
    restored: int
    fetch_s: float

    @property
    def cold_s(self) -> float:
        """Computing all of it."""
        return self.n_tokens / self.rate

    @property
    def ratio(self) -> float:
        """Fetching and computing the rest, beside that."""
        return (self.fetch_s + (self.n_tokens - self.restored) / self.rate) / self.cold_s


class Throttled:
    """A daemon that has pushed a prompt (`far`), and another at the other end of the link (`near`)."""

    def __init__(self, layout: Layout, n_tokens: int, far: Client, near: Client) -> None:
        self.tokens = list(range(n_tokens))
        self._namespace = make_namespace(layout, "throttled-lm")
        self._near = near
        self._push(far)

    def _push(self, far: Client) -> None:
        wait_for(lambda: far.stats()["remote"]["state"] == "serving", "the tier does not serve")
        session = patient(far, self._namespace)
        assert session.store(self.tokens, make_layers(self._namespace.layout, self.tokens), wait=True).durable
        assert session.fetch([*self.tokens, -1])
        blobs = -(-len(self.tokens) // 256)
        wait_for(lambda: far.stats()["remote"]["pushed_blobs"] == blobs, "the prompt is not pushed", 300)

    def first_token(self, n_tokens: int, rate: float, local: int = 0) -> FirstToken:
        """Ask for the first `n_tokens`, of which `local` are here, with the limits that workers have by default."""
        if self._near.stats()["disk"]["blobs"]:
            self._near.evict(all=True)
        if local:
            here = self.tokens[:local]
            layers = make_layers(self._namespace.layout, here)
            assert patient(self._near, self._namespace).store(here, layers, wait=True).durable
        session = self._near.session(self._namespace)
        session.match(self.tokens[:2])  # a connection is there
        started_s = time.perf_counter()
        restored = session.fetch(self.tokens[:n_tokens], prefill_tokens_per_s=rate).n_tokens
        return FirstToken(n_tokens, rate, local, restored, time.perf_counter() - started_s)

    def await_measured(self) -> None:
        """Until the daemon has looked at how fast the link is, as it does before any request."""
        wait_for(lambda: self._near.stats()["remote"]["bytes_per_s"] > 0, "the link was not measured")


@contextlib.contextmanager
def throttled(folder: Path, layout: Layout, n_tokens: int, bytes_per_s: float, profile: str) -> Iterator[Throttled]:
    """Both daemons, the bucket and a link of this rate, on ports of this host."""
    with s3_server() as endpoint, FaultProxy(endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        address, access = new_bucket(endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", access.access_key_id)
        patch.setenv("AWS_SECRET_ACCESS_KEY", access.secret_access_key)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        given = {"remote": str(address), "profile": profile, "fetch_total_ms": "5000"}
        far = DaemonProcess(folder / "far", limits=FAST_PUSHES, **given)
        assert run_cli(["config", "remote-init"], far.environ()).returncode == 0
        with far, client_of(far) as writer:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            proxy.bytes_per_s = bytes_per_s
            near = DaemonProcess(folder / "near", **given)
            with near, client_of(near, fetch_total_ms=5000) as client:
                yield Throttled(layout, n_tokens, writer, client)
