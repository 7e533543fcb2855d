"""Which checkpoints stay: what an agent finds after one turn, or after thirty of them are stripped; what a full store
takes first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.blocks import Reason
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Match, Row, Selection
from kvstore.engine.retain import chain_of, passed_checkpoints, redundant
from kvstore.index.table import COLUMNS, PINNED
from tests.support.engine import HYBRID, checkpoint, find, namespace, options, put_checkpoint, require_sound, sequence

NS = namespace("hybrid", HYBRID)
# What a chain of up to sixty has at most: the first, the last two, some that save much, some at growing distances.
KEPT_MAX = 10
SYSTEM = list(range(300))
USER = list(range(10_000, 10_060))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with room for everything; no syncs, since nothing here is about crashes."""
    with Engine.open(tmp_path / "data", options(durability="none")) as opened:
        yield opened


def store(engine: Engine, tokens: list[int], ends: Sequence[int]) -> None:
    """A sequence with checkpoints at these positions, as one request."""
    blocks = [*sequence(NS, tokens), *(checkpoint(NS, tokens[:end]) for end in ends)]
    assert engine.store(NS.to_record(), blocks).reason is Reason.OK


def fetch(engine: Engine, tokens: list[int]) -> Match:
    """What a daemon does: match all but the last token, touch, mark."""
    match = find(engine, NS, tokens, exact=True, limit_tokens=len(tokens) - 1)
    engine.touch(match.parts)
    if match.diverged and match.checkpoint is not None:
        engine.mark_divergence(match.checkpoint)
    return match


def ends_of(engine: Engine) -> list[int]:
    """Positions of all checkpoints."""
    return sorted(info.row.end for info in engine.list_blocks(limit=10_000) if info.row.is_checkpoint)


def columns(count: int, marks: Sequence[int] = (), hits: Sequence[int] = ()) -> np.ndarray:
    """Columns of a chain of checkpoints; what is not given is 0."""
    rows = np.zeros(count, COLUMNS)
    rows["mark"][: len(marks)], rows["hits"][: len(hits)] = marks, hits
    return rows


def thinned(positions: Sequence[int], marks: Sequence[int] = (), twice: Sequence[int] = ()) -> tuple[list[int], int]:
    """What is left of a chain after one checkpoint after another was added, and the most that it ever had.

    `marks`: positions where a prompt diverged, one after the other; `twice`: those where two did.
    """
    held: list[int] = []
    most = 0
    for position in positions:
        held.append(position)
        marked = [marks.index(each) + 1 if each in marks else 0 for each in held]
        gone = redundant(columns(len(held), marked, [1 + (each in twice) for each in held]), held)
        held = [each for at, each in enumerate(held) if at not in gone]
        most = max(most, len(held))
    return held, most


STEPS = st.lists(st.integers(1, 5000), min_size=1, max_size=80)


@given(STEPS, st.data())
def test_the_first_the_last_two_and_the_forks_always_stay(steps: list[int], data: st.DataObject) -> None:
    """Whatever the distances; a prompt that ends anywhere before them prefills at most three times what it must."""
    positions = list(itertools.accumulate(steps))
    numbers = st.lists(st.integers(0, 9), min_size=len(positions), max_size=len(positions))
    rows = columns(len(positions), data.draw(numbers), data.draw(numbers))
    rows["flags"] = np.where(np.array(data.draw(numbers)) == 9, PINNED, 0)
    gone = redundant(rows, positions)
    left = [at for at in range(len(positions)) if at not in gone]
    assert {0, *range(max(0, len(positions) - 2), len(positions))} <= set(left)
    marks, hits = rows["mark"], rows["hits"]
    assert {at for at in range(len(positions)) if marks[at] and hits[at] >= 2} <= set(left)
    assert {at for at in range(len(positions)) if rows["flags"][at]} <= set(left)
    newest = sorted((at for at in range(len(positions) - 1) if marks[at]), key=lambda at: -marks[at])
    assert set(newest[:3]) <= set(left)
    end = positions[-1] + 256
    for before, after in itertools.pairwise(left):
        if after - before > 1:
            assert (end - positions[before]) / (end - positions[after]) <= 3


