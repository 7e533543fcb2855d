"""The life of a data directory and its daemon: older and newer versions, restarts under load, a stop that drains."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.client.results import Miss
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.child import STOP_TIMEOUT_S
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.files import contents_below
from tests.support.limits import set_limits
from tests.support.servers import wait_until
from tests.support.sessions import client_of, patient
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT)
EXACT, OTHER = list(range(1000, 1300)), list(range(300))
ROOT = Path(__file__).parents[2]


# A kvstore whose index is of a version that does not exist yet.
NEWER = """
import sys
from kvstore.blobs import format
format.FORMAT_VERSION = 99
from kvstore.cli import main
sys.argv = ["kvstore", "serve", *sys.argv[1:]]
main()
"""


def made_by_newer(tmp_path: Path) -> DaemonProcess:
    """A directory that such a kvstore has filled and left in order."""
    daemon = DaemonProcess(tmp_path / "data", profile="raw")
    log = daemon.log_path.open("ab")
    daemon.process = subprocess.Popen(
        [sys.executable, "-c", set_limits({"min_prefix_tokens": 1}) + NEWER, "--create"],
        env=daemon.environ(),
        cwd=ROOT,
        stdout=log,
        stderr=log,
    )
    try:
        daemon.wait_serving()
        with client_of(daemon) as client:
            assert patient(client, NAMESPACE).store(EXACT, make_layers(LAYOUT, EXACT), wait=True).durable
        assert daemon.stop() == 0, daemon.log_text()
    finally:
        daemon.kill()
        log.close()
    return daemon


def contents(folder: Path) -> dict[Path, bytes]:
    """Every blob, and the index."""
    return contents_below(folder, ".safetensors") | contents_below(folder, ".mdb")


@pytest.mark.parametrize("verb", [["serve"], ["check", "--repair"]])
def test_a_newer_index_is_refused_by_name_and_left_alone(tmp_path: Path, verb: list[str]) -> None:
    """Neither served, nor rebuilt, nor repaired: it may hold what this kvstore cannot see."""
    daemon = made_by_newer(tmp_path)
    before = contents(daemon.data_dir / "blobs.noindex") | contents(daemon.data_dir / "index")
    ended = run_cli(verb, daemon.environ())
    assert ended.returncode == 1, ended
    assert "format version 99; this kvstore reads" in ended.stderr and "Traceback" not in ended.stderr
    after = contents(daemon.data_dir / "blobs.noindex") | contents(daemon.data_dir / "index")
    assert {path: data for path, data in after.items() if path.name != "lock.mdb"} == {
        path: data for path, data in before.items() if path.name != "lock.mdb"
    }


def test_newer_blobs_are_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    """Without an index that knows them, nobody can call them damage, or strays."""
    daemon = DaemonProcess(tmp_path / "data", profile="raw")
    with daemon, client_of(daemon) as client:
        assert patient(client, NAMESPACE).store(EXACT, make_layers(LAYOUT, EXACT), wait=True).durable
        assert daemon.stop() == 0
    for blob in daemon.blobs():
        data = blob.read_bytes()
        at = data.index(b'"', data.index(b'"version"') + len(b'"version"')) + 1
        blob.write_bytes(data[:at] + b"9" + data[at + 1 :])
    (daemon.data_dir / "index" / "data.mdb").unlink()
    before = contents(daemon.data_dir / "blobs.noindex")
    for verb in (["serve"], ["check", "--repair"], ["serve"]):
        ended = run_cli(verb, daemon.environ())
        assert ended.returncode in (1, 4) and "Traceback" not in ended.stderr, ended
        assert "format version 9; this kvstore reads" in ended.stderr + ended.stdout, (verb, ended)
        assert contents(daemon.data_dir / "blobs.noindex") == before


def test_workers_go_on_through_restarts_and_hit_again(tmp_path: Path) -> None:
    """Eight threads of stores and fetches over three restarts: misses meanwhile, nothing raised, never wrong rows."""
    stop, faults = threading.Event(), []
    hits, misses = itertools.count(), itertools.count()
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:

        def work(number: int) -> None:
            try:
                with client_of(daemon) as client:
                    session = client.session(NAMESPACE)
                    for turn in itertools.count():
                        if stop.is_set():
                            return
                        tokens = list(range(number * 10_000, number * 10_000 + 280 + turn % 5))
                        session.store(tokens, make_layers(LAYOUT, tokens))
                        answer = session.fetch(tokens)
                        if isinstance(answer, Miss):
                            next(misses)
                            time.sleep(0.01)
                            continue
                        assert_rows(answer.layers, LAYOUT, tokens[: answer.n_tokens])
                        next(hits)
            except BaseException as error:  # noqa: BLE001  # any at all is what must not be
                faults.append(repr(error))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            seen = next(hits)
            wait_until(lambda seen=seen: next(hits) > seen + 40 or faults, 60, daemon.log_text)  # type: ignore[misc]
            daemon.restart()
        seen = next(hits)
        wait_until(lambda: next(hits) > seen + 40 or bool(faults), 60, daemon.log_text)
        stop.set()
        for thread in threads:
            thread.join()
        assert not faults
        with client_of(daemon) as client:
            assert client.check()["findings"] == []
        assert daemon.stop() == 0
        assert own_tracebacks(daemon) == []


def own_tracebacks(daemon: DaemonProcess) -> list[str]:
    """Lines of our code in tracebacks. gRPC prints one of its own for a call that a stop cancels before its handler."""
    return [line for line in daemon.log_text().splitlines() if line.strip().startswith("File") and "/kvstore/" in line]


def test_a_stop_says_so_takes_nothing_new_and_ends_within_its_grace(tmp_path: Path) -> None:
    """A lease that nobody gives back, an upload that stands still, a stream that says nothing: none keeps it."""
    with DaemonProcess(tmp_path / "data", profile="raw", limits={"grace_s": 2, "lease_s": 60}) as daemon:
        with client_of(daemon) as client:
            assert patient(client, NAMESPACE).store(EXACT, make_layers(LAYOUT, EXACT), wait=True).durable
        with grpc.insecure_channel(daemon.listen) as channel:
            stub: Any = rpc.KVStoreStub(channel)
            identity = namespace_to_message(NAMESPACE)
            lease = stub.Fetch(
                pb.FetchRequest(namespace=identity, tokens=pack_tokens(EXACT), transport=pb.TRANSPORT_PATH)
            )
            next(lease)
            begun = stub.BeginStore(
                pb.BeginStoreRequest(namespace=identity, layout=LAYOUT.record, tokens=pack_tokens(OTHER))
            )
            assert begun.upload_id
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            daemon.signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with client_of(daemon) as client:
                answer = client.session(NAMESPACE, connect_ms=2000).fetch(EXACT)
                assert answer.reason in (Reason.UNAVAILABLE, Reason.DEADLINE, Reason.CIRCUIT_OPEN), answer
            assert daemon.process is not None
            assert daemon.process.wait(STOP_TIMEOUT_S) == 0, daemon.log_text()
        assert daemon.unfinished() == []
        daemon.start()
        assert "unclean" not in daemon.log_text() and own_tracebacks(daemon) == []
        assert os.path.exists(daemon.data_dir / "lock")
