"""What every codec promises, whatever it does inside. A new codec adds its recipes to RECIPES and inherits the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs import device
from kvstore.codecs.affine import BITS, GROUPS, affine_recipe
from kvstore.codecs.codec import Codec, Context, check_runs, codec_of, codecs
from kvstore.codecs.exact import LOSSLESS
from kvstore.codecs.pca import PCA
from kvstore.codecs.per_channel import channel_recipe
from kvstore.codecs.turboquant import turboquant_mse_recipe, turboquant_prod_recipe
from kvstore.codecs.turboquant_even import turboquant_even_recipe
from kvstore.core.blocks import FIDELITY_EXACT, ITEM_BYTES, RAW, Recipe
from kvstore.core.layers import PartSpec
from kvstore.errors import CorruptDataError, UnknownFormatError
from tests.support.pca_bases import in_context, make_basis
from tests.support.stored import random_payload

GOLDEN = Path(__file__).parent.parent / "golden" / "affine.json"
RECIPES = [
    RAW,
    LOSSLESS,
    *(affine_recipe(bits, group) for bits in BITS for group in GROUPS),
    *(channel_recipe(bits) for bits in BITS),
    *(turboquant_mse_recipe(bits) for bits in (1, 2, 3, 4, 5, 8)),
    *(turboquant_prod_recipe(bits, seed=7) for bits in (2, 4, 8)),
    *(turboquant_mse_recipe(bits, log=True) for bits in (3, 4)),
    turboquant_mse_recipe(6, together=128),
    *(turboquant_even_recipe(bits, together=128) for bits in (3, 8)),
    Recipe(PCA),
]
DTYPES = ("BF16", "F16", "F32")
WIDTHS = (64, 80, 96, 128, 192, 576)

each_recipe = pytest.mark.parametrize(
    "target", RECIPES, ids=lambda r: "-".join([r.name, *(str(v) for _, v in r.params)])
)


def make_array(seed: int, part: PartSpec, layers: int, tokens: int) -> mx.array:
    """[layers, heads, tokens, width]."""
    shape = (layers, part.heads, tokens, part.width)
    payload = random_payload(np.random.default_rng(seed), part.dtype, int(np.prod(shape)))
    rows = np.frombuffer(payload, np.uint8).reshape(*shape[:3], part.width * ITEM_BYTES[part.dtype])
    return device.to_array(rows, part.dtype)


def fitted(target: Recipe, part: PartSpec, layers: int = 1) -> tuple[Codec, Recipe, Context]:
    """The recipe for this geometry, its codec, which is raw where `target` cannot be, and a context somewhere.

    That of `pca` names a basis that is made for the part.
    """
    recipe, context = target, Context(1000, "keys", tuple(range(layers)))
    if target.name == PCA:
        recipe, context = in_context(make_basis(part.heads, part.width, layers), layers, first_token=1000)
    recipe = codec_of(recipe).fit(recipe, part)
    return codec_of(recipe), recipe, context


def as_bytes(array: mx.array) -> bytes:
    """Evaluated, row-contiguous bytes."""
    array = mx.contiguous(array)
    mx.eval(array)
    return device.to_bytes(array).tobytes()


def rows_of(
    tensors: Sequence[mx.array], codec: Codec, recipe: Recipe, part: PartSpec, first: int, last: int
) -> list[mx.array]:
    """The rows of tokens `[first, last)`, multiples of the codec's group."""
    described = codec.tensors(part, recipe)
    return [array[:, :, t.rows(first) : t.rows(last)] for array, t in zip(tensors, described, strict=True)]


# Tokens are counted in the groups of the codec: what is no whole group never reaches it.
parts = st.builds(PartSpec, st.integers(1, 4), st.sampled_from(WIDTHS), st.sampled_from(DTYPES))
shapes = {"part": parts, "layers": st.integers(1, 2), "tokens": st.integers(1, 9), "seed": st.integers(0, 1 << 16)}


