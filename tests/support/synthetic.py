"""Synthetic KV in which every row says which prefix it belongs to.

The row of token t is a function of tokens[: t + 1], the layer and the part, so that a fetch which returns another
prefix's rows, or the right rows at the wrong place, cannot compare equal.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from kvstore.core.keys import Namespace
from kvstore.core.layers import KVLayer, LayerSpec, Layout, PartSpec

MX_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
STEP_TOKENS = 256


def make_layout(
    layers: int = 2, heads: int = 2, width: int = 64, dtype: str = "BF16", values_width: int = -1
) -> Layout:
    """Equal layers of plain KV."""
    keys = PartSpec(heads, width, dtype)
    values = PartSpec(heads, width if values_width < 0 else values_width, dtype)
    return Layout((LayerSpec(keys, values),) * layers)


def make_namespace(layout: Layout, name: str = "model", **fields: object) -> Namespace:
    """A namespace whose weights are named, not hashed."""
    dtype = layout.layers[0].keys.dtype
    return Namespace(weights=name.encode(), layout=layout, dtype=dtype, engine="test 1", alias=name, **fields)  # type: ignore[arg-type]


def prefix_seeds(tokens: Sequence[int]) -> np.ndarray:
    """One 32-bit number a position, a function of all tokens up to it."""
    seeds, running = np.empty(len(tokens), np.uint64), 0
    for at, token in enumerate(tokens):
        running = zlib.crc32(int(token).to_bytes(8, "little", signed=True), running ^ 0x9E3779B9)
        seeds[at] = running
    return seeds


def rows(tokens: Sequence[int], layer: int, part: str, heads: int, width: int) -> np.ndarray:
    """float32 `[heads, tokens, width]` in (-1, 1), exact in bfloat16 and float16."""
    seeds = prefix_seeds(tokens)[None, :, None]
    columns = np.arange(1, width + 1, dtype=np.uint64)[None, None, :]
    planes = np.arange(1, heads + 1, dtype=np.uint64)[:, None, None]
    mixed = (seeds + np.uint64(layer * 7919 + len(part))) * np.uint64(2654435761) * columns * np.uint64(40503) * planes
    mixed ^= mixed >> np.uint64(29)
    return ((mixed % np.uint64(255)).astype(np.float32) - 127) / 128


def make_layers(layout: Layout, tokens: Sequence[int], slack: int = 0) -> list[KVLayer]:
    """Evaluated cache layers of these tokens; `slack` rows of garbage beyond them, as engines leave them."""
    made: list[KVLayer] = []
    for index, spec in enumerate(layout.layers):
        arrays: dict[str, tuple[mx.array, ...]] = {}
        for name in ("keys", "values"):
            part = spec.part(name)
            data = rows(tokens, index, name, part.heads, part.width)
            garbage = np.full((part.heads, slack, part.width), 99.0, np.float32)
            array = mx.array(np.concatenate([data, garbage], axis=1)[None]).astype(MX_DTYPES[part.dtype])
            arrays[name] = (array,) if part.width else ()
        mx.eval(*arrays["keys"], *arrays["values"])
        made.append(KVLayer(spec, arrays["keys"], arrays["values"], len(tokens)))
    return made


def as_numpy(array: mx.array, n_tokens: int) -> np.ndarray:
    """The first `n_tokens` rows as float32 `[heads, tokens, width]`."""
    return np.array(array[0, :, :n_tokens].astype(mx.float32))


def expected_affine(array: mx.array, bits: int, group: int) -> mx.array:
    """What mlx itself makes of these rows."""
    codes, scales, biases = mx.quantize(array, group_size=group, bits=bits)
    return mx.dequantize(codes, scales, biases, group_size=group, bits=bits)


def assert_rows(
    layers: Sequence[KVLayer], layout: Layout, tokens: Sequence[int], bits: int = 0, group: int = 64
) -> None:
    """The layers hold exactly the rows of `tokens`: bit for bit at raw, equal to mlx's own quantization at `bits`."""
    for index, (layer, spec) in enumerate(zip(layers, layout.layers, strict=True)):
        assert layer.n_tokens == len(tokens)
        for name in ("keys", "values"):
            part = spec.part(name)
            if not part.width:
                assert layer.part(name) == ()
                continue
            (array,) = layer.part(name)
            assert array.dtype == MX_DTYPES[part.dtype]
            want = mx.array(rows(tokens, index, name, part.heads, part.width)).astype(MX_DTYPES[part.dtype])
            if bits:
                want = expected_affine(want, bits, group)
            got = array[0, :, : len(tokens)]
            assert mx.array_equal(got, want).item(), f"layer {index} {name}: wrong rows"
