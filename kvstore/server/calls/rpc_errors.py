"""Ends calls with an error: kvstore's errors as gRPC status codes. Runs on the event loop and does not block it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, TypeAlias

import grpc

from kvstore.errors import KVStoreError
from kvstore.wire.status import to_status, trailing_metadata

Context: TypeAlias = Any  # grpc.aio.ServicerContext; grpcio has no types of its own

log = logging.getLogger(__name__)

# How long a handler waits until its status is under way.
ABORT_S = 1.0


async def abort(context: Context, error: KVStoreError) -> None:
    """End a call with the status of an error, and what it says about trying again. Does not return."""
    await _end(context, to_status(error), str(error), trailing_metadata(error))


async def abort_unexpected(context: Context, name: str, error: Exception) -> None:
    """End a call whose handler has a bug: the log has the traceback, never the wire. Does not return."""
    log.error("%s failed", name, exc_info=error)
    await _end(context, grpc.StatusCode.INTERNAL, f"{name} failed; the daemon's log says why", ())


def refusing(error: KVStoreError) -> Any:
    """A handler that ends any kind of call with this error, without waiting for a message of it."""

    async def refused(_: Any, context: Context) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refused)


async def _end(context: Context, code: Any, details: str, metadata: Any) -> None:
    try:
        await asyncio.wait_for(context.abort(code, details, metadata), ABORT_S)
    except TimeoutError:
        # If a peer reads nothing, its status waits behind unread messages, and gRPC keeps the call's memory until then.
        raise asyncio.CancelledError from None
