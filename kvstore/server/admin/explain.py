"""Answers `kvstore why`: what is remembered of the latest requests, or what a prompt would meet now, as messages."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_ANY, TOKEN_BYTES
from kvstore.core.causes import Cause
from kvstore.core.keys import Chain
from kvstore.engine import Engine
from kvstore.errors import InvalidRequestError, NotFoundError
from kvstore.server.fetching.fetch import FetchPath
from kvstore.telemetry.places import SharedPlace
from kvstore.telemetry.requests import Asked
from kvstore.telemetry.traffic import Who
from kvstore.telemetry.why import ENTRIES_MAX, OTHERS_ASKED_MAX, SIDE_TOKENS, NamespaceIdentity, RequestEntry, Why
from kvstore.wire.v1 import kvstore_pb2 as pb

MORE_TOKENS = 128
# Namespaces in which a prompt is looked for when it was never stored in the first.
WANTED_MAX = 8
# Common tokens that one answer carries, all rows together.
PREFIX_BYTES_MAX = 8 << 20


class Explainer:
    """Reads the index: for worker threads, any of them."""

    def __init__(self, engine: Engine, fetch: FetchPath, why: Why) -> None:
        self._engine = engine
        self._fetch = fetch
        self.why = why

    def reply(self, request: pb.WhyRequest) -> pb.WhyReply:
        """The rows that a request asks for.

        Raises NotFoundError when the namespace is not known, InvalidRequestError when it may not be looked into.
        """
        if bool(request.last) == bool(request.tokens):
            raise InvalidRequestError("why takes the tokens of a prompt, or a number of requests")
        self.why.forget()
        left_out = 0
        if request.tokens:
            wanted, left_out = self._wanted(request.namespace_prefix, request.alias)
            found = [self._prompt(request.tokens, wanted)]
        else:
            found = self.why.last(min(request.last, ENTRIES_MAX), request.namespace_prefix, request.alias)
        rows, left = [], PREFIX_BYTES_MAX if request.context else 0
        for entry in found:
            row = explanation_message(entry)
            if request.tokens:
                end = entry.common_tokens * TOKEN_BYTES
                row.asked_more = request.tokens[end : end + MORE_TOKENS * TOKEN_BYTES]
            if entry.common_tokens * TOKEN_BYTES < left:
                left -= self._add_context(row, entry)
            rows.append(row)
        return pb.WhyReply(found=rows, not_kept=self.why.not_kept, left_out=left_out)

    def _add_context(self, row: pb.Explanation, entry: RequestEntry) -> int:
        """Fill in what is stored around the place where a prompt parts. Returns the bytes of the common tokens."""
        nearest, common = self._engine.nearest, entry.common_tokens
        row.prefix = nearest.upto(entry.nearest, common) if entry.nearest else b""
        row.stored_more = entry.stored
        if entry.stored:
            row.stored_more = nearest.after(entry.root, entry.nearest, common, MORE_TOKENS) or entry.stored
        if not row.asked_more:
            row.asked_more = entry.after
            if bool(row.prefix) == bool(common):
                head = row.prefix[common // BLOCK_TOKENS * BLOCK_TOKENS * TOKEN_BYTES :] + entry.after
                row.asked_more += nearest.follow(entry.root, entry.parent, head, MORE_TOKENS - SIDE_TOKENS)
        return len(row.prefix)

    def _prompt(self, tokens: bytes, wanted: Sequence[tuple[bytes, NamespaceIdentity]]) -> RequestEntry:
        """What is to be said of a prompt: in the namespace that is meant, or, if it never was there, where it was."""
        if len(tokens) == TOKEN_BYTES:
            raise InvalidRequestError("a prompt of one token has nothing to restore: its last token is always computed")
        first: RequestEntry | None = None
        for root, identity in wanted:
            chain = Chain(root, tokens)
            asked = Asked(Who("", 0, root, identity.alias, identity.engine), "", chain.n_tokens)
            match = self._fetch.match(chain, FIDELITY_ANY)
            entry = self.why.explained(asked, chain, match, identity, OTHERS_ASKED_MAX)
            if entry.cause is not Cause.NEVER_STORED:
                return entry
            first = first or entry
        assert first is not None
        return first

    def _wanted(self, prefix: bytes, alias: str) -> tuple[list[tuple[bytes, NamespaceIdentity]], int]:
        """The namespaces that may be meant: the latest that was asked for, then the last used.

        Never a tenant's or an encrypted one: the number of those; InvalidRequestError where only such fit.
        """
        nearest = self._engine.nearest
        known = self.why.identities()
        for readable in (True, False):
            for info in nearest.namespaces(OTHERS_ASKED_MAX, readable=readable):
                known.setdefault(info.root, NamespaceIdentity.of(info))
        fit = [(root, one) for root, one in known.items() if root.startswith(prefix) and alias in ("", one.alias)]
        shown = [(root, one) for root, one in fit if not one.salted and not nearest.is_encrypted(root)]
        if fit and not shown:
            raise InvalidRequestError(f"namespace {fit[0][0].hex()[:12]} is a tenant's or encrypted: not shown")
        if not shown and (prefix or alias):
            raise NotFoundError(f"no namespace is {alias or prefix.hex()}; see: kvstore ls")
        if not shown:
            raise NotFoundError("nothing is stored, and no worker has asked for anything since the daemon started")
        return shown[:WANTED_MAX], len(fit) - len(shown)


def explanation_message(entry: RequestEntry) -> pb.Explanation:
    """One row, without context."""
    who, other, store = entry.asked.who, entry.other, entry.store
    return pb.Explanation(
        at_ms=int(entry.at_s * 1000),
        request_id=entry.asked.request_id,
        pid=who.pid,
        namespace_id=who.root,
        alias=who.alias,
        prompt_tokens=entry.asked.prompt_tokens,
        given_tokens=entry.given_tokens,
        common_tokens=entry.common_tokens,
        reason=entry.reason,
        cause=entry.cause,
        identity_field=other.field if other else "",
        other_namespace_id=other.root if other else b"",
        other_alias=other.alias if other else "",
        other_tokens=other.n_tokens if other else 0,
        unstored_reason=entry.unstored or "",
        before=entry.before,
        asked=entry.after,
        stored=entry.stored,
        nearest_key=entry.nearest,
        remote=entry.remote,
        store=None
        if store is None
        else pb.StoreResult(
            offered_tokens=store.offered_tokens,
            stored_tokens=store.stored_tokens,
            new_bytes=store.new_bytes,
            reason=store.reason,
        ),
    )


def place_message(place: SharedPlace) -> pb.Place:
    """One place at which prompts part."""
    return pb.Place(
        namespace_id=place.root, alias=place.alias, common_tokens=place.common_tokens, prompts=place.prompts
    )
