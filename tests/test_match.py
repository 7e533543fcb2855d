"""Matching against brute force, and what a match and a start cost, counted: lookups, entries and parsed rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.bench.bulk import call_clean, load_rows, sequence_tokens
from kvstore.blobs.fs import Fs
from kvstore.blobs.keyring import KeyRing
from kvstore.core.blocks import (
    BLOCK_TOKENS,
    FIDELITY_EXACT,
    TOKEN_BYTES,
    Block,
    Reason,
    Recipe,
    Run,
    Stack,
    Tensor,
    common_tokens,
    pack_tokens,
)
from kvstore.core.keys import Chain, block_key
from kvstore.engine import Engine, Match
from kvstore.engine import match as matching
from kvstore.engine.match import longest_prefix
from kvstore.index.children import best_child, is_covered, replaced_by
from kvstore.index.index import Index
from kvstore.index.rows import LEVEL_TOKENS, Row, Templates, child_entries, pack_row, parse_row
from kvstore.index.table import CHUNK
from kvstore.index.transaction import View
from tests.support.engine import find, namespace, new_block, options, put

NS = namespace()
BLOCKS = 5
ROOT = bytes(range(32))
STEP = BLOCK_TOKENS * TOKEN_BYTES


class Shelf:
    """An index that tests fill with blocks."""

    def __init__(self, path: Path, encrypted: bool) -> None:
        (path / "index").mkdir(parents=True)
        self.ring = KeyRing(path / "keys", Fs(), bytes(32), sync=False)
        self.key = self.ring.make(ROOT) if encrypted else None
        self.index = Index(path / "index", Fs(), self.ring, sync=False, map_bytes=1 << 30)
        self.rows: dict[bytes, Row] = {}
        self.number = 0

    def row(self, parent: bytes, start: int, tokens: bytes, fidelity: int) -> Row:
        """Of a block of raw bytes."""
        n = len(tokens) // TOKEN_BYTES
        stack = Stack("keys", (0,), Recipe("raw"), (Tensor("raw", "U8", 1, 1, checksums=bytes(8)),))
        run = Run(n, 0, n, fidelity, (stack,))
        self.number += 1
        block = Block(ROOT, parent, block_key(parent, tokens), start, tokens, fidelity, (run,), 1)
        return pack_row(block, self.number, 64, 64 + n)

    def put(self, rows: list[Row]) -> None:
        """In one transaction; a key that is there stays as it is."""
        with self.index.edit() as edit:
            edit.put_namespace(ROOT, b"record", 1)
            for row in rows:
                if row.key not in self.rows:
                    edit.put(row, 4096)
                    self.rows[row.key] = row

    def store(self, tokens: bytes, fidelity: int) -> None:
        """A whole sequence."""
        parent, rows = ROOT, []
        for at in range(0, len(tokens), STEP):
            chunk = tokens[at : at + STEP]
            rows.append(self.row(parent, at // TOKEN_BYTES, chunk, fidelity))
            parent = rows[-1].key
        self.put(rows)

    def longest(self, parent: bytes, rest: bytes, fidelity_min: int) -> int:
        """By brute force: a full block's key, then the best child."""
        first = rest[:STEP]
        full = self.rows.get(block_key(parent, first)) if len(first) == STEP else None
        if full is not None and full.fidelity >= fidelity_min:
            return BLOCK_TOKENS + self.longest(full.key, rest[STEP:], fidelity_min)
        shares = [
            common_tokens(row.tokens, first)
            for row in self.rows.values()
            if row.parent == parent and row.fidelity >= fidelity_min
        ]
        return max(shares, default=0)


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shelf]:
    """Empty."""
    made = Shelf(tmp_path, request.param)
    yield made
    made.index.close()


