"""Small values of the index: namespaces, and the checksum that every value carries. Pure."""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from kvstore.errors import CorruptDataError

_CHECK_BYTES = 8
_SPACE = struct.Struct("<IQ")


class Space(NamedTuple):
    """A namespace in the index: its number in the table, when a caller last named it (wall clock), and its record."""

    number: int
    used_s: int
    record: bytes

    def pack(self) -> bytes:
        """As it stands in the index."""
        return _SPACE.pack(self.number, self.used_s) + self.record

    @classmethod
    def parse(cls, value: bytes) -> Space:
        """What `pack` gave."""
        number, used_s = _SPACE.unpack_from(value)
        return cls(number, used_s, value[_SPACE.size :])


def with_check(key: bytes, value: bytes) -> bytes:
    """`value`, then its xxh3_64 seeded with the first 8 bytes of the key."""
    check = xxhash.xxh3_64_intdigest(value, int.from_bytes(key[:8], "little"))
    return value + check.to_bytes(_CHECK_BYTES, "little")


def without_check(key: bytes, stored: bytes) -> bytes:
    """What `with_check` was given; CorruptDataError when it was changed or is another key's."""
    value = stored[:-_CHECK_BYTES]
    if with_check(key, value) != stored:
        raise CorruptDataError("index: a value does not match its checksum")
    return value
