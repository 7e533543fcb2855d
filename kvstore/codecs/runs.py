"""Runs with their bytes: what the store path makes, encodes, narrows, joins and finally writes.

Everything is numpy on any thread, except the pieces of device work that `encode_run` submits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm

import numpy as np

from kvstore.blocks import FIDELITY_EXACT, ITEM_BYTES, RAW, Recipe, Run, Stack
from kvstore.codecs import device
from kvstore.codecs.base import BlockCorruptError, codec_of, verify_range
from kvstore.codecs.device import Bytes
from kvstore.codecs.profiles import Profile
from kvstore.errors import CorruptDataError, InvalidRequestError
from kvstore.files import RangeReader
from kvstore.layers import Layout, PartSpec

# Raw bytes that are on the device at once: some 40 ms of work where there is no GPU (0.2 GB/s), and what bounds memory.
PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class EncodedRun:
    """A run without offsets and checksums, and its bytes.

    `buffers` holds one uint8 array a tensor, in the order of stacks and tensors: `[layers, heads, tokens, row_bytes]`,
    C-contiguous, never written to.
    """

    run: Run
    buffers: tuple[Bytes, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(buffer.nbytes for buffer in self.buffers)


def raw_run(
    layout: Layout, buffers: Sequence[memoryview | bytes | Bytes], n_tokens: int, fidelity: int = FIDELITY_EXACT
) -> EncodedRun:
    """A raw run over one buffer for each tensor of `layout.raw_stacks`; shares their memory.

    `fidelity` is less than exact for values that came out of the store. InvalidRequestError when a size is wrong.
    """
    run = Run(n_tokens, 0, n_tokens, fidelity, layout.raw_stacks)
    shapes = _shapes(run)
    if len(buffers) != len(shapes):
        raise InvalidRequestError(f"{len(buffers)} buffers for {len(shapes)} tensors")
    arrays = []
    for buffer, shape in zip(buffers, shapes, strict=True):
        flat = np.frombuffer(buffer, dtype=np.uint8)
        if flat.size != np.prod(shape):
            raise InvalidRequestError(f"{flat.size} bytes for a tensor of {np.prod(shape)}")
        arrays.append(flat.reshape(shape))
    return EncodedRun(run, tuple(arrays))


def payload_run(
    layout: Layout, payload: memoryview | bytes | Bytes, n_tokens: int, fidelity: int = FIDELITY_EXACT
) -> EncodedRun:
    """A raw run over the bytes of one piece (`layers.Piece`); shares their memory."""
    flat = np.frombuffer(payload, dtype=np.uint8)
    if flat.size != n_tokens * layout.token_bytes:
        raise InvalidRequestError(f"{flat.size} bytes for {n_tokens} tokens of {layout.token_bytes}")
    sizes = [len(s.layers) * t.layer_bytes(n_tokens) for s in layout.raw_stacks for t in s.tensors]
    ends = np.cumsum(sizes)
    return raw_run(layout, [flat[e - size : e] for e, size in zip(ends, sizes, strict=True)], n_tokens, fidelity)


Submit = Callable[[Callable[[], list[Bytes] | None]], list[Bytes] | None]


def at_once(work: Callable[[], list[Bytes] | None]) -> list[Bytes] | None:
    """Run a piece of device work here: for callers on the MLX thread."""
    return work()


def encode_run(layout: Layout, raw: EncodedRun, profile: Profile, submit: Submit = at_once) -> EncodedRun:
    """The run with its raw stacks encoded as the profile says.

    `submit` runs a piece of device work on the MLX thread and returns what it does; everything else is done here.

    A stack with a value that is not finite, or whose codes would overflow its dtype, stays raw, bit for bit; so does
    what is encoded already. Values in rows that the run hides are encoded with the rest.
    """
    stacks: list[Stack] = []
    buffers: list[Bytes] = []
    fidelity = raw.run.fidelity
    taken = 0
    for stack in raw.run.stacks:
        mine = raw.buffers[taken : taken + len(stack.tensors)]
        taken += len(stack.tensors)
        part = layout.layers[stack.layers[0]].part(stack.part)
        recipe = profile.recipe(stack.part, part) if stack.recipe == RAW else RAW
        encoded = _encode_stack(mine[0], part, recipe, submit) if recipe != RAW else None
        if encoded is None:
            stacks.append(stack)
            buffers.extend(mine)
            continue
        codec = codec_of(recipe)
        stacks.append(replace(stack, recipe=recipe, tensors=codec.tensors(part, recipe)))
        buffers.extend(encoded)
        fidelity = min(fidelity, codec.fidelity(recipe))
    return EncodedRun(replace(raw.run, fidelity=fidelity, stacks=tuple(stacks)), tuple(buffers))


def _encode_stack(rows: Bytes, part: PartSpec, recipe: Recipe, submit: Submit) -> list[Bytes] | None:
    """The tensors of `rows` [L, H, T, row_bytes], a few layers at a time; None when they must stay raw."""
    if not device.all_finite(rows, part.dtype):
        return None
    n_layers, _, n_tokens, _ = rows.shape
    out = [
        np.empty((n_layers, t.heads, n_tokens, t.width * ITEM_BYTES[t.dtype]), np.uint8)
        for t in codec_of(recipe).tensors(part, recipe)
    ]
    step = max(1, PIECE_BYTES * n_layers // max(1, rows.nbytes))
    for at in range(0, n_layers, step):
        tensors = submit(functools.partial(_encode_piece, rows[at : at + step], part, recipe))
        if tensors is None:
            return None
        for buffer, tensor in zip(out, tensors, strict=True):
            buffer[at : at + step] = tensor
    return out


def _encode_piece(rows: Bytes, part: PartSpec, recipe: Recipe) -> list[Bytes] | None:
    """The tensors of a few layers, None when their codes cannot be trusted. MLX thread only."""
    codec = codec_of(recipe)
    tensors = codec.encode(device.to_array(rows, part.dtype), recipe)
    trusted = codec.trusted(tensors, recipe)
    device.evaluate([*tensors, trusted])
    return [device.to_bytes(tensor) for tensor in tensors] if trusted.item() else None


def narrow_run(encoded: EncodedRun, shown: int) -> EncodedRun:
    """The first `shown` of the tokens shown. Hidden rows go, down to whole groups of the codecs; may copy."""
    run = encoded.run
    if not 0 < shown <= run.shown:
        raise InvalidRequestError(f"cannot show {shown} of {run.shown} tokens")
    group = lcm(*(codec_of(stack.recipe).group_tokens for stack in run.stacks))
    first = run.skip // group * group
    last = min(run.n_tokens, -(-(run.skip + shown) // group) * group)
    narrowed = replace(run, n_tokens=last - first, skip=run.skip - first, shown=shown)
    if last - first == run.n_tokens:
        return replace(encoded, run=narrowed)
    return EncodedRun(narrowed, tuple(np.ascontiguousarray(b[:, :, first:last]) for b in encoded.buffers))


def join_runs(runs: Sequence[EncodedRun]) -> list[EncodedRun]:
    """The same tokens in as few runs: neighbours of equal stacks and fidelity become one. Copies what it joins."""
    groups: list[list[EncodedRun]] = []
    for encoded in runs:
        if groups and _joinable(groups[-1][-1].run, encoded.run):
            groups[-1].append(encoded)
        else:
            groups.append([encoded])
    return [_joined(group) for group in groups]


def _joinable(a: Run, b: Run) -> bool:
    exact = all(codec_of(stack.recipe).group_tokens == 1 for stack in a.stacks)
    hidden = a.shown < a.n_tokens or b.shown < b.n_tokens
    return exact and not hidden and a.fidelity == b.fidelity and _geometry(a) == _geometry(b)


def _geometry(run: Run) -> tuple[Stack, ...]:
    """The stacks without where their bytes are."""
    return tuple(
        replace(stack, tensors=tuple(replace(t, offset=0, checksums=b"") for t in stack.tensors))
        for stack in run.stacks
    )


def _joined(group: Sequence[EncodedRun]) -> EncodedRun:
    if len(group) == 1:
        return group[0]
    n_tokens = sum(encoded.run.n_tokens for encoded in group)
    run = replace(group[0].run, n_tokens=n_tokens, shown=n_tokens)
    columns = zip(*(encoded.buffers for encoded in group), strict=True)
    return EncodedRun(run, tuple(np.concatenate(column, axis=2) for column in columns))


def load_run(run: Run, source: int, reader: RangeReader) -> EncodedRun:
    """Read a stored run back, to splice it into another block. BlockCorruptError unless every checksum holds."""
    buffers = []
    shapes = iter(_shapes(run))
    for stack in run.stacks:
        for tensor in stack.tensors:
            rows = np.empty(next(shapes), np.uint8)
            try:
                reader.readinto(source, tensor.offset, [rows.data.cast("B")])
            except CorruptDataError as error:
                raise BlockCorruptError(str(error), source) from error
            for position, layer in enumerate(rows):
                verify_range([layer.data], tensor.checksum(position), source)
            buffers.append(rows)
    return EncodedRun(replace(run, stacks=_geometry(run)), tuple(buffers))


def _shapes(run: Run) -> list[tuple[int, int, int, int]]:
    """Shape of each tensor as bytes, in order."""
    return [
        (len(stack.layers), tensor.heads, run.n_tokens, tensor.width * ITEM_BYTES[tensor.dtype])
        for stack in run.stacks
        for tensor in stack.tensors
    ]
