"""What a worker says in a BeginStore, as a noun. What cannot be is refused here, with InvalidRequestError."""

from __future__ import annotations

from kvstore.core.blocks import LayerState
from kvstore.core.keys import Chain
from kvstore.errors import CorruptDataError, InvalidRequestError
from kvstore.server.storing.store import StoreRequest
from kvstore.wire import convert
from kvstore.wire.frames import PromptRequest
from kvstore.wire.v1 import kvstore_pb2 as pb


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


def states_of(message: pb.BeginStoreRequest) -> tuple[LayerState, ...]:
    """The checkpoint offered, if any; InvalidRequestError when it is none."""
    try:
        return convert.states_from_bytes(message.states) if message.states else ()
    except CorruptDataError as error:
        raise InvalidRequestError(f"states: {error}") from error
