"""Namespaces and the chain of prefix keys. Pure functions; tests/golden/keys.json pins their results.

    root  = SHA-256(tag_root, each identity field as (name, length, bytes))
    key_i = SHA-256(tag_block, key_{i-1}, tokens of block i as 8-byte little-endian)

The key of a tail is that of a block with fewer tokens; the key of a checkpoint has its own tag, and so has that of an
aux block, H(tag_aux, root, SHA-256 of its bytes). Keys are used only for
look-up: token bytes are compared on every hit.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from kvstore.core.blocks import BLOCK_TOKENS, KEY_BYTES, TOKEN_BYTES
from kvstore.core.layers import Layout
from kvstore.core.records import unpack_record
from kvstore.errors import CorruptDataError, InvalidRequestError

_ROOT_TAG = b"kvstore/root/v1\0"
_BLOCK_TAG = b"kvstore/block/v1\0"
_CHECKPOINT_TAG = b"kvstore/checkpoint/v1\0"
_AUX_TAG = b"kvstore/aux/v1\0"
FIELD_BYTES_MAX = 4096
RECORD_VERSION = 2
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


@dataclass(frozen=True)
class Namespace:
    """Everything that must be equal for KV to be interchangeable. `alias` is for people only.

    weights: digest of the shards and the effective config; adapter: digest or b""; layout: the cache layout; dtype: of
    the KV, as in the layout; engine: its name, a digest of the code that computes the model, and MLX's minor version;
    salt: tenant secret, may be empty.
    """

    weights: bytes
    layout: Layout
    adapter: bytes = b""
    dtype: str = ""
    engine: str = ""
    salt: bytes = b""
    alias: str = ""

    def __post_init__(self) -> None:
        if not self.weights:
            raise InvalidRequestError("a namespace needs the digest of its weights")
        for name in ("weights", "adapter", "salt"):
            value = getattr(self, name)
            if not isinstance(value, bytes) or len(value) > FIELD_BYTES_MAX:
                raise InvalidRequestError(f"namespace {name} must be at most {FIELD_BYTES_MAX} bytes")
        if len(self.engine) + len(self.dtype) + len(self.alias) > FIELD_BYTES_MAX:
            raise InvalidRequestError("namespace names are too long")

    def __repr__(self) -> str:
        """Short, and without the salt, which is a secret."""
        named = f" {self.alias!r}" if self.alias else ""
        salted = ", salted" if self.salt else ""
        return f"<Namespace {self.root.hex()[:12]}{named}, engine {self.engine!r}, {self.layout!r}{salted}>"

    @functools.cached_property
    def root(self) -> bytes:
        """The root of the key chain, 32 bytes: the namespace's id."""
        return root_key(self.weights, self.adapter, self.layout.digest, self.dtype, self.engine, self.salt)

    @property
    def info(self) -> NamespaceInfo:
        """The namespace as the store remembers it."""
        return NamespaceInfo(self.root, self.weights, self.adapter, self.layout, self.dtype, self.engine, self.alias)

    def to_record(self) -> bytes:
        """The serial form, for index and blob headers."""
        return self.info.to_record()


@dataclass(frozen=True)
class NamespaceInfo:
    """A namespace as stored on disk: with its root in place of the salt, which stored data must not reveal."""

    root: bytes
    weights: bytes
    adapter: bytes
    layout: Layout
    dtype: str
    engine: str
    alias: str

    def to_record(self) -> bytes:
        """msgpack for index and blob headers."""
        digests = (self.root, self.weights, self.adapter, self.layout.record)
        fields = [RECORD_VERSION, *digests, self.dtype, self.engine, self.alias]
        packed: bytes = msgpack.packb(fields)
        return packed

    @property
    def is_salted(self) -> bool:
        """Whether this is a tenant's: with its salt left out, the identity has another root."""
        return self.root != root_key(self.weights, self.adapter, self.layout.digest, self.dtype, self.engine, b"")

    @property
    def identity(self) -> dict[str, str]:
        """The identity fields by name, digests in hex, and the `id` that they come to."""
        return {
            "id": self.root.hex(),
            "weights": self.weights.hex(),
            "adapter": self.adapter.hex(),
            "layout": self.layout.digest.hex(),
            "dtype": self.dtype,
            "engine": self.engine,
        }

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def from_record(record: bytes) -> NamespaceInfo:
        """Parse `to_record`; CorruptDataError when it is not one. Every store names one of few namespaces."""
        fields: Any = unpack_record(record)
        if not isinstance(fields, list) or len(fields) != 8 or fields[0] != RECORD_VERSION:
            raise CorruptDataError("not a namespace record of a known version")
        _, root, weights, adapter, layout, dtype, engine, alias = fields
        if not all(isinstance(one, bytes) for one in (root, weights, adapter, layout)) or len(root) != KEY_BYTES:
            raise CorruptDataError("namespace record: digests are bytes")
        if not all(isinstance(name, str) for name in (dtype, engine, alias)):
            raise CorruptDataError("namespace record: names are text")
        try:
            return NamespaceInfo(root, weights, adapter, Layout.from_record(layout), dtype, engine, alias)
        except (InvalidRequestError, TypeError) as error:
            raise CorruptDataError(f"namespace record: {error}") from error


