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
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import xxhash

from kvstore.core.blocks import FIDELITY_EXACT, Aux, Block
from kvstore.core.keys import aux_key, block_key, checkpoint_key
from kvstore.core.records import TENSORS_MAX, PackedRuns, block_from_record, block_to_record, runs_to_record
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
    """A block ready to be written: offsets and checksums filled in, its header, and views of its payload in order.

    `packed`: its runs as the record in the header has them, for the index row.
    """

    block: Block
    packed: PackedRuns
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
    ready = _placed(block, views)
    packed = runs_to_record(ready.runs)
    record = block_to_record(ready, packed)
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
    return ReadyBlob(ready, packed, header, tuple(views))


class PayloadPart(NamedTuple):
    """One tensor or state array of a blob, or the bytes of an aux block, by its name in the tensor table.

    `lengths`: of the ranges with a checksum of their own, one after the other; `checksums` has 8 bytes for each.
    """

    name: str
    dtype: str
    shape: list[int]
    offset: int
    lengths: Sequence[int]
    checksums: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges."""
        return sum(self.lengths)


def parts(block: Block) -> Iterator[PayloadPart]:
    """Everything that the payload of a block consists of, in order."""
    for r, run in enumerate(block.runs):
        for s, stack in enumerate(run.stacks):
            n_layers = len(stack.layers)
            for tensor in stack.tensors:
                lengths = tensor.lengths or (tensor.layer_bytes(run.n_tokens),) * n_layers
                shape = [n_layers, tensor.heads, tensor.rows(run.n_tokens), tensor.width]
                dtype, shape = ("U8", [sum(lengths)]) if tensor.lengths else (tensor.dtype, shape)
                name = f"r{r}.s{s}.{stack.part}.{tensor.name}"
                yield PayloadPart(name, dtype, shape, tensor.offset, lengths, tensor.checksums)
    for state in block.states:
        for array in state.arrays:
            name = f"l{state.layer}.{array.name}"
            yield PayloadPart(name, array.dtype, list(array.shape), array.offset, (array.nbytes,), array.checksum)
    if block.aux is not None:
        yield PayloadPart("aux", "U8", [block.aux.nbytes], 0, (block.aux.nbytes,), block.aux.checksum)


def _placed(block: Block, views: Sequence[memoryview]) -> Block:
    """The block with the offsets and checksums of these bytes. InvalidRequestError where they do not fit it."""
    offsets, checksums = [0], list[bytes]()
    for part, view in itertools.zip_longest(parts(block), views):
        if part is None:
            raise InvalidRequestError("more buffers than tensors")
        if view is None or len(view) != part.nbytes or not (view or block.states):
            raise InvalidRequestError(f"the buffer of {part.name} does not fit it")
        ends = itertools.accumulate(part.lengths)
        shares = (view[end - length : end] for length, end in zip(part.lengths, ends, strict=True))
        checksums.append(b"".join(xxhash.xxh3_64_intdigest(share).to_bytes(8, "little") for share in shares))
        offsets.append(offsets[-1] + len(view))
    if block.aux is not None:
        if hashlib.sha256(views[0]).digest() != block.aux.digest:
            raise InvalidRequestError("the buffer of an aux block does not have its digest")
        return replace(block, aux=replace(block.aux, checksum=checksums[0]))
    at, sums = iter(offsets), iter(checksums)
    runs = tuple(
        replace(
            run,
            stacks=tuple(
                replace(stack, tensors=tuple(replace(t, offset=next(at), checksums=next(sums)) for t in stack.tensors))
                for stack in run.stacks
            ),
        )
        for run in block.runs
    )
    states = tuple(
        replace(state, arrays=tuple(replace(a, offset=next(at), checksum=next(sums)) for a in state.arrays))
        for state in block.states
    )
    return replace(block, runs=runs, states=states)


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


def payload_bytes(block: Block) -> int:
    """Bytes of all tensors and state arrays, or of the aux block."""
    return sum(part.nbytes for part in parts(block))


def payload_parts(block: Block, payload: memoryview) -> list[memoryview]:
    """The bytes of each tensor or state array, in order, of a block's whole payload: what `make_ready` takes."""
    return [payload[part.offset : part.offset + part.nbytes] for part in parts(block)]


def checked_ranges(block: Block) -> Iterator[tuple[int, int, int]]:
    """(offset in the payload, length, xxh3_64) of every (tensor, layer) range or array, in the order of the file."""
    for part in parts(block):
        if len(part.checksums) != 8 * len(part.lengths):
            raise CorruptDataError(f"{part.name} is stored without checksums")
        at = part.offset
        for number, length in enumerate(part.lengths):
            yield at, length, int.from_bytes(part.checksums[8 * number : 8 * number + 8], "little")
            at += length


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
    entries: dict[str, Any] = {}
    end = 0
    for part in parts(block):
        start, end = end, end + part.nbytes
        is_odd = part.offset != start or part.name in entries or len(entries) >= TENSORS_MAX
        if is_odd or (end == start and not block.states):
            raise CorruptDataError("block record: tensors overlap, leave gaps, have one name, or are too many")
        entries[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [start, end]}
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
