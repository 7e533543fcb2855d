"""Lossless codec: byte planes compressed with zstd.

The first bytes of all elements, then their second bytes, and so on ("planes"), each in zstd blocks of its own within
one frame that says how long its content is. In bfloat16 the plane of sign and exponent shrinks to about a third and
the other hardly at all: 0.68 of the whole on normal values; without planes 0.78.

It works on bytes, after and instead of the arrays of other codecs: a layer's share of a raw tensor is packed when it is
written and unpacked when it is read, so that raw and lossless rows are the same to everything in between.
"""

from __future__ import annotations

import math

import numpy as np
import zstandard

from kvstore.codecs.codec import register
from kvstore.codecs.device import Bytes
from kvstore.codecs.raw import RawCodec
from kvstore.codecs.zstd import compressor, content
from kvstore.core.blocks import RAW, Recipe
from kvstore.core.layers import PartSpec

LOSSLESS = Recipe("lossless")
LEVEL = 1


class LosslessCodec(RawCodec):
    """See `base.ByteCodec`. As arrays, its tensors are those of raw. Any thread."""

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


register(LosslessCodec())
