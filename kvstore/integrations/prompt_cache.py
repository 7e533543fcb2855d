"""The prompt cache of `mlx_lm.server` with the store behind it.

The stock `LRUPromptCache` remains the in-memory tier. A fetch gets from the store what memory does not have; an insert
also stores. The server calls both on its one generation thread, which owns the arrays, and any exception ends that
thread. So the store never causes an exception here, and a fetch always leaves at least one token to feed.
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from kvstore.client import connect
from kvstore.config import Config
from kvstore.core.layers import Layout
from kvstore.errors import KVStoreError, UnsupportedLayerError
from kvstore.integrations.caches import align, layout, probe, quantized
from kvstore.integrations.epochs import Epoch, InFlight
from kvstore.integrations.model_names import ModelKey
from kvstore.integrations.models import GAIN_TOKENS_MIN, ModelStore
from kvstore.integrations.prefilling import PartialPrompt, View, store_part
from kvstore.integrations.restoring import FoundPrefix
from kvstore.integrations.speed import PrefillSpeed
from kvstore.integrations.touches import FirstTouches

log = logging.getLogger(__name__)

# What tracing foreign model code may raise; such a model is served without the store until something was inserted.
MODEL_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_MEMORY_SHARE = 8
_UNBOUNDED = 1 << 63


def default_memory_bytes() -> int:
    """Default size of the memory tier in bytes: an eighth of the machine's memory.

    The stock server bounds the number of sequences only, and ten long ones fill a machine.
    """
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MEMORY_SHARE


@dataclass(frozen=True, slots=True)
class Expected:
    """Result of looking up a prompt early: `found` in the store, and `covered` tokens in memory at that time."""

    model: ModelKey
    tokens: list[int]
    found: FoundPrefix | None
    covered: int

    def holds(self, model: ModelKey, epoch: Epoch | None, tokens: list[int], covered: int) -> bool:
        """Whether it still says what to do about a prompt of which memory has `covered` tokens now.

        Not if it was answered with nothing because memory had more: entries leave memory while a request waits.
        """
        if (self.model, self.tokens) != (model, tokens):
            return False
        return covered >= self.covered if self.found is None else self.found.epoch == epoch


def _as_list(tokens: Any) -> list[int]:
    """Tokens as the stock class wants them: an array's elements would be arrays."""
    return tokens if isinstance(tokens, list) else list(tokens.tolist() if hasattr(tokens, "tolist") else tokens)


def _provider_of(cache: Any) -> Any:
    """The provider of the ResponseGenerator that has the cache and shows it none; None if none has it.

    The garbage collector knows who refers to an object; it looks at all that there are, some 50 ms for a million.
    """
    for holder in gc.get_referrers(cache):
        held = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        if held.get("prompt_cache") is cache and "model_provider" in held:
            return held["model_provider"]
    return None


