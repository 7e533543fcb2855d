"""A worker's request about a prompt, read once; and what BeginStore asks beside that."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from kvstore.core.blocks import LayerState
from kvstore.core.keys import Chain, NamespaceInfo
from kvstore.core.log import ID_CHARACTERS_MAX
from kvstore.core.text import plain_text
from kvstore.errors import CorruptDataError, InvalidRequestError
from kvstore.server.calls.callers import Peer
from kvstore.server.counters import Telemetry
from kvstore.telemetry.requests import Asked
from kvstore.telemetry.traffic import Who
from kvstore.telemetry.why import NamespaceIdentity
from kvstore.wire import convert


@dataclass(frozen=True)
class AskedPrompt:
    """Who asks, in which namespace, about which tokens, and where that is noted.

    `since`: `Nearest.since` when the request came.
    """

    message: Any
    chain: Chain
    identity: NamespaceIdentity
    peer: Peer
    telemetry: Telemetry
    since: tuple[int, int]

    @functools.cached_property
    def asked(self) -> Asked:
        """What is asked, as telemetry has it. Of a match it is made after the answer."""
        message, peer, one, n_tokens = self.message, self.peer, self.identity, self.chain.n_tokens
        # A message has those of the fields that its kind has.
        return Asked(
            Who(peer.name, peer.pid, one.root, one.alias, one.engine, getattr(message, "profile", "")),
            plain_text(message.request_id, ID_CHARACTERS_MAX),
            n_tokens,
            min(getattr(message, "covered_tokens", 0), n_tokens),
            getattr(message, "prefill_tokens_per_s", 0.0),
            getattr(message, "continued_tokens", 0),
        )


@dataclass(frozen=True)
class StoreRequest:
    """A BeginStore request, validated as far as possible without the index."""

    chain: Chain
    namespace: NamespaceInfo | None  # None when the worker sent no layout
    captured_from: int
    restored_tokens: int
    restored_fidelity: int
    profile: str
    isolated: bool = False  # a tenant with a salt of its own
    caller: str = ""  # the name that the client gives itself
    states: tuple[LayerState, ...] = ()
    interim: bool = False
    prompt: int = 0  # of a worker that would offer it again
    touched_tokens: int = 0
    telemetry: Telemetry = field(kw_only=True)  # of its caller


def store_request(prompt: AskedPrompt, known: NamespaceInfo | None) -> StoreRequest:
    """A BeginStore message as a noun; InvalidRequestError or LayoutMismatchError when it contradicts itself.

    `known`: its namespace, if anything is stored in it. Then a layout in the message is parsed only if it differs.
    """
    message, root = prompt.message, prompt.chain.root
    if known is None or message.layout not in (b"", known.layout.record):
        known = convert.namespace_from_message(message.namespace, message.layout, root)
    try:
        states = convert.states_from_bytes(message.states) if message.states else ()
    except CorruptDataError as error:
        raise InvalidRequestError(f"states: {error}") from error
    return StoreRequest(
        chain=prompt.chain,
        namespace=known,
        captured_from=message.captured_from,
        restored_tokens=message.restored_tokens,
        restored_fidelity=message.restored_fidelity,
        profile=message.profile,
        isolated=prompt.identity.salted,
        caller=prompt.peer.name,
        states=states,
        interim=message.interim,
        prompt=message.prompt,
        touched_tokens=message.touched_tokens,
        telemetry=prompt.telemetry,
    )
