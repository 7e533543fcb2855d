"""The remote tier of a daemon: what it pushes, when it stops, and what another one finds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.blobs.format import make_ready
from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.breaker import CircuitBreaker, Deadline
from kvstore.core.keys import Namespace
from kvstore.core.limits import default_limits
from kvstore.core.remote_words import RemoteReason
from kvstore.errors import NotFoundError, RemoteError, RemoteFullError
from kvstore.remote import pusher
from kvstore.remote.object_names import Naming
from kvstore.remote.object_store import MARKER
from kvstore.remote.push_queue import SEEN_S, WAITING_MAX, Offers, PushItem, PushQueue
from kvstore.remote.pusher import TRIES_MAX
from kvstore.remote.tier import RemoteTier
from tests.support.aux_blocks import referring
from tests.support.clock import Clock
from tests.support.engine import LAYOUT, sequence
from tests.support.memory_objects import MemoryStore
from tests.support.remote_blobs import NS, blobs_of, chain_of, fill, found, name_of

N_TOKENS = 3 * BLOCK_TOKENS + 40
BLOBS = blobs_of(N_TOKENS)
LABELS = ("exact",)
ITEMS = [PushItem(block.root, block.key, block.parent, len(blob)) for block, blob in BLOBS]


def soon() -> Deadline:
    """A deadline that does not decide."""
    return Deadline(60)


def loads(blobs: Sequence[tuple[object, bytes]] = BLOBS) -> Callable[[PushItem], list[memoryview] | None]:
    """What a local store would give."""
    held = {block.key: blob for block, blob in blobs}  # type: ignore[attr-defined]
    return lambda item: [memoryview(held[item.key])] if item.key in held else None


def tier_over(store: MemoryStore, path: Path | None = None, **given: object) -> RemoteTier:
    """Not started."""
    load = given.pop("load", loads())
    return RemoteTier(store, load, path, replace(default_limits(), **given), sync=False)  # type: ignore[arg-type]


def push_all(tier: RemoteTier) -> None:
    """On this thread, until nothing waits."""
    while item := tier.queue.take(0):
        tier.pusher.push(item)


def objects(store: MemoryStore) -> dict[str, bytes]:
    """All but the marker and what is for people."""
    return {name: data for name, (_, data, _) in store.objects.items() if name != MARKER and "identity" not in name}


def test_what_is_pushed_is_what_another_daemon_finds() -> None:
    """Byte for byte, ancestors first, with an identity for people."""
    store = MemoryStore()
    tier = tier_over(store)
    tier.offer(ITEMS)
    assert len(tier.queue) == len(ITEMS)
    push_all(tier)
    assert list(objects(store)) == [name_of(block) for block, _ in BLOBS]
    assert Naming(NS.info).identity_name in store.objects
    assert found(tier_over(store), N_TOKENS, 60) == [blob for _, blob in BLOBS]
    assert tier.stats().pushes.pushed == len(ITEMS)
    assert tier.stats().requests.pushed_bytes >= sum(len(blob) for _, blob in BLOBS)
    reading = tier_over(store)
    found(reading, N_TOKENS, 60)
    assert reading.stats().requests.read_bytes == sum(len(blob) for _, blob in BLOBS)


def test_a_tenant_is_pushed_under_names_that_say_nothing() -> None:
    """And found by whoever has the salt."""
    ns = Namespace(weights=b"weights", layout=LAYOUT, dtype="F32", engine="test 1", salt=b"tenant")
    blobs = blobs_of(N_TOKENS, ns)
    store = MemoryStore()
    tier = tier_over(store, load=loads(blobs))
    tier.offer([PushItem(block.root, block.key, block.parent, len(blob)) for block, blob in blobs])
    push_all(tier)
    listing = "\n".join(store.objects)
    assert not any(key.hex() in listing for block, _ in blobs for key in (block.root, block.parent, block.key))
    assert found(tier_over(store), N_TOKENS, 60, ns) == [blob for _, blob in blobs]
    assert found(tier_over(store), N_TOKENS, 60) == []


def test_an_object_that_is_there_is_not_sent_again() -> None:
    """Two daemons store the same document. Nothing is overwritten, and a lost race is no failure."""
    store = MemoryStore()
    fill(store, BLOBS[:2])
    before = dict(store.objects)
    tier = tier_over(store)
    tier.offer(ITEMS)
    push_all(tier)
    assert all(store.objects[name] == before[name] for name in before)
    assert (tier.stats().pushes.pushed, tier.stats().pushes.present) == (2, 2)

    racing = MemoryStore()
    create = racing.create

    def lose(name: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        create(name, parts, deadline)
        return False

    racing.create = lose  # type: ignore[method-assign]
    tier = tier_over(racing)
    tier.offer(ITEMS)
    push_all(tier)
    assert tier.stats().pushes.present == len(ITEMS)
    assert not tier.stats().not_pushed


@pytest.mark.parametrize("wrong", [b"", b"not a blob at all", BLOBS[0][1], blobs_of(N_TOKENS, fidelity=100)[1][1]])
def test_a_wrong_object_stays_is_reported_and_is_passed_over(wrong: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """By whoever pushes the block, and by whoever wants it. Once another object has its name, that is asked for."""
    block, blob = BLOBS[1]
    for use in ("push", "pull"):
        store = MemoryStore()
        fill(store, BLOBS)
        store.put(name_of(block), wrong)
        tier = tier_over(store)
        if use == "push":
            tier.offer(ITEMS)
            push_all(tier)
            assert tier.stats().not_pushed == {RemoteReason.WRONG: len(ITEMS) - 1}
        else:
            assert found(tier, N_TOKENS, 60) == [BLOBS[0][1]]
        assert tier.stats().wrong_objects == 1
        assert store.objects[name_of(block)][1] == wrong
        asked = store.rounds.count("read")
        assert len(tier.finder.find(chain_of(range(N_TOKENS)), Naming(NS.info), LABELS, soon()).blocks) == 1
        assert store.rounds.count("read") == asked
        store.put(name_of(block), blob)
        assert found(tier, N_TOKENS, 60) == [blob for _, blob in BLOBS]
    assert "is wrong" in caplog.text


def test_the_queue_is_bounded_in_bytes_drops_descendants_and_holds_each_once() -> None:
    """What does not fit is counted; what waits, or is under way, is not added again."""
    queue = PushQueue(None, bytes_max=sum(item.nbytes for item in ITEMS[:2]))
    assert queue.offer(ITEMS) == ITEMS[2:]
    assert queue.offer(ITEMS[:2]) == []
    assert queue.take(0) == ITEMS[0]
    assert queue.offer(ITEMS[:1]) == []
    assert len(queue) == 2
    queue.again()
    assert queue.take(0) == ITEMS[0]._replace(tries=1)
    queue.done()
    assert queue.nbytes == ITEMS[1].nbytes
    assert queue.offer(ITEMS[:1]) == []
    assert [queue.take(0), queue.done(), queue.take(0)] == [ITEMS[1], None, ITEMS[0]]
    assert queue.drop() == [ITEMS[0].key]
    assert (len(queue), queue.nbytes, queue.take(0)) == (0, 0, None)


def test_what_waits_survives_a_restart(tmp_path: Path) -> None:
    """With what was under way, first. A damaged file is an empty queue."""
    path = tmp_path / "remote_queue"
    tier = tier_over(MemoryStore(), path)
    tier.offer(ITEMS)
    tier.queue.take(0)
    tier.close(1)
    again = tier_over(MemoryStore(), path)
    assert [again.queue.take(0) for _ in ITEMS if again.queue.done() is None] == ITEMS
    data = path.read_bytes()
    for damaged in (b"", data[:-1], data[:20] + bytes([data[20] ^ 1]) + data[21:], b"x" + data):
        path.write_bytes(damaged)
        assert len(PushQueue(path, 1 << 30)) == 0


def test_pushes_go_on_their_own_thread_and_stop_at_the_end(tmp_path: Path) -> None:
    """The rest waits in the file."""
    store, began, go = MemoryStore(), threading.Event(), threading.Event()

    def load(item: PushItem) -> list[memoryview] | None:
        if item == ITEMS[1]:
            began.set()
            go.wait(60)
        return loads()(item)

    tier = tier_over(store, tmp_path / "queue", load=load)
    tier.start()
    tier.offer(ITEMS)
    assert began.wait(60)
    closing = threading.Thread(target=tier.close, args=(60,))
    closing.start()
    go.set()
    closing.join(60)
    assert len(objects(store)) == 2
    assert len(PushQueue(tmp_path / "queue", 1 << 30)) == 2


def test_pushes_keep_to_their_rate() -> None:
    """The time between two is what the first one's bytes take at that rate."""
    blob_bytes = len(BLOBS[0][1])
    store = MemoryStore()
    tier = tier_over(store, remote_push_bytes_per_s_max=5 * blob_bytes)
    tier.offer(ITEMS[:3])
    started_s = time.monotonic()
    tier.start()
    while len(objects(store)) < 3:
        time.sleep(0.005)
    assert time.monotonic() - started_s >= 2 / 5
    tier.close(60)


