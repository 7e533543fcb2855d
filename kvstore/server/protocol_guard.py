"""Refuses calls of workers that speak another protocol than this daemon."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from kvstore.server.call_limits import refusing
from kvstore.wire.handshake import refusal
from kvstore.wire.v1 import kvstore_pb2 as pb

_OURS = f"/{pb.DESCRIPTOR.package}."


class ProtocolGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """Looks at the number that came with each call of our services, before its message is read."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """gRPC asks here for the handler of each call. Health and reflection are the same in every version."""
        error = refusal(details.invocation_metadata) if details.method.startswith(_OURS) else None
        return await continuation(details) if error is None else refusing(error)
