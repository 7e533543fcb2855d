"""Affine quantization, bit for bit what `mx.quantize` and `mx.dequantize` do to each row.

A row is one token of one head; `group` neighbouring values share a scale and a bias in the dtype of the part, so
cutting tokens commutes with encoding and one packed block serves every prefix of it.

Head widths that are no multiple of the group (80, 96): a group of 32 where that divides (96: 0.562x of bf16 at 8 bits);
else all heads of a token become one row ("fold"; 80: 0.531x). Rejected: padding 80 to 128, 0.85x at equal error.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kvstore.codecs.codec import NO_CONTEXT, Context, register
from kvstore.core.blocks import RAW, Recipe, Tensor
from kvstore.core.layers import PartSpec
from kvstore.errors import CorruptDataError

BITS = (8, 6, 5, 4, 3, 2)
GROUPS = (32, 64, 128)
GROUP_FALLBACK = 32


def affine_recipe(bits: int, group: int, fold: bool = False) -> Recipe:
    """Make an affine recipe. `fold`: all heads of a token form one row."""
    params = (("bits", bits), ("group", group))
    return Recipe("affine", 1, (*params, ("fold", 1)) if fold else params)


def is_folded(recipe: Recipe) -> bool:
    """Whether heads were folded into the row."""
    return ("fold", 1) in recipe.params


def reaches(scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """A boolean scalar, lazy: the ends of every group's range, and the step to them, are finite in the dtype."""
    limit = mx.finfo(scales.dtype).max
    reach = scales.astype(mx.float32) * float(2**bits - 1)
    low = biases.astype(mx.float32)
    worst = mx.maximum(mx.maximum(mx.abs(reach), mx.abs(low)), mx.abs(reach + low))
    return mx.all(worst <= limit)


AFFINE = "affine"


class AffineCodec:
    """See `codec.Codec`. Parameters: bits, group, and fold=1 where heads are folded."""

    name = AFFINE
    version = 1
    group_tokens = 1

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """The head-dim rule of the module docstring."""
        bits, group = target.param("bits"), target.param("group")
        for width, fold in ((part.width, False), (part.heads * part.width, True)):
            for size in (group, GROUP_FALLBACK):
                if width % size == 0:
                    return affine_recipe(bits, size, fold)
        return RAW

    def tensors(self, part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
        """codes (packed little-endian in 32-bit words), scales, biases."""
        bits, group = recipe.param("bits"), recipe.param("group")
        heads, width = (1, part.heads * part.width) if is_folded(recipe) else (part.heads, part.width)
        if bits not in BITS or group not in GROUPS or part.bits or not width or width % group:
            raise CorruptDataError(f"recipe {recipe} cannot describe rows of {width}")
        return (
            Tensor("codes", "U32", heads, width * bits // 32),
            Tensor("scales", part.dtype, heads, width // group),
            Tensor("biases", part.dtype, heads, width // group),
        )

    def fidelity(self, recipe: Recipe) -> int:
        """Hundredths of a bit: 800 for 8 bits."""
        return 100 * recipe.param("bits")

    def encode(self, array: mx.array, recipe: Recipe, context: Context = NO_CONTEXT) -> tuple[mx.array, ...]:
        """[L, H, T, D] -> codes, scales, biases."""
        if is_folded(recipe):
            layers, heads, tokens, width = array.shape
            array = array.transpose(0, 2, 1, 3).reshape(layers, 1, tokens, heads * width)
        codes, scales, biases = mx.quantize(array, group_size=recipe.param("group"), bits=recipe.param("bits"))
        return codes, scales, biases

    def trusted(self, tensors: Sequence[mx.array], recipe: Recipe, context: Context = NO_CONTEXT) -> mx.array:
        """Every value that the codes could name is finite in the dtype of the scales.

        Finite scales are not enough: fp16 rows that reach both +65504 and -65504 get finite scales, yet
        scale * 255 overflows before the bias is added, and mx.dequantize returns infinities.
        """
        _, scales, biases = tensors
        return reaches(scales, biases, recipe.param("bits"))

    def decode(
        self, tensors: Sequence[mx.array], recipe: Recipe, part: PartSpec, context: Context = NO_CONTEXT
    ) -> mx.array:
        """codes, scales, biases -> [L, H, T, D] in the dtype of the scales.

        mx.contiguous first: mx.dequantize on slices that are not contiguous was silently wrong on Metal (mlx#4370).
        """
        codes, scales, biases = (mx.contiguous(tensor) for tensor in tensors)
        array = mx.dequantize(codes, scales, biases, group_size=recipe.param("group"), bits=recipe.param("bits"))
        if is_folded(recipe):
            layers, _, tokens, _ = array.shape
            array = array.reshape(layers, tokens, part.heads, part.width).transpose(0, 2, 1, 3)
            array = mx.contiguous(array)
        return array


register(AffineCodec())