@pytest.mark.parametrize(("turns", "at_most"), [(30, 8), (100, 10), (300, 12), (1000, 14)])
def test_the_others_are_spaced_like_powers_from_the_end(turns: int, at_most: int) -> None:
    """However long the loop, a chain has few of them."""
    for step in (20, 190, 3000):
        held, most = thinned([SYSTEM[-1] + step * turn for turn in range(turns)])
        assert most <= at_most and held[0] == SYSTEM[-1]


def test_marks_stay_while_newer_ones_do_not_need_their_place() -> None:
    """A position where prompts diverge is kept through a hundred turns; of many that did so once the newest."""
    positions = list(range(100, 10_100, 100))
    assert {300, 700} <= set(thinned(positions, marks=[300, 700])[0])
    many = [300, 700, 900, 2000, 1500]
    assert {900, 2000, 1500} <= set(thinned(positions, marks=many)[0])
    assert not {300, 700} <= set(thinned(positions, marks=many)[0])
    assert {300, 700} <= set(thinned(positions, marks=many, twice=[300, 700])[0])


def test_a_chain_never_has_more_than_it_may(engine: Engine) -> None:
    """Turn by turn, or many in one request; the first, the last two, and others between."""
    tokens = list(range(3000))
    store(engine, tokens, [300])
    for end in range(400, 3000, 100):
        put_checkpoint(engine, NS, tokens[:end])
        held = ends_of(engine)
        assert len(held) <= KEPT_MAX and held[0] == 300 and held[-1] == end
        assert end == 400 or held[-2] == end - 100
    store(engine, tokens, range(310, 3000, 35))
    assert len(ends_of(engine)) <= KEPT_MAX and ends_of(engine)[0] == 300
    require_sound(engine)


def test_other_chains_are_left_alone(engine: Engine) -> None:
    """Conversations that share a system prompt share its checkpoint; each has its own turns."""
    for name in range(4):
        tokens = [*SYSTEM, -name, *range(1500)]
        store(engine, tokens, [300, *range(400, 1600, 100)])
    assert ends_of(engine).count(300) == 1 and ends_of(engine).count(1500) == 4
    with engine._shared.index.view() as view:
        last = engine.match(Chain(NS.root, sequence_bytes([*SYSTEM, -2, *range(1500)])), exact=True).checkpoint
        assert last is not None and last.end == 1500
        chain = chain_of(view, last)
        assert [row.end for row in chain] == sorted(row.end for row in chain)
        assert len(chain) == 1 + (len(ends_of(engine)) - 1) // 4 <= KEPT_MAX
        assert chain[0].end == 300 and chain[-1] == last


def sequence_bytes(tokens: list[int]) -> bytes:
    """Packed tokens."""
    return b"".join(new.block.tokens for new in sequence(NS, tokens))


def turn_tokens(turn: int, stripped: bool) -> list[int]:
    """One turn of an agent: thinking, unless it was stripped, a call, and what the tool said."""
    thinking = [] if stripped else list(range(100_000 * turn, 100_000 * turn + 150))
    call = list(range(-100 * turn - 40, -100 * turn))
    return [*thinking, *call, *range(50_000 + turn, 50_080 + turn)]


def test_an_agent_that_strips_every_turn_finds_the_turn_before(engine: Engine) -> None:
    """Its history never has thinking, so every prompt diverges right after the one before; thirty times."""
    history = [*SYSTEM, *USER]
    previous = 0
    for turn in range(1, 31):
        match = fetch(engine, history)
        assert match.n_tokens >= previous
        previous = len(history) - 1
        answered = [*history, *turn_tokens(turn, stripped=False)[:190]]
        store(engine, answered, [300, previous] if turn == 1 else [previous])
        assert len(ends_of(engine)) <= KEPT_MAX + 3
        history += turn_tokens(turn, stripped=True)
    require_sound(engine)


