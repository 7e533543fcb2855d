"""Converts errors of RPC handlers to gRPC status codes. Handlers run on the event loop and must not block."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio

from kvstore.errors import KVStoreError, LimitError
from kvstore.wire.status import to_status, trailing_metadata

T = TypeVar("T")
Context: TypeAlias = Any  # grpc.aio.ServicerContext; grpcio has no types of its own

log = logging.getLogger(__name__)

# How long a handler waits until its status is under way.
ABORT_S = 1.0


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
        # If a peer reads nothing, its status waits behind unread messages, and gRPC keeps the call's memory until then.
        raise asyncio.CancelledError from None


def gone() -> asyncio.CancelledError:
    """Exceptions of a handler whose caller is gone, so that gRPC could not write.

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
