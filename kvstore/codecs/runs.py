"""Runs with their bytes, for the store path, which makes, narrows, joins, packs and writes them. numpy, on any thread.

Data of a byte codec is unpacked when it is read back (`load_run`) and packed again when it is written (`pack_run`). In
between it is as the codec's arrays are (raw for one that only packs), so all other code handles rows of tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvstore.blobs.protocol import RangeReader
from kvstore.codecs.codec import BlockCorruptError, packer_of, unpacked, verify_range
from kvstore.codecs.device import Bytes
from kvstore.codecs.profiles import Profile, targets
from kvstore.core.blocks import FIDELITY_EXACT, ITEM_BYTES, RAW, Recipe, Run, Stack, Tensor
from kvstore.core.layers import Layout
from kvstore.errors import CorruptDataError, InvalidRequestError


@dataclass(frozen=True)
class EncodedRun:
    """A run without offsets and checksums, and its bytes.

    `buffers` holds one uint8 array a tensor, in the order of stacks and tensors: `[layers, heads, rows, row_bytes]`,
    or, once it is packed, the shares of all layers one after the other. C-contiguous, never written to.
    """

    run: Run
    buffers: tuple[Bytes, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(buffer.nbytes for buffer in self.buffers)


def payload_run(
    layout: Layout, payload: memoryview | bytes | Bytes, n_tokens: int, fidelity: int = FIDELITY_EXACT
) -> EncodedRun:
    """A raw run over the bytes of one piece (`layers.Piece`); shares their memory.

    `fidelity` is less than exact for values that came out of the store. InvalidRequestError when the size is wrong.
    """
    flat = np.frombuffer(payload, dtype=np.uint8)
    if flat.size != n_tokens * layout.token_bytes:
        raise InvalidRequestError(f"{flat.size} bytes for {n_tokens} tokens of {layout.token_bytes}")
    buffers = []
    for stack in layout.raw_stacks:
        for tensor in stack.tensors:
            shape = (len(stack.layers), *_shape(tensor, n_tokens))
            own, flat = np.split(flat, [math.prod(shape)])
            buffers.append(own.reshape(shape))
    return EncodedRun(Run(n_tokens, 0, n_tokens, fidelity, layout.raw_stacks), tuple(buffers))


def narrow_run(encoded: EncodedRun, shown: int) -> EncodedRun:
    """The first `shown` of the tokens shown. Rows behind them go, down to whole groups of the codecs; may copy.

    Rows hidden before them stay: they are few, and groups begin with them.
    """
    run = encoded.run
    if not 0 < shown <= run.shown:
        raise InvalidRequestError(f"cannot show {shown} of {run.shown} tokens")
    group = group_tokens(run)
    last = min(run.n_tokens, -(-(run.skip + shown) // group) * group)
    narrowed = replace(run, n_tokens=last, shown=shown)
    return EncodedRun(narrowed, _rows(encoded, 0, last))


def cut_run(encoded: EncodedRun, at: int) -> tuple[EncodedRun, EncodedRun]:
    """Rows before and from `at`, a multiple of the groups, inside of what is shown. May copy."""
    run = encoded.run
    assert run.skip < at < run.skip + run.shown and not at % group_tokens(run)
    shown = at - run.skip
    first, second = _rows(encoded, 0, at), _rows(encoded, at, run.n_tokens)
    return (
        EncodedRun(replace(run, n_tokens=at, shown=shown), first),
        EncodedRun(replace(run, n_tokens=run.n_tokens - at, skip=0, shown=run.shown - shown), second),
    )


def group_tokens(run: Run) -> int:
    """Number of tokens that can only be kept together: the least common multiple of the tensors' groups."""
    return math.lcm(*(tensor.group_tokens for stack in run.stacks for tensor in stack.tensors))


def _rows(encoded: EncodedRun, first: int, last: int) -> tuple[Bytes, ...]:
    """Every buffer cut to tokens `[first, last)`, whole groups."""
    if (first, last) == (0, encoded.run.n_tokens):
        return encoded.buffers
    tensors = (tensor for stack in encoded.run.stacks for tensor in stack.tensors)
    return tuple(
        np.ascontiguousarray(buffer[:, :, tensor.rows(first) : tensor.rows(last)])
        for tensor, buffer in zip(tensors, encoded.buffers, strict=True)
    )


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
    """Whether nothing is hidden between the two, and all else is equal."""
    hidden = a.skip + a.shown < a.n_tokens or b.skip
    return not hidden and (a.fidelity, a.stacks) == (b.fidelity, b.stacks)


