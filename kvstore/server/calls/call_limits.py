"""The RPC edge: limits on calls, and errors as statuses. Limits are checked before a call's message is read.

    version callers that speak another protocol are refused (`kvstore.wire.handshake`)
    clients at most `connections_max` clients that called recently
    count   at most `calls_max` running calls, and the same number again of calls that continue an upload
    bytes   at most a quarter of `memory_bytes` in the messages of all calls
    pace    a call is cancelled if the caller sends no message, or reads no reply, for `stream_stall_s`: one clock a
            call, whether its handler yields replies or writes them (`PacedContext`)

Admin verbs and health checks are exempt, so that a busy daemon can always be inspected. A call above a limit is refused
with RESOURCE_EXHAUSTED and a RetryInfo, counted and logged.

When a call is cancelled for its pace, its lease, files, memory and upload are released at once. If its handler had
begun, its status is DEADLINE_EXCEEDED. A caller that reads nothing does not read that either: gRPC keeps the dead
stream until the caller disconnects or its deadline passes, and `connection_calls_max` limits the number of these.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from kvstore.config import Config
from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import DeadlineError, InvalidRequestError, KVStoreError, LimitError
from kvstore.server.calls import callers
from kvstore.server.calls.callers import Callers, Peer, calling
from kvstore.server.calls.refusals import Refusals
from kvstore.server.calls.rpc_errors import Context, abort, abort_unexpected, refusing
from kvstore.wire.handshake import PROTOCOL_KEY, refusal
from kvstore.wire.v1 import kvstore_pb2 as pb

RETRY_S = 0.2
MEMORY_SHARE = 4
# Separate limits for Admin verbs and health checks. Their messages are too small to be counted in bytes.
ADMIN_CALLS_MAX = 64
ADMIN_MESSAGE_BYTES_MAX = 64 << 10
_BEGINS, _CARRIES_ON, _ADMIN = range(3)
_OURS = f"/{pb.DESCRIPTOR.package}."
_ADMIN_PREFIXES = ("/grpc.health.v1.Health/Check", f"/{pb.DESCRIPTOR.services_by_name['Admin'].full_name}/")
# Calls that continue an upload. Refusing them would only keep the upload's place occupied for longer.
_CARRYING_ON = ("/Upload", "/CommitStore", "/AbortStore")


class Admission(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """Counts calls and the bytes of their messages, and cancels calls that stall. Call it on the event loop only."""

    def __init__(self, config: Config, refusals: Refusals) -> None:
        self._calls_max = (config.limits.calls_max, config.limits.calls_max, ADMIN_CALLS_MAX)
        self._connection_calls_max = config.limits.connection_calls_max
        self._connections_max = config.limits.connections_max
        self.refusals = refusals
        self.callers = Callers(config.limits.connections_max)
        self.stall_s = float(config.limits.stream_stall_s)
        # Of messages that are held now.
        self.messages = ByteBudget(max(config.memory_bytes // MEMORY_SHARE, config.limits.message_bytes_max))
        self.calls = [0, 0, 0]  # that begin something, that carry on with an upload, of admins

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """gRPC asks here for the handler of each call. Health and reflection are the same in every protocol."""
        handler = await continuation(details)
        if handler is None:
            return None
        said: dict[str, str | bytes] = {}
        for key, value in details.invocation_metadata or ():
            said.setdefault(key, value)
        if details.method.startswith(_OURS) and (error := refusal(said.get(PROTOCOL_KEY))) is not None:
            return refusing(error)
        caller = Peer.of(said)
        calling.set(caller)
        kind = kind_of(details.method)
        if self.calls[kind] >= self._calls_max[kind]:
            words = f"{self._calls_max[kind]} calls are under way; try again later"
            return self.refusing(LimitError(words, RETRY_S, "calls_max"))
        if kind == _ADMIN:
            return _Call(self, kind, "").admitted(handler)
        calls = self.callers.enter(caller.name, anyway=kind == _CARRIES_ON)
        if not calls:
            words = f"{self._connections_max} clients are at work; try again later"
            return self.refusing(LimitError(words, callers.RETRY_S, "connections_max"))
        if calls == self._connection_calls_max and caller.name:
            words = f"one client has {calls} calls under way; gRPC holds back what it calls beyond them"
            self.refusals.reached("connection_calls_max", words)
        return _Call(self, kind, caller.name).admitted(handler)

    def refusing(self, error: LimitError) -> Any:
        """A handler that ends a call for a limit; counted."""
        self.refusals.add(error)
        return refusing(error)


@dataclass(slots=True, eq=False)
class _Call:
    """One admitted call: its share of the limits until its handler ends, its pace, and the edge at which errors end.

    gRPC runs a call in one task. Its pace cancels that task unless it is stopped within `stall_s` of each start.
    """

    _admission: Admission
    _kind: int
    _caller: str
    _task: asyncio.Task[Any] | None = None
    _timer: asyncio.TimerHandle | None = None
    _is_late: bool = False
    _held: int = 0
    _refusal: KVStoreError | None = None

    def admitted(self, handler: Any) -> Any:
        """The handler, counted and paced, of whatever kind it is. Its message may take its time from now on."""
        self._task = asyncio.current_task()
        assert self._task is not None
        self._admission.calls[self._kind] += 1
        self._task.add_done_callback(self._end)
        self._start_pace()
        parse = functools.partial(self._receive, handler.request_deserializer or bytes)
        changed: dict[str, Any] = {"request_deserializer": parse}
        for name in ("unary_unary", "unary_stream", "stream_unary"):
            if (behaviour := getattr(handler, name)) is not None:
                changed[name] = functools.partial(self._answer, behaviour, streamed=handler.request_streaming)
        return handler._replace(**changed)

    async def _answer(
        self, behaviour: Callable[[Any, Context], Any], request: Any, context: Context, *, streamed: bool
    ) -> Any:
        """The RPC edge: every error becomes a status, none a traceback on the wire."""
        try:
            if self._refusal is not None:
                raise self._refusal
            paced = PacedContext(context, self._start_pace, self._stop_pace)
            answering = behaviour(self._paced(request) if streamed else request, paced)
            reply = await (_write(answering, paced) if inspect.isasyncgen(answering) else answering)
            self._start_pace()
            return reply
        except asyncio.CancelledError:
            if self._is_late and self._task is not None and not self._task.uncancel():
                await abort(context, DeadlineError(f"nothing was sent or read for {self._admission.stall_s:g} s"))
            raise
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:
            # The caller is gone, so that gRPC could not write; it may not have noticed yet that the call was cancelled,
            # as every fetch by path is when its files are open. A status would be one more thing that it cannot send,
            # and each such failure is a traceback in the log.
            raise asyncio.CancelledError from None
        except KVStoreError as error:
            if isinstance(error, LimitError):
                self._admission.refusals.add(error)
            await abort(context, error)
        except Exception as error:
            await abort_unexpected(context, getattr(behaviour, "__name__", "a call"), error)
            raise

    async def _paced(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """What a caller streams, each message at its pace."""
        async for request in requests:
            if self._refusal is not None:
                raise self._refusal
            yield request
            self._let_go()
            self._start_pace()
        self._stop_pace()

    def _receive(self, parse: Callable[[bytes], Any], raw: bytes) -> Any:
        """A message has come: parsed, or None with a refusal that `_answer` finds."""
        self._stop_pace()
        self._let_go()
        free = self._kind == _ADMIN and len(raw) <= ADMIN_MESSAGE_BYTES_MAX
        if not free and not self._admission.messages.try_acquire(len(raw)):
            words = "the messages of other calls take all the memory for them"
            self._refusal = LimitError(words, RETRY_S, "memory_bytes")
            return None
        self._held = 0 if free else len(raw)
        try:
            return parse(raw)
        except DecodeError:
            self._refusal = InvalidRequestError("these bytes are not the message that the method takes")
            return None

    def _start_pace(self) -> None:
        """The caller has the word."""
        self._stop_pace()
        self._timer = asyncio.get_running_loop().call_later(self._admission.stall_s, self._cancel)

    def _stop_pace(self) -> None:
        """The caller did its part."""
        if self._timer is not None:
            self._timer.cancel()

    def _cancel(self) -> None:
        self._is_late = True
        if self._task is not None:
            self._task.cancel()

    def _let_go(self) -> None:
        self._admission.messages.release(self._held)
        self._held = 0

    def _end(self, _: object) -> None:
        self._stop_pace()
        self._let_go()
        self._admission.calls[self._kind] -= 1
        if self._kind != _ADMIN:
            self._admission.callers.leave(self._caller)


@dataclass(frozen=True, slots=True, eq=False)
class PacedContext:
    """gRPC's context, as a handler gets it. A call whose caller stops reading replies is cancelled."""

    context: Context
    start_pace: Callable[[], None]
    stop_pace: Callable[[], None]

    async def write(self, reply: Any) -> None:
        """Write one reply. The call is cancelled when the caller does not take it in time."""
        self.start_pace()
        try:
            await self.context.write(reply)
        finally:
            self.stop_pace()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)


async def _write(replies: AsyncGenerator[Any, Any], context: PacedContext) -> None:
    """Write what a handler yields."""
    async with contextlib.aclosing(replies):
        async for reply in replies:
            await context.write(reply)


def kind_of(method: str) -> int:
    """Which of the places a method takes."""
    if method.startswith(_ADMIN_PREFIXES):
        return _ADMIN
    return _CARRIES_ON if method.endswith(_CARRYING_ON) else _BEGINS
