"""The prefix cache of vllm-mlx with the store behind it (its batched engine; `kvstore run vllm-mlx serve MODEL ...`).

The stock `MemoryAwarePrefixCache` remains the in-memory tier: a fetch gets from the store what memory does not have,
and an entry that memory accepts is also stored. The subclass replaces it in the modules of both schedulers, for text
models and for vision models. For vision models the cache serves only requests without images.

With `--kv-cache-quantization` an entry holds codes. These are stored, bit-exact, and expanded after a fetch as the
stock class does it, so that a hit from the store is what the same hit in memory would be. A sequence that it leaves
plain because it is short may begin with rows that were expanded from codes, and is not stored.

The scheduler for text computes prompts with the batches of mlx-lm, so these are stored while they are computed
(`prefilling`), except where it quantizes its caches: what an entry will hold is known at the end alone. The scheduler
for vision has batches of its own, which say nothing between their steps.

Trouble with the store is a miss. The schedulers call all of this on the thread that owns the arrays.
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from vllm_mlx import cli, engine_core, mllm_batch_generator, scheduler
from vllm_mlx.memory_cache import (
    MemoryAwarePrefixCache,
    _quantize_cache,
    _QuantizedCacheWrapper,
    _trim_to_offset,
)
from vllm_mlx.models import mllm
from vllm_mlx.utils import tokenizer

from kvstore.client import connect
from kvstore.config import Config
from kvstore.core.layers import Layout
from kvstore.errors import KVStoreError, UnsupportedLayerError
from kvstore.integrations.ahead import Ahead, ahead_of_turn, in_sorted
from kvstore.integrations.caches import layout, probe, quantized, token_count
from kvstore.integrations.epochs import Epoch, InFlight
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.model_names import ModelKey, model_folder
from kvstore.integrations.models import GAIN_TOKENS_MIN, ModelStore
from kvstore.integrations.prefilling import PartialPrompt, StoringBatch, View, store_part
from kvstore.integrations.prompt_cache import MODEL_ERRORS
from kvstore.integrations.restoring import FoundPrefix
from kvstore.integrations.run import announce
from kvstore.integrations.speed import PrefillSpeed

log = logging.getLogger(__name__)

# Prompts that were looked up and wait for their turn: of more, the oldest are stored when they have been answered.
_WAITING_MAX = 64


def engine_version(models_from: str) -> str:
    """The engine as a namespace names it. `models_from`: the package that computes, "mlx-lm" or "mlx-vlm"."""
    return ", ".join(f"{name} {'.'.join(version(name).split('.')[:2])}" for name in ("vllm-mlx", models_from))


class Models:
    """The loaded models, by identity of the object, and what each was loaded from."""

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[Any], str]] = []
        self._caches: list[weakref.ref[PrefixCache]] = []

    def add(self, model: Any, path: str) -> None:
        """Note where a model came from; it is not kept alive."""
        self._known = [(known, of) for known, of in self._known if known() is not None]
        self._known.append((weakref.ref(model), path))

    def key(self, model: Any) -> ModelKey | None:
        """How the store knows the model; None for one that was loaded in another way than those that are watched."""
        return next(((path, None, None) for known, path in self._known if known() is model), None)

    def serve(self, cache: PrefixCache) -> None:
        """Note a prefix cache; it is not kept alive."""
        self._caches = [*(known for known in self._caches if known() is not None), weakref.ref(cache)]

    def batch(self, model: Any, **options: Any) -> BatchGenerator:
        """A scheduler's batches: with a prefix cache of the model they store what they compute."""
        caches = [cache for known in self._caches if (cache := known()) is not None and cache.computes(model)]
        if not caches:
            return BatchGenerator(model, **options)
        return StoringBatch(model, prompt_cache=caches[-1], **options)


