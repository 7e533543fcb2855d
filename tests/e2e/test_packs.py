"""Export and import through the command line and two daemons: equal hits, kills at every step, refusals in a line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.core.blocks import pack_tokens
from kvstore.core.keys import Chain
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.daemon import SERVE, DaemonProcess, run_here
from tests.support.sessions import client_of, fetch, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=4, heads=2, width=64)
NAMESPACE = make_namespace(LAYOUT, "moved-lm")
PROMPTS = (list(range(3000)), [*range(600), *range(9000, 9400)])
# A process that is killed at one of its own system calls, after the command line's arguments began.
KILLED = """
import os, signal, sys
from kvstore.blobs import fs, pack_file
left, name = int(sys.argv.pop(1)), sys.argv.pop(1)
module = fs.Fs if hasattr(fs.Fs, name) else pack_file.os
real = getattr(module, name)
def call(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(module, name, call)
from kvstore.cli import main
main()
"""
# A daemon that stores each blob for itself and is killed before one of these commits.
KILLED_DAEMON = """
import os, signal
from kvstore.blobs import fs
from kvstore.server.storing import importer
importer.BATCH_BLOBS, left = 1, LEFT
real = fs.Fs.commit
def commit(self, work):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, work)
fs.Fs.commit = commit
"""


def filled(daemon: DaemonProcess) -> None:
    """Store the prompts."""
    with client_of(daemon) as client:
        session = patient(client, NAMESPACE)
        for tokens in PROMPTS:
            assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).durable


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that holds two sequences with a common beginning, quantized."""
    with DaemonProcess(tmp_path_factory.mktemp("source") / "data") as running:
        filled(running)
        yield running


