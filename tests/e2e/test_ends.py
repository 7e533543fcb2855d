"""Hundreds of fetches on a busy machine, and what gRPC says of their ends in the daemon's log."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvstore.client.client import connect
from tests.support.daemon import DaemonProcess
from tests.support.limits import small_config
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT)
WORKERS, ROUNDS = 3, 40
OPEN = {"connect_ms": 20_000, "stall_ms": 60_000, "total_ms": 60_000}

# Everything that gRPC has to say comes into the log.
UNFILTERED = """
import sys
from kvstore.server import daemon
daemon.unless_caller_gone = lambda record: True
from kvstore.cli import main
sys.argv = ["kvstore", "serve", *sys.argv[1:]]
main()
"""


def fetching(daemon: DaemonProcess, number: int) -> None:
    """Store, then hits by path, misses and hits by stream in turn."""
    tokens = list(range(number * 1000, number * 1000 + 600))
    with connect(config=small_config(daemon.listen)) as client:
        session = client.session(NAMESPACE, "raw", **OPEN)
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).stored_tokens == len(tokens)
        for turn in range(ROUNDS):
            assert session.fetch(tokens, "packed", "path")
            assert not session.fetch([-1 - turn] * 300, "packed", "path")
            assert session.fetch(tokens, "packed", "stream")


def test_the_ends_of_hundreds_of_fetches_are_no_errors_in_the_daemons_log(tmp_path: Path) -> None:
    """By path, in vain and by stream, with two busy loops beside them; none is hidden by the daemon's own filter."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with DaemonProcess(tmp_path / "data", program=UNFILTERED) as daemon, ThreadPoolExecutor(WORKERS) as threads:
            list(threads.map(lambda number: fetching(daemon, number), range(WORKERS)))
            assert daemon.stop() == 0
            wrong = [line for line in daemon.log_text().splitlines() if " ERROR " in line or "Traceback" in line]
            assert wrong == []
    finally:
        for one in busy:
            one.kill()
            one.wait()
