"""Byte planes and zstd: the same bits again, fewer bytes, and nothing else is unpacked."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.codec import ByteCodec, codecs, is_packing, packer_of
from kvstore.codecs.exact import LOSSLESS
from kvstore.core.blocks import ITEM_BYTES, Recipe, packed_bytes_max
from kvstore.errors import CorruptDataError
from tests.support.stored import random_payload

PACKERS = [codec for codec in codecs() if isinstance(codec, ByteCodec) and is_packing(Recipe(codec.name))]
CODEC = packer_of(LOSSLESS)
assert CODEC is not None


def shares() -> st.SearchStrategy[tuple[bytes, int]]:
    """Bytes and the size of their elements: normal values, the same one again and again, noise, edge cases."""
    normal = st.builds(
        lambda seed, dtype, n: (random_payload(np.random.default_rng(seed), dtype, n), ITEM_BYTES[dtype]),
        st.integers(0, 999),
        st.sampled_from(["BF16", "F16", "F32"]),
        st.integers(1, 3000),
    )
    noise = st.builds(
        lambda seed, size, n: (np.random.default_rng(seed).bytes(size * n), size),
        st.integers(0, 999),
        st.sampled_from([1, 2, 4, 8]),
        st.integers(1, 3000),
    )
    same = st.builds(lambda value, n: (value * n, 4), st.binary(min_size=4, max_size=4), st.integers(1, 70_000))
    return st.one_of(normal, noise, same)


@pytest.mark.parametrize("codec", PACKERS, ids=lambda codec: codec.name)
@settings(max_examples=80, deadline=None)
@given(share=shares())
def test_bits_come_back_and_the_packed_form_has_a_bound(codec: ByteCodec, share: tuple[bytes, int]) -> None:
    """NaN payloads, negative zeros and subnormals are bits like all others; records refuse what is over the bound."""
    data, item_bytes = share
    packed = codec.pack(np.frombuffer(data, np.uint8).reshape(1, 1, -1), item_bytes)
    assert 0 < len(packed) <= packed_bytes_max(len(data))
    assert codec.unpack(memoryview(packed), (1, 1, len(data)), item_bytes).tobytes() == data


def test_normal_values_in_bfloat16_take_two_thirds() -> None:
    """The plane of sign and exponent shrinks, the mantissa's does not."""
    data = random_payload(np.random.default_rng(0), "BF16", 256 * 1024)
    packed = CODEC.pack(np.frombuffer(data, np.uint8), 2)
    assert 0.6 < len(packed) / len(data) < 0.7
    assert len(packed) < 0.9 * len(zstandard.ZstdCompressor(level=1).compress(data))


@pytest.mark.parametrize("codec", PACKERS, ids=lambda codec: codec.name)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 16), change=st.sampled_from(["cut", "longer", "noise", "nothing", "twice"]))
def test_what_was_not_packed_does_not_unpack(codec: ByteCodec, seed: int, change: str) -> None:
    """Cut, continued, noise: CorruptDataError, never zstd's own error and never other bytes of the right length."""
    rng = np.random.default_rng(seed)
    data = random_payload(rng, "BF16", 500)
    packed = codec.pack(np.frombuffer(data, np.uint8), 2)
    damaged = {
        "cut": packed[: int(rng.integers(len(packed)))],
        "longer": packed + rng.bytes(3),
        "noise": rng.bytes(len(packed)),
        "nothing": b"",
        "twice": packed + packed,
    }[change]
    with pytest.raises(CorruptDataError):
        codec.unpack(memoryview(damaged), (1, 1, len(data)), 2)


@pytest.mark.parametrize("codec", PACKERS, ids=lambda codec: codec.name)
@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 16))
def test_a_flipped_bit_is_an_error_or_bytes_of_the_right_size(codec: ByteCodec, seed: int) -> None:
    """Checksums stand over packed bytes; without them no flip may do worse than give wrong values."""
    rng = np.random.default_rng(seed)
    packed = bytearray(codec.pack(np.frombuffer(random_payload(rng, "BF16", 500), np.uint8), 2))
    packed[int(rng.integers(len(packed)))] ^= 1 << int(rng.integers(8))
    with contextlib.suppress(CorruptDataError):
        assert codec.unpack(memoryview(packed), (1, 1, 1000), 2).nbytes == 1000


@pytest.mark.parametrize("claimed", [1 << 40, 1 << 20, 1001, 999, None])
def test_a_frame_cannot_ask_for_memory(claimed: int | None) -> None:
    """Of a bomb not a byte is unpacked: what a frame says of its size must be what the geometry says."""
    zeros = bytes(1 << 20)
    if claimed is None:
        bomb = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(zeros)
    elif claimed == 1 << 40:
        bomb = bytes.fromhex("28b52ffd e0") + claimed.to_bytes(8, "little") + bytes.fromhex("030000")
    else:
        bomb = zstandard.ZstdCompressor(level=1).compress(zeros[:claimed])
    with pytest.raises(CorruptDataError, match="size"):
        CODEC.unpack(memoryview(bomb), (1, 1, 1000), 2)
