"""What a fingerprint and a stamp of a model cost, by number of parameters: `python tests/bench/fingerprint.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from kvstore.integrations.fingerprint import fingerprint, stamp

ROUNDS = 15
ARGS: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
}


def times_ms(call: Callable[[Any], object], model: Any) -> list[float]:
    """Milliseconds of each round, sorted."""
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call(model)
        found.append((time.perf_counter() - started) * 1e3)
    return sorted(found)


def main() -> None:
    """One row for each model and call: P50 and the longest, and P50 for 1,000 parameters."""
    print(f"{'parameters':>10} {'call':<12} {'P50 ms':>8} {'max ms':>8} {'P50 ms per 1,000':>17}")
    for layers, quantized in ((111, False), (111, True)):
        model = llama.Model(llama.ModelArgs(**ARGS, num_hidden_layers=layers))
        if quantized:
            nn.quantize(model)
        mx.eval(model.parameters())
        count = len(tree_flatten(model.parameters()))
        for name, call in (("fingerprint", fingerprint), ("stamp", stamp)):
            found = times_ms(call, model)
            middle = statistics.median(found)
            print(f"{count:>10} {name:<12} {middle:>8.1f} {found[-1]:>8.1f} {middle / count * 1e3:>17.1f}")


if __name__ == "__main__":
    main()
