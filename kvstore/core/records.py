"""Serialization of blocks as msgpack. Every parse validates its input, because a blob header is untrusted data.

A blob's header contains the whole block (`block_to_record`). Index rows and fetch replies contain its runs or states
(`runs_to_record`, `states_to_list`) and fields of their own.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import msgpack
import xxhash

from kvstore.core.blocks import (
    BLOCK_TOKENS,
    ITEM_BYTES,
    KEY_BYTES,
    TOKEN_BYTES,
    UNPACKED_BYTES_MAX,
    Aux,
    Block,
    LayerState,
    Origin,
    Recipe,
    Run,
    Stack,
    StateArray,
    Tensor,
    packed_bytes_max,
)
from kvstore.errors import CorruptDataError

# Tokens held, skipped and shown, whether checksums follow, fidelity, template.
RUN = struct.Struct("<HHHHQ16s")

# Limits of one record, checked on every parse.
RUNS_MAX = BLOCK_TOKENS
STACKS_MAX = 1024
TENSORS_MAX = 4096
SHARES_MAX = 1 << 16
TEMPLATES_MAX = 4096
DIMENSIONS_MAX = 8
NUMBERS_MAX = 32
REFERENCES_MAX = 4
# Largest aux block, and most that a process keeps of them in memory. The basis of a model with 64 layers, 1,024
# channels for keys and values each and 256 components is a quarter of it.
AUX_BYTES_MAX = 256 << 20


# Runs without their templates, and the records of these by id.
PackedRuns: TypeAlias = tuple[bytes, dict[bytes, bytes]]


def block_to_record(block: Block, packed: PackedRuns | None = None) -> bytes:
    """The record of a block, as it stands in the header of its blob. `packed`: its runs, if they are packed already."""
    runs, templates = packed or runs_to_record(block.runs)
    fields = (
        block.root,
        block.parent,
        block.key,
        block.start,
        block.tokens,
        block.fidelity,
        block.created_s,
        block.namespace,
        list(templates.values()),
        runs,
        states_to_list(block.states),
    )
    # Last, and only where there is one.
    aux = None if block.aux is None else astuple(block.aux)
    origin = () if block.origin is None else (astuple(block.origin),)
    record: bytes = msgpack.packb((*fields, aux, *origin) if aux or origin else fields)
    return record


def block_from_record(record: bytes) -> Block:
    """Parse and validate a record; CorruptDataError on anything that is not one."""
    fields = unpack_record(record)
    if not isinstance(fields, list) or not 11 <= len(fields) <= 13:
        raise CorruptDataError("not a block record")
    root, parent, key, start, tokens, fidelity, created_s, namespace, templates, runs, states, *rest = fields
    for name, value, size in (("root", root, KEY_BYTES), ("parent", parent, KEY_BYTES), ("key", key, KEY_BYTES)):
        if not isinstance(value, bytes) or len(value) != size:
            raise CorruptDataError(f"block record: bad {name}")
    if not all(isinstance(one, bytes) for one in (tokens, namespace, runs)) or len(tokens) % TOKEN_BYTES:
        raise CorruptDataError("block record: bad tokens, namespace or runs")
    whole = (_whole(start, "start"), _whole(fidelity, "fidelity"), _whole(created_s, "created_s"))
    block = Block(
        root,
        parent,
        key,
        whole[0],
        tokens,
        whole[1],
        runs_from_record(runs, templates_by_id(templates)),
        whole[2],
        namespace,
        states_from_list(states),
        aux_from_list(rest[0]) if rest and (rest[0] is not None or len(rest) == 1) else None,
        _origin(rest[1]) if len(rest) == 2 else None,
    )
    block.require_whole()
    return block


def _origin(value: Any) -> Origin:
    if not isinstance(value, list) or len(value) != 3:
        raise CorruptDataError("block record: bad origin")
    auto, settled, error = value
    if not isinstance(error, float) or not 0 <= error < math.inf or not (_flag(auto) | _flag(settled)):
        raise CorruptDataError("block record: bad origin")
    return Origin(auto, settled, error)


def templates_by_id(records: Any) -> dict[bytes, bytes]:
    """Template records by their ids; CorruptDataError when they are none."""
    if not isinstance(records, list) or len(records) > RUNS_MAX or not all(isinstance(one, bytes) for one in records):
        raise CorruptDataError("not a list of templates")
    return {parse_template(record).id: record for record in records}


def unpack_record(record: bytes) -> Any:
    """msgpack to plain lists; CorruptDataError when it is not msgpack."""
    try:
        return msgpack.unpackb(record, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise CorruptDataError(f"not a record: {error}") from error


@dataclass(frozen=True, slots=True)
class Template:
    """The part of a run's record that many runs share: parts, layers, recipes and the geometry of the tensors.

    `record` is its serial form, `id` the xxh3_128 of that. `stacks` have tensors without offset, checksums or lengths;
    `packed` says of each tensor, in order, whether a byte codec packed its shares.
    """

    id: bytes
    record: bytes
    stacks: tuple[Stack, ...]
    packed: tuple[bool, ...]


@lru_cache(maxsize=TEMPLATES_MAX)
def parse_template(record: bytes) -> Template:
    """Parse and validate; CorruptDataError otherwise."""
    fields = unpack_record(record)
    try:
        if len(fields) > STACKS_MAX:
            raise CorruptDataError("too many stacks")
        stacks = tuple(_stack(*stack) for stack in fields)
        packed = tuple(_flag(tensor[5]) for stack in fields for tensor in stack[3])
    except (TypeError, ValueError, IndexError) as error:
        raise CorruptDataError(f"not a template of runs: {error}") from error
    if len(packed) > TENSORS_MAX or sum(len(stack.layers) * len(stack.tensors) for stack in stacks) > SHARES_MAX:
        raise CorruptDataError("a template with too many tensors")
    return Template(xxhash.xxh3_128_digest(record), record, stacks, packed)


def template_of(run: Run) -> Template:
    """The template of a run."""
    fields = []
    for stack in run.stacks:
        recipe = stack.recipe
        # References stand last, and only where there are any.
        coded = (recipe.name, recipe.version, recipe.params, *([recipe.references] if recipe.references else ()))
        tensors = [(t.name, t.dtype, t.heads, t.width, t.group_tokens, bool(t.lengths)) for t in stack.tensors]
        fields.append((stack.part, stack.layers, coded, tensors))
    return parse_template(msgpack.packb(fields))


def runs_to_record(runs: Sequence[Run]) -> PackedRuns:
    """Pack runs.

    Of each run: RUN, then for each tensor its checksums (8 bytes a layer, if the run has any) and, where it is packed,
    its lengths (4 bytes a layer). Offsets follow: tensors lie one after the other, run by run.
    """
    parts: list[bytes] = []
    templates: dict[bytes, bytes] = {}
    for run in runs:
        template = template_of(run)
        templates[template.id] = template.record
        tensors = [tensor for stack in run.stacks for tensor in stack.tensors]
        checked = int(any(tensor.checksums for tensor in tensors))
        parts.append(RUN.pack(run.n_tokens, run.skip, run.shown, checked, run.fidelity, template.id))
        for tensor in tensors:
            parts += [tensor.checksums, struct.pack(f"<{len(tensor.lengths)}I", *tensor.lengths)]
    return b"".join(parts), templates


def runs_from_record(data: bytes, templates: Mapping[bytes, bytes]) -> tuple[Run, ...]:
    """Parse and validate what `runs_to_record` wrote; CorruptDataError otherwise, also when a template is missing."""
    runs: list[Run] = []
    at = offset = tensors = 0
    while at < len(data):
        if len(data) - at < RUN.size or len(runs) == RUNS_MAX:
            raise CorruptDataError("runs are cut short, or too many")
        n_tokens, skip, shown, checked, fidelity, template_id = RUN.unpack_from(data, at)
        record = templates.get(template_id)
        if record is None:
            raise CorruptDataError("a run whose template is not there")
        if checked > 1 or skip + shown > n_tokens or not shown:
            raise CorruptDataError("a run shows tokens that it does not hold")
        template = parse_template(record)
        tensors += len(template.packed)
        if tensors > TENSORS_MAX:
            raise CorruptDataError("runs with too many tensors")
        stacks, at, offset = _placed_stacks(data, at + RUN.size, template, n_tokens, checked, offset)
        runs.append(Run(n_tokens, skip, shown, fidelity, stacks))
    return tuple(runs)


def _placed_stacks(
    data: bytes, at: int, template: Template, n_tokens: int, checked: int, offset: int
) -> tuple[tuple[Stack, ...], int, int]:
    """(the stacks of a run with places and checksums, where the next run begins, and where its payload does)."""
    stacks: list[Stack] = []
    packed = iter(template.packed)
    for stack in template.stacks:
        n_layers = len(stack.layers)
        tensors: list[Tensor] = []
        for bare in stack.tensors:
            sums = data[at : at + 8 * n_layers * checked]
            at += 8 * n_layers * checked
            lengths: tuple[int, ...] = ()
            if next(packed):
                if len(data) - at < 4 * n_layers:
                    raise CorruptDataError("runs are cut short")
                lengths = struct.unpack_from(f"<{n_layers}I", data, at)
                at += 4 * n_layers
            tensor = Tensor(bare.name, bare.dtype, bare.heads, bare.width, offset, sums, lengths, bare.group_tokens)
            _check_rows(tensor, n_tokens)
            tensors.append(tensor)
            offset += tensor.stored_bytes(n_layers, n_tokens)
        stacks.append(Stack(stack.part, stack.layers, stack.recipe, tuple(tensors)))
    if at > len(data):
        raise CorruptDataError("runs are cut short")
    return tuple(stacks), at, offset


def _check_rows(tensor: Tensor, n_tokens: int) -> None:
    """Validate a tensor's lengths: whole groups of tokens, and packed shares within the sizes that packing can give."""
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
    name, version, params, *more = recipe
    references = tuple(more[0]) if more else ()
    if not isinstance(name, str) or len(more) > 1 or bool(more) != bool(references):
        raise CorruptDataError("bad recipe")
    if len(references) > REFERENCES_MAX or not all(isinstance(d, bytes) and len(d) == KEY_BYTES for d in references):
        raise CorruptDataError("bad references of a recipe")
    pairs = tuple((str(k), _whole(v, "recipe parameter")) for k, v in params)
    indices = tuple(_whole(layer, "layer") for layer in layers)
    parsed = tuple(_tensor(*fields) for fields in tensors)
    return Stack(part, indices, Recipe(name, _whole(version, "recipe version"), pairs, references), parsed)


