"""Background half of STORE in the worker: ask what the daemon wants, send those bytes, wait for the outcome."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import grpc

from kvstore.client.connection import Connection
from kvstore.client.results import ID_BYTES, StoreResult
from kvstore.client.trust import walk
from kvstore.core.blocks import LayerState, Reason
from kvstore.core.breaker import Watchdog
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.keys import Chain, Namespace
from kvstore.core.layers import cut_pieces
from kvstore.core.unix_sockets import block_for, peer_uid
from kvstore.errors import DeadlineError, KVStoreError, UnavailableError, UntrustedError
from kvstore.wire.convert import namespace_to_message, states_to_bytes
from kvstore.wire.frames import CHUNK_BYTES, prompt_frame, upload_frame
from kvstore.wire.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.client.store import Rest, Touch
    from kvstore.codecs.device import Capture
    from kvstore.codecs.states import StateCapture

# Only the background thread waits for these calls, so the limits only have to end a call that hangs.
CONNECT_S = 5.0
BEGIN_S = 10.0
ACCEPTED_S = 10.0
DONE_S = 60.0
ABORT_S = 1.0
REPORT_S = 5.0
# An upload may wait for other uploads that send the blocks before its own.
UPLOAD_S_MIN = 60.0
UPLOAD_BYTES_PER_S_MIN = 10_000_000

# IOV_MAX on Linux and macOS.
VECTORS_MAX = 1024
# Bytes of one sendmsg call: large enough that the cost of the call itself is negligible.
SEND_BYTES = 64 << 20

# The upload socket cannot be reached, for example from a container that mounts only the daemon's gRPC socket.
_NO_SOCKET = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.ENOTDIR)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Captured:
    """What a job copied: tokens, and window and state layers. It has `nbytes` of `budget` until it is released."""

    budget: ByteBudget
    nbytes: int
    tokens: Capture | None
    states: StateCapture | None


@dataclass
class StoreJob:
    """One piece of a store: the leading tokens of a sequence, of which those from `start` on are captured.

    `checkpoint` describes the window and state layers after the last token, if the job offers them.
    Created on the caller's thread, then owned by the background thread. `finish` is called exactly once. `release`
    drops what was captured and its share of the budget once it is sent or will not be sent.
    `interim`: the prompt is still being computed, and its next checkpoint replaces this one.
    `touch`: the daemon may defer it. `continued_tokens`: leading ones that earlier jobs of the same prompt had.
    `again` is the whole sequence. It is needed if the store turns out not to hold the tokens before `start`.
    `new_from`: what the daemon wants begins here, since it holds the tokens before; 0 until it has said so.
    """

    chain: Chain
    start: int
    restored_tokens: int
    restored_fidelity: int
    captured: Captured | None
    checkpoint: tuple[LayerState, ...]
    touch: Touch | None
    interim: bool = False
    continued_tokens: int = 0
    again: Rest | None = None
    new_from: int = 0
    request_id: str = field(default_factory=functools.partial(secrets.token_hex, ID_BYTES))
    begun_s: float = field(default_factory=time.monotonic)
    result: StoreResult = field(default_factory=StoreResult)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def end(self) -> int:
        """How many leading tokens it is about."""
        return self.chain.n_tokens

    def release(self) -> None:
        """Drop the captured arrays. Safe to call twice."""
        again, self.again = self.again, None
        if again is not None:
            again.let_go()
        captured, self.captured = self.captured, None
        if captured is not None:
            captured.budget.release(captured.nbytes)

    def finish(self, result: StoreResult) -> None:
        """Set the result and wake the threads that wait for it."""
        self.release()
        self.result = result
        self.done.set()


class Uploader:
    """Carries out store jobs and reports of one session. The background thread calls; `cancel` is for any thread."""

    def __init__(self, connection: Connection, namespace: Namespace, profile: str, *, same_host: bool) -> None:
        self._connection = connection
        self._layout = namespace.layout
        self._message = namespace_to_message(namespace)
        self._profile = profile
        self._same_host = same_host and bool(connection.address.path)
        self._upload_path = connection.address.upload_path if self._same_host else ""
        self._no_socket_of: object = None  # the daemon whose upload socket cannot be reached
        self._call: Any = None
        self._cancelled = False
        self._complained = False

    def cancel(self) -> None:
        """Make the call in progress and all later calls fail. Any thread."""
        self._cancelled = True
        call = self._call
        if call is not None:
            call.cancel()

    def report(self, key: bytes, detail: str) -> None:
        """Report to the daemon that a block failed verification."""
        self._connection.ensure(CONNECT_S)
        self._unary("Report", pb.ReportRequest(key=key, detail=detail), REPORT_S)

    def store(self, job: StoreJob) -> StoreResult:
        """Send what the daemon wants of a job. Raises KVStoreError or grpc.RpcError; the upload is then aborted.

        With NOT_CAPTURED the result says how many leading tokens the daemon holds.
        """
        self._connection.ensure(CONNECT_S)
        begun = self._begin(job)
        if begun.upload_id and job.again is not None:
            job.again.let_go()
        job.new_from = begun.start
        try:
            whole = self._hand_over(job, begun)
        except OSError as error:
            if error.errno not in _NO_SOCKET:
                raise UnavailableError(f"nothing can be sent to the daemon: {error.strerror}") from error
            self._no_socket_of = self._connection.daemon
            begun = self._begin(job)
            whole = self._hand_over(job, begun)
        if not begun.upload_id:
            reason = Reason.of(begun.reason, Reason.INTERNAL)
            if reason is not Reason.STORE_FULL:
                self._complain("nothing is stored", begun.detail)
            elif begun.detail:  # without detail, only this store has no room
                self._connection.writes.lost(begun.detail, "refused")
            durable = begun.durable and reason is Reason.ALREADY_STORED
            return StoreResult(begun.held_tokens, 0, reason, durable, begun.detail)
        if whole:  # otherwise the daemon may ask for it again
            job.release()
        self._connection.writes.back()
        self._complain("stored", begun.detail)
        result = self._commit(begun.upload_id)
        is_deferred = begun.reason == Reason.DEFERRED and result.reason is Reason.OK
        return replace(result, reason=Reason.DEFERRED) if is_deferred else result

    @property
    def _by_socket(self) -> bool:
        return self._same_host and (self._no_socket_of is None or self._no_socket_of != self._connection.daemon)

    def _complain(self, what: str, detail: str) -> None:
        """Log once what the daemon says about the session's profile."""
        if detail and not self._complained:
            self._complained = True
            log.warning("%s: %s", what, detail)

    def _begin(self, job: StoreJob) -> pb.BeginStoreReply:
        request = pb.BeginStoreRequest(
            namespace=self._message,
            layout=self._layout.record,
            captured_from=job.start,
            restored_tokens=job.restored_tokens,
            restored_fidelity=job.restored_fidelity,
            profile=self._profile,
            transport=pb.TRANSPORT_PATH if self._by_socket else pb.TRANSPORT_STREAM,
            states=states_to_bytes(job.checkpoint) if job.checkpoint else b"",
            request_id=job.request_id,
            interim=job.interim,
            prompt=job.touch.prompt if job.touch else 0,
            touched_tokens=job.touch.tokens if job.touch else 0,
            continued_tokens=job.continued_tokens,
        )
        reply: pb.BeginStoreReply = self._unary("BeginStore", prompt_frame(request, job.chain.tokens), BEGIN_S)
        state_bytes = sum(state.nbytes for state in job.checkpoint) if reply.wants_states else 0
        sound = (
            job.start <= reply.start <= reply.end <= job.end
            and (reply.end == job.end or reply.reason == Reason.DEFERRED)
            and reply.upload_bytes == (reply.end - reply.start) * self._layout.token_bytes + state_bytes
            and bool(job.checkpoint or not reply.wants_states)
            and (self._by_socket or not reply.by_socket)
        )
        if reply.upload_id and not sound:
            self._abort(reply.upload_id)
            raise KVStoreError("the daemon asked for bytes that were not offered")
        return reply

    def _hand_over(self, job: StoreJob, begun: pb.BeginStoreReply) -> bool:
        """Send the wanted bytes; abort the upload on an error. False if the daemon stopped receiving before the end."""
        if not begun.upload_id or not begun.upload_bytes:
            return True
        try:
            if begun.by_socket:
                connection = UploadConnection(self._upload_path, begun.upload_id, UPLOAD_S_MIN)
                with contextlib.closing(connection), self._cancellable(connection):
                    return connection.send(self._views(job, begun))
            timeout_s = UPLOAD_S_MIN + begun.upload_bytes / UPLOAD_BYTES_PER_S_MIN
            reply: pb.UploadReply = self._unary("Upload", _chunks(begun.upload_id, self._views(job, begun)), timeout_s)
            whole: bool = reply.received_bytes == begun.upload_bytes
            return whole
        except BaseException:
            self._abort(begun.upload_id)
            raise

    def _views(self, job: StoreJob, begun: pb.BeginStoreReply) -> Iterator[memoryview]:
        """The wanted bytes in the order in which they are sent: pieces, then states."""
        pieces = cut_pieces(begun.start, begun.end, job.restored_tokens)
        capture, captured_states = (job.captured.tokens, job.captured.states) if job.captured else (None, None)
        if pieces and capture is None:
            raise KVStoreError("the daemon asked for tokens that were not captured")
        tokens = (view for piece in pieces if capture for view in capture.piece_views(self._layout, piece))
        states = captured_states.views() if begun.wants_states and captured_states is not None else ()
        for view in itertools.chain(tokens, states):
            if self._cancelled:
                raise DeadlineError("the session was closed")
            yield view

    def _commit(self, upload_id: str) -> StoreResult:
        request = pb.CommitStoreRequest(upload_id=upload_id)
        call = self._connection.kvstore.CommitStore(request, timeout=ACCEPTED_S + DONE_S)
        with self._cancellable(call):
            try:
                with Watchdog(call.cancel, ACCEPTED_S) as watchdog:
                    reply = watchdog.next(call)
                if reply is not None and not reply.done:
                    reply = next(call, None)
            finally:
                call.cancel()
        if reply is None or not reply.done:
            raise KVStoreError("the daemon ended a store without a result")
        reason = Reason.of(reply.reason, Reason.INTERNAL)
        return StoreResult(reply.stored_tokens, reply.new_bytes, reason, reply.durable)

    def _unary(self, method: str, request: Any, timeout_s: float) -> Any:
        call = getattr(self._connection.kvstore, method).future(request, timeout=timeout_s)
        with self._cancellable(call):
            try:
                return call.result()
            except grpc.FutureCancelledError as error:
                raise DeadlineError(f"{method} was cancelled") from error

    @contextlib.contextmanager
    def _cancellable(self, call: Any) -> Iterator[None]:
        """While this block runs, `cancel` ends the call."""
        self._call = call
        # After the assignment: `cancel` sets the flag first, so either it or this line sees the other.
        if self._cancelled:
            call.cancel()
        try:
            yield
        finally:
            self._call = None

    def _abort(self, upload_id: str) -> bool:
        """Ends the upload, best effort: the daemon ends idle ones itself. False if it has already ended this one."""
        request = pb.AbortStoreRequest(upload_id=upload_id)
        try:
            self._connection.kvstore.AbortStore(request, timeout=ABORT_S)
        except grpc.RpcError as error:
            return bool(error.code() is not grpc.StatusCode.NOT_FOUND)
        except ValueError:  # the channel is closed
            pass
        return True


