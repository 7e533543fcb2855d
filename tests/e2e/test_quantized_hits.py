"""Hits that stay quantized: affine codes as mlx-lm's own quantized cache has them, attended to without decoding."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from mlx_lm.utils import load

from kvstore.client.client import Client
from kvstore.client.results import Hit
from kvstore.core.keys import Namespace
from kvstore.core.layers import PARTS, KVLayer
from kvstore.integrations import mlx_lm as kv
from tests.support.models import expand_small_lm, heldout_tokens
from tests.support.sessions import patient
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

TOKENS = list(range(7, 707))


@pytest.mark.parametrize("transport", ["path", "stream"])
@pytest.mark.parametrize(("profile", "bits", "group"), [("affine8", 8, 64), ("affine4-g32", 4, 32)])
def test_codes_are_those_that_mlx_would_have_made(
    client: Client, transport: str, profile: str, bits: int, group: int
) -> None:
    """Bit for bit, cut inside a block, with head-room; by both ways."""
    layout = make_layout()
    session = patient(client, make_namespace(layout, f"codes {profile} {transport}"), profile)
    layers = make_layers(layout, TOKENS)
    assert session.store(TOKENS, layers, wait=True).stored_tokens == 700
    hit = session.fetch([*TOKENS[:600], 1], "quantized", transport)  # type: ignore[arg-type]
    assert isinstance(hit, Hit) and hit.n_tokens == 600
    for layer, original in zip(hit.layers, layers, strict=True):
        assert isinstance(layer, KVLayer)
        assert (layer.spec.keys.bits, layer.spec.keys.group) == (bits, group)
        for part in PARTS:
            expected = mx.quantize(original.part(part)[0][:, :, :600], group_size=group, bits=bits)
            for got, wanted in zip(layer.part(part), expected, strict=True):
                assert got.shape[2] > 600
                assert mx.array_equal(got[:, :, :600], wanted).item()


@pytest.mark.parametrize("profile", ["exact", "safe", "affine8:affine4"])
def test_what_mlx_cannot_attend_to_comes_decoded(client: Client, profile: str) -> None:
    """Nothing is lost by asking."""
    layout = make_layout()
    session = patient(client, make_namespace(layout, f"decoded {profile}"), profile)
    assert session.store(TOKENS, make_layers(layout, TOKENS), wait=True).stored_tokens == 700
    asked, plain = (session.fetch([*TOKENS, 1], way) for way in ("quantized", "packed"))
    assert isinstance(asked, Hit) and isinstance(plain, Hit)
    for one, other in zip(asked.layers, plain.layers, strict=True):
        assert isinstance(one, KVLayer) and isinstance(other, KVLayer) and one.spec == layout.layers[0]
        assert mx.array_equal(one.keys[0], other.keys[0]).item()
    if profile == "exact":
        assert_rows(asked.layers, layout, TOKENS)


def test_a_short_sequence_that_is_kept_raw_comes_as_it_is(client: Client) -> None:
    """Under the threshold nothing is quantized."""
    layout = make_layout()
    session = patient(client, make_namespace(layout, "short"), "affine8")
    session.store(TOKENS[:100], make_layers(layout, TOKENS[:100]), wait=True)
    hit = session.fetch([*TOKENS[:100], 1], "quantized")
    assert isinstance(hit, Hit)
    assert_rows(hit.layers, layout, TOKENS[:100])


def test_a_model_goes_on_from_a_quantized_hit_as_from_its_own_quantized_cache(client: Client, tmp_path: Path) -> None:
    """The same logits, bit for bit: keys are never decoded in full."""
    model = load(str(expand_small_lm(tmp_path / "small")))[0]
    tokens = heldout_tokens()[:300]
    cache = make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    layers = kv.capture(cache)
    namespace = Namespace(weights=b"small", layout=kv.layout(cache))
    session = patient(client, namespace, "affine8")
    assert session.store(tokens, layers, wait=True).stored_tokens == 300
    hit = session.fetch([*tokens, 1], "quantized")
    assert isinstance(hit, Hit)
    restored = kv.restore(hit.layers)
    own = [layer.to_quantized(group_size=64, bits=8) for layer in cache if isinstance(layer, KVCache)]
    assert all(isinstance(layer, QuantizedKVCache) for layer in (*restored, *own))
    following = mx.array([heldout_tokens()[300:308]])
    warm, reference = (np.array(model(following, cache=each).astype(mx.float32)) for each in (restored, own))
    assert np.array_equal(warm, reference)
