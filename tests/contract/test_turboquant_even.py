"""turboquant-even against its format in numpy and bytes that are kept, and its purpose: values with large channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs import device
from kvstore.codecs.codec import codec_of
from kvstore.codecs.turboquant import turboquant_mse_recipe
from kvstore.codecs.turboquant_even import turboquant_even_recipe
from kvstore.core.blocks import RAW, Recipe
from kvstore.core.layers import PartSpec
from kvstore.errors import CorruptDataError
from tests.support import reference

GOLDEN = Path(__file__).parent.parent / "golden" / "turboquant-even.json"
ULP = {"BF16": 2**-8, "F16": 2**-11, "F32": 2**-22}
MX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}

Array = np.ndarray[Any, Any]


def make_rows(seed: int, part: PartSpec, groups: int) -> tuple[mx.array, Array]:
    """`[1, heads, tokens, width]` with channels of all sizes, zero, or near the least of float16; also as float32."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(1, part.heads, groups * 64, part.width)).astype(np.float32)
    rows *= rng.choice(np.float32([0, 1e-7, 1e-3, 1, 1, 50]), part.width)
    array = mx.array(rows).astype(MX[part.dtype])
    return array, np.array(array.astype(mx.float32))


def as_numpy(tensors: Any) -> list[Array]:
    """Words as they are, scales in bytes as they are, others as float32."""
    plain = (mx.uint32, mx.uint8)
    return [np.array(t if t.dtype in plain else t.astype(mx.float32)) for t in tensors]


def assert_decoded(got: mx.array, expected: Array, dtype: str) -> None:
    """Equal to 1e-6 of the row's norm before the last rounding, which is to the dtype of the part."""
    norms = np.linalg.norm(expected, axis=-1, keepdims=True)
    slack = 1e-6 * norms + ULP[dtype] * np.abs(expected) + 1e-7
    assert (np.abs(np.array(got.astype(mx.float32)) - expected) <= slack).all()


@settings(max_examples=40, deadline=None)
@given(
    part=st.builds(PartSpec, st.integers(1, 3), st.sampled_from([16, 64, 80, 128]), st.sampled_from(sorted(MX))),
    groups=st.integers(0, 2),
    bits=st.integers(1, 8),
    seed=st.integers(0, 1 << 16),
)
def test_turboquant_even_is_what_its_format_says(part: PartSpec, groups: int, bits: int, seed: int) -> None:
    """Shifts to the bit; codes too, except for values within rounding of a boundary; decoding is equal."""
    recipe = turboquant_even_recipe(bits)
    codec, model = codec_of(recipe), reference.TurboQuantEven(recipe, part.width, part.dtype)
    array, rows = make_rows(seed, part, groups)
    encoded = codec.encode(array, recipe)
    tensors, (expected, gaps) = as_numpy(encoded), model.encode(rows)
    assert np.array_equal(tensors[2], expected[2])
    fields = [(part.width, bits)]
    different = reference.codes_of(tensors[0], fields)[0] != reference.codes_of(expected[0], fields)[0]
    assert (gaps[different] < 1e-4).all()
    if codec.trusted(encoded, recipe).item():
        assert_decoded(codec.decode(encoded, recipe, part), model.decode(tensors), part.dtype)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_large_channel_costs_the_others_nothing(bits: int) -> None:
    """Its error is its own; without the shifts the small channels have an error of the size of the large one's."""
    part = PartSpec(2, 64, "BF16")
    plain = np.random.default_rng(0).normal(size=(1, 2, 256, 64)).astype(np.float32)
    hard = plain.copy()
    hard[..., [9, 40]] *= np.float32([32, 8])
    small = [channel for channel in range(64) if channel not in (9, 40)]

    def error(recipe: Recipe, rows: Array) -> float:
        codec, array = codec_of(recipe), mx.array(rows).astype(mx.bfloat16)
        back = np.array(codec.decode(codec.encode(array, recipe), recipe, part).astype(mx.float32))
        return float(np.square(back - np.array(array.astype(mx.float32)))[..., small].mean())

    even = turboquant_even_recipe(bits)
    assert error(even, hard) < 1.2 * error(even, plain)
    assert error(turboquant_mse_recipe(bits), hard) > 5 * error(even, hard)


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65504.0), ("BF16", 3.3e38), ("F32", 3.3e38)])
def test_a_row_too_long_for_its_dtype_is_not_trusted(dtype: str, value: float) -> None:
    """Shifts bring small channels up to the largest, never over the range of the dtype."""
    rows = np.full((1, 1, 64, 128), value * 1e-4, np.float32)
    rows[0, 0, 5] = value
    recipe = turboquant_even_recipe(4)
    codec = codec_of(recipe)
    assert not codec.trusted(codec.encode(mx.array(rows).astype(MX[dtype]), recipe), recipe).item()


@pytest.mark.parametrize(
    "params",
    [
        (),
        (("bits", 4),),
        (("bits", 4), ("group", 32)),
        (("bits", 9), ("group", 64)),
        (("bits", 4), ("group", 64), ("other", 1)),
        (("bits", 8), ("unit", 1), ("group", 64)),
        turboquant_even_recipe(4, together=128).params,
    ],
)
def test_an_even_recipe_that_cannot_be_is_corrupt(params: tuple[tuple[str, int], ...]) -> None:
    """Recipes come from files."""
    recipe = Recipe("turboquant-even", 1, params)
    with pytest.raises(CorruptDataError):
        codec_of(recipe).tensors(PartSpec(2, 96, "F32"), recipe)


def test_it_fits_where_turboquant_does() -> None:
    """Narrow heads share a row; what cannot be rotated stays raw."""
    target = turboquant_even_recipe(4, together=128)
    codec = codec_of(target)
    assert dict(codec.fit(target, PartSpec(4, 64, "BF16")).params) == {"bits": 4, "log": 1, "fold": 2, "group": 64}
    assert codec.fit(target, PartSpec(3, 64, "BF16")) == turboquant_even_recipe(4)
    assert codec.fit(target, PartSpec(3, 100, "BF16")) == RAW


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: case["name"])
def test_golden_bytes_stay_readable(case: dict[str, Any]) -> None:
    """Bytes written by the first release decode to what they were, by MLX and by the formula of the format."""
    part = PartSpec(*case["part"])
    recipe = Recipe("turboquant-even", 1, tuple((k, v) for k, v in case["params"]))
    codec = codec_of(recipe)
    tensors = [
        device.to_array(np.frombuffer(bytes.fromhex(text), np.uint8).reshape(1, t.heads, t.rows(64), -1), t.dtype)
        for text, t in zip(case["tensors"], codec.tensors(part, recipe), strict=True)
    ]
    expected = np.array(case["values"], np.float32).reshape(1, part.heads, 64, part.width)
    assert_decoded(codec.decode(tensors, recipe, part), expected, part.dtype)
    fold = dict(recipe.params).get("fold", 1)
    wide = reference.TurboQuantEven(recipe, part.width * fold, part.dtype).decode(as_numpy(tensors))
    split = wide.reshape(1, part.heads // fold, 64, fold, part.width).transpose(0, 1, 3, 2, 4)
    assert_decoded(mx.array(split.reshape(expected.shape)), expected, part.dtype)