def _chunks(upload_id: str, views: Iterator[memoryview]) -> Iterator[bytes]:
    """Upload messages of at most CHUNK_BYTES; the first names the upload."""
    parts: list[memoryview] = []
    nbytes = 0
    for view in views:
        for at in range(0, view.nbytes, CHUNK_BYTES):
            part = view[at : at + CHUNK_BYTES]
            if nbytes + part.nbytes > CHUNK_BYTES:
                yield upload_frame(upload_id, parts)
                upload_id, parts, nbytes = "", [], 0
            parts.append(part)
            nbytes += part.nbytes
    if parts:
        yield upload_frame(upload_id, parts)


class UploadConnection:
    """One upload's connection to the daemon's upload socket on the same host. One thread sends; any may cancel.

    Its path is derived from the daemon's gRPC socket, so a reply cannot redirect the bytes, and it is checked like that
    socket (`trust`).
    """

    def __init__(self, path: str, upload_id: str, stall_s: float) -> None:
        """Connect and name the upload. Raises OSError if there is no socket, UntrustedError if another user owns it.

        Raises UnavailableError if the daemon does not answer. `stall_s`: longest wait of a send.
        """
        if walk(path) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self._is_taken = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(CONNECT_S)
            self._socket.connect(path)
            if (uid := peer_uid(self._socket)) not in (os.geteuid(), 0):
                raise UntrustedError(f"the process that listens at {path} is of user id {uid}; nothing is sent to it")
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._socket.sendall(upload_id.encode())
                self._is_taken = bool(self._socket.recv(1))
            block_for(self._socket, stall_s)
        except BaseException as error:
            self._socket.close()
            if isinstance(error, TimeoutError):
                raise UnavailableError(f"the daemon does not answer at {path}") from error
            raise

    def send(self, views: Iterator[memoryview]) -> bool:
        """Send all views without copying. Returns whether the daemon received them; if not, CommitStore says why.

        Raises DeadlineError if the daemon reads nothing for `stall_s`.
        """
        batch, nbytes = list[memoryview](), 0
        if not self._is_taken:
            return False
        try:
            for view in views:
                batch.append(view)
                nbytes += view.nbytes
                if len(batch) == VECTORS_MAX or nbytes >= SEND_BYTES:
                    self._send_all(batch)
                    batch, nbytes = [], 0
            self._send_all(batch)
            self._socket.shutdown(socket.SHUT_WR)
            return bool(self._socket.recv(1))
        except BlockingIOError as error:
            raise DeadlineError("the daemon stopped reading the upload") from error
        except (BrokenPipeError, ConnectionResetError):
            return False

    def _send_all(self, views: list[memoryview]) -> None:
        pending = [view for view in views if view.nbytes]
        while pending:
            count = self._socket.sendmsg(pending)
            while pending and count >= pending[0].nbytes:
                count -= pending.pop(0).nbytes
            if count:
                pending[0] = pending[0][count:]

    def cancel(self) -> None:
        """Break off whatever the sending thread does. Any thread."""
        with contextlib.suppress(OSError):  # not connected
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the descriptor. Sending thread only."""
        self._socket.close()