def test_a_store_that_fails_stops_pushes_and_loses_none_of_them() -> None:
    """The breaker opens; while the store does not answer at all, nothing is given up."""
    store = MemoryStore()
    tier = tier_over(store)
    tier.offer(ITEMS)
    store.fail = RemoteError("gone")
    tier.start()
    while not tier.stats().pushes_open:
        time.sleep(0.005)
    assert (len(tier.queue), tier.stats().not_pushed) == (len(ITEMS), {})
    store.fail = None
    while len(tier.queue):
        time.sleep(0.01)
    assert len(objects(store)) == len(ITEMS)
    tier.close(60)


def test_a_store_that_is_full_stops_pushes_and_no_blob_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """However often it is tried. It is said once, and once when there is room again; what waits says whether it is."""
    store = MemoryStore()
    create = store.create

    def refuse(name: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        raise RemoteFullError("no room")

    store.create = refuse  # type: ignore[method-assign]
    tier = tier_over(store, load=loads([*BLOBS, *OTHER]))
    tier.offer(ITEMS)
    for _ in range(3 * TRIES_MAX):
        item = tier.queue.take(0)
        assert item == ITEMS[0]
        tier.pusher.push(item)
    stats = tier.stats()
    assert (stats.is_full, stats.pushes_open, stats.error) == (True, True, "no room")
    assert (stats.queued_blobs, stats.not_pushed) == (len(ITEMS), {})
    assert caplog.text.count("nothing is pushed any more: no room") == 1
    store.create = create  # type: ignore[method-assign]
    push_all(tier)
    assert len(objects(store)) == len(ITEMS)
    assert not tier.stats().is_full and not tier.stats().pushes_open
    store.create = refuse  # type: ignore[method-assign]
    tier.offer(OTHER_ITEMS[:1])
    assert tier.queue.take(0)
    tier.pusher.push(OTHER_ITEMS[0])
    assert tier.stats().is_full
    tier.queue.take(0)
    tier.queue.done()
    assert not tier.stats().is_full


def refusing(store: MemoryStore, name: str) -> None:
    """A store that takes all but one object."""
    create = store.create

    def refuse(asked: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        if asked == name:
            raise RemoteError("too large")
        return create(asked, parts, deadline)

    store.create = refuse  # type: ignore[method-assign]


OTHER = blobs_of(N_TOKENS, first=70_000)
OTHER_ITEMS = [PushItem(block.root, block.key, block.parent, len(blob)) for block, blob in OTHER]


def test_a_blob_that_the_store_refuses_is_given_up_with_all_that_builds_on_it() -> None:
    """After a few tries. What does not build on it is not held up."""
    store = MemoryStore()
    refusing(store, name_of(BLOBS[1][0]))
    tier = tier_over(store, load=loads([*BLOBS, *OTHER]))
    tier.offer(ITEMS)
    tier.offer(OTHER_ITEMS)
    push_all(tier)
    assert set(objects(store)) == {name_of(block) for block, _ in (BLOBS[0], *OTHER)}
    assert tier.stats().not_pushed == {RemoteReason.FAILED: len(ITEMS) - 1}
    assert store.rounds.count("head") == 1 + TRIES_MAX + len(OTHER)
    assert (len(tier.queue), tier.queue.nbytes) == (0, 0)


def test_after_trouble_a_store_is_not_asked_while_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may bill every request."""
    monkeypatch.setattr(pusher, "_IDLE_S", 0.01)
    store = MemoryStore()
    refusing(store, name_of(BLOBS[0][0]))
    tier = tier_over(store)
    tier.pusher.breaker = CircuitBreaker(failures_max=100)
    take, taken = tier.queue.take, list[PushItem | None]()

    def counted(timeout_s: float) -> PushItem | None:
        taken.append(take(timeout_s))
        return taken[-1]

    monkeypatch.setattr(tier.queue, "take", counted)
    tier.offer(ITEMS[:1])
    tier.start()
    while not tier.stats().not_pushed:
        time.sleep(0.005)
    asked, before = len(store.rounds), len(taken)
    while len(taken) < before + 5:
        time.sleep(0.005)
    assert len(store.rounds) == asked
    tier.close(60)


def test_what_builds_on_a_block_that_was_not_pushed_is_not_queued_later() -> None:
    """Until that block is looked at again: then all of it goes."""
    store, clock = MemoryStore(), Clock(0.0)
    tier = tier_over(store)
    tier.offers = tier.pusher._offers = offers = Offers(tier.queue, clock)
    load, tier.pusher._load = tier.pusher._load, lambda item: None
    tier.offer(ITEMS[:1])
    push_all(tier)
    tier.pusher._load = load
    tier.offer(ITEMS)
    assert len(tier.queue) == 0
    assert offers.not_pushed == {RemoteReason.GONE: len(ITEMS)}
    clock.now_s += SEEN_S
    tier.offer(ITEMS)
    push_all(tier)
    assert len(objects(store)) == len(ITEMS)


def test_what_was_looked_at_a_short_while_ago_is_not_queued_again() -> None:
    """Neither what was pushed, nor what was read from there. The blocks before that are."""
    tier = tier_over(MemoryStore())
    tier.offers.want([ITEMS[0].key])
    assert [tier.offers.next(), tier.offers.next()] == [ITEMS[0].key, None]
    tier.offers.note_present([item.key for item in ITEMS[2:]])
    tier.offers.want([item.key for item in ITEMS[2:]])
    assert [tier.offers.next() for _ in ITEMS] == [ITEMS[2].key, ITEMS[3].key, None, None]
    tier.offer(ITEMS)
    tier.offers.want([item.key for item in ITEMS])
    assert tier.offers.next() is None
    assert [tier.queue.take(0) for _ in ITEMS[:2] if tier.queue.done() is None] == ITEMS[:2]
    assert tier.queue.take(0) is None
    tier.offer(ITEMS)
    assert len(tier.queue) == 1
    assert tier.stats().not_pushed == {}


def test_a_chain_that_is_wanted_again_keeps_its_place_among_those_that_wait() -> None:
    """What is fetched all the time would else be looked through last."""
    tier = tier_over(MemoryStore())
    tier.offers.want([item.key for item in ITEMS[:3]])
    tier.offers.want([ITEMS[0].key])
    assert tier.offers.next() == ITEMS[0].key


def test_chains_that_are_forgotten_before_they_are_looked_through_are_counted() -> None:
    """The oldest, where more are wanted at once than may wait."""
    tier = tier_over(MemoryStore())
    keys = [number.to_bytes(32, "big") for number in range(WAITING_MAX + 3)]
    tier.offers.want(keys)
    tier.offers.want(keys[3:])
    assert tier.stats().not_pushed == {RemoteReason.QUEUE_FULL: 3}
    assert tier.offers.next() == keys[3]


def test_what_does_not_fit_in_the_queue_is_counted_with_all_that_builds_on_it() -> None:
    """And is not queued behind the hole when there is room again."""
    tier = tier_over(MemoryStore(), remote_queue_bytes_max=ITEMS[0].nbytes)
    tier.offer(ITEMS[:3])
    push_all(tier)
    tier.offer(ITEMS)
    assert len(tier.queue) == 0
    assert tier.stats().not_pushed == {RemoteReason.QUEUE_FULL: len(ITEMS) - 1}


def test_nothing_is_queued_behind_a_block_that_is_dropped_at_the_same_moment() -> None:
    """One thread drops a block while another queues what builds on it."""
    tier = tier_over(MemoryStore())
    tier.offer(ITEMS[:1])
    tier.queue.take(0)
    queue_offer = tier.queue.offer
    dropping = threading.Thread(target=tier.offers.drop, args=(RemoteReason.GONE,))

    def offer(items: Iterable[PushItem]) -> list[PushItem]:
        dropping.start()
        dropping.join(0.1)
        return queue_offer(items)

    tier.queue.offer = offer  # type: ignore[method-assign]
    tier.offer(ITEMS)
    dropping.join(60)
    assert len(tier.queue) == 0
    assert tier.stats().not_pushed == {RemoteReason.GONE: len(ITEMS)}


def test_a_block_that_was_re_encoded_with_a_basis_while_it_waited_is_not_pushed() -> None:
    """The remote store has no bases. It is counted as such, with what builds on it, and not as a failure."""
    blobs = []
    for new in sequence(NS, range(N_TOKENS)):
        one = referring(new, b"d" * 32)
        ready = make_ready(replace(one.block, namespace=NS.to_record()), one.buffers)
        blobs.append((ready.block, ready.header + b"".join(ready.payload)))
    store = MemoryStore()
    tier = tier_over(store, load=loads([BLOBS[0], blobs[1], *BLOBS[2:]]))
    tier.offer(ITEMS)
    push_all(tier)
    assert list(objects(store)) == [name_of(BLOBS[0][0])]
    assert tier.stats().not_pushed == {RemoteReason.NEEDS_BASIS: len(ITEMS) - 1}
    assert not len(tier.queue)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("evicted", RemoteReason.GONE), ("not found", RemoteReason.FAILED), ("damaged", RemoteReason.FAILED)],
)
def test_what_is_evicted_encrypted_or_damaged_before_its_turn_is_not_pushed(what: str, reason: RemoteReason) -> None:
    """The first two are gone, the last is refused. The store is not taken for one that fails."""

    def load(item: PushItem) -> list[memoryview] | None:
        if what == "evicted":
            return None
        if what == "not found":
            raise NotFoundError("evicted")
        return [memoryview(BLOBS[0][1][:-1] + b"\0")]

    store = MemoryStore()
    tier = tier_over(store, load=load)
    tier.offer(ITEMS)
    push_all(tier)
    assert objects(store) == {}
    assert tier.stats().not_pushed == {reason: len(ITEMS)}
    assert not tier.stats().pushes_open
