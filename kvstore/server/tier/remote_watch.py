"""Whether the remote tier may be asked, found out in the background instead of in a request.

    unavailable   it does not answer, or was not asked yet
    unmarked      the place has no marker: it is not mounted, or `kvstore config remote-init` was not run
    serving       the marker was seen, and calls succeed

Requests ask only while it serves. After some failures in a row it does not, until `look` has seen it answer: that is
called once a second, and waits longer from one failure to the next.

It also finds out, once, whether the store refuses a second put of one name. That is for people: what is read is
verified in any case.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvstore.core.breaker import CircuitBreaker, Deadline
from kvstore.core.remote_words import CreateOnly, RemoteState
from kvstore.errors import DeadlineError, RemoteError, UnmarkedError
from kvstore.remote.link import RATED_BYTES_MIN
from kvstore.remote.object_store import ByteRange
from kvstore.remote.open_store import honours_create
from kvstore.remote.tier import RemoteTier

# How often create-only puts are tried. A try that fails may leave an object behind, so the number has a limit.
PROBES_MAX = 3
# The marker is looked for this often: a share that was unmounted leaves an empty folder, which answers.
LOOK_EVERY_S = 10.0
LOOK_S = 5.0
# Bytes of some object that are read while nothing was, so that the rate of the link is known before a request needs it.
SAMPLE_BYTES = 4 * RATED_BYTES_MIN
# While there is nothing to sample, it is looked for less and less often: each try is a LIST, which may cost money.
SAMPLE_EVERY_S_MAX = 600.0
# A call that was given less time than this says nothing about the store when it is late.
PATIENCE_S = 0.1
log = logging.getLogger(__name__)


class Watch:
    """See the module. Any thread may call; `look` one at a time."""

    def __init__(self, tier: RemoteTier, clock: Callable[[], float] = time.monotonic) -> None:
        self._tier = tier
        self._clock = clock
        self._lock = threading.Lock()
        self._state, self._detail = RemoteState.UNAVAILABLE, "it was not asked yet"
        self._looked_s = clock() - LOOK_EVERY_S
        self._sample_s, self._sample_wait_s = self._looked_s, LOOK_EVERY_S
        self._probes_left = PROBES_MAX
        self.create_only = CreateOnly.UNKNOWN
        self._trials = CircuitBreaker(failures_max=1, clock=clock)

    @property
    def state(self) -> tuple[RemoteState, str]:
        """(state, why it does not serve)."""
        with self._lock:
            return self._state, self._detail

    @property
    def serves(self) -> bool:
        """Whether it may be asked now."""
        return self.state[0] == RemoteState.SERVING

    def failed(self, error: RemoteError | DeadlineError, waited_s: float) -> None:
        """A call of a request failed after so long."""
        if isinstance(error, UnmarkedError):
            self._become(RemoteState.UNMARKED, str(error))
        elif isinstance(error, DeadlineError) and waited_s < PATIENCE_S:
            return
        self._tier.reads.failed()
        if self._tier.reads.has_opened and self.serves:
            self._become(RemoteState.UNAVAILABLE, str(error))

    def succeeded(self) -> None:
        """A call of a request was answered."""
        self._tier.reads.succeeded()

    def look(self) -> None:
        """See whether it serves, when that is due; raises nothing that a store can do.

        Blocks for LOOK_S at most, and for as long again while it is not known what create-only puts do.
        """
        now_s = self._clock()
        if self.serves and now_s - self._looked_s < LOOK_EVERY_S:
            return
        if not self._trials.allow():
            return
        self._looked_s = now_s
        try:
            deadline = Deadline(LOOK_S)
            self._tier.store.require_mark(deadline)
            if not self._tier.store.requests.read_bytes and now_s >= self._sample_s:
                self._sample_s = now_s + self._sample_wait_s
                self._sample_wait_s = min(2 * self._sample_wait_s, SAMPLE_EVERY_S_MAX)
                self._sample(deadline)
        except UnmarkedError as error:
            self._trials.failed()
            self._become(RemoteState.UNMARKED, str(error))
        except (RemoteError, DeadlineError) as error:
            self._trials.failed()
            self._become(RemoteState.UNAVAILABLE, str(error))
        else:
            self._trials.succeeded()
            self._tier.reads.succeeded()
            self._probe()
            self._become(RemoteState.SERVING, "")

    def _probe(self) -> None:
        """Find out what create-only puts do, unless that is known or was tried PROBES_MAX times."""
        if self.create_only != CreateOnly.UNKNOWN or not self._probes_left:
            return
        self._probes_left -= 1
        try:
            self.create_only = (
                CreateOnly.HONOURED if honours_create(self._tier.store, Deadline(LOOK_S)) else CreateOnly.IGNORED
            )
        except (RemoteError, DeadlineError) as error:
            log.info("whether the remote tier honours create-only puts is not known: %s", error)
        if self.create_only == CreateOnly.IGNORED:
            log.warning("the remote tier ignores create-only puts: daemons may write the same block more than once")

    def _sample(self, deadline: Deadline) -> None:
        listed = self._tier.store.names("", "", deadline)
        one = next((one for one in listed if one.head.nbytes >= RATED_BYTES_MIN), None)
        if one is not None:
            nbytes = min(one.head.nbytes, SAMPLE_BYTES)
            self._tier.store.read(one.name, one.head.etag, [ByteRange(0, nbytes)], deadline)

    def _become(self, state: RemoteState, detail: str) -> None:
        with self._lock:
            before, self._state, self._detail = self._state, state, detail
        if state != before:
            level = logging.INFO if state == RemoteState.SERVING else logging.WARNING
            log.log(level, "the remote tier is %s%s", state, detail and f": {detail}")
