"""The bytes of a blob file. Pure: nothing here touches the disk.

A blob is a safetensors file of our format:

    offset      size  what
    0              8  N, little-endian: length of the header; 8 + N is a multiple of 64
    8              N  header: JSON, padded at its end with spaces
    8 + N          P  payload: the tensors, without gaps, in the order of runs, stacks, tensors; of a checkpoint, the
                      arrays in the order of layers and arrays
    8 + N + P         end of file, exactly

    header JSON     "__metadata__"  {"format": "kvstore-block", "version": "3",
                                     "record": base64 of the block's msgpack record, "check": its xxh3_64 in hex}
                    "r{run}.s{stack}.{part}.{name}"  {"dtype", "shape": [layers, heads, rows, width], "data_offsets"}
                                                     or, each layer's share packed by a byte codec, "U8", [bytes]
                    or, of a checkpoint,
                    "l{layer}.{name}"                {"dtype", "shape", "data_offsets"}
                    or, of an aux block, "aux"       {"dtype": "U8", "shape": [bytes], "data_offsets"}

The record (`kvstore.core.records.block_to_record`) carries namespace, parent, tokens, recipes and one xxh3_64 for each
(tensor, layer) range, or state array; an empty array takes no bytes. The tensor table repeats what follows from it, so
that any safetensors reader can look inside. The header is canonical: a reader builds it again from the record and
compares bytes, so nothing can hide in it.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import xxhash

from kvstore.core.blocks import FIDELITY_EXACT, Aux, Block, LayerState, Run, Stack, StateArray, Tensor
from kvstore.core.keys import aux_key, block_key, checkpoint_key
from kvstore.core.records import TENSORS_MAX, block_from_record, block_to_record
from kvstore.errors import CorruptDataError, InvalidRequestError, NotFoundError, UnknownFormatError

FORMAT = "kvstore-block"
# The bytes that hold an encrypted blob (`kvstore.blobs.encrypted`) begin like any other safetensors file.
ENCRYPTED_FORMAT = "kvstore-encrypted"
# The only format version, of blobs, index rows and the directory. Any other is refused.
FORMAT_VERSION = 3
HEADER_BYTES_MAX = 1 << 20
LENGTH_BYTES = 8
ALIGN_BYTES = 64
# Exceptions raised by parsing bytes that are not a valid header.
NO_HEADER = (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError)

Buffer: TypeAlias = "bytes | bytearray | memoryview | np.ndarray[Any, Any]"


@dataclass(frozen=True, slots=True)
class ReadyBlob:
    """A block ready to be written: offsets and checksums filled in, its header, and views of its payload in order."""

    block: Block
    header: bytes
    payload: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        """Exact size of the blob."""
        return len(self.header) + sum(map(len, self.payload))


def aux_block(root: bytes, data: bytes) -> Block:
    """The aux block of some bytes in a namespace; they are its only buffer."""
    aux = Aux(hashlib.sha256(data).digest(), len(data))
    return Block(root, root, aux_key(root, aux.digest), 0, b"", FIDELITY_EXACT, (), aux=aux)


def make_ready(block: Block, buffers: Sequence[Buffer]) -> ReadyBlob:
    """Fill in offsets and checksums, and build the header. `buffers`: one per tensor, C-contiguous, of its exact size.

    A checkpoint has one per state array, an aux block has one. Raises InvalidRequestError when the buffers do not fit
    the block, or the header would pass its limit.
    """
    views = [_flat(buffer) for buffer in buffers]
    remaining = iter(views)
    if block.aux is not None:
        ready = replace(block, aux=_placed_aux(block.aux, next(remaining, memoryview(b""))))
    elif block.is_checkpoint:
        ready = replace(block, states=_placed_states(block.states, remaining))
    else:
        ready = replace(block, runs=_placed_runs(block.runs, remaining))
    if next(remaining, None) is not None:
        raise InvalidRequestError("more buffers than tensors")
    record = block_to_record(ready)
    try:  # now what readers will check later
        if block_from_record(record) != ready:
            raise CorruptDataError("it does not come back as it was written")
        header = build_header(ready, record)
    except CorruptDataError as error:
        raise InvalidRequestError(f"not a block that can be stored: {error}") from error
    if ready.key != _key(ready):
        raise InvalidRequestError("a block's key must follow from its parent and tokens")
    # A checkpoint is stored exactly, but its fidelity is that of the tokens from which it was computed.
    if ready.fidelity > min((run.fidelity for run in ready.runs), default=FIDELITY_EXACT):
        raise InvalidRequestError("a block cannot be of higher fidelity than its runs")
    return ReadyBlob(ready, header, tuple(views))


def _placed_runs(unplaced: Sequence[Run], remaining: Iterator[memoryview]) -> tuple[Run, ...]:
    offset = 0
    runs: list[Run] = []
    for run in unplaced:
        stacks: list[Stack] = []
        for stack in run.stacks:
            tensors: list[Tensor] = []
            for tensor in stack.tensors:
                view = next(remaining, None)
                if view is None or len(view) != tensor.stored_bytes(len(stack.layers), run.n_tokens) or not view:
                    raise InvalidRequestError(f"the buffer of {stack.part}.{tensor.name} does not fit its tensor")
                shares = (replace(tensor, offset=0).layer_range(at, run.n_tokens) for at in range(len(stack.layers)))
                sums = b"".join(_checksum(view[at : at + nbytes]) for at, nbytes in shares)
                tensors.append(replace(tensor, offset=offset, checksums=sums))
                offset += len(view)
            stacks.append(replace(stack, tensors=tuple(tensors)))
        runs.append(replace(run, stacks=tuple(stacks)))
    return tuple(runs)


def _placed_states(unplaced: Sequence[LayerState], remaining: Iterator[memoryview]) -> tuple[LayerState, ...]:
    offset = 0
    states: list[LayerState] = []
    for state in unplaced:
        arrays: list[StateArray] = []
        for array in state.arrays:
            view = next(remaining, None)
            if view is None or len(view) != array.nbytes:
                raise InvalidRequestError(f"the buffer of l{state.layer}.{array.name} does not fit its array")
            arrays.append(replace(array, offset=offset, checksum=_checksum(view)))
            offset += len(view)
        states.append(replace(state, arrays=tuple(arrays)))
    return tuple(states)


def _placed_aux(aux: Aux, view: memoryview) -> Aux:
    if len(view) != aux.nbytes or hashlib.sha256(view).digest() != aux.digest:
        raise InvalidRequestError("the buffer of an aux block does not have its digest")
    return replace(aux, checksum=_checksum(view))


def _key(block: Block) -> bytes:
    """The key that follows from parent and tokens, of an aux block from its digest."""
    if block.aux is not None:
        return aux_key(block.root, block.aux.digest)
    return (checkpoint_key if block.is_checkpoint else block_key)(block.parent, block.tokens)


def _flat(buffer: Buffer) -> memoryview:
    view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    if not view.c_contiguous:
        raise InvalidRequestError("buffers must be C-contiguous")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _checksum(view: memoryview) -> bytes:
    return xxhash.xxh3_64_intdigest(view).to_bytes(8, "little")


def payload_bytes(block: Block) -> int:
    """Bytes of all tensors and state arrays, or of the aux block."""
    if block.aux is not None:
        return block.aux.nbytes
    return sum(run.nbytes() for run in block.runs) + sum(state.nbytes for state in block.states)


def payload_parts(block: Block, payload: memoryview) -> list[memoryview]:
    """The bytes of each tensor or state array, in order, of a block's whole payload: what `make_ready` takes."""
    sizes = [
        tensor.stored_bytes(len(stack.layers), run.n_tokens)
        for run in block.runs
        for stack in run.stacks
        for tensor in stack.tensors
    ]
    sizes += [array.nbytes for state in block.states for array in state.arrays]
    sizes += [block.aux.nbytes] if block.aux is not None else []
    ends = list(itertools.accumulate(sizes))
    return [payload[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def checked_ranges(block: Block) -> Iterator[tuple[int, int, int]]:
    """(offset in the payload, length, xxh3_64) of every (tensor, layer) range or array, in the order of the file."""
    for run in block.runs:
        for stack in run.stacks:
            for tensor in stack.tensors:
                for position in range(len(stack.layers)):
                    checksum = tensor.checksum(position)
                    if checksum is None:
                        raise CorruptDataError("a stored tensor without checksums")
                    yield (*tensor.layer_range(position, run.n_tokens), checksum)
    for array in (array for state in block.states for array in state.arrays):
        if not array.checksum:
            raise CorruptDataError("a stored array without checksum")
        yield array.offset, array.nbytes, int.from_bytes(array.checksum, "little")
    if block.aux is not None:
        if not block.aux.checksum:
            raise CorruptDataError("a stored aux block without checksum")
        yield 0, block.aux.nbytes, int.from_bytes(block.aux.checksum, "little")


def require_payload(block: Block, payload: memoryview) -> None:
    """CorruptDataError unless every range of a block's whole payload has its checksum.

    InvalidRequestError where booleans are not 0 or 1: the bytes are what their writer meant, and no engine takes them.
    """
    for offset, length, checksum in checked_ranges(block):
        if xxhash.xxh3_64_intdigest(payload[offset : offset + length]) != checksum:
            raise CorruptDataError("a blob does not match its checksums")
    if block.aux is not None and hashlib.sha256(payload).digest() != block.aux.digest:
        raise CorruptDataError("an aux block does not have its digest")
    for array in (array for state in block.states for array in state.arrays):
        if array.dtype == "BOOL" and payload[array.offset : array.offset + array.nbytes].tobytes().strip(b"\0\1"):
            raise InvalidRequestError(f"array {array.name} is not of booleans")


def table(block: Block) -> dict[str, Any]:
    """The tensor table that follows from the record. CorruptDataError when tensors leave gaps or are too many."""
    if block.aux is not None:
        return {"aux": {"dtype": "U8", "shape": [block.aux.nbytes], "data_offsets": [0, block.aux.nbytes]}}
    if block.is_checkpoint:
        return _state_table(block.states)
    entries: dict[str, Any] = {}
    end = 0
    for r, run in enumerate(block.runs):
        for s, stack in enumerate(run.stacks):
            for tensor in stack.tensors:
                name = f"r{r}.s{s}.{stack.part}.{tensor.name}"
                start, end = end, end + tensor.stored_bytes(len(stack.layers), run.n_tokens)
                if tensor.offset != start or name in entries or len(entries) >= TENSORS_MAX or end == start:
                    raise CorruptDataError("block record: tensors overlap, leave gaps, or are too many")
                shape = [len(stack.layers), tensor.heads, tensor.rows(run.n_tokens), tensor.width]
                dtype, shape = ("U8", [end - start]) if tensor.lengths else (tensor.dtype, shape)
                entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return entries


def _state_table(states: Sequence[LayerState]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    end = 0
    for state in states:
        for array in state.arrays:
            name = f"l{state.layer}.{array.name}"
            start, end = end, end + array.nbytes
            if array.offset != start or name in entries:
                raise CorruptDataError("block record: state arrays overlap, leave gaps, or have one name")
            entries[name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    return entries


def build_header(block: Block, record: bytes) -> bytes:
    """Length and padded JSON. InvalidRequestError when over HEADER_BYTES_MAX."""
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "record": base64.b64encode(record).decode("ascii"),
        "check": xxhash.xxh3_64_hexdigest(record),
    }
    text = json.dumps({"__metadata__": metadata, **table(block)}, separators=(",", ":")).encode("ascii")
    total = -(-(LENGTH_BYTES + len(text)) // ALIGN_BYTES) * ALIGN_BYTES
    if total - LENGTH_BYTES > HEADER_BYTES_MAX:
        raise InvalidRequestError(f"the header of a block would have {total} bytes: too many runs or layers")
    return (total - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little") + text.ljust(total - LENGTH_BYTES)


def header_length(first: bytes, file_bytes: int) -> int:
    """Total bytes of length and header, from a blob's first 8 bytes; CorruptDataError when out of range."""
    length = int.from_bytes(first, "little") + LENGTH_BYTES
    if len(first) != LENGTH_BYTES or length % ALIGN_BYTES or not ALIGN_BYTES <= length <= file_bytes:
        raise CorruptDataError("not a blob: bad header length")
    if length - LENGTH_BYTES > HEADER_BYTES_MAX:
        raise CorruptDataError("not a blob: the header is over its limit")
    return length


def parse_header(header: bytes, file_bytes: int) -> Block:
    """The block of a blob whose first bytes are `header` and whose size is `file_bytes`.

    Raises CorruptDataError on any deviation, UnknownFormatError for another format version, NotFoundError for an
    encrypted blob: the key of its namespace is not there.
    """
    if header_length(header[:LENGTH_BYTES], file_bytes) != len(header):
        raise CorruptDataError("not a blob: the header is cut short")
    record = _record(header[LENGTH_BYTES:])
    block = block_from_record(record)
    if block.key != _key(block):
        raise CorruptDataError("blob header: the key does not follow from parent and tokens")
    if build_header(block, record) != header:
        raise CorruptDataError("blob header: it does not say what its record says")
    if len(header) + payload_bytes(block) != file_bytes:
        raise CorruptDataError("blob: the file does not have the size that its header says")
    return block


def require_version(metadata: Any) -> None:
    """UnknownFormatError for a blob of another format version. Raises one of NO_HEADER for what is none."""
    version = int(metadata["version"])
    if metadata["format"] in (FORMAT, ENCRYPTED_FORMAT) and version != FORMAT_VERSION:
        raise UnknownFormatError(f"a blob of format version {version}; this kvstore reads {FORMAT_VERSION}")


def _record(text: bytes) -> bytes:
    try:
        metadata = json.loads(text)["__metadata__"]
        require_version(metadata)
        if metadata["format"] == ENCRYPTED_FORMAT:
            raise NotFoundError("the key of this encrypted blob is not there")
        if metadata["format"] != FORMAT:
            raise CorruptDataError("not a kvstore blob")
        record = base64.b64decode(metadata["record"], validate=True)
        check = metadata["check"]
    except NO_HEADER as error:
        # Not its repr, which holds all of the bytes in some cases: they are tokens of a prompt, and this is logged.
        raise CorruptDataError(f"blob header: {type(error).__name__}: {error}") from error
    if xxhash.xxh3_64_hexdigest(record) != check:
        raise CorruptDataError("blob header: the record does not match its checksum")
    return record
