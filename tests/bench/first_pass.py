"""When the codes of a hit are decoded: before the generation thread has it, or in its first forward pass.

    python tests/bench/first_pass.py [--tokens 2048 --tokens 32768] [--profile safe --profile compact] [--rounds 5]

A random model of 32 layers restores all but the last of its tokens and computes the next one. In one run, in turn:

    eager      another thread fetches and decodes each layer while it reads the next one; the generation thread has
               evaluated arrays (hits of `mlx_lm.server`, which fetches before a request's turn)
    lazy       layers are read, and decoded by the forward pass, when it is their turn (hits of `PrefixStore`)
    two        the same, decoded on a second stream of MLX's, so that layers are decoded while others compute

`first_token_s` runs from the call to the fetch to the evaluated token; `peak` is what MLX held at most, over the bytes
of the dense layers.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

import click
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from kvstore.client.client import connect
from kvstore.config import Config
from kvstore.integrations.caches import capture, layout, restore
from tests.support.daemon import DaemonProcess
from tests.support.models import write_llama
from tests.support.sessions import PATIENT
from tests.support.synthetic import make_namespace

LAYERS, HEADS, WIDTH = 32, 1, 128  # 16 KiB a token


def filled(model: Any, n_tokens: int) -> list[Any]:
    """A cache of so many tokens, of normal noise: what computing them would give does not matter here."""
    cache = make_prompt_cache(model)
    for layer in cache:
        layer.keys, layer.values = (mx.random.normal((1, HEADS, n_tokens, WIDTH)).astype(mx.bfloat16) for _ in "kv")
        layer.offset = n_tokens
        mx.eval(layer.keys, layer.values)
    return cache


class FirstPass:
    """One session and one model: three ways to the first token after a hit."""

    def __init__(self, model: Any, session: Any, prompt: list[int]) -> None:
        self._model, self._session, self._prompt = model, session, prompt
        self._other = ThreadPoolExecutor(1)
        self._stream = mx.new_stream(mx.default_device())

    def eager(self) -> Any:
        """Decoded on another thread."""
        return self._other.submit(self._session.fetch, self._prompt, evaluate=True).result()

    def lazy(self) -> Any:
        """Decoded by the forward pass."""
        return self._session.fetch(self._prompt)

    def two(self) -> Any:
        """Decoded by the forward pass, on a stream of its own."""
        with mx.stream(self._stream):
            return self._session.fetch(self._prompt)

    def timed(self, fetch: Callable[[], Any]) -> tuple[float, float, int]:
        """(seconds to the first token, peak of MLX's memory in bytes, the token)."""
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        started = time.perf_counter()
        hit = fetch()
        assert hit and hit.n_tokens == len(self._prompt) - 1, hit
        layers = restore(hit.layers)
        del hit
        token = self._model(mx.array([[1]]), cache=layers)[0, -1].argmax()
        mx.eval(token, [layer.state for layer in layers])
        return time.perf_counter() - started, mx.get_peak_memory() - held, int(token.item())


@click.command()
@click.option("--tokens", multiple=True, default=(2048, 32768))
@click.option("--profile", "profiles", multiple=True, default=("safe", "compact"))
@click.option("--rounds", default=5)
def main(tokens: tuple[int, ...], profiles: tuple[str, ...], rounds: int) -> None:
    """Print a JSON line for each profile and length."""
    with tempfile.TemporaryDirectory(prefix="kvstore-first-pass-") as scratch:
        model = load_model(write_llama(Path(scratch) / "model", LAYERS, HEADS, WIDTH, mx.bfloat16))[0]
        with DaemonProcess(Path(scratch) / "data", budget_bytes="8GB", min_quantize_tokens=1) as daemon:
            for profile in profiles:
                for n_tokens in tokens:
                    print(json.dumps(measured(daemon, model, profile, n_tokens, rounds)), flush=True)


def measured(daemon: DaemonProcess, model: Any, profile: str, n_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of one profile and length."""
    prompt = [n_tokens, len(profile), *range(n_tokens - 1)]  # nothing in common with other cases
    cache = filled(model, n_tokens)
    dense = sum(layer.nbytes for layer in cache)
    with connect(config=Config(listen=daemon.listen, memory_bytes=2 << 30)) as client:
        session = client.session(make_namespace(layout(cache)), profile, **PATIENT)  # type: ignore[arg-type]
        assert session.store(prompt[:n_tokens], capture(cache), wait=True).durable
        del cache
        passes = FirstPass(model, session, prompt)
        ways = {"eager": passes.eager, "lazy": passes.lazy, "two": passes.two}
        taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, fetch in ways.items():
                taken[name].append(passes.timed(fetch))
    report: dict[str, Any] = {"profile": profile, "tokens": n_tokens, "dense_bytes": dense}
    assert len({token for runs in taken.values() for _, _, token in runs}) == 1
    for name, runs in taken.items():
        seconds, peak = (statistics.median(one[at] for one in runs[1:]) for at in (0, 1))
        report[name] = {"first_token_s": round(seconds, 3), "peak": round(peak / dense, 2)}
    return report


if __name__ == "__main__":
    main()
