"""The engine against a dictionary: whatever is stored, evicted and reopened, a match is the longest common prefix."""

from __future__ import annotations

import tempfile
from itertools import accumulate, chain
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.core.blocks import (
    BLOCK_TOKENS,
    FIDELITY_EXACT,
    Reason,
    common_tokens,
    count_tokens,
    pack_tokens,
    unpack_tokens,
)
from kvstore.core.keys import Chain, Namespace
from kvstore.engine import Engine, Selection
from kvstore.index.children import best_child
from kvstore.index.rows import LEVEL_TOKENS, Row, level_code, token_code
from tests.support.engine import (
    HYBRID,
    RECURRENT,
    checkpoint,
    find,
    namespace,
    new_block,
    options,
    put,
    require_sound,
)

NS = namespace()
HYBRIDS = (namespace("hybrid", HYBRID), namespace("recurrent", RECURRENT))
# Segments of which sequences are made: few, so that prefixes are shared, with the ids that codes treat differently.
SEGMENTS = [
    [0],
    [0, 0, 0],
    [5, -1],
    [(1 << 63) - 1] * 3,
    [(1 << 23) - 1, 1 << 23],
    list(range(100)),
    list(range(100, 255)),
    list(range(1000, 1000 + BLOCK_TOKENS)),
    [7] * 157,
]
SEQUENCES = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=5).map(
    lambda parts: list(chain.from_iterable(parts))
)
ACTIONS = st.one_of(
    st.tuples(st.just("store"), SEQUENCES),
    st.tuples(st.just("match"), SEQUENCES),
    st.tuples(st.just("evict"), st.integers(1, 40_000)),
    st.tuples(st.just("evict_tree"), st.integers(0, 100)),
    st.tuples(st.just("reopen"), st.just(None)),
)


def stored_rows(engine: Engine, ns: Namespace) -> list[tuple[Row, bytes]]:
    """Every row of a namespace with the whole token sequence that ends with it."""
    rows = {info.row.key: info.row for info in engine.list_blocks(ns.root, limit=10_000)}
    found = []
    for row in rows.values():
        above, tokens = row, row.tokens
        while above.parent != ns.root:
            above = rows[above.parent]
            tokens = above.tokens + tokens
        found.append((row, tokens))
    return found


def stored_sequences(engine: Engine) -> list[bytes]:
    """The whole token sequences of all blocks and tails."""
    return [tokens for row, tokens in stored_rows(engine, NS) if not row.is_checkpoint]


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, min_size=1, max_size=10))
def test_a_match_is_the_longest_common_prefix_of_what_is_stored(actions: list[tuple[str, object]]) -> None:
    """Against every stored sequence by brute force, and, as long as nothing was evicted, against what was given."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.open(Path(folder) / "data", options(durability="none"))
        given_sequences: list[bytes] = []
        evicted = False
        for name, detail in actions:
            if name == "store" and isinstance(detail, list):
                assert put(engine, NS, detail).reason is Reason.OK
                given_sequences.append(pack_tokens(detail))
                assert find(engine, NS, detail).n_tokens == len(detail)
            elif name == "evict" and isinstance(detail, int):
                evicted |= engine.evict(Selection(bytes=detail)).blocks > 0
            elif name == "evict_tree" and isinstance(detail, int):
                rows = engine.list_blocks()
                if rows:
                    row = rows[detail % len(rows)].row
                    evicted |= engine.evict(Selection(key_prefix=row.key)).blocks > 0
            elif name == "reopen":
                engine.close()
                engine = Engine.open(Path(folder) / "data", options(durability="none"))
            elif isinstance(detail, list):
                query = pack_tokens(detail)
                expected = max((common_tokens(query, each) for each in stored_sequences(engine)), default=0)
                match = find(engine, NS, detail)
                assert match.n_tokens == expected
                assert (match.reason is Reason.OK) == (expected == len(detail))
                if not evicted:
                    assert expected == max((common_tokens(query, each) for each in given_sequences), default=0)
        require_sound(engine)
        engine.close()


FIDELITIES = st.sampled_from([400, 900, FIDELITY_EXACT])
EXACT_ACTIONS = st.one_of(
    st.tuples(st.just("store"), SEQUENCES, FIDELITIES),
    st.tuples(st.just("match"), SEQUENCES, FIDELITIES),
    st.tuples(st.just("evict"), st.integers(1, 40_000), FIDELITIES),
    st.tuples(st.just("reopen"), st.none(), FIDELITIES),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(HYBRIDS), st.lists(EXACT_ACTIONS, min_size=1, max_size=8), st.data())
def test_an_exact_match_ends_at_the_longest_checkpoint_that_blocks_cover(
    ns: Namespace, actions: list[tuple[str, object, int]], data: st.DataObject
) -> None:
    """Against brute force: every checkpoint that is held, wherever it lies, whatever was evicted or thinned out."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.open(Path(folder) / "data", options(durability="none"))
        for name, detail, fidelity in actions:
            if name == "store" and isinstance(detail, list):
                assert put(engine, ns, detail, fidelity=fidelity).reason is Reason.OK
                for end in data.draw(st.sets(st.integers(1, len(detail)), max_size=5), "checkpoints"):
                    store_checkpoint(engine, ns, detail[:end], fidelity)
            elif name == "evict" and isinstance(detail, int):
                engine.evict(Selection(bytes=detail))
            elif name == "reopen":
                engine.close()
                engine = Engine.open(Path(folder) / "data", options(durability="none"))
            elif isinstance(detail, list):
                limit = data.draw(st.integers(0, len(detail)), "limit")
                require_longest(engine, ns, pack_tokens(detail), limit, fidelity)
        require_sound(engine)
        engine.close()


