"""Adapters of engines for the contract suite: each generates from a prompt with the store around its prefill.

Every adapter that is made is a new process as far as the store can tell: it has nothing in memory.
"""

from __future__ import annotations

import functools
import hashlib
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from kvstore.client.client import Client
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from tests.support.sessions import client_of

ROOT = Path(__file__).parents[2]
PATIENT = {"connect_ms": 5000, "stall_ms": 20_000, "total_ms": 60_000}
Answer = tuple[list[float], int]


class EngineAdapter(ABC):
    """An engine with its model and the store. All calls come from one thread."""

    @abstractmethod
    def generate(self, tokens: Sequence[int]) -> Answer:
        """What the engine computes after the prompt, as numbers, and how many of its tokens were not computed."""

    @abstractmethod
    def flush(self) -> bool:
        """Wait until all that was stored is durable."""

    @abstractmethod
    def close(self) -> None:
        """End the connection."""


class _Waiting:
    """A client whose sessions wait for a busy machine: a slow hit must not be a miss."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.sessions: list[Any] = []

    def session(self, namespace: Any, profile: str | None = None, **options: Any) -> Any:
        """As the client's."""
        made = self._client.session(namespace, profile or "exact", **{**options, **PATIENT})
        self.sessions.append(made)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Folder:
    """A model's folder, loaded once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model: Any = load_model(path)[0]

    def feed(self, cache: Any, tokens: Sequence[int]) -> list[float]:
        """The logits after the last token."""
        logits = self.model(mx.array([list(tokens)]), cache=cache)[0, -1].astype(mx.float32)
        numbers: list[float] = logits.tolist()
        return numbers


class OfMlxLm(EngineAdapter):
    """A generation loop on mlx-lm, with a prompt cache that has the methods of the stock server's."""

    def __init__(self, folder: Folder, daemon: Any, digests: WeightsDigest) -> None:
        self.folder = folder
        self.store = ModelStore(_Waiting(client_of(daemon)), digests)  # type: ignore[arg-type]
        self.key = (str(folder.path), None, None)
        self.store.pin(*self.key)
        self.cache = self._make()

    def _make(self) -> Any:
        flags = types.SimpleNamespace(kv_bits=None, kv_group_size=64, prompt_cache_bytes=None)
        names = {"model_key": self.key, "model": self.folder.model, "draft_model": None, "is_distributed": False}
        return kv.PromptCache(store=self.store, provider=types.SimpleNamespace(**names, cli_args=flags))

    def _fetch(self, tokens: list[int]) -> tuple[Any, list[int]]:
        found: tuple[Any, list[int]] = self.cache.fetch_nearest_cache(self.key, tokens)
        return found

    def _insert(self, tokens: list[int], cache: Any) -> None:
        self.cache.insert_cache(self.key, tokens, cache)

    def generate(self, tokens: Sequence[int]) -> Answer:
        """As the server does: nearest cache, the rest, and the cache of the whole prompt back."""
        prompt = list(tokens)
        cache, rest = self._fetch(prompt)
        cached = len(prompt) - len(rest)
        if cache is None:
            cache = make_prompt_cache(self.folder.model)
        logits = self.folder.feed(cache, rest)
        self._insert(prompt, cache)
        return logits, cached

    def flush(self) -> bool:
        """Of all its sessions."""
        return self.store.flush(60.0)

    def close(self) -> None:
        """Of all its sessions."""
        self.store.close(1.0)


class OfPrefixStore(EngineAdapter):
    """The documented loop around `PrefixStore`."""

    def __init__(self, folder: Folder, daemon: Any, digests: WeightsDigest) -> None:
        self.folder = folder
        self.prefixes = kv.PrefixStore(str(folder.path), daemon.listen, profile="exact", digests=digests)
        self.prefixes._store._client = _Waiting(client_of(daemon))  # type: ignore[assignment]
        assert self.prefixes.wait(60.0)

    def generate(self, tokens: Sequence[int]) -> Answer:
        """Fetched on entry, stored on exit."""
        with self.prefixes.prefix(self.folder.model, list(tokens)) as (cache, rest):
            return self.folder.feed(cache, rest), len(tokens) - len(rest)

    def flush(self) -> bool:
        """Of its sessions."""
        return self.prefixes.flush()

    def close(self) -> None:
        """Of its sessions."""
        self.prefixes.close(1.0)


