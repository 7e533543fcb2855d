"""An HTTP proxy in front of an S3 server that delays, refuses, resets, cuts, changes, drips and throttles answers.

The `Host` header goes through as it came, so that signatures hold.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Self
from urllib.parse import urlsplit

FAULTS = ("delay", "503", "reset", "truncated", "wrong", "drip", "skew")
_BAD_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}
_PIECE_BYTES = 64 << 10


def _error(code: str, message: str) -> bytes:
    head = '<?xml version="1.0" encoding="UTF-8"?>'
    return f"{head}<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


_SKEWED = "The difference between the request time and the current time is too large."
# Answers in place of those of the server. The last two are of stores that are full, or of which a quota is.
_REFUSALS = {
    "503": (503, "Slow Down", _error("SlowDown", "Slow down.")),
    "skew": (403, "Forbidden", _error("RequestTimeTooSkewed", _SKEWED)),
    "507": (507, "Insufficient Storage", _error("XMinioStorageFull", "No space is left.")),
    "quota": (403, "Forbidden", _error("QuotaExceeded", "Quota exceeded.")),
}
FULL = ("507", "quota")


class FaultProxy:
    """Forwards to `target`; while `fault` is set, answers to requests for which `hits` holds have that fault.

    `struck` counts them. `delay_s` is how long `delay` takes, and `drip` between two bytes. `bytes_per_s`: what the
    bodies of all answers without a fault share; 0: no limit.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 80)
        self.fault = ""
        self.hits: Callable[[str, str], bool] = lambda method, path: True
        self.delay_s = 30.0
        self.struck = 0
        self.bytes_per_s = 0.0
        self._free_s = 0.0  # when the link has sent all that it was given
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, near.makefile("rb") as stream, contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            while line := stream.readline():
                method, path, _ = line.decode().split(" ", 2)
                headers: list[tuple[str, str]] = []
                while (field := stream.readline().decode().strip()) != "":
                    name, _, value = field.partition(":")
                    headers.append((name.strip(), value.strip()))
                length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
                body = stream.read(length)
                fault = self.fault if self.hits(method, path) else ""
                self.struck += bool(fault)
                if not self._answer(near, method, path, headers, body, fault):
                    return

    def _answer(
        self, near: socket.socket, method: str, path: str, headers: list[tuple[str, str]], body: bytes, fault: str
    ) -> bool:
        """Send one answer; whether the connection goes on."""
        if fault == "delay":
            self._ending.wait(self.delay_s)
        if fault in _REFUSALS:
            status, reason, text = _REFUSALS[fault]
            return _send(near, status, reason, [], text, method)
        status, reason, answered, data = self._forward(method, path, headers, body)
        if fault == "reset":
            _send(near, status, reason, answered, data, method, upto=len(data) // 2)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if fault == "truncated":
            _send(near, status, reason, answered, data, method, upto=len(data) // 2)
            return False
        if fault == "wrong" and data:
            at = len(data) // 2
            data = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        if fault == "drip":
            _send(near, status, reason, answered, data, method, upto=0)
            for at in range(len(data)):
                if self._ending.wait(self.delay_s / 100):
                    return False
                near.sendall(data[at : at + 1])
            return True
        _send(near, status, reason, answered, data, method, upto=len(data) if not self.bytes_per_s else 0)
        return self.bytes_per_s == 0 or method == "HEAD" or self._throttle(near, data)

    def _throttle(self, near: socket.socket, data: bytes) -> bool:
        """Send a body at the rate of the link."""
        for at in range(0, len(data), _PIECE_BYTES):
            self._take_turn(len(data[at : at + _PIECE_BYTES]))
            near.sendall(data[at : at + _PIECE_BYTES])
        return True

    def _take_turn(self, nbytes: int) -> None:
        """Wait until the link has sent what came before, and as many bytes more."""
        with self._lock:
            now_s = time.monotonic()
            self._free_s = max(self._free_s, now_s) + nbytes / self.bytes_per_s
            wait_s = self._free_s - now_s
        self._ending.wait(wait_s)

    def _forward(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[int, str, list[tuple[str, str]], bytes]:
        far = http.client.HTTPConnection(*self._target, timeout=60)
        try:
            far.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in ("connection", "keep-alive"):
                    far.putheader(name, value)
            far.endheaders(body or None)
            answer = far.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _BAD_HOP]
            if method == "HEAD":
                kept.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return answer.status, answer.reason, kept, answer.read()
        finally:
            far.close()


def _send(
    near: socket.socket,
    status: int,
    reason: str,
    headers: list[tuple[str, str]],
    data: bytes,
    method: str,
    upto: int | None = None,
) -> bool:
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    if method != "HEAD":
        lines.append(f"Content-Length: {len(data)}")
    near.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else data[:upto]))
    return True


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Until it holds. AssertionError when it never does."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)
