"""What a fetch does between reading a layer and handing it over."""

from __future__ import annotations

import io
import time
from collections.abc import Generator

import mlx.core as mx
import pytest

from kvstore.client.attempt import DECODING_MAX, Attempt, Caller
from kvstore.client.results import Miss
from kvstore.codecs import device
from kvstore.core.blocks import Reason
from kvstore.core.breaker import Deadline
from kvstore.core.layers import KVLayer, LayerSpec, PartSpec
from kvstore.errors import DeadlineError

SPEC = LayerSpec(PartSpec(1, 4, "F32"), PartSpec(1, 4, "F32"))


def layer(number: int) -> KVLayer:
    """One token, not computed yet."""
    array = mx.ones((1, 1, 1, 4)) * number
    return KVLayer(SPEC, (array,), (array + 1,), 1)


def generated(layers: list[KVLayer]) -> Generator[KVLayer, None, None]:
    """The layers, as they are read."""
    yield from layers


def attempt(*, evaluate: bool, total_s: float = 60.0) -> Attempt:
    """One with so much time."""
    return Attempt(b"", 1.0, Deadline(total_s), time.monotonic(), Caller(evaluate=evaluate))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What is begun and waited for, by the number of the layer, in order."""
    noted: list[tuple[str, float]] = []
    for name in ("begin", "evaluate"):
        original = getattr(device, name)

        def note(arrays: list[mx.array], name: str = name, original: object = original) -> None:
            original(arrays)  # type: ignore[operator]
            noted.append((name, arrays[0][0, 0, 0, 0].item()))

        monkeypatch.setattr(device, name, note)
    return noted


def test_layers_are_decoded_while_the_next_ones_are_read(calls: list[tuple[str, float]]) -> None:
    """Each is begun as soon as it is there, and waited for a few layers later."""
    one = attempt(evaluate=True)

    def read() -> Generator[KVLayer, None, None]:
        for number in range(6):
            made = layer(number)
            one.begin(made)
            yield made

    got = list(one.decoded(read()))
    assert [each.keys[0][0, 0, 0, 0].item() for each in got] == list(range(6))
    assert [number for name, number in calls if name == "begin"] == list(range(6))
    assert [number for name, number in calls if name == "evaluate"] == list(range(6))
    for number in range(6 - DECODING_MAX):
        waited = calls.index(("evaluate", number))
        assert calls[waited - 1] == ("begin", number + DECODING_MAX)


def test_layers_that_may_be_lazy_are_left_alone(calls: list[tuple[str, float]]) -> None:
    """The caller evaluates them, in its first forward pass. MLX would have it wait already when many are begun."""
    one = attempt(evaluate=False)
    made = [layer(0), layer(1)]
    for each in made:
        one.begin(each)
    assert len(list(one.decoded(generated(made)))) == 2
    assert calls == []
    assert one.meter.report("1", 1, Miss(Reason.OK), by_path=True).timing.decode_s == 0


def test_decoding_ends_with_the_time_of_the_fetch() -> None:
    """A caller that waits for its layers does not wait longer for them than for their bytes; then reading ends, too."""
    one = attempt(evaluate=True, total_s=0.0)
    with pytest.raises(DeadlineError):
        one.begin(layer(0))
    read = generated([layer(0) for _ in range(DECODING_MAX + 2)])
    with pytest.raises(DeadlineError) as kept:
        list(one.decoded(read))
    assert read.gi_frame is None, kept


def test_a_file_is_loaded_while_this_thread_computes() -> None:
    """Not after what was begun before it, which on one stream it would be."""
    # The machine may hold up one load, but not every time.
    assert any(share_before_load() < 0.5 for _ in range(6))


def share_before_load() -> float:
    """Of the time that computing takes, the part after which a small file is loaded."""
    small = io.BytesIO()
    mx.save_safetensors(small, {"a": mx.ones((4,))})
    data = mx.random.normal((2048, 2048))
    mx.eval(data)
    for _ in range(8):
        data = mx.sort(data, axis=0)
    started = time.monotonic()
    device.begin([data])
    assert device.load_stream() is not None
    small.seek(0)
    loaded = mx.load(small, format="safetensors", stream=device.load_stream())
    loaded_s = time.monotonic() - started
    mx.eval(data)
    assert isinstance(loaded, dict) and mx.array_equal(loaded["a"], mx.ones((4,))).item()
    return loaded_s / (time.monotonic() - started)
