"""Continuing a sequence from a cache, and comparing what comes out bit by bit.

`python -m tests.support.replay ADDRESS` is the other process of the topology suite: it builds every model again from
its seed, fetches what the first process stored, continues, and prints digests of the logits as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

import kvstore
from kvstore.core.keys import Namespace
from kvstore.core.layers import KVLayer, Layout, StateLayer
from kvstore.integrations import mlx_lm as kv
from tests.support.limits import small_config
from tests.support.models import build_tiny, fill
from tests.support.tiny_configs import VOCAB
from tests.support.topologies import TOPOLOGIES

DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
TOKENS = [(7 * i * i + 3 * i + 1) % VOCAB for i in range(400)]
STEPS = 4

# Every topology that this mlx-lm knows, in every dtype that a CPU can run it in.
CASES = [
    (name, dtype) for name, t in TOPOLOGIES.items() if t.is_there for dtype in DTYPES if dtype == "F32" or not t.is_moe
]


def raw(array: mx.array) -> bytes:
    """The bytes of an array."""
    mx.eval(array)
    return bytes(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8))) if array.size else b""


def feed(model: Any, cache: list[Any], tokens: Sequence[int]) -> bytes:
    """The logits after the last of `tokens`, fed at once."""
    return raw(model(mx.array([list(tokens)]), cache=cache)[0, -1])


def steps(model: Any, cache: list[Any], n_tokens: int, count: int = STEPS) -> list[bytes]:
    """The logits after each of the `count` tokens that follow the first `n_tokens`, fed one by one."""
    return [feed(model, cache, TOKENS[at : at + 1]) for at in range(n_tokens, n_tokens + count)]


def copied(layers: Sequence[KVLayer | StateLayer]) -> list[KVLayer | StateLayer]:
    """The layers with arrays made anew from their bytes, without head-room: what a store could keep, and no more."""
    return [_copied_layer(layer) for layer in layers]


def _copied_layer(layer: KVLayer | StateLayer) -> KVLayer | StateLayer:
    if isinstance(layer, StateLayer):
        return replace(layer, arrays=tuple((name, anew(array)) for name, array in layer.arrays))
    keys, values = (
        tuple(anew(array[:, :, : layer.n_tokens]) for array in layer.part(part)) for part in ("keys", "values")
    )
    return replace(layer, keys=keys, values=values)


def anew(array: mx.array) -> mx.array:
    """An array of the same bytes that shares nothing with this one."""
    if not array.size:
        return mx.zeros(array.shape, array.dtype)
    return mx.array(np.frombuffer(raw(array), np.uint8)).view(array.dtype).reshape(array.shape)


def layout_of(name: str, model: Any) -> Layout:
    """The layout of a topology before anything was computed."""
    topology = TOPOLOGIES[name]
    plain = kv.probe(model, max_kv_size=topology.max_kv_size)
    return kv.quantized(plain, topology.bits, 64) if topology.bits else plain


def namespace_of(name: str, dtype: str, layout: Layout) -> Namespace:
    """A namespace for a topology in a dtype."""
    return Namespace(weights=name.encode(), layout=layout, dtype=dtype, engine="test 1", alias=name)


def digests(logits: Sequence[bytes]) -> list[str]:
    """Short enough to print, long enough to be equal only for equal bits."""
    return [hashlib.sha256(one).hexdigest() for one in logits]


def store_case(client: kvstore.Client, name: str, dtype: str) -> list[str]:
    """Fill a cache, store it raw, and return the digests of its continuation."""
    model = build_tiny(name, DTYPES[dtype])
    n_tokens = TOPOLOGIES[name].n_tokens
    cache = fill(name, model, TOKENS[:n_tokens])
    session = client.session(namespace_of(name, dtype, layout_of(name, model)), profile="raw")
    result = session.store(TOKENS[:n_tokens], kv.capture(cache, n_tokens), wait=True)
    assert result.stored_tokens == n_tokens, (name, dtype, result)
    return digests(steps(model, cache, n_tokens))


def fetch_case(client: kvstore.Client, name: str, dtype: str) -> list[str]:
    """Fetch what `store_case` stored and return the digests of the same continuation; the reason if there is no hit."""
    model = build_tiny(name, DTYPES[dtype])
    n_tokens = TOPOLOGIES[name].n_tokens
    layout = layout_of(name, model)
    session = client.session(namespace_of(name, dtype, layout), profile="raw")
    hit = session.fetch(TOKENS[: n_tokens + 1])
    if not isinstance(hit, kvstore.Hit) or hit.n_tokens != n_tokens:
        return [f"{hit.n_tokens} tokens: {hit.reason}"]
    return digests(steps(model, kv.restore(hit.layers, layout.tree), n_tokens))


def main(address: str) -> None:
    """Fetch and continue every case."""
    mx.disable_compile()
    client = kvstore.connect(config=small_config(address))
    print(json.dumps([fetch_case(client, name, dtype) for name, dtype in CASES]))
    client.close()


if __name__ == "__main__":
    main(sys.argv[1])
