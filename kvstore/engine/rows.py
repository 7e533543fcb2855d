"""Index rows and the order of children: pure functions from nouns to bytes and back.

A row's value; integers are little-endian. Fixed offsets, so that a match compares token bytes in place and decodes
the runs (msgpack, `kvstore.records.runs_to_list`) only of rows that somebody looks into:

    offset  size  what
         0     2  row version, 2
         2     2  directory: which blobs.noindex/<xx>
         4     4  payload offset in the file
         8     8  file bytes
        16     8  seq: makes the file name unique
        24     8  fidelity
        32     8  start: position of the first token in the sequence
        40     8  created, seconds since 1970
        48    32  parent key
        80    32  root
       112     2  n: tokens
       114     1  kind: 0 block or tail, 1 checkpoint
       115     4  digest of the recipes of the runs; 0 when none was taken
       119     1  1 if what follows is encrypted (`kvstore.engine.keyring`), else 0
       120    8n  tokens
    120+8n        runs, or the states of a checkpoint
      last     8  xxh3_64 of all before it, seeded with the first 8 bytes of the key

Children of one parent are ordered by a code of their leading tokens: a token in [0, 2^23) is 3 bytes big-endian,
any other is 0xFF and 8 bytes big-endian with the sign bit flipped. No code is the beginning of another, so entries
that share more tokens share more bytes, and the longest match stands next to where a query would be inserted.
Checkpoints stand apart under 0xC0, which begins no code, in the order of how many tokens follow their parent.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgpack
import numpy as np
import xxhash

from kvstore.blocks import BLOCK_TOKENS, KEY_BYTES, TOKEN_BYTES, Block
from kvstore.engine.blobs import disk_bytes
from kvstore.engine.keyring import KeyRing, NamespaceKey
from kvstore.errors import CorruptDataError
from kvstore.records import runs_from_list, runs_to_list, states_from_list, states_to_list, unpack_record

ROW_VERSION = 2
_HEAD = struct.Struct("<HHIQQQQQ32s32sHBIB")
_FIDELITY_AT = 24
_RECIPES_AT = 115
SEALED_AT = 119
SEALED = b"\1"
TOKENS_AT = _HEAD.size
ROOT_AT = 80
CHECK_BYTES = 8
SEQ_BYTES = 8
# LMDB keys have at most 511 bytes: parent, code, seq.
CODE_BYTES_MAX = 511 - KEY_BYTES - SEQ_BYTES
_SHORT_TOKEN_LIMIT = 1 << 23
_SIGN = 1 << 63
CHECKPOINT_KIND = 1
CHECKPOINT_MARK = b"\xc0"

# A row as it stands in the index, key and value, and how many of its tokens to take. A match of 32k tokens has 128;
# to parse them takes as long as to find them, and who only asks how long the match is needs none.
Taken = tuple[bytes, bytes, int]


class _Fields(NamedTuple):
    key: bytes
    value: bytes
    version: int
    directory: int
    payload_offset: int
    file_bytes: int
    seq: int
    fidelity: int
    start: int
    created_s: int
    parent: bytes
    root: bytes
    n_tokens: int
    kind: int
    recipes: int
    sealed: int


class Row(_Fields):
    """A row of the index: where a block's blob lies, and, decoded when first asked for, the block itself.

    Immutable, so any thread may look into it; it stays valid after the read transaction that it came from. A tuple,
    because a match makes one for each block, and a frozen dataclass of lazy properties took three times as long.
    """

    @property
    def disk_bytes(self) -> int:
        """What the file costs on disk."""
        return disk_bytes(self.file_bytes)

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is a checkpoint instead of KV."""
        return self.kind == CHECKPOINT_KIND

    @property
    def is_sealed(self) -> bool:
        """Whether it is encrypted and its key is not there: then only the fixed fields say anything."""
        return bool(self.sealed)

    @property
    def end(self) -> int:
        """Position after the last token; a checkpoint's own."""
        return self.start + self.n_tokens

    @property
    def depth(self) -> int:
        """How many blocks come before this one; for a checkpoint one more, so that it goes before the tail there."""
        return self.start // BLOCK_TOKENS + self.kind

    @property
    def tokens(self) -> bytes:
        """Packed tokens of the block."""
        return self.value[TOKENS_AT : TOKENS_AT + TOKEN_BYTES * self.n_tokens]

    @property
    def runs_record(self) -> bytes:
        """msgpack of the runs, as a fetch reply carries it. Not of a checkpoint, which has none."""
        return self.value[TOKENS_AT + TOKEN_BYTES * self.n_tokens : -CHECK_BYTES]

    @property
    def states_record(self) -> bytes:
        """msgpack of a checkpoint's states, as a fetch reply carries it. Of a checkpoint only."""
        return self.value[TOKENS_AT + TOKEN_BYTES * self.n_tokens : -CHECK_BYTES]

    @functools.cached_property
    def block(self) -> Block:
        """The block, without its namespace record. CorruptDataError when the row does not parse."""
        place = (self.root, self.parent, self.key, self.start, self.tokens, self.fidelity)
        if self.is_checkpoint:
            states = states_from_list(unpack_record(self.states_record))
            block = Block(*place, (), self.created_s, states=states)
        else:
            block = Block(*place, runs_from_list(unpack_record(self.runs_record)), self.created_s)
        if block.is_checkpoint != self.is_checkpoint:
            raise CorruptDataError("index row: a checkpoint without states")
        block.demand_whole()
        return block

    def __repr__(self) -> str:
        return f"Row({self.key.hex()[:12]}, start={self.start}, n_tokens={self.n_tokens}, seq={self.seq})"


