"""Whatever goes wrong between a daemon and its bucket: a shorter prefix or none, never wrong bytes, never late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.breaker import Deadline
from kvstore.core.limits import default_limits
from kvstore.errors import DeadlineError, RemoteError, RemoteFullError
from kvstore.remote import pusher
from kvstore.remote.check import check_remote
from kvstore.remote.push_queue import PushItem
from kvstore.remote.s3 import S3Store
from kvstore.remote.tier import RemoteTier
from tests.support.fault_proxy import FAULTS, FULL, FaultProxy, wait_for
from tests.support.moto_server import new_bucket, s3_server
from tests.support.remote_blobs import blobs_of, found, name_of

N_TOKENS = 3 * BLOCK_TOKENS + 40
BLOBS = blobs_of(N_TOKENS)
ITEMS = [PushItem(block.root, block.key, block.parent, len(blob)) for block, blob in BLOBS]
# Of one call. The faults take many times as long, so whoever waits for one is found out.
SHORT_S, FAULT_S = 0.4, 60.0
SLOW = ("delay", "drip")


class Place:
    """A bucket that is reached directly, and through the proxy."""

    def __init__(self, proxy: FaultProxy, endpoint: str) -> None:
        address, access = new_bucket(endpoint)
        self.direct, self.far = S3Store(address, access), S3Store(address, replace(access, endpoint=proxy.endpoint))
        self.proxy = proxy
        self.direct.mark(Deadline(60))
        held = {block.key: blob for block, blob in BLOBS}
        self.tier = RemoteTier(self.far, lambda item: [memoryview(held[item.key])], None, default_limits(), sync=False)

    def fill(self) -> None:
        """The whole prompt."""
        for block, blob in BLOBS:
            assert self.direct.create(name_of(block), [memoryview(blob)], Deadline(60))

    def found(self, limit_s: float, find_s: float | None = None) -> list[bytes]:
        """What comes of the prompt, in two calls of `limit_s` each, or the first of `find_s`."""
        return found(self.tier, N_TOKENS, limit_s, find_s=find_s)


@pytest.fixture(scope="module")
def proxy_and_endpoint() -> Iterator[tuple[FaultProxy, str]]:
    """One of each."""
    with s3_server() as endpoint, FaultProxy(endpoint) as proxy:
        yield proxy, endpoint


@pytest.fixture
def place(proxy_and_endpoint: tuple[FaultProxy, str]) -> Iterator[Place]:
    """A bucket of its own, without a fault."""
    proxy, endpoint = proxy_and_endpoint
    proxy.fault, proxy.delay_s, proxy.hits, proxy.struck = "", FAULT_S, lambda method, path: True, 0
    yield Place(proxy, endpoint)
    proxy.fault = ""


def test_without_a_fault_everything_comes_through_the_proxy(place: Place) -> None:
    """Or the tests below show nothing."""
    place.fill()
    assert place.found(60) == [blob for _, blob in BLOBS]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_read_gives_a_shorter_prefix_in_time(place: Place, fault: str, method: str) -> None:
    """Of any request, or of those for one block only: then what comes before that block is there."""
    place.fill()
    third, is_slow = name_of(BLOBS[2][0]), fault in SLOW
    for hit, before in (((lambda m, path: m == method), 0), (lambda m, path: m == method and third in path, 2)):
        place.proxy.fault, place.proxy.hits, place.proxy.struck = fault, hit, 0
        place.tier = RemoteTier(place.far, lambda item: None, None, default_limits(), sync=False)
        started_s = time.monotonic()
        # Where only the read of a block is slow, a busy machine must not be late in finding it.
        came = place.found(SHORT_S if is_slow else FAULT_S, FAULT_S if method == "GET" and before else None)
        assert time.monotonic() - started_s < FAULT_S / 2
        assert place.proxy.struck
        assert came == [blob for _, blob in BLOBS[: len(came)]]
        if method == "GET":
            assert len(came) <= before if is_slow else len(came) == before
            stats = place.tier.stats()
            assert stats.requests.failed or stats.requests.late or stats.wrong_objects
    place.proxy.fault = ""
    assert not check_remote(place.direct).findings


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_typed_error_within_the_deadline(place: Place, fault: str) -> None:
    """Of every call of the store, or it is carried out all the same."""
    place.fill()
    name = name_of(BLOBS[0][0])
    (head,) = place.direct.head([name], Deadline(60))
    assert head is not None
    place.proxy.fault = fault
    started_s = time.monotonic()
    for call in (
        lambda: place.far.head([name], Deadline(SHORT_S)),
        lambda: place.far.names("", "", Deadline(SHORT_S)),
        lambda: place.far.create("a/1", [memoryview(b"x" * 1000)], Deadline(SHORT_S)),
        lambda: place.far.delete(["a/1"], Deadline(SHORT_S)),
        lambda: place.far.require_mark(Deadline(SHORT_S)),
    ):
        with suppress(RemoteError, DeadlineError):
            call()
    assert time.monotonic() - started_s < FAULT_S / 2
    assert place.proxy.struck


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_push_leaves_a_store_that_is_clean_and_a_queue_that_goes_on(
    place: Place, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not pushed is pushed when the fault has gone; nothing is there twice, and nothing is wrong."""
    monkeypatch.setattr(pusher, "STALL_S", SHORT_S)
    monkeypatch.setattr(pusher, "_IDLE_S", 0.05)
    place.proxy.fault, place.proxy.hits = fault, lambda method, path: method == "PUT" or fault != "wrong"
    place.tier.offer(ITEMS)
    place.tier.start()
    wait_for(lambda: place.proxy.struck >= 2 or not len(place.tier.queue), "no request was struck")
    assert not check_remote(place.direct).findings
    place.proxy.fault = ""
    wait_for(lambda: not len(place.tier.queue), "the queue does not go on")
    place.tier.close(60)
    report = check_remote(place.direct)
    assert not report.findings
    assert report.objects == len(BLOBS) - sum(place.tier.stats().not_pushed.values())


@pytest.mark.parametrize("fault", FULL)
def test_a_bucket_that_is_full_stops_pushes_until_it_has_room(
    place: Place, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error of its own, however the store says it; nothing is given up, and nothing half written is there."""
    monkeypatch.setattr(pusher, "_IDLE_S", 0.05)
    place.proxy.fault, place.proxy.hits = fault, lambda method, path: method == "PUT"
    with pytest.raises(RemoteFullError, match=r"is full .*evict --remote"):
        place.far.create("a/1", [memoryview(b"x")], Deadline(60))
    place.tier.offer(ITEMS)
    place.tier.start()
    wait_for(lambda: place.tier.stats().pushes_open, "pushes go on")
    assert place.tier.stats().is_full
    assert check_remote(place.direct).objects == 0
    place.proxy.fault = ""
    wait_for(lambda: not len(place.tier.queue), "the queue does not go on")
    place.tier.close(60)
    report, stats = check_remote(place.direct), place.tier.stats()
    assert (report.findings, report.objects) == ([], len(BLOBS))
    assert (stats.is_full, stats.not_pushed) == (False, {})
