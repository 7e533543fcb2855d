"""Reading the layers of a stream: each range as it arrives, in its order, and nothing that does not belong there."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.blobs.ranges import Range
from kvstore.client.receiver import AHEAD_BYTES_MIN, AHEAD_MAX, STREAM_BYTES, LayerReader, Message, ReadAhead, counted
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


class Stream:
    """Messages of one MiB that come as they are asked for, on whichever thread; `silent` never come."""

    def __init__(self, count: int, silent: int = 0) -> None:
        self._part = part(0, bytes(1 << 20))
        self.nbytes = (count + silent) << 20
        self._count = count
        self._silent = silent
        self.asked: list[str] = []
        self.ahead = threading.Semaphore(0)
        self.cancelled = threading.Event()

    def __iter__(self) -> Iterator[Message]:
        for number in range(self._count + self._silent):
            self.asked.append(threading.current_thread().name)
            self.ahead.release()
            if number >= self._count:
                assert self.cancelled.wait(30)
                raise CorruptDataError("cancelled")
            yield self._part

    def read_ahead(self, nbytes: int | None = None) -> ReadAhead:
        """These messages, received ahead."""
        return ReadAhead(iter(self), self.nbytes if nbytes is None else nbytes, self.cancelled.set)


def receivers() -> int:
    """Threads that receive."""
    return sum(thread.name == "kvstore-receive" for thread in threading.enumerate())


def test_messages_are_received_while_earlier_ones_are_read() -> None:
    """On another thread, and never more of them than are counted with the one that is read."""
    stream = Stream(12)
    with stream.read_ahead() as messages:
        for number in range(12):
            next(messages)
            due = min(12, number + 1 + AHEAD_MAX)
            while len(stream.asked) < due:
                assert stream.ahead.acquire(timeout=30)
            time.sleep(0.005)
            assert len(stream.asked) == due
    assert set(stream.asked) == {"kvstore-receive"}
    assert STREAM_BYTES == (1 + AHEAD_MAX) << 20
    assert not receivers()


def test_without_a_thread_to_receive_a_stream_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system starts no more threads, receiving and reading take turns."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    stream = Stream(6)
    with stream.read_ahead() as messages:
        assert len(list(messages)) == 6
    assert set(stream.asked) == {threading.current_thread().name}


def test_a_stream_that_was_read_is_not_cancelled() -> None:
    """Nor is anything asked for after its last byte: the daemon is about to end it."""
    stream = Stream(9)
    with stream.read_ahead(8 << 20) as messages:
        assert len([next(messages) for _ in range(8)]) == 8
    assert len(stream.asked) == 8
    assert not stream.cancelled.is_set()
    assert not receivers()


def test_what_comes_after_the_expected_bytes_is_received_when_it_is_asked_for() -> None:
    """Up to the end, where `next` says so as often as it is asked."""
    stream = Stream(10)
    with stream.read_ahead(8 << 20) as messages:
        assert len(list(messages)) == 10
        assert [next(messages, None), next(messages, None)] == [None, None]
    assert stream.asked[8:] == [threading.current_thread().name] * 2
    assert not stream.cancelled.is_set()


def test_an_error_comes_after_the_messages_before_it() -> None:
    """Raised where the messages are read; after it there are no more."""
    stream = Stream(5, silent=1)
    stream.cancelled.set()
    with stream.read_ahead() as messages:
        assert len([next(messages) for _ in range(5)]) == 5
        with pytest.raises(CorruptDataError, match="cancelled"):
            next(messages)
        assert next(messages, None) is None
    assert not receivers()


@pytest.mark.parametrize("read", range(4))
def test_a_stream_that_is_left_is_cancelled_and_leaves_no_thread(read: int) -> None:
    """Whether the thread waits for a message or for room; what it received is given back at once."""
    for stream in (Stream(3, silent=3), Stream(12)):
        messages = stream.read_ahead()
        with contextlib.suppress(LimitError), messages:
            for _ in range(read):
                next(messages)
            raise LimitError("the reader gives up")
        assert stream.cancelled.is_set()
        assert not receivers()
        assert messages._arrived.empty()


def test_a_short_stream_needs_no_thread() -> None:
    """Its messages are received as they are asked for, and leaving it cancels nothing: the caller does."""
    stream = Stream(8)
    with stream.read_ahead(AHEAD_BYTES_MIN - 1) as messages:
        next(messages)
        assert not receivers()
    assert len(stream.asked) == 1
    assert not stream.cancelled.is_set()
