"""Affine quantization along tokens: each channel has a scale and a bias for every 64 tokens.

Keys have channels that are much larger than the others, always the same ones. Along a token's row they take the whole
range of their group and leave the rest a few steps; along tokens each channel has a range of its own. The bias takes
the place of centring: a channel's mean costs nothing.

A group is whole or is not encoded: see `encode.py` for what becomes of the tokens at the end.

Format, version 1; a row for each group of 64 tokens of a head, of any width:
tensors         codes   U32 [width * 64 * bits / 32]: of each channel its 64 codes as one bit string (`packing.py`)
                scales, biases  in the part's dtype [width]
encode          bias = least value; scale = (greatest - least) / (2^bits - 1), rounded to the dtype;
                code = floor((x - bias) / scale + 1/2), within its bits; 0 where scale is 0
decode          scale * code + bias in float32, then the part's dtype

Codes are chosen for the scale as it is stored, not for the one before rounding, which in bfloat16 is off by half a step
of 8 bits at the end of a group's range.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kvstore.codecs import packing
from kvstore.codecs.affine import BITS, AffineCodec
from kvstore.codecs.codec import NO_CONTEXT, Context, register
from kvstore.core.blocks import RAW, Recipe, Tensor
from kvstore.core.layers import PartSpec
from kvstore.errors import CorruptDataError

GROUP_TOKENS = 64


def channel_recipe(bits: int) -> Recipe:
    """The recipe of `channel` with `bits` a value, 64 tokens a group; bits are checked when it is used."""
    return Recipe("channel", 1, (("bits", bits), ("group", GROUP_TOKENS)))


class ChannelCodec(AffineCodec):
    """See `codec.Codec`. Parameters: bits; group, the tokens of one, always 64. Trusted as affine is."""

    name = "channel"
    version = 1
    group_tokens = GROUP_TOKENS

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """Any geometry, as it is."""
        return target if part.width and not part.bits else RAW

    def tensors(self, part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
        """codes (packed little-endian in 32-bit words), scales, biases; a row for each 64 tokens."""
        bits = recipe.param("bits")
        if bits not in BITS or recipe.param("group") != GROUP_TOKENS or part.bits or not part.width:
            raise CorruptDataError(f"recipe {recipe} cannot describe channels of {part}")
        words = part.width * GROUP_TOKENS * bits // 32
        return (
            Tensor("codes", "U32", part.heads, words, group_tokens=GROUP_TOKENS),
            Tensor("scales", part.dtype, part.heads, part.width, group_tokens=GROUP_TOKENS),
            Tensor("biases", part.dtype, part.heads, part.width, group_tokens=GROUP_TOKENS),
        )

    def fidelity(self, recipe: Recipe) -> int:
        """One bit more than affine at the same width: on keys with outlier channels, 4 bits do as well as affine 6."""
        return 100 * (recipe.param("bits") + 1)

    def encode(self, array: mx.array, recipe: Recipe, context: Context = NO_CONTEXT) -> tuple[mx.array, ...]:
        """[L, H, T, D], T whole groups -> codes, scales, biases."""
        layers, heads, tokens, width = array.shape
        bits, groups = recipe.param("bits"), tokens // GROUP_TOKENS
        columns = array.reshape(layers, heads, groups, GROUP_TOKENS, width).transpose(0, 1, 2, 4, 3)
        values = mx.contiguous(columns).astype(mx.float32)
        low, high, last = values.min(-1), values.max(-1), float(2**bits - 1)
        scales, biases = ((high - low) / last).astype(array.dtype), low.astype(array.dtype)
        step = scales.astype(mx.float32)
        inverse = mx.where(step > 0, 1.0 / step, 0.0)
        levels = (values - low[..., None]) * inverse[..., None] + 0.5
        codes = mx.clip(levels, 0.0, last + 0.5).astype(mx.uint8)
        words = packing.pack([codes], ((GROUP_TOKENS, bits),))
        return words.reshape(layers, heads, groups, width * words.shape[-1]), scales, biases

    def decode(
        self, tensors: Sequence[mx.array], recipe: Recipe, part: PartSpec, context: Context = NO_CONTEXT
    ) -> mx.array:
        """codes, scales, biases -> [L, H, T, D] in the dtype of the scales."""
        codes, scales, biases = tensors
        bits, (layers, heads, groups, width) = recipe.param("bits"), scales.shape
        if not groups:
            return mx.zeros((layers, heads, 0, width), scales.dtype)
        words = codes.reshape(layers, heads, groups, width, codes.shape[-1] // width)
        step, base = (t.astype(mx.float32)[..., None] for t in (scales, biases))
        columns = (packing.unpack(words, ((GROUP_TOKENS, bits),))[0] * step + base).astype(scales.dtype)
        return mx.contiguous(columns.transpose(0, 1, 2, 4, 3)).reshape(layers, heads, groups * GROUP_TOKENS, width)


register(ChannelCodec())
