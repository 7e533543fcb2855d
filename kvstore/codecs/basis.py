"""The basis of the codec `pca`: what one calibration makes of a model, as a file that recipes name by its digest.

Of a layer's keys, and of its values, all heads of a token are one row, cut into equal groups of up to 256 channels: see
`group_width`. A group has a matrix of its own. Everything that decides a decoded value is exact or a single rounding of
IEEE arithmetic, so that one row or a thousand, on any machine, give equal values:

rows            y = C B, where C are codes and B the matrix, whole numbers of 12 bits: float32 holds every partial sum,
                in any order, while |C| |B| of a row is under 2^24. A row that is not is not trusted, and stays raw
channels        x = y * (scale * step) + mean: a product, then an addition in float32, never a fused one
rotation        of keys: see `rope.py`

file            magic; u16 points, u16 parts; then for each part: HEAD, and its arrays, all little-endian: f32 steps
                [points], i16 matrix [groups, width, width] (component, channel; |m| <= 2047), f32 scale [channels],
                f32 mean [channels], f64 frequencies [pairs]
HEAD            u16 layer, u8 part (0 keys, 1 values), u8 halves, u16 heads, u16 head width, u16 pairs, f32 factor
"""

from __future__ import annotations

import functools
import hashlib
import struct
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.code_packing import Codes
from kvstore.codecs.rope import Rope
from kvstore.core.bounded import Bounded
from kvstore.core.layers import PARTS
from kvstore.errors import CorruptDataError

Floats = npt.NDArray[np.float32]
Key = tuple[int, str]

MAGIC = b"kvstore pca basis 1\n"
GROUP_WIDTH_MAX = 256  # wider: 24 bits of float32 hold too few sums
GROUP_WIDTH_MIN = 16
BASIS_MAX = (1 << 11) - 1
ESCAPED_MAX = (1 << 15) - 1
EXACT_BELOW = float(1 << 24)
POINTS_MAX = 16
# Values at a time: intermediates stay in the processor's cache.
_SPAN_VALUES = 1 << 16
# Rows of one product, padded to as many: sums may depend on how many rows it has. OpenBLAS multiplies what is so small
# on the calling thread; with its helpers a product took up to 20 times as long on a busy machine. Apple's library has
# no such threads, and is better with many rows.
_PRODUCT = 1 << 18
_ROWS_APPLE = 256
_COUNTS = struct.Struct("<HH")
_HEAD = struct.Struct("<HBBHHHf")