@each_recipe
@settings(max_examples=12, deadline=None)
@given(**shapes)
def test_what_encode_returns_is_what_tensors_says(
    target: Recipe, part: PartSpec, layers: int, tokens: int, seed: int
) -> None:
    """Names and geometry travel in the record; the bytes must agree with them."""
    codec, recipe, context = fitted(target, part, layers)
    tokens *= codec.group_tokens
    encoded = codec.encode(make_array(seed, part, layers, tokens), recipe, context)
    described = codec.tensors(part, recipe)
    assert len({tensor.name for tensor in described}) == len(described)
    for array, tensor in zip(encoded, described, strict=True):
        assert tensor.group_tokens in (1, codec.group_tokens)
        assert array.shape == (layers, tensor.heads, tensor.rows(tokens), tensor.width)
        assert device.dtype_name(array) == tensor.dtype


@each_recipe
@settings(max_examples=12, deadline=None)
@given(**shapes)
def test_decoding_gives_back_shape_and_dtype(
    target: Recipe, part: PartSpec, layers: int, tokens: int, seed: int
) -> None:
    """Never another dtype: an engine that gets fp32 for bf16 doubles its memory without saying so."""
    codec, recipe, context = fitted(target, part, layers)
    array = make_array(seed, part, layers, tokens * codec.group_tokens)
    decoded = codec.decode(codec.encode(array, recipe, context), recipe, part, context)
    assert decoded.shape == array.shape
    assert decoded.dtype == array.dtype
    assert mx.all(mx.isfinite(decoded)).item()


@each_recipe
@settings(max_examples=12, deadline=None)
@given(**shapes, cut=st.tuples(st.integers(0, 8), st.integers(1, 9)))
def test_encoding_a_slice_is_slicing_the_encoded(
    target: Recipe, part: PartSpec, layers: int, tokens: int, seed: int, cut: tuple[int, int]
) -> None:
    """Bit for bit, in both directions: this is why one block serves every prefix of it."""
    codec, recipe, context = fitted(target, part, layers)
    group = codec.group_tokens
    first = min(cut[0], tokens - 1) * group
    last = min(tokens * group, first + cut[1] * group)
    array = make_array(seed, part, layers, tokens * group)
    later = replace(context, first_token=context.first_token + first)
    whole = codec.encode(array, recipe, context)
    small = codec.encode(array[:, :, first:last], recipe, later)
    rows = rows_of(whole, codec, recipe, part, first, last)
    for a, b in zip(rows, small, strict=True):
        assert as_bytes(a) == as_bytes(b)
    cut_then_decoded = codec.decode(rows, recipe, part, later)
    assert as_bytes(cut_then_decoded) == as_bytes(codec.decode(whole, recipe, part, context)[:, :, first:last])


@each_recipe
def test_rows_of_zeros_decode_to_zeros(target: Recipe) -> None:
    """Head-room is zero-filled tensors that are decoded with the rest."""
    part = PartSpec(2, 128, "BF16")
    codec, recipe, context = fitted(target, part)
    zeros = [
        device.to_array(np.zeros((1, t.heads, t.rows(3 * codec.group_tokens), t.row_bytes), np.uint8), t.dtype)
        for t in codec.tensors(part, recipe)
    ]
    spare = replace(context, spare_tokens=zeros[0].shape[2])
    assert mx.all(codec.decode(zeros, recipe, part, spare) == 0).item()


