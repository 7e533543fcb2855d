"""Uploads under way: what was asked of a worker, its bytes, who depends on whom, and what happens to those that die.

A worker on this host sends the bytes over a socket (`upload_socket`), any other worker as chunks of a gRPC stream
(`stream_in`). The thread that encodes and writes the upload pulls them into its own buffers (`Intake`). So a worker
that is faster than the disk is slowed down, and a slow worker blocks only the thread of its own upload.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.core.blocks import LayerState, Reason
from kvstore.core.bounded import Bounded
from kvstore.core.keys import Chain, NamespaceInfo
from kvstore.core.layers import Layout, Piece
from kvstore.engine import NamespaceKey, Slice
from kvstore.errors import DeadlineError, InvalidRequestError, KVStoreError, LimitError, NotFoundError
from kvstore.server.counters import Telemetry
from kvstore.server.policy.gate import ProfileChoice

log = logging.getLogger(__name__)

RETRY_S = 1.0
# The reason of this many failed uploads is kept until their workers ask for it.
FAILED_MAX = 256


class Shares:
    """Bytes under way, in all and by caller. Any thread may call.

    A single item may take the whole limit. Several items of one caller stay within its share, so that its uncommitted
    bytes displace only that much of what others have.
    """

    def __init__(self, limit_bytes: Callable[[], int], callers: int) -> None:
        """`limit_bytes` of all is asked each time: it follows the budget. One caller's share is 1/`callers` of it."""
        self._limit_bytes = limit_bytes
        self._callers = callers
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def try_acquire(self, caller: str, nbytes: int) -> int | None:
        """Count bytes: None; or the limit in bytes that leaves no room for them, of all or of this caller."""
        limit = self._limit_bytes()
        with self._lock:
            held = self._held[caller]
            if held and held + nbytes > limit // self._callers:
                return limit // self._callers
            if self._held.total() + nbytes > limit:
                return limit
            self._held[caller] = held + nbytes
            return None

    def release(self, caller: str, nbytes: int) -> None:
        """Give back `nbytes` that the caller held."""
        with self._lock:
            self._held[caller] -= nbytes
            self._held = +self._held


class UploadSource(Protocol):
    """Where the bytes of an upload come from. One thread reads; any may close."""

    def readinto(self, view: memoryview) -> int | None:
        """Read into `view`. Returns the number of bytes; 0 at the end, None if nothing came for a while."""

    def confirm(self) -> None:
        """Tell the worker that all bytes were received."""

    def close(self) -> None:
        """Accept no more bytes, tell the worker, and wake the reading thread. Safe to call twice."""


