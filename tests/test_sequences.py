"""Sequences as they are listed: chains of blocks that nothing follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.engine import Engine, Selection
from tests.support.engine import find, namespace, options, put

NS, OTHER = namespace(), namespace("other")
HEAD = list(range(2 * BLOCK_TOKENS))


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Two conversations with the same first two blocks, and one of another model."""
    engine = Engine.open(tmp_path / "data", options())
    for ns, tail in ((NS, [1] * 300), (NS, [2] * 40), (OTHER, [3] * 10)):
        put(engine, ns, [*HEAD, *tail])
    return engine


def test_each_end_is_a_sequence_with_all_before_it(engine: Engine) -> None:
    """Tokens and bytes of the whole chain, and what only it has."""
    with engine:
        found = {(one.root, one.tokens): one for one in engine.sequences()}
        assert found.keys() == {(NS.root, 812), (NS.root, 552), (OTHER.root, 522)}
        long, short, other = found[NS.root, 812], found[NS.root, 552], found[OTHER.root, 522]
        assert (len(long.own), len(short.own), len(other.own)) == (2, 1, 3)
        assert long.own[0] == long.key and long.nbytes - long.own_bytes == short.nbytes - short.own_bytes > 0
        assert other.own_bytes == other.nbytes
        assert sum(one.own_bytes for one in (long, short, other)) < engine.stats().stored_bytes


def test_the_latest_used_comes_first_and_a_limit_holds(engine: Engine) -> None:
    """Of one model, of all, of none."""
    with engine:
        assert [one.root for one in engine.sequences(OTHER.root[:4])] == [OTHER.root]
        assert engine.sequences(b"\xff" * 32) == []
        chain = engine.sequences(NS.root)[-1]
        engine.touch(find(engine, NS, [*HEAD, *([1] * 300)]).slices)
        assert engine.sequences(NS.root)[0].tokens == 812
        assert len(engine.sequences(limit=2)) == 2 and chain.created_s >= 0


def test_evicting_the_end_makes_a_shorter_sequence(engine: Engine) -> None:
    """What others still need stays."""
    with engine:
        (short,) = [one for one in engine.sequences(NS.root) if one.tokens == 552]
        engine.evict(Selection(key_prefix=short.key))
        (left,) = engine.sequences(NS.root)
        assert left.tokens == 812 and left.own_bytes == left.nbytes
