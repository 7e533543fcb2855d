"""The exact arithmetic of a transform codec, as a prototype: no profile of the store uses it.

Keys without their rotation and values, all heads of a token as one row, are coded in the components of a calibration.
The basis would be made once for a model and lie beside the blobs that need it: see `Basis`. The rest of a recipe is one
step for the whole (layer, part). What it costs in bits and KL: `transform_table.py`. On a CPU it decodes in 2.75 times
and encodes in 3.6 times the processor time of `compact`.

 Everything that decides a decoded value is exact or a single
rounding of IEEE arithmetic, so numpy and MLX, one row or a thousand, give equal values, and a cut of a decoded block
is the decoded cut:

rows            y = C B, where C are codes and B is the basis, 12-bit integers: float32 holds every partial sum, in
                any order, while |C| |B| of a row is under 2^24. A row that is not is not trusted, and stays raw
channels        x = y * (scale * step) + mean, a multiplication and an addition in float32 (never a fused one)
rotation        of keys, by the angles position * frequency: cos and sin are those of `turns`, a polynomial in float64,
                rounded to float32; two multiplications and an addition or subtraction a value

Codes of one (layer, part) of a block are packed together; a cut unpacks them and drops rows, and a longer block packs
them again with the rows that follow: no value is quantized twice.

packed bytes    u8 kind; u32 n, then n of (u32 place, i16 code): codes over 127, whose places hold +-127 below
  kind 0        a zstd frame of the codes as int8 [tokens, components]
  kind 1        2 bits a component, little-endian: its class by its largest code: 0 none over 0, 1 up to 1, 2 up to 7,
                3 others. Then for classes 1 to 3 that have components: u32 length, highest bit set if it is a zstd
                frame, and that many bytes: their codes [components, tokens] as digits, the first the lowest: five
                to a byte in base 3 (code + 1), two in base 16 (code + 8), or a byte (code + 128)
"""

from __future__ import annotations

import functools
import hashlib
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import zstandard

from kvstore.errors import CorruptDataError

Array = np.ndarray[Any, Any]
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int16]