class TinyEngine:
    """An engine that has nothing of mlx-lm: keys and values are small whole numbers, exact in any order of sums."""

    heads, width, layers = 2, 64, 2

    def __init__(self, seed: int) -> None:
        shape = (self.layers, 1024, self.heads, self.width)
        self._table = np.random.default_rng(seed).integers(0, 8, shape).astype(np.float32)

    def prefill(self, tokens: Sequence[int], cache: list[Any], n_tokens: int) -> list[Any]:
        """The cache after these tokens; `cache` has `n_tokens` before them. Values sum up what came before."""
        made = []
        for layer in range(self.layers):
            new = self._table[layer][[token % 1024 for token in tokens]].transpose(1, 0, 2)[None]
            keys, values = (
                (np.array(part)[..., :n_tokens, :] for part in cache[layer]) if cache else [new[..., :0, :]] * 2
            )
            last = values[..., -1:, :] if n_tokens else 0
            rows = [np.concatenate([keys, new], 2), np.concatenate([values, last + np.cumsum(new, 2)], 2)]
            made.append(tuple(map(mx.array, rows)))
        mx.eval(made)
        return made


class OfDocument(EngineAdapter):
    """The adapter that docs/plug-in.md prints, with an engine that does not know mlx-lm."""

    def __init__(self, folder: Folder, daemon: Any, digests: WeightsDigest) -> None:
        text = (ROOT / "docs" / "plug-in.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        names: dict[str, Any] = {}
        exec(block, names)  # noqa: S102  # our own document
        names["kvstore"] = types.SimpleNamespace(connect=lambda: _Waiting(client_of(daemon)))
        digest = hashlib.sha256((folder.path / "model.safetensors").read_bytes()).digest()
        self._adapter = names["Adapter"](TinyEngine(digest[0]), digest)

    def generate(self, tokens: Sequence[int]) -> Answer:
        """Sums of all that the cache holds after the prompt."""
        cache, restored = self._adapter.prefill(list(tokens))
        parts = [np.array(part)[..., : len(tokens) - 1, :] for pair in cache for part in pair]
        return [float(part.sum(dtype=np.float64)) for part in parts], restored

    def flush(self) -> bool:
        """Of its session."""
        return bool(self._adapter.session.flush())

    def close(self) -> None:
        """Of its client."""
        self._adapter.close()


def openai_server_cache() -> type:
    """The prompt cache of mlx-openai-server with the store behind it: what its handler calls is overridden."""
    from app.utils.prompt_cache import LRUPromptCache

    class OpenAIServerCache(LRUPromptCache):  # type: ignore[misc]  # it is not there when types are checked
        def __init__(self, *args: Any, store: ModelStore, key: Any, model: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._tier, self._key, self._epoch = store, key, store.epoch(key, model)
            self._layouts = [kv.probe(model)]

        def fetch_nearest_cache(self, tokens_ids: list[int], **options: Any) -> tuple[list[Any] | None, list[int]]:
            cache, rest = super().fetch_nearest_cache(tokens_ids, **options)
            covered = len(tokens_ids) - len(rest) if cache is not None else 0
            # Evaluated, since the engine may continue on another thread.
            found = self._tier.find(
                self._key, self._layouts, tokens_ids, covered, reserve=lambda nbytes: True, epoch=self._epoch
            )
            restored = found.restored(list) if found else None
            return (restored[0], tokens_ids[restored[1] :]) if restored else (cache, rest)

        def insert_cache(self, tokens_ids: list[int], prompt_cache: list[Any], **options: Any) -> None:
            self._tier.store(self._key, tokens_ids, prompt_cache, epoch=self._epoch)
            super().insert_cache(tokens_ids, prompt_cache, **options)

    return OpenAIServerCache


class OfOpenAIServer(OfMlxLm):
    """mlx-openai-server's cache and the calls of its handler."""

    def _make(self) -> Any:
        return openai_server_cache()(store=self.store, key=self.key, model=self.folder.model)

    def _fetch(self, tokens: list[int]) -> tuple[Any, list[int]]:
        found: tuple[Any, list[int]] = self.cache.fetch_nearest_cache(tokens, allowed_sources={"nonbatch"})
        return found

    def _insert(self, tokens: list[int], cache: Any) -> None:
        self.cache.insert_cache(tokens, cache)

    def close(self) -> None:
        """Its own files, too."""
        self.cache.close()
        super().close()


Maker = Callable[[Folder, Any, WeightsDigest], EngineAdapter]
ADAPTERS: dict[str, Maker] = {
    "mlx_lm.server": OfMlxLm,
    "PrefixStore": OfPrefixStore,
    "docs/plug-in.md": OfDocument,
    "mlx-openai-server": OfOpenAIServer,
}
# What must be installed for an adapter; the others need nothing more.
NEEDS = {"mlx-openai-server": "app.utils.prompt_cache"}


@functools.cache
def is_there(name: str) -> bool:
    """Whether the engine of an adapter is installed."""
    try:
        return name not in NEEDS or find_spec(NEEDS[name]) is not None
    except ModuleNotFoundError:
        return False
