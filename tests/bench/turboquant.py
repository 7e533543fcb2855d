"""TurboQuant on this machine: error, bytes and time beside MLX's own quantization of the same vectors.

    python tests/bench/turboquant.py [--dim 128] [--vectors 16384]

Times are the median of 15 rounds after a warm-up, everything evaluated, peers in turn within each round, so that what
else the machine does falls on both. Ratios are what to read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from kvstore.codecs.affine import affine_recipe
from kvstore.codecs.codec import codec_of
from kvstore.codecs.turboquant import turboquant_mse_recipe, turboquant_prod_recipe
from kvstore.core.blocks import RAW, Recipe
from kvstore.core.layers import PartSpec
from kvstore.turboquant import KVCacheConfig, QuantizedKVCache, QuantStrategy

ROUNDS = 15
KEYS = 8192
BITS = 4
RECIPES = {
    "affine 4": affine_recipe(BITS, 64),
    "turboquant-mse 2": turboquant_mse_recipe(2),
    "turboquant-mse 3": turboquant_mse_recipe(3),
    "turboquant-mse 4": turboquant_mse_recipe(4),
    "turboquant-mse 4, unit": turboquant_mse_recipe(4, unit=True),
    "turboquant-mse 8": turboquant_mse_recipe(8),
    "turboquant-prod 4": turboquant_prod_recipe(4),
    "affine 8": affine_recipe(8, 64),
}


def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median time of each call, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(ROUNDS + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            mx.eval(call())
            if round_number >= 2:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def bench_codecs(dim: int, n: int, dtype: str) -> None:
    """Error of unit vectors, bytes, and encode and decode beside mx.quantize and mx.dequantize with group 64."""
    rows = np.random.default_rng(0).normal(size=(1, 8, n // 8, dim))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    array = mx.array(rows.astype(np.float32)).astype({"F32": mx.float32, "BF16": mx.bfloat16}[dtype])
    part = PartSpec(8, dim, dtype)
    peer = mx.quantize(array, group_size=64, bits=BITS)
    mx.eval(array, *peer)
    print(f"\n{n} unit vectors of {dim}, {dtype}: error, bytes; time x mx.quantize, x mx.dequantize (4 bits, g64)")
    for name, target in RECIPES.items():
        codec = codec_of(target)
        recipe = codec.fit(target, part)
        if recipe == RAW:
            continue
        packed = codec.encode(array, recipe)
        mx.eval(*packed)
        error = mx.square(codec.decode(packed, recipe, part).astype(mx.float32) - array).sum().item() / n
        times = seconds(_calls(array, packed, peer, recipe, part))
        encode, decode = times["encode"] / times["quantize"], times["decode"] / times["dequantize"]
        size = sum(t.nbytes for t in packed) / n
        print(f"  {name:24s} {error:.3e} {size:6.1f} B   encode {encode:5.2f} x  decode {decode:5.2f} x")


def _calls(array: mx.array, packed: Any, peer: Any, recipe: Recipe, part: PartSpec) -> dict[str, Callable[[], Any]]:
    codec = codec_of(recipe)
    return {
        "quantize": lambda: mx.quantize(array, group_size=64, bits=BITS),
        "encode": lambda: codec.encode(array, recipe),
        "dequantize": lambda: mx.dequantize(*peer, group_size=64, bits=BITS),
        "decode": lambda: codec.decode(packed, recipe, part),
    }


def bench_scores(dim: int) -> None:
    """One query against many packed keys: on their codes, and by decoding them first."""
    rows = np.random.default_rng(1).normal(size=(KEYS, dim))
    rows = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    query = mx.array(rows[0])
    print(f"\nscores of one query over {KEYS} keys of {dim}, {BITS} bits")
    for strategy in QuantStrategy:
        cache = QuantizedKVCache(KVCacheConfig(dim, key_bits=BITS, key_strategy=strategy))
        cache.append(rows, rows)
        times = seconds(
            {
                "on codes": lambda cache=cache: cache.attention_scores(query),
                "decoded": lambda cache=cache: (cache.reconstruct_keys() * query).sum(-1),
                "decoded, matmul": lambda cache=cache: cache.reconstruct_keys() @ query,
            }
        )
        own = times["on codes"]
        peers = f"{times['decoded'] / own:.2f} x (with mx.matmul {times['decoded, matmul'] / own:.2f} x)"
        print(f"  {strategy.value:5s} {1e3 * own:.2f} ms; decode then dot {peers}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vectors", type=int, default=16_384)
    options = parser.parse_args()
    for dtype in ("F32", "BF16"):
        bench_codecs(options.dim, options.vectors, dtype)
    bench_scores(options.dim)


if __name__ == "__main__":
    main()
