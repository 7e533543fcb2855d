"""The messages that carry bulk bytes, written and read around protobuf: data of layers, and the tokens of prompts.

The encoding is that of protos/kvstore.proto, byte for byte, so either side may also use the generated code. Generated
code copies 1 MiB of data twice more at each end while it holds the GIL. This module joins the tags, lengths and data in
one copy, and reads a message as a view of the buffer that gRPC returns. The tokens of a prompt go first in its request:
generated code copies them, too, and a match of 32,000 tokens took 0.2 ms more.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import grpc

from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc

# Data in one message: enough that what a message costs by itself does not show, few enough to be read ahead.
CHUNK_BYTES = 1 << 20

SERVICE = pb.DESCRIPTOR.services_by_name["KVStore"].full_name

Bytes: TypeAlias = bytes | bytearray | memoryview

# Tags: number << 3 | kind, where kind 0 is a varint and kind 2 a length followed by that many bytes.
_REPLY_CHUNK = 2 << 3 | 2
_CHUNK_LAYER = 1 << 3
_CHUNK_DATA = 2 << 3 | 2
_UPLOAD_ID = 1 << 3 | 2
_UPLOAD_DATA = 2 << 3 | 2
_PROMPT_TOKENS = {
    kind: kind.DESCRIPTOR.fields_by_name["tokens"].number << 3 | 2
    for kind in (pb.MatchRequest, pb.FetchRequest, pb.BeginStoreRequest)
}


class LayerBytes(NamedTuple):
    """A part of one layer's bytes, as it arrives."""

    layer: int
    data: memoryview


class UploadBytes(NamedTuple):
    """A part of an upload, as it arrives; the first one names the upload."""

    upload_id: str
    data: memoryview


class PromptRequest(NamedTuple):
    """A request about a prompt, as it arrives: the packed tokens, and the message with everything else."""

    message: Any
    tokens: bytes


def layer_frame(layer: int, parts: Sequence[Bytes]) -> bytes:
    """A FetchReply whose chunk holds `parts`, one after the other."""
    return b"".join([_layer_head(layer, sum(map(len, parts))), *parts])


def filled_layer_frame(layer: int, nbytes: int, fill: Callable[[memoryview], None]) -> bytes:
    """A FetchReply whose chunk holds `nbytes` that `fill` writes: in CPython in place, without a copy.

    A BytesIO takes over bytes that are its alone, lends them as a buffer and gives them out as they are once nothing
    refers to the buffer.
    """
    head = _layer_head(layer, nbytes)
    frame = io.BytesIO(bytes(len(head) + nbytes))
    view = frame.getbuffer()
    view[: len(head)] = head
    fill(view[len(head) :])
    del view
    return frame.getvalue()


def _layer_head(layer: int, nbytes: int) -> bytes:
    """What comes before `nbytes` of a layer's data."""
    head = b"%c%b%c%b" % (_CHUNK_LAYER, _varint(layer), _CHUNK_DATA, _varint(nbytes))
    return b"%c%b%b" % (_REPLY_CHUNK, _varint(len(head) + nbytes), head)


def upload_frame(upload_id: str, parts: Sequence[Bytes]) -> bytes:
    """An UploadChunk that holds `parts`, one after the other."""
    name = upload_id.encode()
    head = b"%c%b%b" % (_UPLOAD_ID, _varint(len(name)), name) if name else b""
    return b"".join([b"%b%c%b" % (head, _UPLOAD_DATA, _varint(sum(map(len, parts)))), *parts])


def prompt_frame(message: pb.MatchRequest | pb.FetchRequest | pb.BeginStoreRequest, tokens: bytes) -> bytes:
    """A request about these packed tokens; `message` has everything else."""
    head = b"%c%b" % (_PROMPT_TOKENS[type(message)], _varint(len(tokens)))
    return b"".join([head, tokens, message.SerializeToString()])


