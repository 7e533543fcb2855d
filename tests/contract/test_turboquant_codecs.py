"""turboquant-mse and turboquant-prod against their formats in numpy and bytes that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvstore.codecs import device
from kvstore.codecs.codec import codec_of
from kvstore.codecs.turboquant import turboquant_mse_recipe, turboquant_prod_recipe
from kvstore.core.blocks import RAW, Recipe
from kvstore.core.layers import PartSpec
from kvstore.errors import CorruptDataError
from tests.support import reference

GOLDEN = Path(__file__).parent.parent / "golden" / "turboquant.json"
ULP = {"BF16": 2**-8, "F16": 2**-11, "F32": 2**-22}
MX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
WIDTHS = (16, 64, 80, 96, 128, 192, 576)

Array = np.ndarray[Any, Any]

parts = st.builds(PartSpec, st.integers(1, 3), st.sampled_from(WIDTHS), st.sampled_from(sorted(MX)))
shapes = {"part": parts, "tokens": st.integers(1, 5), "seed": st.integers(0, 1 << 16)}


def make_rows(seed: int, part: PartSpec, tokens: int) -> tuple[mx.array, Array]:
    """[1, heads, tokens, width] of mixed sizes, with outliers, constant and zero rows; as an array and as float32."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(1, part.heads, tokens, part.width)) * rng.choice([1e-3, 1.0, 30.0], (1, 1, tokens, 1))
    rows[..., rng.integers(part.width)] *= 50
    rows[:, :, 1::4] = 0.75
    rows[:, :, 2::4] = 0.0
    array = mx.array(rows.astype(np.float32)).astype(MX[part.dtype])
    return array, np.array(array.astype(mx.float32))


def as_numpy(tensors: Any) -> list[Array]:
    """Words as uint32, scales as float32."""
    return [np.array(t if t.dtype == mx.uint32 else t.astype(mx.float32)) for t in tensors]


def assert_decoded(got: mx.array, expected: Array, dtype: str) -> None:
    """Equal to 1e-6 of the row's norm before the last rounding, which is to the dtype of the part."""
    values = np.array(got.astype(mx.float32))
    norms = np.linalg.norm(expected, axis=-1, keepdims=True)
    assert (np.abs(values - expected) <= 1e-6 * norms + ULP[dtype] * np.abs(expected) + 1e-7).all()


def assert_scales(got: Array, expected: Array, dtype: str) -> None:
    """Equal up to the order of float32 sums, and then up to the last bit of their dtype."""
    np.testing.assert_allclose(got, expected, rtol=4e-6 + 2 * ULP[dtype], atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    **(shapes | {"tokens": st.integers(0, 5)}),
    prod=st.booleans(),
    bits=st.integers(2, 8),
)
def test_turboquant_is_what_its_format_says(part: PartSpec, tokens: int, seed: int, prod: bool, bits: int) -> None:
    """Codes are those of the reference except for values within rounding of a boundary; decoding is equal."""
    make = turboquant_prod_recipe if prod else turboquant_mse_recipe
    recipe = make(bits, seed % 5)
    codec, model = codec_of(recipe), reference.TurboQuant(recipe, part.width, part.dtype)
    array, rows = make_rows(seed, part, tokens)
    encoded = codec.encode(array, recipe)
    tensors, (expected, gaps) = as_numpy(encoded), model.encode(rows)
    assert [t.shape for t in tensors] == [t.shape for t in expected]
    ours, theirs = (np.concatenate(reference.codes_of(words, model.fields), -1) for words in (tensors[0], expected[0]))
    levels = part.width
    different = ours != theirs
    assert (gaps[..., :levels][different[..., :levels]] < 1e-4).all()
    equal_rows = ~different[..., :levels].any(-1)  # elsewhere residuals and scales differ with the code
    assert_scales(tensors[1][..., :1][equal_rows], expected[1][..., :1][equal_rows], part.dtype)
    # A scale that was rounded up by one and down by the other leaves other residuals, too.
    equal_rows &= np.isclose(tensors[1][..., 0], expected[1][..., 0], rtol=4e-6, atol=0.0)
    assert (gaps[..., levels:][different[..., levels:] & equal_rows[..., None]] < 1e-4).all()
    assert_decoded(codec.decode(encoded, recipe, part), model.decode(tensors), part.dtype)


