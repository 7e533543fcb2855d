"""Counts and logs requests that were refused because of a limit."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from kvstore.errors import LimitError

log = logging.getLogger(__name__)

# One line for each limit in this time; the next one says how many refusals it stands for.
LOG_EVERY_S = 10.0


class Refusals:
    """Counts since start, by the key of the configuration that sets the limit. Any thread may call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._logged: dict[str, tuple[int, float]] = {}  # by limit: number of refusals, and time of the last log line

    def add(self, error: LimitError) -> None:
        """Count a refusal. Errors that name no limit are of the request itself, and are not counted."""
        if error.limit:
            self.reached(error.limit, str(error))

    def reached(self, limit: str, message: str) -> None:
        """Count that a limit was reached; log it unless that was done just now."""
        with self._lock:
            self._counts[limit] += 1
            count, (logged, at_s) = self._counts[limit], self._logged.get(limit, (0, -LOG_EVERY_S))
            if self._clock() < at_s + LOG_EVERY_S:
                return
            self._logged[limit] = count, self._clock()
        more = f" (and {count - logged - 1} times since this was last said)" if count - logged > 1 else ""
        log.warning("limit %s: %s%s", limit, message, more)

    def counts(self) -> dict[str, int]:
        """The counts now."""
        with self._lock:
            return dict(self._counts)
