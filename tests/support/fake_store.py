"""A store in memory with the contract of client and sessions, for tests of what is above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from kvstore.client.results import Hit, HitSource, Match, Miss, StoreResult
from kvstore.client.store import Touch
from kvstore.config import Config
from kvstore.core.blocks import Reason
from kvstore.core.keys import Namespace
from kvstore.core.layers import KVLayer, StateLayer

Layers = Sequence[KVLayer | StateLayer]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _arrays(layer: KVLayer | StateLayer) -> list[mx.array]:
    return [*layer.keys, *layer.values] if isinstance(layer, KVLayer) else [array for _, array in layer.arrays]


class FakeSession:
    """A session over a list: longest common prefix, at most N - 1; whole entries only where layers cannot be cut."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.stored: list[tuple[list[int], list[KVLayer | StateLayer]]] = []
        self.touches: list[Touch | None] = []  # of the stores
        self.fetches = 0
        self.said: list[dict[str, float]] = []
        self.rejected: list[list[int]] = []

    def _best(self, tokens: Sequence[int]) -> tuple[int, Layers]:
        best: tuple[int, Layers] = (0, [])
        for known, layers in self.stored:
            n_tokens = min(common_prefix(known, tokens), len(tokens) - 1)
            if self.namespace.layout.exact_layers and n_tokens < len(known):
                n_tokens = 0
            best = max(best, (n_tokens, layers), key=lambda item: item[0])
        return best

    def match(self, tokens: Sequence[int], *said: float) -> Match:
        """How long the best prefix is."""
        return Match(self._best(tokens)[0], Reason.OK)

    def fetch(self, tokens: Sequence[int], **said: float) -> Hit | Miss:
        """Layers of their own, with head-room."""
        self.fetches += 1
        self.said.append(said)
        n_tokens, layers = self._best(tokens)
        if not n_tokens:
            return Miss(Reason.UNKNOWN_PREFIX)
        cut = tuple(
            replace(one, keys=tuple(a[:] for a in one.keys), values=tuple(a[:] for a in one.values), n_tokens=n_tokens)
            if isinstance(one, KVLayer)
            else one
            for one in layers
        )
        return Hit(n_tokens, cut, Reason.OK, 0, HitSource("fake", "packed", 1, 0, 0.0))

    def store(self, tokens: Sequence[int], layers: Layers, touch: Touch | None = None) -> StoreResult:
        """Keep the layers as they are, and the tokens that they hold; nothing when exact layers are somewhere else."""
        assert [layer.spec for layer in layers] == list(self.namespace.layout.layers)
        offset = max(layer.n_tokens for layer in [one for one in layers if isinstance(one, KVLayer)] or layers)
        assert offset <= len(tokens)
        if any(layer.n_tokens != offset for layer in layers):
            return StoreResult(reason=Reason.NO_CHECKPOINT)
        mx.eval([a for one in layers for a in _arrays(one)])  # whoever fetches them may be another thread
        self.touches.append(touch)
        self.stored.append((list(tokens[:offset]), list(layers)))
        return StoreResult()

    def computes(self, tokens_per_s: float) -> None:
        """Of no use here."""

    def reject(self, tokens: Sequence[int], detail: str) -> None:
        """Note that a hit could not be used."""
        self.rejected.append(list(tokens))

    def flush(self, timeout_s: float) -> bool:
        """Nothing is queued."""
        return True


class FakeClient:
    """Sessions by namespace, as two processes that share one store see them."""

    def __init__(self) -> None:
        self.config = Config()
        self.sessions: dict[bytes, FakeSession] = {}
        self.refusals: list[Reason] = []
        self.closed = False
        self.slow_hits = False

    def count_refusal(self, reason: Reason) -> None:
        """The daemon would count it."""
        self.refusals.append(reason)

    def session(self, namespace: Namespace, profile: str | None = None, *, slow_hits: bool = False) -> FakeSession:
        """The one session of a namespace."""
        self.slow_hits = slow_hits
        return self.sessions.setdefault(namespace.root, FakeSession(namespace))

    def close(self, timeout_s: float) -> None:
        """Remember that it was."""
        self.closed = True

    @property
    def only(self) -> FakeSession:
        """The session, where there is but one."""
        (session,) = self.sessions.values()
        return session
