"""Every way in which models lay out their caches: captured, kept as bytes, restored, continued; bit-equal logits.

Continuations are of 1 to 4 tokens: a stale recurrent state shows at once and hides after twenty. The compiler of MLX is
off; it would spend a minute in g++ and both sides would run the same code.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import kvstore
from kvstore.core.layers import KVLayer, Layout, StateLayer
from kvstore.integrations import mlx_lm as kv
from tests.support.daemon import DaemonProcess
from tests.support.models import build_tiny, fill, make_cache
from tests.support.replay import (
    CASES,
    DTYPES,
    TOKENS,
    copied,
    feed,
    layout_of,
    namespace_of,
    steps,
    store_case,
)
from tests.support.topologies import TOPOLOGIES

Layers = list[KVLayer | StateLayer]
NAMES = list(dict.fromkeys(name for name, _ in CASES))
CHUNK = 7


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    """Run models as they are written."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@functools.lru_cache(maxsize=2)
def model_of(name: str, dtype: str = "F32") -> Any:
    """The model of a topology, kept for the tests that follow each other."""
    return build_tiny(name, DTYPES[dtype])


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_restored_cache_continues_bit_for_bit(name: str, dtype: str) -> None:
    """After a prefill and after single tokens (a ring is in another order then), by 1 to 4 tokens and by a chunk."""
    model, n_tokens = model_of(name, dtype), TOPOLOGIES[name].n_tokens
    layout = layout_of(name, model)
    for last in (n_tokens, n_tokens - 3):
        cache, other = (fill(name, model, TOKENS[:last]) for _ in range(2))
        for original in (cache, other):
            steps(model, original, last, n_tokens - last)
        assert kv.layout(cache) == layout, "the layout was known before, and does not depend on the token count"
        layers = copied(kv.capture(cache, n_tokens))
        assert {layer.n_tokens for layer in layers} == {n_tokens}
        restored, again = kv.restore(layers, layout.tree), kv.restore(layers, layout.tree)
        assert [type(layer) for layer in restored] == [type(layer) for layer in cache]
        assert steps(model, restored, n_tokens) == steps(model, cache, n_tokens)
        chunk = TOKENS[n_tokens : n_tokens + CHUNK]
        assert feed(model, again, chunk) == feed(model, other, chunk)


@pytest.mark.parametrize("name", NAMES)
def test_no_kind_of_tensor_can_be_wrong_unseen(name: str) -> None:
    """Zeroed, or exchanged with the same one of another layer: the comparison above fails for each kind of tensor."""
    model, n_tokens = model_of(name), TOPOLOGIES[name].n_tokens
    cache = fill(name, model, TOKENS[:n_tokens])
    layers, tree = copied(kv.capture(cache, n_tokens)), kv.layout(cache).tree
    right = steps(model, cache, n_tokens)
    assert steps(model, kv.restore(layers, tree), n_tokens) == right
    for what, wrong in spoiled(layers):
        assert steps(model, kv.restore(wrong, tree), n_tokens) != right, what


def spoiled(layers: Layers) -> Iterator[tuple[str, Layers]]:
    """The layers with one tensor wrong, for each kind of tensor in each kind of layer: zeroed, then exchanged."""
    places: dict[tuple[str, str], list[int]] = {}
    for index, layer in enumerate(layers):
        for name, array in tensors(layer).items():
            # deepseek_v32 keeps index keys alone, with zeros as their values.
            if array.size and mx.any(array).item():
                kind = f"{layer.spec.kind} {layer.spec.params} {array.dtype} {array.shape}"
                places.setdefault((kind, name), []).append(index)
    for (kind, name), found in places.items():
        first = found[0]
        array = tensors(layers[first])[name]
        yield f"{kind} {name} zeroed", changed(layers, first, name, mx.zeros_like(array))
        for other in found[1:2]:
            crossed = changed(layers, first, name, tensors(layers[other])[name])
            yield f"{kind} {name} exchanged", changed(crossed, other, name, array)


