"""What came out of the store lossy never enters it again as first-hand, however it goes through an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from mlx_lm.utils import load

from kvstore.client.client import Client
from kvstore.client.results import Hit
from kvstore.core.blocks import FIDELITY_EXACT, Reason
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.model_names import ModelKey
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prompt_cache import PromptCache
from tests.support.daemon import DaemonProcess
from tests.support.models import heldout_tokens, write_tiny
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace
from tests.test_prompt_cache import Provider

TOKENS = heldout_tokens()[:700]
LOSSY = "affine4"
BITS, GROUP = 8, 64
PATIENT_MS = {"fetch_connect_ms": 10_000, "fetch_stall_ms": 20_000, "fetch_total_ms": 60_000}


class Server:
    """The parts of an mlx_lm.server that fill, quantize and keep caches, with the store behind them."""

    def __init__(self, client: Client, digests: WeightsDigest, key: ModelKey, model: Any, **flags: Any) -> None:
        self.key, self.model = key, model
        self.store = ModelStore(client, digests, profile=flags.pop("profile", None), salt=flags.pop("salt"))
        provider = Provider(key, model)  # type: ignore[arg-type]
        for name, value in flags.items():
            setattr(provider.cli_args, name, value)
        self.bits = provider.cli_args.kv_bits
        self.cache = PromptCache(store=self.store, provider=provider)

    def serve(self, tokens: list[int]) -> tuple[int, list[Any]]:
        """(tokens that were not computed, the cache after the prompt, which is stored)."""
        cache, rest = self.cache.fetch_nearest_cache(self.key, tokens)
        cache = make_prompt_cache(self.model) if cache is None else cache
        self.model(mx.array([rest]), cache=cache)
        maybe_quantize_kv_cache(cache, 0, GROUP, self.bits)
        mx.eval([layer.state for layer in cache])
        self.cache.insert_cache(self.key, tokens, cache)
        assert self.store.flush(60.0)
        return len(tokens) - len(rest), cache


@pytest.fixture
def servers(shared_daemon: DaemonProcess, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """New servers of one model, which share nothing with those of other tests."""
    folder = write_tiny(tmp_path / "small", dtype=mx.bfloat16)
    model = load(str(folder))[0]
    digests = WeightsDigest(tmp_path / "cache")
    assert digests.wait(folder, 60.0)
    salt = request.node.name.encode()
    with client_of(shared_daemon, **PATIENT_MS) as client:
        yield lambda **flags: Server(client, digests, (str(folder), None, None), model, salt=salt, **flags)


def values(layer: Any, n_tokens: int) -> mx.array:
    """The keys of a layer, whatever it keeps them as."""
    keys = layer.keys
    if isinstance(layer, QuantizedKVCache):
        keys = mx.dequantize(*(mx.contiguous(one) for one in keys), group_size=GROUP, bits=BITS)
    return keys[..., :n_tokens, :].astype(mx.float32)


def test_a_lossy_hit_that_the_engine_quantizes_is_not_first_hand(servers: Any) -> None:
    """With --kv-bits a plain hit of 4 bits becomes codes of 8 in another namespace. Exact stays exact there."""
    _, own = servers(profile=LOSSY).serve(TOKENS)
    assert {type(layer) for layer in own} == {KVCache}
    covered, _ = servers(kv_bits=BITS).serve([*TOKENS, 5, 6, 7])
    assert covered == 700, "the lossy hit was used"
    first_hand = make_prompt_cache(servers().model)
    servers().model(mx.array([TOKENS]), cache=first_hand)
    maybe_quantize_kv_cache(first_hand, 0, GROUP, BITS)
    exact = servers(kv_bits=BITS, profile="exact")
    cache, rest = exact.cache.fetch_nearest_cache(exact.key, [*TOKENS, 5, 6, 7, 8])
    covered = 704 - len(rest)
    off = max(
        (
            mx.abs(values(mine, min(covered, 700)) - values(true, min(covered, 700))).max().item()
            for mine, true in zip(cache or (), first_hand, strict=False)
        ),
        default=0.0,
    )
    assert (covered, off) == (0, 0.0), "values of an exact session that are not those of the model"
    session = exact.store.session(exact.key, kv.layout(first_hand), exact.cache._epoch(exact.key))
    assert session is not None and session.match([*TOKENS, 5]).reason is Reason.FIDELITY


def test_codes_of_the_model_itself_are_exact(servers: Any) -> None:
    """The same way without a lossy hit: what the engine quantized is what it computes with."""
    servers(kv_bits=BITS).serve(TOKENS)
    exact = servers(kv_bits=BITS, profile="exact")
    cache, rest = exact.cache.fetch_nearest_cache(exact.key, [*TOKENS, 5])
    assert cache is not None and rest == [5]


def test_another_session_does_not_launder_a_lossy_hit(client: Client) -> None:
    """Fetched by one session, stored by another of the same weights, in the same layout and in another."""
    layout = make_layout()
    namespace, tokens = make_namespace(layout, "launder"), list(range(7, 707))
    lossy, exact = patient(client, namespace, LOSSY), patient(client, namespace, "exact")
    assert lossy.store(tokens, make_layers(layout, tokens), wait=True).stored_tokens == 700
    hit = lossy.fetch([*tokens, 1])
    assert isinstance(hit, Hit) and hit.fidelity < FIDELITY_EXACT
    exact.store(tokens, hit.layers, wait=True)
    assert exact.fetch([*tokens, 1]).reason is Reason.FIDELITY
    assert exact.store(tokens, make_layers(layout, tokens), wait=True, restored_tokens=0).stored_tokens == 700
    kept = exact.fetch([*tokens, 1])
    assert isinstance(kept, Hit) and kept.fidelity == FIDELITY_EXACT, "what the caller vouches for is first-hand"
