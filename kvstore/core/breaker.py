"""Time limits: deadlines on the monotonic clock, the watchdog over a stream, the circuit breaker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

from kvstore.errors import DeadlineError

T = TypeVar("T")

FAILURES_MAX = 3
OPEN_S = 1.0
OPEN_S_MAX = 30.0
TRIAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a fetch may keep its caller waiting: for a connection, for the next message, in all."""

    connect_ms: int = 50
    stall_ms: int = 500
    total_ms: float = 5000


class Deadline:
    """A moment on the monotonic clock. Immutable; any thread."""

    __slots__ = ("_at", "_total_s")

    def __init__(self, total_s: float) -> None:
        self._total_s = total_s
        self._at = time.monotonic() + total_s

    @property
    def left_s(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._at - time.monotonic())

    def check(self) -> None:
        """Raise DeadlineError when the moment has passed."""
        if time.monotonic() >= self._at:
            raise DeadlineError(f"not done within {self._total_s * 1e3:.0f} ms")


class Watchdog:
    """Cancels a call when one wait for its next message lasts longer than `stall_s`.

    Only waiting counts: what the caller does between two messages takes none of the time. gRPC has no such limit of its
    own, and its keepalive does not notice a stopped daemon. One thread at a time calls `next`; a thread of its
    own, which ends with the `with` block, does the cancelling.
    """

    def __init__(self, cancel: Callable[[], object], stall_s: float) -> None:
        self._cancel = cancel
        self._stall_s = stall_s
        self._due: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kvstore-watchdog", daemon=True)
        self.fired = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def next(self, messages: Iterator[T]) -> T | None:
        """The next message, None at the end. The wait is watched."""
        self._due = time.monotonic() + self._stall_s
        try:
            return next(messages, None)
        finally:
            self._due = None

    def _watch(self) -> None:
        # Never sleeps longer than stall_s, so a wait that starts meanwhile is noticed in time without a wake-up.
        wait_s = self._stall_s
        while not self._closed.wait(wait_s):
            due = self._due
            wait_s = self._stall_s if due is None else due - time.monotonic()
            # The time may have passed for this thread alone: then that wait has ended since `due` was read.
            if wait_s <= 0 and self._due is due:
                self.fired = True
                self._cancel()
                return


class CircuitBreaker:
    """Refuses calls to a peer (a daemon, a remote store) that failed `failures_max` of them in a row: 1, 2, 4 .. 30 s.

    When the time is over one call is let through as a trial, and another each second until one of them has ended. A
    success closes the circuit, the failure of a trial doubles the time. Whether a daemon is there at all is not asked
    here: see `kvstore/client/health.py`. Any thread may call.
    """

    def __init__(
        self,
        failures_max: int = FAILURES_MAX,
        open_s: float = OPEN_S,
        open_s_max: float = OPEN_S_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failures_max = failures_max
        self._open_s_first = open_s
        self._open_s_max = open_s_max
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._open_s = open_s
        self._open_until = 0.0
        self._trial = False

    @property
    def is_open(self) -> bool:
        """Whether `allow` would refuse now."""
        with self._lock:
            return self._failures >= self._failures_max and self._clock() < self._open_until

    @property
    def has_opened(self) -> bool:
        """Whether `failures_max` calls in a row have failed since the last success."""
        with self._lock:
            return self._failures >= self._failures_max

    def allow(self) -> bool:
        """Whether a call may be made. True after a time of refusal takes the trial."""
        with self._lock:
            if self._failures < self._failures_max:
                return True
            if self._clock() < self._open_until:
                return False
            self._trial = True
            self._open_until = self._clock() + min(self._open_s, TRIAL_S)
            return True

    def succeeded(self) -> None:
        """The peer answered: close the circuit."""
        with self._lock:
            self._failures = 0
            self._trial = False
            self._open_s = self._open_s_first

    def undecided(self) -> None:
        """A call has ended in a way that says nothing about the peer: where it was a trial, the next one is, too."""
        with self._lock:
            if self._trial:
                self._trial = False
                self._open_until = self._clock()

    def failed(self) -> None:
        """The peer did not answer a call, or not in time.

        Calls that were under way when the circuit opened fail late and together; only a trial's failure doubles.
        """
        with self._lock:
            self._failures += 1
            if self._trial:
                self._trial = False
                self._open_s = min(2 * self._open_s, self._open_s_max)
            elif self._failures != self._failures_max:
                return
            self._open_until = self._clock() + self._open_s