class Intake:
    """The `nbytes` bytes of one upload. The upload's thread reads; any thread may call the other methods.

    It is open until the worker commits it, or until it is given up. Once committed, only the daemon's stop or a broken
    connection gives it up. Counts the received bytes and the time spent waiting for the worker. The rest of an
    upload's time is the daemon's.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.received_bytes = 0
        self._changed = threading.Condition()
        self._source: UploadSource | None = None
        self.error: KVStoreError | None = None  # of `give_up`
        self.is_committed = False
        self._is_over = False
        self._waited_s = 0.0
        self._waiting_since_s = self._moved_s = time.monotonic()

    # -- the worker's side ------------------------------------------------------------------------------------------

    def open(self, source: UploadSource) -> None:
        """Set the source of the bytes. Raises InvalidRequestError for a second source or if no bytes are wanted."""
        with self._changed:
            if self.error is not None:
                raise self.error
            if self._source is not None or self.is_committed or not self.nbytes:
                raise InvalidRequestError("this upload takes no bytes")
            self._source = source
            self._stop_waiting()

    def commit(self) -> None:
        """The worker has sent everything and asks to store it.

        Raises InvalidRequestError if no source was opened, NotFoundError for a second commit, the error of `give_up`.
        """
        with self._changed:
            if self.error is not None:
                raise self.error
            if self.is_committed:
                raise NotFoundError("the upload is being committed already")
            if self.nbytes and self._source is None:
                raise InvalidRequestError(f"the upload has 0 bytes, {self.nbytes} were asked for")
            self.is_committed = True
            self._changed.notify_all()

    def give_up(self, error: KVStoreError | None = None, *, even_committed: bool = False) -> bool:
        """End the upload with an error, which its thread raises; whether that was done.

        It is not once the upload is committed, unless `even_committed`, nor once it has ended.
        """
        with self._changed:
            if self._is_over or self.error is not None or (self.is_committed and not even_committed):
                return False
            self.error = error or NotFoundError("the upload was given up")
            self._changed.notify_all()
        self.cut_off()
        return True

    def cut_off(self) -> None:
        """Close the source, whether or not all bytes have come."""
        if self._source is not None:
            self._source.close()

    @property
    def idle_s(self) -> float:
        """Seconds without a byte while waiting for the worker; 0 while the daemon itself is at work."""
        since = self._waiting_since_s
        return time.monotonic() - max(since, self._moved_s) if since else 0.0

    @property
    def waited_s(self) -> float:
        """Total seconds spent waiting for the worker."""
        since = self._waiting_since_s
        return self._waited_s + (time.monotonic() - since if since else 0.0)

    # -- the upload's thread ----------------------------------------------------------------------------------------

    def fill(self, view: memoryview, idle_s: float) -> None:
        """Fill `view` with the next bytes.

        Raises InvalidRequestError if the upload ends early, DeadlineError if nothing comes for `idle_s`, and the error
        of `give_up`.
        """
        with self._waiting():
            while view:
                got = self._read(view)
                if got:
                    self._moved_s = time.monotonic()
                    self.received_bytes += got
                    view = view[got:]
                elif got is not None:
                    raise InvalidRequestError(
                        f"the upload has {self.received_bytes} bytes, {self.nbytes} were asked for"
                    )
                elif self.idle_s >= idle_s:
                    raise DeadlineError(f"no bytes of the upload for {idle_s:g} s; the worker may store again")

    def finish(self, idle_s: float) -> None:
        """Expect the end of the upload and confirm it to the worker. Raises InvalidRequestError if more bytes come."""
        if self._source is None:
            return
        with self._waiting():
            while (got := self._read(memoryview(bytearray(1)))) is None:
                if self.idle_s >= idle_s:
                    raise DeadlineError(f"the upload was not ended for {idle_s:g} s")
        if got:
            raise InvalidRequestError(f"the upload is longer than the {self.nbytes} bytes that were asked for")
        self._source.confirm()

    def await_commit(self) -> None:
        """Wait for the worker's commit. Raises the error of `give_up` if the upload ends without one."""
        self.cut_off()  # all bytes are here, or there is no room for the rest
        with self._waiting(), self._changed:
            self._changed.wait_for(lambda: self.is_committed or self.error is not None)
            if self.error is not None:
                raise self.error
            self._is_over = True

    def close(self) -> None:
        """Mark the upload as over, committed or not."""
        self._is_over = True
        self.cut_off()

    def _read(self, view: memoryview) -> int | None:
        if self.error is not None:
            raise self.error
        if self._source is None:
            return 0
        try:
            got = self._source.readinto(view)
        except OSError as error:
            got = 0
            broken = InvalidRequestError(f"the worker's connection broke: {error.strerror}")
            self.give_up(broken, even_committed=True)
        if self.error is not None:  # given up during the read: 0 bytes are then not the end of the upload
            raise self.error
        return got

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waiting_since_s = time.monotonic()
        try:
            yield
        finally:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        since, self._waiting_since_s = self._waiting_since_s, 0.0
        if since:
            self._waited_s += time.monotonic() - since


@dataclass
class Upload:
    """One store between BeginStore and its end. The thread that carries it out owns it; the table only lists it."""

    namespace: NamespaceInfo
    chain: Chain
    choice: ProfileChoice
    floor: int  # what is held below this fidelity does not count: the session named its profile
    restored_fidelity: int
    first_block: int  # index of the first block to be written
    spliced: tuple[Slice, ...]  # at most one: a stored block whose leading tokens the first block starts with
    pieces: tuple[Piece, ...]  # what the worker hands over, in order
    states: tuple[LayerState, ...] = ()  # of the checkpoint after the last token, handed over after the pieces
    depends_on: tuple[str, ...] = ()
    interim: bool = False  # the checkpoint is one within a prompt that is still being computed
    telemetry: Telemetry = field(kw_only=True)  # of its caller
    isolated: bool = False  # of a tenant with a salt of its own
    awaits_checkpoint: bool = False  # one that this upload depends on sends the checkpoint after the last token
    # The key with which it is written and committed; None: not encrypted.
    encryption: NamespaceKey | None = None
    evictions: int = 0  # of the engine when it began: a later one of what it brings takes it along
    refusal: Reason = Reason.OK  # why the rest of its blocks is not written
    upload_id: str = field(default_factory=functools.partial(secrets.token_hex, 16))
    release: Callable[[], None] = lambda: None  # gives back lease and accounted bytes
    layout: Layout = field(init=False)  # the namespace's
    n_tokens: int = field(init=False)  # of the whole sequence
    keys: tuple[bytes, ...] = field(init=False)  # of all blocks of the sequence, the tail's last
    new_keys: tuple[bytes, ...] = field(init=False)  # of what this upload will write
    start: int = field(init=False)  # first token that the worker hands over
    upload_bytes: int = field(init=False)  # exactly as many as the worker hands over
    intake: Intake = field(init=False)

    def __post_init__(self) -> None:
        self.layout, self.n_tokens = self.namespace.layout, self.chain.n_tokens
        self.keys = tuple(self.chain.block_keys())
        checkpoint = (self.chain.checkpoint_key(),) if self.states else ()
        self.new_keys = (*self.keys[self.first_block :], *checkpoint)
        self.start = self.pieces[0].start if self.pieces else self.n_tokens
        tokens_bytes = sum(piece.n_tokens for piece in self.pieces) * self.layout.token_bytes
        self.upload_bytes = tokens_bytes + sum(state.nbytes for state in self.states)
        self.intake = Intake(self.upload_bytes)

    @property
    def fidelity(self) -> int:
        """Upper bound on the fidelity of what this upload stores."""
        return min(self.choice.profile.fidelity, self.restored_fidelity)

    @property
    def wants_bytes(self) -> bool:
        """Whether the worker has anything to hand over; a piece of 0 bytes counts."""
        return bool(self.pieces or self.states)

    def alive(self, idle_s: float, bytes_per_s_min: int) -> bool:
        """Whether its worker sent anything within `idle_s`, and fast enough in all; when it commits, it always is."""
        in_time = self.intake.waited_s <= idle_s + self.upload_bytes / bytes_per_s_min
        return self.intake.is_committed or (in_time and self.intake.idle_s <= idle_s)


