"""Byte format of index rows and of the entries in `children`: pure functions between objects and bytes.

The value of a row; integers are little-endian. A match reads only the fields at fixed offsets. Runs are parsed
(`kvstore.core.records.runs_from_record`) when they are first used.

    offset  size  what
         0     2  format version, 3
         2     1  kind: 0 block or tail, 1 checkpoint, 2 aux
         3     1  1 if what follows the fixed fields is encrypted (`kvstore.blobs.keyring`), else 0
         4     4  payload offset in the blob
         8     8  bytes of the blob
        16     8  number: makes the blob's name unique
        24     8  fidelity
        32     8  start: position of the first token in the sequence
        40     8  created, seconds since 1970
        48    32  parent key
        80    32  root
       112     2  n: tokens
       114     2  zero
       116     4  digest of the templates of the runs; 0 when there are none
       120    8n  tokens
    120+8n        runs, whose templates stand apart (database `templates`), or the states of a checkpoint, or digest,
                  size and checksum of an aux block (msgpack)
      last     8  xxh3_64 of all before it, seeded with the first 8 bytes of the key

How a child is found. A block of n tokens after `parent` has one entry for each level 0, 1 .. n // 32:

    parent, level (1 byte), head of the first 32 * level tokens (8 bytes), code of the next tokens, number (8 bytes)

The head is their xxh3_64, in an encrypted namespace their HMAC under its key; tokens are compared in any case. The code
covers the next 32 tokens at most: a token in [0, 2^23) is 3 bytes big-endian, any other is 0xFF and 8 bytes big-endian
with the sign bit flipped. No code is the beginning of another, so entries that share more tokens share more bytes.
Bisection over the levels finds the deepest head that the query shares with any child, and the best child stands next
to where the query's own entry would be. An encrypted namespace has no codes, since their order tells of tokens.

A tail has one entry more, `parent, 0xFE, n (2 bytes), head of all its tokens, number`, by which a longer block finds
the tails that it covers. A checkpoint has only `parent, 0xFF, n (2 bytes), number`, an aux block `root, 0xFD,
first 8 bytes of its key`.

An aux row with a blob of 0 bytes is lost: blocks refer to it, and its blob is damaged or gone. They stay and are misses
until the same bytes are put again.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import NamedTuple

import msgpack
import xxhash

from kvstore.blobs.format import FORMAT_VERSION
from kvstore.blobs.keyring import KeyRing, NamespaceKey
from kvstore.blobs.protocol import BlobId, Source
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, KEY_BYTES, TOKEN_BYTES, Aux, Block
from kvstore.core.keys import aux_key
from kvstore.core.records import (
    PackedRuns,
    aux_from_list,
    runs_from_record,
    runs_to_record,
    states_from_list,
    states_to_list,
    unpack_record,
)
from kvstore.errors import CorruptDataError, UnknownFormatError

_HEAD = struct.Struct("<HBBIQQQQQ32s32sHHI")
_FIDELITY_AT = 24
# Payload offset, bytes of the blob, digest of the templates.
_SIZES = struct.Struct("<4xIQ100xI")
# Fidelity, digest of the templates.
_KIND = struct.Struct("<24xQ84xI")
ENCRYPTED_AT = 3
ENCRYPTED = b"\1"
TOKENS_AT = _HEAD.size
ROOT_AT = 80
CHECK_BYTES = 8
NUMBER_BYTES = 8
HEAD_BYTES = 8
LEVEL_TOKENS = 32
_SHORT_TOKEN_LIMIT = 1 << 23
# The packed tokens of a whole level, with every bit set that is 0 in a short token.
_LONG_BITS = int.from_bytes((-_SHORT_TOKEN_LIMIT).to_bytes(TOKEN_BYTES, "little", signed=True) * LEVEL_TOKENS, "little")
_SIGN = 1 << 63
CHECKPOINT_KIND, AUX_KIND = 1, 2
# First bytes of an entry after the parent; a level is below all of them.
AUX_MARK, TAIL_MARK, CHECKPOINT_MARK = b"\xfd", b"\xfe", b"\xff"

# A row as it stands in the index, key and value, and how many of its tokens to take. A match of 32k tokens has 128;
# to parse them takes as long as to find them, and who only asks how long the match is needs none.
EncodedRow = tuple[bytes, bytes, int]
Templates = Mapping[bytes, bytes]


class _Fields(NamedTuple):
    key: bytes
    value: bytes
    templates: Templates
    version: int
    kind: int
    is_key_missing: int  # 1: encrypted, and its key is not there: then only the fixed fields say anything
    payload_offset: int
    blob_bytes: int
    number: int
    fidelity: int
    start: int
    created_s: int
    parent: bytes
    root: bytes
    n_tokens: int
    zero: int
    templates_digest: int


class Row(_Fields):
    """A row of the index: where a block's blob lies, and, decoded when first asked for, the block itself.

    Immutable, so any thread may look into it; it stays valid after the read transaction that it came from. A tuple,
    because a match makes one for each block, and a frozen dataclass of lazy properties took three times as long.
    """

    @property
    def blob(self) -> BlobId:
        """Its blob."""
        return BlobId(self.root, self.key, self.number)

    @property
    def source(self) -> Source:
        """The blob's id and size, as a reader needs them."""
        return Source(self.blob, self.payload_offset, self.blob_bytes)

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is a checkpoint instead of KV."""
        return self.kind == CHECKPOINT_KIND

    @property
    def is_aux(self) -> bool:
        """Whether this is what recipes refer to, instead of KV."""
        return self.kind == AUX_KIND

    @property
    def is_lost(self) -> bool:
        """Whether this is an aux row that blocks refer to and that has no blob; see the module."""
        return self.is_aux and not self.blob_bytes

    @property
    def end(self) -> int:
        """Position after the last token; a checkpoint's own."""
        return self.start + self.n_tokens

    @property
    def depth(self) -> int:
        """How many blocks come before this one; for a checkpoint one more, so that it goes before the tail there."""
        return self.start // BLOCK_TOKENS + self.is_checkpoint

    @property
    def tokens(self) -> bytes:
        """Packed tokens of the block."""
        return self.value[TOKENS_AT : TOKENS_AT + TOKEN_BYTES * self.n_tokens]

    @property
    def described(self) -> bytes:
        """The runs, without templates, or the states of a checkpoint: as a fetch reply carries them. Or the aux."""
        return self.value[TOKENS_AT + TOKEN_BYTES * self.n_tokens : -CHECK_BYTES]

    @functools.cached_property
    def block(self) -> Block:
        """The block, without its namespace record. CorruptDataError when the row does not parse."""
        place = (self.root, self.parent, self.key, self.start, self.tokens, self.fidelity)
        if self.is_aux:
            block = Block(*place, (), self.created_s, aux=aux_from_list(unpack_record(self.described)))
        elif self.is_checkpoint:
            states = states_from_list(unpack_record(self.described))
            block = Block(*place, (), self.created_s, states=states)
        else:
            block = Block(*place, runs_from_record(self.described, self.templates), self.created_s)
        if block.is_checkpoint != self.is_checkpoint:
            raise CorruptDataError("index row: a checkpoint without states")
        block.require_whole()
        return block

    def __hash__(self) -> int:
        # The templates are a dict, which has no hash; equal rows have one key and one value.
        return hash((self.key, self.value))

    def __repr__(self) -> str:
        return f"Row({self.key.hex()[:12]}, start={self.start}, n_tokens={self.n_tokens}, number={self.number})"


