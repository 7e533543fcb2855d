"""What people should hear of the daemon in the worker's log: once when it begins, and once when it is over."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)


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