@pytest.fixture(scope="module")
def pack(source: DaemonProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it in a file."""
    path = tmp_path_factory.mktemp("packs") / "all.kvpack"
    assert "exported 14 blobs of moved-lm" in ran(source, "export", "moved-lm", "-o", str(path))
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Another daemon, for tests that leave it empty."""
    with DaemonProcess(tmp_path_factory.mktemp("target") / "data") as running:
        yield running


def ran(daemon: DaemonProcess, *arguments: str, code: int = 0) -> str:
    """What a verb says on both outputs, after it exits with `code`; an error is one line."""
    ended = run_here(list(arguments), daemon.environ())
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert not code or ended.stderr.count("\n") == 1, ended.stderr
    return ended.stdout + ended.stderr


def summary(daemon: DaemonProcess, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The last line with --json."""
    line: dict[str, Any] = json.loads(ran(daemon, *arguments, "--json", code=code).splitlines()[0 if code else -1])
    assert line["message_type"] == "summary" and line["schema"] == 1
    return line


def hits(daemon: DaemonProcess) -> list[bytes]:
    """The bytes of what comes back of every prompt."""
    found = []
    with client_of(daemon) as client:
        session = patient(client, NAMESPACE)
        for tokens in PROMPTS:
            hit = fetch(session, [*tokens, 1])
            assert hit.n_tokens == len(tokens)
            for layer in hit.layers:
                found += [
                    bytes(memoryview(array.view(pb_dtype())))
                    for part in ("keys", "values")
                    for array in layer.part(part)
                ]
    return found


def pb_dtype() -> Any:
    """Bits of bfloat16."""
    import mlx.core as mx

    return mx.uint16


def emptied(daemon: DaemonProcess) -> None:
    """Evict everything."""
    run_here(["evict", "--all", "--yes"], daemon.environ())
    run_here(["evict", "--all"], daemon.environ())


def test_hits_are_the_same_after_a_move(source: DaemonProcess, target: DaemonProcess, pack: Path) -> None:
    """Bit by bit; a second import writes nothing; the file is readable by its owner only."""
    assert pack.stat().st_mode & 0o777 == 0o600 and [one.name for one in pack.parent.iterdir()] == [pack.name]
    done = summary(target, "import", str(pack))
    assert (done["blobs"], done["held"], done["reason"]) == (14, 0, "ok")
    assert hits(target) == hits(source)
    again = summary(target, "import", str(pack))
    assert (again["held"], again["new_bytes"]) == (14, 0)
    assert "14 were here already" in ran(target, "import", str(pack), "--namespace", "moved-lm")
    emptied(target)


def test_a_key_moves_one_sequence(source: DaemonProcess, target: DaemonProcess, tmp_path: Path) -> None:
    """Up to the block that it names."""
    key = Chain(NAMESPACE.root, pack_tokens(PROMPTS[0])).block_keys()[3].hex()
    path = tmp_path / "one.kvpack"
    assert summary(source, "export", key[:20], "-o", str(path))["blobs"] == 4
    assert summary(target, "import", str(path))["blobs"] == 4
    with client_of(target) as client:
        assert patient(client, NAMESPACE).match(PROMPTS[0]).n_tokens == 1024
    emptied(target)


def test_nothing_is_replaced_unless_told_to(source: DaemonProcess, pack: Path, tmp_path: Path) -> None:
    """A file that is there, a folder, a folder that is not there, a name that names nothing."""
    path = tmp_path / "mine"
    path.write_text("mine")
    assert "--force" in ran(source, "export", "moved-lm", "-o", str(path), code=2)
    assert path.read_text() == "mine"
    ran(source, "export", "moved-lm", "-o", str(path), "--force")
    assert path.stat().st_size == pack.stat().st_size
    assert "is a folder" in ran(source, "export", "moved-lm", "-o", str(tmp_path), code=2)
    assert "no/ is a folder" in ran(source, "export", "moved-lm", "-o", f"{tmp_path}/no/", code=2)
    said = ran(source, "export", "moved-lm", "-o", str(tmp_path / "no" / "x"), code=1)
    assert "No such file" in said and str(tmp_path / "no" / "x") in said and ".tmp" not in said
    assert "starts so" in ran(source, "export", "moved", "-o", str(tmp_path / "x"), code=1)
    assert "no key starts with 00aa00aa" in ran(source, "export", "00aa00aa", "-o", str(tmp_path / "x"), code=1)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mine"]


def test_files_that_are_damaged_or_of_another_model_change_nothing(
    source: DaemonProcess, target: DaemonProcess, pack: Path, tmp_path: Path
) -> None:
    """Each is one line that says what is wrong."""
    whole, path = pack.read_bytes(), tmp_path / "bad.kvpack"
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    cases = {
        "damaged": flipped,
        "cut short": whole[:-9],
        "not a .kvpack": b"hello",
        "version 99": whole[:8] + b"\x63" + whole[9:],
    }
    for words, content in cases.items():
        path.write_bytes(content)
        assert words in ran(target, "import", str(path), code=1)
    assert "No such file" in ran(target, "import", str(tmp_path / "no"), code=1)
    with client_of(target) as client:
        other = make_namespace(make_layout(layers=3, heads=2, width=64), "other-lm")
        patient(client, other).store([1] * 300, make_layers(other.layout, [1] * 300), wait=True)
    said = ran(target, "import", str(pack), "--namespace", "other-lm", code=2)
    assert "the weights and layout differ" in said
    assert run_here(["ls", "--json"], target.environ()).stdout.count("moved-lm") == 0
    emptied(target)


def killed(daemon: DaemonProcess, at: int, name: str, *arguments: str) -> bool:
    """Run a verb that is killed at call number `at` of a name; whether it lived to that."""
    command = [sys.executable, "-c", KILLED, str(at), name, *arguments]
    ended = subprocess.run(command, env=daemon.environ(), capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return ended.returncode != 0


@pytest.mark.parametrize(("name", "at"), [("write", 0), ("write", 9), ("fsync", 0), ("rename", 0), ("fsync_dir", 0)])
def test_a_killed_export_leaves_no_half_file(
    source: DaemonProcess, pack: Path, tmp_path: Path, name: str, at: int
) -> None:
    """The name stands for a whole file or for none, and the next export succeeds and tidies up."""
    path = tmp_path / "killed.kvpack"
    assert killed(source, at, name, "export", "moved-lm", "-o", str(path))
    assert path.exists() == (name == "fsync_dir")
    ran(source, "export", "moved-lm", "-o", str(path), "--force")
    assert [one.name for one in tmp_path.iterdir()] == [path.name] and path.stat().st_size == pack.stat().st_size
    assert source.load().calls == 0


@pytest.mark.parametrize("at", [3, 40, 60])
def test_a_killed_import_is_continued_by_another(
    source: DaemonProcess, target: DaemonProcess, pack: Path, at: int
) -> None:
    """Killed while it verifies or sends: what is stored is whole, and the rest comes with the next one."""
    assert killed(target, at, "pread", "import", str(pack))
    done = summary(target, "import", str(pack))
    assert (done["blobs"], done["reason"]) == (14, "ok")
    assert hits(target) == hits(source) and not target.unfinished()
    assert run_here(["check"], target.environ()).returncode == 0
    emptied(target)


def test_a_daemon_that_is_killed_during_an_import_goes_on(source: DaemonProcess, pack: Path, tmp_path: Path) -> None:
    """After each number of commits: no damage, no stray, and a second import writes only what is missing."""
    for left in (8,):
        program = KILLED_DAEMON.replace("LEFT", str(left)) + SERVE
        with DaemonProcess(tmp_path / f"data{left}", program=program) as daemon:
            ended = run_here(["import", str(pack)], daemon.environ())
            assert ended.returncode == 3 and ended.stderr.count("\n") == 1, ended.stderr
            again = DaemonProcess(daemon.data_dir, daemon.listen)
            with again:
                before = json.loads(run_here(["stats", "--json"], again.environ()).stdout)["disk"]["blobs"]
                done = summary(again, "import", str(pack))
                assert (done["held"], done["blobs"]) == (before, 14) and 0 < before < 14
                assert hits(again) == hits(source)
                assert run_here(["check"], again.environ()).returncode == 0


def test_an_import_stops_where_the_budget_ends(pack: Path, tmp_path: Path) -> None:
    """Exit status 1, what fits is of use, and the budget holds."""
    with DaemonProcess(tmp_path / "data", budget_bytes=1_500_000) as daemon:
        line = summary(daemon, "import", str(pack), code=1)
        assert line["reason"] == "store_full" and 0 < line["blobs"] < 14
        disk = json.loads(run_here(["stats", "--json"], daemon.environ()).stdout)["disk"]
        assert disk["used_bytes"] <= 1_500_000 and disk["blobs"] == line["blobs"]


def test_encrypted_data_is_not_exported(tmp_path: Path) -> None:
    """Nor is what belongs to a tenant; nothing is written."""
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    with DaemonProcess(tmp_path / "data", encrypt="all", encryption_key=key) as daemon:
        filled(daemon)
        said = ran(daemon, "export", "moved-lm", "-o", str(tmp_path / "x.kvpack"), code=2)
        assert "is encrypted" in said and not list(tmp_path.glob("x*"))


def test_hostile_pieces_are_refused_and_cost_nothing(target: DaemonProcess) -> None:
    """No bytes, sizes of exabytes, a header of a gigabyte, names that are paths: refused, and nothing is written."""
    cases = [
        [pb.BlobPiece()],
        [pb.BlobPiece(data=b"x")],
        [pb.BlobPiece(blob_bytes=1 << 62, data=(1 << 40).to_bytes(8, "little"))],
        [pb.BlobPiece(blob_bytes=1 << 62, data=(56).to_bytes(8, "little") + b" " * 56)],
        [pb.BlobPiece(blob_bytes=64, data=(56).to_bytes(8, "little") + b'{"__metadata__": {"../../x": 1}}'.ljust(56))],
    ]
    before = [path for path in target.files() if "index" not in path.parts]
    with grpc.insecure_channel(f"{target.listen}.admin") as channel:
        admin = rpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        for pieces in cases:
            with pytest.raises(grpc.RpcError) as found:
                admin.Import(iter(pieces), timeout=60)
            assert found.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DATA_LOSS), found.value
        for selection in (pb.ExportRequest(), pb.ExportRequest(namespace_prefix=b"a", key_prefix=b"b")):
            with pytest.raises(grpc.RpcError) as found:
                list(admin.Export(selection, timeout=60))
            assert found.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert [path for path in target.files() if "index" not in path.parts] == before
    assert os.path.exists(target.data_dir) and target.load().calls == 0
