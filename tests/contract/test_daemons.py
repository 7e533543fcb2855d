"""What a worker may rely on, whichever daemon answers: the real one, or the fake one that tests of the client use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client.client import Client, connect
from kvstore.client.results import Hit, LayerHit, Miss
from kvstore.client.session import Session
from kvstore.client.store import Touch
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Namespace
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.checkpoints import assert_cache, make_cache
from tests.support.daemon import DaemonProcess
from tests.support.fake_daemon import FakeDaemon
from tests.support.sessions import WAYS, client_of, patient
from tests.support.synthetic import make_layout, make_namespace

NAMESPACE = make_namespace(make_layout(layers=3, heads=2, width=64), "contract")
TOKENS = list(range(1000, 1700))
OTHER = list(range(5000, 5300))
# What makes a real daemon refuse every store.
REFUSED_BY = {
    Reason.READ_ONLY: ("admission", "read-only"),
    Reason.WRITE_BUDGET: ("write_bytes_per_day_max", "1"),
    Reason.DEFERRED: ("admission", "staged"),
}


class End:
    """One daemon that holds TOKENS, raw, and a client of it. `refuse`: from now on nothing is written, for a reason."""

    def __init__(self, client: Client, address: str, refuse: Callable[[Reason], object]) -> None:
        self.client = client
        self.refuse = refuse
        self.session = self.session_of(NAMESPACE)
        self.address = address

    def session_of(self, namespace: Namespace) -> Session:
        """A patient session that takes what is exact."""
        return patient(self.client, namespace, "raw")

    def fetch(self, **fields: Any) -> list[pb.FetchReply]:
        """The messages of one fetch of TOKENS, up to the first byte or lease."""
        with grpc.insecure_channel(self.address) as channel:
            request = pb.FetchRequest(namespace=namespace_to_message(NAMESPACE), tokens=pack_tokens(TOKENS), **fields)
            call = rpc.KVStoreStub(channel).Fetch(request, timeout=30)
            found = [next(iter(call))]
            call.cancel()
            return found


@pytest.fixture(params=["fake", "real"])
def end(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[End]:
    """Each of them."""
    with ExitStack() as stack:
        if request.param == "fake":
            fake = FakeDaemon(NAMESPACE).start()
            stack.callback(fake.close)
            fake.hold(TOKENS)
            client = stack.enter_context(connect(config=fake.config()))
            yield End(client, fake.address, lambda reason: fake.faults.add(reason.value))
            return
        daemon = stack.enter_context(DaemonProcess(tmp_path / "data", profile="raw"))
        client = stack.enter_context(client_of(daemon))
        made = End(client, daemon.listen, lambda reason: client.set(*REFUSED_BY[reason]))
        assert made.session.store(TOKENS, make_cache(NAMESPACE.layout, TOKENS), wait=True).durable
        yield End(stack.enter_context(client_of(daemon)), daemon.listen, made.refuse)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_hit_is_the_common_prefix_with_the_values_of_its_tokens(end: End, way: Any) -> None:
    """By every way, within a block, at its border and beyond the end; never the last token of a prompt."""
    for prompt, shared in ((TOKENS, 699), ([*TOKENS, 7], 700), ([*TOKENS[:512], 7, 8], 512), ([*TOKENS[:300], 7], 300)):
        hit = end.session.fetch(prompt, *way)
        assert isinstance(hit, Hit), hit
        assert (hit.n_tokens, hit.source.representation, hit.source.transport) == (shared, *way)
        assert_cache(hit.layers, NAMESPACE.layout, prompt[:shared])


def test_a_match_says_what_a_fetch_gives(end: End) -> None:
    """Without a byte of it."""
    for prompt, shared in ((TOKENS, 699), ([*TOKENS, 7], 700), (OTHER, 0)):
        assert end.session.match(prompt).n_tokens == shared


def test_what_is_not_held_is_a_miss(end: End) -> None:
    """Falsy, with a reason and nothing else."""
    miss = end.session.fetch(OTHER)
    assert isinstance(miss, Miss) and not miss and (miss.n_tokens, miss.reason) == (0, Reason.UNKNOWN_PREFIX)


def test_layers_come_one_by_one(end: End) -> None:
    """The same ones."""
    for transport in ("path", "stream"):
        hit = end.session.fetch_layers([*TOKENS, 7], transport)  # type: ignore[arg-type]
        assert isinstance(hit, LayerHit) and hit.n_tokens == 700
        assert_cache(list(hit.layers), NAMESPACE.layout, TOKENS)


def test_what_is_held_is_not_stored_again(end: End) -> None:
    """Also by a session that does not know yet that it is."""
    result = end.session_of(NAMESPACE).store(TOKENS, make_cache(NAMESPACE.layout, TOKENS), wait=True)
    assert (result.stored_tokens, result.new_bytes, result.durable) == (700, 0, True)
    assert result.reason is Reason.ALREADY_STORED


def test_a_longer_prompt_is_stored_and_found(end: End) -> None:
    """Only what is new is handed over; the last word says that all of it is durable."""
    longer = [*TOKENS, *range(9000, 9100)]
    result = end.session.store(longer, make_cache(NAMESPACE.layout, longer), wait=True)
    assert (result.stored_tokens, result.reason, result.durable) == (800, Reason.OK, True)
    assert result.new_bytes > 0
    assert end.session.match([*longer, 7]).n_tokens == 800


@pytest.mark.parametrize("reason", REFUSED_BY)
def test_a_daemon_that_writes_nothing_says_why_and_serves_on(end: End, reason: Reason) -> None:
    """The store is refused before any byte is handed over, and says what is held."""
    end.refuse(reason)
    longer = [*TOKENS, *range(9000, 9100)]
    touch = Touch(7)
    result = end.session.store(longer, make_cache(NAMESPACE.layout, longer), wait=True, touch=touch)
    assert (result.stored_tokens, result.new_bytes, result.durable, result.reason) == (700, 0, False, reason)
    assert end.session.match([*longer, 7]).n_tokens == 700


@pytest.mark.parametrize("transport", ["PATH", "STREAM"])
def test_a_plan_has_the_same_fields(end: End, transport: str) -> None:
    """Blocks by their own keys, with rows that add up; files only for those who read by path."""
    [reply] = end.fetch(transport=pb.Transport.Value(f"TRANSPORT_{transport}"))
    plan = reply.plan
    assert (plan.n_tokens, plan.reason, plan.layout) == (699, "ok", NAMESPACE.layout.record)
    assert [block.n_tokens for block in plan.blocks] == [256, 256, 187]
    assert all(block.key and block.runs for block in plan.blocks) and plan.templates
    assert all(bool(block.path) == (transport == "PATH") for block in plan.blocks)
    assert not plan.HasField("checkpoint")


def test_people_are_answered_in_the_same_words(end: End) -> None:
    """Stats, namespaces and blocks have the keys that the command line prints."""
    assert end.client.stats()["daemon"]["state"] == "serving"
    [space] = end.client.list()["namespaces"]
    assert space["id"] == NAMESPACE.root.hex()
    blocks = end.client.list(NAMESPACE.root)["blocks"]
    assert len(blocks) == 3 and {block["key"] for block in blocks}
    assert end.client.show(bytes.fromhex(blocks[0]["key"]))["blocks"][0]["key"] == blocks[0]["key"]