def _joined(group: Sequence[EncodedRun]) -> EncodedRun:
    if len(group) == 1:
        return group[0]
    n_tokens = sum(encoded.run.n_tokens for encoded in group)
    run = replace(group[0].run, n_tokens=n_tokens, shown=sum(encoded.run.shown for encoded in group))
    columns = zip(*(encoded.buffers for encoded in group), strict=True)
    return EncodedRun(run, tuple(np.concatenate(column, axis=2) for column in columns))


def pack_run(layout: Layout, encoded: EncodedRun, profile: Profile) -> EncodedRun:
    """The run with its raw stacks as the profile keeps what is not quantized: packed by a byte codec, or untouched."""
    stacks: list[Stack] = []
    buffers: list[Bytes] = []
    of = targets(layout, profile)
    for stack, mine in stacks_of(encoded):
        kept = {of[stack.part, layer].kept for layer in stack.layers} if stack.recipe == RAW else {stack.recipe}
        recipe = kept.pop() if len(kept) == 1 else profile.rest
        packed = [_packed(t, b, recipe) for t, b in zip(stack.tensors, mine, strict=True)]
        stacks.append(replace(stack, recipe=recipe, tensors=tuple(tensor for tensor, _ in packed)))
        buffers += [buffer for _, buffer in packed]
    return EncodedRun(replace(encoded.run, stacks=tuple(stacks)), tuple(buffers))


def _packed(tensor: Tensor, rows: Bytes, recipe: Recipe) -> tuple[Tensor, Bytes]:
    """A tensor and its bytes, each layer's share packed for itself if the recipe is a byte codec's."""
    packer = packer_of(recipe)
    if packer is None:
        return tensor, rows
    shares = [packer.pack(share, ITEM_BYTES[tensor.dtype]) for share in rows]
    return replace(tensor, lengths=tuple(map(len, shares))), np.frombuffer(b"".join(shares), np.uint8)


def stacks_of(encoded: EncodedRun) -> Iterator[tuple[Stack, list[Bytes]]]:
    """Each stack with its buffers."""
    buffers = iter(encoded.buffers)
    for stack in encoded.run.stacks:
        yield stack, [next(buffers) for _ in stack.tensors]


def load_run(run: Run, source: int, reader: RangeReader) -> EncodedRun:
    """Read a stored run back, unpacked, to splice it into another block.

    BlockCorruptError unless every checksum holds and every packed share unpacks.
    """
    buffers = []
    stacks = []
    for stack in run.stacks:
        buffers += [_load_tensor(run, stack, tensor, source, reader) for tensor in stack.tensors]
        stacks.append(replace(stack, recipe=unpacked(stack.recipe), tensors=tuple(t.bare() for t in stack.tensors)))
    return EncodedRun(replace(run, stacks=tuple(stacks)), tuple(buffers))


def _load_tensor(run: Run, stack: Stack, tensor: Tensor, source: int, reader: RangeReader) -> Bytes:
    """All layers of one tensor, verified and unpacked."""
    packer = packer_of(stack.recipe)
    rows = np.empty((len(stack.layers), *_shape(tensor, run.n_tokens)), np.uint8)
    try:
        for position, share in enumerate(rows):
            offset, nbytes = tensor.layer_range(position, run.n_tokens)
            stored = share if packer is None else np.empty(nbytes, np.uint8)
            reader.readinto(source, offset, [stored.data.cast("B")])
            verify_range([stored.data], tensor.checksum(position), source)
            if packer is not None:
                share[...] = packer.unpack(stored.data, _shape(tensor, run.n_tokens), ITEM_BYTES[tensor.dtype])
    except BlockCorruptError:
        raise
    except CorruptDataError as error:
        raise BlockCorruptError(str(error), source) from error
    return rows


def _shape(tensor: Tensor, n_tokens: int) -> tuple[int, int, int]:
    """Shape of one layer's share as bytes, unpacked."""
    return tensor.heads, tensor.rows(n_tokens), tensor.row_bytes
