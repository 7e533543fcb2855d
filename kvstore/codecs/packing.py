"""Codes of 1 to 8 bits <-> little-endian bit strings in 32-bit words, as MLX packs its own.

Code i of a row takes bits [i * bits, (i + 1) * bits) of the row's bit string; bit k of the string is bit k % 32 of word
k // 32. A row may be several *fields* one after the other, each of a multiple of 8 codes of one width and so of whole
bytes; after the last, zero bits fill the last word.

Eight codes are packed at once in one wider integer: shifts of whole words, where summing shifted codes along an axis
costs 4 times as much on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Fields = tuple[tuple[int, int], ...]
CODES_TOGETHER = 8
_WORD_BYTES = 4
_WIDE_BYTES = 8
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def words_of(fields: Fields) -> int:
    """32-bit words of a row; `fields`: (codes, bits) in order."""
    return -(-sum(codes * bits for codes, bits in fields) // 32)


def pack(codes: Sequence[mx.array], fields: Fields) -> mx.array:
    """One uint8 `[..., codes]` array a field -> uint32 `[..., words]`, lazy."""
    rows = [_pack_field(array, bits) for array, (_, bits) in zip(codes, fields, strict=True)]
    missing = words_of(fields) * _WORD_BYTES - sum(row.shape[-1] for row in rows)
    if missing:
        rows.append(mx.zeros((*rows[0].shape[:-1], missing), mx.uint8))
    joined = rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=-1)
    return joined.view(mx.uint32)


def _pack_field(codes: mx.array, bits: int) -> mx.array:
    """uint8 `[..., n]` -> uint8 `[..., n * bits / 8]`. Neighbours are merged three times: 2, 4, then 8 codes."""
    if bits == CODES_TOGETHER:
        return codes
    packed = codes
    for together in (2, 4, 8):
        half = 4 * together
        width = bits * together // 2
        low = (1 << width) - 1
        wide = packed.view(_UNSIGNED[together])
        packed = (wide & low) | ((wide >> (half - width)) & (low << width))
        if width * 2 == half:  # the upper half is empty: half the integer holds everything
            return packed.astype(_UNSIGNED[together // 2]).view(mx.uint8)
    if bits in _UNSIGNED:
        return packed.astype(_UNSIGNED[bits]).view(mx.uint8)
    *rows, n = codes.shape
    octets = packed.view(mx.uint8).reshape(*rows, n // CODES_TOGETHER, _WIDE_BYTES)
    return octets[..., :bits].reshape(*rows, n * bits // CODES_TOGETHER)


def unpack(words: mx.array, fields: Fields) -> list[mx.array]:
    """uint32 `[..., words]` -> one uint32 array `[..., codes]` a field, lazy."""
    codes, at = [], 0
    for n, bits in fields:
        whole = at % 32 == 0 and 32 % bits == 0
        codes.append(_unpack_words(words[..., at // 32 :], n, bits) if whole else _unpack_at(words, at, n, bits))
        at += n * bits
    return codes


def _unpack_words(words: mx.array, n: int, bits: int) -> mx.array:
    """Unpack codes whose width divides the word size, so that no code crosses a word boundary."""
    if bits == CODES_TOGETHER:
        return mx.contiguous(words).view(mx.uint8)[..., :n].astype(mx.uint32)
    words = words[..., : -(-n * bits // 32)]
    codes = (words[..., None] >> mx.arange(0, 32, bits, dtype=mx.uint32)) & ((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits)[..., :n]


def _unpack_at(words: mx.array, at: int, n: int, bits: int) -> mx.array:
    """Codes from bit `at` of the row: each is cut out of its word and the next."""
    first = at + bits * np.arange(n, dtype=np.uint32)
    shift = mx.array(first % 32)
    shape = (*words.shape[:-1], n)
    low = _columns(words, first // 32, shape) >> shift
    high = _columns(words, np.minimum(first // 32 + 1, words.shape[-1] - 1), shape)
    return (low | (high << 1 << (31 - shift))) & ((1 << bits) - 1)


def _columns(words: mx.array, columns: npt.NDArray[np.uint32], shape: tuple[int, ...]) -> mx.array:
    """Select columns: `words[..., columns]`, in a tenth of the time that indexing takes on a CPU."""
    return mx.take_along_axis(words, mx.broadcast_to(mx.array(columns), shape), axis=-1)
