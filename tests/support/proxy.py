"""A TCP proxy that makes a link slow, and breaks it."""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress

CHUNK_BYTES = 1 << 16


class SlowProxy:
    """Forwards connections to a port of this host; every byte takes `delay_s` longer, each way.

    While it is `cut` connections are refused, and those that were open are gone.
    """

    def __init__(self, port: int, delay_s: float) -> None:
        self._target = ("127.0.0.1", port)
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._listener = self._listen(0)
        self.port = self._listener.getsockname()[1]

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def cut(self) -> None:
        """The other end is gone."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            ended, self._open = self._open, []
        for one in ended:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def mend(self) -> None:
        """It is there again."""
        self._listener = self._listen(self.port)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
                with self._lock:
                    self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    threading.Thread(target=self._take, args=(one, waiting), daemon=True).start()
                    threading.Thread(target=self._give, args=(other, waiting), daemon=True).start()

    def _take(self, source: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"begin"
        while data:
            try:
                data = source.recv(CHUNK_BYTES)
            except OSError:
                data = b""
            waiting.put((time.monotonic() + self._delay_s, data))

    def _give(self, sink: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while True:
                due_s, data = waiting.get()
                time.sleep(max(0.0, due_s - time.monotonic()))
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