def pack_row(block: Block, directory: int, seq: int, payload_offset: int, file_bytes: int) -> Row:
    """The row of a block whose blob is complete."""
    head = _HEAD.pack(
        ROW_VERSION,
        directory,
        payload_offset,
        file_bytes,
        seq,
        block.fidelity,
        block.start,
        block.created_s,
        block.parent,
        block.root,
        block.n_tokens,
        CHECKPOINT_KIND if block.is_checkpoint else 0,
        recipes_digest(block),
        0,
    )
    described = states_to_list(block.states) if block.is_checkpoint else runs_to_list(block.runs)
    value = head + block.tokens + msgpack.packb(described)
    return parse_row(block.key, value + _check(block.key, value))


def _check(key: bytes, value: bytes | memoryview) -> bytes:
    return xxhash.xxh3_64_intdigest(value, int.from_bytes(key[:8], "little")).to_bytes(CHECK_BYTES, "little")


def recipes_digest(block: Block) -> int:
    """32 bits, never 0, that blocks with the same set of recipes share: who can read one of them can read them all."""
    recipes = {stack.recipe for run in block.runs for stack in run.stacks}
    fields = sorted((recipe.name, recipe.version, recipe.params) for recipe in recipes)
    return xxhash.xxh32_intdigest(msgpack.packb(fields)) or 1


def fidelity_of(value: bytes) -> int:
    """The fidelity of a row that is not parsed."""
    return int.from_bytes(value[_FIDELITY_AT : _FIDELITY_AT + 8], "little")


def fidelities_of(rows: Iterable[Taken]) -> set[int]:
    """The fidelities of rows that are not parsed. Most are equal, so that numbers are made of few."""
    return {int.from_bytes(raw, "little") for raw in {value[_FIDELITY_AT : _FIDELITY_AT + 8] for _, value, _ in rows}}


def recipes_of(rows: Iterable[Taken]) -> set[int]:
    """The digests of recipes of rows that are not parsed; 0 of one of which none was taken."""
    return {int.from_bytes(raw, "little") for raw in {value[_RECIPES_AT : _RECIPES_AT + 4] for _, value, _ in rows}}