@each_recipe
def test_fidelity_is_a_rank_below_exact_unless_nothing_is_lost(target: Recipe) -> None:
    """More bits rank higher, and only exact data has the highest rank."""
    part = PartSpec(1, 64, "F32")
    codec, recipe, context = fitted(target, part)
    rank = codec.fidelity(recipe)
    assert 0 < rank <= FIDELITY_EXACT
    array = make_array(1, part, 1, 4 * codec.group_tokens)
    decoded = codec.decode(codec.encode(array, recipe, context), recipe, part, context)
    assert (rank == FIDELITY_EXACT) == (as_bytes(decoded) == as_bytes(array))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    bits=st.sampled_from(BITS), group=st.sampled_from(GROUPS), seed=st.integers(0, 1 << 16), tokens=st.integers(1, 9)
)
def test_affine_is_what_mlx_makes_of_the_same_rows(dtype: str, bits: int, group: int, seed: int, tokens: int) -> None:
    """Codes, scales, biases and decoded values: bit-equal to mx.quantize and mx.dequantize."""
    part = PartSpec(3, 128, dtype)
    array = make_array(seed, part, 2, tokens)
    recipe = affine_recipe(bits, group)
    ours = codec_of(recipe).encode(array, recipe)
    theirs = mx.quantize(array, group_size=group, bits=bits)
    assert [as_bytes(a) for a in ours] == [as_bytes(a) for a in theirs]
    decoded = codec_of(recipe).decode(ours, recipe, part)
    assert as_bytes(decoded) == as_bytes(mx.dequantize(*theirs, group_size=group, bits=bits))


@pytest.mark.parametrize(
    ("heads", "width", "group", "expected"),
    [
        (8, 128, 64, affine_recipe(8, 64)),
        (8, 128, 128, affine_recipe(8, 128)),
        (8, 64, 128, affine_recipe(8, 32)),
        (8, 96, 64, affine_recipe(8, 32)),
        (8, 80, 64, affine_recipe(8, 64, fold=True)),
        (2, 80, 64, affine_recipe(8, 32, fold=True)),
        (1, 576, 64, affine_recipe(8, 64)),
        (1, 192, 128, affine_recipe(8, 32)),
        (1, 80, 64, RAW),
        (3, 7, 64, RAW),
    ],
)
def test_the_head_dim_rule_of_affine(heads: int, width: int, group: int, expected: Recipe) -> None:
    """The group as asked; else 32; else all heads of a token as one row; else raw."""
    target = affine_recipe(8, group)
    assert codec_of(target).fit(target, PartSpec(heads, width, "BF16")) == expected


