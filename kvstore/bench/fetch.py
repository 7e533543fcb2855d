"""`kvstore bench fetch`: from the request to evaluated, verified cache layers, against loads without a store."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from kvstore.bench.cases import Case, Report, measure
from kvstore.bench.rig import Rig, fetch, rig
from kvstore.bench.shape import Shape, arrays_of, load, save

BITS, GROUP = 8, 64
CODED = f"affine{BITS}"


def run(shape: Shape, rounds: int) -> Report:
    """Raw and 8-bit KV, packed and dense, beside one file of the same arrays or codes."""
    with rig(shape) as made:
        stored = {profile: made.put(profile).new_bytes for profile in ("raw", CODED)}
        plain, codes = (made.daemon.folder / f"{name}.safetensors" for name in ("plain", "codes"))
        arrays = arrays_of(shape.kv())
        save(plain, arrays)
        save(codes, [part for array in arrays for part in mx.quantize(array, GROUP, BITS)])
        del arrays
        mx.clear_cache()
        measured = measure(_cases(made, plain, codes), rounds)
    return Report(
        "fetch", asdict(shape), measured, {f"{name} bytes stored / raw": n / shape.nbytes for name, n in stored.items()}
    )


def _cases(made: Rig, plain: Path, codes: Path) -> Sequence[Case]:
    shape, tokens = made.shape, made.shape.tokens(0)
    raw, coded = made.session("raw"), made.session(CODED)

    def case(name: str, run: object, ceiling: str, at_most: float | None = None) -> Case:
        assert callable(run)
        return Case(name, run, ceiling, shape.nbytes, at_most)

    return [
        case("load of one file", functools.partial(load, plain), ""),
        case("load and dequantize of one file", functools.partial(dequantize, codes), ""),
        case(
            "raw, packed, path",
            functools.partial(fetch, shape, raw, tokens, "packed", "path"),
            "load of one file",
            1.4,
        ),
        case(
            "raw, packed, stream", functools.partial(fetch, shape, raw, tokens, "packed", "stream"), "load of one file"
        ),
        case(
            "8-bit, packed, path",
            functools.partial(fetch, shape, coded, tokens, "packed", "path"),
            "load and dequantize of one file",
            1.1,
        ),
        case(
            "8-bit, dense, stream",
            functools.partial(fetch, shape, coded, tokens, "dense", "stream"),
            "8-bit, packed, path",
            1.6,
        ),
    ]


def dequantize(path: Path) -> list[mx.array]:
    """The arrays whose codes, scales and biases stand in the file, evaluated."""
    parts = load(path)
    triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    arrays = [mx.dequantize(codes, scales, biases, GROUP, BITS) for codes, scales, biases in triples]
    mx.eval(arrays)
    return arrays
