"""What the link to the remote store gives, measured. Pure but for a clock.

    seconds = round trips x latency + bytes / rate

Both are learned from what requests took, in logarithms, as moving averages: a batch without bytes says what a round
trip takes, a read what the rate is. What was found to be slow fades towards the guess (half of it, in logarithms, in
`HALF_LIFE_S`), so that a link from which nothing is fetched is tried again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

# Until something is measured: a gigabit in the same house.
LATENCY_S = 2e-3
BYTES_PER_S = 100e6
STEP = 0.3
HALF_LIFE_S = 300.0
# A read of less says more about the latency than about the rate.
RATED_BYTES_MIN = 256 << 10
# Of a read: headers, then payload.
READ_ROUNDS = 2


class Speed(NamedTuple):
    """What is believed of a link now."""

    latency_s: float
    bytes_per_s: float


class _Average:
    """A moving average of logarithms, relative to a guess; only what is worse than the guess fades."""

    def __init__(self, guess: float, worse: int) -> None:
        """`worse`: 1 where larger values are worse, -1 where smaller ones are."""
        self._guess, self._worse = guess, worse
        self._log = 0.0
        self._at_s = 0.0
        self._count = 0

    def value(self, now_s: float) -> float:
        faded = self._log
        if faded * self._worse > 0:
            faded *= 0.5 ** (max(0.0, now_s - self._at_s) / HALF_LIFE_S)
        return self._guess * math.exp(faded)

    def learn(self, value: float, now_s: float) -> None:
        before = math.log(self.value(now_s) / self._guess)
        step = max(STEP, 1 / (self._count + 1))
        self._log = before + step * (math.log(value / self._guess) - before)
        self._at_s, self._count = now_s, self._count + 1


class Link:
    """See the module. Any thread may call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._latency, self._rate = _Average(LATENCY_S, 1), _Average(BYTES_PER_S, -1)

    @property
    def speed(self) -> Speed:
        """What is believed now."""
        with self._lock:
            now_s = self._clock()
            return Speed(self._latency.value(now_s), self._rate.value(now_s))

    def measured(self, nbytes: int, seconds: float, *, given_up: bool = False) -> None:
        """One round trip took this long for all of its bytes. `given_up`: it had not come to its end by then."""
        if not (math.isfinite(seconds) and seconds > 0):
            return
        with self._lock:
            now_s = self._clock()
            latency_s, rate = self._latency.value(now_s), self._rate.value(now_s)
            if nbytes < RATED_BYTES_MIN:
                if not given_up or seconds > latency_s:
                    self._latency.learn(seconds, now_s)
                return
            # What is left for the bytes; a latency that was believed too long does not make them come at once.
            found = nbytes / max(seconds - latency_s, seconds / 8)
            if not given_up or found < rate:
                self._rate.learn(found, now_s)

    def seconds(self, nbytes: int, rounds: int = READ_ROUNDS) -> float:
        """How long it would take to read `nbytes` in this many round trips."""
        latency_s, bytes_per_s = self.speed
        return rounds * latency_s + nbytes / bytes_per_s
