"""Receiving layers: parts as they come, one layer ahead of the caller, and nothing that does not belong there."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvstore.client import receiver
from kvstore.client.receiver import Message, Receiver, receive
from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import CorruptDataError, LimitError
from kvstore.wire.frames import LayerBytes
from kvstore.wire.v1 import kvstore_pb2 as pb

LAYER_BYTES = 1000


def part(layer: int, data: bytes) -> LayerBytes:
    """A message of the stream."""
    return LayerBytes(layer, memoryview(data))


def test_large_parts_stay_where_they_arrived_and_small_ones_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the parts of a stream are, what is held for them is about their bytes."""
    monkeypatch.setattr(receiver, "PART_BYTES_MIN", 4)
    arrived = [b"abcd", b"e", b"f", b"g", b"hijkl", b"m"]
    parts = receive((part(3, data) for data in arrived), 3, 13)
    assert parts == [b"abcd", b"efg", b"hijkl", b"m"]
    assert isinstance(parts[0], memoryview)
    assert parts[0].obj is arrived[0]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [part(0, b"abc")],
        [part(0, b"abc"), part(1, b"d")],
        [part(0, b"abc"), part(0, b"")],
        [part(0, b"abc"), part(0, b"de")],
        [part(0, b"abc"), pb.FetchReply()],
    ],
)
def test_a_stream_of_anything_else_is_corrupt(messages: list[Message]) -> None:
    """Fewer bytes, more, another layer's, none, or no bytes at all: here four are due."""
    with pytest.raises(CorruptDataError):
        receive(iter(messages), 0, 4)


@pytest.mark.parametrize(("limit_bytes", "ahead"), [(2 * LAYER_BYTES, 2), (2 * LAYER_BYTES - 1, 1)])
def test_no_more_layers_are_held_than_memory_was_counted(limit_bytes: int, ahead: int) -> None:
    """The caller's and one more, or only one of both; and all of it is given back."""
    asked = [threading.Event() for _ in range(4)]

    def stream() -> Iterator[Message]:
        for layer in range(4):
            asked[layer].set()
            yield part(layer, bytes([layer]) * LAYER_BYTES)

    budget = ByteBudget(limit_bytes)
    with Receiver(stream(), [LAYER_BYTES] * 4, budget, lambda: None, 5) as layers:
        for layer in range(4):
            assert layers.take() == [bytes([layer]) * LAYER_BYTES]
            assert budget.used_bytes == ahead * LAYER_BYTES
            if layer + ahead < 4:
                assert not asked[layer + ahead].wait(0.02)
    assert budget.used_bytes == 0


def test_a_layer_that_finds_no_room_is_refused() -> None:
    """Rather than received beyond the limit."""
    budget = ByteBudget(LAYER_BYTES - 1)
    with pytest.raises(LimitError):
        Receiver(iter([]), [LAYER_BYTES], budget, lambda: None, 5)
    assert budget.used_bytes == 0


def test_a_caller_that_leaves_ends_the_stream() -> None:
    """Also while the thread waits for the next message."""
    cancelled = threading.Event()

    def stream() -> Iterator[Message]:
        yield part(0, bytes(LAYER_BYTES))
        cancelled.wait(60)
        raise CorruptDataError("cancelled")

    budget = ByteBudget(2 * LAYER_BYTES)
    with Receiver(stream(), [LAYER_BYTES] * 9, budget, cancelled.set, 5) as layers:
        layers.take()
    assert cancelled.is_set()
    assert budget.used_bytes == 0
