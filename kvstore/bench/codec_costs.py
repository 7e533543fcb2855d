"""`kvstore bench codec`: size, error, time and memory of profiles on synthetic KV, measured with the store's own code.

As in the daemon and the worker, each layer is encoded block by block, serialized in full, and assembled again from
these bytes with all checksums verified. A layer's original is freed before it is decoded. Values are normally
distributed, with a few key channels eight times as large, as in real models. `bench quality` measures on a real model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from kvstore.bench import plot
from kvstore.bench.shape import Shape
from kvstore.blobs.format import ReadyBlob, make_ready
from kvstore.blobs.ranges import BufferReader, Range
from kvstore.codecs.assemble import assemble_layer
from kvstore.codecs.byte_plan import HitBlock
from kvstore.codecs.device import dtype_of, flat_bytes
from kvstore.codecs.encode import encode_runs
from kvstore.codecs.profiles import PROFILES, Profile, parse_profile
from kvstore.codecs.runs import pack_run, payload_run
from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, Block, pack_tokens
from kvstore.core.keys import block_key
from kvstore.core.layers import Layout

NAMES = ("raw", "affine8", "affine4", *PROFILES)
LOUD_CHANNELS = 4
LOUD = 8.0


@dataclass(frozen=True, slots=True)
class CodecRow:
    """One profile at one shape. Errors in units of the root mean square of the values; times are best of all rounds."""

    profile: str
    seq_len: int
    head_dim: int
    nbytes: int
    of_dtype: float
    of_float32: float
    mean_error: float
    max_error: float
    encode_s: float
    decode_s: float
    encode_peak_bytes: int
    decode_peak_bytes: int


@dataclass
class _Tally:
    nbytes: int = 0
    squares: float = 0.0
    errors: float = 0.0
    worst: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    encode_peak: int = 0
    decode_peak: int = 0


def measure_codecs(shapes: Sequence[Shape], names: Sequence[str], rounds: int) -> list[CodecRow]:
    """Every profile at every shape, `rounds` times in turn, on the thread of the device. ConfigError for a name."""
    profiles = [parse_profile(name) for name in names]
    return [row for shape in shapes for row in _at(shape, profiles, rounds)]


def _at(shape: Shape, profiles: Sequence[Profile], rounds: int) -> Iterator[CodecRow]:
    runs: dict[str, list[_Tally]] = {profile.name: [] for profile in profiles}
    for _ in range(rounds):
        for profile in profiles:
            runs[profile.name].append(_pass(shape, profile))
    values = 2 * shape.layers * shape.seq_len * shape.kv_heads * shape.head_dim
    for name, tallies in runs.items():
        first, rms = tallies[0], (tallies[0].squares / values) ** 0.5
        yield CodecRow(
            profile=name,
            seq_len=shape.seq_len,
            head_dim=shape.head_dim,
            nbytes=first.nbytes,
            of_dtype=first.nbytes / shape.nbytes,
            of_float32=first.nbytes / (4 * values),
            mean_error=first.errors / values / rms,
            max_error=first.worst / rms,
            encode_s=min(tally.encode_s for tally in tallies),
            decode_s=min(tally.decode_s for tally in tallies),
            encode_peak_bytes=max(tally.encode_peak for tally in tallies),
            decode_peak_bytes=max(tally.decode_peak for tally in tallies),
        )


def _pass(shape: Shape, profile: Profile) -> _Tally:
    """All layers through one profile, one at a time."""
    layout = Layout(shape.layout.layers[:1])
    tally = _Tally()
    for layer in range(shape.layers):
        original = _layer(shape, layer)
        mx.reset_peak_memory()
        before, started_s = mx.get_active_memory(), time.perf_counter()
        blocks = _encoded(layout, original, profile)
        tally.encode_s += time.perf_counter() - started_s
        tally.encode_peak = max(tally.encode_peak, mx.get_peak_memory() - before)
        tally.nbytes += sum(len(view) for block in blocks for view in block.payload)
        kept = [np.array(array.astype(mx.float32)) for array in original]
        del original
        reader, hit = _reader(blocks)
        mx.clear_cache()
        mx.reset_peak_memory()
        before, started_s = mx.get_active_memory(), time.perf_counter()
        decoded = assemble_layer(layout, 0, hit, reader, headroom_tokens=0)
        mx.eval(*decoded.keys, *decoded.values)
        tally.decode_s += time.perf_counter() - started_s
        tally.decode_peak = max(tally.decode_peak, mx.get_peak_memory() - before)
        for values, array in zip(kept, (*decoded.keys, *decoded.values), strict=True):
            off = np.abs(values - np.array(array[:, :, : shape.seq_len].astype(mx.float32)))
            tally.squares += float(np.square(values, dtype=np.float64).sum())
            tally.errors += float(off.sum(dtype=np.float64))
            tally.worst = max(tally.worst, float(off.max()))
    return tally


def _layer(shape: Shape, number: int) -> list[mx.array]:
    """Keys and values of one layer, `[1, heads, tokens, width]`, evaluated."""
    key = mx.random.key(number)
    dtype = dtype_of(shape.layout.layers[0].keys.dtype)
    made = []
    for part in range(2):
        key, own = mx.random.split(key)
        array = mx.random.normal((1, shape.kv_heads, shape.seq_len, shape.head_dim), key=own)
        if part == 0:
            loud = mx.arange(shape.head_dim) % max(1, shape.head_dim // LOUD_CHANNELS) == 1
            array = mx.where(loud, array * LOUD, array)
        made.append(array.astype(dtype))
    mx.eval(made)
    return made


def _encoded(layout: Layout, arrays: Sequence[mx.array], profile: Profile) -> list[ReadyBlob]:
    """The blocks of one layer as the store would write them."""
    n_tokens = arrays[0].shape[2]
    tokens = pack_tokens(range(n_tokens))
    root = parent = bytes(32)
    blocks: list[ReadyBlob] = []
    for start in range(0, n_tokens, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, n_tokens)
        rows = [mx.contiguous(array[:, :, start:end]) for array in arrays]
        mx.eval(rows)
        raw = payload_run(layout, np.concatenate([flat_bytes(array) for array in rows]), end - start)
        encoded = [pack_run(layout, run, profile) for run in encode_runs(layout, [raw], profile, start)]
        own = tokens[start * TOKEN_BYTES : end * TOKEN_BYTES]
        fidelity = min(run.run.fidelity for run in encoded)
        key = block_key(parent, own)
        block = Block(root, parent, key, start, own, fidelity, tuple(run.run for run in encoded))
        blocks.append(make_ready(block, [buffer for run in encoded for buffer in run.buffers]))
        parent = key
    return blocks


def _reader(blocks: Sequence[ReadyBlob]) -> tuple[BufferReader, list[HitBlock]]:
    payloads = [b"".join(block.payload) for block in blocks]
    ranges = [Range(source, 0, len(payload)) for source, payload in enumerate(payloads)]
    hit = [HitBlock(block.block.runs, block.block.n_tokens) for block in blocks]
    return BufferReader(payloads, ranges), hit


def plot_codecs(rows: Sequence[CodecRow], path: Path) -> None:
    """Size, error and time of every profile along what was swept, as an SVG. ConfigError when it cannot be written."""
    from matplotlib.figure import Figure

    swept = "head_dim" if len({row.head_dim for row in rows}) > 1 else "seq_len"
    panels = (
        ("of_dtype", "bytes, of the dtype's own"),
        ("mean_error", "mean error, of the root mean square"),
        ("encode_s", "encoding, seconds"),
        ("decode_s", "decoding, seconds"),
    )
    figure = Figure(figsize=(11, 8), layout="constrained")
    for number, (field, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(2, 2, number)
        for name in dict.fromkeys(row.profile for row in rows):
            own = [row for row in rows if row.profile == name]
            axes.plot([getattr(row, swept) for row in own], [getattr(row, field) for row in own], "o-", label=name)
        axes.set_xlabel(swept.replace("_", " "))
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize="small")
    plot.save(figure, path)