def group_width(heads: int, width: int) -> int:
    """Channels of a group: as many whole heads as go into 256, or an equal part of one head; 0 where nothing divides.

    Part of the format, so it must not change.
    """
    if width <= GROUP_WIDTH_MAX:
        return width * max(n for n in range(1, heads + 1) if heads % n == 0 and n * width <= GROUP_WIDTH_MAX)
    parts = next(n for n in range(2, width + 1) if width % n == 0 and width // n <= GROUP_WIDTH_MAX)
    return width // parts if width // parts >= GROUP_WIDTH_MIN else 0


@dataclass(frozen=True, eq=False)
class PartBasis:
    """The basis of the keys or the values of one layer. Arrays as in the file; none may be written to."""

    heads: int
    width: int
    matrix: npt.NDArray[np.int16]
    scale: Floats
    mean: Floats
    steps: Floats
    rope: Rope | None = None

    @functools.cached_property
    def _integers(self) -> Floats:
        """The matrices as float32."""
        return self.matrix.astype(np.float32)

    @functools.cached_property
    def inverse(self) -> npt.NDArray[np.float64]:
        """Rows to components: the inverses of what decodes with a step of 1, `[groups, channel, component]`."""
        groups, width, _ = self.matrix.shape
        inverse: npt.NDArray[np.float64] = np.linalg.inv(
            self.matrix * self.scale.reshape(groups, 1, width).astype("f8")
        )
        return inverse

    @functools.cached_property
    def _forwards(self) -> _Forwards:
        return _Forwards(self)

    def encode(self, rows: Floats, point: int, start: int) -> Codes | None:
        """float32 `[tokens, heads, width]`, finite, the first at position `start` -> `[groups, tokens, components]`.

        Writes to `rows`. None when a code does not fit into 16 bits.
        """
        (tokens, channels), (groups, components, _) = (len(rows), self.mean.size), self.matrix.shape
        codes = np.empty((groups, tokens, components), np.int16)
        forward, rows_each = self._forwards[point], _rows_of_product(components)
        span_tokens = _span_tokens(channels)
        flat, found = np.zeros((span_tokens, channels), np.float32), np.empty((span_tokens, components), np.float32)
        for at in range(0, tokens, span_tokens):
            span = rows[at : at + span_tokens]
            count = len(span)
            if self.rope is not None:
                self.rope.apply(span, start + at, back=True)
            np.subtract(span.reshape(count, -1), self.mean, out=flat[:count])
            for group in range(groups):
                columns = slice(group * components, (group + 1) * components)
                _multiply(flat[:, columns], forward[group], found, -(-count // rows_each) * rows_each)
                coded = np.rint(found[:count], out=found[:count])
                if max(coded.max(), -coded.min()) > ESCAPED_MAX:
                    return None
                codes[group, at : at + count] = coded
        return codes

    def is_exact(self, codes: Codes) -> bool:
        """Whether float32 holds every sum that decoding these codes makes, `[groups, tokens, components]`."""
        largest = max(int(codes.max(initial=0)), -int(codes.min(initial=0)))
        if largest * BASIS_MAX * codes.shape[-1] < EXACT_BELOW:
            return True
        sizes = np.abs(codes.astype(np.float32))
        if sizes.sum(-1).max(initial=0) * BASIS_MAX < EXACT_BELOW:  # no product needed to know
            return True
        reach = sizes.astype(np.float64) @ np.abs(self.matrix.astype(np.float64))
        return bool(reach.max(initial=0) < EXACT_BELOW)

    def decode(self, codes: Codes, point: int, start: int, out: npt.NDArray[Any]) -> None:
        """Codes `[groups, tokens, components]` into `out` `[heads, tokens, width]`: float32, or uint16 for bfloat16."""
        (groups, tokens, components), channels = codes.shape, self.mean.size
        factors, rows_each = self.scale * self.steps[point], _rows_of_product(components)
        span_tokens = _span_tokens(channels)
        flat, wide = np.empty((span_tokens, channels), np.float32), np.zeros((span_tokens, components), np.float32)
        for at in range(0, tokens, span_tokens):
            count = min(span_tokens, tokens - at)
            for group in range(groups):
                np.copyto(wide[:count], codes[group, at : at + count])
                columns = slice(group * components, (group + 1) * components)
                _multiply(wide, self._integers[group], flat[:, columns], -(-count // rows_each) * rows_each)
            span = flat[:count]
            span *= factors
            span += self.mean
            rows = span.reshape(count, self.heads, self.width)
            if self.rope is not None:
                self.rope.apply(rows, start + at)
            to = out[:, at : at + count].transpose(1, 0, 2)
            store = to_bfloat16 if out.dtype == np.uint16 else np.copyto
            store(to, rows)


class _Forwards(dict[int, Floats]):
    """Rows to codes before rounding, by point; made when asked for."""

    def __init__(self, part: PartBasis) -> None:
        super().__init__()
        self._part = part

    def __missing__(self, point: int) -> Floats:
        """`[groups, channel, component]`."""
        self[point] = (self._part.inverse / self._part.steps[point]).astype(np.float32)
        return self[point]


def _span_tokens(channels: int) -> int:
    return max(256, _SPAN_VALUES // channels // 256 * 256)


def _rows_of_product(width: int) -> int:
    """A divisor of 256."""
    return _ROWS_APPLE if sys.platform == "darwin" else min(256, 1 << (_PRODUCT // width**2).bit_length() - 1)


def _multiply(rows: Floats, matrix: Floats, out: Floats, count: int) -> None:
    """`count` rows times a matrix, a few of them at a time; both may be columns of something wider."""
    each = _rows_of_product(len(matrix))
    np.matmul(_cut(rows[:count], each), matrix, out=_cut(out[:count], each))


def _cut(rows: Floats, each: int) -> Floats:
    """`[n * each, width]` as `[n, each, width]`, a view."""
    shape, strides = (len(rows) // each, each, rows.shape[1]), (rows.strides[0] * each, *rows.strides)
    return np.lib.stride_tricks.as_strided(rows, shape, strides)


def to_bfloat16(out: npt.NDArray[Any], rows: Floats) -> None:
    """Finite float32, C-contiguous, rounded to bfloat16, ties to even, as its bits. Writes to both."""
    words = rows.view(np.uint32)
    last = words >> np.uint32(16)
    last &= np.uint32(1)
    last += np.uint32(0x7FFF)
    words += last
    np.right_shift(words, np.uint32(16), out=out, casting="unsafe")


@dataclass(frozen=True, eq=False)
class Basis:
    """All parts of a model that have a basis, by (layer, "keys" or "values"); each has as many steps: the points."""

    parts: Mapping[Key, PartBasis]

    @functools.cached_property
    def data(self) -> bytes:
        """The file."""
        points = {len(part.steps) for part in self.parts.values()}
        assert len(points) == 1
        pieces = [MAGIC, _COUNTS.pack(points.pop(), len(self.parts))]
        for (layer, name), part in self.parts.items():
            rope = part.rope
            pairs, halves, factor = (rope.pairs, rope.halves, rope.factor) if rope else (0, False, 1.0)
            pieces.append(_HEAD.pack(layer, PARTS.index(name), halves, part.heads, part.width, pairs, factor))
            pieces += [part.steps.astype("<f4").tobytes(), part.matrix.astype("<i2").tobytes()]
            pieces += [part.scale.astype("<f4").tobytes(), part.mean.astype("<f4").tobytes()]
            pieces += [rope.frequencies.astype("<f8").tobytes()] if rope else []
        return b"".join(pieces)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the file: its name in recipes."""
        return hashlib.sha256(self.data).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Basis:
        """The basis of a file. CorruptDataError when it is none."""
        if not data.startswith(MAGIC) or len(data) < len(MAGIC) + _COUNTS.size:
            raise CorruptDataError("these bytes are no basis")
        points, count = _COUNTS.unpack_from(data, len(MAGIC))
        at, parts = len(MAGIC) + _COUNTS.size, {}
        if not 0 < points <= POINTS_MAX:
            raise CorruptDataError("a basis has no points")
        for _ in range(count):
            key, part, at = _part(data, at, points)
            parts[key] = part
        if at != len(data) or len(parts) != count:
            raise CorruptDataError("a basis is not of the size that its geometry says")
        return cls(parts)


def _part(data: bytes, at: int, points: int) -> tuple[Key, PartBasis, int]:
    """(its key, a part, where the next one begins)."""
    try:
        layer, number, halves, heads, width, pairs, factor = _HEAD.unpack_from(data, at)
        group = group_width(heads, width) if heads and width else 0
        if number >= len(PARTS) or halves > 1 or not group or 2 * pairs > width:
            raise CorruptDataError("a basis cannot have this geometry")
        channels, at = heads * width, at + _HEAD.size
        arrays = []
        sizes = (("<f4", points), ("<i2", channels * group), ("<f4", channels), ("<f4", channels), ("<f8", pairs))
        for dtype, size in sizes:
            arrays.append(np.frombuffer(data, dtype, size, at))
            at += arrays[-1].nbytes
    except (struct.error, ValueError) as error:
        raise CorruptDataError("a basis ends early") from error
    steps, matrix, scale, mean, frequencies = arrays
    finite = all(np.isfinite(one).all() for one in (steps, scale, mean, frequencies, np.float32(factor)))
    if not finite or (steps <= 0).any() or factor <= 0 or (scale < 0).any():
        raise CorruptDataError("a basis has impossible numbers")
    if np.abs(matrix.astype(np.int32)).max() > BASIS_MAX:
        raise CorruptDataError("a basis has impossible numbers")
    rope = Rope(frequencies, bool(halves), factor) if pairs else None
    part = PartBasis(heads, width, matrix.reshape(-1, group, group), scale, mean, steps, rope)
    return (layer, PARTS[number]), part, at


# Parsed bases of this process. A model of 32 layers and 1,024 channels has 33 MB, and twice that once it decodes.
PARSED_MAX = 4
_parsed: Bounded[bytes, Basis] = Bounded(PARSED_MAX)
_lock = threading.Lock()


def parsed(digest: bytes, data: bytes) -> Basis:
    """The basis of a file with this digest, parsed once. Any thread. CorruptDataError when it is none."""
    with _lock:
        found = _parsed.get(digest)
    # Parsed without the lock: a large basis takes a while, and must not hold up the others.
    parsed_now = found or Basis.from_bytes(data)
    with _lock:
        found = _parsed[digest] = _parsed.get(digest) or parsed_now
        return found
