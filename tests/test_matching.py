"""What a match and a start cost, counted: lookups and parsed rows, whatever the number of rows in the index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.bench.bulk import call_clean, load_rows, sequence_tokens
from kvstore.blocks import BLOCK_TOKENS, FIDELITY_EXACT, Recipe, Run, Stack, Tensor
from kvstore.engine import Engine, Match, Row, nouns, rows
from kvstore.engine.index import View
from kvstore.engine.rows import recipes_digest
from tests.support.engine import find, namespace, new_block, options, put

NS = namespace()
BLOCKS = 5


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
    """One lookup a block that is there, and one for the first that is not."""
    with loaded(tmp_path / "data", n_rows) as engine:
        looked_up.clear()
        tokens = sequence_tokens(0, BLOCKS * BLOCK_TOKENS)
        assert engine.match(NS.root, tokens).n_tokens == BLOCKS * BLOCK_TOKENS
        assert len(looked_up) == BLOCKS
        looked_up.clear()
        assert engine.match(NS.root, sequence_tokens(10**6, 40 * BLOCK_TOKENS)).n_tokens == 0
        assert len(looked_up) == 1


def test_a_match_parses_no_row_until_somebody_looks_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it is and how exact is known without; the rows are the same as ever when asked for, and parsed once."""
    parsed: list[bytes] = []
    parse = rows.parse_row

    def watched(key: bytes, value: bytes) -> Row:
        parsed.append(key)
        return parse(key, value)

    monkeypatch.setattr(nouns, "parse_row", watched)
    with loaded(tmp_path / "data", 2 * BLOCKS) as engine:
        match = engine.match(NS.root, sequence_tokens(1, BLOCKS * BLOCK_TOKENS))
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


def test_a_start_after_an_orderly_stop_reads_the_same_few_entries_of_any_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State, totals and order of use come from counters and single entries; no database is walked."""
    read = 0
    walk = View._from

    def watched(view: View, name: str, start: bytes, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        nonlocal read
        for entry in walk(view, name, start, reverse):
            read += 1
            yield entry

    counts = []
    for n_rows in (10, 3000):
        load_rows(tmp_path / str(n_rows), NS, n_rows, BLOCKS)
        with monkeypatch.context() as patch:
            patch.setattr(View, "_from", watched)
            patch.setattr(nouns, "parse_row", None)
            read = 0
            with Engine.open(tmp_path / str(n_rows), options(budget_bytes=1 << 40)) as engine:
                counts.append(read)
                assert engine.stats().blobs == n_rows
                assert engine.stats().namespaces[0].tokens == n_rows * BLOCK_TOKENS
    assert counts[0] == counts[1] < 20


def test_rows_loaded_in_bulk_are_rows_like_others(tmp_path: Path) -> None:
    """Found by every prefix, listed, counted, kept over a stop, and joined by rows that are stored after them."""
    with loaded(tmp_path / "data", 3 * BLOCKS) as engine:
        assert len(engine.list_blocks()) == engine.stats().blobs == 3 * BLOCKS
        for number in range(3):
            tokens = sequence_tokens(number, BLOCKS * BLOCK_TOKENS)
            for n_tokens in (BLOCKS * BLOCK_TOKENS, 2 * BLOCK_TOKENS, 300, 7):
                match = engine.match(NS.root, tokens[: n_tokens * 8])
                assert match.n_tokens == n_tokens
                assert all(len(part.row.block.runs) == 1 for part in match.slices)
        put(engine, NS, [1, 2, 3])
        assert find(engine, NS, [1, 2, 3]).slices[0].row.number > 3 * BLOCKS
    call_clean(tmp_path / "data")
    with Engine.open(tmp_path / "data", options()) as engine:
        assert engine.stats().blobs == 3 * BLOCKS + 1


def test_the_digest_of_recipes_names_the_set_and_nothing_else() -> None:
    """Order, number of runs, layers and tokens do not count; name, version and every parameter do. Never 0."""

    def digest(*recipes: Recipe) -> int:
        stacks = tuple(Stack("keys", (0,), recipe, (Tensor("data", "F32", 1, 2),)) for recipe in recipes)
        block = new_block(NS.root, NS.root, 0, bytes(16)).block
        runs = tuple(Run(1, 0, 1, 5, (stack,)) for stack in stacks)
        return recipes_digest(replace(block, runs=runs))

    raw, coded = Recipe("raw"), Recipe("affine", 1, (("bits", 8), ("group", 64)))
    assert digest(raw, coded) == digest(coded, raw, coded) != 0
    others = [raw, coded, Recipe("raw", 2), Recipe("affine", 1, (("bits", 4), ("group", 64))), Recipe("affine")]
    assert len({digest(recipe) for recipe in others} | {digest(raw, coded)}) == len(others) + 1


def test_an_empty_match_has_no_parts() -> None:
    """As it is made for a miss."""
    match = Match(0, nouns.Reason.EVICTED)
    assert (match.slices, match.parts, match.fidelity) == ((), (), FIDELITY_EXACT)
