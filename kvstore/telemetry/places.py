"""Notices prompts that part at the same place again and again: something in them changes with every request.

A place is the beginning that prompts have in common. It is reported once, when three different prompts have parted
there and what comes after the difference is alike again. Without the second condition every system prompt would be
reported, since that is where conversations part.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.core.blocks import TOKEN_BYTES
from kvstore.core.bounded import Bounded

PLACES_MAX = 256
# Prompts that are told apart at one place.
SIDES_MAX = 256
# Shorter common prefixes are only the chat template; longer ones lose little.
COMMON_TOKENS_MIN = 20
COMMON_TOKENS_MAX = 2000
PROMPTS_MIN = 3
# Hashes differ in their first digit or in their second: prompts that part a few tokens apart part at one place.
GRAIN_TOKENS = 8
# How far after the difference both sides are compared, and how many tokens in a row make them alike.
AHEAD_TOKENS = 192
ALIKE_TOKENS = 12
LOOKS_MAX = 8
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SharedPlace:
    """A place that was reported: the namespace, its alias, how many tokens are shared, by how many prompts so far."""

    root: bytes
    alias: str
    common_tokens: int
    prompts: int


@dataclass(slots=True)
class _Seen:
    alias: str
    common_tokens: int
    sides: set[int] = field(default_factory=set)
    looks: int = 0
    reported: bool = False


class Places:
    """See the module. Any thread may call. Holds hashes, and no tokens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: Bounded[tuple[bytes, int], _Seen] = Bounded(PLACES_MAX)

    def note(
        self,
        root: bytes,
        alias: str,
        common: bytes,
        sides: tuple[bytes, bytes],
        ahead: Callable[[], tuple[bytes, bytes]],
    ) -> None:
        """A prompt shares the packed tokens `common` with a stored chain; `sides` are the next few of both.

        `ahead` gives more of both, and is called when there is something to decide.
        """
        common_tokens = len(common) // TOKEN_BYTES
        if not COMMON_TOKENS_MIN <= common_tokens <= COMMON_TOKENS_MAX:
            return
        head = common[: common_tokens // GRAIN_TOKENS * GRAIN_TOKENS * TOKEN_BYTES]
        key = (root, xxhash.xxh3_64_intdigest(head))
        with self._lock:
            seen = self._seen[key] = self._seen.get(key) or _Seen(alias, common_tokens)
            new = {xxhash.xxh3_64_intdigest(side) for side in sides} - seen.sides
            if len(seen.sides) < SIDES_MAX:
                seen.sides |= new
            due = bool(new) and not seen.reported and len(seen.sides) >= PROMPTS_MIN and seen.looks < LOOKS_MAX
            seen.looks += due
        if due and alike(*ahead()):
            with self._lock:
                due, seen.reported = not seen.reported, True
            if due:
                words = "%d prompts of %s share their first %d tokens, then something differs: kvstore why --last %d"
                log.warning(words, len(seen.sides), alias, common_tokens, PROMPTS_MIN)

    def reported(self) -> list[SharedPlace]:
        """The places that were reported, the latest last."""
        with self._lock:
            found = [(root, seen) for (root, _), seen in self._seen.items() if seen.reported]
        return [SharedPlace(root, seen.alias, seen.common_tokens, len(seen.sides)) for root, seen in found]

    def forget(self, roots: frozenset[bytes]) -> None:
        """Drop what is known of these namespaces."""
        with self._lock:
            for key in [key for key in self._seen if key[0] in roots]:
                del self._seen[key]


def alike(one: bytes, other: bytes) -> bool:
    """Whether some ALIKE_TOKENS in a row of packed tokens stand in both, at any place."""
    first, second = _windows(one), _windows(other)
    return bool(len(first) and len(second) and np.isin(first, second).any())


def _windows(packed: bytes) -> npt.NDArray[np.uint64]:
    """A hash of each run of ALIKE_TOKENS tokens: their sum, each times a power of an odd number."""
    tokens = np.frombuffer(packed, "<i8").astype(np.uint64)
    count = len(tokens) - ALIKE_TOKENS + 1
    total = np.zeros(max(0, count), np.uint64)
    if count > 0:
        for step in range(ALIKE_TOKENS):
            total = total * np.uint64(0x9E3779B97F4A7C15) + tokens[step : step + count]
    return total
