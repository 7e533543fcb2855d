"""channel against its format in numpy, and what it is for: keys with large channels."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.affine import BITS, affine_recipe
from kvstore.codecs.codec import codec_of
from kvstore.codecs.per_channel import channel_recipe
from kvstore.core.blocks import RAW, Recipe
from kvstore.core.layers import PartSpec
from kvstore.errors import CorruptDataError
from tests.support import reference

MX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
ULP = {"BF16": 2**-8, "F16": 2**-11, "F32": 2**-23}


def make_rows(seed: int, part: PartSpec, groups: int) -> tuple[mx.array, np.ndarray]:
    """`[1, heads, tokens, width]` with channels of all sizes, far from zero, constant, or zero; also as float32."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(1, part.heads, groups * 64, part.width)).astype(np.float32)
    rows *= rng.choice(np.float32([0, 1e-3, 1, 50]), part.width)
    rows += rng.choice(np.float32([0, 0, 3, -200]), part.width)
    array = mx.array(rows).astype(MX[part.dtype])
    return array, np.array(array.astype(mx.float32))


@settings(max_examples=60, deadline=None)
@given(
    part=st.builds(PartSpec, st.integers(1, 3), st.sampled_from([1, 7, 64, 80, 96, 128]), st.sampled_from(sorted(MX))),
    groups=st.integers(0, 3),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 1 << 16),
)
def test_channel_is_what_its_format_says(part: PartSpec, groups: int, bits: int, seed: int) -> None:
    """Scales and biases to the bit; codes too, except for values within rounding of a boundary; decoding is equal."""
    recipe = channel_recipe(bits)
    codec, model = codec_of(recipe), reference.Channel(recipe, part.dtype)
    array, rows = make_rows(seed, part, groups)
    encoded = codec.encode(array, recipe)
    words, scales, biases = (np.array(t if t.dtype == mx.uint32 else t.astype(mx.float32)) for t in encoded)
    expected, want_scales, want_biases, gaps = model.encode(rows)
    assert np.array_equal(scales, want_scales) and np.array_equal(biases, want_biases)
    (codes,) = reference.codes_of(words.reshape(*words.shape[:3], part.width, 2 * bits), [(64, bits)])
    assert (gaps[codes != expected] < 1e-4).all()
    decoded = np.array(codec.decode(encoded, recipe, part).astype(mx.float32))
    wanted = model.decode(codes, scales, biases)
    assert (np.abs(decoded - wanted) <= ULP[part.dtype] * np.abs(wanted) + 2**-22 * np.abs(biases).max(initial=0)).all()
    step = np.repeat(scales, 64, axis=2) / 2
    rounding = ULP[part.dtype] * (np.abs(rows) + np.repeat(scales, 64, axis=2) * 2**bits)
    assert (np.abs(decoded - rows) <= step + 2 * rounding + 1e-30).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_large_channel_costs_the_others_nothing(bits: int) -> None:
    """The error of a channel is that of its own range; along a token's row affine loses the small ones altogether."""
    part = PartSpec(2, 64, "BF16")
    rows = np.random.default_rng(0).normal(size=(1, 2, 256, 64)).astype(np.float32)
    rows[..., 9] = rows[..., 9] * 40 + 300
    array = mx.array(rows).astype(mx.bfloat16)
    small = [channel for channel in range(64) if channel != 9]

    def error(recipe: Recipe) -> float:
        codec = codec_of(recipe)
        back = codec.decode(codec.encode(array, recipe), recipe, part).astype(mx.float32)
        return float(np.square(np.array(back) - rows)[..., small].mean())

    lost = error(affine_recipe(bits, 64))
    assert error(channel_recipe(bits)) < (0.02 if bits >= 4 else 0.25) * lost


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65504.0), ("BF16", 3.3e38), ("F32", 3.3e38)])
def test_a_channel_whose_range_overflows_is_not_trusted(dtype: str, value: float) -> None:
    """From one end of the dtype to the other."""
    rows = np.zeros((1, 1, 64, 3), np.float32)
    rows[0, 0, 5, 1], rows[0, 0, 6, 1] = value, -value
    recipe = channel_recipe(4)
    codec = codec_of(recipe)
    assert not codec.trusted(codec.encode(mx.array(rows).astype(MX[dtype]), recipe), recipe).item()


@pytest.mark.parametrize(
    "params", [(), (("bits", 4),), (("bits", 7), ("group", 64)), (("bits", 4), ("group", 32)), (("group", 64),)]
)
def test_a_channel_recipe_that_cannot_be_is_corrupt(params: tuple[tuple[str, int], ...]) -> None:
    """Recipes come from files."""
    recipe = Recipe("channel", 1, params)
    with pytest.raises(CorruptDataError):
        codec_of(recipe).tensors(PartSpec(2, 96, "BF16"), recipe)


def test_parts_that_the_engine_quantized_are_left_alone() -> None:
    """And those that hold nothing."""
    codec = codec_of(channel_recipe(4))
    assert codec.fit(channel_recipe(4), PartSpec(2, 64, "BF16", 8, 64)) == RAW
    assert codec.fit(channel_recipe(4), PartSpec(2, 0, "BF16")) == RAW
    assert codec.fit(channel_recipe(4), PartSpec(3, 7, "F32")) == channel_recipe(4)
