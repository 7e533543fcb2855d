"""Converts between protobuf messages and kvstore's own types. Input from a peer is validated here, and only here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import msgpack
from google.protobuf.message import Message

from kvstore.core.blocks import KEY_BYTES, LayerState
from kvstore.core.keys import FIELD_BYTES_MAX, Namespace, NamespaceInfo, root_key
from kvstore.core.layers import Layout
from kvstore.core.records import states_from_list, states_to_list, unpack_record
from kvstore.core.text import NAME_CHARACTERS_MAX, plain_text
from kvstore.errors import InvalidRequestError, LayoutMismatchError
from kvstore.quality import Quality, Thresholds, Verdict
from kvstore.wire.v1 import kvstore_pb2 as pb

# Channel and server options that both ends need. Messages are bounded by the caller's limit, proxies never apply to a
# local daemon, and SO_REUSEPORT would let a second daemon share a TCP port without a word.
MESSAGE_OVERHEAD_BYTES = 64 << 10


def channel_options(message_bytes_max: int) -> list[tuple[str, int]]:
    """gRPC options shared by client channels and the server."""
    limit = message_bytes_max + MESSAGE_OVERHEAD_BYTES
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.enable_http_proxy", 0),
        ("grpc.so_reuseport", 0),
    ]


def namespace_to_message(namespace: Namespace) -> pb.Namespace:
    """The identity as it travels; the layout goes by its digest."""
    return pb.Namespace(
        weights=namespace.weights,
        adapter=namespace.adapter,
        layout_digest=namespace.layout.digest,
        dtype=namespace.dtype,
        engine=namespace.engine,
        salt=namespace.salt,
        alias=namespace.alias,
    )


def root_from_message(message: pb.Namespace) -> bytes:
    """The root key of an identity; InvalidRequestError when a field is missing or out of range."""
    if not message.weights:
        raise InvalidRequestError("the request names no weights: a namespace is bound to the digest of its weights")
    if len(message.layout_digest) != KEY_BYTES:
        raise InvalidRequestError(f"layout_digest must have {KEY_BYTES} bytes, got {len(message.layout_digest)}")
    if max(len(message.weights), len(message.adapter), len(message.salt)) > FIELD_BYTES_MAX:
        raise InvalidRequestError(f"a namespace field is longer than {FIELD_BYTES_MAX} bytes")
    if len(message.engine) + len(message.dtype) + len(message.alias) > FIELD_BYTES_MAX:
        raise InvalidRequestError(f"the names of a namespace are longer than {FIELD_BYTES_MAX} characters")
    for name, value in (("engine", message.engine), ("dtype", message.dtype)):
        if plain_text(value, NAME_CHARACTERS_MAX) != value:
            words = f"{name}: {plain_text(value, NAME_CHARACTERS_MAX)} is longer than {NAME_CHARACTERS_MAX} characters"
            raise InvalidRequestError(f"{words}, or has characters that are not for reading")
    return root_key(
        message.weights, message.adapter, message.layout_digest, message.dtype, message.engine, message.salt
    )


def namespace_from_message(
    message: pb.Namespace, layout_record: bytes, root: bytes | None = None
) -> NamespaceInfo | None:
    """The namespace of an identity with the layout that came with it; None when none came.

    `root`: of an identity that was read before. InvalidRequestError when a field is missing or out of range,
    LayoutMismatchError when the layout is another one.
    """
    root = root_from_message(message) if root is None else root
    if not layout_record:
        return None
    layout = Layout.from_record(layout_record)
    if layout.digest != message.layout_digest:
        raise LayoutMismatchError("the layout sent is not the one that the namespace is bound to")
    alias = plain_text(message.alias, NAME_CHARACTERS_MAX)  # for people alone, so it is not worth a refusal
    return NamespaceInfo(root, message.weights, message.adapter, layout, message.dtype, message.engine, alias)


def states_to_bytes(states: Sequence[LayerState]) -> bytes:
    """Serialize a checkpoint's layers as msgpack."""
    packed: bytes = msgpack.packb(states_to_list(states))
    return packed


def states_from_bytes(packed: bytes) -> tuple[LayerState, ...]:
    """Parse and validate a checkpoint's layers; CorruptDataError when they are not."""
    return states_from_list(unpack_record(packed))


def message_to_dict(message: Message) -> dict[str, Any]:
    """A reply as plain Python for `--json`: every field, integers as integers, bytes as hex."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {key: _scalar(one) for key, one in sorted(value.items())}
    if field.is_repeated:
        return [_scalar(item) for item in value]
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, Message):
        return message_to_dict(value)
    return value.hex() if isinstance(value, bytes) else value


def verdict_to_message(verdict: Verdict) -> pb.Quality:
    """A measurement and what was decided by it, as they travel."""
    thresholds = pb.QualityThresholds(**asdict(verdict.thresholds))
    return pb.Quality(**asdict(verdict.quality), refused=verdict.fault, passed=verdict.passed, thresholds=thresholds)


def verdict_from_message(message: pb.Quality) -> Verdict:
    """The verdict that a caller sent; InvalidRequestError when it is none, or its numbers are impossible."""
    if not message.profile or len(message.profile) + len(message.spec) > FIELD_BYTES_MAX:
        raise InvalidRequestError("a measurement names the profile that was measured")
    quality = Quality(**{field.name: getattr(message, field.name) for field in fields(Quality)})
    if quality.impossible:
        raise InvalidRequestError(f"the result for {quality.profile} is not taken: {quality.impossible}")
    if not message.HasField("thresholds"):
        raise InvalidRequestError(f"the result for {quality.profile} comes without thresholds")
    thresholds = Thresholds(**{one.name: getattr(message.thresholds, one.name) for one in fields(Thresholds)})
    return Verdict(quality, thresholds, message.passed)
