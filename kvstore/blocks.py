"""Frozen nouns: tokens, recipes, runs, blocks, reasons. Pure values; nothing here does I/O.

A *block* holds the KV of up to `BLOCK_TOKENS` consecutive tokens for every layer; one with fewer is a *tail*. A block
is a short list of *runs*, each encoded at one time. A run holds *stacks*: layers of equal geometry and recipe, whose
tensors are stacked layer-major, head-major: `[layers, heads, tokens, width]`. So the share of one layer in one tensor
is one contiguous byte range, and it has its own checksum.

`Block.to_record` / `Block.from_record` are the serial form (msgpack) that stands in blob headers. Index rows and fetch
replies carry its runs (`runs_to_list`) beside fields of their own.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from kvstore.errors import CorruptDataError, InvalidRequestError

BLOCK_TOKENS = 256
TOKEN_BYTES = 8
KEY_BYTES = 32
RECORD_VERSION = 1

# Limits of one record, checked on every parse: a header is outside input, whoever wrote it.
RUNS_MAX = BLOCK_TOKENS
STACKS_MAX = 1024
TENSORS_MAX = 4096

# Bytes per element of the dtypes that tensors may have, by their safetensors name.
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4, "U8": 1, "I32": 4, "I64": 8}

# Fidelity is a rank: exact data highest, then hundredths of a bit per value.
FIDELITY_EXACT = 1_000_000
FIDELITY_ANY = 0


class Reason(enum.StrEnum):
    """Why a match, fetch or store gave less than everything. `OK` is the absence of a reason."""

    OK = "ok"
    UNKNOWN_PREFIX = "unknown_prefix"
    IDENTITY = "identity"
    BELOW_THRESHOLD = "below_threshold"
    NO_CHECKPOINT = "no_checkpoint"
    FIDELITY = "fidelity"
    SLOWER_THAN_PREFILL = "slower_than_prefill"
    CORRUPT = "corrupt"
    EVICTED = "evicted"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"
    CIRCUIT_OPEN = "circuit_open"
    UNKNOWN_RECIPE = "unknown_recipe"
    IDENTITY_PENDING = "identity_pending"
    UNSUPPORTED_LAYER = "unsupported_layer"
    OFFSET_MISMATCH = "offset_mismatch"
    QUEUE_FULL = "queue_full"
    NOT_CAPTURED = "not_captured"
    DEPENDENCY_LOST = "dependency_lost"
    STORE_FULL = "store_full"
    INVALID = "invalid"
    ALREADY_STORED = "already_stored"
    INTERNAL = "internal"


def pack_tokens(tokens: Iterable[int] | bytes) -> bytes:
    """Token ids as little-endian signed 64-bit bytes; packed bytes pass through.

    Raises InvalidRequestError for ids outside the signed 64-bit range, non-integers, or packed bytes of odd length.
    """
    if isinstance(tokens, (bytes, bytearray, memoryview)):
        packed = bytes(tokens)
        if len(packed) % TOKEN_BYTES:
            raise InvalidRequestError(f"packed tokens must be a multiple of {TOKEN_BYTES} bytes, got {len(packed)}")
        return packed
    try:
        array = np.asarray(tokens if isinstance(tokens, (list, np.ndarray)) else list(tokens))
        if array.size == 0:
            return b""
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InvalidRequestError("tokens must be a flat sequence of integers")
        if array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
            raise InvalidRequestError("a token id does not fit in a signed 64-bit integer")
    except (OverflowError, ValueError, TypeError) as error:
        raise InvalidRequestError(f"tokens must be signed 64-bit integers: {error}") from error
    return array.astype("<i8").tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """The token ids of packed bytes, as Python integers."""
    ids: list[int] = np.frombuffer(packed, dtype="<i8").tolist()
    return ids


def count_tokens(packed: bytes) -> int:
    """How many tokens packed bytes hold."""
    return len(packed) // TOKEN_BYTES


def common_tokens(a: bytes, b: bytes) -> int:
    """Length in tokens of the longest common prefix of two packed token strings."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n // TOKEN_BYTES
    different = np.frombuffer(a, "<i8", n // TOKEN_BYTES) != np.frombuffer(b, "<i8", n // TOKEN_BYTES)
    return int(different.argmax())


@dataclass(frozen=True, slots=True)
class Recipe:
    """How arrays became tensors: codec name, version of its byte format, parameters. Travels with the data."""

    name: str
    version: int = 1
    params: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}{value}" for key, value in self.params)])

    def param(self, key: str) -> int:
        """The parameter `key`; CorruptDataError if the recipe lacks it."""
        for name, value in self.params:
            if name == key:
                return value
        raise CorruptDataError(f"recipe {self.name} has no parameter {key!r}")


