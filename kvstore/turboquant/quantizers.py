"""Vectors <-> packed vectors, and inner products with them that decode nothing.

<query, R^-1 y> = <R query, y>: the query is rotated once, and its product with the levels of the codes is what the
product with the decoded vector would be. Decoding costs an inverse rotation for every vector more.

Packed rows have a multiple of 8 coordinates, 16 at least. Vectors of any other dimension from 2 are packed with zeros
after them, which changes neither lengths nor inner products; every count of bits is of what is packed.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from kvstore.codecs import rotation
from kvstore.codecs.codebooks import BITS_MAX
from kvstore.codecs.packing import CODES_TOGETHER
from kvstore.codecs.turboquant import (
    PROD,
    SEED_MAX,
    WIDTH_MIN,
    RowFormat,
    decode_rows,
    encode_rows,
    levels_and_signs,
    row_format,
    scales_of,
    turboquant_mse_recipe,
    turboquant_prod_recipe,
)
from kvstore.core.blocks import Recipe
from kvstore.errors import CorruptDataError, InvalidVectorError

# How far from 1 the length of a unit vector may be: rows that come out of float16 or bfloat16 are not closer.
UNIT_TOLERANCE = 1e-2
# A vector of one coordinate is a sign.
DIM_MIN = 2


class QuantStrategy(enum.StrEnum):
    """MSE: least squared error. PROD: inner products without bias, one bit of each value for the residual's sign."""

    MSE = "mse"
    PROD = "prod"


@dataclass(frozen=True, slots=True, eq=False)
class PackedVectors:
    """`tensors`: codes uint32 `[..., words]` and, where the recipe has them, scales `[..., 1 or 2]`."""

    recipe: Recipe
    tensors: tuple[mx.array, ...]
    dim: int

    def __repr__(self) -> str:
        shape = list(self.tensors[0].shape[:-1])
        return f"PackedVectors({self.recipe}, dim={self.dim}, shape={shape}, nbytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def as_array(vectors: Any) -> mx.array:
    """Convert with mx.array. Raises InvalidVectorError (dimension) for ragged lists and non-numbers."""
    try:
        return vectors if isinstance(vectors, mx.array) else mx.array(vectors)
    except (TypeError, ValueError) as error:
        raise InvalidVectorError("dimension", f"not an array of vectors: {error}") from error


def checked_vectors(vectors: Any, dim: int, unit: bool) -> mx.array:
    """float32 `[..., dim]`, evaluated; InvalidVectorError (dimension, non_finite, zero, not_unit) for anything else.

    With `unit` every vector must have length 1; else any finite one will do.
    """
    array = as_array(vectors)
    if array.ndim == 0 or array.shape[-1] != dim:
        raise InvalidVectorError("dimension", f"vectors of shape {tuple(array.shape)}, expected [..., {dim}]")
    rows = array.astype(mx.float32)
    if not rows.size:
        return rows
    lengths = mx.linalg.norm(rows, axis=-1)
    shortest, longest = mx.min(lengths), mx.max(lengths)
    finite = mx.all(mx.isfinite(rows))
    mx.eval(rows, shortest, longest, finite)
    if not finite.item():
        raise InvalidVectorError("non_finite", "a vector holds an infinity or NaN")
    if unit and shortest.item() == 0:
        raise InvalidVectorError("zero", "a vector is zero, and has no direction")
    if unit and max(abs(shortest.item() - 1), abs(longest.item() - 1)) > UNIT_TOLERANCE:
        raise InvalidVectorError(
            "not_unit", f"unit vectors are required, got lengths from {shortest.item():.4g} to {longest.item():.4g}"
        )
    return rows