def pack_row(block: Block, number: int, payload_offset: int, blob_bytes: int, packed: PackedRuns | None = None) -> Row:
    """The row of a block whose blob is complete. `packed`: its runs, if they are packed already."""
    templates: dict[bytes, bytes] = {}
    if block.aux is not None:
        described = msgpack.packb(astuple(block.aux))
    elif block.is_checkpoint:
        described = msgpack.packb(states_to_list(block.states))
    else:
        described, templates = packed or runs_to_record(block.runs)
    head = _HEAD.pack(
        FORMAT_VERSION,
        AUX_KIND if block.aux is not None else CHECKPOINT_KIND if block.is_checkpoint else 0,
        0,
        payload_offset,
        blob_bytes,
        number,
        block.fidelity,
        block.start,
        block.created_s,
        block.parent,
        block.root,
        block.n_tokens,
        0,
        xxhash.xxh32_intdigest(b"".join(sorted(templates))) or 1 if templates else 0,
    )
    value = head + block.tokens + described
    return parse_row(block.key, with_check(block.key, value), templates)


def lost_row(root: bytes, digest: bytes) -> Row:
    """The row that stands for an aux block which blocks refer to and whose blob is not there."""
    aux = Aux(digest, 1)  # its size is not known
    return pack_row(Block(root, root, aux_key(root, digest), 0, b"", FIDELITY_EXACT, (), aux=aux), 0, 0, 0)


