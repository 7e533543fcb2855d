"""A codec that needs a basis, for tests only: every value is XORed with bytes of a file. Exact, so easy to tell.

Importing this module registers it, under the profile words `shift1` and `shift2`: two bases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import mlx.core as mx

from kvstore.codecs import profiles
from kvstore.codecs.codec import NO_CONTEXT, Context, register
from kvstore.codecs.device import dtype_of
from kvstore.core.blocks import ITEM_BYTES, Recipe, Tensor
from kvstore.core.layers import PartSpec
from kvstore.errors import AuxMissingError
from tests.support.aux_blocks import basis_of

SHIFT_BASES = {number: basis_of(number, 3 << 20) for number in (1, 2)}
DIGESTS = {number: hashlib.sha256(data).digest() for number, data in SHIFT_BASES.items()}
WORDS_OF = {2: mx.uint16, 4: mx.uint32}


class ShiftCodec:
    """See `kvstore.codecs.codec.Codec`."""

    name = "shift"
    version = 1
    group_tokens = 1

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """Fits everything."""
        return target

    def tensors(self, part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
        """One of words."""
        size = ITEM_BYTES[part.dtype]
        return (Tensor("data", {2: "U16", 4: "U32"}[size], part.heads, part.width),)

    def fidelity(self, recipe: Recipe) -> int:
        """Below exact, so that profiles use it."""
        return 1500

    def _shift(self, words: mx.array, recipe: Recipe, context: Context) -> mx.array:
        (digest,) = recipe.references
        if digest not in context.aux:
            raise AuxMissingError(digest)
        return words ^ mx.array(int.from_bytes(context.aux[digest][1:3], "little") & 0x7F, words.dtype)

    def encode(self, array: mx.array, recipe: Recipe, context: Context = NO_CONTEXT) -> tuple[mx.array, ...]:
        """Words, shifted."""
        return (self._shift(array.view(WORDS_OF[array.dtype.size]), recipe, context),)

    def trusted(self, tensors: Sequence[mx.array], recipe: Recipe, context: Context = NO_CONTEXT) -> mx.array:
        """Always."""
        return mx.array(True)

    def decode(
        self, tensors: Sequence[mx.array], recipe: Recipe, part: PartSpec, context: Context = NO_CONTEXT
    ) -> mx.array:
        """Shifted back."""
        return self._shift(tensors[0], recipe, context).view(dtype_of(part.dtype))


def _word(bits: str, group: str) -> Recipe | None:
    return Recipe("shift", 1, (), (DIGESTS[int(bits)],)) if not group and bits in ("1", "2") else None


register(ShiftCodec())
profiles.WORDS["shift"] = _word
