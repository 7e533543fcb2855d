"""From stored codes to those of a smaller profile: places, ranks and the error, without an engine."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.codecs.encode import at_once
from kvstore.codecs.profiles import parse_profile
from kvstore.codecs.runs import EncodedRun, payload_run
from kvstore.codecs.transcode import gather_layers, is_finite, relative_error, transcode
from kvstore.core.blocks import FIDELITY_EXACT, Block, Run
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from tests.support.stored import random_payload

# Two geometries, and values of another width than keys.
LAYOUT = Layout(
    (
        LayerSpec(PartSpec(2, 64, "F32"), PartSpec(2, 32, "F32")),
        LayerSpec(PartSpec(1, 128, "F32"), PartSpec(1, 128, "F32")),
        LayerSpec(PartSpec(2, 64, "F32"), PartSpec(2, 32, "F32")),
    )
)
N_TOKENS = 100
CHANNEL4 = parse_profile("channel4:channel4").fidelity


def raw(seed: int = 0, scale: float = 1.0) -> EncodedRun:
    """A raw run of normally distributed values."""
    rng = np.random.default_rng(seed)
    values = np.frombuffer(random_payload(rng, "F32", N_TOKENS * LAYOUT.token_bytes // 4), np.float32) * np.float32(
        scale
    )
    return payload_run(LAYOUT, values.tobytes(), N_TOKENS)


def block_of(*runs: tuple[int, int]) -> Block:
    """A block of runs of (tokens shown, rank)."""
    made = tuple(Run(shown, 0, shown, rank, ()) for shown, rank in runs)
    return Block(b"", b"", b"", 0, b"", min(rank for _, rank in runs), made)


def test_layers_are_gathered_into_the_order_in_which_raw_kv_travels() -> None:
    """Each share at the place of its layer, keys and values apart."""
    one = raw()
    shares: dict[int, list[memoryview]] = {layer: [] for layer in range(3)}
    for stack, rows in zip(one.run.stacks, one.buffers, strict=True):
        for position, layer in enumerate(stack.layers):
            shares[layer].append(np.ascontiguousarray(rows[position]).data.cast("B"))
    again = gather_layers(LAYOUT, lambda layer: shares[layer], N_TOKENS)
    assert again.run == one.run
    assert all(np.array_equal(a, b) for a, b in zip(again.buffers, one.buffers, strict=True))


def test_the_relative_error_is_the_larger_of_keys_and_values() -> None:
    """As numpy computes it over all layers of a part."""
    one, other = raw(0), raw(1)
    wanted = []
    for part in ("keys", "values"):
        pairs = [
            (a.view(np.float32).astype(np.float64), b.view(np.float32).astype(np.float64))
            for stack, a, b in zip(one.run.stacks, one.buffers, other.buffers, strict=True)
            if stack.part == part
        ]
        squares = sum(np.square(b - a).sum() for a, b in pairs), sum(np.square(a).sum() for a, _ in pairs)
        wanted.append((squares[0] / squares[1]) ** 0.5)
    found = relative_error(LAYOUT, one, other, lambda work: work())
    assert found == pytest.approx(max(wanted), rel=1e-5)
    assert relative_error(LAYOUT, one, one, lambda work: work()) == 0.0


def test_tokens_after_the_last_whole_group_keep_the_rank_that_their_codes_had() -> None:
    """They are raw again, and no better than before: so no later store takes them for first-hand values."""
    runs = transcode(LAYOUT, raw(), block_of((80, 800), (20, 700)), parse_profile("channel4:channel4"), at_once)
    assert [(one.run.shown, one.run.fidelity) for one in runs] == [(64, CHANNEL4), (36, 700)]


def test_a_remainder_that_was_raw_before_stays_exact() -> None:
    """It waits for the rest of its group, as it did."""
    runs = transcode(
        LAYOUT, raw(), block_of((64, 800), (36, FIDELITY_EXACT)), parse_profile("channel4:channel4"), at_once
    )
    assert [(one.run.shown, one.run.fidelity) for one in runs] == [(64, CHANNEL4), (36, FIDELITY_EXACT)]


def test_a_value_that_is_not_finite_is_seen_in_any_layer() -> None:
    """One is enough."""
    one = raw()
    assert is_finite(LAYOUT, one)
    last = one.buffers[-1].copy()
    last.view(np.float32)[0, 0, 5, 3] = np.nan
    assert not is_finite(LAYOUT, EncodedRun(one.run, (*one.buffers[:-1], last)))
