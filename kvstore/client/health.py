"""Health of the daemon: checked in the background with a timeout of seconds. A fetch only reads the last result."""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from kvstore.errors import CircuitOpenError, KVStoreError, TLSError, UnansweredError, UntrustedError
from kvstore.wire.handshake import health_request

log = logging.getLogger(__name__)


class Notice:
    """Logs a warning when something cannot be used any more, and INFO when it can again. One per client; any thread."""

    def __init__(self, lost: str, back: str) -> None:
        """The words of both; `lost` has a place for the cause."""
        self._words = lost, back
        self._lock = threading.Lock()
        self._why = ""

    def lost(self, why: str, kind: str = "") -> None:
        """It cannot be used; `why` says why. `kind` groups reasons that are logged once."""
        with self._lock:
            known, self._why = self._why, kind or why
        if known != self._why:
            log.warning(self._words[0], why)

    def back(self) -> None:
        """It can be used."""
        if self._why:
            with self._lock:
                known, self._why = self._why, ""
            if known:
                log.info(self._words[1])


ASK_S = 5.0
# How long after the last call that wanted it a daemon that is away is asked again; then only the next call asks.
WANTED_S = 60.0
# After this many failed looks a miss says that the daemon is not asked any more.
VAIN_MAX = 3
# A patient question that ends sooner than this did not wait: the next call asks, or there would be no end of asking.
PATIENT_S_MIN = 0.2
# How long a question may be open before stores are refused, which have to copy KV first.
OPEN_S_MAX = 1.0

# NOT_FOUND: a daemon of another protocol, which does not have the health service that is asked for.
NOT_THERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.NOT_FOUND,
)


class Health:
    """Health state of one daemon. Any thread may call; replies arrive on a gRPC thread.

    A check is sent when a session is made, after every failure, and repeatedly while calls need the daemon. `check` is
    the gRPC method. Checks alternate: one fails at once, with the cause, if there is no connection; the next waits
    until gRPC has connected. No check needs a thread. If a reply takes longer than a fetch may wait, that fetch is a
    miss but not a failure, and the next fetch uses the reply.
    """

    def __init__(
        self, check: Any, failed: Callable[[Any], KVStoreError], came_back: Callable[[], object] = lambda: None
    ) -> None:
        """`failed(error)` translates the error of a check. `came_back()` is called when the daemon answers again."""
        self.check = check
        self._failed = failed
        self._came_back = came_back
        self._changed = threading.Condition()
        self._up = False
        self._down: KVStoreError | None = None  # why the last check failed; None while that is not known
        self._asked_s: float | None = None  # since when a question is open
        self._wanted_s = 0.0
        self._vain = 0  # failed calls, and calls that found the daemon unreachable
        self._closed = False
        # Meanwhile requests run without the store, and each logs its own line.
        self.notice = Notice("the store is not used: %s", "the store is used again")

    @property
    def is_up(self) -> bool:
        """Whether the daemon has answered, and nothing failed since."""
        return self._up

    def absence(self) -> KVStoreError | None:
        """Why stores should not count on the daemon: a check has failed, or is open for long. Keeps asking."""
        if self.is_up:
            return None
        self.ask()
        with self._changed:
            if self._up or not self._is_late():
                return None
            return self._down or UnansweredError("the daemon does not answer")

    def _is_late(self) -> bool:
        late = self._asked_s is not None and time.monotonic() - self._asked_s > OPEN_S_MAX
        return late or self._down is not None

    def look(self, timeout_s: float) -> None:
        """Return if the daemon is known to answer. UnansweredError or UntrustedError if not, within `timeout_s`.

        That time counts from when the question was asked, so that many who look wait for it once.
        """
        if self.is_up:
            return
        self.ask()
        with self._changed:
            self._changed.wait_for(self._is_decided, self._wait_s(timeout_s))
            if self._up:
                return
            self._vain += 1
            down = self._down or UnansweredError("the daemon has not answered yet")
            if self._vain > VAIN_MAX and type(down) is UnansweredError:
                down = CircuitOpenError(f"asked in the background only: {down}")
            raise type(down)(str(down))  # not the one that others raise, too

    def _is_decided(self) -> bool:
        return self._up or self._down is not None

    def _wait_s(self, timeout_s: float) -> float:
        return 0.0 if self._asked_s is None else max(0.0, self._asked_s + timeout_s - time.monotonic())

    def answered(self) -> None:
        """The daemon has answered a call."""
        self.notice.back()
        if self._up:
            return
        with self._changed:
            back = self._is_late()
            self._up, self._down, self._vain = True, None, 0
            self._changed.notify_all()
        if back:
            self._came_back()

    def lost(self) -> None:
        """A call has failed, or has not been answered in time: ask."""
        with self._changed:
            self._up = False
            self._vain += 1
        self.ask()

    def failed(self, error: KVStoreError) -> None:
        """A check has failed. That is said in the log, once until it changes."""
        if not isinstance(error, UntrustedError):  # the guard has said that
            self.notice.lost(str(error), "" if isinstance(error, TLSError) else "unanswered")
        with self._changed:
            self._up, self._down = False, error
            self._changed.notify_all()

    def ask(self) -> None:
        """Have a question open, unless the answer is known. Does not wait."""
        now_s = time.monotonic()
        with self._changed:
            self._wanted_s = now_s
            if self._up or self._asked_s is not None or self._closed:
                return
            self._asked_s, self._down = now_s, None
        self._begin(patient=False)

    def _begin(self, *, patient: bool) -> None:
        check = self.check
        with suppress(ValueError):  # the channel is closed
            # Not a bound method: a pending answer must not keep an unused client alive.
            ended = functools.partial(_ended, weakref.ref(self), check, patient, time.monotonic())
            check.future(health_request(), timeout=ASK_S, wait_for_ready=patient).add_done_callback(ended)

    def replace_check(self, check: Any) -> None:
        """Ask by the check of another channel; what becomes of a question over the old one counts no more."""
        with self._changed:
            self.check, self._up, self._vain = check, False, 0
            self._asked_s = self._wanted_s = time.monotonic()
        self._begin(patient=False)

    def end(self, check: Any, call: Any, begun_s: float, *, patient: bool) -> None:
        """A question has ended, with an answer or without."""
        if check is not self.check:
            return
        error = call.exception()
        there = not isinstance(error, KVStoreError) and call.code() not in NOT_THERE
        hasty = patient and time.monotonic() - begun_s < PATIENT_S_MIN
        with self._changed:
            again = not (there or hasty or self._up or self._closed) and time.monotonic() - self._wanted_s < WANTED_S
            if not again:
                self._asked_s = None
        if there:
            self.answered()
        elif not patient:
            self.failed(self._failed(error))
        if again:
            self._begin(patient=not patient)

    def close(self) -> None:
        """Ask nothing more."""
        with self._changed:
            self._closed = True


def _ended(of: weakref.ref[Health], check: Any, patient: bool, begun_s: float, call: Any) -> None:
    if (health := of()) is not None:
        health.end(check, call, begun_s, patient=patient)
