"""The FETCH path inside the daemon: what a match decodes, and which recipes it takes for readable."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.core.blocks import Block, Reason, Recipe, pack_tokens
from kvstore.core.keys import Chain, NamespaceInfo
from kvstore.engine import Engine, Row
from kvstore.server.fetching.costs import Offer
from kvstore.server.fetching.fetch import FetchPath
from kvstore.server.lane import Lane
from tests.support.engine import HYBRID, namespace, options, put, sequence
from tests.support.limits import make_config

NS = namespace()
TOKENS = list(range(800))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine without a block."""
    with Engine.open(tmp_path / "data", options()) as made:
        yield made


@pytest.fixture
def path(engine: Engine) -> Iterator[FetchPath]:
    """The path over it, which takes prefixes of any length."""
    lane = Lane()
    yield FetchPath(engine, lane, make_config(min_prefix_tokens=1))
    lane.close()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Rows whose runs are decoded, as it happens."""
    seen: list[Row] = []
    decode = Row.block.func

    def watched(row: Row) -> Block:
        seen.append(row)
        return decode(row)

    block = functools.cached_property(watched)
    block.__set_name__(Row, "block")
    monkeypatch.setattr(Row, "block", block)
    return seen


def put_unknown(engine: Engine, tokens: list[int], start: int) -> None:
    """Store blocks from `start` on with a recipe that no codec here has."""
    blocks = sequence(NS, tokens, start)
    for new in blocks:
        [run] = new.block.runs
        stacks = tuple(replace(stack, recipe=Recipe("tomorrow")) for stack in run.stacks)
        new.block = replace(new.block, runs=(replace(run, stacks=stacks),))
    engine.store(NS.to_record(), blocks)


def test_a_match_decodes_runs_only_until_their_recipes_are_known(
    engine: Engine, path: FetchPath, decoded: list[Row]
) -> None:
    """The first match of a daemon looks into every row, the next ones into none, of other sequences neither."""
    put(engine, NS, TOKENS)
    other = [-1, *TOKENS]
    put(engine, NS, other)
    decoded.clear()
    assert path.match(Chain(NS.root, pack_tokens(TOKENS)), 0).n_tokens == 799
    assert len(decoded) == 4
    decoded.clear()
    assert path.match(Chain(NS.root, pack_tokens(TOKENS)), 0).n_tokens == 799
    assert path.match(Chain(NS.root, pack_tokens(other)), 0).n_tokens == 800
    assert decoded == []


def test_a_recipe_that_cannot_be_read_ends_every_match_of_it(engine: Engine, path: FetchPath) -> None:
    """The second as the first, before and after the readable rows in front of it became known."""
    put(engine, NS, TOKENS[:512])
    put_unknown(engine, TOKENS, 512)
    for n_tokens in (800, 800, 400, 800):
        match = path.match(Chain(NS.root, pack_tokens(TOKENS[:n_tokens])), 0)
        expected = (512, Reason.UNKNOWN_RECIPE) if n_tokens > 512 else (n_tokens - 1, Reason.OK)
        assert (match.n_tokens, match.reason) == expected


def test_a_plan_decodes_all_that_it_hands_over(engine: Engine, path: FetchPath, decoded: list[Row]) -> None:
    """Whatever matches saw before: a fetch does not promise what it did not look at."""
    put(engine, NS, TOKENS)
    path.match(Chain(NS.root, pack_tokens(TOKENS)), 0)
    decoded.clear()
    plan = path.plan(Chain(NS.root, pack_tokens(TOKENS)), 0)
    assert {row.start for row in decoded} == {0, 256, 512, 768}
    plan.release()


def test_a_namespace_that_is_evicted_after_the_match_is_a_miss_with_that_reason(
    engine: Engine, path: FetchPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that says that all was found."""
    put(engine, NS, TOKENS)
    known = [engine.namespace(NS.root)]
    monkeypatch.setattr(engine, "namespace", lambda root: known.pop() if known else None)
    plan = path.plan(Chain(NS.root, pack_tokens(TOKENS)), 0)
    assert plan.namespace is None and (plan.match.n_tokens, plan.match.reason) == (0, Reason.EVICTED)


def test_a_hybrid_that_is_stored_between_the_look_up_and_the_match_gives_no_blocks_without_a_checkpoint(
    engine: Engine, path: FetchPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up says which kind of match it is, so it is made again."""
    hybrid = namespace(layout=HYBRID)
    put(engine, hybrid, TOKENS)
    looked, real = list[bytes](), engine.namespace

    def late(root: bytes) -> NamespaceInfo | None:
        looked.append(root)
        return real(root) if len(looked) > 1 else None

    monkeypatch.setattr(engine, "namespace", late)
    match = path.match(Chain(hybrid.root, pack_tokens(TOKENS)), 0)
    assert (match.n_tokens, match.reason) == (0, Reason.NO_CHECKPOINT)


def test_a_stated_speed_is_weighed_without_decoding_the_blocks(
    engine: Engine, path: FetchPath, decoded: list[Row]
) -> None:
    """One block of each kind says what the others cost: to decode 128 of them takes longer than to find them."""
    put(engine, NS, TOKENS)
    chain = Chain(NS.root, pack_tokens(TOKENS))
    path.match(chain, 0)
    decoded.clear()
    assert path.match(chain, 0, Offer(1.0)).n_tokens == 799
    assert len(decoded) == 1
    slow = path.match(chain, 0, Offer(1e9))
    assert (slow.n_tokens, slow.reason) == (0, Reason.SLOWER_THAN_PREFILL)
