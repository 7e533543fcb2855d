"""Rotated affine: rows turned by the Hadamard rotation of `rotation.py`, then affine as in `affine.py`.

Format, version 1: codes, scales, biases of `affine` (bits, group, fold=1 where all heads of a token are one row), but
of rotated rows; every head is rotated by itself, with `seed` (0 if absent). decode: code * scale + bias in float32,
the inverse rotation, then the part's dtype.

Codes are chosen for scale and bias as they are stored. mx.quantize chooses them for a float32 scale and then rounds it:
in bfloat16 that is up to half a step at the ends of a group of 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from kvstore.blocks import RAW, Recipe, Tensor
from kvstore.codecs import packing, rotation
from kvstore.codecs.affine import AffineCodec, affine_recipe, is_folded
from kvstore.codecs.base import register
from kvstore.errors import CorruptDataError
from kvstore.layers import PartSpec

NAME = "rotated-affine"
WIDTH_MIN = 16
_AFFINE = AffineCodec()

# How far 2 bits reach, in units of a group's root mean square: least squared error for normal values. In groups of 64
# the error is .116 of the variance with it and .202 without; 3 bits lose at group 32 what they gain at 64.
_REACH_2_BITS = 1.494


def rotated_affine_recipe(bits: int, group: int, seed: int = 0) -> Recipe:
    """8, 6, 5, 4, 3 or 2 bits; 32, 64 or 128 values a scale."""
    params = affine_recipe(bits, group).params
    return Recipe(NAME, 1, (*params, ("seed", seed)) if seed else params)


def _seed(recipe: Recipe) -> int:
    return dict(recipe.params).get("seed", 0)


class RotatedAffineCodec:
    """See `base.Codec`. Parameters: bits, group, fold=1 where heads are folded, seed unless it is 0."""

    name = NAME
    version = 1
    group_tokens = 1

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """Group and folding as in `affine`; RAW for widths that cannot be rotated."""
        fitted = _AFFINE.fit(target, part)
        if fitted == RAW or not WIDTH_MIN <= part.width <= rotation.WIDTH_ROTATED_MAX:
            return RAW
        seed = _seed(target)
        return Recipe(NAME, 1, (*fitted.params, ("seed", seed)) if seed else fitted.params)

    def tensors(self, part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
        """Those of `affine`."""
        if _seed(recipe) < 0 or not WIDTH_MIN <= part.width <= rotation.WIDTH_ROTATED_MAX:
            raise CorruptDataError(f"recipe {recipe} cannot describe rows of {part.width}")
        return _AFFINE.tensors(part, recipe)

    def fidelity(self, recipe: Recipe) -> int:
        """Hundredths of a bit: 800 for 8 bits."""
        return _AFFINE.fidelity(recipe)

    def encode(self, array: mx.array, recipe: Recipe) -> tuple[mx.array, ...]:
        """[L, H, T, D] -> codes, scales, biases."""
        bits, group = recipe.param("bits"), recipe.param("group")
        rows = rotation.rotate(array.astype(mx.float32), _seed(recipe))
        if is_folded(recipe):
            layers, heads, tokens, width = rows.shape
            rows = rows.transpose(0, 2, 1, 3).reshape(layers, 1, tokens, heads * width)
        shape, last = rows.shape, float(2**bits - 1)
        groups = rows.reshape(*shape[:-1], shape[-1] // group, group)
        low, high = groups.min(-1), groups.max(-1)
        if bits == 2:
            reach = _REACH_2_BITS * mx.sqrt(mx.mean(mx.square(groups), axis=-1))
            low, high = mx.maximum(low, -reach), mx.minimum(high, reach)
        scales, biases = ((high - low) / last).astype(array.dtype), low.astype(array.dtype)
        step, base = (t.astype(mx.float32)[..., None] for t in (scales, biases))
        inverse = mx.where(step > 0, 1.0 / step, 0.0)
        codes = mx.clip((groups - base) * inverse + 0.5, 0.0, last + 0.5).astype(mx.uint8).reshape(shape)
        return packing.pack([codes], ((shape[-1], bits),)), scales, biases

    def trusted(self, tensors: Sequence[mx.array], recipe: Recipe) -> mx.array:
        """No decoded value can leave its dtype, nor a sum inside the transform float32.

        A value of a row whose rotated values reach r is at the most r * sqrt(width).
        """
        codes, scales, biases = tensors
        width = codes.shape[-1] * 32 // recipe.param("bits")
        reach = mx.abs(scales.astype(mx.float32)) * float(2 ** recipe.param("bits") - 1)
        reach = (reach + mx.abs(biases.astype(mx.float32))) * math.sqrt(width)
        inside = float(mx.finfo(mx.float32).max) / width
        return mx.all(reach <= min(float(mx.finfo(scales.dtype).max), inside))

    def decode(self, tensors: Sequence[mx.array], recipe: Recipe, part: PartSpec) -> mx.array:
        """codes, scales, biases -> [L, H, T, D] in the dtype of the scales."""
        codes, scales, biases = tensors
        wide = (codes, scales.astype(mx.float32), biases.astype(mx.float32))
        rows = _AFFINE.decode(wide, recipe, replace(part, dtype="F32"))
        return rotation.rotate_back(rows, _seed(recipe)).astype(scales.dtype)


register(RotatedAffineCodec())
