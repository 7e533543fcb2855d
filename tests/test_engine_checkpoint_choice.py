"""Which checkpoints of a chain stay: what an agent finds after one turn, or after thirty of them are stripped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.blocks import Reason
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Match
from kvstore.engine.retain import chain_of, spare
from tests.support.engine import HYBRID, checkpoint, find, namespace, options, put_checkpoint, require_sound, sequence

NS = namespace("hybrid", HYBRID)
KEEP = 8
SYSTEM = list(range(300))
USER = list(range(10_000, 10_060))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with room for everything; no syncs, since nothing here is about crashes."""
    with Engine.open(tmp_path / "data", options(durability="none", checkpoints_max=KEEP)) as opened:
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


def thinned(positions: Sequence[int], marks: Sequence[int] = (), keep_max: int = KEEP) -> list[int]:
    """What is left of a chain after one checkpoint after another was added, as ever."""
    held: list[int] = []
    for position in positions:
        held.append(position)
        marked = [marks.index(each) + 1 if each in marks else 0 for each in held]
        gone = spare(held, marked, keep_max)
        held = [each for at, each in enumerate(held) if at not in gone]
        assert len(held) == min(keep_max, len(held) + len(gone))
    return held


STEPS = st.lists(st.integers(1, 5000), min_size=1, max_size=80)


@given(STEPS, st.integers(1, 12), st.data())
def test_first_newest_and_newest_marks_always_stay(steps: list[int], keep_max: int, data: st.DataObject) -> None:
    """Whatever the distances: exactly as many as may stay, the ones that must among them."""
    positions = list(itertools.accumulate(steps))
    marks = data.draw(st.lists(st.integers(0, 9), min_size=len(positions), max_size=len(positions)))
    gone = spare(positions, marks, keep_max)
    left = [at for at in range(len(positions)) if at not in gone]
    assert len(left) == min(keep_max, len(positions)) and left[-1] == len(positions) - 1
    if keep_max >= 2:
        assert left[0] == 0
    if keep_max >= 3 and len(positions) >= 2:
        assert len(positions) - 2 in left
    inner = sorted((at for at in range(1, len(positions) - 2) if marks[at]), key=lambda at: -marks[at])
    assert set(inner[: max(0, keep_max - 5)]) <= set(left)


@pytest.mark.parametrize(("turns", "times"), [(30, 3.1), (100, 6.1), (300, 9.1)])
def test_the_others_are_spaced_like_powers_from_the_end(turns: int, times: float) -> None:
    """Wherever a prompt diverges before the newest turn, it prefills at most so many times what it must."""
    for step in (20, 100, 3000):
        held = thinned([SYSTEM[-1] + step * turn for turn in range(turns)])
        end = held[-1] + 256
        assert max((end - a) / (end - b) for a, b in itertools.pairwise(held[:-1])) <= times
        assert held[0] == SYSTEM[-1]


def test_marks_stay_while_newer_ones_do_not_need_their_place() -> None:
    """A position where prompts diverge is kept through a hundred turns; of many marks the newest."""
    positions = list(range(100, 10_100, 100))
    assert {300, 700} <= set(thinned(positions, marks=[300, 700]))
    assert {900, 2000, 1500} <= set(thinned(positions, marks=[300, 700, 900, 2000, 1500]))
    assert not {300, 700} <= set(thinned(positions, marks=[300, 700, 900, 2000, 1500]))


def test_a_chain_never_has_more_than_it_may(engine: Engine) -> None:
    """Turn by turn, or many in one request; the first, the two newest, and others between."""
    tokens = list(range(3000))
    store(engine, tokens, [300])
    for end in range(400, 3000, 100):
        put_checkpoint(engine, NS, tokens[:end])
        held = ends_of(engine)
        assert len(held) <= KEEP and held[0] == 300 and held[-1] == end
        assert end == 400 or held[-2] == end - 100
    store(engine, tokens, range(310, 3000, 35))
    assert len(ends_of(engine)) == KEEP and ends_of(engine)[0] == 300
    require_sound(engine)


def test_other_chains_are_left_alone(engine: Engine) -> None:
    """Conversations that share a system prompt share its checkpoint; each has its own turns."""
    for name in range(4):
        tokens = [*SYSTEM, -name, *range(1500)]
        store(engine, tokens, [300, *range(400, 1600, 100)])
    assert ends_of(engine).count(300) == 1 and len(ends_of(engine)) == 1 + 4 * (KEEP - 1)
    with engine._shared.index.view() as view:
        last = engine.match(Chain(NS.root, sequence_bytes([*SYSTEM, -2, *range(1500)])), exact=True).checkpoint
        assert last is not None and last.end == 1500
        chain = chain_of(view, last)
        assert [row.end for row in chain] == sorted(row.end for row in chain) and len(chain) == KEEP
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
        assert len(ends_of(engine)) <= KEEP
        history += turn_tokens(turn, stripped=True)
    require_sound(engine)


@pytest.mark.parametrize("turns", [5, 30, 60])
def test_an_agent_that_strips_all_its_turns_at_once_finds_the_message_before_them(engine: Engine, turns: int) -> None:
    """A tool loop keeps its thinking until the user speaks again; then all of it goes, and that message is not lost."""
    loop = [*SYSTEM, *USER]
    store(engine, loop, [300, 360])
    for turn in range(1, turns + 1):
        assert fetch(engine, [*loop, -1]).n_tokens == len(loop)
        loop += turn_tokens(turn, stripped=False)
        store(engine, loop, [len(loop)])
    stripped = [*SYSTEM, *USER, *itertools.chain(*(turn_tokens(turn, stripped=True) for turn in range(1, turns + 1)))]
    match = fetch(engine, [*stripped, *USER, -1])
    assert match.n_tokens >= 300 and match.diverged
    assert match.reason in (Reason.NO_CHECKPOINT, Reason.UNKNOWN_PREFIX)
    assert match.n_tokens == 360 or turns > 5
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
    store(engine, tokens, [100, 900, 1000, 1100, 1200, 1300, 1400, 1500])
    assert fetch(engine, [*tokens[:1000], -1, 0]).n_tokens == 1000
    put_checkpoint(engine, NS, tokens[:1600])
    put_checkpoint(engine, NS, tokens[:1700])
    put_checkpoint(engine, NS, tokens[:1800])
    assert 1000 in ends_of(engine)
