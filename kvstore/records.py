"""The serial form of blocks: msgpack, validated on every parse, since a header is outside input whoever wrote it.

A whole block stands in its blob's header (`block_to_record`). Index rows and fetch replies carry its runs or states
(`runs_to_list`, `states_to_list`) beside fields of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgpack

from kvstore.blocks import (
    BLOCK_TOKENS,
    ITEM_BYTES,
    KEY_BYTES,
    TOKEN_BYTES,
    UNPACKED_BYTES_MAX,
    Block,
    LayerState,
    Recipe,
    Run,
    Stack,
    StateArray,
    Tensor,
    packed_bytes_max,
)
from kvstore.errors import CorruptDataError

# The one version of blocks and blobs. A reader refuses every other.
RECORD_VERSION = 3

# Limits of one record, checked on every parse.
RUNS_MAX = BLOCK_TOKENS
STACKS_MAX = 1024
TENSORS_MAX = 4096
DIMENSIONS_MAX = 8
NUMBERS_MAX = 32


def block_to_record(block: Block) -> bytes:
    """The record of a block, as it stands in the header of its blob."""
    fields = (
        RECORD_VERSION,
        block.root,
        block.parent,
        block.key,
        block.start,
        block.tokens,
        block.fidelity,
        block.created_s,
        block.namespace,
        runs_to_list(block.runs),
        states_to_list(block.states),
    )
    packed: bytes = msgpack.packb(fields)
    return packed


def block_from_record(record: bytes) -> Block:
    """Parse and validate a record; CorruptDataError on anything that is not one."""
    fields = unpack_record(record)
    if not isinstance(fields, list) or len(fields) != 11 or fields[0] != RECORD_VERSION:
        raise CorruptDataError("not a block record of a known version")
    _, root, parent, key, start, tokens, fidelity, created_s, namespace, runs, states = fields
    for name, value, size in (("root", root, KEY_BYTES), ("parent", parent, KEY_BYTES), ("key", key, KEY_BYTES)):
        if not isinstance(value, bytes) or len(value) != size:
            raise CorruptDataError(f"block record: bad {name}")
    if not isinstance(tokens, bytes) or len(tokens) % TOKEN_BYTES or not isinstance(namespace, bytes):
        raise CorruptDataError("block record: bad tokens or namespace")
    whole = (_whole(start, "start"), _whole(fidelity, "fidelity"), _whole(created_s, "created_s"))
    block = Block(
        root,
        parent,
        key,
        whole[0],
        tokens,
        whole[1],
        runs_from_list(runs),
        whole[2],
        namespace,
        states_from_list(states),
    )
    block.demand_whole()
    return block


def unpack_record(record: bytes) -> Any:
    """msgpack to plain lists; CorruptDataError when it is not msgpack."""
    try:
        return msgpack.unpackb(record, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise CorruptDataError(f"not a record: {error}") from error


def runs_to_list(runs: Sequence[Run]) -> list[Any]:
    """Runs as plain lists, for msgpack."""
    return [
        [
            run.n_tokens,
            run.skip,
            run.shown,
            run.fidelity,
            [
                [
                    stack.part,
                    list(stack.layers),
                    [stack.recipe.name, stack.recipe.version, [list(p) for p in stack.recipe.params]],
                    [_tensor_list(tensor) for tensor in stack.tensors],
                ]
                for stack in run.stacks
            ],
        ]
        for run in runs
    ]


def _tensor_list(tensor: Tensor) -> list[Any]:
    fields = [tensor.name, tensor.dtype, tensor.heads, tensor.width, tensor.offset, tensor.checksums]
    if tensor.lengths or tensor.group_tokens > 1:
        fields += [list(tensor.lengths), tensor.group_tokens]
    return fields


def runs_from_list(value: Any) -> tuple[Run, ...]:
    """Parse and validate what `runs_to_list` wrote; CorruptDataError otherwise."""
    try:
        if len(value) > RUNS_MAX:
            raise CorruptDataError("too many runs")
        return tuple(_run(*fields) for fields in value)
    except (TypeError, ValueError) as error:
        raise CorruptDataError(f"not a list of runs: {error}") from error


def _run(n_tokens: Any, skip: Any, shown: Any, fidelity: Any, stacks: Any) -> Run:
    if len(stacks) > STACKS_MAX:
        raise CorruptDataError("too many stacks")
    n = _whole(n_tokens, "n_tokens")
    run = Run(
        n,
        _whole(skip, "skip"),
        _whole(shown, "shown"),
        _whole(fidelity, "fidelity"),
        tuple(_stack(*fields) for fields in stacks),
    )
    if run.skip + run.shown > n or not run.shown:
        raise CorruptDataError("a run shows tokens that it does not hold")
    for tensor in (tensor for stack in run.stacks for tensor in stack.tensors):
        _check_rows(tensor, n)
    return run


def _check_rows(tensor: Tensor, n_tokens: int) -> None:
    """Whole groups; and packed shares neither empty nor longer than packing may make them, nor without bound."""
    if n_tokens % tensor.group_tokens:
        raise CorruptDataError("a tensor of groups in a run that does not end with one")
    if not tensor.lengths:
        return
    nbytes = tensor.layer_bytes(n_tokens)
    if nbytes > UNPACKED_BYTES_MAX or not all(0 < length <= packed_bytes_max(nbytes) for length in tensor.lengths):
        raise CorruptDataError("a packed tensor of impossible lengths")


def _stack(part: Any, layers: Any, recipe: Any, tensors: Any) -> Stack:
    if part not in ("keys", "values") or len(tensors) > TENSORS_MAX or len(layers) > TENSORS_MAX:
        raise CorruptDataError("bad stack")
    name, version, params = recipe
    if not isinstance(name, str):
        raise CorruptDataError("bad recipe")
    pairs = tuple((str(k), _whole(v, "recipe parameter")) for k, v in params)
    indices = tuple(_whole(layer, "layer") for layer in layers)
    parsed = tuple(_tensor(len(indices), *fields) for fields in tensors)
    return Stack(part, indices, Recipe(name, _whole(version, "recipe version"), pairs), parsed)


def _tensor(
    n_layers: int,
    name: Any,
    dtype: Any,
    heads: Any,
    width: Any,
    offset: Any,
    checksums: Any,
    lengths: Any = (),
    group_tokens: Any = 1,
) -> Tensor:
    if dtype not in ITEM_BYTES or not isinstance(name, str) or not name.isidentifier():
        raise CorruptDataError("bad tensor")
    if not isinstance(checksums, bytes) or len(checksums) not in (0, 8 * n_layers):
        raise CorruptDataError("bad checksums")
    sizes, group = tuple(_whole(length, "length") for length in lengths), _whole(group_tokens, "group_tokens")
    if len(sizes) not in (0, n_layers) or not group:
        raise CorruptDataError("bad lengths or groups")
    whole = (_whole(heads, "heads"), _whole(width, "width"), _whole(offset, "offset"))
    return Tensor(name, dtype, *whole, checksums, sizes, group)


def states_to_list(states: Sequence[LayerState]) -> list[Any]:
    """A checkpoint's layers as plain lists, for msgpack."""
    return [
        [
            state.layer,
            [list(pair) for pair in state.numbers],
            [[a.name, a.dtype, list(a.shape), a.offset, a.checksum] for a in state.arrays],
        ]
        for state in states
    ]