def test_folded_heads_are_one_row_a_token() -> None:
    """Head dim 80: eight heads are ten groups of 64, at 0.531 of bf16."""
    part = PartSpec(8, 80, "BF16")
    recipe = affine_recipe(8, 64, fold=True)
    codec = codec_of(recipe)
    array = make_array(3, part, 2, 5)
    row = mx.contiguous(array.transpose(0, 2, 1, 3)).reshape(2, 1, 5, 640)
    encoded = codec.encode(array, recipe)
    assert [as_bytes(a) for a in encoded] == [as_bytes(a) for a in mx.quantize(row, group_size=64, bits=8)]
    assert sum(a.nbytes for a in encoded) / array.nbytes == pytest.approx(0.531, abs=1e-3)
    error = mx.abs(codec.decode(encoded, recipe, part) - array).max().item()
    assert error < 0.05


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65504.0), ("BF16", 3.0e38), ("F32", 3.0e38)])
@pytest.mark.parametrize("bits", BITS)
def test_affine_is_not_trusted_where_its_range_overflows(dtype: str, value: float, bits: int) -> None:
    """A row from -max to +max: in fp16 its scales are finite and mx.dequantize gives infinities all the same."""
    row = np.zeros((1, 1, 1, 64), np.float32)
    row[..., 5], row[..., 6] = value, -value
    array = mx.array(row).astype({"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[dtype])
    assert mx.all(mx.isfinite(array)).item()
    recipe = affine_recipe(bits, 64)
    codec = codec_of(recipe)
    tensors = codec.encode(array, recipe)
    assert not codec.trusted(tensors, recipe).item()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from(BITS),
    exponent=st.floats(-6, 4.9),
)
def test_what_affine_trusts_decodes_to_finite_values(seed: int, dtype: str, bits: int, exponent: float) -> None:
    """Up to the edge of fp16, whatever the scale of the values."""
    part = PartSpec(1, 64, dtype)
    array = make_array(seed, part, 1, 4) * 10**exponent
    array = array.astype({"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[dtype])
    recipe = affine_recipe(bits, 64)
    codec = codec_of(recipe)
    tensors = codec.encode(array, recipe)
    if codec.trusted(tensors, recipe).item():
        assert mx.all(mx.isfinite(codec.decode(tensors, recipe, part))).item()


@pytest.mark.parametrize("params", [(), (("bits", 8),), (("bits", 7), ("group", 64)), (("bits", 8), ("group", 48))])
def test_an_affine_recipe_that_cannot_be_is_corrupt(params: tuple[tuple[str, int], ...]) -> None:
    """Recipes come from files; a wrong one must not reach mx.dequantize."""
    recipe = Recipe("affine", 1, params)
    with pytest.raises(CorruptDataError):
        codec_of(recipe).tensors(PartSpec(2, 96, "BF16"), recipe)


@pytest.mark.parametrize("recipe", [Recipe("affine", 2), Recipe("zstd"), Recipe("")])
def test_an_unknown_recipe_is_refused_by_name(recipe: Recipe) -> None:
    """Data of a newer kvstore is not guessed at."""
    with pytest.raises(UnknownFormatError, match="version"):
        codec_of(recipe)


def test_names_and_versions_are_unique() -> None:
    """A recipe must find one codec only."""
    names = sorted((codec.name, codec.version) for codec in codecs())
    assert {("affine", 1), ("channel", 1), ("lossless", 1), ("raw", 1)} <= set(names)
    assert len(set(names)) == len(names)
    check_runs([])


def unpack_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of little-endian bit strings `[rows, words]`, without MLX."""
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    weights = 1 << np.arange(bits)
    return (stream.reshape(words.shape[0], -1, bits) * weights).sum(-1)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: case["name"])
def test_golden_affine_bytes_stay_readable(case: dict[str, object]) -> None:
    """Bytes written by the first release decode to what they were, by MLX and by the formula of the format."""
    part = PartSpec(*case["part"])  # type: ignore[misc]
    recipe = Recipe("affine", 1, tuple((k, v) for k, v in case["params"]))  # type: ignore[attr-defined]
    codec = codec_of(recipe)
    described = codec.tensors(part, recipe)
    n_tokens = int(case["tokens"])  # type: ignore[call-overload]
    raw = [bytes.fromhex(text) for text in case["tensors"]]  # type: ignore[attr-defined]
    tensors = [
        device.to_array(np.frombuffer(data, np.uint8).reshape(1, t.heads, n_tokens, -1), t.dtype)
        for data, t in zip(raw, described, strict=True)
    ]
    expected = np.array(case["values"], np.float32).reshape(1, part.heads, n_tokens, part.width)
    decoded = np.array(codec.decode(tensors, recipe, part).astype(mx.float32))
    tolerance = {"BF16": 2**-7, "F16": 2**-10, "F32": 2**-22}[part.dtype] * np.abs(expected).max()
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=tolerance)

    words, heads = described[0].width, described[0].heads
    codes = unpack_codes(np.frombuffer(raw[0], "<u4").reshape(-1, words), recipe.param("bits"))
    scales, biases = (
        np.repeat(np.array(t.astype(mx.float32)).reshape(codes.shape[0], -1), recipe.param("group"), -1)
        for t in tensors[1:]
    )
    formula = (codes * scales + biases).reshape(heads, n_tokens, -1)
    if ("fold", 1) in recipe.params:
        formula = formula[0].reshape(n_tokens, part.heads, part.width).transpose(1, 0, 2)
    np.testing.assert_allclose(formula[None], expected, rtol=0, atol=tolerance)
