"""Finds the longest stored prefix of a prompt in the index, without reading blobs, and says why it ends there.

Full blocks are found by key, one lookup each, and their token bytes compared. After the last of them the best child is
cut: bisection over the levels of `kvstore.engine.rows` finds how many times 32 tokens any child shares, and the best
child stands next to where the query would, so that the number of siblings does not count. For layouts that need a
checkpoint, `longest_exact` looks for the longest position that has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, Reason, common_tokens
from kvstore.core.keys import Chain, block_key
from kvstore.core.records import template_ids
from kvstore.core.rules import check_states
from kvstore.engine.deletions import HEAD_TOKENS, HEAD_TOKENS_BYTES
from kvstore.engine.keyring import NamespaceKey
from kvstore.engine.rows import (
    LEVEL_TOKENS,
    TAIL_MARK,
    TOKENS_AT,
    Code,
    Row,
    Taken,
    fidelity_of,
    level_prefix,
    level_tokens,
    parse_row,
    tail_prefix,
)
from kvstore.engine.transaction import View
from kvstore.engine.types import Match, Slice
from kvstore.errors import CorruptDataError

if TYPE_CHECKING:
    from kvstore.engine.shared import Shared

# Siblings that are looked at on each side, of which those of too low a fidelity are passed over; and those that share
# exactly as much as the best so far, one of which may be of higher fidelity.
SIDE_MAX = 64
TIES_MAX = 8
_BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Found:
    """The longest stored prefix: index rows, not yet parsed, with the tokens to take of each.

    The first `full` tokens come from full blocks; `parent` is the key of the last full block. `better`: the prefix
    would be longer if a block of lower fidelity were allowed.
    """

    rows: tuple[Taken, ...]
    n_tokens: int
    full: int
    parent: bytes
    better: bool


def longest_prefix(view: View, chain: Chain, limit_tokens: int, fidelity_min: int) -> Found:
    """The longest stored prefix of the first `limit_tokens` whose blocks are all of `fidelity_min` or more."""
    tokens = chain.tokens
    end = min(len(tokens), limit_tokens * TOKEN_BYTES)
    rows: list[Taken] = []
    stored, key_of = view.stored, chain.key
    # Of the time for a block, hashing and the lookup take most; whatever else stands in this loop shows.
    for index in range(end // _BLOCK_BYTES):
        chunk = tokens[index * _BLOCK_BYTES : (index + 1) * _BLOCK_BYTES]
        key = key_of(index)
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
    at, parent = len(rows) * _BLOCK_BYTES, chain.parent(len(rows))
    best, take, low_take = best_child(view, chain.root, parent, tokens[at : min(end, at + _BLOCK_BYTES)], fidelity_min)
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
    key = view.ring.key(root)
    for level in range(_deepest_level(view, parent, rest, key), -1, -1) if rest else ():
        for side in _neighbours(view, parent, rest, level, key):
            ties = TIES_MAX
            for row in side:
                shared = common_tokens(row.tokens, rest)
                if key is None and (not shared or shared < take or not ties):
                    break  # they stand in order: what comes next shares no more
                if row.fidelity < fidelity_min:
                    low_take = max(low_take, shared)
                elif shared > take or (best is not None and shared == take and row.fidelity > best.fidelity):
                    best, take = row, shared
                else:
                    ties -= 1
        if best is not None:
            break
    return best, take, low_take


def _deepest_level(view: View, parent: bytes, rest: bytes, key: NamespaceKey | None) -> int:
    """The highest level at which some child of `parent` shares the head of `rest`; 0 if none does."""
    low, high = 0, len(rest) // (LEVEL_TOKENS * TOKEN_BYTES)
    while low < high:
        middle = (low + high + 1) // 2
        if next(view.entries(level_prefix(parent, rest, middle, key)), None) is None:
            high = middle - 1
        else:
            low = middle
    return low


def _neighbours(
    view: View, parent: bytes, rest: bytes, level: int, key: NamespaceKey | None
) -> tuple[Iterator[Row], Iterator[Row]]:
    """Children that share the head of a level, upwards and downwards from where `rest` would stand: closest first.

    SIDE_MAX on each side. In an encrypted namespace they stand in no order.
    """
    prefix = level_prefix(parent, rest, level, key)
    code = b"" if key else Code.of(level_tokens(rest, level)).data
    above, below = view.entries(prefix, code), view.entries(prefix, code, reverse=True)
    return _rows_of(view, parent, above), _rows_of(view, parent, below)


def _rows_of(view: View, parent: bytes, entries: Iterator[tuple[bytes, bytes]]) -> Iterator[Row]:
    for _, child in itertools.islice(entries, SIDE_MAX):
        row = view.row(child)
        if row is not None and row.parent != parent:
            raise CorruptDataError("index: a child of another parent")
        if row is not None and not row.is_key_missing:
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


def longest_exact(view: View, chain: Chain, found: Found, fidelity_min: int) -> Exact:
    """The longest position with a checkpoint of `fidelity_min` or more among those that `found` covers."""
    better = False
    for level in range(found.full // BLOCK_TOKENS, -1, -1):
        parent = chain.parent(level)
        # At the end of a full block the checkpoint is one level deeper, with no tokens of its own.
        covered = min(found.n_tokens - level * BLOCK_TOKENS, BLOCK_TOKENS - 1)
        start = level * _BLOCK_BYTES
        for row in view.checkpoints(parent, chain.tokens[start : start + covered * TOKEN_BYTES]):
            if row.fidelity < fidelity_min:
                better = True
                continue
            rows = _cut(found.rows, row.end)
            return Exact(rows, row, better, found.n_tokens > row.end or _goes_on(view, rows))
    return Exact((), None, better, False)


def checkpoint_at(view: View, chain: Chain) -> Row | None:
    """The checkpoint after exactly the last token."""
    found = next(view.checkpoints(chain.parent(chain.full), chain.tail), None)
    return found if found is not None and found.tokens == chain.tail else None


def _cut(rows: tuple[Taken, ...], end: int) -> tuple[Taken, ...]:
    """Rows with the tokens to take of each, no further than position `end`. All but the last are full blocks."""
    starts = range(0, end, BLOCK_TOKENS)
    return tuple((key, value, min(take, end - start)) for start, (key, value, take) in zip(starts, rows, strict=False))


def _goes_on(view: View, rows: tuple[Taken, ...]) -> bool:
    """Whether more is stored after exactly these rows: the rest of the last one, or what follows it."""
    key, value, take = rows[-1]
    row = parse_row(key, value, view.templates)
    if take < row.n_tokens or take < BLOCK_TOKENS:
        return take < row.n_tokens
    here = (child for key in view.children(row.key) if (child := view.row(key)) is not None)
    return any(not child.is_checkpoint or child.n_tokens for child in itertools.islice(here, 2))


def is_covered(view: View, row: Row) -> bool:
    """Whether a row of the same key, or a longer sibling, already gives these tokens at this fidelity or a higher."""
    held = view.row(row.key)
    if held is not None and not held.is_key_missing:
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
    """Children of `parent` whose tokens are a strict prefix of `tokens`: one lookup for each length that tails have."""
    found: list[Row] = []
    key, prefix = view.ring.key(root), parent + TAIL_MARK
    at_most = len(tokens) // TOKEN_BYTES
    while below := next(view.entries(prefix, at_most.to_bytes(2, "big"), reverse=True), None):
        at_most = int.from_bytes(below[0][len(prefix) : len(prefix) + 2], "big")
        tail = tokens[: at_most * TOKEN_BYTES]
        rows = [view.row(child) for _, child in view.entries(tail_prefix(parent, tail, key))]
        found += [row for row in rows if row is not None and not row.is_key_missing and row.tokens == tail]
    return found


def match(shared: Shared, chain: Chain, fidelity_min: int, limit_tokens: int | None, exact: bool) -> Match:
    """See `Engine.match`."""
    root, tokens = chain.root, chain.tokens
    limit = chain.n_tokens if limit_tokens is None else max(0, min(limit_tokens, chain.n_tokens))
    if limit and root not in shared.namespaces:
        why = _why(shared, Found((), 0, 0, root, False), tokens, limit)
        return Match(0, Reason.IDENTITY if why is Reason.UNKNOWN_PREFIX else why)
    if shared.is_key_missing(root):
        return Match(0, Reason.KEY_MISSING)
    shared.uses.name(root)
    with shared.index.view() as view:
        found = longest_prefix(view, chain, limit, fidelity_min)
        cut = longest_exact(view, chain, found, fidelity_min) if exact and found.n_tokens else None
        templates = view.templates
    if cut is None:
        return Match(found.n_tokens, _why(shared, found, tokens, limit), found.rows, templates=templates)
    return replace(_exact(shared, found, cut, tokens, limit), templates=templates)


def _exact(shared: Shared, found: Found, cut: Exact, tokens: bytes, limit: int) -> Match:
    """A match that ends at a checkpoint, or nothing for want of one."""
    end = cut.checkpoint.end if cut.checkpoint else 0
    reason = Reason.NO_CHECKPOINT if end < found.n_tokens else _why(shared, found, tokens, limit)
    if reason is Reason.NO_CHECKPOINT and cut.better:
        reason = Reason.FIDELITY
    return Match(end, reason, cut.rows, cut.checkpoint, cut.diverged and end < limit)


def _why(shared: Shared, found: Found, tokens: bytes, limit: int) -> Reason:
    """Why a match gives no more."""
    if found.n_tokens >= limit:
        return Reason.OK
    if found.better:
        return Reason.FIDELITY
    rest = tokens[found.full * TOKEN_BYTES : min(limit, found.full + BLOCK_TOKENS) * TOKEN_BYTES]
    heads = [rest] if found.n_tokens - found.full >= HEAD_TOKENS else [rest, rest[:HEAD_TOKENS_BYTES]]
    for head in heads:
        reason = shared.lost.why(block_key(found.parent, head))
        if reason is not None:
            return reason
    return Reason.UNKNOWN_PREFIX


def templates(match: Match) -> dict[bytes, bytes]:
    """The templates that the runs of a match name, by id. Rows with one digest name the same ones."""
    some = {part.row.templates_digest: part.row for part in match.slices}
    names = {name for row in some.values() for name in template_ids(row.described, match.templates)}
    return {name: match.templates[name] for name in names}


def first_unusable(shared: Shared, slices: Sequence[Slice]) -> int | None:
    """Index of the first slice whose blob is gone, has another size than its row says, or breaks a rule.

    Everything else that a fetch takes is verified with the checksums of the row, by the reader of the bytes.
    """
    for number, part in enumerate(slices):
        row = part.row
        if shared.blobs.size(row.blob) != row.blob_bytes:
            return number
        if row.is_checkpoint and (info := shared.namespaces.get(row.root)) is not None:
            try:
                check_states(info.layout, row.block.states, row.block.end)
            except CorruptDataError:
                return number
    return None
