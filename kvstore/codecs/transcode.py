"""Makes a block's stored codes those of a smaller profile: decoded, and encoded from the values that a hit would get.

A second quantization, which nothing else in the store does. So the error that it adds is measured, and the rank of what
comes out is the least of before and after. Runs of a block become as few as a first store would make.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from kvstore.codecs import device
from kvstore.codecs.codec import NO_CONTEXT
from kvstore.codecs.device import Bytes
from kvstore.codecs.encode import PIECE_BYTES, Submit, encode_runs
from kvstore.codecs.profiles import Profile
from kvstore.codecs.runs import EncodedRun, pack_run, payload_run, stacks_of
from kvstore.core.blocks import Block, Run
from kvstore.core.layers import Layout, raw_ranges

# Squares of the difference and of the values themselves, summed up.
Sums: TypeAlias = tuple[float, float]
SubmitSums: TypeAlias = Callable[[Callable[[], Sums]], Sums]


def gather_layers(layout: Layout, layer_views: Callable[[int], Sequence[memoryview]], n_tokens: int) -> EncodedRun:
    """A raw run of `n_tokens`. `layer_views(layer)`: the bytes of a kv layer's arrays, keys first, as
    `assemble.dense_bytes` gives them."""
    payload = np.empty(n_tokens * layout.token_bytes, np.uint8)
    places: dict[int, list[slice]] = defaultdict(list)
    for _, _, layer, offset, length in raw_ranges(layout, n_tokens):
        places[layer].append(slice(offset, offset + length))
    for layer, own in sorted(places.items()):
        for place, view in zip(own, layer_views(layer), strict=True):
            payload[place] = np.frombuffer(view, np.uint8)
    return payload_run(layout, payload, n_tokens)


def is_finite(layout: Layout, raw: EncodedRun) -> bool:
    """Whether no value of a raw run is an infinity or NaN. Without the device."""
    return all(device.all_finite(rows, dtype) for _, dtype, rows in _plain(layout, raw))


def transcode(
    layout: Layout,
    raw: EncodedRun,
    block: Block,
    profile: Profile,
    submit: Submit,
    aux: Mapping[bytes, bytes] = NO_CONTEXT.aux,
) -> list[EncodedRun]:
    """The runs of a block with the values of `raw`, which its own runs decode to, encoded as the profile says.

    `submit` and `aux` as for `encode.encode_runs`. What is not encoded, such as the tokens after the last whole group,
    keeps the rank that it has.
    """
    runs, at = [], 0
    for one in encode_runs(layout, [raw], profile, block.start, submit, aux):
        packed = pack_run(layout, one, profile)
        rank = min([packed.run.fidelity, *_ranks(block.runs, at, at + packed.run.shown)])
        runs.append(EncodedRun(replace(packed.run, fidelity=rank), packed.buffers))
        at += packed.run.shown
    return runs


def _ranks(runs: Sequence[Run], start: int, end: int) -> Iterator[int]:
    """The ranks of the runs that show any of these tokens."""
    at = 0
    for run in runs:
        if at < end and at + run.shown > start:
            yield run.fidelity
        at += run.shown


def relative_error(layout: Layout, before: EncodedRun, after: EncodedRun, submit: SubmitSums) -> float:
    """Norm of the difference of two raw runs / norm of the first; of keys or values, whichever is larger.

    Parts that the engine keeps quantized do not count. `submit` runs a piece of device work on the MLX thread.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (part, dtype, one), (_, _, other) in zip(_plain(layout, before), _plain(layout, after), strict=True):
        step = max(1, PIECE_BYTES * len(one) // max(1, one.nbytes))
        for at in range(0, len(one), step):
            work = functools.partial(_sums, one[at : at + step], other[at : at + step], dtype)
            for number, value in enumerate(submit(work)):
                sums[part][number] += value
    return max((math.sqrt(off / own) if own else 0.0 for off, own in sums.values()), default=0.0)


def _plain(layout: Layout, raw: EncodedRun) -> Iterator[tuple[str, str, Bytes]]:
    """(part, dtype, rows) of the tensors of a raw run that hold values instead of an engine's own codes."""
    for stack, rows in stacks_of(raw):
        if not layout.layers[stack.layers[0]].part(stack.part).bits:
            yield stack.part, stack.tensors[0].dtype, rows[0]


def _sums(one: Bytes, other: Bytes, dtype: str) -> Sums:
    """MLX thread only."""
    first, second = (device.to_array(rows, dtype).astype(mx.float32) for rows in (one, other))
    off, own = mx.square(second - first).sum(), mx.square(first).sum()
    device.evaluate([off, own])
    return float(np.asarray(off)), float(np.asarray(own))
