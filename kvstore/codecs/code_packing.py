"""Packs small whole numbers of falling size: one layer's codes of `pca.py`, by component.

Components are in classes by their largest code: all zero, up to 1, up to 7, and others. Codes of a class share bytes
and then a zstd frame, whose entropy coder does the rest. Codes over 127 stand in a list; as whole rows that stay exact
they took .5 to .9 bits a value.

packed          u8 kind; u32 n, then n of (u32 place, i16 code): codes over 127, whose places hold +-127 below.
                place: ((group * tokens) + token) * components + component
  kind 0        the rest is a zstd frame of the codes as int8 [groups, tokens, components]
  kind 1        2 bits a component of each group, little-endian: its class, 0 to 3. Then for classes 1 to 3 that have
                components: u32 length, highest bit set if it is a zstd frame, and that many bytes. A component is cut
                into 5, 2 or 1 spans of equal length, the last filled up with zeros; a byte holds one code of each span,
                the first the lowest digit: in base 3 (code + 1), base 16 (code + 8) or base 256 (code + 128)
  kind 2        n is 0, and the rest is a zstd frame of the codes as i16 [groups, tokens, components]: used
                where the list of codes over 127 would be longer
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvstore.codecs.zstd import compressor, content
from kvstore.errors import CorruptDataError

Codes = npt.NDArray[np.int16]
_Small = npt.NDArray[np.int8]

CODE_MAX = 127
# Of classes, which have no repetitions to find (3 is no shorter); of rows of tokens.
LEVEL_CLASSES, LEVEL_TOKENS = 1, 3
REPEATED_SHARE = 0.9
_HEAD = struct.Struct("<BI")
_LENGTH = struct.Struct("<I")
_ESCAPE = np.dtype([("place", "<u4"), ("code", "<i2")])
_FRAME = 1 << 31
# Largest code, base and codes to a byte of the classes 1, 2, 3.
_CLASSES = ((1, 3, 5), (7, 16, 2), (CODE_MAX, 256, 1))
_SHIFT = {3: 1, 16: 8, 256: 128}
# Digit k of a byte in base 3, less 1, as bytes.translate takes it: a third of the time of divisions.
_TRITS = [bytes((byte // 3**k % 3 - 1) & 0xFF for byte in range(256)) for k in range(5)]


def pack(codes: Codes) -> bytes:
    """Codes `[groups, tokens, components]`, C-contiguous -> the shortest kind: at most a frame of their own bytes."""
    places = np.flatnonzero(_over(codes.reshape(-1)))
    escapes = np.zeros(len(places), _ESCAPE)
    within = codes
    if len(places):
        escapes["place"], escapes["code"] = places, codes.reshape(-1)[places]
        within = np.clip(codes, -CODE_MAX, CODE_MAX)
    small = within.astype(np.int8)
    classed = b"".join(_pack_classes(small))
    plain = compressor(LEVEL_TOKENS).compress(small.tobytes()) if _may_repeat(small) else b""
    kind, body = (0, plain) if plain and len(plain) <= len(classed) else (1, classed)
    packed = _HEAD.pack(kind, len(places)) + escapes.tobytes() + body
    if len(packed) <= codes.nbytes:
        return packed
    return min(packed, _HEAD.pack(2, 0) + compressor(LEVEL_CLASSES).compress(codes.astype("<i2").tobytes()), key=len)


def _over(flat: Codes) -> npt.NDArray[np.bool_]:
    """Which codes are over CODE_MAX, in one pass: as unsigned numbers all others are at most 2 * CODE_MAX."""
    return (flat + np.int16(CODE_MAX)).view(np.uint16) > 2 * CODE_MAX


def _may_repeat(small: _Small) -> bool:
    """Whether some tokens have equal codes, as in first layers, which see only the token: then kind 0 may be shorter.

    The first components, the largest, tell tokens apart. Trying both kinds on every block cost a third of `pack`.
    """
    first = np.ascontiguousarray(small[0, :, :8])
    return len(set(map(bytes, first))) < REPEATED_SHARE * len(first)


def _pack_classes(small: _Small) -> Iterator[bytes]:
    groups, tokens, components = small.shape
    by_component = np.ascontiguousarray(small.transpose(0, 2, 1)).reshape(groups * components, tokens)
    largest = np.maximum(by_component.max(1, initial=0), -by_component.min(1, initial=0))
    classes = np.searchsorted([0, 1, 7], largest).astype(np.uint8)
    bits = np.stack([classes & 1, classes >> 1], -1).reshape(-1)
    yield np.packbits(bits, bitorder="little").tobytes()
    for number, (_, base, together) in enumerate(_CLASSES, 1):
        some = by_component[classes == number]
        if not some.size:
            continue
        length = -(-tokens // together)
        digits = np.full((len(some), together * length), _SHIFT[base], np.uint8)
        np.add(some, _SHIFT[base], out=digits[:, :tokens], casting="unsafe", dtype=np.int16)
        spans = digits.reshape(len(some), together, length)
        whole = spans[:, -1].copy()
        for place in range(together - 2, -1, -1):
            whole *= np.uint8(base)
            whole += spans[:, place]
        raw = whole.tobytes()
        frame = compressor(LEVEL_CLASSES).compress(raw)
        framed = len(frame) < len(raw)
        yield _LENGTH.pack(len(frame) | _FRAME if framed else len(raw)) + (frame if framed else raw)


def unpack(packed: memoryview | bytes, shape: tuple[int, int, int]) -> Codes:
    """The codes `[groups, tokens, components]` that were packed. CorruptDataError when it is anything else."""
    try:
        kind, count = _HEAD.unpack_from(packed)
        at = _HEAD.size + count * _ESCAPE.itemsize
        if kind >= len(_UNPACK) or at > len(packed):
            raise CorruptDataError("packed codes are of no known kind")
        escapes = np.frombuffer(packed, _ESCAPE, count, _HEAD.size)
        codes = _UNPACK[kind](packed[at:], shape)
    except (struct.error, ValueError) as error:
        raise CorruptDataError(f"packed codes do not unpack: {error}") from error
    if count:
        if int(escapes["place"].max()) >= codes.size:
            raise CorruptDataError("packed codes have a place that is not there")
        codes.reshape(-1)[escapes["place"]] = escapes["code"]
    return codes


def _unpack_plain(body: memoryview | bytes, shape: tuple[int, int, int]) -> Codes:
    groups, tokens, components = shape
    return np.frombuffer(content(body, groups * tokens * components), np.int8).reshape(shape).astype(np.int16)


def _unpack_classes(body: memoryview | bytes, shape: tuple[int, int, int]) -> Codes:
    groups, tokens, components = shape
    n = groups * components
    at = -(-2 * n // 8)
    if len(body) < at:
        raise CorruptDataError("packed codes end early")
    bits = np.unpackbits(np.frombuffer(body[:at], np.uint8), bitorder="little")[: 2 * n].reshape(-1, 2)
    classes = bits[:, 0] | bits[:, 1] << 1
    by_component = np.zeros((n, tokens), np.int8)
    for number, (_, base, together) in enumerate(_CLASSES, 1):
        columns = np.flatnonzero(classes == number)
        if not len(columns) or not tokens:
            continue
        (head,) = _LENGTH.unpack_from(body, at)
        length, at = head & ~_FRAME, at + _LENGTH.size
        piece, at = body[at : at + length], at + length
        nbytes = len(columns) * -(-tokens // together)
        raw = content(piece, nbytes) if head & _FRAME else bytes(piece)
        if len(raw) != nbytes:
            raise CorruptDataError("packed codes end early")
        by_component[columns] = _digits(raw, base, len(columns), together)[:, :tokens]
    if at != len(body):
        raise CorruptDataError("packed codes have bytes behind their end")
    return np.ascontiguousarray(by_component.reshape(groups, components, tokens).transpose(0, 2, 1), np.int16)


def _unpack_large(body: memoryview | bytes, shape: tuple[int, int, int]) -> Codes:
    groups, tokens, components = shape
    return np.frombuffer(content(body, 2 * groups * tokens * components), "<i2").reshape(shape).astype(np.int16)


_UNPACK = (_unpack_plain, _unpack_classes, _unpack_large)


def _digits(raw: bytes, base: int, components: int, together: int) -> _Small:
    """Codes `[components, spans * length]` of the bytes of a class."""
    if base == 3:
        spans = [np.frombuffer(raw.translate(table), np.int8).reshape(components, -1) for table in _TRITS]
        return np.concatenate(spans, 1)
    whole = np.frombuffer(raw, np.uint8).reshape(components, -1)
    if base == 16:
        return np.concatenate([(whole & 15).view(np.int8) - np.int8(8), (whole >> 4).view(np.int8) - np.int8(8)], 1)
    return (whole ^ 128).view(np.int8)
