"""What people should hear of the daemon in the worker's log: once when it begins, and once when it is over."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)


class DaemonNotice:
    """Whether the daemon can be used: a warning when it cannot, INFO when it can again. One for a client; any thread.

    Requests go on without the store meanwhile, each with a line of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._why = ""

    def lost(self, why: str, kind: str = "") -> None:
        """It does not answer, or refuses what is asked, for this reason. `kind`: what else is the same reason."""
        with self._lock:
            known, self._why = self._why, kind or why
        if known != self._why:
            log.warning("the store is not used: %s", why)

    def back(self) -> None:
        """It has answered."""
        if self._why:
            with self._lock:
                known, self._why = self._why, ""
            if known:
                log.info("the store is used again")


class WritesNotice:
    """Whether the daemon takes stores, as its replies to them tell. One for all sessions of a client; any thread.

    A daemon under its free-disk floor, or whose disk refuses writes, serves hits and stores nothing. It says so in its
    own log, which the people who watch a model server do not read.
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