class PromptCache(LRUPromptCache):
    """Drop-in for `mlx_lm.server.LRUPromptCache`. Methods are called on the generation thread, unless they say any.

    `speed` says how fast prompts are computed, as far as somebody has measured it; `computing` is the prompt that was
    looked up last, which the engine computes next (see `prefilling`).

    `provider` is the server's ModelProvider: from its model the layout is known before anything was inserted, from its
    flags whether the engine quantizes its caches. Without it, that of the server's ResponseGenerator is taken when this
    first calls. In a program that has neither, layouts are learned from what is inserted, and the store must be shown
    each model that was loaded, by `store.epoch(key, model)`: until then its identity is pending.

    Several server processes working as one (`is_distributed`) must all see the same hits, so these use the tier in
    memory alone.

    `slow_hits`: without a `store`, return its hits even when prefill would be faster.

    `max_bytes` bounds the tier in memory strictly. Without it the bound is `default_memory_bytes`, and the newest
    sequence is kept beside it if it is larger. For what the store does not take (no daemon, no identity) the bound of
    the stock class holds: `max_size` sequences of any size. No sequence that does not fit pushes out others.

    Entries in memory stand under (model key, epoch), so that a model that was loaded again from other files meets none
    of those before. A cache that was begun before that and comes back after it is dropped, and counted.
    """

    def __init__(
        self,
        max_size: int = 10,
        max_bytes: int | None = None,
        *,
        store: ModelStore | None = None,
        provider: Any = None,
        slow_hits: bool = False,
    ) -> None:
        super().__init__(max_size, default_memory_bytes() if max_bytes is None else max_bytes)
        self._is_strict = max_bytes is not None
        self._store = store or ModelStore(connect(), slow_hits=slow_hits)
        self._is_placed = provider is not None
        self._serve(provider)
        self._learned: dict[ModelKey, list[Layout]] = {}
        self._probed: tuple[Any, list[Layout]] = (lambda: None, [])
        self._expected: Expected | None = None
        self._in_flight = InFlight()
        self._touches = FirstTouches(self._offer, self._store.flush)
        self._store.endings.add(self._touches.end)
        self.computing: PartialPrompt | None = None
        self.speed = PrefillSpeed()

    def fetch_nearest_cache(self, model: Any, tokens: Iterable[int]) -> tuple[list[Any] | None, list[int]]:
        """(cache of a prefix of `tokens`, the tokens left to feed: at least one), from memory or the store."""
        tokens = _as_list(tokens)
        epoch = self._epoch(model)
        wanted = tokens[: self.limit(model)]
        cache, rest = self._from_memory(model, epoch, wanted)
        covered = len(wanted) - len(rest)
        touch = self._touches.begin(model, tokens, covered) if self._enabled else None
        if self._enabled and (found := self._from_store(model, epoch, tokens, wanted, covered)):
            cache, covered = found
            log.debug("prefix of %d of %d tokens from the store", covered, len(tokens))
        self._in_flight.begin(model, tokens, epoch, cache)
        self.computing = PartialPrompt(model, tokens, epoch, covered, touch) if epoch is not None else None
        return cache, tokens[covered:]

    def covered(self, model: ModelKey, tokens: list[int]) -> int:
        """About how many leading tokens of a prompt memory has, for `find`. Any thread; 0 for a model not loaded."""
        loaded, layouts = self._probed
        if not self._enabled or loaded() is None or self._provider.model_key != model:
            return 0
        wanted = tokens[: self._limit(layouts)]
        cuttable = all(not one.exact_layers for one in layouts)
        return self._in_memory((model, self._store.epoch(model)), wanted, cuttable=cuttable)

    def find(
        self, model: ModelKey, tokens: list[int], covered: int, reserve: Callable[[int], bool]
    ) -> FoundPrefix | None:
        """What the store has of a prompt beyond what memory has, for `expect`. Any thread; a model that is loaded."""
        loaded, layouts = self._probed
        if not self._enabled or loaded() is None or self._provider.model_key != model:
            return None
        epoch = self._store.epoch(model)
        wanted = tokens[: self._limit(layouts)]
        return self._store.find(model, layouts, wanted, covered, self.speed.get(model), reserve, epoch)

    def expect(self, expected: Expected | None) -> None:
        """The next prompt was looked up already: take what was found, and ask the store only if memory has less now."""
        self._expected = expected

    def insert_cache(
        self, model: Any, tokens: Iterable[int], prompt_cache: Iterable[Any], *, cache_type: str = "assistant"
    ) -> None:
        """Keep the cache in memory and store what is new of it.

        The stock class believes that the cache holds all of `tokens`. With a draft model it holds fewer, and a later
        hit would skip tokens; so tokens and layers are cut to what both have. A cache that another state of the model
        began is left out.
        """
        tokens, prompt_cache = _as_list(tokens), list(prompt_cache)
        epoch = self._epoch(model)
        if not self._in_flight.accepts(model, tokens, epoch, prompt_cache):
            self._store.count_changed(model)
            return
        n_tokens = None
        with self._store.guard():
            n_tokens = align(prompt_cache, len(tokens))
        if n_tokens == 0:
            return
        held = tokens if n_tokens is None else tokens[:n_tokens]
        stored = False
        # System prompts are asked for again, so they are written at once.
        touch = self._touches.of(model, held) if self._enabled and cache_type != "system" else None
        if self._enabled:
            with self._store.guard():
                self._learn(model, prompt_cache)
                speed = self.speed.get(model)
                stored = self._store.store(
                    model, held, prompt_cache, exactly=True, epoch=epoch, prefill_tokens_per_s=speed, touch=touch
                )
                # What this prompt went on from cannot be cut out of it, where a checkpoint belongs to it.
                if touch and self.needs_checkpoints(model):
                    begun = held[: touch.tokens]
                    if self._touches.is_deferred((model, epoch), begun):
                        self._offer((model, epoch), begun)
        self._keep((model, epoch), held, prompt_cache, cache_type, bounded=stored or self._is_strict)
        if touch:
            self._touches.offered((model, epoch), held, touch)

    def _offer(self, place: tuple[Any, Any], tokens: list[int]) -> None:
        """Store a sequence of which memory may have been left the only holder, if it is still there."""
        with self._store.guard():
            found = self._trie.search(place, tokens).exact
            if found is not None:
                entry = self._trie.get(place, tokens)
                self._store.store(place[0], tokens, entry.prompt_cache, exactly=True, epoch=place[1])

    def begun(self, before: Sequence[int], rest: Sequence[int], _layers: Sequence[Any]) -> PartialPrompt | None:
        """The prompt that was looked up last, if it is what the engine begins."""
        prompt = self.computing
        return prompt if prompt is not None and [*before, *rest] == prompt.tokens else None

    def store_part(self, prompt: PartialPrompt, n_tokens: int, view: View, *, checkpoint: bool) -> int:
        """Store what is new of a prompt that is still being computed, unless the model has changed since; never raises.

        See `prefilling.store_part`.
        """
        held = 0
        with self._store.guard():
            layouts = self._layouts(prompt.model)
            if layouts and self._epoch(prompt.model) == prompt.epoch:
                held = store_part(self._store, layouts[0], prompt, n_tokens, view, checkpoint=checkpoint)
        return held

    @property
    def store_config(self) -> Config:
        """Of the client."""
        return self._store.config

    def _keep(
        self, place: tuple[Any, Any], tokens: list[int], layers: list[Any], cache_type: str, *, bounded: bool
    ) -> None:
        """Insert as the stock class does, but for the bytes: its loop would empty the tier for one large sequence."""
        nbytes, bound = sum(layer.nbytes for layer in layers), self.max_bytes
        if self._is_strict and nbytes > bound:
            return
        self.max_bytes = _UNBOUNDED
        try:
            super().insert_cache(place, tokens, layers, cache_type=cache_type)
        finally:
            self.max_bytes = bound
        if bounded:
            self._shrink((place, tokens), bound, nbytes)

    def _shrink(self, newest: tuple[Any, list[int]], bound: int, nbytes: int) -> None:
        """Drop what was used least recently until the others fit beside the newest, of `nbytes`, or without it."""
        if nbytes > bound:  # beside the bound, in place of the one before that was
            for place, tokens in [entry for lru in self._lru._lrus.values() for entry in lru]:  # noqa: SLF001
                if (place, tokens) != newest and self._trie.get(place, tokens).nbytes > bound:
                    self._lru.remove(place, tokens)
                    self._forget(place, tokens)
            bound += nbytes
        spared = None
        while self._n_bytes > bound and len(self):
            place, tokens = self._lru.pop()
            if (place, tokens) == newest:
                spared = self._trie.get(place, tokens).cache_type
            else:
                self._forget(place, tokens)
        if spared is not None:
            self._lru.push(*newest, spared)

    def _forget(self, place: Any, tokens: list[int]) -> None:
        entry = self._trie.pop(place, tokens)
        self._n_bytes -= entry.nbytes
        self._n_bytes_by_type[entry.cache_type] -= entry.nbytes

    def needs_checkpoints(self, model: ModelKey) -> bool:
        """Whether caches of the model can be continued only from where they were kept. False while that is unknown."""
        return self._enabled and any(one.exact_layers for one in self._layouts(model))

    def limit(self, model: ModelKey) -> int | None:
        """Maximum number of leading tokens of a prompt to look up; None means all."""
        return self._limit(self._layouts(model))

    def _limit(self, layouts: Sequence[Layout]) -> int | None:
        # Speculative decoding takes back what was drafted in vain, so it refuses the caches of windows that are full.
        if getattr(self._provider, "draft_model", None) is None:
            return None
        numbers = (dict(spec.params) for one in layouts for spec in one.layers)
        return min((of["size"] for of in numbers if "size" in of), default=None)

    def close(self, timeout_s: float = 5.0) -> None:
        """Give what is queued for the store `timeout_s`, then end the connection. Any thread."""
        self._store.close(timeout_s)

    def _serve(self, provider: Any) -> None:
        self._provider = provider
        self._enabled = not getattr(provider, "is_distributed", False)

    def _epoch(self, model: ModelKey) -> Epoch | None:
        """Which state of the model is in memory. None, as for the stock class, where the store is not used."""
        if not self._is_placed:
            self._is_placed = True
            self._serve(_provider_of(self))
        if not self._enabled:
            return None
        return self._store.epoch(model, *(self._models() if self._is_loaded(model) else ()))

    def _is_loaded(self, model: ModelKey) -> bool:
        """Whether the provider has this model in memory. One that has loaded nothing has None for key and model."""
        return getattr(self._provider, "model", None) is not None and bool(self._provider.model_key == model)

    def _models(self) -> list[Any]:
        found = [getattr(self._provider, name, None) for name in ("model", "draft_model")]
        return [model for model in found if model is not None]

    def _from_store(
        self, model: ModelKey, epoch: Epoch | None, tokens: list[int], wanted: list[int], covered: int
    ) -> tuple[list[Any], int] | None:
        """What was fetched ahead if the prompt was looked up, else what the store has now."""
        expected, self._expected = self._expected, None
        if expected is None or not expected.holds(model, epoch, tokens, covered):
            return self._store.fetch(model, self._layouts(model), wanted, covered, self.speed.get(model), epoch)
        # Memory may have learned more of it since then.
        found = expected.found
        worth = found is not None and found.n_tokens >= (covered + GAIN_TOKENS_MIN if covered else 1)
        return found.restored() if found is not None and worth else None

    def _in_memory(self, place: tuple[ModelKey, Epoch], tokens: list[int], *, cuttable: bool) -> int:
        """Approximate number of leading tokens in memory. Any thread may call: the trie is only read, key by key."""
        node, depth, held = self._trie._trie.get(place), 0, 0  # noqa: SLF001  # its own search walks all branches
        while node is not None and depth < len(tokens) - 1:
            node = node.get(tokens[depth])
            depth += node is not None
            held = depth if node is not None and "__value__" in node else held
        return depth if cuttable else held

    def _from_memory(self, model: Any, epoch: Epoch | None, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        place = (model, epoch)
        if tokens and any("chunk" in dict(spec.params) for one in self._layouts(model) for spec in one.layers):
            return self._as_kept(place, tokens)
        cache, rest = super().fetch_nearest_cache(place, tokens)
        if cache is None or rest or not tokens:
            return cache, rest
        # An exact hit leaves nothing to feed, which ends the server's generation thread.
        if can_trim_prompt_cache(cache):
            trim_prompt_cache(cache, 1)
            return cache, tokens[-1:]
        cache, rest = super().fetch_nearest_cache(place, tokens[:-1])
        return cache, [*rest, tokens[-1]]

    def _as_kept(self, place: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """From memory, uncut: chunked windows say that they can be trimmed, and then compute something else."""
        found = self._trie.search(place, tokens[:-1])
        held = found.shorter if found.exact is None else found.exact
        if not held:
            return None, tokens
        return super().fetch_nearest_cache(place, held)[0], tokens[len(held) :]

    def _layouts(self, model: ModelKey) -> Sequence[Layout]:
        """Layouts in which this server could continue a cache of this model, the preferred first."""
        if self._is_loaded(model):
            loaded, known = self._probed
            if loaded() is not self._provider.model:
                known = self._probe()
                self._probed = (weakref.ref(self._provider.model), known)
            return known
        return self._learned.get(model, ())

    def _probe(self) -> list[Layout]:
        provider = self._provider
        try:
            plain = probe(*self._models())
            bits = getattr(provider.cli_args, "kv_bits", None)
            # Only with --kv-bits: a quantized cache cannot join a batch, and its error must be asked for.
            return [quantized(plain, bits, provider.cli_args.kv_group_size), plain] if bits else [plain]
        except KVStoreError as error:
            self._store.refuse(error)
        except MODEL_ERRORS as error:
            self._store.refuse(UnsupportedLayerError(f"no layout for {provider.model_key}: {error}"))
        return []

    def _learn(self, model: ModelKey, prompt_cache: list[Any]) -> None:
        if self._provider is not None:
            return
        try:
            found = layout(prompt_cache)
        except KVStoreError:
            return  # `store` refuses it too, and says so
        known = self._learned.setdefault(model, [])
        if found not in known:
            known.append(found)
