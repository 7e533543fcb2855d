"""Immutable data types: tokens, recipes, runs, blocks, reasons. Pure values; nothing here does I/O.

A *block* holds the KV of up to `BLOCK_TOKENS` consecutive tokens for every layer; one with fewer is a *tail*. A block
is a short list of *runs*, each encoded at one time. A run holds *stacks*: layers of equal geometry and recipe, whose
tensors are stacked layer-major, head-major: `[layers, heads, rows, width]`, with one row per token or per group of
tokens. So each layer's *share* of a tensor is one contiguous byte range with its own checksum. A byte codec may pack
each share separately; then each share has its own length.

A *checkpoint* is a block of `states` instead of runs: layers that are valid only at one exact token count. Its tokens
are those after the last full block, so it may have none.

An *aux* block holds bytes that recipes of its namespace refer to, such as the basis of a calibrated codec. It has no
tokens, and its key follows from the digest of the bytes.

NumPy is imported in the function that compares tokens, so that verbs which need only names start faster.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from kvstore.errors import CorruptDataError, InvalidRequestError

BLOCK_TOKENS = 256
TOKEN_BYTES = 8
KEY_BYTES = 32

# Bytes per element of the dtypes that tensors may have, by their safetensors name.
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
}

# Fidelity is a rank: exact data highest, then hundredths of a bit per value.
FIDELITY_EXACT = 1_000_000
FIDELITY_ANY = 0


def fidelity_text(rank: int) -> str:
    """A fidelity rank for people: `exact`, or bits a value."""
    return "exact" if rank >= FIDELITY_EXACT else f"{rank / 100:g} bits"


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
    EXPIRED = "expired"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"
    VERSION = "version"
    DENIED = "denied"
    UNTRUSTED = "untrusted"
    CIRCUIT_OPEN = "circuit_open"
    FORKED = "forked"
    TLS = "tls"
    UNKNOWN_RECIPE = "unknown_recipe"
    NO_BASIS = "no_basis"
    IDENTITY_PENDING = "identity_pending"
    IDENTITY_CHANGED = "identity_changed"
    UNSUPPORTED_LAYER = "unsupported_layer"
    OFFSET_MISMATCH = "offset_mismatch"
    QUEUE_FULL = "queue_full"
    NOT_CAPTURED = "not_captured"
    DEPENDENCY_LOST = "dependency_lost"
    STORE_FULL = "store_full"
    WRITE_BUDGET = "write_budget"
    READ_ONLY = "read_only"
    DEFERRED = "deferred"
    KEY_MISSING = "key_missing"
    INVALID = "invalid"
    PROFILE_REFUSED = "profile_refused"
    ALREADY_STORED = "already_stored"
    INTERNAL = "internal"

    @classmethod
    def of(cls, code: str, unknown: Reason) -> Reason:
        """The reason of a code from the other end; `unknown` for one that this version does not have."""
        try:
            return cls(code)
        except ValueError:
            return unknown


def pack_tokens(tokens: Iterable[int] | bytes) -> bytes:
    """Token ids as little-endian signed 64-bit bytes; packed bytes pass through.

    Raises InvalidRequestError for ids outside the signed 64-bit range, non-integers, packed bytes of odd length, or an
    array that is not one of integers, such as a mask.
    """
    if isinstance(tokens, (bytes, bytearray, memoryview)):
        packed = bytes(tokens)
        if len(packed) % TOKEN_BYTES:
            raise InvalidRequestError(f"packed tokens must be a multiple of {TOKEN_BYTES} bytes, got {len(packed)}")
        return packed
    try:
        # Arrays have `tolist`. struct takes half the time of numpy to read a list.
        ids = tokens if isinstance(tokens, (list, tuple)) else getattr(tokens, "tolist", lambda: list(tokens))()
        if ids and "int" not in str(dtype := getattr(tokens, "dtype", int)):
            raise TypeError(f"this is an array of {dtype}")
        return struct.pack(f"<{len(ids)}q", *ids)
    except (struct.error, OverflowError, ValueError, TypeError) as error:
        raise InvalidRequestError(f"tokens must be a flat sequence of signed 64-bit integers: {error}") from error


def unpack_tokens(packed: bytes) -> list[int]:
    """The token ids of packed bytes, as Python integers."""
    return list(struct.unpack(f"<{count_tokens(packed)}q", packed))


def count_tokens(packed: bytes) -> int:
    """How many tokens packed bytes hold."""
    return len(packed) // TOKEN_BYTES


def common_tokens(a: bytes, b: bytes) -> int:
    """Length in tokens of the longest common prefix of two packed token strings."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n // TOKEN_BYTES
    import numpy as np

    different = np.frombuffer(a, "<i8", n // TOKEN_BYTES) != np.frombuffer(b, "<i8", n // TOKEN_BYTES)
    return int(different.argmax())


@dataclass(frozen=True, slots=True)
class Recipe:
    """How arrays were encoded: codec name, version of its byte format, parameters. Stored with the data.

    `references`: SHA-256 digests of files that decoding needs beside the tensors (a codec's basis).
    """

    name: str
    version: int = 1
    params: tuple[tuple[str, int], ...] = ()
    references: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        words = [self.name, *(f"{key}{value}" for key, value in self.params)]
        return "-".join(words) + "".join(f"@{digest.hex()}" for digest in self.references)

    def param(self, key: str) -> int:
        """The parameter `key`; CorruptDataError if the recipe lacks it."""
        for name, value in self.params:
            if name == key:
                return value
        raise CorruptDataError(f"recipe {self.name} has no parameter {key!r}")


RAW = Recipe("raw")

# A packed share may come out this much longer than what it stands for: some bytes have no shorter form.
PACKED_SLACK = 128
PACKED_SLACK_BYTES = 256
# What a packed share may stand for. One of 256 tokens of 8 heads of 128 in bfloat16 is half a MiB; nothing comes near.
UNPACKED_BYTES_MAX = 1 << 28


def packed_bytes_max(nbytes: int) -> int:
    """Upper bound on the packed size of this many bytes."""
    return nbytes + nbytes // PACKED_SLACK + PACKED_SLACK_BYTES


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor `[len(stack.layers), heads, tokens of the run / group_tokens, width]` of a stack.

    `offset` counts bytes from the start of the blob's payload; `checksums` holds one little-endian xxh3_64 per layer
    (empty: the bytes carry none, as in a dense answer). With `lengths`, one per layer, the shares are packed: these
    many bytes stand for what heads, width and dtype describe.
    """

    name: str
    dtype: str
    heads: int
    width: int
    offset: int = 0
    checksums: bytes = b""
    lengths: tuple[int, ...] = ()
    group_tokens: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one head, unpacked."""
        return self.width * ITEM_BYTES[self.dtype]

    def rows(self, n_tokens: int) -> int:
        """Number of rows for this many tokens. Tokens must be whole groups."""
        return n_tokens // self.group_tokens

    def layer_bytes(self, n_tokens: int) -> int:
        """Bytes of one layer's share, unpacked."""
        return self.heads * self.rows(n_tokens) * self.row_bytes

    def stored_bytes(self, n_layers: int, n_tokens: int) -> int:
        """Bytes of the shares of all layers as they are stored."""
        return sum(self.lengths) if self.lengths else n_layers * self.layer_bytes(n_tokens)

    def layer_range(self, position: int, n_tokens: int) -> tuple[int, int]:
        """Where the stored share of the layer at `position` of the stack begins in the payload, and its length."""
        if self.lengths:
            return self.offset + sum(self.lengths[:position]), self.lengths[position]
        nbytes = self.layer_bytes(n_tokens)
        return self.offset + position * nbytes, nbytes

    def bare(self) -> Tensor:
        """Without where its bytes are, what they add up to, and how long they came out."""
        return replace(self, offset=0, checksums=b"", lengths=())

    def is_like(self, other: Tensor) -> bool:
        """Whether both hold the same kind of rows, wherever they are."""
        return (self.name, self.dtype, self.heads, self.width, self.group_tokens) == (
            other.name,
            other.dtype,
            other.heads,
            other.width,
            other.group_tokens,
        )

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
        return sum(t.stored_bytes(len(self.layers), n_tokens) for t in self.tensors)


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
class StateArray:
    """One array of a checkpoint as the engine holds it; it may be empty. Offset and checksum are as in `Tensor`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    checksum: bytes = b""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class LayerState:
    """A window or state layer at a checkpoint: its arrays, and the whole numbers that belong to them."""

    layer: int
    numbers: tuple[tuple[str, int], ...]
    arrays: tuple[StateArray, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True, slots=True)
class Aux:
    """Bytes that recipes refer to by their SHA-256 `digest` (`Recipe.references`). `checksum` is as in `StateArray`."""

    digest: bytes
    nbytes: int
    checksum: bytes = b""


@dataclass(frozen=True, slots=True)
class Origin:
    """What pressure may do, or did, to a block (`kvstore.engine.reencode`).

    `auto`: the profile `auto` chose how it is encoded. `settled`: it is not to be re-encoded. `error`: relative
    error of its re-encoding, 0 if there was none.
    """

    auto: bool = False
    settled: bool = False
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """The description of a block in its blob's header. `start`: position of its first token in the sequence.

    `fidelity` is the least of the runs' own and of the ancestors' at the time of storing. Only one of `runs`, `states`
    and `aux` is there; a checkpoint's states belong to the position `end`. `origin` is None where it would say nothing;
    the index has it in its table instead of the row.
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
    states: tuple[LayerState, ...] = ()
    aux: Aux | None = None
    origin: Origin | None = None

    @property
    def references(self) -> frozenset[bytes]:
        """Digests of the aux blocks that are needed to decode the runs."""
        return frozenset(digest for run in self.runs for stack in run.stacks for digest in stack.recipe.references)

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is a checkpoint instead of KV."""
        return bool(self.states)

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.n_tokens

    @property
    def n_tokens(self) -> int:
        """Tokens that the block shows."""
        return count_tokens(self.tokens)

    def require_whole(self) -> None:
        """CorruptDataError unless the runs cover the tokens, or the states stand alone after the last full block."""
        if self.aux is not None:
            if self.runs or self.states or self.tokens or self.start or self.parent != self.root:
                raise CorruptDataError("block record: an aux block has neither tokens nor KV, and no place in a chain")
        elif self.is_checkpoint:
            if self.runs or self.n_tokens >= BLOCK_TOKENS or not self.end:
                raise CorruptDataError("block record: a checkpoint has states only, after less than a block")
        elif not 0 < self.n_tokens <= BLOCK_TOKENS or sum(run.shown for run in self.runs) != self.n_tokens:
            raise CorruptDataError("block record: runs do not cover its tokens")
