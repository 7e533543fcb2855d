"""What fetches are believed to cost, what a measurement changes, and which prefix is worth it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codecs.affine import affine_recipe
from kvstore.core.blocks import FIDELITY_EXACT, RAW, TOKEN_BYTES, Block, Reason, Recipe, Run, Stack
from kvstore.core.layers import PARTS
from kvstore.engine import Match, Slice
from kvstore.errors import InvalidRequestError
from kvstore.index.rows import pack_row
from kvstore.server.fetching import costs as costs_module
from kvstore.server.fetching.costs import Costs, Offer, Price, Timing, Work, work_of, worthwhile
from tests.support.clock import Clock
from tests.support.synthetic import make_layout

ROOT, OTHER = b"r" * 32, b"o" * 32
LAYOUT = make_layout(layers=4, heads=2, width=64)
LARGE = Work(layers=32, blocks=32, read_bytes=1 << 30, decode_bytes=0)
SMALL = Work(layers=32, blocks=1, read_bytes=1 << 20, decode_bytes=0)
CODED = Work(layers=32, blocks=32, read_bytes=1 << 29, decode_bytes=1 << 30)


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock(1000.0)


@pytest.fixture
def costs(clock: Clock) -> Costs:
    """Nothing measured yet."""
    return Costs(clock=clock)


def fetch(costs: Costs, work: Work, seconds: float, decode_s: float = 0.0, way: Any = "path") -> None:
    """A fetch by itself that took so long."""
    timing = Timing(work.read_bytes, seconds, work.decode_bytes, decode_s)
    costs.measured(costs.start(ROOT, way, work), timing)


def test_a_slow_disk_is_believed_after_one_fetch(costs: Costs) -> None:
    """Of any size, and only of this namespace and way."""
    before_s = costs.seconds(ROOT, "path", LARGE)
    fetch(costs, LARGE, 100 * before_s)
    assert costs.seconds(ROOT, "path", LARGE) == pytest.approx(100 * before_s, rel=0.2)
    assert costs.seconds(OTHER, "path", LARGE) == costs.seconds(ROOT, "stream", LARGE) == before_s


def test_large_fetches_teach_the_rate_and_small_ones_what_is_fixed(costs: Costs) -> None:
    """So that a disk found slow by a long prompt does not make a call look slow, nor the other way round."""
    empty = Work(32, 0, 0, 0)
    fixed_s = costs.seconds(ROOT, "path", empty)
    fetch(costs, LARGE, 50.0)
    assert costs.seconds(ROOT, "path", empty) == pytest.approx(fixed_s, rel=0.2)
    for _ in range(8):
        fetch(costs, empty, 1.0)
    assert costs.seconds(ROOT, "path", empty) == pytest.approx(1.0, rel=0.1)


def test_one_stall_does_not_outweigh_what_many_fetches_said(costs: Costs) -> None:
    """A measurement moves the belief, it does not replace it."""
    for _ in range(5):
        fetch(costs, LARGE, 1.0)
    fetch(costs, LARGE, 10.0)
    assert 1.0 < costs.seconds(ROOT, "path", LARGE) < 5.0
    for _ in range(5):
        fetch(costs, LARGE, 1.0)
    assert costs.seconds(ROOT, "path", LARGE) == pytest.approx(1.0, rel=0.2)


def test_what_was_slow_fades_and_what_was_fast_stays(costs: Costs, clock: Clock) -> None:
    """A namespace from which nothing is restored measures nothing, so it must be tried again some time."""
    guess_s = costs.seconds(ROOT, "path", LARGE)
    fetch(costs, LARGE, 100 * guess_s)
    clock.now_s += costs_module.HALF_LIFE_S
    assert costs.seconds(ROOT, "path", LARGE) == pytest.approx(10 * guess_s, rel=0.2)
    clock.now_s += 10 * costs_module.HALF_LIFE_S
    assert costs.seconds(ROOT, "path", LARGE) == pytest.approx(guess_s, rel=0.1)
    fetch(costs, LARGE, guess_s / 100)
    fast_s = costs.seconds(ROOT, "path", LARGE)
    clock.now_s += 10 * costs_module.HALF_LIFE_S
    assert costs.seconds(ROOT, "path", LARGE) == fast_s < guess_s / 5


def test_decoding_is_learned_apart_from_reading(costs: Costs) -> None:
    """The same bytes read, raw or as codes: what decodes slowly must not make raw hits look slow."""
    fetch(costs, CODED, costs.seconds(ROOT, "path", CODED) - 1.07, decode_s=60.0)
    assert costs.seconds(ROOT, "path", CODED) > 50
    assert costs.seconds(ROOT, "path", LARGE) < 2


def test_other_active_fetches_count(costs: Costs) -> None:
    """Each takes its share; what is measured in a crowd is taken for what one alone would have had."""
    alone_s = costs.seconds(ROOT, "path", LARGE)
    ids = [costs.start(OTHER, "path", LARGE) for _ in range(3)]
    assert costs.seconds(ROOT, "path", LARGE) > 3 * alone_s
    mine = costs.start(ROOT, "path", LARGE)
    costs.measured(mine, Timing(LARGE.read_bytes, 4 * alone_s))
    for one in ids:
        costs.end(one)
    assert costs.seconds(ROOT, "path", LARGE) == pytest.approx(alone_s, rel=0.1)


def test_a_fetch_by_path_that_nobody_reports_the_end_of_does_not_count_for_ever(costs: Costs, clock: Clock) -> None:
    """Its worker may have died, or be of another make."""
    alone_s = costs.seconds(ROOT, "path", LARGE)
    costs.start(ROOT, "path", LARGE)
    clock.now_s += 100 * alone_s
    assert costs.seconds(ROOT, "path", LARGE) == alone_s


def test_a_fetch_that_ended_is_still_measured(costs: Costs) -> None:
    """By stream the worker says only later what decoding took."""
    fetch_id = costs.start(ROOT, "stream", CODED)
    costs.measured(fetch_id, Timing(CODED.read_bytes, 1.0))
    before_s = costs.seconds(ROOT, "stream", CODED)
    costs.measured(fetch_id, Timing(0, 0.0, CODED.decode_bytes, 60.0))
    assert costs.seconds(ROOT, "stream", CODED) > before_s + 50


def test_a_fetch_that_was_given_up_says_as_much_as_one_that_ended(costs: Costs) -> None:
    """A tenth of the bytes in the time that was allowed."""
    guess_s = costs.seconds(ROOT, "path", LARGE)
    costs.measured(costs.start(ROOT, "path", LARGE), Timing(LARGE.read_bytes // 10, 10 * guess_s))
    assert costs.seconds(ROOT, "path", LARGE) == pytest.approx(100 * guess_s, rel=0.3)


def test_waiting_for_the_device_counts_where_the_daemon_decodes(clock: Clock) -> None:
    """And nowhere else."""
    busy, idle = Costs(lambda: 7.0, clock), Costs(clock=clock)
    assert busy.seconds(ROOT, "dense", CODED) == idle.seconds(ROOT, "dense", CODED) + 7.0
    for way, work in (("path", CODED), ("stream", CODED), ("dense", LARGE)):
        assert busy.seconds(ROOT, way, work) == idle.seconds(ROOT, way, work)  # type: ignore[arg-type]


def test_what_cannot_be_is_ignored_and_memory_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports come from outside."""
    monkeypatch.setattr(costs_module, "NAMESPACES_MAX", 4)
    monkeypatch.setattr(costs_module, "ANSWERED_MAX", 8)
    costs = Costs(clock=clock)
    before_s = costs.seconds(ROOT, "path", LARGE)
    costs.measured("77", Timing(1, 1.0))
    costs.reported("77", Timing(1, 1.0), "")
    costs.end("77")
    for seconds in (math.nan, math.inf, -1.0):
        costs.reported(costs.start(ROOT, "path", LARGE), Timing(LARGE.read_bytes, seconds), "")
        costs.reported(costs.start(ROOT, "path", LARGE), Timing(LARGE.read_bytes, 0.0, 5, seconds), "")
    for number in range(20):
        costs.end(costs.start(bytes([number]), "path", SMALL))
    assert (len(costs._ways), len(costs._answered)) == (4, 8)
    for one in list(costs._answered):
        costs.end(one)
    assert costs.seconds(ROOT, "path", LARGE) == before_s