def _check(key: bytes, value: bytes | memoryview) -> bytes:
    return xxhash.xxh3_64_intdigest(value, int.from_bytes(key[:8], "little")).to_bytes(CHECK_BYTES, "little")


def with_check(key: bytes, value: bytes) -> bytes:
    """`value`, then its xxh3_64 seeded with the first 8 bytes of the key."""
    return value + _check(key, value)


def without_check(key: bytes, stored: bytes) -> bytes:
    """Inverse of `with_check`. Raises CorruptDataError if the value was changed or belongs to another key."""
    value = stored[:-CHECK_BYTES]
    if with_check(key, value) != stored:
        raise CorruptDataError("index: a value does not match its checksum")
    return value


def fidelity_of(value: bytes) -> int:
    """The fidelity of a row that is not parsed."""
    return int.from_bytes(value[_FIDELITY_AT : _FIDELITY_AT + 8], "little")


def kinds_of(rows: Iterable[EncodedRow]) -> set[tuple[int, int]]:
    """(fidelity, digest of the templates) of rows that are not parsed."""
    return set(map(_KIND.unpack_from, map(operator.itemgetter(1), rows)))


def sizes_of(rows: Iterable[EncodedRow]) -> list[tuple[int, int, int]]:
    """(bytes of the blob's payload, digest of the templates, tokens to take) of rows that are not parsed."""
    sizes = [(*_SIZES.unpack_from(value), take) for _, value, take in rows]
    return [(blob_bytes - offset, digest, take) for offset, blob_bytes, digest, take in sizes]


def parse_row(key: bytes, value: bytes, templates: Templates) -> Row:
    """Parse and verify an index row. Raises CorruptDataError if it is damaged or belongs to another key.

    A row says where a blob's bytes are and how to decode them, so its checksum is verified at every read.
    """
    if len(value) < TOKENS_AT + CHECK_BYTES:
        raise CorruptDataError("index row: too short")
    if _check(key, memoryview(value)[:-CHECK_BYTES]) != value[-CHECK_BYTES:]:
        raise CorruptDataError("index row: it does not match its checksum")
    row = Row(key, value, templates, *_HEAD.unpack_from(value))
    if row.version != FORMAT_VERSION:
        raise UnknownFormatError(f"an index row of format version {row.version}; this kvstore reads {FORMAT_VERSION}")
    # A block has 1 to 256 tokens, a checkpoint 0 to 255, an aux block none.
    if not (0 < row.n_tokens + row.kind <= BLOCK_TOKENS if row.kind < AUX_KIND else row.is_aux and not row.n_tokens):
        raise CorruptDataError("index row: no such row")
    if len(value) < TOKENS_AT + TOKEN_BYTES * row.n_tokens + CHECK_BYTES:
        raise CorruptDataError("index row: cut short")
    return row


def encrypt_row(row: Row, key: NamespaceKey) -> bytes:
    """The value under which a row of an encrypted namespace stands in the index."""
    head = row.value[:ENCRYPTED_AT] + ENCRYPTED + row.value[ENCRYPTED_AT + 1 : TOKENS_AT]
    value = head + key.encrypt(row.value[TOKENS_AT:-CHECK_BYTES], row.key + head)
    return with_check(row.key, value)


