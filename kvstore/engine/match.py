"""Finds the longest stored prefix of a prompt in the index, without reading blobs, and says why it ends there.

Full blocks are found by key, one lookup each, and their token bytes compared. After the last of them the best child is
cut (`kvstore.index.children`). For layouts that need a checkpoint, `longest_exact` looks for the longest position that
has one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, TOKEN_BYTES, Reason
from kvstore.core.keys import Chain, block_key
from kvstore.core.records import template_ids
from kvstore.core.rules import check_states
from kvstore.engine.deletions import HEAD_TOKENS, HEAD_TOKENS_BYTES
from kvstore.engine.shared import Shared
from kvstore.errors import CorruptDataError
from kvstore.index.children import best_child
from kvstore.index.rows import (
    TOKENS_AT,
    Row,
    Taken,
    Templates,
    fidelities_of,
    fidelity_of,
    parse_row,
    templates_digests_of,
)
from kvstore.index.transaction import View

_BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Slice:
    """The first `take` tokens of a stored block."""

    row: Row
    take: int


@dataclass(frozen=True)
class Match:
    """The longest usable prefix: its blocks in order, and why there is no more.

    Of an exact match also the checkpoint at its end, if there is one. `diverged`: what is stored goes on after it,
    differently from what was asked for (`Engine.mark_divergence`). The rows are parsed when somebody looks into them,
    which may raise what `parse_row` does.
    """

    n_tokens: int
    reason: Reason
    rows: tuple[Taken, ...] = ()
    checkpoint: Row | None = None
    diverged: bool = False
    templates: Templates = field(default_factory=dict, repr=False)

    @functools.cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The blocks in order."""
        return tuple([Slice(parse_row(key, value, self.templates), take) for key, value, take in self.rows])

    @functools.cached_property
    def fidelity(self) -> int:
        """The least rank among blocks and checkpoint."""
        own = FIDELITY_EXACT if self.checkpoint is None else self.checkpoint.fidelity
        return min([own, *fidelities_of(self.rows)])

    @property
    def templates_digests(self) -> set[int]:
        """The digests of the templates of its blocks, read without parsing the rows; 0 stands for none."""
        return templates_digests_of(self.rows)

    @property
    def parts(self) -> tuple[Slice, ...]:
        """Everything to be read: the slices, and, as one more, the checkpoint."""
        row = self.checkpoint
        return self.slices if row is None else (*self.slices, Slice(row, row.n_tokens))


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
