"""What holds of eviction whatever the policy: each was once a bug of a cache like this one.

That limits hold and chains have no holes, in any order of events, is in `test_terms.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvstore.bench.eviction import ALWAYS, BLOCK_BYTES, STAGED, LogicalBlobs, TraceRequest, replay
from kvstore.core.blocks import Reason
from kvstore.core.keys import Namespace
from kvstore.engine import Engine
from kvstore.engine.evict import Evictor
from tests.support.clock import Clock
from tests.support.engine import find, namespace, options, put, sequence

NS, SMALL = namespace(), namespace("small")
# Blocks that the engine of these tests has room for. Each counts as 4 MB, so that its index hardly does.
ROOM = 40


@pytest.fixture
def clock() -> Clock:
    """Stands until it is moved."""
    return Clock()


@pytest.fixture
def engine(tmp_path: Path, clock: Clock) -> Iterator[Engine]:
    """An engine with room for forty blocks in memory."""
    limits = options(budget_bytes=(ROOM + 1) * BLOCK_BYTES - 1, durability="none")
    with Engine.open(tmp_path / "data", limits, clock=clock, blobs=LogicalBlobs()) as opened:
        yield opened


def prompt(number: int, n_tokens: int = 256) -> list[int]:
    """Tokens that no other prompt begins with."""
    return [number, *range(n_tokens - 1)]


def hit(engine: Engine, tokens: Sequence[int], ns: Namespace = NS) -> int:
    """A fetch of a prompt: how many tokens it finds."""
    match = find(engine, ns, tokens)
    engine.touch(match.slices, fetched=True)
    return match.n_tokens


def ask(engine: Engine, tokens: Sequence[int], ns: Namespace = NS) -> bool:
    """A request of a worker: what is found is used, the rest is stored; whether all of it was found."""
    is_hit = hit(engine, tokens, ns) == len(tokens)
    put(engine, ns, tokens)
    return is_hit


def test_a_prefix_that_was_stored_in_several_calls_and_then_extended_evicts_its_tail_first(engine: Engine) -> None:
    """Its first blocks were stored, and used, long before the last; they never go before them."""
    long = prompt(1, 6 * 256)
    for blocks in (1, 2, 4, 6):
        put(engine, NS, long[: 256 * blocks])
        for number in range(3):
            put(engine, NS, prompt(100 * blocks + number))
    hit(engine, long[:256])
    left = [6 * 256]
    for number in range(1000, 1200):
        put(engine, NS, prompt(number))
        if (now := find(engine, NS, long).n_tokens) != left[-1]:
            left.append(now)
    # From the end, and never a hole: one that had begun from the front would have lost everything at once.
    assert left == sorted(left, reverse=True) and left[-1] == 0
    assert len(left) >= 3 and 256 in left


def test_what_is_new_is_never_older_than_what_was_read_before(engine: Engine) -> None:
    """Reads noted in memory, and not yet written, count for the order too."""
    for number in range(45):
        put(engine, NS, prompt(number))
    kept = [number for number in range(45) if find(engine, NS, prompt(number)).n_tokens]
    for number in kept:
        hit(engine, prompt(number))
    put(engine, NS, prompt(1000))
    for number in range(2000, 2005):
        put(engine, NS, prompt(number))
        assert find(engine, NS, prompt(1000)).n_tokens == 256
    table = engine._shared.index.table
    newest = table.value(find(engine, NS, prompt(2004)).slices[0].row.key, "last_use")
    read = [row.slices[0].row.key for number in kept if (row := find(engine, NS, prompt(number))).n_tokens]
    assert read and all(table.value(key, "last_use") < newest for key in read)


def test_hits_count_and_a_burst_within_a_second_counts_once(engine: Engine, clock: Clock) -> None:
    """Ten sub-agents with one prompt are one use of it, however the notes are written in between."""
    tokens = prompt(1)
    put(engine, NS, tokens)
    [part] = find(engine, NS, tokens).slices

    def hits() -> int:
        engine._shared.flush_uses()
        return engine._shared.index.table.value(part.row.key, "hits")

    assert hits() == 0
    for burst in (1, 2, 3):
        for agent in range(10):
            hit(engine, [*tokens, -agent])
            if agent % 3 == 0:
                assert hits() == burst
        assert hits() == burst
        clock.now_s += 5


def test_a_scan_of_prompts_that_come_once_costs_little_of_the_warm_set(engine: Engine) -> None:
    """While the warm set is in use: ten times the store's size goes by, and fewer than a tenth of its hits are lost."""
    warm = [prompt(number) for number in range(12)]
    for tokens in warm:
        put(engine, NS, tokens)
    scan = iter(range(1000, 1400))
    asked = found = 0
    for turn in range(200):
        for _ in range(2):
            put(engine, NS, prompt(next(scan)))
        asked, found = asked + 1, found + ask(engine, warm[turn % len(warm)])
    assert found > 0.9 * asked


