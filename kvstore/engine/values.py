"""Small values of the index that carry a checksum: numbers and namespace records. Pure."""

from __future__ import annotations

import xxhash

from kvstore.errors import CorruptDataError

_NUMBER_BYTES = 8
_CHECK_BYTES = 8


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


def with_number_check(name: str, number: int) -> bytes:
    """A number under its name."""
    return with_check(name.encode(), number.to_bytes(_NUMBER_BYTES, "little"))


def number_of(name: str, stored: bytes | None) -> int | None:
    """What `with_number_check` was given; version 1 of the index had numbers without a check."""
    if not stored:
        return None
    value = stored if len(stored) == _NUMBER_BYTES else without_check(name.encode(), stored)
    return int.from_bytes(value, "little")
