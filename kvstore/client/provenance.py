"""What a worker knows of the store: which of its KV came out of it, at which fidelity, and which prefixes it holds.

Engines merge, extract and quantize cache objects, which loses attributes set on them. So provenance is recorded by
weights and token chain, in one table for all sessions, layouts and profiles of a process. A lossy hit that an engine
quantizes, or that another session stores, is therefore never mistaken for KV that the model computed.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator

from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, TOKEN_BYTES, common_tokens, count_tokens
from kvstore.core.bounded import Bounded
from kvstore.core.keys import BLOCK_BYTES, Chain, Namespace, block_key

BLOCKS_MAX = 65_536
ENDS_MAX = 16_384  # each with the tokens of a block, 2 KiB at most
FORGOTTEN_BITS = 1 << 25  # 4 MiB; one key in fifty is taken for forgotten after 100 million forgotten tokens
HELD_MAX = 65_536
CHECKPOINTS_MAX = 1024

_TAG = b"kvstore/provenance/v1\0"
# How much of a forgotten block another one shares is known to the next of these.
_MARKS = (1, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
_HASHES = 4


class _Filter:
    """A Bloom filter of 32-byte digests: finds every added key; false positives are rare until the filter is full."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._bytes = bytearray(bits // 8)

    def add(self, key: bytes) -> None:
        """Mark a key, for good."""
        for place in self._places(key):
            self._bytes[place >> 3] |= 1 << (place & 7)

    def __contains__(self, key: bytes) -> bool:
        return all(self._bytes[place >> 3] & 1 << (place & 7) for place in self._places(key))

    def _places(self, key: bytes) -> Iterator[int]:
        return (int.from_bytes(key[at : at + 8], "little") % self._bits for at in range(0, 8 * _HASHES, 8))


class Provenance:
    """The leading tokens of chains that came out of the store, and the rank at which they did. Any thread may call.

    A hit is remembered by the keys of its full blocks, and by the tokens of each of its blocks under the key before it,
    so that a cache which was trimmed back into a hit and then went another way is still recognised. Both are bounded;
    the least recently used goes first. What is forgotten stays marked in a filter of fixed size, which may take other
    tokens for forgotten, never the other way round: such tokens count as restored at the lowest rank that was seen for
    their weights. Tokens that count as restored for nothing cost raw bytes, those that do not cost correctness.
    """

    def __init__(self, blocks_max: int = BLOCKS_MAX, ends_max: int = ENDS_MAX, bits: int = FORGOTTEN_BITS) -> None:
        self._blocks_max = blocks_max
        self._ends_max = ends_max
        self._blocks: OrderedDict[bytes, int] = OrderedDict()
        self._ends: OrderedDict[tuple[bytes, bytes], int] = OrderedDict()
        self._ends_of: dict[bytes, set[bytes]] = {}
        self._lowest: dict[bytes, int] = {}  # by weights: one for each model that this process had hits for
        self._forgotten = _Filter(bits)
        self._lock = threading.Lock()

    def remember(self, weights: bytes, tokens: bytes, fidelity: int) -> None:
        """A hit gave the KV of exactly the packed `tokens`. `weights` as `weights_of` names them."""
        parent = weights
        with self._lock:
            self._lowest[weights] = min(fidelity, self._lowest.get(weights, FIDELITY_EXACT))
            for block in _cut(tokens):
                self._remember_end(parent, block, fidelity)
                if len(block) == BLOCK_BYTES:
                    parent = block_key(parent, block)
                    self._blocks[parent] = min(fidelity, self._blocks.get(parent, FIDELITY_EXACT))
                    self._blocks.move_to_end(parent)
            while len(self._blocks) > self._blocks_max:
                self._forgotten.add(self._blocks.popitem(last=False)[0])

    def _remember_end(self, parent: bytes, block: bytes, fidelity: int) -> None:
        end = (parent, block)
        self._ends[end] = min(fidelity, self._ends.get(end, FIDELITY_EXACT))
        self._ends.move_to_end(end)
        self._ends_of.setdefault(parent, set()).add(block)
        while len(self._ends) > self._ends_max:
            (old_parent, old_block), _ = self._ends.popitem(last=False)
            self._ends_of[old_parent].discard(old_block)
            if not self._ends_of[old_parent]:
                del self._ends_of[old_parent]
            for key in _marks(old_parent, old_block):
                self._forgotten.add(key)

    def restored(self, weights: bytes, tokens: bytes) -> tuple[int, int]:
        """(leading tokens of `tokens` that came out of the store, the least rank among them).

        The longest of all hits counts for the tokens, since it is not known from which hit the KV is; and for the rank
        every hit that shares any of them: after an exact one a shorter one of lower rank may have taken its place.
        """
        parent, n_tokens, fidelity = weights, 0, FIDELITY_EXACT
        with self._lock:
            if weights not in self._lowest:
                return n_tokens, fidelity
            for block in _cut(tokens):
                shared, rank = self._shared(weights, parent, block)
                fidelity = min(fidelity, rank)
                parent = block_key(parent, block)
                if (rank_of_block := self._rank(weights, parent)) is None or len(block) < BLOCK_BYTES:
                    return n_tokens + shared, fidelity
                fidelity = min(fidelity, rank_of_block)
                n_tokens += BLOCK_TOKENS
        return n_tokens, fidelity

    def lowest(self, weights: bytes) -> int:
        """The lowest rank that any hit had for these weights; exact when there was none."""
        with self._lock:
            return self._lowest.get(weights, FIDELITY_EXACT)

    def _rank(self, weights: bytes, key: bytes) -> int | None:
        """The rank of a full block that came out of the store; None if it did not."""
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        return self._lowest[weights] if key in self._forgotten else None

    def _shared(self, weights: bytes, parent: bytes, block: bytes) -> tuple[int, int]:
        """(leading tokens of a block that some hit has after `parent`, the least rank of such hits)."""
        ends = [(common_tokens(end, block), self._ends[parent, end]) for end in self._ends_of.get(parent, ())]
        shared = max((n for n, _ in ends), default=0)
        rank = min((one for n, one in ends if n), default=FIDELITY_EXACT)
        marks = sum(1 for _ in itertools.takewhile(self._forgotten.__contains__, _marks(parent, block)))
        if not marks:
            return shared, rank
        below = _MARKS[marks] - 1 if marks < len(_MARKS) else BLOCK_TOKENS
        return max(shared, min(below, count_tokens(block))), min(rank, self._lowest[weights])