def parse_row(key: bytes, value: bytes) -> Row:
    """A row as it stands in the index. CorruptDataError when it was changed or is another key's.

    Recipes stand in it, and what they say decides what bytes mean; so every row is verified whenever it is read.
    """
    if len(value) < TOKENS_AT + CHECK_BYTES:
        raise CorruptDataError("index row: too short")
    if _check(key, memoryview(value)[:-CHECK_BYTES]) != value[-CHECK_BYTES:]:
        raise CorruptDataError("index row: it does not match its checksum")
    row = Row(key, value, *_HEAD.unpack_from(value))
    if row.version != ROW_VERSION:
        raise CorruptDataError(f"an index row of version {row.version}; this kvstore reads {ROW_VERSION}")
    # A block has 1 to 256 tokens, a checkpoint 0 to 255.
    if row.kind > CHECKPOINT_KIND or not 0 < row.n_tokens + row.kind <= BLOCK_TOKENS:
        raise CorruptDataError("index row: no such row")
    if len(value) < TOKENS_AT + TOKEN_BYTES * row.n_tokens + CHECK_BYTES:
        raise CorruptDataError("index row: cut short")
    return row


def seal_row(row: Row, key: NamespaceKey) -> bytes:
    """The value under which a row of an encrypted namespace stands in the index."""
    head = row.value[:SEALED_AT] + SEALED
    value = head + key.seal(row.value[TOKENS_AT:-CHECK_BYTES], row.key + head)
    return value + _check(row.key, value)


def open_row(key: bytes, value: bytes, ring: KeyRing) -> bytes:
    """A row's value as `parse_row` takes it, decrypted if it is encrypted and the ring has its key."""
    if value[SEALED_AT:TOKENS_AT] != SEALED:
        return value
    head = value[:TOKENS_AT]
    own = ring.key(value[ROOT_AT : ROOT_AT + KEY_BYTES])
    secret = own.open(value[TOKENS_AT:-CHECK_BYTES], key + head) if own else None
    if secret is None:
        return value
    plain = head[:SEALED_AT] + b"\0" + secret
    return plain + _check(key, plain)


def token_code(token: int) -> bytes:
    """The order-preserving, prefix-free code of one token."""
    if 0 <= token < _SHORT_TOKEN_LIMIT:
        return token.to_bytes(3, "big")
    return b"\xff" + (token + _SIGN).to_bytes(8, "big")


@dataclass(frozen=True, slots=True)
class Code:
    """The code of leading tokens, cut to CODE_BYTES_MAX. `ends[i]` is where token i's code ends, of those not cut."""

    data: bytes
    ends: Sequence[int]
    complete: bool

    @classmethod
    def of(cls, tokens: bytes) -> Code:
        """The code of packed tokens."""
        count = min(len(tokens) // TOKEN_BYTES, CODE_BYTES_MAX // 3 + 1)
        numbers = np.frombuffer(tokens, "<i8", count)
        if count and numbers.min() >= 0 and numbers.max() < _SHORT_TOKEN_LIMIT:
            # As token_code does it one by one, which takes as long as thirty blocks of a match.
            short = numbers.astype(">u4").view(np.uint8).reshape(count, 4)[:, 1:].tobytes()
            whole = min(count, CODE_BYTES_MAX // 3)
            return cls(short[:CODE_BYTES_MAX], range(3, 3 * whole + 1, 3), whole == len(tokens) // TOKEN_BYTES)
        data = bytearray()
        ends: list[int] = []
        for (token,) in struct.iter_unpack("<q", tokens[: count * TOKEN_BYTES]):
            data += token_code(token)
            if len(data) > CODE_BYTES_MAX:
                break
            ends.append(len(data))
        complete = len(ends) == len(tokens) // TOKEN_BYTES
        return cls(bytes(data[:CODE_BYTES_MAX]), ends, complete)


def child_entry(row: Row, key: NamespaceKey | None = None) -> bytes:
    """The key under which a row stands among its parent's children; `key` is its namespace's, if it is encrypted."""
    if row.is_checkpoint:
        code = checkpoint_code(row.n_tokens)
    else:
        code = key.child_code(row.tokens) if key else Code.of(row.tokens).data
    return row.parent + code + row.seq.to_bytes(SEQ_BYTES, "big")


def checkpoint_code(n_tokens: int) -> bytes:
    """Under which the checkpoints stand that are so many tokens after their parent."""
    return CHECKPOINT_MARK + n_tokens.to_bytes(2, "big")


def common_bytes(a: bytes, b: bytes) -> int:
    """Length of the longest common prefix of two byte strings."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    different = int.from_bytes(a[:n], "big") ^ int.from_bytes(b[:n], "big")
    return n - (different.bit_length() + 7) // 8
