"""Bulk messages written and read by hand are protobuf's, byte for byte, and what is none of ours is left to it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvstore.wire.frames import (
    LayerBytes,
    PromptRequest,
    UploadBytes,
    filled_layer_frame,
    layer_frame,
    parse_fetch_reply,
    parse_prompt,
    parse_upload_chunk,
    prompt_frame,
    serialize,
    upload_frame,
)
from kvstore.wire.v1 import kvstore_pb2 as pb

PROMPTS = (pb.MatchRequest, pb.FetchRequest, pb.BeginStoreRequest)
PARTS = st.lists(st.binary(max_size=300), max_size=4)


@given(st.integers(0, 2**32 - 1), PARTS)
def test_protobuf_reads_what_we_write(layer: int, parts: list[bytes]) -> None:
    """Either end may use the generated code."""
    reply = pb.FetchReply.FromString(layer_frame(layer, parts))
    assert (reply.WhichOneof("part"), reply.chunk.layer, reply.chunk.data) == ("chunk", layer, b"".join(parts))


@given(st.integers(0, 2**32 - 1), st.binary(max_size=300))
def test_a_frame_is_the_same_where_its_data_are_written_into_it(layer: int, data: bytes) -> None:
    """Byte for byte."""

    def fill(view: memoryview) -> None:
        view[:] = data

    assert filled_layer_frame(layer, len(data), fill) == layer_frame(layer, [data])


def test_a_frame_is_filled_in_place() -> None:
    """1 MiB takes the memory of 1 MiB."""
    tracemalloc.start()
    frame = filled_layer_frame(3, 1 << 20, lambda view: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(frame) <= peak < 1.5 * len(frame)


def test_what_fails_to_fill_a_frame_is_raised_as_it_was() -> None:
    """Whatever still looks at the frame's memory then."""
    views = []

    def fill(view: memoryview) -> None:
        views.append(view[1:])
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        filled_layer_frame(0, 9, fill)


@given(st.integers(0, 2**32 - 1), st.binary(max_size=300))
def test_we_read_what_protobuf_writes(layer: int, data: bytes) -> None:
    """A layer 0 and empty data are left out by it."""
    message = pb.FetchReply(chunk=pb.LayerChunk(layer=layer, data=data)).SerializeToString()
    assert parse_fetch_reply(message) == LayerBytes(layer, memoryview(data))
    assert parse_fetch_reply(layer_frame(layer, [data])) == LayerBytes(layer, memoryview(data))


@given(st.text(max_size=40), PARTS)
def test_uploads_too(upload_id: str, parts: list[bytes]) -> None:
    """Both ways, with and without a name."""
    data = b"".join(parts)
    chunk = pb.UploadChunk.FromString(upload_frame(upload_id, parts))
    assert (chunk.upload_id, chunk.data) == (upload_id, data)
    for message in (upload_frame(upload_id, parts), pb.UploadChunk(upload_id=upload_id, data=data).SerializeToString()):
        assert parse_upload_chunk(message) == UploadBytes(upload_id, memoryview(data))


@given(st.sampled_from(PROMPTS), st.binary(max_size=300), st.text(max_size=40))
def test_requests_about_a_prompt_too(kind: Any, tokens: bytes, request_id: str) -> None:
    """Both ways: ours have the tokens first, protobuf's where their number puts them."""
    about = kind(namespace=pb.Namespace(weights=b"w"), request_id=request_id)
    whole = kind(namespace=about.namespace, request_id=request_id, tokens=tokens)
    assert kind.FromString(prompt_frame(about, tokens)) == whole
    assert parse_prompt(kind, prompt_frame(about, tokens)) == PromptRequest(about, tokens)
    found = parse_prompt(kind, whole.SerializeToString())
    assert (found.tokens, found.message.request_id, found.message.namespace) == (tokens, request_id, about.namespace)


@given(st.sampled_from(PROMPTS), st.binary(max_size=40))
def test_a_request_that_is_none_is_what_protobuf_says_it_is(kind: Any, request: bytes) -> None:
    """Also where tokens stand first, twice, or longer than the message is."""
    for message in (
        request,
        prompt_frame(kind(), b"12345678") + request,
        prompt_frame(kind(), bytes(20))[:9] + request,
    ):
        try:
            expected = kind.FromString(message)
        except DecodeError:
            with pytest.raises(DecodeError):
                parse_prompt(kind, message)
            continue
        found = parse_prompt(kind, message)
        found.message.tokens = found.tokens
        assert found.message == expected


def test_data_is_a_view_of_the_message() -> None:
    """1 MiB is not copied to be looked at."""
    message = layer_frame(3, [bytes(1 << 20)])
    found = parse_fetch_reply(message)
    assert isinstance(found, LayerBytes)
    assert found.data.obj is message


def test_a_plan_is_protobufs() -> None:
    """Only chunks are ours."""
    reply = pb.FetchReply(plan=pb.FetchPlan(n_tokens=3, reason="ok"))
    assert parse_fetch_reply(serialize(reply)) == reply
    assert serialize(b"as it is") == b"as it is"


@given(st.binary(max_size=40))
def test_garbage_is_what_protobuf_says_it_is(message: bytes) -> None:
    """No other error, no endless loop, and never a reading that protobuf would not have given."""
    for parse, kind in ((parse_fetch_reply, pb.FetchReply), (parse_upload_chunk, pb.UploadChunk)):
        try:
            expected = kind.FromString(message)
        except DecodeError:
            with pytest.raises(DecodeError):
                parse(message)
            continue
        found = parse(message)
        if isinstance(found, LayerBytes):
            assert (found.layer, found.data) == (expected.chunk.layer, expected.chunk.data)
        elif isinstance(found, UploadBytes):
            assert (found.upload_id, found.data) == (expected.upload_id, expected.data)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_message_cut_short_is_an_error(cut: int) -> None:
    """Wherever the cut is."""
    message = layer_frame(300, [bytes(200)])
    with pytest.raises(DecodeError):
        parse_fetch_reply(message[:cut])
