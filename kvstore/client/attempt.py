"""State of one running fetch: its caller, its deadlines, the time taken so far, and the layers being decoded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kvstore.client.timing import Meter
from kvstore.codecs import device
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain
from kvstore.core.layers import KVLayer, StateLayer

Layer: TypeAlias = KVLayer | StateLayer

# Layers that are decoded while the next one is read. If decoding is faster than reading, one is enough; if it is
# slower, waiting layers take memory.
DECODING_MAX = 2


@dataclass(frozen=True, slots=True)
class Caller:
    """What a caller states: its speed (0: unknown), leading tokens that it holds already, whether it wants every
    layer evaluated, so that the arrays may be viewed on any thread, and whether it attends to quantized layers.
    `request_id` names what it asks in the logs of both ends."""

    prefill_tokens_per_s: float = 0.0
    covered_tokens: int = 0
    evaluate: bool = False
    keep_codes: bool = False
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One fetch: its tokens, its time limits, who asks, what it took so far, and what its recipes refer to. Of the
    thread that fetches.

    For a caller that wants them evaluated, layers are decoded while the next ones are read: of 1 GiB of 8-bit KV on a
    CPU that takes 0.75 of the time that one after the other does. For others decoding stays lazy.
    """

    chain: Chain
    stall_s: float
    deadline: Deadline
    started: float
    caller: Caller
    meter: Meter = field(default_factory=Meter)
    aux: Mapping[bytes, bytes] = field(default_factory=dict)

    def begin(self, layer: Layer) -> None:
        """Have a layer decoded that has been read, if the caller wants that. DeadlineError when time is over."""
        if self.caller.evaluate:
            self._decode(device.begin, layer, nbytes=0)
        self.deadline.check()

    def decoded(self, layers: Generator[Layer, None, None]) -> Iterator[Layer]:
        """Yields layers. If the caller wants them evaluated, each is computed while the next ones are read.

        Raises DeadlineError at the deadline. Reading ends when the iteration ends, for whatever reason.
        """
        begun: deque[Layer] = deque()
        try:
            for layer in layers:
                begun.append(layer)
                if len(begun) > DECODING_MAX:
                    yield self._evaluated(begun.popleft())
            while begun:
                yield self._evaluated(begun.popleft())
        finally:
            layers.close()

    def _evaluated(self, layer: Layer) -> Layer:
        if self.caller.evaluate:
            self._decode(device.evaluate, layer, nbytes=sum(array.nbytes for array in _arrays_of(layer)))
            self.deadline.check()
        return layer

    def _decode(self, work: Callable[[list[Any]], None], layer: Layer, nbytes: int) -> None:
        """Work on the device; what it holds up this thread counts as decoding. Beginning does, too, behind others."""
        started = time.monotonic()
        work(_arrays_of(layer))
        self.meter.decoded(nbytes, time.monotonic() - started)


def _arrays_of(layer: Layer) -> list[Any]:
    return [*layer.keys, *layer.values] if isinstance(layer, KVLayer) else [array for _, array in layer.arrays]


@contextmanager
def ending(call: Any) -> Iterator[None]:
    """Cancel a fetch by path when the block ends, however it does: its lease lives as long as the call."""
    try:
        yield
    finally:
        call.cancel()
