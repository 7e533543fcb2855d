"""Several worker processes on one daemon at once, all of them short of descriptors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client.client import connect
from kvstore.config import Config
from kvstore.core.blocks import BLOCK_TOKENS, Reason, pack_tokens
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.daemon import DaemonProcess
from tests.support.servers import wait_until
from tests.support.slow_disk import SlowDisk
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=32)
NAMESPACE = make_namespace(LAYOUT)
OPEN_FILES = 256  # what launchd gives
WORKERS = 8
BLOCKS = 200
WAYS = (("packed", "path"), ("packed", "stream"), ("dense", "stream"))
SLOW = {"connect_ms": 20_000, "stall_ms": 60_000, "total_ms": 60_000}


def prompt(worker: int) -> list[int]:
    """200 blocks: the first 100 are everybody's, the rest each pair's own."""
    shared = 100 * BLOCK_TOKENS
    return [*range(shared), *range((worker // 4 + 1) * 1_000_000, (worker // 4 + 1) * 1_000_000 + shared)]


def fetching(address: str, worker: int) -> dict[str, Any]:
    """What one worker does: fetch another cut of its prompt every time, and in every way."""
    found = []
    with connect(config=Config(listen=address)) as client:
        session = client.session(NAMESPACE, **SLOW)
        tokens = prompt(worker)
        for turn in range(len(WAYS)):
            cut = tokens[: len(tokens) - 100 * turn - worker]
            hit = session.fetch(cut, *WAYS[turn])
            assert hit, hit
            assert_rows(hit.layers, LAYOUT, cut[: hit.n_tokens])
            found.append(len(cut) - hit.n_tokens)
    return {"found": found}


def storing(address: str, worker: int) -> dict[str, Any]:
    """What one worker does: store what all others store too."""
    tokens = prompt(worker)[: 20 * BLOCK_TOKENS + 40]
    layers = make_layers(LAYOUT, tokens)
    with connect(config=Config(listen=address)) as client:
        result = client.session(NAMESPACE, **SLOW).store(tokens, layers, wait=True)
    return {"stored": result.stored_tokens, "new_bytes": result.new_bytes, "durable": result.durable}


def run_workers(daemon: DaemonProcess, job: str, count: int) -> list[dict[str, Any]]:
    """Run the job in `count` processes of at most OPEN_FILES open files each, let go together."""
    # Not preexec_fn: that forks this process, with gRPC's threads in it.
    limited = ["prlimit", f"--nofile={OPEN_FILES}:{OPEN_FILES}"]
    command = [*limited, sys.executable, "-m", "tests.e2e.test_sharing", job, daemon.listen]
    with ExitStack() as stack:
        running = [
            subprocess.Popen(
                [*command, str(worker)],
                env=daemon.environ(),
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for worker in range(count)
        ]
        for process in running:
            stack.enter_context(process)
            stack.callback(process.kill)
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers: list[dict[str, Any]] = []
        for process in running:
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            answers.append(json.loads(out))
        return answers


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that can have no more open files than its workers."""
    daemon = DaemonProcess(
        tmp_path / "data", profile="raw", limits={"message_bytes_max": 8 << 20, "tokens_max": 200_000}
    )
    if (prlimit := shutil.which("prlimit")) is None:
        pytest.skip("needs prlimit (util-linux) to limit a daemon's open files")
    with daemon:
        assert daemon.process is not None
        limit = [prlimit, f"--pid={daemon.process.pid}", f"--nofile={OPEN_FILES}:{OPEN_FILES}"]
        subprocess.run(limit, check=True)
        yield daemon


def test_eight_workers_fetch_200_blocks_each_with_256_open_files(daemon: DaemonProcess) -> None:
    """Every one of them gets all but the last token, with the right values, every time."""
    with connect(daemon.listen) as client:
        session = client.session(NAMESPACE, **SLOW)
        for worker in (0, 4):
            tokens = prompt(worker)
            assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).stored_tokens == len(tokens)
        assert len(daemon.blobs()) == BLOCKS + BLOCKS // 2
        for answer in run_workers(daemon, "fetching", WORKERS):
            assert answer["found"] == [1] * len(WAYS)
        stats = client.stats()
        assert stats["requests"]["hits"] == WORKERS * len(WAYS)
        assert stats["disk"]["quarantined"] == 0
        assert "Too many open files" not in daemon.log_text()