def differing_fields(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of the identity fields in which two `NamespaceInfo.identity` differ; none when KV is interchangeable."""
    if one["id"] == other["id"]:
        return []
    return [name for name in one if name != "id" and one[name] != other[name]] or ["salt"]


def root_key(weights: bytes, adapter: bytes, layout_digest: bytes, dtype: str, engine: str, salt: bytes) -> bytes:
    """The root of a namespace's chain; every field is tagged and length-prefixed, so no two field lists collide."""
    digest = hashlib.sha256(_ROOT_TAG)
    fields = (
        (b"weights", weights),
        (b"adapter", adapter),
        (b"layout", layout_digest),
        (b"dtype", dtype.encode()),
        (b"engine", engine.encode()),
        (b"salt", salt),
    )
    for name, value in fields:
        digest.update(len(name).to_bytes(4, "little") + name + len(value).to_bytes(8, "little") + value)
    return digest.digest()


def block_key(parent: bytes, tokens: bytes) -> bytes:
    """The key of a block or tail with packed `tokens` after `parent`."""
    return hashlib.sha256(_BLOCK_TAG + parent + tokens).digest()


def checkpoint_key(parent: bytes, tokens: bytes) -> bytes:
    """The key of the checkpoint after `parent`, the last full block, and packed `tokens`; there may be none."""
    return hashlib.sha256(_CHECKPOINT_TAG + parent + tokens).digest()


def aux_key(root: bytes, digest: bytes) -> bytes:
    """The key, in the namespace `root`, of the aux block whose bytes have this SHA-256."""
    return hashlib.sha256(_AUX_TAG + root + digest).digest()


class Chain:
    """A prompt in one namespace: its packed tokens and the keys of its blocks. A key is hashed at its first use, once.

    Make a chain where tokens enter and pass it on, so that client and daemon hash a prompt once each. Any thread may
    call.
    """

    __slots__ = ("_keys", "_known", "full", "n_tokens", "root", "tokens")

    def __init__(self, root: bytes, tokens: bytes) -> None:
        """`tokens`: 8 bytes each, little-endian; what `pack_tokens` gives. `full`: how many whole blocks they are."""
        self.root = root
        self.tokens = tokens
        self.n_tokens = len(tokens) // TOKEN_BYTES
        self.full = len(tokens) // BLOCK_BYTES
        # Keys of all blocks; the first `_known` are computed. Two threads may write the same key to the same place.
        self._keys = [b""] * -(-len(tokens) // BLOCK_BYTES)
        self._known = 0

    @property
    def tail(self) -> bytes:
        """The packed tokens after the last full block; empty when there are none."""
        return self.tokens[self.full * BLOCK_BYTES :]

    def key(self, index: int) -> bytes:
        """The key of block `index`, full or not."""
        keys, known = self._keys, self._known
        if index >= known:
            parent = keys[known - 1] if known else self.root
            for number in range(known, index + 1):
                at = number * BLOCK_BYTES
                parent = keys[number] = block_key(parent, self.tokens[at : at + BLOCK_BYTES])
            self._known = index + 1
        return keys[index]

    def stored(self, count: int, look_up: Callable[[bytes], bytes | None], at: int) -> list[tuple[bytes, bytes, int]]:
        """The leading full blocks that are stored, at most `count`: (key, value, tokens in it) of each.

        A block is stored if `look_up(key)` is a value that has the block's tokens at offset `at`. A key is hashed when
        it is looked up. One plain loop: with a generator of keys a match took a tenth longer.
        """
        tokens, keys, known, parent, sha256 = self.tokens, self._keys, self._known, self.root, hashlib.sha256
        found: list[tuple[bytes, bytes, int]] = []
        number = -1
        for number in range(count):
            chunk = tokens[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            if number < known:
                parent = keys[number]
            else:
                parent = keys[number] = sha256(_BLOCK_TAG + parent + chunk).digest()
            value = look_up(parent)
            if value is None or not value.startswith(chunk, at):
                break
            found.append((parent, value, BLOCK_TOKENS))
        self._known = max(known, number + 1)
        return found

    def parent(self, index: int) -> bytes:
        """The key that block `index`, full or not, is stored under: that of the block before it, or the root."""
        return self.key(index - 1) if index else self.root

    def keys(self) -> list[bytes]:
        """Keys of all full blocks, in order."""
        return self.block_keys()[: self.full]

    def block_keys(self) -> list[bytes]:
        """Keys of all blocks, in order: the full ones, then the tail's if there is one."""
        if self._keys:
            self.key(len(self._keys) - 1)
        return list(self._keys)

    def checkpoint_key(self) -> bytes:
        """The key of the checkpoint after the last token."""
        return checkpoint_key(self.parent(self.full), self.tail)

    def head(self, n_tokens: int) -> Chain:
        """The chain of the first `n_tokens`, with the keys that are known."""
        if n_tokens >= self.n_tokens:
            return self
        head = Chain(self.root, self.tokens[: n_tokens * TOKEN_BYTES])
        known = min(self._known, head.full)
        head._keys[:known] = self._keys[:known]
        head._known = known
        return head
