"""The identity codec: one tensor `data` in the dtype of the part.

Parts that the engine itself keeps quantized use this recipe too, as three tensors. They are stored and returned
unchanged, without `encode` and `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kvstore.codecs.codec import NO_CONTEXT, Context, register
from kvstore.core.blocks import FIDELITY_EXACT, RAW, Recipe, Tensor
from kvstore.core.layers import PartSpec


class RawCodec:
    """See `base.Codec`."""

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


register(RawCodec())