class Quantizer:
    """Base of both quantizers; `recipe` says how vectors are packed. Any thread may call; results belong to it."""

    def __init__(self, recipe: Recipe, dim: int, dtype: mx.Dtype = mx.float32) -> None:
        """`dtype`: of the scales, and to which vectors are rounded. InvalidVectorError (bits, dimension, seed)."""
        self.recipe = recipe
        self.dim = dim
        self.dtype = dtype
        try:
            self.form: RowFormat = row_format(recipe, packed_width(dim))
        except CorruptDataError as error:
            raise InvalidVectorError(_wrong_with(recipe), f"{dim} dimensions: {error}") from error

    def quantize(self, vectors: Any) -> PackedVectors:
        """`[..., dim]`, an array of any float dtype or what mx.array takes -> packed vectors `[...]`, evaluated."""
        rows = checked_vectors(vectors, self.dim, self.form.unit)
        packed = encode_rows(self.padded(rows).astype(self.dtype), self.form)
        mx.eval(*packed)
        return PackedVectors(self.recipe, packed, self.dim)

    def dequantize(self, packed: PackedVectors) -> mx.array:
        """float32 `[..., dim]`."""
        self._check(packed)
        return self.cut(decode_rows(packed.tensors, self.form))

    def estimate_inner_products(self, packed: PackedVectors, query: Any) -> mx.array:
        """float32 `[...]`: of each packed vector with `query` `[dim]`, which may have any length."""
        self._check(packed)
        rotated = checked_vectors(query, self.dim, unit=False)
        if rotated.ndim != 1:
            raise InvalidVectorError("dimension", f"one query of {self.dim} numbers, got {tuple(rotated.shape)}")
        return inner_products(packed.tensors, self.form, self.padded(rotated))

    def padded(self, rows: mx.array) -> mx.array:
        """`[..., dim]` -> `[..., form.width]`, as rows are packed."""
        missing = self.form.width - self.dim
        return mx.concatenate([rows, mx.zeros((*rows.shape[:-1], missing), rows.dtype)], axis=-1) if missing else rows

    def cut(self, rows: mx.array) -> mx.array:
        """The inverse of `padded`."""
        return rows[..., : self.dim] if rows.shape[-1] > self.dim else rows

    def _check(self, packed: PackedVectors) -> None:
        if packed.recipe != self.recipe:
            raise InvalidVectorError("recipe", f"vectors packed as {packed.recipe}, not {self.recipe}")
        if packed.dim != self.dim:
            raise InvalidVectorError("dimension", f"vectors of {packed.dim} coordinates, not {self.dim}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.recipe}, dim={self.dim})"


def packed_width(dim: int) -> int:
    """Coordinates of a packed row: `dim`, or the next larger width that rows can have."""
    if dim < DIM_MIN:
        return dim  # no vector has so few, and no row format either
    return max(WIDTH_MIN, -(-dim // CODES_TOGETHER) * CODES_TOGETHER)


def _wrong_with(recipe: Recipe) -> str:
    """Which parameter no format has; the dimension if it is none of them."""
    values = dict(recipe.params)
    least = 2 if recipe.name == PROD else 1
    if values["bits"] not in range(least, BITS_MAX + 1):
        return "bits"
    return "dimension" if 0 <= values.get("seed", 0) <= SEED_MAX else "seed"


class TurboQuantMSE(Quantizer):
    """`bits` / 8 bytes a coordinate of a unit vector, 1 to 8 bits; `dim`: 2 to 8192.

    Dimensions that are no multiple of 8, and those under 16, take the bytes of the next one that is.
    """

    def __init__(self, dim: int, bits: int, seed: int = 42) -> None:
        super().__init__(turboquant_mse_recipe(bits, seed, unit=True), dim)


class TurboQuantProd(Quantizer):
    """As `TurboQuantMSE`, 2 to 8 bits and four bytes more a vector, for inner products without bias."""

    def __init__(self, dim: int, bits: int, seed: int = 42) -> None:
        super().__init__(turboquant_prod_recipe(bits, seed, unit=True), dim)


def inner_products(tensors: Sequence[mx.array], form: RowFormat, query: mx.array) -> mx.array:
    """float32 `[...]` of packed vectors with float32 `query` `[width]`, lazy."""
    levels, signs = levels_and_signs(tensors[0], form)
    a, g = scales_of(tensors, form)
    rotated = rotation.rotate(query, form.seed)
    products = (levels * rotated).sum(-1, keepdims=True) * a
    if signs is not None and g is not None:
        products = products + (signs * rotation.rotate(rotated, form.seed + 1)).sum(-1, keepdims=True) * g
    return products[..., 0]


def weighted_sum(tensors: Sequence[mx.array], form: RowFormat, weights: mx.array) -> mx.array:
    """Weighted sum of packed vectors: float32 `[width]`, lazy. Applies the inverse rotation only once, to the sum."""
    levels, signs = levels_and_signs(tensors[0], form)
    a, g = scales_of(tensors, form)
    column = weights[:, None]
    total = (levels * (column * a)).sum(0)
    if signs is not None and g is not None:
        total = total + rotation.rotate_back((signs * (column * g)).sum(0), form.seed + 1)
    return rotation.rotate_back(total, form.seed)
