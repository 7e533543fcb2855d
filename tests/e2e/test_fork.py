"""A process that was forked after it had connected: neither gRPC's threads nor ours are in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.daemon import DaemonProcess

SCRIPT = """
import json, os, sys
from kvstore.client.client import connect
from kvstore.errors import KVStoreError
from tests.support.synthetic import make_layers, make_layout, make_namespace

layout, tokens, limits = make_layout(), list(range(300)), dict(connect_ms=20000, stall_ms=20000, total_ms=60000)
layers = make_layers(layout, tokens)

def answers(client, session):
    try:
        client.stats()
        said = "answered"
    except KVStoreError as error:
        said = str(error)
    more = [*tokens, 7]
    return [
        session.match(tokens).reason, session.fetch(tokens).reason, session.fetch_layers(tokens).reason,
        session.store(tokens, layers, wait=True).reason, said,
    ]

client = connect(sys.argv[1])
session = client.session(make_namespace(layout), **limits)
assert session.store(tokens, layers, wait=True).durable
assert session.fetch(tokens)
child = os.fork()
if not child:
    own = connect(sys.argv[1])
    found = [answers(client, session), answers(own, own.session(make_namespace(layout), **limits))]
    session.close(), client.close(), own.close()
    del session, client, own
    print(json.dumps(found), flush=True)
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert session.fetch(tokens)
client.close()
"""


def test_a_forked_process_is_answered_at_once_and_told_why(tmp_path: Path) -> None:
    """Misses and refused stores, by its own client too; it closes and ends, and its parent goes on."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, daemon.listen], capture_output=True, text=True, timeout=120, cwd=Path.cwd()
        )
        assert run.returncode == 0, run.stderr
    for answers in json.loads(run.stdout):
        assert answers[:4] == ["forked"] * 4
        assert "spawn" in answers[4]


def test_a_process_forked_before_anything_connected_connects_itself(tmp_path: Path) -> None:
    """Servers that load their modules and then fork their workers."""
    script = """
import os, sys
import kvstore.client.session
from kvstore.client.client import connect
child = os.fork()
if not child:
    with connect(sys.argv[1]) as client:
        os._exit(0 if client.stats() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
with connect(sys.argv[1]) as client:
    assert client.stats()
"""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        run = subprocess.run([sys.executable, "-c", script, daemon.listen], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