@pytest.mark.parametrize("turns", [5, 30, 60])
@pytest.mark.parametrize("message", [60, 6000])
def test_an_agent_that_strips_all_its_turns_at_once_finds_the_message_before_them(
    engine: Engine, turns: int, message: int
) -> None:
    """A tool loop keeps its thinking until the user speaks again; then all of it goes. That message, if it is long, is
    not lost; a short one is not much to prefill."""
    asked = list(range(10_000, 10_000 + message))
    loop = [*SYSTEM, *asked]
    store(engine, loop, [300, len(loop)])
    for turn in range(1, turns + 1):
        assert fetch(engine, [*loop, -1]).n_tokens == len(loop)
        loop += turn_tokens(turn, stripped=False)
        store(engine, loop, [len(loop)])
        assert len(ends_of(engine)) <= KEPT_MAX
    calls = itertools.chain(*(turn_tokens(turn, stripped=True) for turn in range(1, turns + 1)))
    stripped = [*SYSTEM, *asked, *calls]
    match = fetch(engine, [*stripped, *USER, -1])
    assert match.n_tokens >= 300 and match.diverged
    assert match.reason in (Reason.NO_CHECKPOINT, Reason.UNKNOWN_PREFIX)
    assert match.n_tokens == 300 + message or message < 100
    require_sound(engine)


def test_an_agent_of_several_rounds_never_starts_from_scratch(engine: Engine) -> None:
    """Three rounds of thirty turns: each time the thinking is stripped, little more is prefilled than must be."""
    clean = [*SYSTEM]
    store(engine, clean, [300])
    unchanged = len(clean)
    for round_number in range(1, 4):
        clean += [round_number, *USER]
        loop = list(clean)
        found = fetch(engine, loop).n_tokens
        assert len(loop) - found <= 1.5 * (len(loop) - unchanged)
        unchanged = len(clean)
        store(engine, loop, [len(loop)])
        for turn in range(30 * round_number, 30 * round_number + 30):
            assert fetch(engine, [*loop, -1]).n_tokens == len(loop)
            loop += turn_tokens(turn, stripped=False)
            store(engine, loop, [len(loop)])
            clean += turn_tokens(turn, stripped=True)
    require_sound(engine)


def test_a_point_where_prompts_diverge_is_kept(engine: Engine) -> None:
    """Sub-agents start from the middle of a long conversation: once seen, that point outlives the spacing."""
    tokens = list(range(1200))
    store(engine, tokens, [300, 700, 1200])
    for name in (-1, -2):
        branch = [*tokens[:700], name, *range(200)]
        assert fetch(engine, branch).n_tokens == 700
        store(engine, branch, [len(branch)])
    for turn in range(40):
        tokens += range(turn, turn + 100)
        store(engine, tokens, [len(tokens)])
    assert fetch(engine, [*tokens[:700], -3, 1]).n_tokens == 700
    require_sound(engine)


def test_a_mark_counts_before_it_is_written(engine: Engine) -> None:
    """The commit that thins the chain puts it there first."""
    tokens = list(range(2000))
    for kept in (False, True):
        engine.evict(Selection(all=True))
        store(engine, tokens, [900, 950, 1000])
        if kept:
            assert fetch(engine, [*tokens[:950], -1, 0]).n_tokens == 950
        put_checkpoint(engine, NS, tokens[:1050])
        assert (950 in ends_of(engine)) == kept


@pytest.mark.parametrize("diverged", [False, True])
def test_an_interim_checkpoint_goes_with_the_next_one_unless_a_prompt_diverged_there(
    engine: Engine, diverged: bool
) -> None:
    """Also the first of a chain, and however far the next one is; the last stays until there is another."""
    tokens = list(range(6000))
    for end in (2000, 4000):
        interim = [*sequence(NS, tokens[:end]), replace(checkpoint(NS, tokens[:end]), interim=True)]
        assert engine.store(NS.to_record(), interim).reason is Reason.OK
        assert ends_of(engine) == [end]
    if diverged:
        assert fetch(engine, [*tokens[:4000], -1, -1]).n_tokens == 4000
        store(engine, [*tokens[:4000], -1, -1], [])
        assert fetch(engine, [*tokens[:4000], -2, -2]).diverged
    store(engine, tokens, [6000])
    assert ends_of(engine) == ([4000, 6000] if diverged else [6000])


