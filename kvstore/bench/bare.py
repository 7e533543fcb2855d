"""A minimal gRPC server that only sends bytes: the ceiling of the transport itself."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio

from kvstore.core.interrupts import uninterrupted
from kvstore.core.process import keep_freed_memory
from kvstore.wire.convert import channel_options

CHUNK_BYTES = 1 << 20
_SERVICE = "kvstore.bench.Bare"
_MESSAGE_BYTES_MAX = 64 << 20


async def _empty(request: bytes, context: Any) -> bytes:
    return b""


async def _stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
    chunk = bytes(CHUNK_BYTES)
    left = int.from_bytes(request, "little")
    while left > 0:
        yield chunk[:left] if left < CHUNK_BYTES else chunk
        left -= CHUNK_BYTES


async def _serve(address: str) -> None:
    # As the daemon does. Else the heap's layout decides whether each call of 256 KB has 108 page faults.
    keep_freed_memory()
    server = grpc.aio.server(options=channel_options(_MESSAGE_BYTES_MAX))
    handlers = {
        "Empty": grpc.unary_unary_rpc_method_handler(_empty),
        "Stream": grpc.unary_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_insecure_port(address)
    await server.start()
    # The parent process holds the other end of the pipe. The server ends when that end is closed.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


class Bare:
    """Client of the minimal server. Payloads are raw bytes, without protobuf."""

    def __init__(self, channel: Any) -> None:
        self._empty = channel.unary_unary(f"/{_SERVICE}/Empty")
        self._stream = channel.unary_stream(f"/{_SERVICE}/Stream")

    def empty(self, payload: bytes) -> None:
        """One call with this payload and an empty answer."""
        self._empty(payload, wait_for_ready=True)

    def chunks(self, nbytes: int) -> Iterator[bytes]:
        """Receive `nbytes` bytes; yields each chunk as it arrives."""
        yield from uninterrupted(self._stream, nbytes.to_bytes(8, "little"), wait_for_ready=True)

    def stream(self, nbytes: int) -> None:
        """Receive `nbytes` bytes and discard them."""
        for _ in self.chunks(nbytes):
            pass


@contextlib.contextmanager
def bare_server() -> Iterator[Bare]:
    """A server in a process of its own, on a unix socket."""
    with tempfile.TemporaryDirectory(prefix="kvb-") as folder:
        address = f"unix:{folder}/s"
        command = [sys.executable, "-m", __name__, address]
        # Not of the terminal's process group: at Ctrl-C it would print where it was.
        with subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0) as process:
            with grpc.insecure_channel(address, options=channel_options(_MESSAGE_BYTES_MAX)) as channel:
                yield Bare(channel)
            assert process.stdin is not None
            process.stdin.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
