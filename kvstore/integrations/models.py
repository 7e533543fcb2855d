"""Fetches and stores whole caches for the models of a process, with one session per model.

Errors here result in "nothing fetched" or "nothing stored", with the reason counted; generation continues without the
store.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvstore.client import Client
from kvstore.client.results import Hit, one_request, request_id, say_miss
from kvstore.client.session import Session
from kvstore.client.store import Touch
from kvstore.config import Config
from kvstore.core.blocks import Reason
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Namespace
from kvstore.core.layers import Layout
from kvstore.core.process import is_forked
from kvstore.errors import InvalidRequestError, KVStoreError, UnsupportedLayerError
from kvstore.integrations.caches import capture, layout, token_count
from kvstore.integrations.engine_code import engine_of
from kvstore.integrations.epochs import Epoch, Loaded
from kvstore.integrations.fingerprint import fingerprint, stamp
from kvstore.integrations.identity import Pin, WeightsDigest, identify
from kvstore.integrations.images import around_images, splits_image
from kvstore.integrations.model_names import ModelKey, alias_of, model_folder, name_of, names_files, paths_of
from kvstore.integrations.restoring import Finish, FoundPrefix
from kvstore.integrations.touches import Endings

log = logging.getLogger(__name__)

ENGINE = "mlx-lm"
# What layers of foreign classes may raise when they are looked at.
_ENGINE_ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
# Leaving a cache that is in memory for one that must be read pays only when it saves this much of a prefill.
GAIN_TOKENS_MIN = 32


class ModelStore:
    """The store for all models of one process. `store` belongs to the thread that owns the caches, the rest to any.

    `reasons` counts why fetches and stores did nothing, where that was decided here; the daemon is told, so that its
    statistics show it too. Sessions count their own. `slow_hits`: as of `Client.session`.
    """

    def __init__(
        self,
        client: Client,
        digests: WeightsDigest | None = None,
        *,
        profile: str | None = None,
        salt: bytes = b"",
        engine: str | None = None,
        slow_hits: bool = False,
    ) -> None:
        self.digests = digests or WeightsDigest()
        self.reasons: Counter[Reason] = Counter()
        self._client = client
        self._profile = profile
        self._salt = salt
        self._engine = engine or ENGINE
        self._slow_hits = slow_hits
        self._pins: dict[str, Pin] = {}
        self._announced: set[str] = set()  # pinned since a model was last seen in memory
        self._loaded: list[Loaded] = []
        self._sessions: dict[Namespace, Session] = {}
        self._refusals: set[str] = set()
        self._lock = threading.RLock()
        self.endings = Endings()

    def pin(self, *paths: str | None) -> None:
        """Note what folders (or Hugging Face ids) hold now: call it when they are loaded. See `WeightsDigest.pin`.

        If that is not what they held before, models of these paths are in a new epoch. Any thread.
        """
        with self._lock:
            for path in paths:
                if path and (folder := model_folder(path)):
                    self._announced.add(path)
                    before, pin = self._pins.get(path), self.digests.pin(folder)
                    self._pins[path] = pin
                    if before is not None and before.state != pin.state:
                        self._loaded = [one for one in self._loaded if path not in one.paths]

    @contextmanager
    def loading(self, *names: str | None) -> Iterator[None]:
        """Around loading a model from these folders or Hugging Face ids: pins them. Any thread.

        Folders before they are read; one that is replaced meanwhile has no identity. Ids after, since loading may first
        download a newer revision; their files are named by content.
        """
        folders = [name for name in names if name and Path(name).exists()]
        self.pin(*folders)
        pins = [self._pins[name] for name in folders]
        yield
        for pin in pins:
            pin.confirm()
        self.pin(*(name for name in names if name not in folders))

    def epoch(self, key: ModelKey, *models: Any) -> Epoch:
        """The current epoch of a model: its pinned folders, and the fingerprint of the models in memory.

        `models`: the loaded model and its draft model; call on the thread that owns them. Folders without a pin are
        pinned now, also if these objects are new and their folders were not pinned at load. Without `models`: the epoch
        of the objects seen last; any thread. A model that cannot be inspected gets an epoch without an identity.
        """
        try:
            return self._epoch(key, models)
        except _ENGINE_ERRORS as error:
            self.refuse(KVStoreError(f"{key!r} cannot be looked at: {error}"))
            return Epoch((), (), unknown=paths_of(key) or (repr(key),))

    def _epoch(self, key: ModelKey, models: Sequence[Any]) -> Epoch:
        with self._lock:
            self._loaded = [one for one in self._loaded if one.is_alive]
            known = next((one for one in reversed(self._loaded) if one.is_of(key, models)), None)
            if known is not None:
                return known.epoch
            paths = paths_of(key)
            known_paths = self._announced if models else self._pins.keys()
            self.pin(*(path for path in paths if path not in known_paths))
            pins = tuple(self._pins.get(path) if path else None for path in key) if names_files(key) else ()
            missing = tuple(path for path in paths if path not in self._pins)
            states = tuple(pin.state if pin else None for pin in pins)
            mark = fingerprint(*models) if models else None
            made = Epoch(pins, states, mark, missing, engine_of(self._engine, *models) if mark else "")
            if mark is not None:
                self._announced.difference_update(paths)
                seen = tuple(weakref.ref(model) for model in models)
                self._loaded.append(Loaded(key, seen, stamp(*models), made))
            return made

    def count_changed(self, key: ModelKey) -> None:
        """Count, and say, that a cache was begun in another epoch than that in which it came back. Any thread."""
        self._count(Reason.IDENTITY_CHANGED)
        log.warning("%s changed while a cache of it was filled; that cache is not kept", name_of(key))

    def session(self, key: ModelKey, of: Layout, epoch: Epoch | None = None) -> Session | None:
        """The session for a model in an epoch (None: as it is now) and a layout, made when first asked for.

        None while the identity is unknown.
        """
        with self._lock:
            return self._session(key, of, self.epoch(key) if epoch is None else epoch)

    def _session(self, key: ModelKey, of: Layout, epoch: Epoch) -> Session | None:
        if not names_files(key):
            self._count(Reason.IDENTITY)
            return None
        identity = None
        if not epoch.unknown:
            identity = identify(epoch.pins, epoch.fingerprint, salt=self._salt, alias=alias_of(str(key[0])))
        if identity is None:
            self._count(Reason.IDENTITY_PENDING)
            return None
        namespace = identity.namespace(of, epoch.engine)
        if namespace not in self._sessions:
            self._sessions[namespace] = self._client.session(namespace, self._profile, slow_hits=self._slow_hits)
        return self._sessions[namespace]

    def fetch(
        self,
        key: ModelKey,
        layouts: Sequence[Layout],
        tokens: Sequence[int],
        covered: int = 0,
        prefill_tokens_per_s: float = 0.0,
        epoch: Epoch | None = None,
        finish: Finish = list,
    ) -> tuple[list[Any], int] | None:
        """A cache for the longest stored prefix of `tokens` in any of the layouts, and its length in tokens.

        None when there is none, or not one of `GAIN_TOKENS_MIN` more than the `covered` tokens that the caller has, or
        when a caller of that speed (0: not known) would lose by it. `epoch`: of the model; None: as it is now.
        `finish`: what else is done to a restored cache; what it raises is a miss too.
        """
        found = self.find(key, layouts, tokens, covered, prefill_tokens_per_s, epoch=epoch)
        return None if found is None else found.restored(finish)

    def find(
        self,
        key: ModelKey,
        layouts: Sequence[Layout],
        tokens: Sequence[int],
        covered: int = 0,
        prefill_tokens_per_s: float = 0.0,
        reserve: Callable[[int], bool] | None = None,
        epoch: Epoch | None = None,
    ) -> FoundPrefix | None:
        """As `fetch`, for any thread: every layer is evaluated, and cache layers can be made of them on another.

        `reserve(nbytes)` is asked before anything is read, and may refuse. All together takes as long as a fetch may.
        """
        deadline = Deadline(self.config.fetch_total_s)
        if is_forked() or len(tokens) - 1 < (covered + GAIN_TOKENS_MIN if covered else 1):
            return None
        try:
            with one_request() as name:
                epoch = self.epoch(key) if epoch is None else epoch
                sessions = [session for one in layouts if (session := self.session(key, one, epoch))]
                if layouts and not sessions:
                    say_miss(name_of(key), name, len(tokens), Reason.IDENTITY_PENDING)
                for session in sessions:
                    session.computes(prefill_tokens_per_s)
                return self._find(sessions, tokens, covered, prefill_tokens_per_s, reserve, epoch, deadline)
        except KVStoreError as error:
            self.refuse(error)
        return None

    def _find(
        self,
        sessions: Sequence[Session],
        tokens: Sequence[int],
        covered: int,
        prefill_tokens_per_s: float,
        reserve: Callable[[int], bool] | None,
        epoch: Epoch,
        deadline: Deadline,
    ) -> FoundPrefix | None:
        """The longest prefix that any of the sessions has, read."""
        wanted = covered + GAIN_TOKENS_MIN if covered else 1
        if covered or len(sessions) > 1 or reserve is not None:
            # Matching asks the index only; what would be thrown away is not read.
            found = {session: session.match(tokens, prefill_tokens_per_s, covered) for session in sessions}
            longest = max((one.n_tokens for one in found.values()), default=0)
            sessions = [session for session in sessions if wanted <= found[session].n_tokens == longest]
            if not sessions and found and not covered:
                session, match = next(iter(found.items()))
                say_miss(session.namespace.alias, request_id(), len(tokens), match.reason)
            # Bytes of window and state layers are not known before they are read.
            if reserve is not None and sessions and not reserve(longest * sessions[0].namespace.layout.token_bytes):
                return None
        for session in sessions[:1]:
            prompt = around_images(session, tokens)
            hit = session.fetch(
                prompt,
                total_ms=1e3 * deadline.left_s,
                prefill_tokens_per_s=prefill_tokens_per_s,
                covered_tokens=covered,
                evaluate=reserve is not None,
            )
            if isinstance(hit, Hit) and hit.n_tokens >= wanted and not splits_image(tokens, hit.n_tokens):
                unusable = functools.partial(self._unusable, session, tokens[: hit.n_tokens])
                return FoundPrefix(hit.layers, session.namespace.layout.tree, hit.n_tokens, epoch, unusable)
        return None

    def store(
        self,
        key: ModelKey,
        tokens: Sequence[int],
        cache: Iterable[Any],
        *,
        exactly: bool = False,
        epoch: Epoch | None = None,
        prefill_tokens_per_s: float = 0.0,
        touch: Touch | None = None,
    ) -> bool:
        """Store the KV of `tokens`, as far as the cache holds it; what it holds beyond them is left out.

        Whether the store took it: it was queued, or is there. `epoch`: in which the cache was begun; None: that of now.
        Window and state layers cannot be cut: they are stored if the cache holds exactly `tokens`. Where no layer knows
        how many it holds, the caller must say so with `exactly`. Both are the caller's again on return.
        `prefill_tokens_per_s`: as measured, for the statistics; 0: not known. `touch`: as of `Session.store`.
        """
        if is_forked():
            return False
        try:
            cache = list(cache)
            held = token_count(cache)
            if held is None and not exactly:
                raise InvalidRequestError("no layer knows how many tokens it holds; nothing of this sequence is stored")
            layers = capture(cache, len(tokens) if held is None else min(held, len(tokens)))
            if session := self.session(key, layout(cache), epoch):
                session.computes(prefill_tokens_per_s)
                return session.store(tokens, layers, touch=touch).reason in (Reason.OK, Reason.ALREADY_STORED)
        except KVStoreError as error:
            self.refuse(error)
        return False

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Context manager that counts and logs errors in an engine's data instead of raising them."""
        try:
            yield
        except KVStoreError as error:
            self.refuse(error)
        except _ENGINE_ERRORS:
            log.exception("the store is not used for this sequence")
            self._count(Reason.INTERNAL)

    def _unusable(self, session: Session, tokens: Sequence[int], error: Exception) -> None:
        """No cache could be made of a hit: count it, have the daemon check it, and believe none of it to be held."""
        self._count(Reason.CORRUPT)
        session.reject(tokens, str(error))

    def refuse(self, error: KVStoreError) -> None:
        """Count what the store could not be used for, and say each kind once."""
        reason = Reason.INVALID if isinstance(error, InvalidRequestError) else Reason.INTERNAL
        self._count(Reason.UNSUPPORTED_LAYER if isinstance(error, UnsupportedLayerError) else reason)
        if str(error) not in self._refusals and len(self._refusals) < 100:
            self._refusals.add(str(error))
            # Its text: a record that somebody keeps must not keep the frames of the error, and with them this store.
            log.warning("the store is not used: %s", str(error))

    def _count(self, reason: Reason) -> None:
        if not is_forked():
            with self._lock:
                self.reasons[reason] += 1
            self._client.count_refusal(reason)

    @property
    def config(self) -> Config:
        """Of the client. Each kind of buffer may use the whole of `memory_bytes`."""
        return self._client.config

    def flush(self, timeout_s: float) -> bool:
        """Wait until what is queued has been stored or dropped; whether all was."""
        flushed = [session.flush(timeout_s) for session in list(self._sessions.values())]
        return all(flushed)

    def close(self, timeout_s: float = 5.0) -> None:
        """Give each session `timeout_s` for what it has queued, then end them and the connection. Idempotent."""
        self._client.close(self.endings.run(timeout_s))