def tensors(layer: KVLayer | StateLayer) -> dict[str, mx.array]:
    """The arrays of a layer by name."""
    if isinstance(layer, StateLayer):
        return dict(layer.arrays)
    return {f"{part}.{i}": array for part in ("keys", "values") for i, array in enumerate(layer.part(part))}


def changed(layers: Layers, index: int, name: str, array: mx.array) -> Layers:
    """The layers with another array in one place."""
    layer = layers[index]
    if isinstance(layer, StateLayer):
        new: KVLayer | StateLayer = replace(
            layer, arrays=tuple((n, array if n == name else a) for n, a in layer.arrays)
        )
    else:
        part, at = name.split(".")
        held = list(layer.part(part))
        held[int(at)] = array
        new = replace(layer, keys=tuple(held)) if part == "keys" else replace(layer, values=tuple(held))
    return [*layers[:index], new, *layers[index + 1 :]]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon of its own."""
    with DaemonProcess(tmp_path_factory.mktemp("topologies") / "data") as started:
        yield started


def test_daemon_keeps_every_topology_for_another_process(daemon: DaemonProcess) -> None:
    """Store, restart, fetch in another process, continue by 1 to 4 tokens: bit-equal logits at profile raw."""
    with kvstore.connect(daemon.listen) as client:
        expected = [store_case(client, name, dtype) for name, dtype in CASES]
    daemon.restart()
    command = [sys.executable, "-m", "tests.support.replay", daemon.listen]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wrong = {case: got[0] for case, got, want in zip(CASES, found, expected, strict=True) if got != want}
    assert not wrong


@pytest.mark.parametrize("name", [name for name in ("gemma3", "qwen3_5", "falcon_h1", "mamba") if name in NAMES])
def test_daemon_never_cuts_what_is_valid_at_one_position(daemon: DaemonProcess, name: str) -> None:
    """A fetch gives the longest checkpoint at or below what is asked for, or a miss that says why."""
    model = model_of(name)
    layout = layout_of(name, model)
    assert layout.exact_layers
    checkpoints = (40, 256, 300)  # in the first block, at its very end, and after it
    with kvstore.connect(daemon.listen) as client:
        session = client.session(namespace_of(f"{name} cut", "F32", layout), profile="raw")
        cache, held, expected = make_cache(name, model), 0, {}
        for at in checkpoints:
            feed(model, cache, TOKENS[held:at])
            layers = kv.capture(cache, at)
            session.store(TOKENS[:at], layers, wait=True)
            held, expected[at] = at, steps(model, kv.restore(copied(layers), layout.tree), at)
        for asked, diverging, found in (
            (301, [], 300),
            (300, [], 256),  # one token must be left to feed
            (280, [1, 2, 3], 256),
            (257, [], 256),
            (256, [], 40),
            (200, [1, 2, 3], 40),
            (41, [], 40),
            (40, [], 0),
            (35, [9, 9, 9, 9, 9, 9], 0),
        ):
            answer = session.fetch(TOKENS[:asked] + diverging)
            assert answer.n_tokens == found, (asked, answer)
            if isinstance(answer, kvstore.Hit):
                assert steps(model, kv.restore(answer.layers, layout.tree), found) == expected[found]
            else:
                assert answer.reason == kvstore.Reason.NO_CHECKPOINT


def test_what_can_be_sliced_is_told_apart() -> None:
    """By layout and by cache alike; only plain, quantized and latent layers can."""
    for name in NAMES:
        sliceable = name.startswith(("llama_", "deepseek_v3", "minimax")) or name == "llama"
        assert bool(layout_of(name, model_of(name)).exact_layers) != sliceable, name
        assert bool(kv.layout(fill(name, model_of(name), TOKENS[:5])).exact_layers) != sliceable, name


def test_every_layout_has_a_record_that_reads_back() -> None:
    """With its nesting; and another dtype of the same model is another layout, without kv layers too."""
    for name in NAMES:
        layout = layout_of(name, model_of(name))
        assert Layout.from_record(layout.record) == layout
    for name in ("mamba", "rwkv7", "qwen3_5", "gemma3"):
        assert layout_of(name, model_of(name, "BF16")) != layout_of(name, model_of(name, "F32"))
