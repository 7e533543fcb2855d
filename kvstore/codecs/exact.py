"""Exact codecs: raw, which stores arrays as they are, and lossless, which compresses their byte planes with zstd.

raw         One tensor `data` in the dtype of the part. Parts that the engine itself keeps quantized use this recipe
            too, as three tensors. They are stored and returned unchanged, without `encode` and `decode`.
lossless    The first bytes of all elements, then their second bytes, and so on ("planes"), each in zstd blocks of its
            own within one frame that says how long its content is. In bfloat16 the plane of sign and exponent shrinks
            to about a third and the other hardly at all: 0.68 of the whole on normal values; without planes 0.78.

Lossless works on bytes, after and instead of the arrays of other codecs: a layer's share of a raw tensor is packed when
it is written and unpacked when it is read, so that raw and lossless rows are the same to everything in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import zstandard

from kvstore.codecs.codec import NO_CONTEXT, Context, register
from kvstore.codecs.device import Bytes
from kvstore.codecs.zstd import compressor, content
from kvstore.core.blocks import FIDELITY_EXACT, RAW, Recipe, Tensor
from kvstore.core.layers import PartSpec

LOSSLESS = Recipe("lossless")
LEVEL = 1


class RawCodec:
    """See `codec.Codec`."""

    name = "raw"
    version = 1
    group_tokens = 1

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """Raw fits everything."""
        return RAW

    def tensors(self, part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
        """Taken from the layer's schema."""
        return part.tensors()

    def fidelity(self, recipe: Recipe) -> int:
        """Exact."""
        return FIDELITY_EXACT

    def encode(self, array: mx.array, recipe: Recipe, context: Context = NO_CONTEXT) -> tuple[mx.array, ...]:
        """The array."""
        return (array,)

    def trusted(self, tensors: Sequence[mx.array], recipe: Recipe, context: Context = NO_CONTEXT) -> mx.array:
        """Always."""
        return mx.array(True)

    def decode(
        self, tensors: Sequence[mx.array], recipe: Recipe, part: PartSpec, context: Context = NO_CONTEXT
    ) -> mx.array:
        """The array."""
        return tensors[0]


class LosslessCodec(RawCodec):
    """See `codec.ByteCodec`. As arrays, its tensors are those of raw. Any thread."""

    name = "lossless"

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """Lossless fits everything, also what an engine keeps quantized."""
        return LOSSLESS

    def unpacked(self, recipe: Recipe) -> Recipe:
        """Raw."""
        return RAW

    def pack(self, share: Bytes, item_bytes: int) -> bytes:
        """One zstd frame of a layer's share of a tensor; `share`: its bytes, C-contiguous."""
        planes = np.ascontiguousarray(share.reshape(-1, item_bytes).T)
        frame = compressor(LEVEL).compressobj(size=planes.nbytes)
        parts = []
        for plane in planes:
            parts.append(frame.compress(plane.data))
            parts.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        return b"".join([*parts, frame.flush()])

    def unpack(self, packed: memoryview, shape: tuple[int, int, int], item_bytes: int) -> Bytes:
        """The share that was packed, as uint8. CorruptDataError when it is anything else."""
        nbytes = math.prod(shape)
        planes = np.frombuffer(content(packed, nbytes), np.uint8).reshape(item_bytes, -1)
        share = np.empty((nbytes // item_bytes, item_bytes), np.uint8)
        for number, plane in enumerate(planes):
            share[:, number] = plane
        return share.reshape(shape)


register(RawCodec())
register(LosslessCodec())
