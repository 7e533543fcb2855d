"""What every handler shares: the worker threads, and the edge at which errors become status codes.

Handlers run on the event loop and only await; health and stats of a busy daemon are never behind a fetch.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio

from kvstore.errors import KVStoreError, LimitError
from kvstore.priority import give_way
from kvstore.wire.status import to_status, trailing_metadata

T = TypeVar("T")
Context: TypeAlias = Any  # grpc.aio.ServicerContext; grpcio has no types of its own

log = logging.getLogger(__name__)

READ_THREADS = 4
# How long a handler waits until its status is under way.
ABORT_S = 1.0
# Each waits for the lane most of the time.
DECODE_THREADS = 8


class Workers:
    """The engine's threads: a few that read and plan, one that writes and gives way to all others."""

    def __init__(self) -> None:
        self._read = ThreadPoolExecutor(READ_THREADS, "kvstore-read")
        self._decode = ThreadPoolExecutor(DECODE_THREADS, "kvstore-decode")
        self._write = ThreadPoolExecutor(1, "kvstore-write", give_way)
        self._admin = ThreadPoolExecutor(1, "kvstore-admin")

    async def read(self, work: Callable[..., T], *args: object) -> T:
        """Run planning or reading."""
        return await asyncio.get_running_loop().run_in_executor(self._read, functools.partial(work, *args))

    async def decode(self, work: Callable[..., T], *args: object) -> T:
        """Run what waits for the lane; planning and reading must not wait behind it."""
        return await asyncio.get_running_loop().run_in_executor(self._decode, functools.partial(work, *args))

    async def write(self, work: Callable[..., T], *args: object) -> T:
        """Run a commit; they go one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._write, functools.partial(work, *args))

    async def admin(self, work: Callable[..., T], *args: object) -> T:
        """Run an admin verb, which may take long."""
        return await asyncio.get_running_loop().run_in_executor(self._admin, functools.partial(work, *args))

    def close(self) -> None:
        """Let what runs finish, drop what waits."""
        for pool in (self._write, self._decode, self._read, self._admin):
            pool.shutdown(wait=True, cancel_futures=True)


async def abort(context: Context, error: KVStoreError) -> None:
    """End a call with the status of an error, and what it says about trying again. Does not return."""
    await _end(context, to_status(error), str(error), trailing_metadata(error))


async def _abort(service: Any, context: Context, name: str, error: Exception) -> None:
    if isinstance(error, LimitError):
        service.refusals.add(error)
    if isinstance(error, KVStoreError):
        await abort(context, error)
    log.error("%s failed", name, exc_info=error)
    await _end(context, grpc.StatusCode.INTERNAL, f"{name} failed; the daemon's log says why", ())


async def _end(context: Context, code: Any, details: str, metadata: Any) -> None:
    try:
        await asyncio.wait_for(context.abort(code, details, metadata), ABORT_S)
    except TimeoutError:
        # A peer that reads nothing has the status behind what it did not read; gRPC keeps it for as long as the call.
        raise asyncio.CancelledError from None


def gone() -> asyncio.CancelledError:
    """What a handler ends with when gRPC could not write for it, since its caller is gone.

    gRPC may not have noticed yet that the call was cancelled, as every fetch by path is when its files are open. A
    status would be one more thing that it cannot send, and each such failure is a traceback in the log.
    """
    return asyncio.CancelledError()


def unary(handler: Callable[[Any, Any, Context], Awaitable[T]]) -> Callable[[Any, Any, Context], Awaitable[T]]:
    """The RPC edge of a unary handler: every error becomes a status, none a traceback on the wire.

    A service has `refusals`, which count what a limit refused.
    """

    @functools.wraps(handler)
    async def edge(self: Any, request: Any, context: Context) -> T:
        try:
            return await handler(self, request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except grpc.aio.InternalError:
            raise gone() from None
        except Exception as error:
            await _abort(self, context, handler.__name__, error)
            raise

    return edge


def streaming(
    handler: Callable[[Any, Any, Context], AsyncIterator[T]],
) -> Callable[[Any, Any, Context], AsyncIterator[T]]:
    """The RPC edge of a handler that streams its reply."""

    @functools.wraps(handler)
    async def edge(self: Any, request: Any, context: Context) -> AsyncIterator[T]:
        try:
            async for reply in handler(self, request, context):
                yield reply
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except grpc.aio.InternalError:
            raise gone() from None
        except Exception as error:
            await _abort(self, context, handler.__name__, error)
            raise

    return edge