def test_a_report_is_taken_from_the_caller_of_the_fetch_alone_and_once(costs: Costs, clock: Clock) -> None:
    """Another's, a guess and a second one change nothing; ids are random."""
    before_s = costs.seconds(ROOT, "path", LARGE)
    ids = [costs.start(ROOT, "path", LARGE, "mine") for _ in range(3)]
    assert len({len(one) for one in ids}) == 1 and len(ids[0]) == 32
    clock.now_s += 50.0
    slow = Timing(LARGE.read_bytes, 50.0)
    for one in ids:
        costs.reported(one, slow, "another")
        costs.reported(one, slow, "")
        costs.end(one)
    assert costs.seconds(ROOT, "path", LARGE) == before_s
    costs.reported(ids[0], slow, "mine")
    after_s = costs.seconds(ROOT, "path", LARGE)
    assert after_s > 10 * before_s
    costs.reported(ids[0], slow, "mine")
    assert costs.seconds(ROOT, "path", LARGE) == after_s


def test_no_report_is_believed_beyond_the_time_that_passed(costs: Costs, clock: Clock) -> None:
    """A fetch that was answered a second ago took no minute; one of yesterday is not reported today."""
    mine = costs.start(ROOT, "path", LARGE, "mine")
    honest = costs.start(OTHER, "path", LARGE, "mine")
    clock.now_s += 1.0
    costs.reported(mine, Timing(LARGE.read_bytes, 1e6, LARGE.decode_bytes, 1e6), "mine")
    costs.reported(honest, Timing(LARGE.read_bytes, 1.0), "mine")
    assert costs.seconds(ROOT, "path", LARGE) <= costs.seconds(OTHER, "path", LARGE) * 1.01
    before_s = costs.seconds(ROOT, "path", LARGE)
    late = costs.start(ROOT, "path", LARGE, "mine")
    clock.now_s += costs_module.REPORT_S_MAX + 1
    costs.reported(late, Timing(LARGE.read_bytes, 61.0), "mine")
    assert costs.seconds(ROOT, "path", LARGE) <= before_s


