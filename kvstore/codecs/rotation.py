"""Random rotations of rows: every coordinate of a rotated row is nearly normal, whatever the row was.

Everything derives from (width, seed) by SHAKE-256 and IEEE additions, multiplications, divisions and square roots,
never from the state of a library's generator or a LAPACK: the same rotation on every machine, for ever.

stream(tag, seed)  SHAKE-256 of the ASCII text "kvstore <tag> <seed>", as many bytes as are asked for
signs              bit i of stream "signs <pass> <width>", least significant bit of a byte first: 1 is -1.0, 0 is +1.0

hadamard  Let m be the largest power of two <= width. A pass multiplies all coordinates by its signs, then replaces m of
          them by their Walsh-Hadamard transform (natural order, divided by sqrt(m)): the first m in passes 0 and 2, the
          last m in pass 1. One pass where the width is m, else three. Rejected: a block of m and smaller ones for the
          rest (at widths 96 and 576, rows whose last fifth is 5 times the rest then have 1.7 times the error of a dense
          random rotation); two passes (1.15 times at 96); MLX's transforms for 12 * 2^k: there is none for 576.
"""

from __future__ import annotations

import functools
import hashlib

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# Widths that mx.hadamard_transform supports in float32 on every device.
WIDTH_ROTATED_MAX = 8192

Floats = npt.NDArray[np.float32]


def stream(tag: str, seed: int, n_bytes: int) -> bytes:
    """`n_bytes` of the deterministic stream."""
    return hashlib.shake_256(f"kvstore {tag} {seed}".encode()).digest(n_bytes)


@functools.lru_cache(maxsize=256)
def signs(width: int, seed: int, number: int) -> Floats:
    """The signs of one pass, +1.0 or -1.0."""
    packed = np.frombuffer(stream(f"signs {number} {width}", seed, -(-width // 8)), np.uint8)
    bits = np.unpackbits(packed, bitorder="little")[:width]
    return (1.0 - 2.0 * bits).astype(np.float32)


def passes(width: int) -> tuple[tuple[int, int], ...]:
    """First and last coordinate (exclusive) of the transform of each pass."""
    m = 1 << (width.bit_length() - 1)
    return ((0, m),) if m == width else ((0, m), (width - m, width), (0, m))


def rotate(rows: mx.array, seed: int) -> mx.array:
    """float32 `[..., width]` -> the rotated rows, lazy."""
    width = rows.shape[-1]
    for number, (first, last) in enumerate(passes(width)):
        rows = _transform(rows * mx.array(signs(width, seed, number)), first, last)
    return rows


def rotate_back(rows: mx.array, seed: int) -> mx.array:
    """The inverse of `rotate`, up to rounding."""
    width = rows.shape[-1]
    for number, (first, last) in reversed([*enumerate(passes(width))]):
        rows = _transform(rows, first, last) * mx.array(signs(width, seed, number))
    return rows


def _transform(rows: mx.array, first: int, last: int) -> mx.array:
    """The Walsh-Hadamard transform of some coordinates. In float32: 6 times the speed of float16 on a CPU."""
    if not rows.size:
        return rows  # MLX refuses to transform nothing
    if last - first == rows.shape[-1]:
        return mx.hadamard_transform(rows)
    middle = mx.hadamard_transform(mx.contiguous(rows[..., first:last]))
    return mx.concatenate([rows[..., :first], middle, rows[..., last:]], axis=-1)