class Uploads:
    """The table of uploads, at most `uploads_max`. Thread-safe; its lock is never held over I/O.

    All but what ends an upload may be called on the event loop. The files of one that ends are unlinked by its thread.
    """

    def __init__(self, uploads_max: int) -> None:
        self._uploads_max = uploads_max
        self._lock = threading.Lock()
        self._by_id: dict[str, Upload] = {}
        self._by_key: dict[bytes, str] = {}
        self._failed: Bounded[str, KVStoreError] = Bounded(FAILED_MAX)

    def add(self, upload: Upload) -> None:
        """List the upload; LimitError when too many are under way."""
        with self._lock:
            if len(self._by_id) >= self._uploads_max:
                raise LimitError(f"{self._uploads_max} uploads are under way; try again later", RETRY_S, "uploads_max")
            self._by_id[upload.upload_id] = upload
            for key in upload.new_keys:
                self._by_key.setdefault(key, upload.upload_id)

    def get(self, upload_id: str) -> Upload:
        """The upload; NotFoundError when it ended, was given up, or never was. One that failed raises why, once."""
        with self._lock:
            upload, failed = self._by_id.get(upload_id), self._failed.pop(upload_id, None)
        if failed is not None:
            raise failed
        if upload is None:
            raise NotFoundError("no such upload: it ended, was given up, or belongs to an earlier daemon")
        return upload

    def receiving(self, keys: tuple[bytes, ...], first: int, fidelity_min: int) -> tuple[int, tuple[str, ...]]:
        """What other uploads already send, from block `first` on: (first block that none of them sends, upload ids)."""
        ids: dict[str, None] = {}
        while first < len(keys) and (upload_id := self.sender_of(keys[first], fidelity_min)) is not None:
            ids[upload_id] = None
            first += 1
        return first, tuple(ids)

    def sender_of(self, key: bytes, fidelity_min: int) -> str | None:
        """Id of the upload that sends the block of this key with at least `fidelity_min`; None if there is none."""
        with self._lock:
            upload_id = self._by_key.get(key)
            return upload_id if upload_id and self._by_id[upload_id].fidelity >= fidelity_min else None

    def under_way(self) -> list[Upload]:
        """All uploads that are listed now."""
        with self._lock:
            return list(self._by_id.values())

    def any_listed(self, upload_ids: Sequence[str]) -> bool:
        """Whether any of those uploads is still under way."""
        with self._lock:
            return any(upload_id in self._by_id for upload_id in upload_ids)

    def give_up(self, upload: Upload, error: KVStoreError | None = None) -> bool:
        """End the upload, and free all that it held, unless it is committed: then it is the commit's.

        Its thread is told, and drops what it wrote. Whether it was under way.
        """
        if given_up := upload.intake.give_up(error):
            self.end(upload)
        return given_up

    def _unlist(self, upload: Upload) -> bool:
        """Off the table; whether it was on it. Hold the lock."""
        for key in upload.new_keys:
            if self._by_key.get(key) == upload.upload_id:
                del self._by_key[key]
        return self._by_id.pop(upload.upload_id, None) is not None

    def end(self, upload: Upload, error: KVStoreError | None = None) -> None:
        """Take the upload off the table and free all that it held. Safe to call twice.

        `error`: why its thread could not carry it out, kept if its worker has yet to ask.
        """
        with self._lock:
            listed = self._unlist(upload)
            if listed and error is not None and not upload.intake.is_committed:
                self._keep_error(upload, error)
        if listed:
            upload.release()

    def reap(self, idle_s: float, bytes_per_s_min: int = 1) -> list[Upload]:
        """Give up uploads whose worker was silent for `idle_s`, or not fast enough. The caller releases them."""
        late = [one for one in self.under_way() if not one.alive(idle_s, bytes_per_s_min)]
        error = DeadlineError(f"nothing arrived for {idle_s:g} s, or too little; the worker may store again")
        idle = [one for one in late if one.intake.give_up(error)]
        with self._lock:
            for upload in idle:
                self._unlist(upload)
                self._keep_error(upload, error)
        return idle

    def _keep_error(self, upload: Upload, error: KVStoreError) -> None:
        """For its worker, which has yet to ask. Hold the lock."""
        self._failed[upload.upload_id] = copy.copy(error)  # without its frames, which hold the upload's memory

    def end_all(self) -> None:
        """Give up everything, at shutdown. A commit that is still running ends its upload itself."""
        for upload in self.under_way():
            self.give_up(upload)
