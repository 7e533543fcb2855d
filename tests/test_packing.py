"""Packing: the bit strings of `packing.py`, against numpy and against what MLX itself packs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.packing import pack, unpack, words_of
from tests.support import reference

fields = st.lists(st.tuples(st.integers(1, 16).map(lambda n: 8 * n), st.integers(1, 8)), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(fields=fields, rows=st.integers(0, 3), seed=st.integers(0, 999))
def test_what_is_packed_is_the_bit_string_of_the_format(fields: list[tuple[int, int]], rows: int, seed: int) -> None:
    """And unpacking gives the codes back."""
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 1 << bits, (2, rows, n)).astype(np.uint8) for n, bits in fields]
    packed = pack([mx.array(c) for c in codes], tuple(fields))
    assert packed.dtype == mx.uint32 and packed.shape == (2, rows, words_of(tuple(fields)))
    expected = reference.words([(c, bits) for c, (_, bits) in zip(codes, fields, strict=True)])
    np.testing.assert_array_equal(np.array(packed), expected)
    for got, wanted in zip(unpack(packed, tuple(fields)), codes, strict=True):
        np.testing.assert_array_equal(np.array(got), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_packs_its_codes_in_the_same_way(bits: int) -> None:
    """So packed codes of one field may be read by mx.dequantize."""
    codes = mx.array(np.random.default_rng(bits).integers(0, 1 << bits, (3, 64)).astype(np.uint8))
    read = mx.dequantize(pack([codes], ((64, bits),)), mx.ones((3, 2)), mx.zeros((3, 2)), group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(read), np.array(codes))
