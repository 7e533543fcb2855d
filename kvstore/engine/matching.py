"""The longest stored prefix of a token sequence, from the index alone. Pure over a `View`.

Full blocks are found by key, one lookup each, and their token bytes compared. After the last of them the best child is
cut: children stand in the order of their leading tokens, so the walk starts where the query would be inserted, goes
both ways, and ends where the code can no longer promise a longer match. A checkpoint shares no byte of a code, so it
is never a child to be cut; for layouts that need one, `longest_exact` looks for the longest position that has one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.blocks import BLOCK_TOKENS, KEY_BYTES, TOKEN_BYTES, common_tokens
from kvstore.engine.index import View
from kvstore.engine.rows import (
    SEQ_BYTES,
    TOKENS_AT,
    Code,
    Row,
    Taken,
    checkpoint_code,
    common_bytes,
    fidelity_of,
    parse_row,
)
from kvstore.errors import CorruptDataError
from kvstore.keys import block_key, chain_keys

# Children whose first 157 or so tokens are equal cannot be told apart by their code; so many are looked at.
SCAN_MAX = 4096
# Siblings that share exactly as much as the best so far; a few are looked at for their fidelity.
TIES_MAX = 16
# A seq stays below 2^40, so an entry that ends after its code stands before those whose next token is not 0.
_SEQ_TOP = bytes(3)
_BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of a prefix, as they stand in the index, with the tokens to take of each, and what hindered more.

    The first `full` tokens come from full blocks, the last of which has key `parent`. `better`: a block of too low
    fidelity would have given more.
    """

    rows: tuple[Taken, ...]
    n_tokens: int
    full: int
    parent: bytes
    better: bool