WIDTH_MAX = 256  # of one row: a wider layer has several bases, for some of its heads each
BASIS_MAX = (1 << 11) - 1
CODE_MAX = 127
ESCAPED_MAX = (1 << 15) - 1
EXACT_BELOW = float(1 << 24)
LEVEL = 3
SPAN = 256
MAGIC = b"kvpca\x01"
_HEAD = struct.Struct("<HHHHf")
_ESCAPE = np.dtype([("place", "<u4"), ("code", "<i2")])
_FRAME = 1 << 31
# Largest code, base and codes to a byte of the classes 1, 2, 3.
_CLASSES = ((1, 3, 5), (7, 16, 2), (CODE_MAX, 256, 1))
# Codes of every byte of a class, int16 [256, codes]: a look-up is a fifth of the time of divisions.
_DIGITS = [
    (np.arange(256)[:, None] // base ** np.arange(together) % base - (1 if base == 3 else high + 1)).astype(np.int16)
    for high, base, together in _CLASSES
]


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of keys by position. Pair i of a head turns by position * frequencies[i].

    `frequencies`: float64, one a pair; `halves`: pair i is channels (i, i + pairs), else (2 i, 2 i + 1). Channels
    behind the pairs do not turn. Rotated keys are `factor` times as long.
    """

    frequencies: npt.NDArray[np.float64]
    halves: bool
    factor: float = 1.0

    def _factors(self, start: int, count: int, back: bool) -> tuple[Floats, Floats]:
        """cos and sin, float32 `[count, pairs]`, with the factor."""
        cos, sin = turns(start, count, self.frequencies.tobytes())
        factor = np.float32(1 / self.factor if back else self.factor)
        return cos * factor, sin * (-factor if back else factor)

    def apply(self, rows: Floats, start: int, back: bool = False) -> Floats:
        """float32 `[heads, tokens, width]`, the first token at position `start`; `back`: the inverse."""
        pairs = len(self.frequencies)
        cos, sin = self._factors(start, rows.shape[1], back)
        step = 1 if self.halves else 2
        even, odd = slice(0, step * pairs, step), slice(pairs if self.halves else 1, 2 * pairs, step)
        first, second = rows[..., even], rows[..., odd]
        turned = rows.copy()
        turned[..., even] = first * cos - second * sin
        turned[..., odd] = first * sin + second * cos
        return turned

    def apply_lazily(self, rows: mx.array, start: int) -> mx.array:
        """As `apply`, bit for bit, as a graph."""
        pairs, (heads, tokens, width) = len(self.frequencies), rows.shape
        cos, sin = (mx.array(one) for one in self._factors(start, tokens, False))
        turning = rows[..., : 2 * pairs]
        if self.halves:
            first, second = turning[..., :pairs], turning[..., pairs:]
        else:
            couples = turning.reshape(heads, tokens, pairs, 2)
            first, second = couples[..., 0], couples[..., 1]
        turned = [first * cos - second * sin, first * sin + second * cos]
        joined = mx.concatenate(turned, -1) if self.halves else mx.stack(turned, -1).reshape(heads, tokens, 2 * pairs)
        return joined if 2 * pairs == width else mx.concatenate([joined, rows[..., 2 * pairs :]], -1)


# pi / 2 in three parts whose products with whole numbers under 2^20 are exact, and the rest.
_PARTS = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_SIN = tuple((-1) ** k / float(np.prod(np.arange(1.0, 2 * k + 2))) for k in range(9))
_COS = tuple((-1) ** k / float(np.prod(np.arange(1.0, 2 * k + 1))) for k in range(9))


@functools.lru_cache(maxsize=64)
def turns(start: int, count: int, frequencies: bytes) -> tuple[Floats, Floats]:
    """cos and sin of position * frequency, float32 `[count, pairs]`, equal on every machine: additions and products."""
    angles = np.arange(start, start + count, dtype=np.float64)[:, None] * np.frombuffer(frequencies, np.float64)
    quarters = np.rint(angles * (2 / np.pi))
    x = angles
    for part in _PARTS:
        x = x - quarters * part
    square = x * x
    sin, cos = _horner(square, _SIN) * x, _horner(square, _COS)
    turn = quarters.astype(np.int64) & 3
    swapped = turn & 1 == 1
    s, c = np.where(swapped, cos, sin), np.where(swapped, sin, cos)
    return (
        np.where((turn == 1) | (turn == 2), -c, c).astype(np.float32),
        np.where(turn >= 2, -s, s).astype(np.float32),
    )


def _horner(x: Array, factors: tuple[float, ...]) -> Array:
    total = np.full_like(x, factors[-1])
    for factor in reversed(factors[:-1]):
        total = total * x + factor
    return total


@dataclass(frozen=True, eq=False)
class Basis:
    """What a calibration makes of some heads of one (layer, part): `matrix` int16 `[components, width]`, |m| <= 2047,
    `scale` and `mean` float32 `[width]`, of all their channels.

    `rotation`: of keys that rotate. `heads`: how many heads the row has.
    """

    matrix: npt.NDArray[np.int16]
    scale: Floats
    mean: Floats
    heads: int
    rotation: Rotation | None = None

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the bytes: the name of the basis in recipes."""
        return hashlib.sha256(self.to_bytes()).digest()

    @functools.cached_property
    def _forward(self) -> Floats:
        """Rows to components: the pseudo-inverse of what decodes."""
        forward: Floats = np.linalg.pinv(self.matrix * self.scale.astype(np.float64)).astype(np.float32)
        return forward

    @functools.cached_property
    def _integers(self) -> Floats:
        """The matrix as float32."""
        return self.matrix.astype(np.float32)

    @functools.cached_property
    def _absolute(self) -> npt.NDArray[np.float64]:
        """Its absolute values."""
        return np.abs(self.matrix.astype(np.float64))

    def encode(self, rows: Floats, step: float, start: int) -> Codes | None:
        """float32 `[heads, tokens, width / heads]`, the first at position `start` -> codes `[tokens, components]`.

        None when decoding them would not be exact: a code or a sum is too large, or a value is not finite.
        """
        if not np.isfinite(rows).all():
            return None
        if self.rotation is not None:
            rows = self.rotation.apply(rows, start, back=True)
        flat = rows.transpose(1, 0, 2).reshape(rows.shape[1], -1) - self.mean
        found = np.rint(_in_spans(flat, self._forward) * np.float32(1 / step))
        if np.abs(found).max(initial=0) > ESCAPED_MAX:
            return None
        codes: Codes = found.astype(np.int16)
        sizes = np.abs(codes.astype(np.int32))
        if sizes.sum(1).max(initial=0) * BASIS_MAX < EXACT_BELOW:  # no product needed to know
            return codes
        reach = sizes.astype(np.float64) @ self._absolute
        return codes if reach.max(initial=0) < EXACT_BELOW else None

    def decode(self, codes: Codes, step: float, start: int) -> Floats:
        """Codes `[tokens, components]` -> float32 `[heads, tokens, width / heads]`."""
        flat = (codes.astype(np.float32) @ self._integers) * (self.scale * np.float32(step))
        flat = flat + self.mean
        rows = np.ascontiguousarray(flat.reshape(len(flat), self.heads, -1).transpose(1, 0, 2))
        return rows if self.rotation is None else self.rotation.apply(rows, start)

    def decode_lazily(self, codes: mx.array, step: float, start: int) -> mx.array:
        """As `decode`, bit for bit, as a graph: for a device with a fast product of float32 (not TF32, not a CPU).

        Never inside mx.compile, which may fuse a product and a sum into one rounding.
        """
        flat = codes.astype(mx.float32) @ mx.array(self._integers)
        flat = flat * mx.array(self.scale * np.float32(step)) + mx.array(self.mean)
        rows = mx.contiguous(flat.reshape(flat.shape[0], self.heads, -1).transpose(1, 0, 2))
        return rows if self.rotation is None else self.rotation.apply_lazily(rows, start)

    def to_bytes(self) -> bytes:
        """The bytes that are stored; `from_bytes` reads them."""
        components, width = self.matrix.shape
        turning = self.rotation
        pairs = 0 if turning is None else len(turning.frequencies)
        halves, factor = (0, 1.0) if turning is None else (int(turning.halves), turning.factor)
        parts = [MAGIC, _HEAD.pack(components, width, self.heads, pairs << 1 | halves, factor)]
        parts += [self.matrix.astype("<i2").tobytes(), self.scale.astype("<f4").tobytes()]
        parts += [self.mean.astype("<f4").tobytes()]
        parts += [] if turning is None else [turning.frequencies.astype("<f8").tobytes()]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Basis:
        """The basis of these bytes. CorruptDataError when they are none."""
        at = len(MAGIC) + _HEAD.size
        if len(data) < at or data[: len(MAGIC)] != MAGIC:
            raise CorruptDataError("these bytes are no basis")
        components, width, heads, turning, factor = _HEAD.unpack_from(data, len(MAGIC))
        pairs = turning >> 1
        if not 0 < components <= width <= WIDTH_MAX or not heads or width % heads or 2 * pairs > width // heads:
            raise CorruptDataError("a basis cannot have this geometry")
        if len(data) != at + 2 * components * width + 8 * width + 8 * pairs:
            raise CorruptDataError("a basis is not of the size that its geometry says")
        matrix = np.frombuffer(data, "<i2", components * width, at).reshape(components, width)
        at += matrix.nbytes
        scale, mean = (np.frombuffer(data, "<f4", width, at + 4 * width * n) for n in range(2))
        frequencies = np.frombuffer(data, "<f8", pairs, at + 8 * width)
        finite = (
            all(np.isfinite(one).all() for one in (scale, mean, frequencies)) and np.isfinite(factor) and factor > 0
        )
        if not finite or np.abs(matrix.astype(np.int32)).max() > BASIS_MAX or (scale < 0).any():
            raise CorruptDataError("a basis has impossible numbers")
        rotation = Rotation(frequencies, bool(turning & 1), factor) if pairs else None
        return cls(matrix, scale, mean, heads, rotation)


def _in_spans(rows: Floats, matrix: Floats) -> Floats:
    """rows @ matrix, so many rows at a time: a product's sums may depend on how many rows there are, and on no more."""
    out = np.empty((len(rows), matrix.shape[1]), np.float32)
    for at in range(0, len(rows), SPAN):
        span = rows[at : at + SPAN]
        whole = np.pad(span, ((0, SPAN - len(span)), (0, 0)))
        out[at : at + SPAN] = (whole @ matrix)[: len(span)]
    return out


_MINE = threading.local()


def _zstd() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    """This thread's: contexts are not to be shared."""
    if not hasattr(_MINE, "both"):
        _MINE.both = (zstandard.ZstdCompressor(level=LEVEL), zstandard.ZstdDecompressor())
    both: tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor] = _MINE.both
    return both


