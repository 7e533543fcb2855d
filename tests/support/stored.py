"""Encoded runs as stored bytes: offsets and checksums filled in, payloads in files or in a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from kvstore.blobs.ranges import BufferReader, FileSource
from kvstore.codecs.byte_plan import HitBlock, layer_ranges
from kvstore.codecs.runs import EncodedRun, stacks_of
from kvstore.core.blocks import Run

PAYLOAD_OFFSET = 128


def finish_runs(runs: Sequence[EncodedRun]) -> tuple[tuple[Run, ...], bytes]:
    """Runs with offsets and checksums, and the payload that they describe."""
    payload = bytearray()
    sealed: list[Run] = []
    for encoded in runs:
        n_tokens = encoded.run.n_tokens
        stacks = []
        for stack, buffers in stacks_of(encoded):
            tensors = []
            for tensor, buffer in zip(stack.tensors, buffers, strict=True):
                data = buffer.tobytes()
                shares = [tensor.layer_range(position, n_tokens) for position in range(len(stack.layers))]
                sums = (xxhash.xxh3_64_intdigest(data[at : at + size]).to_bytes(8, "little") for at, size in shares)
                tensors.append(replace(tensor, offset=len(payload), checksums=b"".join(sums)))
                payload += data
            stacks.append(replace(stack, tensors=tuple(tensors)))
        sealed.append(replace(encoded.run, stacks=tuple(stacks)))
    return tuple(sealed), bytes(payload)


def write_source(path: Path, payload: bytes) -> FileSource:
    """A file with some header before the payload."""
    path.write_bytes(b"\xee" * PAYLOAD_OFFSET + payload)
    return FileSource(str(path), PAYLOAD_OFFSET, PAYLOAD_OFFSET + len(payload))


def streamed(blocks: Sequence[HitBlock], payloads: Sequence[bytes], layer: int) -> BufferReader:
    """One layer of a hit as it arrives by stream: the stored ranges, one after the other."""
    ranges = layer_ranges(blocks, layer)
    data = b"".join(payloads[r.source][r.offset : r.offset + r.nbytes] for r in ranges)
    return BufferReader([data], ranges)


def random_payload(rng: np.random.Generator, dtype: str, n_values: int) -> bytes:
    """Finite values of a float dtype, normally distributed."""
    values = rng.standard_normal(n_values).astype(np.float32)
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        return values.astype(np.float16).tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
