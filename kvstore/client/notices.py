"""Warnings about the daemon in the worker's log: one when a problem starts, and one line when it is over."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)


class DaemonNotice:
    """Logs a warning when the daemon becomes unusable, and INFO when it can be used again. One per client; any thread.

    Meanwhile requests run without the store, and each logs its own line.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._why = ""

    def lost(self, why: str, kind: str = "") -> None:
        """The daemon does not answer or refuses calls; `why` says why. `kind` groups reasons that are logged once."""
        with self._lock:
            known, self._why = self._why, kind or why
        if known != self._why:
            log.warning("the store is not used: %s", why)

    def back(self) -> None:
        """The daemon has answered."""
        if self._why:
            with self._lock:
                known, self._why = self._why, ""
            if known:
                log.info("the store is used again")


class WritesNotice:
    """Logs when the daemon stops accepting stores, and when it accepts them again. One per client; any thread.

    A daemon below its free-disk floor, or with a disk that refuses writes, serves hits and stores nothing. The daemon
    logs that too, but the operators of a model server read the worker's log.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused = False

    def refused(self, why: str) -> None:
        """The daemon takes no stores at present."""
        if self._changes(to=True):
            log.warning("nothing is stored until the daemon has room; hits go on: %s", why)

    def taken(self) -> None:
        """The daemon has taken a store."""
        if self._changes(to=False):
            log.info("the daemon stores again")

    def _changes(self, *, to: bool) -> bool:
        with self._lock:
            before, self._refused = self._refused, to
            return before != to
