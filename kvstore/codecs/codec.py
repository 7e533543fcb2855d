"""The codec protocols, the table from recipe to codec, and the error for damaged stored bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import mlx.core as mx
import xxhash

from kvstore.codecs.device import Bytes
from kvstore.core.blocks import RAW, Recipe, Run, Tensor
from kvstore.core.layers import PartSpec
from kvstore.errors import CorruptDataError, UnknownFormatError


@dataclass(frozen=True, slots=True)
class Context:
    """What a codec may need to know of arrays beyond their geometry. Most codecs need nothing.

    `first_token`: position in the sequence of the first token of the arrays, hidden ones too; the others follow.
    `part` ("keys" or "values") and `layers`, by index in the layout: which the arrays are, in their order.
    `aux`: digest -> bytes of the files that recipes refer to (`Recipe.references`), checked against the digest by
    the code that loaded them. `spare_tokens`: number of rows at the end that are head-room, zeros that decode to zeros.
    Immutable; any thread.
    """

    first_token: int = 0
    part: str = ""
    layers: tuple[int, ...] = ()
    aux: Mapping[bytes, bytes] = field(default_factory=lambda: MappingProxyType({}))
    spare_tokens: int = 0


NO_CONTEXT = Context()


class Codec(Protocol):
    """Arrays `[L, H, T, D]` of one part <-> tensors `[L, H', T / group_tokens, X]`, a row for each group of tokens.

    `encode` and `decode` build lazy MLX graphs on the calling thread, which then owns the result; the rest is pure.
    Encoding a slice of tokens must give, bit for bit, the slice of the encoded tokens, for slices at multiples of
    `group_tokens`; it is 1 in codecs that are exact at any token. Others encode whole groups only, and a cut inside
    one keeps it whole and hides rows.
    `name` and `version` name the byte format for ever: another format is another version.
    """

    name: str
    version: int
    group_tokens: int

    def fit(self, target: Recipe, part: PartSpec) -> Recipe:
        """The recipe for a part of this geometry that comes nearest to `target`, or RAW when there is none."""

    def tensors(self, part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
        """Names, dtypes, heads and widths of what `encode` returns. CorruptDataError if the recipe cannot be."""

    def fidelity(self, recipe: Recipe) -> int:
        """Rank of what comes back: FIDELITY_EXACT, or hundredths of a bit per value."""

    def encode(self, array: mx.array, recipe: Recipe, context: Context = NO_CONTEXT) -> tuple[mx.array, ...]:
        """Tensors of a finite array. AuxMissingError when `context` lacks a file that the recipe refers to."""

    def trusted(self, tensors: Sequence[mx.array], recipe: Recipe, context: Context = NO_CONTEXT) -> mx.array:
        """A lazy boolean scalar: whether all decoded values are finite. If False, the values stay raw."""

    def decode(
        self, tensors: Sequence[mx.array], recipe: Recipe, part: PartSpec, context: Context = NO_CONTEXT
    ) -> mx.array:
        """The array in the part's dtype. Tensors must be row-contiguous: see `affine`.

        AuxMissingError when `context` lacks a file that the recipe refers to.
        """


@runtime_checkable
class ByteCodec(Protocol):
    """A codec that compresses bytes: it packs each layer's bytes of each tensor separately, without loss.

    A ByteCodec must also be a `Codec`: its tensors are those of `unpacked(recipe)`. All methods are pure; any thread
    may call them.
    """

    def unpacked(self, recipe: Recipe) -> Recipe:
        """The recipe of tensors that were unpacked: RAW for a codec that only packs; else what decodes them."""

    def pack(self, share: Bytes, item_bytes: int) -> bytes:
        """At most `packed_bytes_max` bytes for a share `[heads, rows, row_bytes]` of elements of `item_bytes`.

        C-contiguous.
        """

    def unpack(self, packed: memoryview, shape: tuple[int, int, int], item_bytes: int) -> Bytes:
        """The share of that shape that was packed, C-contiguous. CorruptDataError when it is anything else."""


_CODECS: dict[tuple[str, int], Codec] = {}
# Apart, since asking a codec whether it is one of these takes 10 us, and a fetch asks for every run of every layer.
_PACKERS: dict[tuple[str, int], ByteCodec] = {}


def register(codec: Codec) -> None:
    """Register `codec` for recipes of this name and version. Each codec module does this once, when it is imported."""
    assert (codec.name, codec.version) not in _CODECS
    _CODECS[codec.name, codec.version] = codec
    if isinstance(codec, ByteCodec):
        _PACKERS[codec.name, codec.version] = codec


def codecs() -> tuple[Codec, ...]:
    """All codecs of this build."""
    return tuple(_CODECS.values())


def codec_of(recipe: Recipe) -> Codec:
    """The codec that reads and writes this recipe; UnknownFormatError when this build has none."""
    codec = _CODECS.get((recipe.name, recipe.version))
    if codec is None:
        raise UnknownFormatError(f"this kvstore cannot read recipe {recipe.name} version {recipe.version}")
    return codec


@functools.lru_cache(256)
def tensors_of(part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
    """The tensors that a recipe gives for a part. CorruptDataError if it does not fit the part."""
    return codec_of(recipe).tensors(part, recipe)


def packer_of(recipe: Recipe) -> ByteCodec | None:
    """The codec that packed the bytes of this recipe; None where they are as arrays have them."""
    codec_of(recipe)
    return _PACKERS.get((recipe.name, recipe.version))


def is_packing(recipe: Recipe) -> bool:
    """Whether the recipe is one of a codec that only packs raw tensors: exact, and applied when they are written."""
    packer = packer_of(recipe)
    return packer is not None and packer.unpacked(recipe) == RAW


def unpacked(recipe: Recipe) -> Recipe:
    """The recipe of the tensors once a byte codec has unpacked them; the same for all other codecs."""
    packer = packer_of(recipe)
    return recipe if packer is None else packer.unpacked(recipe)


def check_runs(runs: Iterable[Run]) -> None:
    """UnknownFormatError unless this build can read every recipe; CorruptDataError for one that lacks a parameter."""
    for recipe in {stack.recipe for run in runs for stack in run.stacks}:
        codec_of(recipe).fidelity(recipe)


class BlockCorruptError(CorruptDataError):
    """Stored bytes of one block of a plan are damaged or gone; `source` is its number in the plan."""

    def __init__(self, message: str, source: int) -> None:
        super().__init__(message)
        self.source = source


def verify_range(views: Iterable[memoryview], checksum: int | None, source: int) -> None:
    """BlockCorruptError unless the xxh3_64 over all views is `checksum`; None means that none was recorded."""
    if checksum is None:
        return
    digest = xxhash.xxh3_64()
    for view in views:
        digest.update(view)
    if digest.intdigest() != checksum:
        raise BlockCorruptError(f"stored bytes of block {source} do not match their checksum", source)
