"""What a worker says in a request about a prompt, as nouns. What cannot be is refused, with InvalidRequestError."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvstore.core.blocks import LayerState
from kvstore.core.keys import Chain
from kvstore.core.log import ID_CHARACTERS_MAX
from kvstore.core.text import plain_text
from kvstore.errors import CorruptDataError, InvalidRequestError
from kvstore.server.calls.callers import calling
from kvstore.server.counters import Counters, Telemetry
from kvstore.server.storing.store import StoreRequest
from kvstore.telemetry.requests import Asked
from kvstore.telemetry.traffic import Who
from kvstore.telemetry.why import NamespaceIdentity
from kvstore.wire import convert
from kvstore.wire.frames import PromptRequest
from kvstore.wire.v1 import kvstore_pb2 as pb


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """A request about a prompt, read once: who asks what, in which namespace, and where that is noted.

    `since`: of the engine's `Nearest` when it came.
    """

    message: Any
    chain: Chain
    identity: NamespaceIdentity
    asked: Asked
    telemetry: Telemetry
    since: tuple[int, int]

    @classmethod
    def of(
        cls, request: PromptRequest, identity: NamespaceIdentity, telemetry: Telemetry, since: tuple[int, int]
    ) -> AskedPrompt:
        """Of the call that this task serves. A message has those of the fields of `Asked` that its kind has."""
        message, peer, chain = request.message, calling.get(), Chain(identity.root, request.tokens)
        profile = getattr(message, "profile", "")
        asked = Asked(
            Who(peer.name, peer.pid, identity.root, identity.alias, identity.engine, profile),
            plain_text(message.request_id, ID_CHARACTERS_MAX),
            chain.n_tokens,
            min(getattr(message, "covered_tokens", 0), chain.n_tokens),
            getattr(message, "prefill_tokens_per_s", 0.0),
            getattr(message, "continued_tokens", 0),
        )
        return cls(message, chain, identity, asked, telemetry, since)


def store_request(request: PromptRequest, caller: str = "", counters: Counters | None = None) -> StoreRequest:
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
        counters=counters or Counters(),
    )


def states_of(message: pb.BeginStoreRequest) -> tuple[LayerState, ...]:
    """The checkpoint offered, if any; InvalidRequestError when it is none."""
    try:
        return convert.states_from_bytes(message.states) if message.states else ()
    except CorruptDataError as error:
        raise InvalidRequestError(f"states: {error}") from error