def test_workers_that_store_the_same_at_once_write_it_once(daemon: DaemonProcess) -> None:
    """All are told that it is durable; the bytes on disk are those of one."""
    answers = run_workers(daemon, "storing", 4)
    assert [answer["stored"] for answer in answers] == [20 * BLOCK_TOKENS + 40] * 4
    assert all(answer["durable"] for answer in answers)
    assert len(daemon.blobs()) == 21
    with connect(daemon.listen) as client:
        moved = client.stats()["bytes"]
        assert moved["written"] == moved["stored"] == sum(answer["new_bytes"] for answer in answers)
    assert daemon.left_over() == []


def begin_twice(stub: Any) -> tuple[pb.BeginStoreReply, pb.BeginStoreReply]:
    """Two workers that announce the same tokens, one after the other."""
    request = pb.BeginStoreRequest(
        namespace=namespace_to_message(NAMESPACE), layout=LAYOUT.record, tokens=pack_tokens(range(600))
    )
    return stub.BeginStore(request), stub.BeginStore(request)


def commit(stub: Any, begun: pb.BeginStoreReply) -> tuple[int, str]:
    """(tokens stored, reason) of a commit's final word."""
    *_, last = stub.CommitStore(pb.CommitStoreRequest(upload_id=begun.upload_id))
    return last.stored_tokens, last.reason


def send(stub: Any, begun: pb.BeginStoreReply) -> tuple[int, str]:
    """Hand over what was asked for, and commit it."""
    stub.Upload(iter([pb.UploadChunk(upload_id=begun.upload_id, data=bytes(begun.upload_bytes))]))
    return commit(stub, begun)


def test_a_worker_is_not_asked_for_what_another_is_sending(daemon: DaemonProcess) -> None:
    """It waits for the other, and both are told that all is stored."""
    with grpc.insecure_channel(daemon.listen) as channel, ThreadPoolExecutor(1) as pool:
        stub: Any = rpc.KVStoreStub(channel)
        first, second = begin_twice(stub)
        assert (first.upload_bytes, second.upload_bytes) == (600 * LAYOUT.token_bytes, 0)
        waiting = pool.submit(commit, stub, second)
        assert send(stub, first) == waiting.result(timeout=60) == (600, Reason.OK)
    assert len(daemon.blobs()) == 3


def test_a_worker_that_waited_for_one_that_died_is_told_what_was_stored(daemon: DaemonProcess) -> None:
    """Nothing, here; it may store again, and is then asked for everything."""
    with grpc.insecure_channel(daemon.listen) as channel, ThreadPoolExecutor(1) as pool:
        stub: Any = rpc.KVStoreStub(channel)
        first, second = begin_twice(stub)
        waiting = pool.submit(commit, stub, second)
        cut_off = iter([pb.UploadChunk(upload_id=first.upload_id, data=bytes(1000))])
        with pytest.raises(grpc.RpcError):
            stub.Upload(cut_off)
        assert waiting.result(timeout=60) == (0, Reason.DEPENDENCY_LOST)
        third, _ = begin_twice(stub)
        assert third.upload_bytes == 600 * LAYOUT.token_bytes
    assert daemon.blobs() == []


def test_a_worker_waits_as_long_as_the_daemon_writes_what_another_sent(tmp_path: Path) -> None:
    """Far longer than a silent worker is waited for: an upload on a slow disk is no dead one."""
    idle_s = 6
    with (
        SlowDisk(tmp_path / "data", limits={"upload_idle_s": idle_s}, profile="raw") as daemon,
        grpc.insecure_channel(daemon.listen) as channel,
        ThreadPoolExecutor(2) as pool,
    ):
        stub: Any = rpc.KVStoreStub(channel)
        first, second = begin_twice(stub)
        daemon.hold("fsync")
        sending = pool.submit(send, stub, first)
        try:
            daemon.await_held("fsync")
            waiting = pool.submit(commit, stub, second)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=2 * idle_s)
        finally:
            daemon.release("fsync")
        assert sending.result(timeout=60) == waiting.result(timeout=60) == (600, Reason.OK)


def test_a_worker_that_waits_for_another_no_longer_takes_no_place(daemon: DaemonProcess) -> None:
    """Else workers that offer the same again and again take all places, as long as a slow upload lives."""
    with grpc.insecure_channel(daemon.listen) as channel, connect(daemon.listen) as client:
        stub: Any = rpc.KVStoreStub(channel)
        first, second = begin_twice(stub)
        call = stub.CommitStore(pb.CommitStoreRequest(upload_id=second.upload_id))
        assert next(call).reason == Reason.OK
        call.cancel()
        wait_until(lambda: client.stats()["load"]["uploads"] == 1, 30, lambda: "it still has a place")
        assert send(stub, first) == (600, Reason.OK)


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps({"fetching": fetching, "storing": storing}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))))
