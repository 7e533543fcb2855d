"""Measures an engine's prefill speed from outside. The daemon needs it to skip hits that would not save time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence

from kvstore.core.bounded import Bounded

# A shorter stretch says more of what a call costs than of the model.
TOKENS_MIN = 64
# What was measured before counts for so much less with each measurement.
DECAY = 0.7
MODELS_MAX = 64
STARTED_MAX = 64

Clock = Callable[[], float]


class PrefillSpeed:
    """Tokens a second by model: all that were computed over the time that it took, decayed. Any thread may call."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._sums: Bounded[Hashable, tuple[float, float]] = Bounded(MODELS_MAX)
        self._started: Bounded[tuple[Hashable, tuple[int, ...]], tuple[int, float]] = Bounded(STARTED_MAX)

    def add(self, model: Hashable, n_tokens: int, seconds: float) -> None:
        """Record that this many tokens of a prompt were computed in this time. Short prompts are ignored."""
        if n_tokens < TOKENS_MIN or seconds <= 0:
            return
        with self._lock:
            tokens, total_s = self._sums.get(model, (0.0, 0.0))
            self._sums[model] = (DECAY * tokens + n_tokens, DECAY * total_s + seconds)

    def get(self, model: Hashable) -> float:
        """Tokens a second; 0 when nothing is known."""
        with self._lock:
            tokens, seconds = self._sums.get(model, (0.0, 0.0))
        return tokens / seconds if seconds else 0.0

    def started(self, model: Hashable, prompt: Sequence[int], covered: int) -> None:
        """The engine begins to compute `prompt` after its first `covered` tokens."""
        with self._lock:
            self._started[model, tuple(prompt)] = (covered, self.clock())

    def reached(self, model: Hashable, tokens: Sequence[int]) -> None:
        """The engine has computed `tokens`: a prompt that was started, or that and the first token of the answer.

        Later is too late: what it took then is mostly the answer.
        """
        with self._lock:
            found = [self._started.pop((model, tuple(tokens[:end])), None) for end in (len(tokens), len(tokens) - 1)]
        for covered, at_s in filter(None, found):
            self.add(model, len(tokens) - covered, self.clock() - at_s)


class Progress:
    """A callback for the progress of one prompt that measures its speed and calls another. One thread."""

    def __init__(
        self, speed: PrefillSpeed, model: Callable[[], Hashable], forward: Callable[[int, int], None] | None
    ) -> None:
        self._speed = speed
        self._model = model
        self._forward = forward
        self._last: tuple[int, float] | None = None
        self._tokens, self._seconds = 0, 0.0

    def begin(self) -> None:
        """The prompt waits to be computed, from wherever it begins."""
        if self._last is None:
            self._last = (0, self._speed.clock())

    def __call__(self, done: int, total: int) -> None:
        """Record how many of its tokens are computed. The engine may report the same count more than once."""
        now_s = self._speed.clock()
        if self._last is not None and done > self._last[0]:
            self._tokens += done - self._last[0]
            self._seconds += now_s - self._last[1]
        self._last = (done, now_s)
        if done >= total - 1 and self._tokens:
            self._speed.add(self._model(), self._tokens, self._seconds)
            self._tokens, self._seconds = 0, 0.0
        if self._forward is not None:
            self._forward(done, total)
