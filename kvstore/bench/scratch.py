"""A temporary daemon for benches: runs this interpreter on a temporary directory, and deletes that at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn, Self

from kvstore.client.client import Client, connect
from kvstore.config import ENV_PREFIX, Config, load_config
from kvstore.core.interrupts import uninterrupted
from kvstore.errors import ConfigError, KVStoreError

START_S = 60.0
# Unless they raise, as Ctrl-C does, they end the verb and leave its daemon and gigabytes behind.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class ScratchDaemon:
    """A context manager. `flags` are configuration keys; nothing else configures it."""

    def __init__(self, **flags: object) -> None:
        # Deleted with its object at the latest: Ctrl-C may come before anything would end this one.
        self._directory = tempfile.TemporaryDirectory(prefix="kvs-", ignore_cleanup_errors=True)
        self.folder = Path(self._directory.name)
        self._flags: dict[str, object] = {
            "data_dir": self.folder / "data",
            "listen": f"unix:{self.folder}/s",
            "free_floor_bytes": 1,
            **flags,
        }
        self.config: Config = load_config(self._flags, os.devnull, environ={})
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Any] = {}

    def start(self) -> float:
        """Start it and wait until it answers; seconds that this took. ConfigError when it does not."""
        started_s = time.monotonic()
        process = uninterrupted(self._launch)
        while process.poll() is None and time.monotonic() < started_s + START_S:
            with contextlib.suppress(KVStoreError), self.client() as client:
                client.stats()
                return time.monotonic() - started_s
            time.sleep(0.01)
        raise ConfigError("the temporary daemon did not start")

    def _launch(self) -> subprocess.Popen[bytes]:
        """Not of the terminal's process group: after Ctrl-C it is stopped when this process has no use for it."""
        variables = {f"{ENV_PREFIX}{key.upper()}": str(value) for key, value in self._flags.items()}
        clean = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvstore", "serve", "--create", "--config", os.devnull],
            env={**clean, **variables, f"{ENV_PREFIX}LOG_LEVEL": "error"},
            process_group=0,
        )
        return self._process

    def stop(self) -> None:
        """Stop the daemon with SIGTERM and wait for its end. If that is interrupted, or takes long, it is killed."""
        process = self._process
        if process is None:
            return
        try:
            process.terminate()
            process.wait(START_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            self._process = None

    @property
    def pid(self) -> int:
        """Its process, while it runs."""
        assert self._process is not None
        return self._process.pid

    def client(self) -> Client:
        """A connection of one's own."""
        return connect(config=self.config)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            ours = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
            self._handlers = {number: signal.signal(number, _exit) for number in ours}
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            uninterrupted(self._directory.cleanup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)


def _exit(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