RAW = Recipe("raw")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor `[len(stack.layers), heads, tokens of the run, width]` of a stack.

    `offset` counts bytes from the start of the blob's payload; `checksums` holds one little-endian xxh3_64 per layer
    (empty: the bytes carry none, as in a dense answer).
    """

    name: str
    dtype: str
    heads: int
    width: int
    offset: int = 0
    checksums: bytes = b""

    def layer_bytes(self, n_tokens: int) -> int:
        """Bytes of one layer's share."""
        return self.heads * n_tokens * self.width * ITEM_BYTES[self.dtype]

    def checksum(self, position: int) -> int | None:
        """The xxh3_64 of the layer at `position` of the stack, or None where none was recorded."""
        if not self.checksums:
            return None
        return int.from_bytes(self.checksums[8 * position : 8 * position + 8], "little")


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers (by index in the layout) whose `part` ("keys" or "values") has one geometry and one recipe."""

    part: str
    layers: tuple[int, ...]
    recipe: Recipe
    tensors: tuple[Tensor, ...]

    def nbytes(self, n_tokens: int) -> int:
        """Bytes of all tensors of the stack."""
        return len(self.layers) * sum(t.layer_bytes(n_tokens) for t in self.tensors)


@dataclass(frozen=True, slots=True)
class Run:
    """Part of a block that was encoded together.

    The tensors hold `n_tokens` tokens; of these the block shows `[skip, skip + shown)`. Splicing copies codec groups
    whole and narrows what is shown. `fidelity` is the least of the recipes' and of the values that were encoded.
    """

    n_tokens: int
    skip: int
    shown: int
    fidelity: int
    stacks: tuple[Stack, ...]

    def nbytes(self) -> int:
        """Payload bytes of the run."""
        return sum(stack.nbytes(self.n_tokens) for stack in self.stacks)


@dataclass(frozen=True, slots=True)
class Block:
    """What a blob says of itself. `start` is the position of its first token in the sequence.

    `fidelity` is the least of the runs' own and of the ancestors' at the time of storing.
    """

    root: bytes
    parent: bytes
    key: bytes
    start: int
    tokens: bytes
    fidelity: int
    runs: tuple[Run, ...]
    created_s: int = 0
    namespace: bytes = field(default=b"", repr=False)

    @property
    def n_tokens(self) -> int:
        """Tokens that the block shows."""
        return count_tokens(self.tokens)

    @property
    def is_tail(self) -> bool:
        """Whether the block has fewer tokens than a full one."""
        return self.n_tokens < BLOCK_TOKENS

    def to_record(self) -> bytes:
        """The msgpack form that blob headers and index rows share."""
        fields = (
            RECORD_VERSION,
            self.root,
            self.parent,
            self.key,
            self.start,
            self.tokens,
            self.fidelity,
            self.created_s,
            self.namespace,
            runs_to_list(self.runs),
        )
        packed: bytes = msgpack.packb(fields)
        return packed

    @classmethod
    def from_record(cls, record: bytes) -> Block:
        """Parse and validate a record; CorruptDataError on anything that is not one."""
        fields = unpack_record(record)
        if not isinstance(fields, list) or len(fields) != 10 or fields[0] != RECORD_VERSION:
            raise CorruptDataError("not a block record of a known version")
        _, root, parent, key, start, tokens, fidelity, created_s, namespace, runs = fields
        for name, value, size in (("root", root, KEY_BYTES), ("parent", parent, KEY_BYTES), ("key", key, KEY_BYTES)):
            if not isinstance(value, bytes) or len(value) != size:
                raise CorruptDataError(f"block record: bad {name}")
        if not isinstance(tokens, bytes) or len(tokens) % TOKEN_BYTES or not isinstance(namespace, bytes):
            raise CorruptDataError("block record: bad tokens or namespace")
        n_tokens = count_tokens(tokens)
        whole = (_whole(start, "start"), _whole(fidelity, "fidelity"), _whole(created_s, "created_s"))
        block = cls(root, parent, key, whole[0], tokens, whole[1], runs_from_list(runs), whole[2], namespace)
        if not 0 < n_tokens <= BLOCK_TOKENS or sum(run.shown for run in block.runs) != n_tokens:
            raise CorruptDataError("block record: runs do not cover its tokens")
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
                    [[t.name, t.dtype, t.heads, t.width, t.offset, t.checksums] for t in stack.tensors],
                ]
                for stack in run.stacks
            ],
        ]
        for run in runs
    ]


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
    return run


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


def _tensor(n_layers: int, name: Any, dtype: Any, heads: Any, width: Any, offset: Any, checksums: Any) -> Tensor:
    if dtype not in ITEM_BYTES or not isinstance(name, str) or not name.isidentifier():
        raise CorruptDataError("bad tensor")
    if not isinstance(checksums, bytes) or len(checksums) not in (0, 8 * n_layers):
        raise CorruptDataError("bad checksums")
    return Tensor(name, dtype, _whole(heads, "heads"), _whole(width, "width"), _whole(offset, "offset"), checksums)


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise CorruptDataError(f"{name} must be a whole number")
    return value
