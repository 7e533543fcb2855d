"""TurboQuant codec: rotates each row at random, then quantizes its coordinates with one optimal codebook.

A row x of width d is one token of one head, or of `fold` neighbouring heads. Formats, version 1, by recipe parameters:

bits            a value: turboquant-mse has 1 to 8, turboquant-prod 2 to 8 (the sign bit of the residual counts; its
                levels have one bit less)
seed            of the rotation (`rotation.py`); 0 if absent. The residual's rotation has seed + 1.
fold            number of narrow heads that share a row and its scale; 1 if absent
unit = 1        rows are float32 unit vectors: no norm is stored
log = 1         scales in 8 bits (turboquant-mse, not with unit=1): 16 of them weigh much in a short row of few bits

tensors         codes   U32 [words]: levels, then signs (prod), as `packing.py` says
                scales  in the part's dtype [a] or, prod, [a, g]; with unit=1 none or, prod, F32 [g]
                        log=1: U8 [c], a = 2 ^ ((c - 128) / 12) as float32, 0 for c = 0: twelve steps an octave, so a is
                        3 % off at most. c = round(12 log2 a) + 128, 0 when that is below 1; 255 says that a is over
                        the range, and is never stored

encode          y = R x; z = y * sqrt(d / <y, y>) (unit=1: y * sqrt(d)); the codes of z are those of `codebooks.py`, and
                q their levels; a = <y, q> / <q, q>: the best scale for these codes.
                prod: r = y - a q with a as stored (unit=1: 1 / sqrt(d)); u = R' r; a set bit says u_i >= 0;
                g = <u, u> / sum |u_i|, so that <r, decoded r> = <r, r>, and inner products have no bias.
decode          x = R^-1 (a q + g R'^-1 s), s = +1 or -1

All in float32. What rounding differs by between devices can move a value that stands within 1e-5 of a boundary to the
neighbouring code, and the last bit of a scale; decoding given tensors is equal to 1e-6 of the row's norm.
tests/support/reference.py is the format again, in numpy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from kvstore.codecs import packing, rotation
from kvstore.codecs.codebooks import BINS, BINS_PER_UNIT, BITS_MAX, codebook
from kvstore.codecs.codec import NO_CONTEXT, Context, register
from kvstore.codecs.device import dtype_of
from kvstore.core.blocks import RAW, Recipe, Tensor
from kvstore.core.layers import PartSpec
from kvstore.errors import CorruptDataError

MSE = "turboquant-mse"
PROD = "turboquant-prod"
WIDTH_MIN = 16
VALUES_TOGETHER = 1 << 19
COMPARED_BITS_MAX = 4  # one comparison a boundary is cheaper than the tables up to here, on a CPU
LEVEL_REACH = 5.0  # no level is further out
SEED_MAX = (1 << 48) - 1
FOLD_MAX = 16
_RMS_MIN = 2.0**-62  # rows whose squares are no numbers of float32: their codes say little more than signs
_DEFAULTS = {"bits": -1, "seed": 0, "unit": 0, "log": 0, "fold": 1}
# Minimum number of values per scale, in targets only; `fit` turns it into a fold.
_TOGETHER = "together"
_LOG_STEPS = 12
_LOG_ONE = 128
_LOG_OVER = 255
# Decoded scales as float32.
_OCTAVES = (np.arange(1.0, 256.0) - _LOG_ONE) / _LOG_STEPS
LOG_SCALES = np.concatenate([[0.0], np.exp2(_OCTAVES)]).astype(np.float32)


def turboquant_mse_recipe(
    bits: int, seed: int = 0, *, unit: bool = False, log: bool = False, together: int = 0
) -> Recipe:
    """1 to 8 bits a value; least squared error. `together`: heads narrower than this share a scale."""
    recipe = _recipe(MSE, bits, seed, unit, log)
    return replace(recipe, params=(*recipe.params, (_TOGETHER, together))) if together else recipe


def turboquant_prod_recipe(bits: int, seed: int = 0, *, unit: bool = False) -> Recipe:
    """2 to 8 bits a value; inner products with decoded rows have no bias, at more variance than mse."""
    return _recipe(PROD, bits, seed, unit, log=False)


def _recipe(name: str, bits: int, seed: int, unit: bool, log: bool) -> Recipe:
    values = {"bits": bits, "seed": seed, "unit": int(unit), "log": int(log)}
    return Recipe(name, 1, tuple((key, value) for key, value in values.items() if key == "bits" or value))


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Tensors of a recipe for rows of `width`; see the module docstring.

    `fields` is the layout of a packed row, (number of codes, bits per code) of each field: levels of `level_bits`, then
    signs. `scales`: how many numbers are stored beside the codes of a row.
    """

    width: int
    seed: int
    unit: bool
    log: bool
    prod: bool
    level_bits: int
    fields: packing.Fields
    scales: int


