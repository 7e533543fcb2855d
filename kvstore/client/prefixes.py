"""A session's record of prefixes that are already in the store."""

from __future__ import annotations

import threading
from collections import OrderedDict

from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES
from kvstore.core.keys import BLOCK_BYTES, Chain

HELD_MAX = 65_536
CHECKPOINTS_MAX = 1024


class HeldPrefixes:
    """Blocks and checkpoints that the store is known to hold: from hits and acknowledgements. Any thread may call.

    Only a hint, which saves copying and sending: the daemon says when it is wrong, and then the chain is forgotten.
    """

    def __init__(self, limit: int = HELD_MAX, checkpoints_max: int = CHECKPOINTS_MAX) -> None:
        self._limit = limit
        self._checkpoints_max = checkpoints_max
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._checkpoints: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()  # last full block, tokens after it
        self._lock = threading.Lock()

    def held_tokens(self, chain: Chain) -> int:
        """Leading tokens, whole blocks or everything, that are known to be held."""
        keys = chain.block_keys()
        with self._lock:
            for index in reversed(range(len(keys))):
                if keys[index] in self._keys:
                    for key in keys[: index + 1]:
                        self._keys[key] = None
                        self._keys.move_to_end(key)
                    self._shrink()
                    return min((index + 1) * BLOCK_TOKENS, chain.n_tokens)
        return 0

    def hold(self, chain: Chain, *, checkpoint: bool = False) -> None:
        """Remember that all of a prompt is held, and whether the checkpoint at their end is."""
        with self._lock:
            for key in chain.block_keys():
                self._keys[key] = None
                self._keys.move_to_end(key)
            if checkpoint:
                place = chain.parent(chain.full), chain.tail
                self._checkpoints[place] = None
                self._checkpoints.move_to_end(place)
            self._shrink()

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

    def _shrink(self) -> None:
        while len(self._keys) > self._limit:
            self._keys.popitem(last=False)
        while len(self._checkpoints) > self._checkpoints_max:
            self._checkpoints.popitem(last=False)
