"""Hits continued by the small trained model: what it computes after a fetch against what it computes cold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from kvstore.client.client import Client
from kvstore.core.keys import Namespace
from kvstore.core.layers import KVLayer, Layout
from kvstore.integrations import mlx_lm as kv
from tests.support.models import expand_small_lm, heldout_tokens
from tests.support.sessions import WAYS, fetch, patient

CHUNK = 256
STORED = heldout_tokens()[:512]
OTHER = heldout_tokens()[4000:4044]  # what a prompt goes on with that parts from the stored one
# Mean divergence from cold, in nats a token. Measured: 8 bits 1e-4 at most, 4 bits 6e-4, rows off by one token 5e-4.
CLOSE = 2.5e-4

# (prompt, tokens that a fetch gives of it): stored is longer, stored is shorter, and they part inside.
PROMPTS = {
    "supersequence": (STORED[:257], 256),
    "prefix": (STORED + OTHER, 512),
    "longest common prefix": (STORED[:256] + OTHER, 256),
    "supersequence, anywhere": (STORED[:300], 299),
    "longest common prefix, anywhere": (STORED[:100] + OTHER, 100),
}
EQUAL_CHUNKS = [case for case in PROMPTS if "anywhere" not in case]


class Bench:
    """The model with what it computed cold, each prompt once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layout = kv.probe(model)
        self._cold: dict[str, mx.array] = {}

    def prefill(self, tokens: Sequence[int], cache: list[Any]) -> mx.array:
        """Feed tokens in chunks that end where those of a cold prompt end; logits `[tokens, vocabulary]`, float32."""
        logits, at = [], cache[0].offset
        end = at + len(tokens)
        while at < end:
            step = min(CHUNK - at % CHUNK, end - at)
            chunk = mx.array([tokens[at - end :][:step]])
            logits.append(self.model(chunk, cache=cache)[0].astype(mx.float32))
            mx.eval(logits[-1])
            at += step
        return mx.concatenate(logits)

    def cold(self, case: str) -> mx.array:
        """Logits of a whole prompt without any store."""
        if case not in self._cold:
            self._cold[case] = self.prefill(PROMPTS[case][0], make_prompt_cache(self.model))
        return self._cold[case]

    def warm(self, case: str, layers: Sequence[KVLayer]) -> tuple[mx.array, mx.array]:
        """Logits after a hit, and those of the same tokens cold."""
        prompt, n_tokens = PROMPTS[case]
        return self.prefill(prompt[n_tokens:], kv.restore(layers)), self.cold(case)[n_tokens:]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The small model with plain weights."""
    return Bench(load_model(expand_small_lm(tmp_path_factory.mktemp("model") / "small-lm"))[0])


@pytest.fixture(scope="module")
def computed(bench: Bench) -> list[KVLayer]:
    """The cache of the stored tokens, as the model left it."""
    cache = make_prompt_cache(bench.model)
    bench.prefill(STORED, cache)
    return kv.capture(cache)


def hit_after_store(
    client: Client, layers: list[KVLayer], layout: Layout, profile: str, case: str, way: tuple[str, str] = WAYS[0]
) -> tuple[KVLayer, ...]:
    """What a worker fetches of a prompt after another one stored 512 tokens at that profile."""
    namespace = Namespace(weights=profile.encode(), layout=layout, dtype="BF16", engine="test 1")
    assert patient(client, namespace, profile).store(STORED, layers, wait=True).stored_tokens == len(STORED)
    prompt, n_tokens = PROMPTS[case]
    hit = fetch(patient(client, namespace, profile), prompt, way)
    assert hit.n_tokens == n_tokens
    return hit.layers


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("case", EQUAL_CHUNKS)
def test_at_raw_logits_are_those_of_a_cold_prompt_bit_for_bit(
    bench: Bench, client: Client, computed: list[KVLayer], case: str, way: tuple[str, str]
) -> None:
    """Where the rest is fed in the chunks in which a cold prompt would be."""
    warm, cold = bench.warm(case, hit_after_store(client, computed, bench.layout, "raw", case, way))
    assert mx.array_equal(warm, cold).item()


@pytest.mark.parametrize("case", PROMPTS)
def test_at_eight_bits_logits_stay_close_to_cold(
    bench: Bench, client: Client, computed: list[KVLayer], case: str
) -> None:
    """Wherever the prompt was cut, in whatever chunks the rest is fed."""
    warm, cold = bench.warm(case, hit_after_store(client, computed, bench.layout, "affine8", case))
    assert divergence(cold, warm) < CLOSE


def test_the_bound_is_one_that_can_be_missed(bench: Bench, client: Client, computed: list[KVLayer]) -> None:
    """By four bits, and by a prefix that is off by one token."""
    case = "longest common prefix"
    warm, cold = bench.warm(case, hit_after_store(client, computed, bench.layout, "affine4", case))
    assert divergence(cold, warm) > CLOSE
    hit = hit_after_store(client, computed, bench.layout, "raw", case)
    shifted = [
        replace(layer, keys=(mx.roll(layer.keys[0], 1, axis=2),), values=(mx.roll(layer.values[0], 1, axis=2),))
        for layer in hit
    ]
    warm, cold = bench.warm(case, shifted)
    assert divergence(cold, warm) > CLOSE


def divergence(want: mx.array, got: mx.array) -> float:
    """Mean Kullback-Leibler divergence in nats a token."""
    p, q = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (want, got))
    return float(mx.mean(mx.sum(mx.exp(p) * (p - q), axis=-1)).item())
