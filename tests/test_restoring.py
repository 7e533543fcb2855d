"""Whatever goes wrong while a hit becomes cache layers is a miss at every edge: counted, reported, never raised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.blocks import Reason
from kvstore.core.layers import StateLayer
from kvstore.errors import CorruptDataError, InvalidRequestError
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prompt_cache import PromptCache
from tests.support.fake_store import FakeClient
from tests.support.models import build_tiny, heldout_tokens, write_tiny
from tests.test_prompt_cache import Provider, filled

TOKENS = heldout_tokens()[:60]
PROMPT = [*TOKENS, 5, 6]
ERRORS = [
    InvalidRequestError("rule"),
    CorruptDataError("bytes"),
    RuntimeError("engine"),
    KeyError("x"),
    MemoryError(),
]


class Edges:
    """One model behind each edge, and the store that they share."""

    def __init__(self, folder: Path) -> None:
        self.model = build_tiny("gemma3")
        self.client = FakeClient()
        self.folder = str(write_tiny(folder / "model", "gemma3"))
        self.digests = WeightsDigest(folder / "cache")
        assert self.digests.wait(Path(self.folder), 60.0)

    @property
    def store(self) -> ModelStore:
        """As a new process has it."""
        return ModelStore(self.client, self.digests)  # type: ignore[arg-type]

    def prompt_cache(self) -> PromptCache:
        """The server's."""
        return PromptCache(store=self.store, provider=Provider((self.folder, None, None), self.model))

    def covered(self, edge: str) -> int:
        """How many tokens of PROMPT an engine gets through an edge."""
        key = (self.folder, None, None)
        if edge == "PromptCache":
            return len(PROMPT) - len(self.prompt_cache().fetch_nearest_cache(key, PROMPT)[1])
        if edge == "PrefixStore":
            # Never left: then it would be stored again.
            cache, rest = kv.PrefixStore(self.folder, digests=self.digests).prefix(self.model, PROMPT).__enter__()
            assert all(layer.keys is None for layer in cache) == (len(rest) == len(PROMPT))
            return len(PROMPT) - len(rest)
        # As vllm-mlx asks, which expands codes afterwards.
        store = self.store
        store.epoch(key, self.model)
        found = store.fetch(key, [kv.probe(self.model)], PROMPT, finish=self.finish)
        return 0 if found is None else found[1]

    def finish(self, cache: list[Any]) -> list[Any]:
        """What an edge may do to a restored cache."""
        return cache


EDGES = ["PromptCache", "PrefixStore", "ModelStore"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Edges:
    """The model and its store."""
    return Edges(tmp_path_factory.mktemp("edges"))


@pytest.fixture
def edges(shared: Edges, monkeypatch: pytest.MonkeyPatch) -> Edges:
    """With a stored prompt and nothing else."""
    shared.client = FakeClient()
    monkeypatch.setattr(kv, "connect", lambda address: shared.client)
    key = (shared.folder, None, None)
    shared.prompt_cache().insert_cache(key, TOKENS, filled(shared.model, TOKENS))
    return shared


def require_rejected(edges: Edges) -> None:
    """Once: counted, and the daemon is asked to look at what was handed over."""
    assert edges.client.refusals == [Reason.CORRUPT]
    assert edges.client.only.rejected == [TOKENS]


@pytest.mark.parametrize("edge", EDGES)
def test_a_sound_hit_is_used(edges: Edges, edge: str) -> None:
    """So that a miss in the other tests says something."""
    assert edges.covered(edge) == len(TOKENS)
    assert edges.client.refusals == edges.client.only.rejected == []


@pytest.mark.parametrize("edge", EDGES)
def test_a_ring_with_a_wrong_index_is_a_miss(edges: Edges, edge: str) -> None:
    """One number; the engine would end its generation thread."""

    def spoiled(layers: Sequence[Any]) -> list[Any]:
        return [replace(one, numbers=(("index", 12345),)) if isinstance(one, StateLayer) else one for one in layers]

    stored = edges.client.only.stored
    stored[:] = [(tokens, spoiled(layers)) for tokens, layers in stored]
    assert edges.covered(edge) == 0
    require_rejected(edges)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("edge", EDGES)
def test_whatever_restoring_raises_is_a_miss(
    edges: Edges, edge: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours, the engine's, or the machine's."""

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("kvstore.integrations.restoring.restore", fails)
    assert edges.covered(edge) == 0
    require_rejected(edges)


def test_what_an_edge_does_to_a_restored_cache_is_guarded_too(edges: Edges, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-mlx expands codes, on the scheduler's thread."""

    def fails(cache: list[Any]) -> list[Any]:
        raise ValueError("no such bits")

    monkeypatch.setattr(edges, "finish", fails)
    assert edges.covered("ModelStore") == 0
    require_rejected(edges)