@settings(max_examples=40, deadline=None)
@given(
    width=st.sampled_from([16, 32, 64]),
    copies=st.integers(1, 2),
    tokens=st.integers(0, 5),
    seed=st.integers(0, 1 << 16),
    log=st.booleans(),
    dtype=st.sampled_from(sorted(MX)),
)
def test_narrow_heads_that_share_a_scale_are_rows_of_128_values(
    width: int, copies: int, tokens: int, seed: int, log: bool, dtype: str
) -> None:
    """Neighbouring heads, one after the other; what decodes is each head again."""
    fold = 128 // width
    part = PartSpec(fold * copies, width, dtype)
    target = turboquant_mse_recipe(4, log=log, together=128)
    codec = codec_of(target)
    recipe = codec.fit(target, part)
    assert recipe == Recipe("turboquant-mse", 1, (*turboquant_mse_recipe(4, log=log).params, ("fold", fold)))
    array, _ = make_rows(seed, part, tokens)
    wide = mx.concatenate([array[:, at::fold] for at in range(fold)], axis=-1)
    plain, whole = turboquant_mse_recipe(4, log=log), PartSpec(copies, 128, dtype)
    encoded = codec.encode(array, recipe)
    for got, expected in zip(encoded, codec.encode(wide, plain), strict=True):
        assert mx.array_equal(got, expected).item()
    assert [(t.heads, t.width) for t in codec.tensors(part, recipe)] == [(copies, t.shape[-1]) for t in encoded]
    decoded, expected = codec.decode(encoded, recipe, part), codec.decode(encoded, plain, whole)
    for at in range(fold):
        assert mx.array_equal(decoded[:, at::fold], expected[..., at * width : (at + 1) * width]).item()


@pytest.mark.parametrize("part", [PartSpec(3, 64, "BF16"), PartSpec(2, 96, "BF16"), PartSpec(2, 128, "BF16")], ids=str)
def test_heads_that_do_not_make_128_values_keep_scales_of_their_own(part: PartSpec) -> None:
    """An odd head, or a wide one."""
    target = turboquant_mse_recipe(4, together=128)
    assert codec_of(target).fit(target, part) == turboquant_mse_recipe(4)


@settings(max_examples=40, deadline=None)
@given(**shapes, bits=st.integers(1, 8), exponent=st.integers(-6, 6))
def test_scales_in_8_bits_are_the_nearest_of_twelve_steps_an_octave(
    part: PartSpec, tokens: int, seed: int, bits: int, exponent: int
) -> None:
    """The codes beside them are those of a scale in full; out of range they are not trusted."""
    recipe, full = turboquant_mse_recipe(bits, log=True), turboquant_mse_recipe(bits)
    codec, model = codec_of(recipe), reference.TurboQuant(recipe, part.width, part.dtype)
    array, _ = make_rows(seed, part, tokens)
    array = (array.astype(mx.float32) * 10.0**exponent).astype(array.dtype)
    assume(mx.all(mx.isfinite(array)).item())  # the store path keeps the others as they are
    rows = np.array(array.astype(mx.float32))
    encoded = codec.encode(array, recipe)
    tensors, (expected, _) = as_numpy(encoded), model.encode(rows)
    assert mx.array_equal(encoded[0], codec.encode(array, full)[0]).item()
    steps = np.abs(tensors[1].astype(np.int64) - expected[1].astype(np.int64))
    assert (steps <= 1).all() and (steps > 0).mean() < 0.2  # halfway between two steps, rounding decides
    assert encoded[1].dtype == mx.uint8
    if codec.trusted(encoded, recipe).item():
        assert (tensors[1] < 255).all()
        assert_decoded(codec.decode(encoded, recipe, part), model.decode(tensors), part.dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(
    "recipe",
    [
        turboquant_mse_recipe(4),
        turboquant_mse_recipe(4, log=True),
        turboquant_prod_recipe(4),
    ],
    ids=str,
)
def test_rows_too_long_for_their_dtype_are_not_trusted(recipe: Recipe, dtype: str) -> None:
    """All values finite, yet their norm, or what is decoded, need not be."""
    codec = codec_of(recipe)
    limit = 0.99 * float(mx.finfo(MX[dtype]).max)
    for row in (np.full(128, limit), np.eye(128)[3] * limit, np.where(np.arange(128) % 2, limit, -limit)):
        rows = mx.array(np.stack([row, np.ones(128)]).astype(np.float32)).astype(MX[dtype])[None, None]
        assert mx.all(mx.isfinite(rows)).item()
        assert not codec.trusted(codec.encode(rows, recipe), recipe).item()
    ordinary = mx.array(np.random.default_rng(1).normal(size=(1, 2, 3, 128)).astype(np.float32)).astype(MX[dtype])
    assert codec.trusted(codec.encode(ordinary * 100, recipe), recipe).item()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 16), dtype=st.sampled_from(sorted(MX)), exponent=st.floats(-6, 30), kind=st.integers(0, 2)
)
def test_what_is_trusted_decodes_to_finite_values(seed: int, dtype: str, exponent: float, kind: int) -> None:
    """Whatever the scale of the values."""
    part = PartSpec(1, 128, dtype)
    recipe = (
        turboquant_mse_recipe(3),
        turboquant_prod_recipe(3),
        turboquant_mse_recipe(3, log=True),
    )[kind]
    rows = np.random.default_rng(seed).normal(size=(1, 1, 3, 128)) * 10**exponent
    array = mx.array(np.clip(rows, -3e38, 3e38).astype(np.float32)).astype(MX[dtype])
    if mx.all(mx.isfinite(array)).item():
        codec = codec_of(recipe)
        tensors = codec.encode(array, recipe)
        if codec.trusted(tensors, recipe).item():
            assert mx.all(mx.isfinite(codec.decode(tensors, recipe, part))).item()


