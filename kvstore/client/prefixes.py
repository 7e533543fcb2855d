"""What a session remembers of prefixes that the store holds."""

from __future__ import annotations

import threading
from collections import OrderedDict

from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, count_tokens
from kvstore.core.keys import block_key, chain_keys, checkpoint_key

HELD_MAX = 65_536
CHECKPOINTS_MAX = 1024
_BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


def prefix_keys(root: bytes, tokens: bytes) -> list[bytes]:
    """Keys of all blocks of packed `tokens`: the full ones, then the tail's if there is one."""
    keys = chain_keys(root, tokens)
    tail = tokens[len(keys) * _BLOCK_BYTES :]
    if tail:
        keys.append(block_key(keys[-1] if keys else root, tail))
    return keys


def checkpoint_after(root: bytes, tokens: bytes) -> bytes:
    """The key of the checkpoint after packed `tokens`."""
    keys = chain_keys(root, tokens)
    return checkpoint_key(keys[-1] if keys else root, tokens[len(keys) * _BLOCK_BYTES :])


class HeldPrefixes:
    """Blocks and checkpoints that the store is known to hold: from hits and acknowledgements. Any thread may call.

    Only a hint, which saves copying and sending: the daemon says when it is wrong, and then the chain is forgotten.
    """

    def __init__(self, root: bytes, limit: int = HELD_MAX, checkpoints_max: int = CHECKPOINTS_MAX) -> None:
        self._root = root
        self._limit = limit
        self._checkpoints_max = checkpoints_max
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._checkpoints: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()  # last full block, tokens after it
        self._lock = threading.Lock()

    def held_tokens(self, tokens: bytes) -> int:
        """Leading tokens, whole blocks or everything, that are known to be held."""
        keys = prefix_keys(self._root, tokens)
        with self._lock:
            for index in reversed(range(len(keys))):
                if keys[index] in self._keys:
                    for key in keys[: index + 1]:
                        self._keys[key] = None
                        self._keys.move_to_end(key)
                    self._shrink()
                    return min((index + 1) * BLOCK_TOKENS, count_tokens(tokens))
        return 0

    def hold(self, tokens: bytes, *, checkpoint: bool = False) -> None:
        """Remember that all of `tokens` is held, and whether the checkpoint at their end is."""
        with self._lock:
            for key in prefix_keys(self._root, tokens):
                self._keys[key] = None
                self._keys.move_to_end(key)
            if checkpoint:
                place = self._place(tokens)
                self._checkpoints[place] = None
                self._checkpoints.move_to_end(place)
            self._shrink()

    def holds_checkpoint(self, tokens: bytes) -> bool:
        """Whether the checkpoint after exactly `tokens` is known to be held."""
        place = self._place(tokens)
        with self._lock:
            if place not in self._checkpoints:
                return False
            self._checkpoints.move_to_end(place)
            return True

    def _place(self, tokens: bytes) -> tuple[bytes, bytes]:
        keys = chain_keys(self._root, tokens)
        return (keys[-1] if keys else self._root), tokens[len(keys) * _BLOCK_BYTES :]

    def forget(self, tokens: bytes, keep_tokens: int = 0) -> None:
        """Forget every block of `tokens` that reaches beyond its first `keep_tokens`, and every checkpoint there."""
        keys = prefix_keys(self._root, tokens)
        starts = {parent: index * _BLOCK_BYTES for index, parent in enumerate([self._root, *keys])}
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