def column(engine: Engine, name: str) -> dict[int, int]:
    """A column of the table, for the checkpoints by their ends."""
    table = engine._shared.index.table
    engine._shared.flush_uses()
    return {row.end: table.value(row.key, name) for row in checkpoint_rows(engine)}


def checkpoint_rows(engine: Engine) -> list[Row]:
    """Rows of all checkpoints."""
    return [info.row for info in engine.list_blocks(limit=10_000) if info.row.is_checkpoint]


def passed(engine: Engine) -> dict[int, float]:
    """Where the checkpoints end that have one continuation and nothing else, and what each is worth."""
    table = engine._shared.index.table
    slots, worth = passed_checkpoints(table.rows)
    ends = {row.key: row.end for row in checkpoint_rows(engine)}
    return {ends[key]: value for key, value in zip(table.keys(slots.tolist()), worth.tolist(), strict=True)}


def test_a_hit_renews_only_the_checkpoint_that_it_used(engine: Engine) -> None:
    """And the blocks before it."""
    tokens = list(range(3000))
    store(engine, tokens, [300, 1000, 3000])
    before = column(engine, "last_use")
    fetch(engine, [*tokens[:1000], -1, -1])
    after = column(engine, "last_use")
    assert after[1000] > before[1000] and (after[300], after[3000]) == (before[300], before[3000])
    assert column(engine, "hits") == {300: 0, 1000: 1, 3000: 0}


def test_what_has_one_continuation_is_worth_the_tokens_that_it_saves_for_its_bytes(engine: Engine) -> None:
    """The last is not passed, nor one where two sequences go on, nor one where a prompt was seen to diverge."""
    tokens = list(range(6000))
    store(engine, tokens, [256, 1300, 2600, 4000])
    engine.store(NS.to_record(), [checkpoint(NS, tokens, n_floats=30_000)])
    table = engine._shared.index.table
    block = find(engine, NS, tokens).slices[0].row.key
    per_token = table.value(block, "nbytes") / 256
    assert passed(engine) == {256: 1.0, 1300: 1.0, 2600: 1.0, 4000: 1.0}
    engine.store(NS.to_record(), [checkpoint(NS, tokens[:5900], n_floats=30_000)])
    [dear] = [row for row in checkpoint_rows(engine) if row.end == 5900]
    assert passed(engine)[5900] == pytest.approx(1900 * per_token / table.value(dear.key, "nbytes"))
    assert passed(engine).keys() == {256, 1300, 2600, 4000, 5900}
    store(engine, [*tokens[:1300], -1, *range(500)], [])
    assert 1300 not in passed(engine)
    fetch(engine, [*tokens[:4000], -1, -1])
    engine._shared.flush_uses()
    assert passed(engine).keys() == {256, 2600, 5900}


def test_a_full_store_takes_what_saves_little_before_older_conversations(tmp_path: Path) -> None:
    """An agent's calls fill it; the conversations before them are still there, and every call hits as before."""
    n_floats = 40_000
    with Engine.open(tmp_path / "data", options(durability="none", budget_bytes=3_000_000)) as engine:
        others = [[name, *range(1500)] for name in range(6)]
        for tokens in others:
            engine.store(NS.to_record(), [*sequence(NS, tokens), checkpoint(NS, tokens, n_floats=n_floats)])
        loop = [-1, *range(600)]
        engine.store(NS.to_record(), [*sequence(NS, loop), checkpoint(NS, loop, n_floats=n_floats)])
        for turn in range(1, 31):
            assert fetch(engine, [*loop, -1]).n_tokens == len(loop)
            loop += turn_tokens(turn, stripped=False)
            engine.store(NS.to_record(), [*sequence(NS, loop), checkpoint(NS, loop, n_floats=n_floats)])
        assert engine.stats().evictions["budget"][0] > 3
        for tokens in others:
            assert find(engine, NS, tokens, exact=True).n_tokens == len(tokens)
        require_sound(engine)
