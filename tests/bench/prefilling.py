"""How fast other answers are written while a prompt is stored as it is computed, over how fast they are otherwise.

    python tests/bench/prefilling.py [--tokens 2048] [--rounds 15]

The batch of `mlx_lm.server`: one slot decodes, a prompt of `--tokens` joins and is computed in steps of 256, each of
which is stored, with a token of the other slot between two steps. Rounds with and without the store alternate. `ratio`
is of the decoded tokens a second while the prompt is computed, the median of pairs of rounds; `stored` says how much of
the prompt the daemon held at its last step; `copying` is the share of the time that the generation thread copied.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

import click
import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load_model

from kvstore.client import connect
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prefilling import StoringBatch
from kvstore.integrations.prompt_cache import PromptCache
from tests.support.daemon import DaemonProcess
from tests.support.limits import small_config
from tests.support.models import write_llama
from tests.test_prompt_cache import Provider

STEP = 256
LAYERS, HEADS, WIDTH = 2, 4, 128  # 4 KiB a token


class Timed(PromptCache):
    """A prompt cache that notes how long it copied."""

    seconds = 0.0

    def store_part(self, *given: Any, **named: Any) -> int:
        """As it is, timed."""
        started = time.perf_counter()
        try:
            return super().store_part(*given, **named)
        finally:
            self.seconds += time.perf_counter() - started


def computed(batch: Any, prompt: list[int], cache: PromptCache | None, key: Any) -> tuple[float, float]:
    """(tokens a second of the other slot while the prompt is computed, seconds that took)."""
    batch.insert([[1, 2, 3]], max_tokens=[100_000])
    for _ in range(4):
        batch.next()
    if cache is not None:
        cache.fetch_nearest_cache(key, prompt)
    (uid,) = batch.insert_segments([[prompt]], max_tokens=[1])
    started, made = time.perf_counter(), 0
    while True:
        prompts, generated = batch.next()
        made += sum(one.uid != uid for one in generated)
        if any(one.end_of_prompt for one in prompts if one.uid == uid):
            break
    seconds = time.perf_counter() - started
    batch.close()
    return made / seconds, seconds


@click.command()
@click.option("--tokens", "n_tokens", default=2048)
@click.option("--rounds", default=15)
def main(n_tokens: int, rounds: int) -> None:
    """Print one JSON line."""
    with tempfile.TemporaryDirectory(prefix="kvstore-prefilling-") as scratch:
        folder = write_llama(Path(scratch) / "model", LAYERS, HEADS, WIDTH, mx.bfloat16)
        model, key = load_model(folder)[0], (str(folder), None, None)
        digests = WeightsDigest(Path(scratch) / "cache")
        digests.wait(str(folder), 60.0)
        with DaemonProcess(Path(scratch) / "data", profile="raw", budget_bytes="8GB") as daemon:
            store = ModelStore(
                connect(config=small_config(daemon.listen, prefill_part_tokens=STEP)), digests, slow_hits=True
            )
            cache = Timed(0, store=store, provider=Provider(key, model))
            rates: dict[bool, list[float]] = {False: [], True: []}
            held: list[float] = []
            copying: list[float] = []
            for number in range(2 * rounds + 2):
                prompt = [number + 5, *(at % 4000 for at in range(n_tokens - 1))]
                if number % 2:
                    batch: Any = StoringBatch(model, prefill_step_size=STEP, prompt_cache=cache)
                else:
                    batch = BatchGenerator(model, prefill_step_size=STEP)
                cache.seconds = 0.0
                rate, seconds = computed(batch, prompt, cache if number % 2 else None, key)
                if number % 2:
                    (session,) = store._sessions.values()
                    copying.append(cache.seconds / seconds)
                    held.append(session.match(prompt).n_tokens / n_tokens)
                    store.flush(60.0)
                if number > 1:
                    rates[bool(number % 2)].append(rate)
            store.close()
    with_store, without = (statistics.median(rates[one]) for one in (True, False))
    pairs = [one / other for one, other in zip(rates[True], rates[False], strict=True)]
    print(
        json.dumps(
            {
                "tokens": n_tokens,
                "tokens_per_s": {"without": round(without, 3), "with": round(with_store, 3)},
                "ratio": round(statistics.median(pairs), 3),
                "stored": round(statistics.median(held), 2),
                "copying": round(statistics.median(copying), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