def states_from_list(value: Any) -> tuple[LayerState, ...]:
    """Parse and validate what `states_to_list` wrote; CorruptDataError otherwise."""
    try:
        if len(value) > TENSORS_MAX or sum(len(arrays) for _, _, arrays in value) > TENSORS_MAX:
            raise CorruptDataError("too many state arrays")
        states = tuple(_state(*fields) for fields in value)
    except (TypeError, ValueError) as error:
        raise CorruptDataError(f"not a list of states: {error}") from error
    if any(a.layer >= b.layer for a, b in itertools.pairwise(states)):
        raise CorruptDataError("states must be in the order of their layers")
    return states


def _state(layer: Any, numbers: Any, arrays: Any) -> LayerState:
    if len(numbers) > NUMBERS_MAX:
        raise CorruptDataError("too many numbers")
    pairs = tuple((_name(name), _signed(value)) for name, value in numbers)
    return LayerState(_whole(layer, "layer"), pairs, tuple(_state_array(*fields) for fields in arrays))


def _state_array(name: Any, dtype: Any, shape: Any, offset: Any, checksum: Any) -> StateArray:
    if dtype not in ITEM_BYTES or not isinstance(checksum, bytes) or len(checksum) not in (0, 8):
        raise CorruptDataError("bad state array")
    if len(shape) > DIMENSIONS_MAX:
        raise CorruptDataError("a state array with too many dimensions")
    sizes = tuple(_whole(size, "size") for size in shape)
    return StateArray(_name(name), dtype, sizes, _whole(offset, "offset"), checksum)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise CorruptDataError("not a name")
    return value


def _signed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 62) < value < 1 << 62:
        raise CorruptDataError("not a whole number")
    return value


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise CorruptDataError(f"{name} must be a whole number")
    return value