def longest_prefix(view: View, root: bytes, tokens: bytes, limit_tokens: int, fidelity_min: int) -> Found:
    """The longest stored prefix of `tokens[:limit_tokens]` whose blocks are all of `fidelity_min` or more."""
    end = min(len(tokens), limit_tokens * TOKEN_BYTES)
    parent = root
    rows: list[Taken] = []
    stored = view.stored
    # Of the time for a block, hashing and the lookup take most; whatever else stands in this loop shows.
    for at in range(0, end - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        chunk = tokens[at : at + _BLOCK_BYTES]
        key = block_key(parent, chunk)
        value = stored(key)
        if value is None:
            break
        if not value.startswith(chunk, TOKENS_AT):
            value = view.value(key)  # it may be encrypted
            if value is None or not value.startswith(chunk, TOKENS_AT):
                break
        if fidelity_min and fidelity_of(value) < fidelity_min:
            break
        rows.append((key, value, BLOCK_TOKENS))
        parent = key
    at = len(rows) * _BLOCK_BYTES
    best, take, low_take = best_child(view, root, parent, tokens[at : min(end, at + _BLOCK_BYTES)], fidelity_min)
    if best is not None:
        rows.append((best.key, best.value, take))
    full = at // TOKEN_BYTES
    return Found(tuple(rows), full + take, full, parent, low_take > take)


def best_child(view: View, root: bytes, parent: bytes, rest: bytes, fidelity_min: int) -> tuple[Row | None, int, int]:
    """The child of `parent` that shares most leading tokens with `rest`; of equals, one of higher fidelity.

    Returns (row, tokens shared, most tokens shared by a child below `fidelity_min`).
    """
    best: Row | None = None
    take = low_take = 0
    if not rest:
        return best, take, low_take
    if view.ring.key(root):
        return _best_sealed_child(view, root, parent, rest, fidelity_min)
    code = Code.of(rest)
    target = parent + code.data
    remaining = SCAN_MAX
    for reverse in (False, True):
        ties = TIES_MAX
        for entry, key in view.children(parent, code.data, reverse):
            promised = _tokens_at_most(code, common_bytes(entry, target) - KEY_BYTES, rest)
            remaining -= 1
            ties -= promised == take
            if promised < max(1, take) or remaining < 0 or ties < 0:
                break
            row = view.row(key)
            if row is not None and row.parent != parent:
                raise CorruptDataError("index: a child of another parent")
            shared = common_tokens(row.tokens, rest) if row else 0
            if row is None or row.fidelity < fidelity_min:
                low_take = max(low_take, shared)
            elif shared > take or (best is not None and shared == take and row.fidelity > best.fidelity):
                best, take = row, shared
    return best, take, low_take


def _best_sealed_child(
    view: View, root: bytes, parent: bytes, rest: bytes, fidelity_min: int
) -> tuple[Row | None, int, int]:
    """As `best_child`, in a namespace whose children stand in no order that tells of tokens."""
    best: Row | None = None
    take = low_take = 0
    for row in _sealed_children(view, root, parent, rest):
        shared = common_tokens(row.tokens, rest)
        if row.fidelity < fidelity_min:
            low_take = max(low_take, shared)
        elif shared > take or (best is not None and shared == take and row.fidelity > best.fidelity):
            best, take = row, shared
    return best, take, low_take


def _sealed_children(view: View, root: bytes, parent: bytes, tokens: bytes) -> Iterator[Row]:
    """Children that may share leading tokens with these, decrypted, SCAN_MAX at most; checkpoints are none."""
    key = view.ring.key(root)
    remaining = SCAN_MAX
    for code in key.child_codes(tokens) if key else ():
        for entry, child in view.children(parent, code):
            remaining -= 1
            if not entry.startswith(code, KEY_BYTES) or remaining < 0:
                break
            row = view.row(child)
            if row is not None and not row.is_sealed and row.parent == parent:
                yield row


@dataclass(frozen=True, slots=True)
class Exact:
    """A prefix cut to the position of its last checkpoint, with rows as in `Found`.

    `better`: a checkpoint of too low fidelity would have given more. `diverged`: what is stored goes on after the
    checkpoint, differently from the query.
    """

    rows: tuple[Taken, ...]
    checkpoint: Row | None
    better: bool
    diverged: bool


def longest_exact(view: View, root: bytes, tokens: bytes, found: Found, fidelity_min: int) -> Exact:
    """The longest position with a checkpoint of `fidelity_min` or more among those that `found` covers."""
    better = False
    for level in range(found.full // BLOCK_TOKENS, -1, -1):
        parent = found.rows[level - 1][0] if level else root
        # At the end of a full block the checkpoint is one level deeper, with no tokens of its own.
        covered = min(found.n_tokens - level * BLOCK_TOKENS, BLOCK_TOKENS - 1)
        start = level * _BLOCK_BYTES
        for row in view.checkpoints(parent, tokens[start : start + covered * TOKEN_BYTES]):
            if row.fidelity < fidelity_min:
                better = True
                continue
            rows = _cut(found.rows, row.end)
            return Exact(rows, row, better, found.n_tokens > row.end or _goes_on(view, rows))
    return Exact((), None, better, False)


def checkpoint_at(view: View, root: bytes, tokens: bytes) -> Row | None:
    """The checkpoint after exactly these packed tokens."""
    keys = chain_keys(root, tokens)
    tail = tokens[len(keys) * _BLOCK_BYTES :]
    found = next(view.checkpoints(keys[-1] if keys else root, tail), None)
    return found if found is not None and found.tokens == tail else None


def _cut(rows: tuple[Taken, ...], end: int) -> tuple[Taken, ...]:
    """Rows with the tokens to take of each, no further than position `end`. All but the last are full blocks."""
    starts = range(0, end, BLOCK_TOKENS)
    return tuple((key, value, min(take, end - start)) for start, (key, value, take) in zip(starts, rows, strict=False))


def _goes_on(view: View, rows: tuple[Taken, ...]) -> bool:
    """Whether more is stored after exactly these rows: the rest of the last one, or what follows it."""
    key, value, take = rows[-1]
    row = parse_row(key, value)
    if take < row.n_tokens or take < BLOCK_TOKENS:
        return take < row.n_tokens
    here = checkpoint_code(0)
    return any(not entry.startswith(here, KEY_BYTES) for entry, _ in itertools.islice(view.children(row.key), 2))


def _tokens_at_most(code: Code, shared_bytes: int, rest: bytes) -> int:
    """How many tokens an entry that shares so many bytes of the code, or one beyond it, can share at most."""
    if shared_bytes >= len(code.data):
        return len(rest) // TOKEN_BYTES
    return bisect.bisect_right(code.ends, shared_bytes)


def is_covered(view: View, row: Row) -> bool:
    """Whether a row of the same key, or a longer sibling, already gives these tokens at this fidelity or a higher."""
    held = view.row(row.key)
    if held is not None and not held.is_sealed:
        return held.fidelity >= row.fidelity
    if row.n_tokens == BLOCK_TOKENS or row.is_checkpoint:
        return False
    return best_child(view, row.root, row.parent, row.tokens, row.fidelity)[1] == row.n_tokens


def replaced_by(view: View, row: Row, short_tokens: int = 0) -> list[Row]:
    """Rows that a new row takes the place of: the one of its key and, unless it is a checkpoint, shorter tails.

    A tail of higher fidelity stays, for those who take nothing less, unless it ends before `short_tokens`: so short a
    sequence is not quantized whoever stores it, and what it is kept as until it grows is no promise.
    """
    held = view.row(row.key)
    shorter = [] if row.is_checkpoint else _shorter_tails(view, row.root, row.parent, row.tokens)
    given = [old for old in shorter if old.fidelity <= row.fidelity or old.end < short_tokens]
    return ([held] if held else []) + given


def _shorter_tails(view: View, root: bytes, parent: bytes, tokens: bytes) -> list[Row]:
    """Children of `parent` whose tokens are a strict prefix of `tokens`.

    A tail of n tokens stands at the start of the entries that share its n codes, followed only by its seq; so one seek
    for each n finds it, however many siblings share the prefix.
    """
    if not view.has_children(parent):
        return []
    if view.ring.key(root):
        return [row for row in _sealed_children(view, root, parent, tokens) if _is_shorter(row, tokens)]
    code = Code.of(tokens)
    starts = [(code.data[:end], False) for end in (code.ends[:-1] if code.complete else code.ends)]
    if not code.complete:
        # Tails too long for their code stand together at the cut code.
        starts.append((code.data, True))
    keys = dict.fromkeys(key for start, cut in starts for key in _group(view, parent, start, cut))
    rows = [view.row(key) for key in keys]
    return [row for row in rows if row and _is_shorter(row, tokens)]


def _is_shorter(row: Row, tokens: bytes) -> bool:
    return len(row.tokens) < len(tokens) and tokens.startswith(row.tokens)


def _group(view: View, parent: bytes, start: bytes, cut: bool) -> Iterator[bytes]:
    """Keys of the children whose code is exactly `start`."""
    at = KEY_BYTES + len(start)
    for count, (entry, key) in enumerate(view.children(parent, start)):
        if not entry.startswith(start, KEY_BYTES) or count >= SCAN_MAX:
            return
        if len(entry) == at + SEQ_BYTES:
            yield key
        elif not cut and entry[at : at + 3] != _SEQ_TOP:
            return
