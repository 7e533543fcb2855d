"""The daemon's work once a second: enforce limits, end stalled uploads, notice a missing directory."""

from __future__ import annotations

import logging

from kvstore.config import Config
from kvstore.engine import Engine
from kvstore.server.calls.callers import Sockets
from kvstore.server.counters import Telemetry, moment_of
from kvstore.server.storing.store import StorePath
from kvstore.server.storing.uploads import Upload
from kvstore.telemetry.history import Moment
from kvstore.telemetry.traffic import Snapshot

# A directory that is gone in this many steps in a row is started again; a volume may be away for a moment.
DISPLACED_MAX = 3
log = logging.getLogger(__name__)


class Upkeep:
    """Blocks on disk and on the engine's lock: for the `care` thread."""

    def __init__(
        self,
        engine: Engine,
        store: StorePath,
        sockets: Sockets,
        config: Config,
        telemetry: Telemetry,
    ) -> None:
        self._engine = engine
        self._uploads = store.uploads
        self._write_budget = store.admission.budget
        self._sockets = sockets
        self._config = config
        self._requests = telemetry.requests
        self._counters = telemetry.counters
        self._why = telemetry.why
        self._lifetime = telemetry.lifetime
        self._displaced = 0

    @property
    def is_displaced(self) -> bool:
        """Whether the data directory was deleted or replaced underneath, for good."""
        return self._displaced >= DISPLACED_MAX

    def step(self) -> list[Upload]:
        """Do it all once. Returns uploads that were given up, and are still to be released."""
        self._sockets.look()
        self._engine.maintain()
        self._requests.settle()
        self._why.forget()
        self._displaced = self._displaced + 1 if self._engine.is_displaced() else 0
        if not self._displaced:
            self._lifetime.keep(self._moment)
            self._write_budget.keep()
        idle = self._uploads.reap(self._config.limits.upload_idle_s, self._config.limits.upload_bytes_per_s_min)
        for upload in idle:
            words = "gave up upload %s of %d tokens: nothing arrived, or too little"
            log.warning(words, upload.upload_id[:8], upload.n_tokens)
        return idle

    def end(self) -> None:
        """Write what is counted for the last time, unless the directory is another one by now."""
        self._requests.settle(all=True)
        if not self._engine.is_displaced():
            self._lifetime.keep(self._moment, now=True)
            self._write_budget.keep(now=True)

    def _moment(self, traffic: Snapshot) -> Moment:
        return moment_of(self._engine, traffic, self._counters)
