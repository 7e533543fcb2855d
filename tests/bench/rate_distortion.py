"""KL against bits a value of profiles on small-lm: as it is, and with outlier channels in keys and values.

    python -m tests.bench.rate_distortion [--prefixes 40] [--profile NAME ...]

A minute. Codecs are those of the store, with its lossless rest; `small_llama.py` says what is left out. Intervals are
90 % of bootstrap resamples of prefixes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kvstore.bench.hard_model import AFFINE
from kvstore.codecs.codec import codec_of, is_packing
from kvstore.codecs.exact import LosslessCodec
from kvstore.codecs.profiles import PROFILES, Profile, parse_profile
from kvstore.core.layers import PARTS, PartSpec
from tests.bench.small_llama import KV, Codec, SmallLlama, cold_runs, measured
from tests.support.models import expand_small_lm, heldout_tokens

Array = np.ndarray[Any, Any]

VARIANTS: dict[str, tuple[str, ...]] = {"plain": (), "hard keys": ("keys",), "hard values": ("values",)}
BASELINE = "compact"


def profile_codec(name: str) -> Codec:
    """What the store makes of KV in this profile: whole groups encoded, the rest lossless."""
    profile, rest = parse_profile(name), LosslessCodec()

    def through(kv: KV) -> tuple[KV, int]:
        restored, bits = [], 0
        for number, layer in enumerate(kv):
            done = [
                _encoded(profile, rest, part, rows, number, len(kv)) for part, rows in zip(PARTS, layer, strict=True)
            ]
            restored.append((done[0][0], done[1][0]))
            bits += done[0][1] + done[1][1]
        return restored, bits

    return through


def _encoded(
    profile: Profile, rest: LosslessCodec, part_name: str, rows: Array, layer: int, n_layers: int
) -> tuple[Array, int]:
    """One part of one layer `[heads, tokens, width]`: what comes back, and its bits."""
    part = PartSpec(rows.shape[0], rows.shape[2], "BF16")
    recipe = profile.recipe(part_name, part, layer, n_layers)
    codec = codec_of(recipe)
    whole = 0 if is_packing(recipe) else rows.shape[1] // codec.group_tokens * codec.group_tokens
    decoded, bits = [rows[:, whole:]], 0
    if whole:
        tensors = codec.encode(mx.array(rows[None, :, :whole]).astype(mx.bfloat16), recipe)
        mx.eval(*tensors)
        bits = 8 * sum(tensor.nbytes for tensor in tensors)
        decoded.insert(0, np.array(codec.decode(tensors, recipe, part).astype(mx.float32))[0])
    if whole < rows.shape[1]:
        bits += 8 * len(rest.pack(exact_bytes(rows[:, whole:]), 2))
    return np.concatenate(decoded, 1), bits


def exact_bytes(rows: Array) -> Array:
    """Values of bfloat16 as their bytes."""
    halves = (np.ascontiguousarray(rows, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return halves.reshape(-1).view(np.uint8)


def main() -> None:
    """Print a row for each variant and profile."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--prefixes", type=int, default=40)
    asked.add_argument("--profile", action="append", default=[])
    options = asked.parse_args()
    names = [name for name in dict.fromkeys((BASELINE, *(options.profile or (*PROFILES, *AFFINE)))) if name != "exact"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = expand_small_lm(Path(scratch) / "small")
        print(f"{'model':12} {'profile':34} bits     KL       P99      top-1    KL / {BASELINE} (90 %)")
        for variant, hard in VARIANTS.items():
            model = SmallLlama(folder, hard)
            runs = cold_runs(model, folder, heldout_tokens(), options.prefixes)
            results = {name: measured(model, runs, profile_codec(name)) for name in names}
            for name, one in results.items():
                ratio, low, high = one.ratio(results[BASELINE])
                p99 = np.percentile(one.kl, 99)
                print(
                    f"{variant:12} {name:34} {one.bits:5.2f}  {one.mean:.2e} {p99:.1e}  {one.top1:7.2%}  "
                    f"{ratio:.3g} ({low:.3g} to {high:.3g})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
