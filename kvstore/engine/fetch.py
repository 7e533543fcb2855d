"""FETCH, the engine's part: what a match finds, why it finds no more, and whether its blobs are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, Reason
from kvstore.core.keys import Chain, block_key
from kvstore.core.records import template_ids
from kvstore.core.rules import check_states
from kvstore.engine import encryption
from kvstore.engine.deletions import HEAD_TOKENS, HEAD_TOKENS_BYTES
from kvstore.engine.match import Exact, Found, longest_exact, longest_prefix
from kvstore.engine.shared import Shared
from kvstore.engine.types import Match, Slice
from kvstore.errors import CorruptDataError


def match(shared: Shared, chain: Chain, fidelity_min: int, limit_tokens: int | None, exact: bool) -> Match:
    """See `Engine.match`."""
    root, tokens = chain.root, chain.tokens
    limit = chain.n_tokens if limit_tokens is None else max(0, min(limit_tokens, chain.n_tokens))
    if limit and root not in shared.namespaces:
        why = _why(shared, Found((), 0, 0, root, False), tokens, limit)
        return Match(0, Reason.IDENTITY if why is Reason.UNKNOWN_PREFIX else why)
    if encryption.is_key_missing(shared, root):
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