def _tensor(name: Any, dtype: Any, heads: Any, width: Any, group_tokens: Any, packed: Any) -> Tensor:
    if dtype not in ITEM_BYTES or not isinstance(name, str) or not name.isidentifier():
        raise CorruptDataError("bad tensor")
    group = _whole(group_tokens, "group_tokens")
    _flag(packed)
    if not group:
        raise CorruptDataError("bad groups")
    return Tensor(name, dtype, _whole(heads, "heads"), _whole(width, "width"), group_tokens=group)


def states_to_list(states: Sequence[LayerState]) -> list[Any]:
    """A checkpoint's layers as plain tuples, for msgpack. The order of their fields is the format."""
    return [astuple(state) for state in states]


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


def aux_from_list(value: Any) -> Aux:
    """Parse and validate the fields of an aux block; CorruptDataError otherwise."""
    if not isinstance(value, list) or len(value) != 3:
        raise CorruptDataError("not an aux record")
    digest, nbytes, checksum = value
    if not isinstance(digest, bytes) or len(digest) != KEY_BYTES:
        raise CorruptDataError("aux record: bad digest")
    if (
        not isinstance(checksum, bytes)
        or len(checksum) not in (0, 8)
        or not 0 < _whole(nbytes, "size") <= AUX_BYTES_MAX
    ):
        raise CorruptDataError("aux record: bad size or checksum")
    return Aux(digest, nbytes, checksum)


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


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise CorruptDataError("not a flag")
    return value


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise CorruptDataError(f"{name} must be a whole number")
    return value