PROCESS = Provenance()
"""The table of this process. Sessions take it when they are made."""


def weights_of(namespace: Namespace) -> bytes:
    """32 bytes for what computes the KV of a namespace, whatever its layout: weights, adapter and tenant."""
    digest = hashlib.sha256(_TAG)
    for field in (namespace.weights, namespace.adapter, namespace.salt):
        digest.update(len(field).to_bytes(8, "little") + field)
    return digest.digest()


def _cut(tokens: bytes) -> Iterator[bytes]:
    """Packed tokens by blocks; the last may be short."""
    return (tokens[at : at + BLOCK_BYTES] for at in range(0, len(tokens), BLOCK_BYTES))


def _marks(parent: bytes, block: bytes) -> Iterator[bytes]:
    """Keys of the first 1, 8, 16, 32 ... tokens of a block after `parent`, as far as it has them."""
    key, start = parent, 0
    for mark in _MARKS[: bisect.bisect(_MARKS, count_tokens(block))]:
        key = hashlib.sha256(_TAG + key + block[start * TOKEN_BYTES : mark * TOKEN_BYTES]).digest()
        start = mark
        yield key


class HeldPrefixes:
    """Blocks and checkpoints that the store is known to hold: from hits and acknowledgements. Any thread may call.

    Only a hint, which saves copying and sending: the daemon says when it is wrong, and then the chain is forgotten.
    """

    def __init__(self, limit: int = HELD_MAX, checkpoints_max: int = CHECKPOINTS_MAX) -> None:
        self._keys: Bounded[bytes, None] = Bounded(limit)
        self._checkpoints: Bounded[tuple[bytes, bytes], None] = Bounded(checkpoints_max)  # last full block, its tail
        self._lock = threading.Lock()

    def held_tokens(self, chain: Chain) -> int:
        """Leading tokens, whole blocks or everything, that are known to be held."""
        keys = chain.block_keys()
        with self._lock:
            for index in reversed(range(len(keys))):
                if keys[index] in self._keys:
                    for key in keys[: index + 1]:
                        self._keys[key] = None
                    return min((index + 1) * BLOCK_TOKENS, chain.n_tokens)
        return 0

    def hold(self, chain: Chain, *, checkpoint: bool = False) -> None:
        """Remember that all of a prompt is held, and whether the checkpoint at their end is."""
        with self._lock:
            for key in chain.block_keys():
                self._keys[key] = None
            if checkpoint:
                self._checkpoints[chain.parent(chain.full), chain.tail] = None

    def holds_checkpoint(self, chain: Chain) -> bool:
        """Whether the checkpoint after exactly the last token is known to be held."""
        place = chain.parent(chain.full), chain.tail
        with self._lock:
            if place not in self._checkpoints:
                return False
            self._checkpoints.move_to_end(place)
            return True

    def forget(self, chain: Chain, keep_tokens: int = 0) -> None:
        """Forget every block of a prompt that reaches beyond its first `keep_tokens`, and every checkpoint there."""
        keys, tokens = chain.block_keys(), chain.tokens
        starts = {parent: index * BLOCK_BYTES for index, parent in enumerate([chain.root, *keys])}
        with self._lock:
            for key in keys[keep_tokens // BLOCK_TOKENS :]:
                self._keys.pop(key, None)
            for parent, tail in list(self._checkpoints):
                start = starts.get(parent, len(tokens))
                end = start + len(tail)
                if keep_tokens * TOKEN_BYTES < end <= len(tokens) and tokens[start:end] == tail:
                    del self._checkpoints[parent, tail]
