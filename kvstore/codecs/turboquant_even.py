"""TurboQuant after the channels of a row were brought to one size, for values with a few large channels.

A rotation spreads the error of a row evenly over its channels. Some models have a few value channels that are much
larger than the others, and weights that read them less. The small channels then get an error of the size of the large
ones. So each channel is multiplied by a power of two, chosen for 64 tokens together, before rows are rotated, and
divided by it after decoding. The error of a channel is then in proportion to that channel.

A group is whole or is not encoded: see `encode.py` for what becomes of the tokens at the end.

Format, version 1. Parameters: those of turboquant-mse, and group, the tokens of one, always 64.
tensors         codes, scales   those of turboquant-mse for the multiplied rows; unit=1 is not possible
                shifts  U32 [width / 8], a row for each 64 tokens of a row: 4 bits a channel (`packing.py`)
encode          e of a channel: the exponent field of its largest absolute value over the 64 tokens, as float32. E: the
                largest e of all channels. shift = min(E - e, 15). A value is multiplied by 2^shift, and stays what its
                dtype can say, since it is then less than 2^(E + 1).
decode          the decoded row times 2^-shift in float32, then the part's dtype

Shifts come from bits of floating-point numbers, so they are exact and equal on every device. Rejected: codes per
channel as for keys. They do as well on the small model, but one token with large values then costs the 63 others.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kvstore.codecs import packing
from kvstore.codecs.codec import NO_CONTEXT, Context, codec_of, register
from kvstore.codecs.device import dtype_of
from kvstore.codecs.per_channel import GROUP_TOKENS
from kvstore.codecs.turboquant import (
    MSE,
    decode_rows,
    encode_rows,
    fold_of,
    folded,
    row_format,
    turboquant_mse_recipe,
    unfolded,
)
from kvstore.core.blocks import RAW, Recipe, Tensor
from kvstore.core.layers import PartSpec
from kvstore.errors import CorruptDataError

EVEN = "turboquant-even"
SHIFT_BITS = 4
SHIFT_MAX = (1 << SHIFT_BITS) - 1
# Up to here a scale in 8 bits, 3 % off at most, is well below the error of the codes.
LOG_BITS_MAX = 4
_MANTISSA_BITS = 23
_EXPONENT_ONE = 127


def turboquant_even_recipe(bits: int, *, together: int = 0) -> Recipe:
    """1 to 8 bits a value. `together`: heads narrower than this share a scale."""
    return _outer(turboquant_mse_recipe(bits, log=bits <= LOG_BITS_MAX, together=together))


def _outer(inner: Recipe) -> Recipe:
    return Recipe(EVEN, 1, (*inner.params, ("group", GROUP_TOKENS)))


def _inner(recipe: Recipe) -> Recipe:
    """The recipe of the multiplied rows. CorruptDataError for another group."""
    params = dict(recipe.params)
    if params.pop("group", 0) != GROUP_TOKENS or params.get("unit"):
        raise CorruptDataError(f"recipe {recipe} cannot be")
    return Recipe(MSE, 1, tuple(params.items()))


class TurboQuantEvenCodec:
    """See `codec.Codec`. Fits where turboquant-mse does."""

    name = EVEN
    version = 1
    group_tokens = GROUP_TOKENS

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """The target with as many heads in a row as it asks for, or RAW."""
        inner = _inner(target)
        fitted = codec_of(inner).fit(inner, part)
        return RAW if fitted == RAW else _outer(fitted)

    def tensors(self, part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
        """codes and scales for each token, shifts for each 64."""
        inner = _inner(recipe)
        codes, scales = codec_of(inner).tensors(part, inner)
        words = packing.words_of(_fields(part.width * fold_of(recipe)))
        return codes, scales, Tensor("shifts", "U32", codes.heads, words, group_tokens=GROUP_TOKENS)

    def fidelity(self, recipe: Recipe) -> int:
        """Hundredths of a bit: 400 for 4 bits."""
        return 100 * recipe.param("bits")

    def encode(self, array: mx.array, recipe: Recipe, context: Context = NO_CONTEXT) -> tuple[mx.array, ...]:
        """[L, H, T, D], T whole groups -> codes, scales, shifts."""
        rows = folded(array, fold_of(recipe))
        groups = _grouped(rows.astype(mx.float32))
        exponents = mx.abs(groups).max(3).view(mx.uint32) >> _MANTISSA_BITS
        shifts = mx.minimum(exponents.max(-1, keepdims=True) - exponents, SHIFT_MAX)
        even = (groups * _power(shifts)).reshape(rows.shape).astype(array.dtype)
        encoded = encode_rows(even, row_format(_inner(recipe), rows.shape[-1]))
        return (*encoded, packing.pack([shifts.astype(mx.uint8)], _fields(rows.shape[-1])))

    def trusted(self, tensors: Sequence[mx.array], recipe: Recipe, context: Context = NO_CONTEXT) -> mx.array:
        """Same check as for the multiplied rows, whose values are not smaller than the decoded ones."""
        inner = _inner(recipe)
        return codec_of(inner).trusted(tensors[:2], inner)

    def decode(
        self, tensors: Sequence[mx.array], recipe: Recipe, part: PartSpec, context: Context = NO_CONTEXT
    ) -> mx.array:
        """codes, scales, shifts -> [L, H, T, D] in the part's dtype."""
        fold = fold_of(recipe)
        width = part.width * fold
        codes, scales, shifts = (mx.contiguous(tensor) for tensor in tensors)
        rows = decode_rows((codes, scales), row_format(_inner(recipe), width))
        down = 1.0 / _power(packing.unpack(shifts, _fields(width))[0])
        back = (_grouped(rows) * down).reshape(rows.shape).astype(dtype_of(part.dtype))
        return unfolded(back, fold)


def _fields(width: int) -> packing.Fields:
    return ((width, SHIFT_BITS),)


def _grouped(rows: mx.array) -> mx.array:
    """[L, H, T, D] -> [L, H, T / 64, 64, D]."""
    layers, heads, tokens, width = rows.shape
    return rows.reshape(layers, heads, tokens // GROUP_TOKENS, GROUP_TOKENS, width)


def _power(shifts: mx.array) -> mx.array:
    """2^shift for all tokens of a group: exact float32 `[L, H, T / 64, 1, D]`, made of its bits."""
    return ((shifts + _EXPONENT_ONE) << _MANTISSA_BITS).view(mx.float32)[..., None, :]


register(TurboQuantEvenCodec())
