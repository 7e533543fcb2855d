"""kvstore for mlx-lm: `from kvstore.integrations import mlx_lm as kv`.

layers = kv.capture(cache); cache = kv.restore(layers)      engine-neutral <-> cache layers, bit-exact
namespace = kv.namespace(model, model_path)                 identity of a loaded model, and its layout
store = kv.PrefixStore(model_path)                          for your own generation loop
kv.PromptCache                                              drop-in for mlx_lm.server.LRUPromptCache
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from kvstore.client import connect
from kvstore.core.blocks import Reason
from kvstore.core.keys import Namespace
from kvstore.core.layers import Layout
from kvstore.errors import InvalidRequestError, KVStoreError
from kvstore.integrations.caches import capture, layout, probe, quantized, restore, token_count
from kvstore.integrations.engine_code import engine_of
from kvstore.integrations.epochs import Epoch
from kvstore.integrations.fingerprint import fingerprint
from kvstore.integrations.identity import WeightsDigest, identify
from kvstore.integrations.model_names import ModelKey, alias_of, model_folder
from kvstore.integrations.models import ENGINE, ModelStore
from kvstore.integrations.prompt_cache import MODEL_ERRORS, PromptCache

# As the engine's own prefill.
PREFILL_STEP_TOKENS = 2048
# How long a prompt waits for what this program has queued, which may be its beginning: computing that takes longer.
QUEUED_S = 0.5

__all__ = [
    "Prefix",
    "PrefixStore",
    "PromptCache",
    "capture",
    "layout",
    "namespace",
    "probe",
    "quantized",
    "restore",
]


def namespace(
    model: Any,
    model_path: str,
    cache: Sequence[Any] | None = None,
    *,
    adapter_path: str | None = None,
    salt: bytes = b"",
    alias: str | None = None,
    digests: WeightsDigest | None = None,
    timeout_s: float | None = None,
) -> Namespace:
    """The namespace of a loaded model and the folder (or downloaded Hugging Face id) that it was loaded from.

    Waits for the folder's hash, at most `timeout_s`. The layout is that of `cache` if it holds tokens, else of what the
    model makes. Call it on the thread that owns the model. InvalidRequestError when the folder is not there, is not a
    model, changes meanwhile, or takes longer than `timeout_s`; and, `identity_pending`, when the weights of the model
    are not evaluated, or there is only a path: that does not say what computes.
    """
    folders = [model_folder(path) if path else None for path in (model_path, adapter_path, None)]
    if folders[0] is None or (adapter_path and folders[1] is None):
        raise InvalidRequestError(f"there is no such folder: {adapter_path if folders[0] else model_path}")
    known = digests or WeightsDigest()
    pins = [known.pin(folder) if folder else None for folder in folders]
    if (mark := fingerprint(model)) is None:
        raise InvalidRequestError(
            f"{Reason.IDENTITY_PENDING}: a model with evaluated weights is needed; load {model_path} without lazy=True"
        )
    identity = identify(pins, mark, salt=salt, alias=alias or alias_of(model_path), timeout_s=timeout_s)
    if identity is None:
        raise InvalidRequestError(f"no identity for {model_path}: see the log for the cause")
    if cache and all(getattr(layer, "keys", ()) is not None for layer in cache):
        return identity.namespace(layout(cache), engine_of(ENGINE, model))
    return identity.namespace(probe(model), engine_of(ENGINE, model))


def _check_folder(path_or_repo: str, needed: str) -> None:
    """InvalidRequestError unless this is a folder with that file, or the id of what may still be downloaded."""
    folder = model_folder(path_or_repo)
    if folder is None:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path_or_repo) and not path_or_repo.startswith("."):
            return
        raise InvalidRequestError(f"there is no such folder: {path_or_repo}")
    if not (folder / needed).is_file():
        raise InvalidRequestError(f"not a folder with {needed}: {path_or_repo}")


@contextmanager
def loading(model_path: str, adapter_path: str | None = None) -> Iterator[None]:
    """Around loading a model: InvalidRequestError when there is none, or it cannot be loaded."""
    _check_folder(model_path, "config.json")
    if adapter_path is not None:
        _check_folder(adapter_path, "adapter_config.json")
    try:
        yield
    except (OSError, *MODEL_ERRORS) as error:
        raise InvalidRequestError(f"{model_path} cannot be loaded: {type(error).__name__}: {error}") from error


class PrefixStore:
    """The store for one model in a program that generates by itself.

    Make it before or right after the model is loaded: its identity is that of the folder at this time, and until large
    weights are hashed (see `wait`) nothing is fetched or stored. Use it on the thread that owns the caches; `flush` and
    `close` may be called from any. InvalidRequestError when the folder does not exist or has no model in it (a Hugging
    Face id may be downloaded later); nothing raises because of the store.

        with PrefixStore(path) as store:
            prefix = store.prefix(model, tokens)
            with prefix as (cache, rest):
                for token, _ in generate_step(mx.array(rest), model, prompt_cache=cache):
                    prefix.extend([token])
    """

    def __init__(
        self,
        model_path: str,
        address: str | None = None,
        *,
        adapter_path: str | None = None,
        profile: str | None = None,
        salt: bytes = b"",
        digests: WeightsDigest | None = None,
    ) -> None:
        _check_folder(model_path, "config.json")
        if adapter_path is not None:
            _check_folder(adapter_path, "adapter_config.json")
        self._key: ModelKey = (model_path, adapter_path, None)
        self._store = ModelStore(connect(address), digests, profile=profile, salt=salt)
        self._store.pin(*self._key)

    def prefix(self, model: Any, tokens: Sequence[int]) -> Prefix:
        """A context that fetches the longest stored prefix of `tokens` on entry and stores on exit."""
        return Prefix(self._store, self._key, model, tokens)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the model's folders are hashed. Returns whether they are."""
        epoch = self._store.epoch(self._key)
        return not epoch.unknown and all(pin is None or pin.wait(timeout_s) for pin in epoch.pins)

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until what was stored so far is durable or dropped; False after `timeout_s`."""
        return self._store.flush(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Give what is queued `timeout_s`, then end the connection."""
        self._store.close(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Prefix:
    """One prompt during generation. Unpacks to `(cache, rest)`: feed all of `rest`, which has at least one token.

    A cache knows only the number of its tokens, not their ids. On exit, the KV of the known tokens is stored: the
    prompt, and generated tokens that were passed to `extend`. Further tokens in the cache are cut off. If layers hold
    different numbers of tokens (an interrupted forward pass), or if the block raises, nothing is stored. Leaving a
    generator early does not count as an exception.

    Layers of purely recurrent models (mamba, rwkv7) do not know how many tokens they hold, so their content cannot be
    checked on exit. For these models, all but the last token of the prompt is fed on entry and stored at once.
    Generated tokens are not stored.
    """

    def __init__(self, store: ModelStore, key: ModelKey, model: Any, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise InvalidRequestError("a prompt has at least one token")
        self._store = store
        self._key = key
        self._model = model
        self._tokens = [int(token) for token in tokens]
        self._epoch: Epoch | None = None  # known on entry
        self._counts = True
        self.cache: list[Any] = []
        self.rest: list[int] = []

    def extend(self, tokens: Iterable[int]) -> None:
        """Name tokens that were, or will be, fed after the prompt."""
        self._tokens.extend(int(token) for token in tokens)

    def __enter__(self) -> Self:
        self._epoch = self._store.epoch(self._key, self._model)
        self._store.flush(QUEUED_S)
        found = self._store.fetch(self._key, self._layouts(), self._tokens, epoch=self._epoch)
        self.cache, n_tokens = found or (make_prompt_cache(self._model), 0)
        self.rest = self._tokens[n_tokens:]
        with self._store.guard():
            self._counts = token_count(self.cache) is not None
        if not self._counts and len(self.rest) > 1:
            self._feed()
        return self

    def _feed(self) -> None:
        """Feed all but the last token, in the engine's pieces, and store them: here the position is known."""
        fed = len(self._tokens) - 1
        for start in range(fed - len(self.rest) + 1, fed, PREFILL_STEP_TOKENS):
            self._model(mx.array([self._tokens[start : min(start + PREFILL_STEP_TOKENS, fed)]]), cache=self.cache)
            mx.eval([layer.state for layer in self.cache])
        self._store.store(self._key, self._tokens[:fed], self.cache, exactly=True, epoch=self._epoch)
        self.rest = self._tokens[fed:]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._counts or (kind is not None and not issubclass(kind, GeneratorExit)):
            return
        now = self._store.epoch(self._key, self._model)
        if self._epoch is None or self._epoch.became(now):
            self._store.store(self._key, self._tokens, self.cache, epoch=now)
        else:
            self._store.count_changed(self._key)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.cache, self.rest))

    def _layouts(self) -> list[Layout]:
        try:
            return [probe(self._model)]
        except KVStoreError as error:
            self._store.refuse(error)
            return []
