"""Stock `mlx_lm.server` processes, with the store (`kvstore run`) or without it, and chat requests to them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.child import Child
from tests.support.limits import OPEN_DEADLINES, launch

HOST = "127.0.0.1"
# For a machine that is busy with other things; nothing that works is measured by these.
START_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 300.0
PATIENCE_S = 120.0

# The models that tests serve compute faster than a busy machine restores.
WITH_STORE = launch("run", "--no-start", "--slow-hits", "mlx_lm.server", min_prefix_tokens=1, **OPEN_DEADLINES)
PLAIN = ("-m", "mlx_lm", "server")

# The stock server keeps ten prompts in memory. A cold reference must not find any of them there.
NO_MEMORY = ("--prompt-cache-size", "0")


@dataclass(frozen=True)
class Answer:
    """One answered chat request. `first_token_s` runs from sending the request to the first text that arrived."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float


class ServerProcess(Child):
    """`mlx_lm.server` on a free port of this host, in a process of its own."""

    def __init__(
        self,
        model: Path | str,
        log_path: Path,
        environ: Mapping[str, str],
        *,
        launcher: Sequence[str] = WITH_STORE,
        flags: Sequence[str] = (),
    ) -> None:
        super().__init__(log_path)
        self.model = str(model)
        self.launcher = tuple(launcher)
        self.flags = tuple(flags)
        self.port = 0
        self._environ = {**environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

    def start(self, wait: bool = True) -> ServerProcess:
        """Start it and, with `wait`, return when the model is loaded and has answered once."""
        self.port = free_port()
        command = [sys.executable, *self.launcher, "--model", self.model, "--host", HOST, "--port", str(self.port)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen([*command, *self.flags], env=self._environ, stdout=log, stderr=log)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Return when the server has loaded its model; AssertionError with its log if it ends or takes too long.

        Its /health is fine before the model is loaded, so it is then asked for one token of an answer: a prompt that is
        too short for the store, which takes loading and first-use costs out of every time measured later.
        """
        wait_until(self._is_healthy, START_TIMEOUT_S, lambda: f"the server does not answer:\n{self.log_text()}")
        self.chat([{"role": "user", "content": "Hello"}], max_tokens=1)

    def _is_healthy(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise AssertionError(f"the server ended:\n{self.log_text()}")
        try:
            with closing(http.client.HTTPConnection(HOST, self.port, timeout=5.0)) as connection:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
        except OSError:
            return False

    def chat(self, messages: list[dict[str, str]], *, max_tokens: int | None = 16, **options: Any) -> Answer:
        """A streamed chat completion at temperature 0; `options` go into the request (`model`, `seed`, ...).

        `max_tokens` None: as the server's flags say.
        """
        body = {
            "messages": messages,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if max_tokens is None else {"max_tokens": max_tokens}),
            **options,
        }
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_TIMEOUT_S)
        started = time.monotonic()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise AssertionError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
        usage: dict[str, Any] = {}
        text, first_s = "", 0.0
        for event in _events(response):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if content := choice["delta"].get("content"):
                    first_s = first_s or time.monotonic() - started
                    text += content
        total_s = time.monotonic() - started
        connection.close()
        if not usage:
            raise AssertionError(f"an answer without an end:\n{self.log_text()}")
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return Answer(text, usage["prompt_tokens"], cached, usage["completion_tokens"], first_s or total_s, total_s)

    def status_of(self, path: str, body: Mapping[str, Any]) -> int:
        """The HTTP status that a request gets."""
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_TIMEOUT_S)) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            return connection.getresponse().status


def start_all(*servers: ServerProcess) -> None:
    """Start several at once: most of a start is importing, which another core can do."""
    for server in servers:
        server.start(wait=False)
    for server in servers:
        server.wait_ready()


def wait_until(done: Callable[[], bool], timeout_s: float, failure: Callable[[], str]) -> None:
    """Return when `done()`; AssertionError with the text of `failure()` after `timeout_s`, longer on a busy machine."""
    deadline = time.monotonic() + max(timeout_s, PATIENCE_S)
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(failure())
        time.sleep(0.05)


def free_port() -> int:
    """A TCP port of this host that nothing listens on, and that no connection gets before a server is up."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)  # the system takes higher ones for connections
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


def clean_environ() -> dict[str, str]:
    """This process's environment without any configuration of kvstore."""
    return {key: value for key, value in os.environ.items() if not key.startswith("KVSTORE_")}


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events up to [DONE]; comments, which report progress, are left out."""
    for line in response:
        if line.startswith(b"data: "):
            data = line[len(b"data: ") :].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