def pack(codes: Codes) -> bytes:
    """Codes `[tokens, components]` -> the shorter of both kinds."""
    places = np.flatnonzero(np.abs(codes.reshape(-1)) > CODE_MAX)
    escapes = np.zeros(len(places), _ESCAPE)
    escapes["place"], escapes["code"] = places, codes.reshape(-1)[places]
    small = np.clip(codes, -CODE_MAX, CODE_MAX).astype(np.int8)
    plain = _zstd()[0].compress(small.tobytes())
    classed = b"".join(_pack_classes(small))
    kind, body = (0, plain) if len(plain) <= len(classed) else (1, classed)
    return struct.pack("<BI", kind, len(places)) + escapes.tobytes() + body


def _pack_classes(small: npt.NDArray[np.int8]) -> Iterator[bytes]:
    largest = np.abs(small.astype(np.int16)).max(0, initial=0)
    classes = np.searchsorted([0, 1, 7], largest).astype(np.uint8)
    bits = np.stack([classes & 1, classes >> 1], -1).reshape(-1)
    yield np.packbits(bits, bitorder="little").tobytes()
    for number, (high, base, together) in enumerate(_CLASSES, 1):
        some = small[:, classes == number].T.astype(np.int16).reshape(-1) + (high + 1 if base > 3 else 1)
        if some.size:
            padded = np.concatenate([some, np.zeros(-some.size % together, np.int16)]).reshape(-1, together)
            raw = (padded * base ** np.arange(together)).sum(1).astype(np.uint8).tobytes()
            frame = _zstd()[0].compress(raw)
            framed = len(frame) < len(raw)
            yield struct.pack("<I", len(frame) | _FRAME if framed else len(raw)) + (frame if framed else raw)