def test_of_a_stream_a_worker_reports_the_decoding_alone(costs: Costs, clock: Clock) -> None:
    """The daemon has measured the rest."""
    before_s = costs.seconds(ROOT, "stream", LARGE)
    mine = costs.start(ROOT, "stream", LARGE, "mine")
    costs.end(mine)
    clock.now_s += 50.0
    costs.reported(mine, Timing(LARGE.read_bytes, 50.0), "mine")
    assert costs.seconds(ROOT, "stream", LARGE) == before_s


@pytest.mark.parametrize("speed", [math.nan, math.inf, -1.0])
def test_a_speed_that_cannot_be_is_refused(speed: float) -> None:
    """As any argument is."""
    with pytest.raises(InvalidRequestError):
        Offer(speed)


def block(nbytes: int, recipe: Recipe = RAW, fidelity: int = FIDELITY_EXACT, take: int = 256) -> Slice:
    """A block of so many stored bytes."""
    stacks = tuple(Stack(part, tuple(range(4)), recipe, ()) for part in PARTS)
    run = Run(take, 0, take, fidelity, stacks)
    made = Block(bytes(32), bytes(32), bytes(32), 0, bytes(take * TOKEN_BYTES), fidelity, (run,))
    return Slice(pack_row(made, 1, 100, nbytes + 100), take)


def match_of(*slices: Slice, checkpoint: Any = None) -> Match:
    """A match of these blocks."""
    rows = tuple((one.row.key, one.row.value, one.take) for one in slices)
    templates = {name: record for one in slices for name, record in one.row.templates.items()}
    return Match(sum(one.take for one in slices), Reason.OK, rows, checkpoint, templates=templates)


BY_BYTES = Price(byte_s=1.0)