@pytest.mark.parametrize(
    "recipe", [turboquant_mse_recipe(3), turboquant_mse_recipe(8), turboquant_prod_recipe(4)], ids=str
)
def test_encoding_many_rows_takes_little_memory_beside_them(recipe: Recipe) -> None:
    """Float32 intermediates of some rows at a time: less than twice the rows, where those of all are 15 times."""
    array = mx.zeros((1, 4, 1 << 15, 128)) + 1
    mx.eval(array)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(codec_of(recipe).encode(array, recipe))
    assert mx.get_peak_memory() - before < 2 * array.nbytes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "recipe",
    [
        turboquant_mse_recipe(8),
        turboquant_mse_recipe(8, log=True),
        turboquant_prod_recipe(8),
    ],
    ids=str,
)
def test_values_that_are_not_finite_are_never_trusted(recipe: Recipe, value: float) -> None:
    """The store path keeps such rows raw before it comes to this; nothing may read out of a table's bounds either."""
    rows = np.ones((1, 1, 2, 128), np.float32)
    rows[0, 0, 1, 5] = value
    codec = codec_of(recipe)
    assert not codec.trusted(codec.encode(mx.array(rows), recipe), recipe).item()


@pytest.mark.parametrize(
    ("recipe", "width", "dtype"),
    [
        (Recipe("turboquant-mse"), 128, "F32"),
        (Recipe("turboquant-mse", 1, (("bits", 0),)), 128, "F32"),
        (Recipe("turboquant-mse", 1, (("bits", 9),)), 128, "F32"),
        (Recipe("turboquant-mse", 1, (("bits", 4), ("group", 64))), 128, "F32"),
        (Recipe("turboquant-mse", 1, (("bits", 4), ("unit", 2))), 128, "F32"),
        (Recipe("turboquant-mse", 1, (("bits", 4), ("seed", -1))), 128, "F32"),
        (Recipe("turboquant-prod", 1, (("bits", 1),)), 128, "F32"),
        (turboquant_mse_recipe(4), 12, "F32"),
        (turboquant_mse_recipe(4), 100, "F32"),
        (turboquant_mse_recipe(4), 65_536, "F32"),
        (turboquant_mse_recipe(4, unit=True), 128, "BF16"),
        (turboquant_mse_recipe(4, unit=True, log=True), 128, "F32"),
        (Recipe("turboquant-prod", 1, (("bits", 4), ("log", 1))), 128, "F32"),
        (Recipe("turboquant-mse", 1, (("bits", 4), ("fold", 0))), 64, "F32"),
        (Recipe("turboquant-mse", 1, (("bits", 4), ("fold", 3))), 64, "F32"),
        (Recipe("turboquant-mse", 1, (("bits", 4), ("fold", 1 << 20))), 64, "F32"),
        (turboquant_mse_recipe(4, together=128), 64, "F32"),
    ],
)
def test_a_recipe_that_cannot_be_is_corrupt(recipe: Recipe, width: int, dtype: str) -> None:
    """Recipes come from files; a wrong one must not reach the arithmetic."""
    with pytest.raises(CorruptDataError):
        codec_of(recipe).tensors(PartSpec(2, width, dtype), recipe)


@pytest.mark.parametrize("width", [7, 12, 100, 65_536])
def test_widths_that_cannot_be_rotated_or_packed_stay_raw(width: int) -> None:
    """Nothing is padded in secret."""
    recipe = turboquant_mse_recipe(4)
    assert codec_of(recipe).fit(recipe, PartSpec(1, width, "BF16")) == RAW


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: case["name"])
def test_golden_bytes_stay_readable(case: dict[str, Any]) -> None:
    """Bytes written by the first release decode to what they were, by MLX and by the formula of the format."""
    part = PartSpec(*case["part"])
    recipe = Recipe(case["recipe"], 1, tuple((k, v) for k, v in case["params"]))
    codec = codec_of(recipe)
    tensors = [
        device.to_array(np.frombuffer(bytes.fromhex(text), np.uint8).reshape(1, t.heads, case["tokens"], -1), t.dtype)
        for text, t in zip(case["tensors"], codec.tensors(part, recipe), strict=True)
    ]
    expected = np.array(case["values"], np.float32).reshape(1, part.heads, case["tokens"], part.width)
    assert_decoded(codec.decode(tensors, recipe, part), expected, part.dtype)
    fold = dict(recipe.params).get("fold", 1)
    wide = reference.TurboQuant(recipe, part.width * fold, part.dtype).decode(as_numpy(tensors))
    split = wide.reshape(1, part.heads // fold, case["tokens"], fold, part.width)
    formula = split.transpose(0, 1, 3, 2, 4).reshape(expected.shape)
    assert_decoded(mx.array(formula), expected, part.dtype)
