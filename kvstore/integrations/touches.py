"""First touches: what a worker's memory tier keeps for the store, so that the daemon need not write it at once.

Most of what is computed is never asked for again. While stores are staged the daemon leaves such sequences to the
worker's memory (`kvstore.server.policy.admission`), and takes them when a second prompt uses them, or when the worker
ends.
"""

from __future__ import annotations

import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from kvstore.client.store import Touch
from kvstore.core.breaker import Deadline
from kvstore.core.process import is_forked

# Younger sequences are offered when the worker ends, or leaves the model. On a public trace, nearly all that was asked
# for again was asked for within this time.
YOUNG_S = 8 * 60.0
# Prompts that are remembered: more than a server computes at once.
PROMPTS_MAX = 256
_NUMBERS = (1 << 24) - 1
Place = tuple[Any, Any]


class Endings:
    """What memory tiers do before their store is closed, as long as they live themselves. Any thread."""

    def __init__(self) -> None:
        self._works: list[weakref.WeakMethod[Callable[[Deadline], object]]] = []

    def add(self, work: Callable[[Deadline], object]) -> None:
        """Have this method called at the end; it raises nothing."""
        self._works.append(weakref.WeakMethod(work))

    def run(self, timeout_s: float) -> float:
        """Call them all, once; the time that is left. Not in a process that was forked from that of the tiers."""
        deadline, works, self._works = Deadline(timeout_s), self._works, []
        for known in works:
            if (work := known()) is not None and not is_forked():
                work(deadline)
        return deadline.left_s


@dataclass(frozen=True, slots=True)
class Offered:
    """A sequence that was offered for the first time; `place` and `tokens` name it in the memory tier."""

    place: Place
    tokens: list[int]
    touch: Touch
    at_s: float


class FirstTouches:
    """Whose prompt a sequence was computed for, and what may have been left to memory. Any thread, but for `begin`."""

    def __init__(
        self,
        offer: Callable[[Place, list[int]], object],
        flush: Callable[[float], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`offer`: stores what is still in memory, for good; `flush`: waits at most so long for what was offered."""
        self._offer = offer
        self._flush = flush
        self._clock = clock
        self._lock = threading.Lock()
        self._model: Hashable = None
        self._prompts: deque[tuple[Hashable, list[int], Touch]] = deque(maxlen=PROMPTS_MAX)
        self._offered: deque[Offered] = deque()

    def begin(self, model: Hashable, tokens: list[int], in_memory: int) -> Touch:
        """A prompt was looked up; memory had `in_memory` of its leading tokens. Code that changes the model calls this.

        With another model than before, the young sequences of that one are offered.
        """
        touch = Touch(1 + secrets.randbelow(_NUMBERS), in_memory)
        with self._lock:
            self._prompts.append((model, tokens, touch))
            left, self._model = model != self._model, model
        for one in self._take_young(but=model) if left else ():
            self._offer(one.place, one.tokens)
        return touch

    def of(self, model: Hashable, tokens: list[int]) -> Touch:
        """The prompt that a sequence was computed for: the latest that it begins with, or that begins with it."""
        with self._lock:
            for key, prompt, touch in reversed(self._prompts):
                shared = min(len(prompt), len(tokens))
                if key == model and prompt[:shared] == tokens[:shared]:
                    return touch
        return Touch(1 + secrets.randbelow(_NUMBERS))

    def offered(self, place: Place, tokens: list[int], touch: Touch) -> None:
        """A sequence that is in memory was offered with a touch."""
        now_s = self._clock()
        with self._lock:
            self._offered.append(Offered(place, tokens, touch, now_s))
            while self._offered[0].at_s < now_s - YOUNG_S:
                self._offered.popleft()

    def is_deferred(self, place: Place, tokens: list[int]) -> bool:
        """Whether a young sequence may have been left to memory alone."""
        with self._lock:
            return any(one.touch.deferred for one in self._offered if one.place == place and one.tokens == tokens)

    def end(self, deadline: Deadline) -> None:
        """The worker ends: what is young is offered, the newest first, as far as the time goes."""
        self._flush(deadline.left_s)  # until it has answered, nobody knows what the daemon deferred
        for one in self._take_young():
            if deadline.left_s <= 0:
                return
            self._offer(one.place, one.tokens)
            self._flush(deadline.left_s)

    def _take_young(self, but: Hashable = None) -> list[Offered]:
        """What was offered within `YOUNG_S`, the newest first, but for one model; it is not told again."""
        now_s = self._clock()
        with self._lock:
            young = [one for one in self._offered if one.at_s >= now_s - YOUNG_S]
            taken = [one for one in reversed(young) if one.touch.deferred and (but is None or one.place[0] != but)]
            self._offered = deque(one for one in young if but is not None and one.place[0] == but)
        return taken
