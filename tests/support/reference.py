"""The byte formats of channel, turboquant and turboquant-even again, in numpy, without MLX or the codecs' own code.

Only the codebooks are taken from the codecs; golden values hold those.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from kvstore.codecs.codebooks import codebook
from kvstore.core.blocks import Recipe

Array = np.ndarray[Any, Any]


def bfloat16(array: Array) -> Array:
    """float32 rounded to bfloat16, ties to even, as float32."""
    words = array.astype(np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


ROUND = {"BF16": bfloat16, "F16": lambda a: a.astype(np.float16).astype(np.float32), "F32": lambda a: a}


def signs(width: int, seed: int, number: int) -> Array:
    """+1 and -1 from the stream of one pass."""
    text = f"kvstore signs {number} {width} {seed}"
    stream = hashlib.shake_256(text.encode()).digest((width + 7) // 8)
    bits = [stream[i // 8] >> (i % 8) & 1 for i in range(width)]
    return np.array([-1.0 if bit else 1.0 for bit in bits], np.float32)


def walsh(rows: Array) -> Array:
    """The Walsh-Hadamard transform in natural order, by butterflies of growing span, over sqrt(m)."""
    m = rows.shape[-1]
    rows, span = rows.copy(), 1
    while span < m:
        pairs = rows.reshape(*rows.shape[:-1], m // (2 * span), 2, span)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        rows = np.stack([a + b, a - b], axis=-2).reshape(*rows.shape)
        span *= 2
    return rows * np.float32(1.0 / math.sqrt(m))


def spans(width: int) -> list[tuple[int, int]]:
    """What each pass transforms."""
    m = 2 ** int(math.log2(width))
    return [(0, m)] if m == width else [(0, m), (width - m, width), (0, m)]


def rotate(rows: Array, seed: int, back: bool = False) -> Array:
    """The Hadamard rotation or its inverse."""
    rows = rows.astype(np.float32)
    passes = list(enumerate(spans(rows.shape[-1])))
    for number, (first, last) in reversed(passes) if back else passes:
        factor = signs(rows.shape[-1], seed, number)
        rows = rows if back else rows * factor
        rows = np.concatenate([rows[..., :first], walsh(rows[..., first:last]), rows[..., last:]], axis=-1)
        rows = rows * factor if back else rows
    return rows


def bit_string(codes: Array, bits: int) -> Array:
    """`[..., n]` -> `[..., n * bits]`, the lowest bit of each code first."""
    split = (codes[..., None].astype(np.int64) >> np.arange(bits)) & 1
    return split.reshape(*codes.shape[:-1], codes.shape[-1] * bits)


def words(fields: list[tuple[Array, int]]) -> Array:
    """Codes of each field, one after the other -> uint32 words."""
    string = np.concatenate([bit_string(codes, bits) for codes, bits in fields], axis=-1)
    missing = -string.shape[-1] % 32
    string = np.concatenate([string, np.zeros((*string.shape[:-1], missing), np.int64)], axis=-1)
    return (string.reshape(*string.shape[:-1], string.shape[-1] // 32, 32) << np.arange(32)).sum(-1).astype(np.uint32)


def codes_of(packed: Array, fields: list[tuple[int, int]]) -> list[Array]:
    """uint32 words -> the codes of each field of (codes, bits)."""
    string = (packed[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    string = string.reshape(*packed.shape[:-1], packed.shape[-1] * 32)
    out, at = [], 0
    for n, bits in fields:
        field = string[..., at : at + n * bits].reshape(*packed.shape[:-1], n, bits)
        out.append((field << np.arange(bits)).sum(-1))
        at += n * bits
    return out


class Channel:
    """channel, version 1."""

    def __init__(self, recipe: Recipe, dtype: str) -> None:
        self.bits, self.round = recipe.param("bits"), ROUND[dtype]

    def encode(self, rows: Array) -> tuple[Array, Array, Array, Array]:
        """float32 `[..., T, D]` -> codes `[..., T / 64, D, 64]`, scales, biases, distance from a boundary."""
        groups = rows.reshape(*rows.shape[:-2], -1, 64, rows.shape[-1]).swapaxes(-1, -2)
        biases, last = groups.min(-1), np.float32(2**self.bits - 1)
        scales = self.round((groups.max(-1) - biases) / last)
        steps = np.where(scales > 0, scales, np.float32(np.inf))[..., None]
        levels = (groups - biases[..., None]) / steps + np.float32(0.5)
        return np.clip(np.floor(levels), 0, last), scales, biases, np.abs(levels - np.round(levels))

    def decode(self, codes: Array, scales: Array, biases: Array) -> Array:
        """float32 `[..., T, D]`, rounded to the dtype."""
        values = codes.astype(np.float32) * scales[..., None] + biases[..., None]
        values = self.round(values.astype(np.float32)).swapaxes(-1, -2)
        return values.reshape(*values.shape[:-3], -1, values.shape[-1])


def log_codes(scales: Array) -> Array:
    """Scales as the nearest of twelve steps an octave around 2^0 = 128, in one byte; 0 is zero."""
    with np.errstate(divide="ignore"):
        steps = np.round(np.log2(scales.astype(np.float64)) * 12) + 128
    return np.where(steps >= 1, np.minimum(steps, 255), 0).astype(np.uint8)


class TurboQuant:
    """turboquant-mse and turboquant-prod for rows of one width."""

    def __init__(self, recipe: Recipe, width: int, dtype: str) -> None:
        values = {"seed": 0, "unit": 0, "log": 0, **dict(recipe.params)}
        self.log = values["log"]
        self.prod = recipe.name == "turboquant-prod"
        self.width, self.seed = width, values["seed"]
        self.unit, self.round = values["unit"], ROUND[dtype]
        self.bits = values["bits"] - self.prod
        self.fields = [(width, self.bits), (width, 1)] if self.prod else [(width, self.bits)]

    def turn(self, rows: Array, residual: int = 0, back: bool = False) -> Array:
        """R, R' or their inverses."""
        return rotate(rows, self.seed + residual, back)

    def nearest(self, z: Array) -> tuple[Array, Array, Array]:
        """(codes, their levels, distance of each value to the nearest boundary)."""
        levels = codebook(self.width, self.bits).levels
        bounds, half = (levels[1:] + levels[:-1]) / 2, len(levels) // 2
        k = np.searchsorted(bounds[half:], np.abs(z), side="left")
        codes = np.where(z < 0, half - 1 - k, half + k)
        return codes, levels[codes], np.abs(z[..., None] - bounds).min(-1)

    def encode(self, rows: Array) -> tuple[list[Array], Array]:
        """(tensors, how far each coded value is from the nearest boundary, in sizes of its row: levels, then signs)."""
        y = self.turn(rows)
        scale = np.sqrt(np.float32(self.width))
        if not self.unit:
            rms = np.sqrt(np.mean(y * y, -1, keepdims=True, dtype=np.float32))
            scale = np.float32(1.0) / np.maximum(rms, np.float32(2.0**-62))
        codes, q, gaps = self.nearest(y * scale)
        fields = [(codes, self.bits)]
        a: Array = np.full((*rows.shape[:-1], 1), 1 / math.sqrt(self.width), np.float32)
        scales = []
        if not self.unit:
            a = (y * q).sum(-1, keepdims=True) / (q * q).sum(-1, keepdims=True)
            a = log_codes(a) if self.log else self.round(a)
            scales.append(a)
        if self.prod:
            u = self.turn(y - a * q, 1)
            fields.append((u >= 0, 1))
            size = np.abs(u).sum(-1, keepdims=True)
            g = np.divide((u * u).sum(-1, keepdims=True), size, out=np.zeros_like(size), where=size > 0)
            scales.append(g if self.unit else self.round(g))
            gaps = np.concatenate([gaps, np.abs(u) * scale], -1)
        tensors = [words(fields)] + ([np.concatenate(scales, -1)] if scales else [])
        return tensors, gaps

    def decode(self, tensors: list[Array]) -> Array:
        """float32 rows; `tensors`: uint32 words, float32 scales."""
        codes = codes_of(tensors[0], self.fields)
        q = codebook(self.width, self.bits).levels[codes[0]]
        scales = tensors[1][..., :1] if len(tensors) > 1 else np.float32(1 / math.sqrt(self.width))
        if self.log:
            scales = np.where(scales > 0, np.exp2((scales.astype(np.float64) - 128) / 12), 0).astype(np.float32)
        y = q * (np.float32(1 / math.sqrt(self.width)) if self.unit else scales)
        if self.prod:
            y = y + self.turn((2.0 * codes[-1] - 1.0).astype(np.float32) * tensors[1][..., -1:], 1, back=True)
        return self.turn(y, back=True)


