"""Measures the time of a fetch in the client, since the daemon sees neither file reads nor decoding there."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from kvstore.blobs.ranges import RangeReader
from kvstore.client.results import Hit, Miss
from kvstore.core.breaker import Deadline
from kvstore.wire.v1 import kvstore_pb2 as pb


class Meter:
    """Bytes and seconds of one fetch. The fetching thread owns it; `read` may be called by any."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._decoded_bytes = 0
        self._decode_s = 0.0

    def read(self, nbytes: int) -> None:
        """Count bytes that were read."""
        with self._lock:
            self._read_bytes += nbytes

    def decoded(self, nbytes: int, seconds: float) -> None:
        """Count a layer that was evaluated."""
        self._decoded_bytes += nbytes
        self._decode_s += seconds

    def report(
        self, fetch_id: str, planned_tokens: int, answer: Hit | Miss, *, by_path: bool, again: bool = False
    ) -> pb.ReportRequest:
        """The fetch as a message: what it took, and what it gave where that is not what was planned.

        Of a stream the daemon has measured the reading itself. `again`: another call for the same request follows.
        """
        timing = pb.FetchTiming(fetch_id=fetch_id, decoded_bytes=self._decoded_bytes, decode_s=self._decode_s)
        if by_path:
            timing.read_bytes = self._read_bytes
            timing.read_s = max(0.0, time.monotonic() - self._started_s - self._decode_s)
        if answer.n_tokens != planned_tokens:
            timing.got_tokens, timing.reason, timing.again = answer.n_tokens, answer.reason.value, again
        return pb.ReportRequest(timing=timing)


class TimedReader:
    """Wraps a reader, counts its bytes and time, and raises DeadlineError between two ranges after the deadline."""

    def __init__(self, reader: RangeReader, meter: Meter, deadline: Deadline) -> None:
        self._reader = reader
        self._meter = meter
        self._deadline = deadline

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader.readinto`."""
        self._deadline.check()
        self._reader.readinto(source, offset, views)
        self._meter.read(sum(view.nbytes for view in views))
