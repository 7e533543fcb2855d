"""What workers say in their messages, as nouns. What cannot be is refused here, with InvalidRequestError."""

from __future__ import annotations

import hashlib

from kvstore.core.blocks import LayerState
from kvstore.core.keys import Chain
from kvstore.core.log import ALIAS_CHARACTERS_MAX
from kvstore.core.text import plain_text
from kvstore.errors import CorruptDataError, InvalidRequestError
from kvstore.server.fetching.costs import Offer, Timing, Way
from kvstore.server.storing.store import StoreRequest
from kvstore.telemetry.requests import Outcome
from kvstore.telemetry.why import NamespaceIdentity
from kvstore.wire import convert
from kvstore.wire.frames import PromptRequest
from kvstore.wire.v1 import kvstore_pb2 as pb

# A daemon serves a handful of models; of tenants each has an identity of its own.
IDENTITIES_MAX = 1024


class Identities:
    """The identities of requests, each validated and hashed once. Any thread may call.

    Remembered under a digest of the message, since that has the salt, which is a secret.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, NamespaceIdentity] = {}

    def of(self, message: pb.Namespace) -> NamespaceIdentity:
        """The identity that a request names. Raises InvalidRequestError for an invalid one."""
        name = hashlib.sha256(message.SerializeToString()).digest()
        known = self._known.get(name)
        if known is None:
            root, alias = convert.root_from_message(message), plain_text(message.alias, ALIAS_CHARACTERS_MAX)
            digests = (message.weights, message.adapter, message.layout_digest)
            known = NamespaceIdentity(root, *digests, message.dtype, message.engine, bool(message.salt), alias)
            if len(self._known) >= IDENTITIES_MAX:
                self._known.clear()
            self._known[name] = known
        return known


def offer_of(request: pb.MatchRequest | pb.FetchRequest, way: Way) -> Offer:
    """The caller's statements about itself. Raises InvalidRequestError for invalid ones."""
    return Offer(request.prefill_tokens_per_s, request.covered_tokens, way)


def timing_of(message: pb.FetchTiming) -> Timing:
    """A worker's measurements."""
    return Timing(message.read_bytes, message.read_s, message.decoded_bytes, message.decode_s)


def store_request(request: PromptRequest, caller: str = "") -> StoreRequest:
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
    )


def outcome_of(message: pb.FetchTiming) -> Outcome:
    """A worker's report on a fetch."""
    return Outcome(message.got_tokens, message.reason, message.again)


def states_of(message: pb.BeginStoreRequest) -> tuple[LayerState, ...]:
    """The checkpoint offered, if any; InvalidRequestError when it is none."""
    try:
        return convert.states_from_bytes(message.states) if message.states else ()
    except CorruptDataError as error:
        raise InvalidRequestError(f"states: {error}") from error