def parse_prompt(kind: Any, request: bytes) -> PromptRequest:
    """A request of this message class. Raises google.protobuf's DecodeError for what is none."""
    if request[:1] == bytes([_PROMPT_TOKENS[kind]]):
        nbytes, start = _read_varint(request, 1)
        end = start + nbytes
        if end <= len(request):
            message = kind.FromString(request[end:])
            if not message.tokens:  # of a field that comes twice, the last one counts
                return PromptRequest(message, request[start:end])
    message = kind.FromString(request)  # from who knows where
    return PromptRequest(message, message.tokens)


def parse_fetch_reply(message: bytes) -> pb.FetchReply | LayerBytes:
    """A part of a layer, its data a view of `message`; any other reply as protobuf has it.

    Raises google.protobuf's DecodeError for what is no FetchReply.
    """
    at = _data_at(message, 0, _REPLY_CHUNK)
    if at and at < len(message) and message[at] == _CHUNK_LAYER:
        layer, at = _read_varint(message, at + 1)
        start = _data_at(message, at, _CHUNK_DATA)
        if start:
            return LayerBytes(layer & 0xFFFF_FFFF, memoryview(message)[start:])
    reply = pb.FetchReply.FromString(message)
    if reply.WhichOneof("part") == "chunk":
        return LayerBytes(reply.chunk.layer, memoryview(reply.chunk.data))
    return reply


def parse_upload_chunk(message: bytes) -> UploadBytes:
    """As `parse_fetch_reply`, of an upload."""
    start = _data_at(message, 0, _UPLOAD_DATA)
    if start:
        return UploadBytes("", memoryview(message)[start:])
    chunk = pb.UploadChunk.FromString(message)  # the first one, or from who knows where
    return UploadBytes(chunk.upload_id, memoryview(chunk.data))


def serialize(message: Any) -> bytes:
    """A message as it travels; one made by `layer_frame` or `prompt_frame` is that already."""
    serial: bytes = message if isinstance(message, bytes) else message.SerializeToString()
    return serial


def kvstore_stub(channel: grpc.Channel) -> Any:
    """The generated stub, but calls about a prompt take `prompt_frame`s, too, and `Upload` only `upload_frame`s.

    `Fetch` gives what `parse_fetch_reply` returns.
    """
    stub: Any = rpc.KVStoreStub(channel)
    stub.Match = channel.unary_unary(f"/{SERVICE}/Match", serialize, pb.MatchReply.FromString)
    stub.BeginStore = channel.unary_unary(f"/{SERVICE}/BeginStore", serialize, pb.BeginStoreReply.FromString)
    stub.Fetch = channel.unary_stream(f"/{SERVICE}/Fetch", serialize, parse_fetch_reply)
    stub.Upload = channel.stream_unary(f"/{SERVICE}/Upload", response_deserializer=pb.UploadReply.FromString)
    return stub


def add_kvstore_service(servicer: Any, server: Any) -> None:
    """Serve KVStore, but calls about a prompt read a `PromptRequest`, and `Upload` reads `UploadBytes`.

    `Fetch` may write `layer_frame`s.
    """
    match, fetch = functools.partial(parse_prompt, pb.MatchRequest), functools.partial(parse_prompt, pb.FetchRequest)
    begin = functools.partial(parse_prompt, pb.BeginStoreRequest)
    handlers = {
        "Match": grpc.unary_unary_rpc_method_handler(servicer.Match, match, serialize),
        "BeginStore": grpc.unary_unary_rpc_method_handler(servicer.BeginStore, begin, serialize),
        "Fetch": grpc.unary_stream_rpc_method_handler(servicer.Fetch, fetch, serialize),
        "Upload": grpc.stream_unary_rpc_method_handler(servicer.Upload, parse_upload_chunk, serialize),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))  # the first one decides
    rpc.add_KVStoreServicer_to_server(servicer, server)


def _data_at(message: bytes, at: int, tag: int) -> int:
    """Offset of the data of the field `tag` at offset `at`; 0 unless that field is the last of the message."""
    if at >= len(message) or message[at] != tag:
        return 0
    nbytes, start = _read_varint(message, at + 1)
    return start if start + nbytes == len(message) else 0


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Read the varint at `at`: (value, offset after it). The offset of a truncated varint is past the message's end."""
    value = 0
    for shift in range(0, 35, 7):
        byte = message[at] if at < len(message) else 0x80
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return value, len(message) + 1


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