def decrypt_row(key: bytes, value: bytes, ring: KeyRing) -> bytes:
    """A row's value as `parse_row` takes it, decrypted if it is encrypted and the ring has its key."""
    if value[ENCRYPTED_AT : ENCRYPTED_AT + 1] != ENCRYPTED:
        return value
    head = value[:TOKENS_AT]
    own = ring.key(value[ROOT_AT : ROOT_AT + KEY_BYTES])
    secret = own.decrypt(value[TOKENS_AT:-CHECK_BYTES], key + head) if own else None
    if secret is None:
        return value
    plain = head[:ENCRYPTED_AT] + b"\0" + head[ENCRYPTED_AT + 1 :] + secret
    return with_check(key, plain)


# -- entries of children ------------------------------------------------------------------------------------------


def token_code(token: int) -> bytes:
    """The order-preserving, prefix-free code of one token."""
    if 0 <= token < _SHORT_TOKEN_LIMIT:
        return token.to_bytes(3, "big")
    return b"\xff" + (token + _SIGN).to_bytes(8, "big")


def level_code(tokens: bytes, level: int, key: NamespaceKey | None) -> bytes:
    """The code of the tokens of a level, at most LEVEL_TOKENS; empty in a namespace with a key."""
    if key:
        return b""
    part = tokens[level * LEVEL_TOKENS * TOKEN_BYTES : (level + 1) * LEVEL_TOKENS * TOKEN_BYTES]
    if int.from_bytes(part, "little") & _LONG_BITS:
        return b"".join(map(token_code, struct.unpack(f"<{len(part) // TOKEN_BYTES}q", part)))
    code = bytearray(3 * (len(part) // TOKEN_BYTES))
    code[0::3], code[1::3], code[2::3] = part[2::TOKEN_BYTES], part[1::TOKEN_BYTES], part[0::TOKEN_BYTES]
    return bytes(code)


def head_of(tokens: bytes, key: NamespaceKey | None) -> bytes:
    """The head of packed tokens, in a namespace with this key."""
    return key.child_head(tokens) if key else xxhash.xxh3_64_digest(tokens)


def level_prefix(parent: bytes, tokens: bytes, level: int, key: NamespaceKey | None) -> bytes:
    """How the entries begin of children of `parent` that share the first `level` times 32 of these tokens."""
    head = head_of(tokens[: level * LEVEL_TOKENS * TOKEN_BYTES], key) if level else bytes(HEAD_BYTES)
    return parent + bytes([level]) + head


def tail_prefix(parent: bytes, tokens: bytes, key: NamespaceKey | None) -> bytes:
    """How the entry begins of the tail of `parent` that has exactly these tokens."""
    return parent + TAIL_MARK + (len(tokens) // TOKEN_BYTES).to_bytes(2, "big") + head_of(tokens, key)


def checkpoint_prefix(parent: bytes, n_tokens: int) -> bytes:
    """Key prefix of the entries of checkpoints at this distance in tokens from their parent."""
    return parent + CHECKPOINT_MARK + n_tokens.to_bytes(2, "big")


def child_entries(row: Row, key: NamespaceKey | None) -> list[bytes]:
    """The row's entries in the `children` database. `key`: the key of its namespace, if it is encrypted."""
    number = row.number.to_bytes(NUMBER_BYTES, "big")
    if row.is_checkpoint:
        return [checkpoint_prefix(row.parent, row.n_tokens) + number]
    if row.is_aux:
        return [row.root + AUX_MARK + row.key[:HEAD_BYTES]]
    tokens = row.tokens
    entries = [
        level_prefix(row.parent, tokens, level, key) + level_code(tokens, level, key) + number
        for level in range(row.n_tokens // LEVEL_TOKENS + 1)
    ]
    if row.n_tokens < BLOCK_TOKENS:
        entries.append(tail_prefix(row.parent, tokens, key) + number)
    return entries