def sequences(seed: int, count: int, big: bool) -> list[bytes]:
    """Prompts that share prefixes of all lengths; with `big`, also ids that need nine bytes."""
    source = random.Random(seed)
    vocabulary = [0, 1, 2, 5, *([-1, 1 << 40] if big else [])]
    made: list[list[int]] = []
    for _ in range(count):
        base = source.choice(made)[: source.randrange(700)] if made and source.random() < 0.8 else []
        made.append(base + [source.choice(vocabulary) for _ in range(source.choice([1, 5, 31, 32, 33, 200, 300]))])
    return [pack_tokens(tokens[:700]) for tokens in made]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 20), big=st.booleans(), ranks=st.sampled_from([[5], [5, 9]]), ask=st.integers(0, 9))
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_match_is_the_longest_that_a_search_of_everything_finds(
    encrypted: bool, seed: int, big: bool, ranks: list[int], ask: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At every rank that is asked for. Of an encrypted namespace, not more than 31 tokens less."""
    shelf = Shelf(tmp_path_factory.mktemp("index"), encrypted)
    source = random.Random(seed)
    prompts = sequences(seed, 14, big)
    for tokens in prompts[:10]:
        shelf.store(tokens, source.choice(ranks))
    fidelity_min = ask if len(ranks) > 1 else 0
    with shelf.index.view() as view:
        for tokens in prompts:
            limit = source.randrange(len(tokens) // TOKEN_BYTES + 1)
            query = tokens[: limit * TOKEN_BYTES]
            found = longest_prefix(view, Chain(ROOT, tokens), limit, fidelity_min)
            assert found.n_tokens == sum(take for _, _, take in found.rows)
            expected = shelf.longest(ROOT, query, fidelity_min)
            assert expected - (LEVEL_TOKENS - 1 if encrypted else 0) <= found.n_tokens <= expected
            parent, at = ROOT, 0
            for key, value, take in found.rows:
                row = shelf.rows[key]
                assert row.parent == parent and value == row.value
                assert row.tokens[: take * TOKEN_BYTES] == query[at : at + take * TOKEN_BYTES]
                parent, at = key, at + take * TOKEN_BYTES
    shelf.index.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 20))
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_block_replaces_exactly_the_tails_that_it_covers(
    encrypted: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And what a longer sibling covers needs no row of its own."""
    shelf = Shelf(tmp_path_factory.mktemp("index"), encrypted)
    source = random.Random(seed)
    lines = [source.choices([0, 1, 2], k=BLOCK_TOKENS) for _ in range(3)]
    for _ in range(25):
        tokens = pack_tokens(source.choice(lines)[: source.randrange(1, BLOCK_TOKENS + 1)])
        shelf.put([shelf.row(ROOT, 0, tokens, 5)])
    new = shelf.row(ROOT, 0, pack_tokens(source.choice(lines)[: source.randrange(1, BLOCK_TOKENS + 1)]), 5)
    with shelf.index.view() as view:
        got = {row.key for row in replaced_by(view, new)} - {new.key}
        covered = {
            row.key for row in shelf.rows.values() if new.tokens.startswith(row.tokens) and row.tokens != new.tokens
        }
        assert got == covered
        longer = any(row.tokens.startswith(new.tokens) for row in shelf.rows.values())
        if not encrypted:
            assert is_covered(view, new) == longer
    shelf.index.close()


def test_what_is_removed_leaves_no_entry_behind(shelf: Shelf) -> None:
    """Of any kind."""
    for tokens in sequences(3, 10, big=True):
        shelf.store(tokens, 5)
    with shelf.index.edit() as edit:
        for row in sorted(shelf.rows.values(), key=lambda row: -row.start):
            edit.remove(row)
    with shelf.index.view() as view:
        assert [view.trees()[name]["entries"] for name in ("rows", "children", "namespaces")] == [0, 0, 0]
        assert len(shelf.index.table) == 0


def test_ten_thousand_siblings_cost_a_match_no_more_lookups_than_ten(tmp_path: Path) -> None:
    """All share 157 tokens, and their rows are looked at next to the query only."""
    looked: list[int] = []
    for count in (10, 10_000):
        shelf = Shelf(tmp_path / str(count), encrypted=False)
        shared = list(range(157))
        shelf.put([shelf.row(ROOT, 0, pack_tokens([*shared, 1000 + 2 * n, 7, 7]), 5) for n in range(count)])
        query = pack_tokens([*shared, 1000 + count + 1, 7])
        with shelf.index.view() as view:
            calls = 0
            plain = view.row

            def counted(key: bytes) -> Row | None:
                nonlocal calls
                calls += 1
                return plain(key)  # noqa: B023

            view.row = counted  # type: ignore[method-assign]
            row, take, _ = best_child(view, ROOT, ROOT, query, 0)
            assert row is not None and take == 157
            looked.append(calls)
        shelf.index.close()
    assert looked[1] <= 1.5 * looked[0] + 8


def test_entries_of_a_full_block_are_nine_and_no_key_is_too_long_for_lmdb(shelf: Shelf) -> None:
    """Also with ids that need nine bytes each."""
    row = shelf.row(ROOT, 0, pack_tokens([-(1 << 60)] * BLOCK_TOKENS), 5)
    entries = child_entries(row, shelf.key)
    assert len(entries) == len(set(entries)) == 9
    assert max(map(len, entries)) <= 511


def loaded(folder: Path, n_rows: int) -> Engine:
    """An engine over an index of so many rows, in sequences of BLOCKS."""
    load_rows(folder, NS, n_rows, BLOCKS)
    return Engine.open(folder, options())


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Keys of the rows that are looked up, as it happens."""
    seen: list[bytes] = []
    make = View.__init__

    def watched(view: View, txn: Any, *rest: Any) -> None:
        make(view, txn, *rest)

        def stored(key: bytes) -> bytes | None:
            seen.append(key)
            found: bytes | None = txn.get(key)
            return found

        view.stored = stored

    monkeypatch.setattr(View, "__init__", watched)
    return seen


@pytest.mark.parametrize("n_rows", [BLOCKS, 400 * BLOCKS])
def test_a_match_looks_up_each_block_once_however_many_rows_there_are(
    tmp_path: Path, n_rows: int, looked_up: list[bytes]
) -> None:
    """One lookup a block that is there; for the first that is not, one more and its two neighbours."""
    with loaded(tmp_path / "data", n_rows) as engine:
        looked_up.clear()
        tokens = sequence_tokens(0, BLOCKS * BLOCK_TOKENS)
        assert engine.match(Chain(NS.root, tokens)).n_tokens == BLOCKS * BLOCK_TOKENS
        assert len(looked_up) == BLOCKS
        looked_up.clear()
        assert engine.match(Chain(NS.root, sequence_tokens(10**6, 40 * BLOCK_TOKENS))).n_tokens == 0
        assert len(looked_up) <= 3


def test_a_match_parses_no_row_until_somebody_looks_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it is and how exact is known without; the rows are the same as ever when asked for, and parsed once."""
    parsed: list[bytes] = []

    def watched(key: bytes, value: bytes, templates: Templates) -> Row:
        parsed.append(key)
        return parse_row(key, value, templates)

    monkeypatch.setattr(matching, "parse_row", watched)
    with loaded(tmp_path / "data", 2 * BLOCKS) as engine:
        match = engine.match(Chain(NS.root, sequence_tokens(1, BLOCKS * BLOCK_TOKENS)))
        assert (match.n_tokens, match.fidelity, parsed) == (BLOCKS * BLOCK_TOKENS, FIDELITY_EXACT, [])
        assert [part.row.start for part in match.slices] == [number * BLOCK_TOKENS for number in range(BLOCKS)]
        assert [part.row.key for part in match.parts] == parsed


def test_the_fidelity_of_a_match_is_the_least_of_its_blocks(tmp_path: Path) -> None:
    """Of the tail too; of nothing it is exact; blocks below what is asked for end it."""
    with Engine.open(tmp_path / "data", options()) as engine:
        tokens = list(range(600))
        put(engine, NS, tokens[:512])
        put(engine, NS, tokens, fidelity=850)
        assert find(engine, NS, tokens[:512]).fidelity == FIDELITY_EXACT
        assert find(engine, NS, tokens).fidelity == 850
        assert find(engine, NS, tokens, fidelity_min=900).n_tokens == 512
        put(engine, namespace("other"), tokens, fidelity=400)
        assert find(engine, namespace("other"), tokens, fidelity_min=850).n_tokens == 0
        assert find(engine, NS, [-1]).fidelity == FIDELITY_EXACT


def test_a_start_after_an_orderly_stop_reads_the_table_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Totals, listings and the order of use come from the table, which is read a chunk at a time."""
    read: Counter[str] = Counter()
    walk = View._from

    def watched(view: View, name: str, start: bytes, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        for entry in walk(view, name, start, reverse):
            read[name] += 1
            yield entry

    for n_rows in (10, 3000):
        load_rows(tmp_path / str(n_rows), NS, n_rows, BLOCKS)
        with monkeypatch.context() as patch:
            patch.setattr(View, "_from", watched)
            patch.setattr(matching, "parse_row", None)
            # Rows without blobs look as if there were blobs without rows, which may be encrypted.
            patch.setattr("kvstore.engine.engine.find_missing_keys", lambda site: None)
            read.clear()
            with Engine.open(tmp_path / str(n_rows), options(budget_bytes=1 << 40)) as engine:
                assert read == {"retain": -(-n_rows // CHUNK), "namespaces": 1, "templates": 1}
                assert engine.stats().blobs == n_rows
                assert engine.stats().namespaces[0].tokens == n_rows * BLOCK_TOKENS


def test_rows_loaded_in_bulk_are_rows_like_others(tmp_path: Path) -> None:
    """Found by every prefix, listed, counted, kept over a stop, and joined by rows that are stored after them."""
    with loaded(tmp_path / "data", 3 * BLOCKS) as engine:
        assert len(engine.list_blocks()) == engine.stats().blobs == 3 * BLOCKS
        for number in range(3):
            tokens = sequence_tokens(number, BLOCKS * BLOCK_TOKENS)
            for n_tokens in (BLOCKS * BLOCK_TOKENS, 2 * BLOCK_TOKENS, 300, 7):
                match = engine.match(Chain(NS.root, tokens[: n_tokens * 8]))
                assert match.n_tokens == n_tokens
                assert all(len(part.row.block.runs) == 1 for part in match.slices)
        put(engine, NS, [1, 2, 3])
        assert find(engine, NS, [1, 2, 3]).slices[0].row.number > 3 * BLOCKS
    call_clean(tmp_path / "data")
    with Engine.open(tmp_path / "data", options()) as engine:
        assert engine.stats().blobs == 3 * BLOCKS + 1


def test_the_digest_of_templates_names_the_set_and_nothing_else() -> None:
    """Order, number and length of runs do not count; layers, recipes and tensors do. Never 0, but of no runs."""

    def digest(*recipes: Recipe, layers: tuple[int, ...] = (0,), n_tokens: int = 1) -> int:
        stacks = [Stack("keys", layers, recipe, (Tensor("data", "F32", 1, 2),)) for recipe in recipes]
        runs = tuple(Run(n_tokens, 0, n_tokens, 5, (stack,)) for stack in stacks)
        tokens = bytes(TOKEN_BYTES * n_tokens * len(runs))
        block = replace(new_block(NS.root, NS.root, 0, tokens or bytes(TOKEN_BYTES)).block, runs=runs)
        return pack_row(block, 1, 64, 640).templates_digest

    raw, coded = Recipe("raw"), Recipe("affine", 1, (("bits", 8), ("group", 64)))
    assert digest(raw, coded) == digest(coded, raw, coded) == digest(raw, coded, n_tokens=3) != 0
    others = [raw, coded, Recipe("raw", 2), Recipe("affine", 1, (("bits", 4), ("group", 64))), Recipe("affine")]
    made = {digest(recipe) for recipe in others} | {digest(raw, coded), digest(raw, layers=(0, 1))}
    assert len(made) == len(others) + 2 and 0 not in made
    assert digest() == 0


def test_an_empty_match_has_no_parts() -> None:
    """As it is made for a miss."""
    match = Match(0, Reason.EVICTED)
    assert (match.slices, match.parts, match.fidelity) == ((), (), FIDELITY_EXACT)
