"""Startup of `kvstore run`: finds the daemon, starts one if none answers, and prints its state."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.cli.common import connected, note, size_text, stats_or_error
from kvstore.config import Config, default_data_dir, keys_home
from kvstore.errors import KVStoreError, UnavailableError

LOG_FILE = "daemon.log"
# A daemon writes a line a request; what is longer is put aside when the next one starts.
LOG_BYTES_MAX = 16 << 20
START_S = 60.0
LOOK_S = 0.2


def ensure_daemon(config: Config, *, start: bool) -> None:
    """Say what the server is connected to; start a daemon on this host where none answers and `start` is given.

    Never fails: a server without a store is still a server.
    """
    found = stats_or_error(config)
    if isinstance(found, UnavailableError) and start and config.address.path:
        found = _start(config)
    if isinstance(found, KVStoreError):
        why = str(found).partition("; start it with")[0].rstrip(".")
        note(f"{why}; serving without the store{_way_out(config, found)}")
        return
    daemon, disk = found["daemon"], found["disk"]
    room = f"{size_text(disk['used_bytes'])} of {size_text(disk['budget_bytes'])} used"
    note(f"connected to {config.listen} (kvstore {daemon['version']}, pid {daemon['pid']}); {room}")
    note(f"profile {daemon.get('profile') or 'as the daemon is configured'}")
    if daemon["state"] != "serving":
        note(f"the daemon is {daemon['state']}: {daemon['detail'] or 'it stores nothing now'}")


def warm_up(config: Config, packs: Sequence[str]) -> None:
    """Import packs, with progress. One that cannot be imported is said; never fails."""
    from kvstore.blobs.pack_file import PackFile
    from kvstore.cli.import_ import import_with_progress, summary_text

    for path in packs:
        try:
            with connected(config) as client, PackFile(os.path.expanduser(path)) as pack:
                done = import_with_progress(client, pack)
                note(summary_text(done, pack))
                if done["reason"] != "ok":
                    note(f"warning: not all of {path} was imported: {done['detail'] or done['reason']}")
        except (KVStoreError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else None
            note(f"warning: {path} was not imported: {why or error}")


def calibrate_once(argv: Sequence[str]) -> None:
    """Measure the profiles that have no result on the model of this command line of a server; never fails.

    In a process of its own, so that the memory of this model is free again before the server loads it.
    """
    from kvstore.integrations.run import named

    model, adapter = named(argv, "--model"), named(argv, "--adapter-path")
    if not model and argv[:2] == ("vllm-mlx", "serve"):
        model = argv[2] if len(argv) > 2 else ""
    if not model:
        note("warning: --calibrate needs the server's --model; nothing was measured")
        return
    command = [sys.executable, "-m", "kvstore", "calibrate", "--missing", "--model", model]
    command += ["--adapter-path", adapter] if adapter else []
    # What it prints is not what the server prints.
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        note("warning: the model was not calibrated")


def _way_out(config: Config, error: KVStoreError) -> str:
    if not isinstance(error, UnavailableError):
        return ""
    where = "" if config.source("listen") == "default" else f" --listen {config.listen}"
    return f"; it is used when one answers: kvstore serve{where}"


def _start(config: Config) -> dict[str, Any] | KVStoreError:
    """Start a daemon that outlives this process, and wait until it answers."""
    try:
        log_path = _log_path(config)
        # Its configuration is that of this process: the same environment, and what `run` was told.
        environ = {**os.environ, "KVSTORE_LISTEN": config.listen}
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvstore", "serve"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    except (KVStoreError, OSError) as error:
        return KVStoreError(f"no daemon at {config.listen}, and none can be started: {error}")
    note(f"no daemon at {config.listen}; starting one (pid {process.pid}, log {log_path})")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        found = stats_or_error(config)
        if not isinstance(found, UnavailableError):
            return found
        if process.poll() is not None:
            # Another one may have been quicker; else its last words say why.
            found = stats_or_error(config)
            ended = KVStoreError(f"the daemon ended: {_last_line(log_path)}")
            return ended if isinstance(found, UnavailableError) else found
        time.sleep(LOOK_S)
    return KVStoreError(f"the daemon does not answer after {START_S:.0f} s; see {log_path}")


def _log_path(config: Config) -> Path:
    """The log file of a daemon in the background: in its data directory, which is created as the daemon would.

    Raises DirectoryError where a daemon could not use it, DirectoryHeldError where another one does.
    """
    from kvstore.engine import require_store
    from kvstore.engine.directory import claim

    if config.data_dir != default_data_dir():
        require_store(config.data_dir)
    directory, lock = claim(config.data_dir, keys_home(config))
    lock.close()
    path = directory.root / LOG_FILE
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES_MAX:
            path.replace(path.with_suffix(".log.1"))
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    return path


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("kvstore: ") if lines else f"see {path}"