@functools.lru_cache(maxsize=256)
def row_format(recipe: Recipe, width: int) -> RowFormat:
    """CorruptDataError unless the recipe can describe rows of `width`."""
    values = _DEFAULTS | dict(recipe.params)
    bits = values["bits"]
    prod = recipe.name == PROD
    known = values.keys() == _DEFAULTS.keys() and {values["unit"], values["log"]} <= {0, 1}
    known = known and not (values["log"] and (prod or values["unit"])) and 0 < values["fold"] <= FOLD_MAX
    in_range = bits in range(1 + prod, BITS_MAX + 1)
    if not known or not in_range or not 0 <= values["seed"] <= SEED_MAX or not _is_rotated(width):
        raise CorruptDataError(f"recipe {recipe} cannot describe rows of {width}")
    unit, level_bits = bool(values["unit"]), bits - prod
    fields = ((width, level_bits), (width, 1))[: 1 + prod]
    return RowFormat(width, values["seed"], unit, bool(values["log"]), prod, level_bits, fields, int(not unit) + prod)


def _is_rotated(width: int) -> bool:
    return WIDTH_MIN <= width <= rotation.WIDTH_ROTATED_MAX and width % packing.CODES_TOGETHER == 0


def encode_rows(rows: mx.array, form: RowFormat) -> tuple[mx.array, ...]:
    """`[..., width]` -> codes `[..., words]` and, where there are any, scales in the dtype of the rows.

    A few thousand rows at a time: the dozen float32 intermediates of all would be 15 times the rows' own bytes, and on
    a CPU fresh memory costs as much time as the arithmetic.
    """
    *shape, width = rows.shape
    flat = rows.reshape(math.prod(shape), width)
    step = max(1, VALUES_TOGETHER // width)
    parts = [_encode_rows(flat[at : at + step], form) for at in range(0, max(1, flat.shape[0]), step)]
    joined = parts[0] if len(parts) == 1 else tuple(mx.concatenate(list(same)) for same in zip(*parts, strict=True))
    return tuple(tensor.reshape(*shape, tensor.shape[-1]) for tensor in joined)


def _encode_rows(rows: mx.array, form: RowFormat) -> tuple[mx.array, ...]:
    """`encode_rows` of a few rows `[n, width]`."""
    y = rotation.rotate(rows.astype(mx.float32), form.seed)
    if form.unit:
        z = y * math.sqrt(form.width)
    else:
        rms = mx.sqrt(mx.mean(mx.square(y), axis=-1, keepdims=True))
        z = y * (1.0 / mx.maximum(rms, _RMS_MIN))
    codes = [_nearest(z, form.width, form.level_bits)]
    if form.unit and not form.prod:
        return (packing.pack(codes, form.fields),)
    q = _levels(codes[0], form)
    scales = []
    a: mx.array | float = 1.0 / math.sqrt(form.width)
    if not form.unit:
        best = (y * q).sum(-1, keepdims=True) / mx.square(q).sum(-1, keepdims=True)
        best = mx.where(mx.isfinite(rms), best, mx.nan)
        scales.append(_log_codes(best) if form.log else best.astype(rows.dtype))
        a = scales[0].astype(mx.float32)
    if form.prod:
        u = rotation.rotate(y - a * q, form.seed + 1)
        codes.append((u >= 0).astype(mx.uint8))
        size = mx.abs(u).sum(-1, keepdims=True)
        g = mx.square(u).sum(-1, keepdims=True) / mx.maximum(size, mx.finfo(mx.float32).smallest_normal)
        scales.append(g.astype(mx.float32 if form.unit else rows.dtype))
    return packing.pack(codes, form.fields), mx.concatenate(scales, axis=-1)


def _log_codes(scales: mx.array) -> mx.array:
    """The codes of LOG_SCALES that are nearest, uint8."""
    steps = mx.round(mx.log2(mx.maximum(scales, mx.finfo(mx.float32).smallest_normal)) * _LOG_STEPS) + _LOG_ONE
    codes = mx.where(steps >= 1, mx.minimum(steps, _LOG_OVER), 0)
    return mx.where(mx.isfinite(scales), codes, _LOG_OVER).astype(mx.uint8)


def _nearest(z: mx.array, width: int, bits: int) -> mx.array:
    """The codes of `codebooks.py`, uint8."""
    book = codebook(width, bits)
    size, half = mx.abs(z), 1 << (bits - 1)
    if bits <= COMPARED_BITS_MAX:
        k = mx.zeros(z.shape, mx.uint8)
        for bound in book.boundaries.tolist():
            k = k + (size > bound).view(mx.uint8)
    else:
        bins = mx.minimum((size * BINS_PER_UNIT).astype(mx.uint32), BINS - 1)
        k = _look_up(mx.array(book.base), bins) + (size > _look_up(mx.array(book.bound), bins)).view(mx.uint8)
    return (k + half) ^ ((z < 0).view(mx.uint8) * (2 * half - 1))


def _look_up(table: mx.array, indices: mx.array) -> mx.array:
    """`table[indices]`, at a tenth of what indexing costs on a CPU."""
    return mx.take_along_axis(mx.broadcast_to(table, (*indices.shape[:-1], table.size)), indices, axis=-1)


def _levels(codes: mx.array, form: RowFormat) -> mx.array:
    """Decoded levels of codes, float32 `[..., width]`, in units of 1 / sqrt(width)."""
    return _look_up(mx.array(codebook(form.width, form.level_bits).levels), codes)


def levels_and_signs(words: mx.array, form: RowFormat) -> tuple[mx.array, mx.array | None]:
    """q and, prod, s of packed rows: float32 `[..., width]`."""
    codes = packing.unpack(words, form.fields)
    q = _levels(codes[0], form)
    return q, codes[-1].astype(mx.float32) * 2.0 - 1.0 if form.prod else None


def scales_of(tensors: Sequence[mx.array], form: RowFormat) -> tuple[mx.array | float, mx.array | None]:
    """a and, prod, g of packed rows: float32 `[..., 1]`."""
    if form.log:
        return _look_up(mx.array(LOG_SCALES), tensors[1].astype(mx.uint32)), None
    scales = tensors[1].astype(mx.float32) if form.scales else None
    a = 1.0 / math.sqrt(form.width) if form.unit or scales is None else scales[..., :1]
    return a, scales[..., -1:] if form.prod and scales is not None else None


def decode_rows(tensors: Sequence[mx.array], form: RowFormat) -> mx.array:
    """Packed rows -> float32 `[..., width]`."""
    q, signs = levels_and_signs(tensors[0], form)
    a, g = scales_of(tensors, form)
    y = q * a
    if signs is not None and g is not None:
        y = y + rotation.rotate_back(signs * g, form.seed + 1)
    return rotation.rotate_back(y, form.seed)


def fold_of(recipe: Recipe) -> int:
    """How many heads share a row."""
    return dict(recipe.params).get("fold", 1)


def folded(array: mx.array, fold: int) -> mx.array:
    """[L, H, T, D] -> [L, H / fold, T, fold * D]."""
    if fold == 1:
        return array
    layers, heads, tokens, width = array.shape
    grouped = array.reshape(layers, heads // fold, fold, tokens, width).transpose(0, 1, 3, 2, 4)
    return mx.contiguous(grouped).reshape(layers, heads // fold, tokens, fold * width)


def unfolded(rows: mx.array, fold: int) -> mx.array:
    """The inverse of `folded`."""
    if fold == 1:
        return rows
    layers, heads, tokens, width = rows.shape
    grouped = rows.reshape(layers, heads, tokens, fold, width // fold).transpose(0, 1, 3, 2, 4)
    return mx.contiguous(grouped).reshape(layers, heads * fold, tokens, width // fold)


class TurboQuantCodec:
    """See `codec.Codec`. Widths that are no multiple of 8, or under 16, stay raw."""

    version = 1
    group_tokens = 1

    def __init__(self, name: str) -> None:
        self.name = name

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """The target itself, or RAW."""
        unit = ("unit", 1) in target.params
        fits = _is_rotated(part.width) and not part.bits and (part.dtype == "F32" or not unit)
        if not fits:
            return RAW
        together = dict(target.params).get(_TOGETHER, 0)
        fold = next((n for n in range(FOLD_MAX, 1, -1) if n * part.width == together and part.heads % n == 0), 1)
        params = tuple((key, value) for key, value in target.params if key != _TOGETHER)
        return replace(target, params=(*params, ("fold", fold)) if fold > 1 else params)

    def tensors(self, part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
        """codes, and scales where there are any."""
        fold = fold_of(recipe)
        form = row_format(recipe, part.width * fold)
        if part.bits or (form.unit and part.dtype != "F32") or part.heads % fold:
            raise CorruptDataError(f"recipe {recipe} cannot describe {part}")
        heads = part.heads // fold
        codes = Tensor("codes", "U32", heads, packing.words_of(form.fields))
        dtype = "U8" if form.log else part.dtype
        return (codes, Tensor("scales", dtype, heads, form.scales)) if form.scales else (codes,)

    def fidelity(self, recipe: Recipe) -> int:
        """Hundredths of a bit: 400 for 4 bits."""
        return 100 * recipe.param("bits")

    def encode(self, array: mx.array, recipe: Recipe, context: Context = NO_CONTEXT) -> tuple[mx.array, ...]:
        """[L, H, T, D] -> the tensors."""
        rows = folded(array, fold_of(recipe))
        return encode_rows(rows, row_format(recipe, rows.shape[-1]))

    def trusted(self, tensors: Sequence[mx.array], recipe: Recipe, context: Context = NO_CONTEXT) -> mx.array:
        """No decoded value can leave its dtype: a rotated row is no longer than sqrt(d) times what its scales reach.

        Sums of d such values occur inside the transform, in float32; the width follows from that of the codes.
        """
        if len(tensors) == 1:
            return mx.array(True)
        width = tensors[0].shape[-1] * 32 // recipe.param("bits")
        if tensors[1].dtype == mx.uint8:
            # No dtype is given: stay within the range of the narrowest one.
            codes = tensors[1].astype(mx.uint32)
            reach = _look_up(mx.array(LOG_SCALES), codes) * LEVEL_REACH * math.sqrt(width)
            return mx.all((codes < _LOG_OVER) & (reach <= float(mx.finfo(mx.float16).max)))
        reach = mx.abs(tensors[1].astype(mx.float32)).sum(-1) * LEVEL_REACH * math.sqrt(width)
        inside = float(mx.finfo(mx.float32).max) / width
        return mx.all(reach <= min(float(mx.finfo(tensors[1].dtype).max), inside))

    def decode(
        self, tensors: Sequence[mx.array], recipe: Recipe, part: PartSpec, context: Context = NO_CONTEXT
    ) -> mx.array:
        """The tensors -> [L, H, T, D] in the part's dtype."""
        fold = fold_of(recipe)
        form = row_format(recipe, part.width * fold)
        rows = decode_rows([mx.contiguous(tensor) for tensor in tensors], form).astype(dtype_of(part.dtype))
        return unfolded(rows, fold)


register(TurboQuantCodec(MSE))
register(TurboQuantCodec(PROD))
