"""`kvstore bench ttft`: time to the first token of a model: cold, with the store, after the daemon restarted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from kvstore.bench.cases import BenchError, Case, Report, measure
from kvstore.bench.scratch import ScratchDaemon
from kvstore.integrations.mlx_lm import PrefixStore, loading
from kvstore.integrations.model_names import model_folder

COLD = "cold"
STEP_TOKENS = 2048
RESTARTS_MAX = 5


def run(model_path: str, seq_len: int, rounds: int, profile: str) -> Report:
    """One prompt of `seq_len` random tokens; with the store all of it but the last token is there already."""
    folder = model_folder(model_path)
    if folder is None or not folder.is_dir():
        raise BenchError(f"there is no model at {model_path}")
    with loading(model_path):
        model, config = load_model(folder)
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    bench = _FirstTokens(model, np.random.default_rng(0).integers(0, vocabulary, seq_len).tolist())
    with ScratchDaemon() as daemon:

        def connected() -> contextlib.AbstractContextManager[PrefixStore]:
            return prefix_store(str(folder), daemon.config.listen, profile)

        def restart() -> None:
            daemon.stop()
            daemon.start()

        def after_restart() -> float:
            with connected() as store:
                return bench.restored(store)

        with connected() as store:
            bench.restored(store)
            store.flush()
            cases = [Case(COLD, bench.cold), Case("with the store", lambda: bench.restored(store), COLD)]
            measured = measure(cases, rounds)
        restarted = measure([Case("after a restart", after_restart, before=restart)], min(rounds, RESTARTS_MAX), 0)
        facts = {"tokens restored / prompt": bench.restored_tokens / seq_len}
        shape = {"model": folder.name, "seq_len": seq_len, "profile": profile}
        return Report("ttft", shape, measured + restarted, facts)


class _FirstTokens:
    """Times the first token of one model and prompt, with and without the store.

    `restored_tokens`: tokens of the prompt that the last call of `restored` got from the store.
    """

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self._model = model
        self._prompt = prompt
        self.restored_tokens = 0

    def cold(self) -> None:
        """Without a store."""
        self._first(self._prompt, make_prompt_cache(self._model))

    def restored(self, store: PrefixStore) -> float:
        """Seconds from asking the store to the first token. What is new is stored afterwards."""
        started_s = time.perf_counter()
        with store.prefix(self._model, self._prompt) as (cache, rest):
            self._first(rest, cache)
            taken_s = time.perf_counter() - started_s
        self.restored_tokens = len(self._prompt) - len(rest)
        return taken_s

    def _first(self, tokens: list[int], cache: list[Any]) -> None:
        """Feed the tokens as mlx-lm does, in steps, and pick the next one."""
        for at in range(0, len(tokens), STEP_TOKENS):
            logits = self._model(mx.array([tokens[at : at + STEP_TOKENS]]), cache=cache)
            mx.eval(logits[:, -1].argmax(), [layer.state for layer in cache])


@contextlib.contextmanager
def prefix_store(folder: str, listen: str, profile: str) -> Iterator[PrefixStore]:
    """A PrefixStore for the model in `folder`, ready to use: its weights are hashed."""
    with PrefixStore(folder, listen, profile=profile) as store:
        store.wait()
        yield store
