"""What a worker says in a request about a prompt, as nouns. What cannot be is refused, with InvalidRequestError."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from kvstore.core.blocks import LayerState
from kvstore.core.keys import Chain
from kvstore.core.log import ID_CHARACTERS_MAX
from kvstore.core.text import plain_text
from kvstore.errors import CorruptDataError, InvalidRequestError
from kvstore.server.calls.callers import Peer
from kvstore.server.counters import Telemetry
from kvstore.server.storing.store import StoreRequest
from kvstore.telemetry.requests import Asked
from kvstore.telemetry.traffic import Who
from kvstore.telemetry.why import NamespaceIdentity
from kvstore.wire import convert
from kvstore.wire.frames import PromptRequest
from kvstore.wire.v1 import kvstore_pb2 as pb


@dataclass(frozen=True)
class AskedPrompt:
    """A request about a prompt, read once: who asks, in which namespace, and where that is noted.

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


def store_request(request: PromptRequest, telemetry: Telemetry, caller: str = "") -> StoreRequest:
    """A BeginStore message as a noun; InvalidRequestError or LayoutMismatchError when it contradicts itself."""
    message = request.message
    return StoreRequest(
        chain=Chain(convert.root_from_message(message.namespace), request.tokens),
        namespace=convert.namespace_from_message(message.namespace, message.layout),
        captured_from=message.captured_from,
        restored_tokens=message.restored_tokens,
        restored_fidelity=message.restored_fidelity,
        profile=message.profile,
        isolated=bool(message.namespace.salt),
        caller=caller,
        states=states_of(message),
        interim=message.interim,
        prompt=message.prompt,
        touched_tokens=message.touched_tokens,
        telemetry=telemetry,
    )


def states_of(message: pb.BeginStoreRequest) -> tuple[LayerState, ...]:
    """The checkpoint offered, if any; InvalidRequestError when it is none."""
    try:
        return convert.states_from_bytes(message.states) if message.states else ()
    except CorruptDataError as error:
        raise InvalidRequestError(f"states: {error}") from error
