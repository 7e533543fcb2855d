"""The drive's own write cache, emptied once for a group of commits (durability `full`)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class DriveCache:
    """Knows which commits have left the drive's cache. Rows are visible before that, and not promised yet.

    One thread empties the cache while others wait; what it began after, it covers. Any thread may wait. `begin` and
    `end` enclose a commit, under the engine's lock.
    """

    def __init__(self, flush: Callable[[], None] | None) -> None:
        """`flush` empties the cache; None: nothing is ever waited for."""
        self._flush = flush
        self._changed = threading.Condition()
        self._begun = self._committed = self._flushed = 0
        self._is_flushing = False

    def begin(self) -> None:
        """A commit begins: its rows may be visible from now on."""
        with self._changed:
            self._begun += 1

    def end(self) -> None:
        """The commit ended, well or not."""
        with self._changed:
            self._committed = self._begun
            self._changed.notify_all()

    def confirm(self) -> bool:
        """As `wait`; False when the flush failed."""
        try:
            self.wait()
        except OSError as error:
            log.warning("the drive did not empty its cache: %s", error)
            return False
        return True

    def wait(self) -> None:
        """Return once every row that is visible now has left the drive's cache. Raises OSError of the flush."""
        if self._flush is None:
            return
        with self._changed:
            wanted = self._begun
            while self._flushed < wanted:
                if self._is_flushing or self._committed <= self._flushed:
                    self._changed.wait()
                    continue
                covered, self._is_flushing = self._committed, True
                self._changed.release()
                try:
                    self._flush()
                except BaseException:
                    covered = 0
                    raise
                finally:
                    self._changed.acquire()
                    self._is_flushing = False
                    self._flushed = max(self._flushed, covered)
                    self._changed.notify_all()