def test_the_work_of_a_match_is_its_blocks_its_checkpoint_and_what_codecs_make() -> None:
    """Keys and values of four layers, two heads of 64 in bfloat16: 2048 bytes a token."""
    checkpoint: Any = SimpleNamespace(blob_bytes=1100, payload_offset=100, n_tokens=0)
    match = match_of(block(10), block(20, affine_recipe(8, 64), take=100), checkpoint=checkpoint)
    assert work_of(match, LAYOUT) == Work(4, 3, 1030, 100 * 2048)


def test_all_of_a_match_is_given_where_it_is_worth_it() -> None:
    """The very same match, with its reason."""
    match = match_of(block(10), block(10))
    assert worthwhile(match, LAYOUT, Offer(1.0), BY_BYTES) is match
    assert worthwhile(match, LAYOUT, Offer(2.0), Price(128.0)) is match


def test_blocks_at_the_end_that_cost_more_than_they_save_are_left_out() -> None:
    """The prefix that saves most is given, and its fidelity is its own."""
    match = match_of(block(10), block(20), block(270, fidelity=800), block(270))
    shorter = worthwhile(match, LAYOUT, Offer(1.0), BY_BYTES)
    assert (shorter.n_tokens, shorter.reason) == (512, Reason.SLOWER_THAN_PREFILL)
    assert (shorter.slices, shorter.fidelity) == (match.slices[:2], FIDELITY_EXACT)


def test_nothing_is_given_where_nothing_is_worth_it() -> None:
    """Also where it would be, if the caller did not have most of the tokens anyway."""
    match = match_of(block(100), block(100))
    for offer in (Offer(10.0), Offer(1.0, covered_tokens=300), Offer(1.0, covered_tokens=900)):
        miss = worthwhile(match, LAYOUT, offer, BY_BYTES)
        assert (miss.n_tokens, miss.reason, miss.slices) == (0, Reason.SLOWER_THAN_PREFILL, ())


@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), min_size=1, max_size=12), st.data())
def test_no_other_prefix_saves_more(blocks: list[tuple[int, bool]], data: st.DataObject) -> None:
    """As pricing the work of each prefix says; the whole numbers leave no rounding."""
    match = match_of(*(block(nbytes, affine_recipe(8, 64) if coded else RAW) for nbytes, coded in blocks))
    whole = [data.draw(st.integers(0, most)) for most in (200, 60, 50, 1, 1, 900)]
    price = Price(*map(float, whole))._replace(decoded_byte_s=whole[4] / 8192)
    offer = Offer(1.0, data.draw(st.integers(0, 600)))
    best, best_s = 0, 0.0
    for count in range(1, len(blocks) + 1):
        prefix = replace(match, n_tokens=256 * count, rows=match.rows[:count])
        restore_s, saved_s = price.seconds(work_of(prefix, LAYOUT)), offer.prefill_s(prefix.n_tokens)
        if restore_s <= 0.5 * saved_s and saved_s - restore_s > best_s:
            best, best_s = prefix.n_tokens, saved_s - restore_s
    assert worthwhile(match, LAYOUT, offer, price).n_tokens == best


def test_with_a_checkpoint_it_is_all_or_nothing() -> None:
    """A cut would be at a position that has none."""
    checkpoint: Any = SimpleNamespace(blob_bytes=100, payload_offset=0, n_tokens=0)
    match = match_of(block(10), block(10), block(250), checkpoint=checkpoint)
    assert worthwhile(match, LAYOUT, Offer(1.0), BY_BYTES) is match
    assert not worthwhile(match, LAYOUT, Offer(1.5), BY_BYTES).n_tokens


def test_a_short_hit_of_a_fast_model_loses_before_anything_was_measured(costs: Costs) -> None:
    """40 tokens at 50,000 tokens/s are computed in less than a call takes; 4,000 at 500 are not."""
    price = costs.price(ROOT, "path")
    assert not worthwhile(match_of(block(40 * 2048, take=40)), LAYOUT, Offer(50_000.0), price).n_tokens
    long = match_of(*(block(256 * 2048) for _ in range(16)))
    assert worthwhile(long, LAYOUT, Offer(500.0), price) is long