def unpack(packed: bytes, tokens: int, components: int) -> Codes:
    """The codes that were packed. CorruptDataError when it is anything else."""
    try:
        kind, count = struct.unpack_from("<BI", packed)
        at = 5 + count * _ESCAPE.itemsize
        if kind > 1 or at > len(packed):
            raise CorruptDataError("packed codes are of no known kind")
        escapes = np.frombuffer(packed, _ESCAPE, count, 5)
        codes = (_unpack_plain if kind == 0 else _unpack_classes)(packed[at:], tokens, components)
    except (struct.error, zstandard.ZstdError, ValueError) as error:
        raise CorruptDataError(f"packed codes do not unpack: {error}") from error
    if count and int(escapes["place"].max()) >= codes.size:
        raise CorruptDataError("packed codes have a place that is not there")
    codes[np.divmod(escapes["place"], components)] = escapes["code"]
    return codes


def _content(frame: bytes, nbytes: int) -> bytes:
    """What a frame holds, by the size that the geometry says: a small frame cannot ask for much memory."""
    if zstandard.frame_content_size(frame) != nbytes:
        raise CorruptDataError("packed codes are not of the size that their geometry says")
    content = _zstd()[1].decompress(frame, max_output_size=nbytes, allow_extra_data=False)
    if len(content) != nbytes:
        raise CorruptDataError("packed codes are not of the size that their geometry says")
    return content


def _unpack_plain(body: bytes, tokens: int, components: int) -> Codes:
    return np.frombuffer(_content(body, tokens * components), np.int8).reshape(tokens, components).astype(np.int16)


def _unpack_classes(body: bytes, tokens: int, components: int) -> Codes:
    at = -(-2 * components // 8)
    if len(body) < at:
        raise CorruptDataError("packed codes end early")
    bits = np.unpackbits(np.frombuffer(body[:at], np.uint8), bitorder="little")[: 2 * components].reshape(-1, 2)
    classes = bits[:, 0] | bits[:, 1] << 1
    codes = np.zeros((components, tokens), np.int16)
    for number, (_, _, together) in enumerate(_CLASSES, 1):
        columns = np.flatnonzero(classes == number)
        if not len(columns) or not tokens:
            continue
        (head,) = struct.unpack_from("<I", body, at)
        length, at = head & ~_FRAME, at + 4
        piece, at = body[at : at + length], at + length
        nbytes = -(-len(columns) * tokens // together)
        raw = _content(piece, nbytes) if head & _FRAME else piece
        if len(raw) != nbytes:
            raise CorruptDataError("packed codes end early")
        found = np.take(_DIGITS[number - 1], np.frombuffer(raw, np.uint8), axis=0).reshape(-1)
        codes[columns] = found[: len(columns) * tokens].reshape(len(columns), tokens)
    if at != len(body):
        raise CorruptDataError("packed codes have bytes behind their end")
    return codes.T
