"""Limits on calls: how many run at once, and how long a caller may stall. Checked before a call's message is read.

    version callers that speak another protocol are refused (`kvstore.wire.handshake`)
    clients at most `connections_max` clients that called recently
    count   at most `calls_max` running calls, and the same number again of calls that continue an upload
    bytes   at most a quarter of `memory_bytes` in the messages of all calls
    pace    a call is cancelled if the caller sends no message, or reads no reply, for `stream_stall_s`

Admin verbs and health checks are exempt, so that a busy daemon can always be inspected. A call above a limit is refused
with RESOURCE_EXHAUSTED and a RetryInfo, counted and logged.

When a call is cancelled for its pace, its lease, files, memory and upload are released at once. An upload gets the
status DEADLINE_EXCEEDED. Other stalled callers get no status, because they would not read it: gRPC keeps the dead
stream until the caller disconnects or its deadline passes, and `connection_calls_max` limits the number of these.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from kvstore.config import Config
from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import DeadlineError, InvalidRequestError, KVStoreError, LimitError
from kvstore.server.calls import callers
from kvstore.server.calls.callers import Callers, Peer, calling
from kvstore.server.calls.refusals import Refusals
from kvstore.server.calls.rpc_errors import Context, abort
from kvstore.wire.convert import channel_options
from kvstore.wire.handshake import PROTOCOL_KEY, refusal
from kvstore.wire.v1 import kvstore_pb2 as pb

# A connection that does not get through its handshakes, or that nobody uses, must not keep its place.
HANDSHAKE_MS = 10_000
IDLE_MS = 300_000
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
        self._refusals = refusals
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
            self._refusals.reached("connection_calls_max", words)
        return _Call(self, kind, caller.name).admitted(handler)

    def refusing(self, error: LimitError) -> Any:
        """A handler that ends a call for a limit; counted."""
        self._refusals.add(error)
        return refusing(error)

    async def refuse(self, context: Context, error: KVStoreError) -> None:
        """End a call whose message was refused; counted where that is for a limit. Does not return."""
        if isinstance(error, LimitError):
            self._refusals.add(error)
        await abort(context, error)


class Pace:
    """Cancels the handler that made it, unless stopped within `stall_s` of each start."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._fired = False

    def start(self) -> None:
        """The caller has the word."""
        self.stop()
        if self._task is not None:
            self._timer = asyncio.get_running_loop().call_later(self._stall_s, self._fire, self._task)

    def stop(self) -> None:
        """The caller did its part."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self, task: asyncio.Task[Any]) -> None:
        self._fired = True
        task.cancel()

    def caught(self) -> DeadlineError | None:
        """For the handler, when it is cancelled: what to end the call with. None: it was somebody else's doing."""
        if not self._fired or self._task is None or self._task.uncancel():
            return None
        return DeadlineError(f"nothing came for {self._stall_s:g} s")


class _Call:
    """The share of the limits that one admitted call holds until its handler ends. gRPC runs a call in one task."""

    def __init__(self, admission: Admission, kind: int, caller: str) -> None:
        self._admission = admission
        self._kind = kind
        self._caller = caller
        self._pace = Pace(admission.stall_s)
        self._held = 0
        self._refusal: KVStoreError | None = None

    def admitted(self, handler: Any) -> Any:
        """The handler, counted and paced, of whatever kind it is. Its message may take its time from now on."""
        task = asyncio.current_task()
        assert task is not None
        self._admission.calls[self._kind] += 1
        task.add_done_callback(lambda _: self._end())
        self._pace.start()
        parse = handler.request_deserializer or bytes
        changed: dict[str, Any] = {"request_deserializer": lambda raw: self._receive(raw, parse)}
        if handler.unary_unary:
            changed["unary_unary"] = self._answering(handler.unary_unary)
        elif handler.unary_stream:
            streams = inspect.isasyncgenfunction(handler.unary_stream)
            wrap = self._streaming if streams else self._answering
            changed["unary_stream"] = wrap(handler.unary_stream)
        elif handler.stream_unary:
            changed["stream_unary"] = self._receiving(handler.stream_unary)
        return handler._replace(**changed)

    def _receive(self, raw: bytes, parse: Callable[[bytes], Any]) -> Any:
        """A message has come: parsed, or None with a refusal that the handler's wrapper finds."""
        self._pace.stop()
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

    def _let_go(self) -> None:
        self._admission.messages.release(self._held)
        self._held = 0

    def _end(self) -> None:
        self._pace.stop()
        self._let_go()
        self._admission.calls[self._kind] -= 1
        if self._kind != _ADMIN:
            self._admission.callers.leave(self._caller)

    def _answering(self, behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def answer(request: Any, context: Context) -> Any:
            if self._refusal:
                await self._admission.refuse(context, self._refusal)
            reply = await behaviour(request, context)
            self._pace.start()
            return reply

        return answer

    def _streaming(self, behaviour: Callable[[Any, Context], AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            if self._refusal:
                await self._admission.refuse(context, self._refusal)
            async for reply in behaviour(request, context):
                self._pace.start()
                yield reply
                self._pace.stop()

        return stream

    def _receiving(self, behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def receive(requests: AsyncIterator[Any], context: Context) -> Any:
            try:
                return await behaviour(self._paced(requests), context)
            except asyncio.CancelledError:
                late = self._pace.caught()
                if late is not None:
                    await abort(context, late)
                raise

        return receive

    async def _paced(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if self._refusal:
                raise self._refusal
            yield request
            self._let_go()
            self._pace.start()
        self._pace.stop()


def kind_of(method: str) -> int:
    """Which of the places a method takes."""
    if method.startswith(_ADMIN_PREFIXES):
        return _ADMIN
    return _CARRIES_ON if method.endswith(_CARRYING_ON) else _BEGINS


def refusing(error: KVStoreError) -> Any:
    """A handler that ends any kind of call with this error, without waiting for a message of it."""

    async def refused(_: Any, context: Context) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refused)


def connection_options(config: Config, connections_max: int) -> list[tuple[str, int]]:
    """gRPC's own limits on messages, on connections to each address and on the calls of each connection."""
    return [
        *channel_options(config.limits.message_bytes_max),
        ("grpc.max_concurrent_streams", config.limits.connection_calls_max),
        ("grpc.max_allowed_incoming_connections", connections_max),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
    ]
