"""A basis made for a model: what is probed of its attention, and that coding by it is better than without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from kvstore.codecs.basis_fit import GRID, Moments, cheapest_steps, fit_part, key_weights, value_weights
from kvstore.codecs.rope import Rope
from kvstore.core.layers import PartSpec
from kvstore.integrations.attention import QueryEnergy, attentions, output_weights, probe_rope
from kvstore.integrations.basis_maker import SHARES, make_basis
from kvstore.integrations.calibrate import Calibration, windows
from tests.support.models import build_tiny

Array = np.ndarray[Any, Any]


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
ROPES = {
    "halves": (lambda: nn.RoPE(64, base=10_000), 64, True, 32),
    "pairs": (lambda: nn.RoPE(64, traditional=True, base=1_000_000), 64, False, 32),
    "half of the channels": (lambda: nn.RoPE(16, base=10_000), 32, True, 8),
    "half of the channels, pairs": (lambda: nn.RoPE(16, traditional=True), 32, False, 8),
    "yarn": (lambda: initialize_rope(64, 10_000, False, YARN, 4096), 64, True, 32),
}


@pytest.mark.parametrize("name", ROPES)
def test_a_rotation_is_found_by_what_it_does(name: str) -> None:
    """Frequencies, order of pairs, channels that stay, length: turned back, keys are what they were before."""
    make, width, halves, pairs = ROPES[name]
    rope = make()
    found = probe_rope(rope, width)
    assert found is not None and (found.halves, found.pairs) == (halves, pairs)
    rows = np.random.default_rng(0).normal(size=(1, 2, 50, width)).astype(np.float32)
    turned = np.array(rope(mx.array(rows), offset=1500))[0].transpose(1, 0, 2).copy()
    found.apply(turned, 1500, back=True)
    first = slice(0, 2 * pairs)
    assert np.abs(turned[..., first] - rows[0].transpose(1, 0, 2)[..., first]).max() < 0.01


class Odd:
    """Turns by the square of the position."""

    def __call__(self, rows: mx.array, offset: int = 0) -> mx.array:
        """As a rope is called."""
        turned: mx.array = nn.RoPE(64)(rows, offset=offset * offset)
        return turned


@pytest.mark.parametrize(
    "rope",
    [None, Odd(), nn.Identity(), lambda rows: rows, 7],
    ids=["none", "odd", "identity", "no offset", "no function"],
)
def test_what_is_no_rotation_of_fixed_frequencies_is_left_alone(rope: Any) -> None:
    """Then keys are coded as they are."""
    assert probe_rope(rope, 64) is None


def test_queries_and_output_projections_of_a_model_are_reached_and_put_back() -> None:
    """The rope of every layer is its own again, and W' W is that of the weights."""
    model = build_tiny("llama")
    found = attentions(model, len(model.layers))
    ropes = [one.rope for one in found]
    energy = QueryEnergy(found)
    with energy.listening():
        mx.eval(model(mx.array([[1, 2, 3]])))
    assert [one.rope for one in found] == ropes
    attention = found[0]
    heads, query_heads = attention.n_kv_heads, attention.n_heads
    width = attention.o_proj.weight.shape[1] // query_heads
    keys = PartSpec(heads, width, "F32")
    summed = energy.of_keys(0, keys)
    assert summed is not None and summed.shape == (heads, width) and (summed > 0).all()
    assert energy.of_keys(0, replace(keys, width=2 * width)) is None
    weights = output_weights(attention, heads, width, query_heads)
    columns = np.array(attention.o_proj.weight).T.reshape(heads, -1, width, attention.o_proj.weight.shape[0])
    assert weights is not None
    for head in range(heads):
        assert np.allclose(weights[head], sum(one @ one.T for one in columns[head]), atol=1e-4)
    assert attentions(model, 99) == [None] * 99
    assert output_weights(object(), 1, 8, 1) is None


def correlated(tokens: int, seed: int = 0) -> Array:
    """float32 `[tokens, 2, 16]` of two directions in each head, with a mean."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).normal(size=(4, 32))
    mixing[:2, :16] = mixing[2:, 16:] = 0
    rows = rng.normal(size=(tokens, 4)) @ mixing + 0.05 * rng.normal(size=(tokens, 32)) + 3
    return rows.reshape(tokens, 2, 16).astype(np.float32)


def test_the_components_of_a_basis_take_few_codes_and_weights_move_the_error() -> None:
    """Most codes of correlated rows are zero; a weighted head comes back better than the other."""
    moments = Moments(2, 16)
    for seed in range(4):
        moments.add(correlated(200, seed))
    by_head = np.stack([np.eye(16), 100 * np.eye(16)])
    errors = []
    for weights in (None, value_weights(by_head)):
        fitted = fit_part(moments, weights)
        part = replace(fitted.part, steps=np.array([0.8 * fitted.unit], np.float32))
        rows = correlated(100, 9)
        codes = part.encode(rows.copy(), 0, 0)
        assert codes is not None and (codes[0] == 0).mean() > 0.6
        out = np.empty((2, 100, 16), np.float32)
        part.decode(codes, 0, 0, out)
        errors.append(np.abs(out - rows.transpose(1, 0, 2)).mean(axis=(1, 2)))
    assert errors[1][1] < 0.5 * errors[1][0] and 0.5 < errors[0][1] / errors[0][0] < 2


def test_pairs_that_turn_share_the_energy_of_their_queries() -> None:
    """A rotation mixes both, so an error in one becomes one in the other."""
    energy = np.arange(8.0).reshape(1, 8)
    weights = key_weights(energy, Rope(np.ones(2), halves=False))
    assert np.diag(weights[0]).tolist() == [1, 1, 5, 5, 4, 5, 6, 7]
    assert np.diag(key_weights(energy, None)[0]).tolist() == list(range(8))


def test_the_cheapest_steps_spend_bits_where_they_save_most() -> None:
    """Of two parts that differ in KL alone the dearer one gets the smaller step; bits are what was asked."""
    kl = np.stack([GRID**2, 100 * GRID**2])
    bits = np.stack([2 - np.log2(GRID)] * 2)
    steps = cheapest_steps(kl, bits, 5.0)
    assert steps[1] < 0.5 * steps[0]
    assert (2 - np.log2(steps)).sum() == pytest.approx(5.0, abs=0.2)
    assert (cheapest_steps(kl, bits, 100.0) == GRID[0]).all()


@pytest.mark.parametrize(
    ("name", "notes"), [("llama", ()), ("deepseek_v3", ("rotation", "queries", "output projection"))]
)
def test_a_model_gets_a_basis_of_all_its_layers(name: str, notes: tuple[str, ...]) -> None:
    """With points of falling bits; what could not be reached is said."""
    model = build_tiny(name)
    tokens = [int(token) for token in np.random.default_rng(0).integers(1, 60, 1500)]
    calibration = Calibration(model, windows(tokens, 1, 60, 80, lambda text: [1 + ord(c) % 50 for c in text[:4]]))
    told: list[tuple[int, int]] = []
    made = make_basis(calibration, model, tokens[:400], 1, lambda *far: told.append(far))
    assert len(made.notes) == len(notes) and all(what in said for what, said in zip(notes, made.notes, strict=True))
    assert len(told) == len(made.basis.parts) and told[-1][0] == told[-1][1]
    for (_, part_name), part in made.basis.parts.items():
        assert len(part.steps) == len(SHARES) and (np.diff(part.steps) >= 0).all()
        assert (part.rope is not None) == (part_name == "keys" and name == "llama")