class PrefixCache(MemoryAwarePrefixCache):  # type: ignore[misc]  # vllm-mlx is not there when types are checked
    """Drop-in for `MemoryAwarePrefixCache`.

    `leaves_one`: answer for all tokens but the last. The scheduler for text has no use for a hit that leaves nothing to
    feed (its types `exact` and `supersequence`) and computes the whole prompt again; the one for vision has.
    """

    def __init__(
        self, model: Any, config: Any = None, *, store: ModelStore, models: Models, leaves_one: bool = True
    ) -> None:
        super().__init__(model, config)
        self._tier = store
        self._key = models.key(model)
        self._model = weakref.ref(model)
        self._leaves_one = leaves_one
        self._speed = PrefillSpeed()
        self._known_layouts: list[Layout] | None = None
        self._in_flight = InFlight()
        self._epoch = self._look()
        self._ahead = Ahead(store.config.memory_bytes)
        self._waiting: deque[tuple[PartialPrompt, weakref.ref[Any] | None]] = deque(maxlen=_WAITING_MAX)
        models.serve(self)
        if self._key is None:
            store.refuse(UnsupportedLayerError(f"it is not known where the {type(model).__name__} was loaded from"))

    def fetch(self, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """(cache of a prefix of `tokens` or None, the tokens left to feed), from memory or the store."""
        self._enter_epoch()
        cache, rest = self._found(tokens)
        self._in_flight.begin(self._key, tokens, self._epoch, cache)
        if self._key is not None and self._epoch is not None:
            prompt = PartialPrompt(self._key, tokens, self._epoch, len(tokens) - len(rest) if cache else 0)
            self._waiting.append((prompt, weakref.ref(cache[0]) if cache else None))
        return cache, rest

    def computes(self, model: Any) -> bool:
        """Whether this is the cache of the model's prompts."""
        return self._model() is model

    def begun(self, _before: Sequence[int], rest: Sequence[int], layers: Sequence[Any]) -> PartialPrompt | None:
        """The prompt that was looked up with this answer.

        The engine does not say what was computed before; but it goes on with the layers that it was given, or has none.
        """
        prompt: PartialPrompt
        for waiting in reversed(self._waiting):
            prompt, first = waiting
            if (first is None or first() is layers[0]) and prompt.tokens[prompt.covered :] == rest:
                self._waiting.remove(waiting)
                return prompt
        return None

    def needs_checkpoints(self, model: ModelKey) -> bool:
        """Whether caches of the model can be continued only from where they were kept."""
        return model == self._key and any(one.exact_layers for one in self._layouts())

    def store_part(self, prompt: PartialPrompt, n_tokens: int, view: View, *, checkpoint: bool) -> int:
        """Store what is new of a prompt that is still being computed, unless the model has changed since; never raises.

        See `prefilling.store_part`.
        """
        held = 0
        with self._tier.guard():
            if self._layouts() and self._look() == prompt.epoch:
                held = store_part(self._tier, self._layouts()[0], prompt, n_tokens, view, checkpoint=checkpoint)
        return held

    @property
    def store_config(self) -> Config:
        """Of the client."""
        return self._tier.config

    def look_ahead(self, tokens: list[int], seconds: float) -> None:
        """Fetch from the store what memory does not have of a prompt, for a `fetch` that comes within `seconds`.

        Any thread that may wait: the scheduler's must not, since every stream would wait with it.
        """
        key, layouts, epoch = self._key, self._known_layouts, self._epoch
        if key is None or not layouts or epoch is None or len(tokens) < self._config.min_prefix_tokens:
            return
        cuttable = all(not one.exact_layers for one in layouts)
        with self._memory_lock:
            covered = in_sorted(self._sorted_keys, tokens[:-1], cuttable=cuttable)
        prepared = self._ahead.begin(tokens, covered)
        found: FoundPrefix | None = None
        reserve = functools.partial(prepared.reserve, timeout_s=seconds)
        try:
            with self._tier.guard():
                found = self._tier.find(key, layouts, tokens, covered, self._speed.get(key), reserve, epoch)
        finally:
            prepared.finish(found)

    def _from_store(self, tokens: list[int], covered: int) -> tuple[list[Any], int] | None:
        """The prefix fetched ahead for this prompt; if there is none, or memory has lost it, a fetch made now."""
        assert self._key is not None
        looked, found, covered_then = self._ahead.take(tokens)
        if found is not None and found.epoch == self._epoch:
            return found.restored(expand) if found.n_tokens >= (covered + GAIN_TOKENS_MIN if covered else 1) else None
        if looked and covered >= covered_then:
            return None
        speed = self._speed.get(self._key)
        return self._tier.fetch(self._key, self._layouts(), tokens, covered, speed, self._epoch, expand)

    def _found(self, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        cache, rest = self._from_memory(tokens) if self._leaves_one else super().fetch(tokens)
        if self._key is None or len(tokens) < self._config.min_prefix_tokens:
            return cache, rest
        covered = 0 if cache is None else len(tokens) - len(rest)
        found = self._from_store(tokens, covered)
        self._speed.started(self._key, tokens, found[1] if found else covered)
        if found is None:
            return cache, rest
        restored, n_tokens = found
        if not covered:
            self._stats.misses -= 1
            self._stats.hits += 1
        self._stats.tokens_saved += n_tokens - covered
        self._last_match_type, self._last_matched_key = "prefix", tuple(tokens[:n_tokens])
        log.debug("prefix of %d of %d tokens from the store", n_tokens, len(tokens))
        return restored, tokens[n_tokens:]

    def prepare_store(self, tokens: list[int], cache: list[Any], *auxiliary: Any, **named: Any) -> Any:
        """As in the stock class. A cache too large for the memory tier is stored as well."""
        entry = super().prepare_store(tokens, cache, *auxiliary, **named)
        if entry is None and cache and self._key is not None and len(tokens) >= self._config.min_prefix_tokens:
            self._offer_unkept(self._key, tokens, cache)
        return entry

    def _offer_unkept(self, key: ModelKey, tokens: list[int], cache: list[Any]) -> None:
        self._enter_epoch()
        if not self._in_flight.accepts(key, tokens, self._epoch, cache):
            self._tier.count_changed(key)
            return
        config = self._config
        try:
            layers = _trim_to_offset(cache)
            if config.kv_quantize and len(tokens) >= config.kv_min_quantize_tokens:
                layers = _quantize_cache(layers, config.kv_bits, config.kv_group_size)
        except MODEL_ERRORS as error:
            self._tier.refuse(UnsupportedLayerError(f"a cache that vllm-mlx cannot prepare: {error}"))
            return
        self._speed.reached(key, tokens)
        self._offer(key, tokens, layers)

    def commit_prepared(self, entry: Any, evict_prefixes: bool = True, **options: Any) -> bool:
        """Take an entry into memory and store what is new of it; `store` and both schedulers end here.

        An entry that another state of the model began is taken nowhere.
        """
        self._enter_epoch()
        if self._key is not None and not self._in_flight.accepts(self._key, entry.tokens, self._epoch, entry.cache):
            self._tier.count_changed(self._key)
            return False
        committed: bool = super().commit_prepared(entry, evict_prefixes, **options)
        if (committed or entry.memory_bytes > self._max_memory) and self._key is not None:
            self._speed.reached(self._key, entry.tokens)
            self._offer(self._key, entry.tokens, entry.cache)
        return committed

    def save_to_disk(self, cache_dir: str) -> bool:
        """Nothing: the store has it. The stock files give one prompt the KV of another after a second round."""
        return False

    def load_from_disk(self, cache_dir: str) -> int:
        """Nothing; see `save_to_disk`."""
        return 0

    def _look(self) -> Epoch | None:
        """The epoch of the model; None while it is not known where it came from, or when it is gone."""
        model = self._model()
        return None if self._key is None or model is None else self._tier.epoch(self._key, model)

    def _enter_epoch(self) -> None:
        """Drop what is in memory if the model is not any more in the epoch that computed it."""
        if (epoch := self._look()) != self._epoch:
            self._epoch = epoch
            self.clear()

    def _from_memory(self, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        cache, rest = super().fetch(tokens[:-1])
        if cache is None:
            return None, tokens
        covered = len(tokens) - 1 - len(rest)
        try:
            held = token_count(cache)
        except KVStoreError:
            held = None  # layers that are not known here; the stock class knows them
        # Feeding what is left would repeat tokens; and what cannot join a batch ends every request that runs.
        if (held is not None and held > covered) or not all(hasattr(layer, "merge") for layer in cache):
            self._last_match_type = "miss"
            return None, tokens
        self._last_match_type = "prefix"
        return cache, tokens[covered if held is None else held :]

    def _offer(self, key: ModelKey, tokens: Sequence[int], cache: Sequence[Any]) -> None:
        may_be_expanded = self._config.kv_quantize and len(tokens) < self._config.kv_min_quantize_tokens
        if may_be_expanded or not self._layouts():
            return
        with self._tier.guard():
            layers = [_with_codes(layer) for layer in cache]
            if layout(layers) != self._layouts()[0]:
                raise UnsupportedLayerError("a cache that is not laid out as those that the model makes")
            speed = self._speed.get(key)
            self._tier.store(key, tokens, layers, epoch=self._epoch, prefill_tokens_per_s=speed)

    def _layouts(self) -> list[Layout]:
        """The layout of what is stored, then others that can be fetched. Traces the model when first asked."""
        if self._known_layouts is None:
            self._known_layouts = self._probe()
        return self._known_layouts

    def _probe(self) -> list[Layout]:
        config = self._config
        try:
            plain = probe(self._model())
            if any("chunk" in dict(spec.params) for spec in plain.layers):
                raise UnsupportedLayerError("chunked windows: the scheduler cannot take such a cache into a batch")
            return [quantized(plain, config.kv_bits, config.kv_group_size), plain] if config.kv_quantize else [plain]
        except KVStoreError as error:
            self._tier.refuse(error)
        except MODEL_ERRORS as error:
            self._tier.refuse(UnsupportedLayerError(f"no layout for {self._key}: {error}"))
        return []


def _with_codes(layer: Any) -> Any:
    """A layer as mlx-lm has it: what vllm-mlx keeps quantized in a class of its own becomes a QuantizedKVCache."""
    if not isinstance(layer, _QuantizedCacheWrapper):
        return layer
    if layer.orig_type is not KVCache:
        raise UnsupportedLayerError(f"a quantized {layer.orig_type.__name__}")
    made: Any = QuantizedKVCache(group_size=layer.group_size, bits=layer.bits)
    made.keys, made.values, made.offset = layer.keys, layer.values, layer.offset
    return made


def expand(cache: Sequence[Any]) -> list[Any]:
    """Replace quantized layers of a cache with plain, evaluated ones: the engine computes only with plain layers."""
    return [_expanded(layer) if type(layer) is QuantizedKVCache else layer for layer in cache]


def _expanded(layer: Any) -> Any:
    made: Any = KVCache()
    made.keys, made.values = (_dequantized(layer, part) for part in (layer.keys, layer.values))
    made.offset = layer.offset
    mx.eval(made.keys, made.values)
    return made


def _dequantized(layer: Any, part: Sequence[mx.array]) -> mx.array:
    # Contiguous: dequantize has been wrong on slices on Metal.
    codes, scales, biases = (mx.contiguous(array[..., : layer.offset, :]) for array in part)
    return mx.dequantize(codes, scales, biases, group_size=layer.group_size, bits=layer.bits)


def plug_in(text: ModelStore, vision: ModelStore) -> None:
    """Put the stores behind the prefix caches of both schedulers, and watch what models are loaded from."""
    models = Models()
    scheduler.MemoryAwarePrefixCache = functools.partial(PrefixCache, store=text, models=models)
    mllm_batch_generator.MemoryAwarePrefixCache = functools.partial(
        PrefixCache, store=vision, models=models, leaves_one=False
    )
    scheduler.BatchGenerator = models.batch
    stock_load, stock_load_vision = tokenizer.load_model_with_fallback, mllm.MLXMultimodalLM.load

    @functools.wraps(stock_load)
    def load(path: str, *args: Any, model_id: str | None = None, **options: Any) -> Any:
        with text.loading(path):
            loaded = stock_load(path, *args, model_id=model_id, **options)
        models.add(loaded[0], name := _name(path, model_id))
        text.epoch((name, None, None), loaded[0])
        return loaded

    @functools.wraps(stock_load_vision)
    def load_vision(model: Any) -> None:
        with vision.loading(model.model_name):
            stock_load_vision(model)
        computes = getattr(model.model, "language_model", model.model)
        models.add(computes, model.model_name)
        vision.epoch((model.model_name, None, None), computes)

    engine_core.EngineCore.add_request = ahead_of_turn(engine_core.EngineCore.add_request)
    tokenizer.load_model_with_fallback, mllm.MLXMultimodalLM.load = load, load_vision


def _name(path: str, model_id: str | None) -> str:
    """The id under which people know the model, if that is what lies at the path; else the path."""
    folder = model_folder(model_id) if model_id else None
    return model_id if model_id and folder and os.path.realpath(folder) == os.path.realpath(path) else path


def prepare(flags: Sequence[str], *, slow_hits: bool = False) -> tuple[Callable[[], object], Callable[[float], None]]:
    """The command line of vllm-mlx with the store plugged in, to be called; and what ends the store, given seconds."""
    args = cli.create_parser().parse_args(list(flags))
    client, digests = connect(), WeightsDigest()
    if args.command == "serve" and (why := _unused(args)):
        log.warning("the store is not used: %s", why)
    elif args.command == "serve":
        announce(digests, str(args.model or ""))
        engines = [engine_version(name) for name in ("mlx-lm", "mlx-vlm")]
        plug_in(*(ModelStore(client, digests, engine=engine, slow_hits=slow_hits) for engine in engines))
    return cli.main, client.close


def _unused(args: Any) -> str:
    """Why there is nothing to put the store behind; empty if there is."""
    if not args.continuous_batching:
        return "only the batched engine has a cache for it (--continuous-batching)"
    if args.max_kv_size:
        return "with --max-kv-size the scheduler accepts only caches that it made itself"
    if args.disable_prefix_cache or args.no_memory_aware_cache or args.use_paged_cache:
        return "the flags turn off the prefix cache, or choose another one"
    return ""
