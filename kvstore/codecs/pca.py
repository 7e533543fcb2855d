"""PCA: keys without their rotation, and values, in the components of a calibration, rounded to one step.

`basis.py` has the basis, its arithmetic and its file, `rope.py` the rotation, `code_packing.py` the packed form. A
recipe names the file by its digest, and one of its points: steps of all parts that were chosen together. What the file
says of the layer decides the rest, so all layers of one geometry share a recipe and a stack.

Format, version 1. Parameters: point; fidelity, hundredths of a bit at which the calibration ranks it.
tensors         codes  I16 [groups, rows, components], packed
encode, decode  see `basis.PartBasis`, then the part's dtype

Everything here is numpy, also where there is a GPU: what MLX multiplies in float32 may be rounded to 10 bits on some
of them, and then decoded values would depend on the machine. On a CPU MLX's product took 7 times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from kvstore.codecs import code_packing, device
from kvstore.codecs.basis import ESCAPED_MAX, Basis, PartBasis, group_width, parsed
from kvstore.codecs.codec import NO_CONTEXT, Context, register
from kvstore.codecs.device import Bytes
from kvstore.core.blocks import KEY_BYTES, RAW, Recipe, Tensor
from kvstore.core.layers import PartSpec
from kvstore.errors import AuxMissingError, CorruptDataError

PCA = "pca"
_NOT_CODED = -ESCAPED_MAX - 1  # no code is


def pca_recipe(digest: bytes, point: int, fidelity: int) -> Recipe:
    """A point of the basis file with this SHA-256. `fidelity`: its rank, in hundredths of a bit a value."""
    return Recipe(PCA, 1, (("point", point), ("fidelity", fidelity)), (digest,))


class PcaCodec:
    """See `codec.Codec` and `codec.ByteCodec`. Computes when it is called, not lazily. Any thread."""

    name = PCA
    version = 1
    group_tokens = 1

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """The target where the part's channels can be cut into groups."""
        return target if group_width(part.heads, part.width) else RAW

    def tensors(self, part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
        """int16 codes `[groups, tokens, group]`; CorruptDataError for a recipe that cannot describe this part."""
        group = 0 if part.bits or not part.width else group_width(part.heads, part.width)
        if (
            not group
            or len(recipe.references) != 1
            or len(recipe.references[0]) != KEY_BYTES
            or len(recipe.params) != 2
        ):
            raise CorruptDataError(f"recipe {recipe} cannot describe {part.heads} heads of {part.width}")
        recipe.param("point")
        self.fidelity(recipe)
        return (Tensor("codes", "I16", part.heads * part.width // group, group),)

    def fidelity(self, recipe: Recipe) -> int:
        """As the recipe says; between 1 and 99 bits."""
        rank = recipe.param("fidelity")
        if not 1 <= rank < 10_000:
            raise CorruptDataError(f"recipe {recipe} cannot be")
        return rank

    def encode(self, array: mx.array, recipe: Recipe, context: Context = NO_CONTEXT) -> tuple[mx.array, ...]:
        """[L, H, T, D] -> codes. A layer that the basis lacks, or whose codes are too large, gets none: not trusted."""
        layers, heads, tokens, width = array.shape
        group = group_width(heads, width)
        codes = np.full((layers, heads * width // group, tokens, group), _NOT_CODED, np.int16)
        device.evaluate([array])
        basis = _basis(recipe, context)
        for number, layer in enumerate(context.layers):
            if (part := _part(basis, recipe, context, layer, (heads, width))) is not None:
                found = part.encode(_token_rows(array[number]), recipe.param("point"), context.first_token)
                codes[number] = _NOT_CODED if found is None else found
        return (mx.array(codes),)

    def trusted(self, tensors: Sequence[mx.array], recipe: Recipe, context: Context = NO_CONTEXT) -> mx.array:
        """All was coded, every sum is exact, and no decoded value leaves the narrowest dtype. Computed now."""
        codes, basis = _numpy(tensors[0]), _basis(recipe, context)
        for found, layer in zip(codes, context.layers, strict=True):
            if found.size and int(found.min()) == _NOT_CODED:
                return mx.array(False)
            part = basis.parts[layer, context.part]
            if not part.is_exact(found) or not _is_within_dtype(part, found, recipe.param("point")):
                return mx.array(False)
        return mx.array(True)

    def decode(
        self, tensors: Sequence[mx.array], recipe: Recipe, part: PartSpec, context: Context = NO_CONTEXT
    ) -> mx.array:
        """codes -> [L, H, T, D] in the part's dtype; rows of head-room come back as zeros."""
        codes, basis, point = _numpy(tensors[0]), _basis(recipe, context), recipe.param("point")
        layers, _, rows, _ = codes.shape
        tokens = rows - context.spare_tokens
        carrier = np.uint16 if part.dtype == "BF16" else np.float32
        out = np.empty((layers, part.heads, rows, part.width), carrier)
        out[:, :, tokens:] = 0
        for number, layer in enumerate(context.layers):
            one = _part(basis, recipe, context, layer, (part.heads, part.width))
            if one is None:
                raise CorruptDataError(f"the basis of recipe {recipe} has no {context.part} of layer {layer}")
            one.decode(codes[number, :, :tokens], point, context.first_token, out[number, :, :tokens])
        array = mx.array(out)
        return array.view(mx.bfloat16) if carrier is np.uint16 else array.astype(device.dtype_of(part.dtype))

    def unpacked(self, recipe: Recipe) -> Recipe:
        """Itself: what unpacks are codes."""
        return recipe

    def pack(self, share: Bytes, item_bytes: int) -> bytes:
        """Codes as `code_packing` has them."""
        return code_packing.pack(share.view(np.int16))

    def unpack(self, packed: memoryview, shape: tuple[int, int, int], item_bytes: int) -> Bytes:
        """The codes of a share. CorruptDataError when it is anything else."""
        groups, rows, row_bytes = shape
        return code_packing.unpack(packed, (groups, rows, row_bytes // item_bytes)).view(np.uint8)


def _basis(recipe: Recipe, context: Context) -> Basis:
    """AuxMissingError when the context lacks its file, CorruptDataError when the file is none."""
    (digest,) = recipe.references
    data = context.aux.get(digest)
    if data is None:
        raise AuxMissingError(digest)
    return parsed(digest, data)


def _part(basis: Basis, recipe: Recipe, context: Context, layer: int, shape: tuple[int, int]) -> PartBasis | None:
    """The basis of a layer, if there is one for heads and width of this shape, and for the point of the recipe."""
    part = basis.parts.get((layer, context.part))
    is_usable = part is not None and (part.heads, part.width) == shape and recipe.param("point") < len(part.steps)
    return part if is_usable else None


def _numpy(array: mx.array) -> code_packing.Codes:
    device.evaluate([array])
    codes: code_packing.Codes = np.array(array, copy=False)
    return codes


def _token_rows(array: mx.array) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """`[H, T, D]` as float32 `[T, H, D]`, C-contiguous, of its own memory."""
    if array.dtype == mx.bfloat16:
        halves = np.array(array.view(mx.uint16), copy=False)
        wide = halves.transpose(1, 0, 2).astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return np.array(array, copy=False).transpose(1, 0, 2).astype(np.float32, order="C")


def _is_within_dtype(part: PartBasis, codes: code_packing.Codes, point: int) -> bool:
    """No dtype is given: within the range of float16. A bound first, since it nearly always holds."""
    limit = float(mx.finfo(mx.float16).max)
    turned = math.sqrt(2) * (part.rope.factor if part.rope else 1)
    sums = float(np.abs(codes.astype(np.float32)).sum(-1).max(initial=0))
    reach = sums * float(np.abs(part.matrix).max()) * float(part.scale.max() * part.steps[point])
    if (reach + float(np.abs(part.mean).max())) * turned <= limit:
        return True
    out = np.empty((part.heads, codes.shape[1], part.width), np.float32)
    part.decode(codes, point, 0, out)
    return bool(np.isfinite(out).all() and np.abs(out).max(initial=0) * turned <= limit)


register(PcaCodec())
