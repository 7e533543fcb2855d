"""A daemon that fills up re-encodes what `auto` stored: through sessions, over an upload, battery and a kill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from kvstore.client.client import Client
from kvstore.client.results import Hit
from kvstore.codecs.plausible import expected_bits
from kvstore.codecs.profiles import parse_profile
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.layers import KVLayer
from kvstore.metrics.exposition import exposition
from kvstore.quality import Thresholds, Verdict
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.servers import wait_until
from tests.support.sessions import client_of, patient
from tests.support.synthetic import as_numpy, make_layers, make_layout, make_namespace
from tests.test_gate import quality

LAYOUT = make_layout(layers=2, heads=2, width=64)
NAMESPACE = make_namespace(LAYOUT, "pressure")
PROMPTS = [list(range(first, first + 600)) for first in range(0, 100_000, 10_000)]
NAMED = list(range(500_000, 500_600))
PATIENCE_S = 60.0
# Power is what a file says, read at every look, and a quiet moment is short.
SEAMS = """
from pathlib import Path
from kvstore.server.policy import power
from kvstore.server.policy import pressure
pressure.QUIET_S, pressure.PAUSE_S, power.READ_EVERY_S = 0.2, 0.2, 0.0
power.read_power = lambda: Path({path!r}).read_text()
import sys
from kvstore.cli import main
sys.argv = ["kvstore", "serve", *sys.argv[1:]]
main()
"""


class Power(DaemonProcess):
    """A daemon on mains or on battery, as the test likes."""

    def __init__(self, folder: Path) -> None:
        self.power = folder / "power"
        self.power.write_text("on battery")
        super().__init__(folder / "data", profile="auto", program=SEAMS.format(path=str(self.power)))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Power]:
    """On battery at first."""
    with Power(tmp_path) as running:
        yield running


def fill(client: Client) -> None:
    """Store all prompts under `auto` and one under a name, let `compact` pass, and put the budget at the mark."""
    session = patient(client, NAMESPACE)
    for tokens in PROMPTS:
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).durable
    assert patient(client, NAMESPACE, "balanced").store(NAMED, make_layers(LAYOUT, NAMED), wait=True).durable
    await_pressure(client, "kvstore calibrate")
    bits = expected_bits(parse_profile("compact"), LAYOUT).most * 1.01
    client.record_quality(NAMESPACE, Verdict.of(quality("compact", bits_per_value=bits), Thresholds()))
    client.set("budget_bytes", str(client.stats()["disk"]["used_bytes"] * 100 // 80))


def pressure(client: Client) -> dict[str, Any]:
    """What `stats` says of it."""
    found: dict[str, Any] = client.stats()["pressure"]
    return found


def await_pressure(client: Client, reason: str) -> dict[str, Any]:
    """Wait until nothing is re-encoded for this reason; what `stats` says then."""
    wait_until(lambda: reason in pressure(client)["idle_reason"], PATIENCE_S, lambda: str(pressure(client)))
    return pressure(client)


def values(client: Client, tokens: Sequence[int], profile: str | None = None) -> list[np.ndarray]:
    """Keys and values of a hit that has all of a prompt."""
    hit = patient(client, NAMESPACE, profile).fetch([*tokens, 1])
    assert isinstance(hit, Hit) and hit.n_tokens == len(tokens), hit
    layers: Sequence[KVLayer] = hit.layers
    return [as_numpy(array, len(tokens)) for layer in layers for array in (layer.keys[0], layer.values[0])]


def off(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    """Norm of the difference / norm of the first."""
    difference = sum(float(np.square(a - b).sum()) for a, b in zip(before, after, strict=True))
    return (difference / sum(float(np.square(a).sum()) for a in before)) ** 0.5


def test_a_daemon_at_the_mark_frees_two_fifths_of_what_it_re_encodes_when_nothing_is_in_the_way(daemon: Power) -> None:
    """Battery and an open upload are; hits are right within the error that stats tell; a named store is untouched."""
    with client_of(daemon) as client, grpc.insecure_channel(daemon.listen) as channel:
        fill(client)
        before = [values(client, tokens) for tokens in PROMPTS]
        named = values(client, NAMED, "balanced")
        assert await_pressure(client, "on battery")["blocks"] == 0
        stub = rpc.KVStoreStub(channel)
        request = pb.BeginStoreRequest(
            namespace=namespace_to_message(NAMESPACE), layout=LAYOUT.record, tokens=pack_tokens([-1, *range(300)])
        )
        upload = stub.BeginStore(request, timeout=PATIENCE_S)
        daemon.power.write_text("")
        assert await_pressure(client, "under way")["blocks"] == 0
        stub.AbortStore(pb.AbortStoreRequest(upload_id=upload.upload_id), timeout=PATIENCE_S)
        found = await_pressure(client, "below")
        used = client.stats()["disk"]
        assert found["blocks"] == found["held_blocks"] > 10
        assert found["after_bytes"] <= 0.6 * found["before_bytes"]
        assert used["used_bytes"] * 100 < used["budget_bytes"] * 70 and client.stats()["evictions"] == {}
        errors = [off(old, values(client, tokens)) for old, tokens in zip(before, PROMPTS, strict=True)]
        assert 0 < max(errors) <= found["error_max"] < 0.2
        assert off(named, values(client, NAMED, "balanced")) == 0.0
        # Who asks for more is told that it is there at a lower rank.
        assert patient(client, NAMESPACE, "safe").fetch([*PROMPTS[0], 1]).reason is Reason.FIDELITY
        text = run_cli(["stats"], daemon.environ()).stdout
        assert f"{found['blocks']:,} blocks since start" in text and "re-encoding error" in text
        assert f"kvstore_reencoded_blocks_total {found['blocks']}.0" in exposition(client.stats()).decode()
        assert client.check()["findings"] == []


def test_a_kill_in_the_middle_loses_nothing(daemon: Power) -> None:
    """Every prompt is a whole hit, and the next daemon goes on."""
    with client_of(daemon) as client:
        fill(client)
        before = [values(client, tokens) for tokens in PROMPTS]
        daemon.power.write_text("")
        wait_until(lambda: pressure(client)["blocks"] > 0, PATIENCE_S, lambda: str(pressure(client)))
        daemon.kill()
    daemon.start(budget_bytes=1 << 30)
    with client_of(daemon) as client:
        found = pressure(client)
        assert 0 < found["held_blocks"] < 30
        errors = [off(old, values(client, tokens)) for old, tokens in zip(before, PROMPTS, strict=True)]
        assert 0 < max(errors) <= found["error_max"]
        client.set("budget_bytes", str(client.stats()["disk"]["used_bytes"] * 100 // 80))
        wait_until(lambda: pressure(client)["blocks"] > 0, PATIENCE_S, lambda: str(pressure(client)))
        after = await_pressure(client, "below")
        assert after["held_blocks"] == found["held_blocks"] + after["blocks"]
        assert client.check()["findings"] == []
