"""Finds children of a block: the one that shares most with a prompt, and those that a longer block covers.

Bisection over the levels of `kvstore.index.rows` finds how many times 32 tokens any child shares, and the best child
stands next to where the query would, so that the number of siblings does not count.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from kvstore.blobs.keyring import NamespaceKey
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, TOKEN_BYTES, common_tokens
from kvstore.errors import CorruptDataError
from kvstore.index.rows import LEVEL_TOKENS, TAIL_MARK, Row, child_entries, level_code, level_prefix, tail_prefix
from kvstore.index.transaction import View

# Siblings that are looked at on each side, of which those of too low a fidelity are passed over; and those that share
# exactly as much as the best so far, one of which may be of higher fidelity.
SIDE_MAX = 64
TIES_MAX = 8


def best_child(view: View, root: bytes, parent: bytes, rest: bytes, fidelity_min: int) -> tuple[Row | None, int, int]:
    """The child of `parent` that shares most leading tokens with `rest`; of equals, one of higher fidelity.

    Returns (row, tokens shared, most tokens shared by a child below `fidelity_min`).
    """
    best: Row | None = None
    take = low_take = 0
    key = view.ring.key(root)
    for level in _levels(view, parent, rest, key) if rest else ():
        prefix, code = level_prefix(parent, rest, level, key), level_code(rest, level, key)
        # Up and down from where `rest` would stand, the closest first; in an encrypted namespace there is no order.
        for is_below in (False, True):
            ties = TIES_MAX
            for row in _rows_of(view, parent, view.entries(prefix, code, reverse=is_below)):
                shared = common_tokens(row.tokens, rest)
                if key is None and (not shared or shared < take or not ties):
                    break  # they stand in order: what comes next shares no more
                if shared == len(rest) // TOKEN_BYTES and row.fidelity >= max(fidelity_min, FIDELITY_EXACT):
                    return row, shared, low_take  # there is none better
                if row.fidelity < fidelity_min:
                    low_take = max(low_take, shared)
                elif shared > take or (best is not None and shared == take and row.fidelity > best.fidelity):
                    best, take = row, shared
                else:
                    ties -= 1
        if best is not None:
            break
    return best, take, low_take


def is_linked(view: View, row: Row) -> bool:
    """Whether a row stands under all its entries among its parent's children. Without its key it cannot say."""
    if row.is_key_missing and not row.kind:
        return True
    entries = child_entries(row, view.ring.key(row.root))
    return all(next(view.entries(entry), (b"", b""))[1] == row.key for entry in entries)


def _levels(view: View, parent: bytes, rest: bytes, key: NamespaceKey | None) -> Iterator[int]:
    """The levels at which a child of `parent` may share the head of `rest`, deepest first.

    The deepest is given without a lookup: if the prompt was stored before, some child shares all of `rest`. Below it, a
    binary search finds the deepest level at which any child does.
    """
    last = len(rest) // (LEVEL_TOKENS * TOKEN_BYTES)
    yield last
    low, high = 0, last - 1
    while low < high:
        level = (low + high + 1) // 2
        if next(view.entries(level_prefix(parent, rest, level, key)), None) is None:
            high = level - 1
        else:
            low = level
    yield from range(high, -1, -1)


def _rows_of(view: View, parent: bytes, entries: Iterator[tuple[bytes, bytes]]) -> Iterator[Row]:
    """The children of the first entries, SIDE_MAX at most, that can be read."""
    for _, child in itertools.islice(entries, SIDE_MAX):
        row = view.row(child)
        if row is not None and row.parent != parent:
            raise CorruptDataError("index: a child of another parent")
        if row is not None and not row.is_key_missing:
            yield row


def is_covered(view: View, row: Row) -> bool:
    """Whether a row of the same key, or a longer sibling, already gives these tokens at this fidelity or a higher."""
    held = view.row(row.key)
    if held is not None and not held.is_key_missing and not held.is_lost:
        return held.fidelity >= row.fidelity
    if row.n_tokens == BLOCK_TOKENS or row.kind:
        return False
    return best_child(view, row.root, row.parent, row.tokens, row.fidelity)[1] == row.n_tokens


def replaced_by(view: View, row: Row, short_tokens: int = 0) -> list[Row]:
    """Rows that a new row takes the place of: the one of its key and, unless it is a checkpoint or aux, shorter tails.

    A tail of higher fidelity stays, for callers who take nothing less, unless it ends before `short_tokens`. So short a
    sequence is never quantized, for any caller, and its fidelity until it grows is no promise.
    """
    held = view.row(row.key)
    shorter = [] if row.kind else _shorter_tails(view, row.root, row.parent, row.tokens)
    given = [old for old in shorter if old.fidelity <= row.fidelity or old.end < short_tokens]
    return ([held] if held else []) + given


def _shorter_tails(view: View, root: bytes, parent: bytes, tokens: bytes) -> list[Row]:
    """Children of `parent` whose tokens are a strict prefix of `tokens`: one lookup for each length that tails have."""
    found: list[Row] = []
    key, prefix = view.ring.key(root), parent + TAIL_MARK
    at_most = len(tokens) // TOKEN_BYTES
    while below := next(view.entries(prefix, at_most.to_bytes(2, "big"), reverse=True), None):
        at_most = int.from_bytes(below[0][len(prefix) : len(prefix) + 2], "big")
        tail = tokens[: at_most * TOKEN_BYTES]
        rows = [view.row(child) for _, child in view.entries(tail_prefix(parent, tail, key))]
        own = [row for row in rows if row is not None and row.parent == parent and not row.is_key_missing]
        found += [row for row in own if row.tokens == tail]
    return found