class TurboQuantEven:
    """turboquant-even for rows of one width, folded already."""

    def __init__(self, recipe: Recipe, width: int, dtype: str) -> None:
        inner = tuple(one for one in recipe.params if one[0] != "group")
        self.rows, self.width = TurboQuant(Recipe("turboquant-mse", 1, inner), width, dtype), width

    def encode(self, rows: Array) -> tuple[list[Array], Array]:
        """float32 `[..., T, D]` -> codes, scales, shifts `[..., T / 64, D / 8]`; distance from a boundary."""
        groups = rows.reshape(*rows.shape[:-2], -1, 64, self.width)
        # Exponents as those of normal float32 numbers, and the next lower one for all that are smaller.
        exponents = np.maximum(np.where(groups.any(-2), np.frexp(np.abs(groups).max(-2))[1], -126), -126)
        shifts = np.minimum(exponents.max(-1, keepdims=True) - exponents, 15)
        even = (groups.astype(np.float64) * 2.0 ** shifts[..., None, :]).astype(np.float32).reshape(rows.shape)
        tensors, gaps = self.rows.encode(even)
        return [*tensors, words([(shifts, 4)])], gaps

    def decode(self, tensors: list[Array]) -> Array:
        """float32 `[..., T, D]`."""
        (shifts,) = codes_of(tensors[2], [(self.width, 4)])
        return self.rows.decode(tensors[:2]) / np.repeat(2.0**shifts, 64, axis=-2).astype(np.float32)
