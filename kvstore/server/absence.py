"""The volume of the data directory is away: an external disk was unplugged while the daemon served from it.

Its engine is closed then, so that no page of the index stays mapped from a disk that is not there. Until the store is
back the daemon answers every call with a sentence that says so: to workers that is a miss, as without a daemon. Nothing
is made where the store was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from kvstore.config import Config
from kvstore.config.credentials import CredentialFiles
from kvstore.engine import require_store
from kvstore.errors import DirectoryError, UnavailableError
from kvstore.server.calls.rpc_errors import refusing
from kvstore.server.listening import bind, close_sockets_to_others
from kvstore.server.threads import Pool

AWAY = "the volume of the data directory %s is away; every request is a miss until it is back"
LOOK_EVERY_S = 1.0
log = logging.getLogger(__name__)


class _Refusing(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """Refuses every call before its message is read, health checks too: there is nothing to be healthy."""

    def __init__(self, error: UnavailableError) -> None:
        self._handler = refusing(error)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """gRPC asks here for the handler of each call."""
        return self._handler


async def until_there(config: Config, files: CredentialFiles, admin: Pool, stop: asyncio.Event) -> bool:
    """Refuse all calls until there is a store at `data_dir`; False when `stop` was set first.

    The caller holds the lock of the address.
    """
    server = grpc.aio.server(interceptors=[_Refusing(UnavailableError(AWAY % config.data_dir))])
    bind(server, config, files)
    await server.start()
    close_sockets_to_others(config)
    try:
        while not stop.is_set() and not await admin(_is_there, config.data_dir):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LOOK_EVERY_S)
    finally:
        await server.stop(0)
    if stop.is_set():
        return False
    log.info("the data directory %s is back", config.data_dir)
    return True


def _is_there(data_dir: Path) -> bool:
    try:
        os.listdir(data_dir)  # a disk that is on its way back may answer with an error
        require_store(data_dir)
    except (DirectoryError, OSError):
        return False
    return True
