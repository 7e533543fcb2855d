"""Reading the layers of a stream: each range as it arrives, in its order, and nothing that does not belong there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.blobs.ranges import Range
from kvstore.client.receiver import STREAM_BYTES, LayerReader, Message, counted
from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import CorruptDataError, LimitError
from kvstore.wire.frames import LayerBytes
from kvstore.wire.v1 import kvstore_pb2 as pb

RANGES = [Range(0, 10, 3), Range(0, 50, 2), Range(1, 10, 4)]
BYTES = b"abcdefghi"


def part(layer: int, data: bytes) -> LayerBytes:
    """A message of the stream."""
    return LayerBytes(layer, memoryview(data))


def read(reader: LayerReader, asked: Range) -> bytes:
    """The bytes of a range, read into two views."""
    target = bytearray(asked.nbytes)
    view = memoryview(target)
    reader.readinto(asked.source, asked.offset, [view[:1], view[1:1], view[1:]])
    return bytes(target)


def read_all(reader: LayerReader) -> list[bytes]:
    """All ranges, and the end."""
    got = [read(reader, one) for one in RANGES]
    reader.end()
    return got


@pytest.mark.parametrize("size", range(1, len(BYTES) + 1))
def test_ranges_are_read_wherever_messages_end(size: int) -> None:
    """Messages of any size, with borders inside ranges and ranges inside messages."""
    reader = LayerReader((part(4, BYTES[at : at + size]) for at in range(0, len(BYTES), size)), 4, RANGES)
    assert read_all(reader) == [b"abc", b"de", b"fghi"]


def test_a_range_inside_of_a_message_stays_where_it_arrived() -> None:
    """It is a view of the message; one that goes on in the next message can only be copied."""
    first, second = b"abcdefg", b"hi"
    reader = LayerReader(iter([part(0, first), part(0, second)]), 0, RANGES)
    views = [reader.view(*one) for one in RANGES]
    assert [None if view is None else bytes(view) for view in views] == [b"abc", b"de", None]
    assert views[0] is not None
    assert views[0].obj is first
    assert read(reader, RANGES[2]) == b"fghi"
    reader.end()


def test_one_message_is_held_at_a_time() -> None:
    """The next one is asked for when all of the one before is read."""
    asked: list[int] = []

    def stream() -> Iterator[Message]:
        for number in range(3):
            asked.append(number)
            yield part(0, BYTES[3 * number : 3 * number + 3])

    reader = LayerReader(stream(), 0, [Range(0, at, 1) for at in range(9)])
    for at in range(9):
        read(reader, Range(0, at, 1))
        assert len(asked) == at // 3 + 1


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "the stream ended in layer 0"),
        ([part(0, b"abcd")], "the stream ended in layer 0"),
        ([part(0, b"abcd"), part(1, b"efghi")], "something else than layer 0"),
        ([part(0, b"abcd"), part(0, b"")], "something else than layer 0"),
        ([part(0, b"abcd"), pb.FetchReply()], "something else than layer 0"),
        ([part(0, b"abcd"), part(0, b"efghij")], "something else than the ranges of layer 0"),
    ],
)
def test_a_stream_of_anything_else_is_broken(messages: list[Message], what: str) -> None:
    """Fewer bytes, another layer's, none, no bytes at all, more."""
    reader = LayerReader(iter(messages), 0, RANGES)
    with pytest.raises(CorruptDataError, match=what) as raised:
        read_all(reader)
    assert reader.broken is raised.value


@pytest.mark.parametrize("ask", [LayerReader.view, lambda reader, *one: read(reader, Range(*one))])
@pytest.mark.parametrize("asked", [RANGES[1], Range(0, 10, 2), Range(1, 10, 3)])
def test_a_range_is_read_in_its_turn_only(asked: Range, ask: Any) -> None:
    """A stream does not go back, and bytes of another place would be another block's."""
    reader = LayerReader(iter([part(0, BYTES)]), 0, RANGES)
    with pytest.raises(CorruptDataError, match=re.escape(str(asked))):
        ask(reader, *asked)


def test_a_layer_of_which_something_was_not_read_is_broken() -> None:
    """What would come next is taken for the layer after it."""
    reader = LayerReader(iter([part(0, BYTES)]), 0, RANGES)
    read(reader, RANGES[0])
    with pytest.raises(CorruptDataError):
        reader.end()


def test_the_messages_of_a_stream_are_counted_while_it_lasts() -> None:
    """And a stream that finds no room is refused, rather than received beyond the limit."""
    budget = ByteBudget(STREAM_BYTES)
    with counted(budget, 0):
        assert budget.used_bytes == STREAM_BYTES
        with pytest.raises(LimitError), counted(budget, 0):
            pass
    assert budget.used_bytes == 0
