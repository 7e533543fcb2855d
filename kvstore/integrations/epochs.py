"""Epochs: they record which state of a model computed a cache.

An epoch is one state of a model's files, adapter and draft model as loaded, plus the fingerprint of the models in
memory. Loading unchanged files again gives the same epoch. Epochs compare file states, so the epoch is known when KV is
computed; the digests of its files may be computed later. KV belongs to the epoch in which its cache was started, even
if the folder has changed when the cache is stored.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.core.blocks import pack_tokens
from kvstore.errors import InvalidRequestError
from kvstore.integrations.fingerprint import stamp
from kvstore.integrations.identity import FileState, Pin

IN_FLIGHT_MAX = 1024
IN_FLIGHT_BYTES_MAX = 64 << 20
# No request computes for longer. What an engine gave up without a word is forgotten after this time.
IN_FLIGHT_S_MAX = 3600.0


@dataclass(frozen=True)
class Epoch:
    """One state of a model as loaded. Compares by file states and fingerprint; hashable; any thread may read it.

    `pins`: the folders of (model, adapter, draft model), None where there is none; their digests may arrive later.
    `unknown`: names without a folder. `fingerprint`: of the models in memory, None if no model is at hand.
    `engine`: the code that computes them, as a namespace names it.
    """

    pins: tuple[Pin | None, ...] = field(compare=False)
    states: tuple[tuple[str, tuple[FileState, ...]] | None, ...]
    fingerprint: bytes | None = None
    unknown: tuple[str, ...] = ()
    engine: str = field(default="", compare=False)

    def became(self, later: Epoch) -> bool:
        """Whether one model object can have been in this epoch, and then in `later`: weights that were loaded lazily
        have no fingerprint before their first use."""
        return self.states == later.states and self.fingerprint in (None, later.fingerprint)


@dataclass(frozen=True, eq=False)
class Loaded:
    """Weak references to the models seen in memory, and their epoch."""

    key: tuple[str | None, ...]
    models: tuple[weakref.ref[Any], ...]
    stamp: int
    epoch: Epoch

    @property
    def is_alive(self) -> bool:
        return all(model() is not None for model in self.models)

    @property
    def paths(self) -> list[str]:
        return [path for path in self.key if path]

    def is_of(self, key: tuple[str | None, ...], models: Sequence[Any]) -> bool:
        """Whether these are the models, as they were; without any, whether this is their key."""
        if key != self.key or not models:
            return key == self.key
        if len(models) != len(self.models) or any(a is not b() for a, b in zip(models, self.models, strict=True)):
            return False
        return stamp(*models) == self.stamp


class Begun:
    """A cache that an engine is filling: its prompt, and the epoch in which it was started."""

    __slots__ = ("at_s", "empty", "epoch", "key", "tokens")

    def __init__(self, key: Hashable, tokens: bytes, epoch: Epoch | None, *, empty: bool) -> None:
        self.key, self.tokens, self.epoch, self.empty = key, tokens, epoch, empty
        self.at_s = time.monotonic()


class InFlight:
    """Caches that were handed to an engine, or begun empty by it, and did not come back yet. Any thread may call.

    An engine names a cache by model and tokens only; it copies layers into batches and out again, and gives requests up
    without a word. So a cache that comes back is recognised by its layer objects, if these are still the ones that were
    handed out, else by its tokens: it continues a prompt that was looked up, or is a part of one. Where one prompt was
    begun empty in two epochs, either may be the one that comes back, and none is accepted for the later epoch before
    the earlier one is accounted for.
    """

    def __init__(self, limit: int = IN_FLIGHT_MAX, limit_bytes: int = IN_FLIGHT_BYTES_MAX) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._begun: deque[Begun] = deque()  # oldest first
        self._nbytes = 0
        self._layers: weakref.WeakKeyDictionary[Any, Epoch | None] = weakref.WeakKeyDictionary()
        self._dropped: Epoch | None = None
        self._lock = threading.Lock()

    def begin(self, key: Hashable, tokens: Sequence[int], epoch: Epoch | None, cache: Sequence[Any] | None) -> None:
        """A prompt was looked up in an epoch; `cache` was handed out for it, None: the engine begins an empty one."""
        packed = _packed(tokens)
        with self._lock:
            self._note(cache or (), epoch)
            if packed:
                self._begun.append(Begun(key, packed, epoch, empty=cache is None))
                self._nbytes += len(packed)
                self._shrink()

    def accepts(self, key: Hashable, tokens: Sequence[int], epoch: Epoch | None, cache: Sequence[Any]) -> bool:
        """Whether a cache that comes back after `tokens` was begun in `epoch`. True for one that was never begun."""
        packed = _packed(tokens)
        with self._lock:
            related = [
                one
                for one in self._begun
                if packed and one.key == key and (packed.startswith(one.tokens) or one.tokens.startswith(packed))
            ]
            ended = [one for one in related if packed.startswith(one.tokens)]
            known = self._known(cache)
            accepted = known == {epoch} if known else self._are_of(related, epoch)
            self._end(ended, epoch, accepted=accepted)
            if accepted:
                self._note(cache, epoch)
            return accepted

    def _note(self, cache: Sequence[Any], epoch: Epoch | None) -> None:
        for layer in cache:
            try:
                self._layers[layer] = epoch
            except TypeError:  # a class without weak references: recognised by tokens alone
                return

    def _known(self, cache: Sequence[Any]) -> set[Epoch | None]:
        try:
            return {self._layers[layer] for layer in cache if layer in self._layers}
        except TypeError:
            return set()

    def _are_of(self, related: Sequence[Begun], epoch: Epoch | None) -> bool:
        """Whether a cache that one of `related` began can only be of `epoch`."""
        earlier = [one for one in related if one.epoch != epoch]
        if not related:
            return self._dropped in (None, epoch)
        return len(earlier) < len(related) and not any(one.empty for one in earlier)

    def _end(self, ended: Sequence[Begun], epoch: Epoch | None, *, accepted: bool) -> None:
        """Forget a returned cache of `epoch`, and with it hits of other epochs that no request continued.

        If it was refused, forget the first that may belong to another epoch."""
        mine = [one for one in ended if one.epoch == epoch]
        others = [one for one in ended if one.epoch != epoch]
        for one in [*mine[:1], *(other for other in others if not other.empty)] if accepted else others[:1]:
            self._begun.remove(one)
            self._nbytes -= len(one.tokens)

    def _shrink(self) -> None:
        now_s = time.monotonic()
        while self._begun:
            first = self._begun[0]
            is_old = now_s - first.at_s > IN_FLIGHT_S_MAX
            if not is_old and len(self._begun) <= self._limit and self._nbytes <= self._limit_bytes:
                return
            if not is_old:
                self._dropped = first.epoch
            self._begun.popleft()
            self._nbytes -= len(first.tokens)


def _packed(tokens: Sequence[int]) -> bytes:
    """The tokens packed for comparison; empty if they are no valid token ids, which the store refuses anyway."""
    try:
        return pack_tokens(tokens)
    except InvalidRequestError:
        return b""
