"""Entries of children that were damaged: an answer may get shorter or fail, and is never of another prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.core.blocks import TOKEN_BYTES, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine
from kvstore.engine.match import longest_prefix
from kvstore.errors import CorruptDataError
from kvstore.index.children import replaced_by
from kvstore.index.rows import pack_row, parse_row
from kvstore.index.transaction import View
from tests.support.engine import namespace, options, put, sequence

NS = namespace()
ENDS = (list(range(600, 640)), list(range(600, 700)), [*range(600, 620), 7])
# The ends are the same after two beginnings: keys differ, and tokens do not.
PROMPTS = [[start, *range(1, 256), *end] for start in (0, 9) for end in ENDS]
ROUNDS = 20
KINDS = ("a bit of the entry", "a bit of the key", "the key of another row", "the entry of another parent")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """PROMPTS are stored."""
    with Engine.open(tmp_path_factory.mktemp("children") / "data", options()) as opened:
        for tokens in PROMPTS:
            put(opened, NS, tokens)
        yield opened


def damaged(engine: Engine, kind: str, chance: random.Random) -> Iterator[View]:
    """Views with one, a few, up to half of the entries damaged; nothing is committed."""
    index = engine._shared.index
    with index.view() as view:
        entries = list(view.entries(b""))
        keys = [row.key for row in view.rows()]

    def damage(txn: Any, entry: bytes, key: bytes) -> None:
        wrong, other = bytearray(entry), bytearray(key)
        if kind == "a bit of the entry":
            wrong[chance.randrange(len(wrong))] ^= 1 << chance.randrange(8)
        elif kind == "a bit of the key":
            other[chance.randrange(len(other))] ^= 1 << chance.randrange(8)
        elif kind == "the key of another row":
            other[:] = chance.choice([one for one in keys if one != key])
        else:
            wrong[:32] = chance.choice([one for one in (NS.root, *keys) if one != entry[:32]])
        txn.delete(entry, db=index._databases["children"])
        txn.put(bytes(wrong), bytes(other), db=index._databases["children"])

    for share in [1 / len(entries), 0.1, 0.5] * ROUNDS:
        txn = index._env.begin(index._databases["rows"], write=True)
        try:
            for entry, key in chance.sample(entries, round(share * len(entries))):
                damage(txn, entry, key)
            yield View(txn, index._databases, index.ring, index.templates)
        finally:
            txn.abort()


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_child_never_gives_a_wrong_answer(engine: Engine, kind: str) -> None:
    """Each row of a match has the tokens asked for and stands after the row before it, or the index is damaged."""
    shorter = 0
    for view in damaged(engine, kind, random.Random(kind)):
        for tokens in PROMPTS:
            chain = Chain(NS.root, pack_tokens([*tokens, 5]))
            try:
                found = longest_prefix(view, chain, chain.n_tokens, 0)
            except CorruptDataError:
                shorter += 1
                continue
            parent, at = NS.root, 0
            for key, value, take in found.rows:
                row = parse_row(key, value, view.templates)
                asked = chain.tokens[at * TOKEN_BYTES : (at + take) * TOKEN_BYTES]
                assert (row.parent, row.start, row.tokens[: len(asked)]) == (parent, at, asked)
                parent, at = key, at + take
            assert at == found.n_tokens <= len(tokens)
            shorter += at < len(tokens)
    assert shorter, "no damage shows: the test shows nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_child_takes_no_row_of_another_parent_along(engine: Engine, kind: str) -> None:
    """Neither with a longer block that replaces its tails, nor with an evicted block that leads to it."""
    longer = [pack_row(sequence(NS, [*tokens, 5])[-1].block, 99, 0, 64) for tokens in PROMPTS]
    for view in damaged(engine, kind, random.Random(kind)):
        for row in longer:
            assert all(old.parent == row.parent for old in replaced_by(view, row))
        for top in list(view.rows()):
            taken = view.tree(top)
            assert all(row.parent in {one.key for one in taken} for row in taken[1:])