@pytest.mark.parametrize(("admission", "at_least", "at_most"), [(STAGED, 27, 30), (ALWAYS, 0, 3)])
def test_staged_a_scan_costs_nothing_of_a_warm_set_that_rests(admission: str, at_least: int, at_most: int) -> None:
    """What comes once is not written, so it evicts nothing; written always, it takes all of a set that nobody uses."""
    warm = [(number, 100 + number, 200 + number) for number in range(10)]
    at_s = iter(range(0, 1_000_000, 20))
    twice = [TraceRequest(next(at_s), blocks) for _ in range(2) for blocks in warm]
    scan = [TraceRequest(next(at_s), (1000 + number, 2000 + number)) for number in range(100)]
    before = [*twice, *scan]
    again = [TraceRequest(next(at_s), blocks) for blocks in warm]
    found = replay([*before, *again], 40, "lru", admission).hit - replay(before, 40, "lru", admission).hit
    assert at_least <= found <= at_most


def test_the_hot_set_of_yesterday_is_gone_after_two_passes_of_todays(engine: Engine, clock: Clock) -> None:
    """However often it was used: counts of hits protect nothing for ever."""
    yesterday = [prompt(number) for number in range(30)]
    for _ in range(10):
        for tokens in yesterday:
            ask(engine, tokens)
        clock.now_s += 60
    assert all(ask(engine, tokens) for tokens in yesterday)
    clock.now_s += 86_400
    today = [prompt(number) for number in range(500, 535)]
    for _ in range(2):
        found = [ask(engine, tokens) for tokens in today]
    assert all(found)
    assert not any(find(engine, NS, tokens).n_tokens for tokens in yesterday[:25])


def test_a_small_namespace_is_not_starved_by_a_large_one(engine: Engine) -> None:
    """One that stores all the time takes its room from itself, as long as the other is used."""
    mine = [prompt(number) for number in range(3)]
    for tokens in mine:
        put(engine, SMALL, tokens)
    for turn in range(200):
        put(engine, NS, prompt(1000 + turn))
        if turn % 5 == 0:
            assert ask(engine, mine[turn // 5 % 3], SMALL)
    usage = {one.info.root: one.disk_bytes for one in engine.stats().namespaces}
    assert usage[SMALL.root] == 3 * BLOCK_BYTES and engine.stats().evictions["budget"][0] > 100


def test_workers_at_full_speed_stall_for_no_more_than_the_eviction_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of them, into a full store: apart from evictions a store takes as long as one into a store with room.

    Both are stored into at the same time, so that what else the machine does is in both.
    """
    evicting: list[tuple[float, float]] = []
    run = Evictor._run

    def timed(self: Evictor, *args: object, **details: object) -> object:
        begun = time.monotonic()
        try:
            return run(self, *args, **details)  # type: ignore[arg-type]
        finally:
            evicting.append((begun, time.monotonic()))

    monkeypatch.setattr(Evictor, "_run", timed)
    took: dict[str, list[float]] = {"with room": [], "full": []}
    with (
        Engine.open(tmp_path / "with room", options(budget_bytes=1 << 30)) as roomy,
        Engine.open(tmp_path / "full", options(budget_bytes=2 << 20)) as full,
    ):
        put(roomy, NS, prompt(1, 140 * 256))
        put(full, NS, prompt(1, 140 * 256))
        workers = [
            threading.Thread(target=work, args=(engine, first, evictions, took[name]))
            for first in (1000, 2000, 3000, 4000)
            for name, engine, evictions in (("with room", roomy, []), ("full", full, evicting))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert full.stats().evictions["budget"][0] > 20
    # Nine in ten, since on a busy machine any of them may be descheduled.
    ninth = len(took["full"]) * 9 // 10
    assert sorted(took["full"])[ninth] <= 4 * sorted(took["with room"])[ninth]


def work(engine: Engine, first: int, evicting: list[tuple[float, float]], seconds: list[float]) -> None:
    """Twelve stores of one worker: how long each took, without the time in which anybody evicted."""
    for number in range(first, first + 12):
        blocks = sequence(NS, prompt(number, 600))
        begun = time.monotonic()
        assert engine.store(NS.to_record(), blocks).reason is Reason.OK
        ended = time.monotonic()
        seconds.append(ended - begun - sum(max(0.0, min(ended, b) - max(begun, a)) for a, b in list(evicting)))
