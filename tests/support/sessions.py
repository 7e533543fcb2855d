"""Sessions with a real daemon: patient clients, every way of fetching, and KV of random rows that no codec keeps."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from kvstore.client.client import Client, connect
from kvstore.client.results import Hit
from kvstore.client.session import Session
from kvstore.core.keys import Namespace
from kvstore.core.layers import PARTS, KVLayer, Layout, PartSpec
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.support.daemon import DaemonProcess
from tests.support.limits import small_config
from tests.support.synthetic import MX_DTYPES

WAYS = (("packed", "path"), ("packed", "stream"), ("dense", "stream"))
# A busy machine must not turn a hit into a miss.
PATIENT = {"connect_ms": 10_000, "stall_ms": 20_000, "total_ms": 60_000}
BITS_OF = {"BF16": mx.uint16, "F16": mx.uint16, "F32": mx.uint32, "U32": mx.uint32}

Rows = list[dict[str, tuple[mx.array, ...]]]  # by layer and part: each tensor `[1, heads, tokens, width]`


def client_of(daemon: DaemonProcess, **settings: object) -> Client:
    """A client that takes prefixes of any length."""
    plain = daemon.config.get("insecure_tcp") == "true"
    return connect(config=small_config(daemon.listen, **{"insecure_tcp": plain, **settings}))


def patient(client: Client, namespace: Namespace, profile: str | None = None) -> Session:
    """A session whose time limits do not decide a test."""
    return client.session(namespace, profile, **PATIENT)  # type: ignore[arg-type]


def fetch(session: Session, prompt: Sequence[int], way: tuple[str, str] = WAYS[0]) -> Hit:
    """A hit, by this way and no other."""
    hit = session.fetch(prompt, *way)  # type: ignore[arg-type]
    assert isinstance(hit, Hit), hit
    assert (hit.source.representation, hit.source.transport) == way
    return hit


def store(session: Session, tokens: Sequence[int], rows: Rows) -> int:
    """Store all tokens and wait until they are durable; bytes written."""
    result = session.store(tokens, layers_of(session.namespace.layout, rows, len(tokens)), wait=True)
    assert (result.stored_tokens, result.durable) == (len(tokens), True), result
    return result.new_bytes


def layers_of(layout: Layout, rows: Rows, n_tokens: int) -> list[KVLayer]:
    """Cache layers over the rows, of which `n_tokens` count."""
    return [
        KVLayer(spec, parts["keys"], parts["values"], n_tokens) for spec, parts in zip(layout.layers, rows, strict=True)
    ]


def hit_rows(hit: Hit) -> Rows:
    """The rows of a hit without its head-room, evaluated."""
    rows = [
        {part: tuple(array[:, :, : hit.n_tokens] for array in layer.part(part)) for part in PARTS}
        for layer in hit.layers
    ]
    mx.eval(rows)
    return rows


def cut(rows: Rows, start: int, end: int) -> Rows:
    """Tokens `[start, end)`."""
    return [{part: tuple(a[:, :, start:end] for a in arrays) for part, arrays in one.items()} for one in rows]


def join(*several: Rows) -> Rows:
    """Rows after rows."""
    joined = [
        {part: tuple(mx.concatenate(arrays, axis=2) for arrays in zip(*(one[part] for one in layers), strict=True))}
        for layers in zip(*several, strict=True)
        for part in PARTS
    ]
    merged = [keys | values for keys, values in zip(joined[::2], joined[1::2], strict=True)]
    mx.eval(merged)
    return merged


def normal_rows(layout: Layout, n_tokens: int, seed: int = 0) -> Rows:
    """Normally distributed rows: quantizing what was quantized before would change them."""
    rng = np.random.default_rng(seed)
    return [{part: _normal(rng, spec.part(part), n_tokens) for part in PARTS} for spec in layout.layers]


def _normal(rng: np.random.Generator, part: PartSpec, n_tokens: int) -> tuple[mx.array, ...]:
    if not part.width:
        return ()
    data = mx.array(rng.standard_normal((1, part.heads, n_tokens, part.width), np.float32)).astype(
        MX_DTYPES[part.dtype]
    )
    arrays = tuple(mx.quantize(data, part.group, part.bits)) if part.bits else (data,)
    mx.eval(*arrays)
    return arrays


def bit_rows(layout: Layout, n_tokens: int, seed: int = 0) -> Rows:
    """Rows of random bits: NaN payloads, infinities, subnormal numbers and negative zeros among them."""
    rng = np.random.default_rng(seed)
    return [{part: _random_bits(rng, spec.part(part), n_tokens) for part in PARTS} for spec in layout.layers]


def _random_bits(rng: np.random.Generator, part: PartSpec, n_tokens: int) -> tuple[mx.array, ...]:
    carrier = np.uint32 if part.dtype == "F32" else np.uint16
    data = rng.integers(0, 1 << (8 * carrier().itemsize), (1, part.heads, n_tokens, part.width), carrier)
    return (mx.array(data).view(MX_DTYPES[part.dtype]),)


def affine_rows(rows: Rows, layout: Layout, bits: int, group: int = 64) -> Rows:
    """What mlx itself makes of the rows, under the rule for widths that the group does not divide."""
    return [
        {part: tuple(affine(array, spec.part(part), bits, group) for array in one[part]) for part in PARTS}
        for one, spec in zip(rows, layout.layers, strict=True)
    ]


def affine(array: mx.array, part: PartSpec, bits: int, group: int) -> mx.array:
    """mx.quantize then mx.dequantize; a width that no group divides is quantized with all heads in one row."""
    _, heads, tokens, width = array.shape
    fits = next((size for size in (group, 32) if width % size == 0), 0)
    if fits:
        return mx.dequantize(*mx.quantize(array, fits, bits), fits, bits)
    fits = next((size for size in (group, 32) if heads * width % size == 0), 0)
    assert fits, "no group divides this part"
    folded = mx.contiguous(array.transpose(0, 2, 1, 3).reshape(1, 1, tokens, heads * width))
    decoded = mx.dequantize(*mx.quantize(folded, fits, bits), fits, bits)
    return decoded.reshape(1, tokens, heads, width).transpose(0, 2, 1, 3)


def same_bits(a: mx.array, b: mx.array, dtype: str) -> bool:
    """Equal bit for bit; NaN equals itself, and zero is not minus zero."""
    kind = BITS_OF[dtype]
    return bool(mx.array_equal(mx.contiguous(a).view(kind), mx.contiguous(b).view(kind)).item())


def assert_same(got: Rows, want: Rows, layout: Layout) -> None:
    """Bit for bit the same rows."""
    for index, (mine, theirs, spec) in enumerate(zip(got, want, layout.layers, strict=True)):
        for part in PARTS:
            tensors = spec.part(part).tensors()
            assert len(mine[part]) == len(theirs[part]) == len(tensors)
            for a, b, tensor in zip(mine[part], theirs[part], tensors, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                assert same_bits(a, b, tensor.dtype), f"layer {index} {part}.{tensor.name}: other rows"


def watch_uploads(session: Session) -> list[pb.BeginStoreReply]:
    """What the daemon asks this session for, from now on, appended as it comes."""
    seen: list[pb.BeginStoreReply] = []
    begin = session._uploader._begin

    def watched(job: object) -> pb.BeginStoreReply:
        reply = begin(job)  # type: ignore[arg-type]
        seen.append(reply)
        return reply

    session._uploader._begin = watched  # type: ignore[method-assign]
    return seen


def bytes_held(client: Client, namespace: Namespace) -> int:
    """Bytes on disk of a namespace's blobs."""
    spaces = client.stats()["namespaces"]
    return sum(space["bytes"] for space in spaces if space["id"] == namespace.root.hex())


def blocks_of(client: Client, namespace: Namespace) -> list[dict[str, object]]:
    """Every block of a namespace, in the order of its position."""
    blocks: list[dict[str, object]] = client.list(namespace.root)["blocks"]
    return sorted(blocks, key=lambda block: (block["start"], block["n_tokens"]))  # type: ignore[arg-type, return-value]


def du_bytes(folder: Path) -> int:
    """What `du` says of a folder, directories included."""
    done = subprocess.run(["du", "-sk", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) * 1024