def store_checkpoint(engine: Engine, ns: Namespace, tokens: list[int], fidelity: int) -> None:
    """It is found at once, unless what it was computed on is not there, and never makes anything worse."""
    before = engine.checkpoint_at(Chain(ns.root, pack_tokens(tokens)))
    assert engine.store(ns.to_record(), [checkpoint(ns, tokens, fidelity)]).reason is Reason.OK
    after = engine.checkpoint_at(Chain(ns.root, pack_tokens(tokens)))
    assert after is not None and after.end == len(tokens)
    assert after.fidelity == max(fidelity, before.fidelity if before else 0)


def require_longest(engine: Engine, ns: Namespace, query: bytes, limit: int, floor: int) -> None:
    """An exact match against all that is stored."""
    held = stored_rows(engine, ns)
    covered = engine.match(Chain(ns.root, query), floor, limit).n_tokens
    ends = [
        row.end
        for row, tokens in held
        if row.is_checkpoint and row.fidelity >= floor and row.end <= covered and query.startswith(tokens)
    ]
    match = find(engine, ns, query, fidelity_min=floor, limit_tokens=limit, exact=True)
    assert match.n_tokens == max(ends, default=0)
    assert (match.checkpoint is None) == (not ends) and match.fidelity >= floor
    if covered > match.n_tokens:
        assert match.reason in (Reason.NO_CHECKPOINT, Reason.FIDELITY)
        assert match.diverged == bool(ends)
    else:
        assert match.reason is engine.match(Chain(ns.root, query), floor, limit).reason


TAILS = st.lists(
    st.lists(st.sampled_from([0, 1, -1, 1 << 23, (1 << 63) - 1, -(1 << 63)]), min_size=1, max_size=6), max_size=25
)


@settings(max_examples=60, deadline=None)
@given(TAILS, TAILS)
def test_the_best_child_is_found_among_any_siblings(tails: list[list[int]], queries: list[list[int]]) -> None:
    """Zeros, which look like the number that ends an entry, and ids with long codes included."""
    with tempfile.TemporaryDirectory() as folder, Engine.open(Path(folder) / "d", options(durability="none")) as engine:
        for tail in tails:
            engine.store(NS.to_record(), [new_block(NS.root, NS.root, 0, pack_tokens(tail))])
        kept = [info.row.tokens for info in engine.list_blocks()]
        packed = {pack_tokens(tail) for tail in tails}
        assert set(kept) == {a for a in packed if not any(a != b and b.startswith(a) for b in packed)}
        with engine._shared.index.view() as view:
            for query in map(pack_tokens, queries):
                _, take, low = best_child(view, NS.root, NS.root, query, 0)
                assert take == max((common_tokens(query, each) for each in kept), default=0)
                assert low == 0


TOKENS = st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 300), max_size=LEVEL_TOKENS).map(pack_tokens)


@given(st.lists(st.integers(0, (1 << 23) - 1), max_size=LEVEL_TOKENS))
def test_the_code_of_short_tokens_is_that_of_each_one_after_the_other(ids: list[int]) -> None:
    """Made of all at once it is the same."""
    assert level_code(pack_tokens(ids), 0, None) == b"".join(map(token_code, ids))


@given(TOKENS, TOKENS)
def test_codes_share_bytes_exactly_as_far_as_tokens_agree(a: bytes, b: bytes) -> None:
    """So the order of entries is the order of shared tokens."""
    one, two = level_code(a, 0, None), level_code(b, 0, None)
    ends = [0, *accumulate(len(token_code(token)) for token in unpack_tokens(a))]
    assert ends[-1] == len(one)
    shared = common_tokens(a, b)
    longest = min(len(one), len(two))
    shared_bytes = next((at for at in range(longest) if one[at] != two[at]), longest)
    assert shared_bytes >= ends[shared]
    if shared < min(count_tokens(a), count_tokens(b)):
        assert shared_bytes < ends[shared + 1]
