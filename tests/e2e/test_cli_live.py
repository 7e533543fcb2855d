"""The command line against a live daemon, and against none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.client.client import Client, connect
from kvstore.config import KEYS
from kvstore.core.blocks import Reason
from tests.support.daemon import DaemonProcess, run_cli, run_here
from tests.support.limits import small_config
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT, "small-lm")
TOKENS = list(range(700))
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}
SERVICES = {"kvstore.v1.KVStore", "kvstore.v1.Admin", "grpc.health.v1.Health"}


def client_of(daemon: DaemonProcess) -> Client:
    """A client of this daemon."""
    return connect(config=small_config(daemon.listen))


def fill(daemon: DaemonProcess) -> None:
    """Store TOKENS: two full blocks and a tail."""
    with client_of(daemon) as client:
        assert client.session(NAMESPACE, **SLOW).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with three blocks, for tests that only look."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data") as running:
        fill(running)
        yield running


def said(daemon: DaemonProcess, *arguments: str, code: int = 0) -> str:
    """What a verb prints, after it exits with `code`: a process of its own."""
    return _of(run_cli(list(arguments), daemon.environ()), code)


def _of(ended: subprocess.CompletedProcess[str], code: int) -> str:
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout


def answered(daemon: DaemonProcess, *arguments: str, code: int = 0) -> dict[str, Any]:
    """What a verb answers with --json, in this process: one object with a schema."""
    answer: dict[str, Any] = json.loads(_of(run_here([*arguments, "--json"], daemon.environ()), code))
    assert answer["schema"] == 1 and next(iter(answer)) == "schema"
    return answer


def test_stats_tell_of_daemon_disk_and_traffic(daemon: DaemonProcess) -> None:
    """For programs with every field of the contract, for people as a table."""
    stats = answered(daemon, "stats")
    assert daemon.process is not None
    assert stats["daemon"]["pid"] == daemon.process.pid and stats["daemon"]["state"] == "serving"
    assert {"used_bytes", "budget_bytes", "free_bytes", "blobs", "quarantined"} <= stats["disk"].keys()
    assert stats["disk"]["blobs"] == 3 and stats["tokens"]["stored"] == 700
    assert {"match", "fetch", "store", "hits", "partial_hits", "misses"} == stats["requests"].keys()
    assert stats["bytes"].keys() == {"logical", "stored", "written", "served"}
    (row,) = stats["namespaces"]
    assert (row["id"], row["alias"], row["tokens"]) == (NAMESPACE.root.hex(), "small-lm", 700)
    text = said(daemon, "stats")
    assert "small-lm" in text and "3 blobs" in text and daemon.listen in text


def test_ls_lists_sequences_and_blocks_of_all_and_of_one(daemon: DaemonProcess) -> None:
    """By alias, or leading digits of its id."""
    found = answered(daemon, "ls")
    (namespace,), (one,) = found["namespaces"], found["sequences"]
    short = namespace["id"][:12]
    assert (one["label"], one["tokens"], one["own_bytes"]) == ("small-lm", 700, one["bytes"])
    assert one["key"][:12] in said(daemon, "ls") and one["key"][:12] in said(daemon, "ls", "small-lm")
    blocks = answered(daemon, "ls", short, "--blocks")["blocks"]
    assert answered(daemon, "ls", "--blocks")["blocks"] == blocks
    every = said(daemon, "ls", "--blocks")
    assert all(block["key"][:12] in every for block in blocks) and every.count("small-lm") == 3
    assert sorted((block["start"], block["n_tokens"]) for block in blocks) == [(0, 256), (256, 256), (512, 188)]
    table = said(daemon, "ls", short, "--blocks")
    assert all(block["key"][:12] in table for block in blocks)
    assert answered(daemon, "ls", short, "--blocks", "--limit", "1")["truncated"] is True
    for name in ("ffff", "other-lm"):
        assert said(daemon, "ls", name, code=1) == said(daemon, "show", name, code=1) == ""
        assert said(daemon, "evict", "--namespace", name, code=1) == ""
    assert said(daemon, "evict", "--prefix", "ffffffff", "--dry-run", code=1) == ""


def test_show_tells_all_about_a_block(daemon: DaemonProcess) -> None:
    """The file among it, which is there."""
    key = answered(daemon, "ls", NAMESPACE.root.hex()[:12], "--blocks")["blocks"][0]["key"]
    (block,) = answered(daemon, "show", key)["blocks"]
    assert block["key"] == key and Path(block["path"]) in daemon.blobs()
    assert block["bytes"] == Path(block["path"]).stat().st_blocks * 512
    text = said(daemon, "show", key[:12])
    assert key in text and block["path"] in text and "affine" in text
    assert said(daemon, "show", "ffffffffffff", code=1) == ""


def test_check_of_a_sound_store_finds_nothing(daemon: DaemonProcess) -> None:
    """Exit 0; by the daemon, while it serves."""
    report = answered(daemon, "check")
    assert (report["offline"], report["blobs"], report["findings"]) == (False, 3, [])
    assert "no damage; read 3 blobs" in said(daemon, "check")


def test_a_dry_eviction_is_told_and_harmless(daemon: DaemonProcess) -> None:
    """For programs and for people."""
    report = answered(daemon, "evict", "--all", "--dry-run")
    assert (report["dry_run"], report["blocks"]) == (True, 3)
    assert f"{report['freed_bytes']} bytes" in said(daemon, "evict", "--all", "--dry-run")
    assert len(daemon.blobs()) == 3


def test_config_show_names_every_key_and_where_it_came_from(daemon: DaemonProcess) -> None:
    """Here: variables of the environment, and defaults."""
    shown = answered(daemon, "config", "show")["keys"]
    assert shown.keys() == KEYS.keys()
    assert shown["data_dir"] == {**shown["data_dir"], "value": str(daemon.data_dir), "source": "KVSTORE_DATA_DIR"}
    assert shown["log_level"]["source"] == "default"
    text = said(daemon, "config", "show")
    assert all(key in text for key in KEYS)


def test_an_address_given_by_hand_is_asked(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Also as a bare path, and over what is configured."""
    elsewhere = DaemonProcess(tmp_path / "data")
    for address in (daemon.listen, daemon.listen.removeprefix("unix:")):
        assert answered(elsewhere, "stats", "--address", address)["disk"]["blobs"] == 3


def test_the_daemon_says_which_settings_are_in_force(daemon: DaemonProcess) -> None:
    """Its own, and what was set since; automatic ones as numbers, and the configuration here beside them."""
    keys = answered(daemon, "config", "show", "--effective")["keys"]
    assert list(keys) == list(KEYS)
    place = {"value": str(daemon.data_dir), "source": "KVSTORE_DATA_DIR", "here": None, "unit": "path"}
    assert keys["data_dir"] == place
    said(daemon, "set", "daemon", "free_floor_bytes=0")
    floor = answered(daemon, "config", "show", "--effective", "--changed")["keys"]["free_floor_bytes"]
    assert (floor["source"], floor["here"]) == ("automatic", 1) and floor["value"] >= 20 * 10**9
    said(daemon, "set", "daemon", "free_floor_bytes=1")
    assert answered(daemon, "config", "show", "--effective")["keys"]["free_floor_bytes"]["source"] == "kvstore set"


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["stats", "--frobnicate"],
        ["show"],
        ["set", "daemon", "budget_bytes"],
        ["stats", "--watch", "--prometheus"],
        ["evict"],
        ["evict", "--all", "--bytes", "1GB"],
        ["evict", "--idle", "soon"],
        ["ls", "--limit", "0"],
        ["stats", "--address", "nonsense"],
        ["check", "--data-dir", "/tmp", "--address", "unix:/tmp/x"],
    ],
)
def test_wrong_usage_is_exit_2_and_asks_no_daemon(daemon: DaemonProcess, arguments: list[str]) -> None:
    """What was wrong goes to stderr."""
    ended = run_cli(arguments, daemon.environ())
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("kvstore: ") and "Traceback" not in ended.stderr


def test_a_data_directory_that_a_daemon_holds_is_exit_5_offline(daemon: DaemonProcess) -> None:
    """The check of a directory by hand must not meet a writer."""
    ended = run_cli(["check", "--data-dir", str(daemon.data_dir)], daemon.environ())
    assert daemon.process is not None
    assert ended.returncode == 5 and f"pid {daemon.process.pid}" in ended.stderr


@pytest.mark.parametrize("verb", [["stats"], ["ls"], ["config", "show"], ["check"]])
def test_colour_is_for_terminals_and_no_color_is_heeded(daemon: DaemonProcess, verb: list[str]) -> None:
    """On a terminal of its own, made by `script`; never in a pipe."""
    assert "\x1b[" not in said(daemon, *verb)
    if (script := shutil.which("script")) is None or sys.platform != "linux":
        pytest.skip("needs util-linux `script` to lend a terminal")
    command = [script, "-qec", f"{sys.executable} -m kvstore {' '.join(verb)}", "/dev/null"]
    environ = {**daemon.environ(), "TERM": "xterm-256color"}
    environ.pop("NO_COLOR", None)
    for variables, coloured in (({}, verb == ["stats"]), ({"NO_COLOR": "1"}, False)):
        ended = subprocess.run(command, env={**environ, **variables}, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout
        colours = re.findall(r"\x1b\[(?:3[0-9]|38;|9[0-7])[0-9;]*m", ended.stdout)
        assert not colours or not variables
        assert bool(re.search(r"\x1b\[[0-9;]*m", ended.stdout)) or not coloured


def test_health_and_reflection_answer_on_the_socket(daemon: DaemonProcess) -> None:
    """Standard tools can ask what there is, and each service says that it serves."""
    with grpc.insecure_channel(daemon.listen) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "kvstore.v1.KVStore", "kvstore.v1.Admin"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = reflection.ServerReflectionInfo(iter([ask]), timeout=60)
        assert {service.name for service in listed.list_services_response.service} >= SERVICES
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvstore.v1.KVStore")
        (found,) = reflection.ServerReflectionInfo(iter([ask]), timeout=60)
        assert found.file_descriptor_response.file_descriptor_proto


def test_serve_says_in_json_what_it_serves(tmp_path: Path) -> None:
    """One object, at once, for whoever starts it."""
    daemon = DaemonProcess(tmp_path / "data")
    command = [sys.executable, "-m", "kvstore", "serve", "--create", "--json"]
    with daemon.log_path.open("ab") as log:
        daemon.process = subprocess.Popen(command, env=daemon.environ(), stdout=subprocess.PIPE, stderr=log)
    try:
        daemon.wait_serving()
        assert daemon.stop() == 0
        assert daemon.process.stdout is not None
        said = json.loads(daemon.process.stdout.read())
        daemon.process.stdout.close()
        want = {"schema": 1, "pid": daemon.process.pid, "listen": daemon.listen, "data_dir": str(daemon.data_dir)}
        assert said == want
    finally:
        daemon.kill()


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon in whose second block one byte of KV is flipped."""
    with DaemonProcess(tmp_path / "data") as running:
        fill(running)
        blocks = answered(running, "ls", NAMESPACE.root.hex()[:12], "--blocks")["blocks"]
        flip_last_byte(Path(next(block["path"] for block in blocks if block["start"] == 256)))
        yield running


def flip_last_byte(path: Path) -> None:
    """Damage a blob as a failing disk would."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def test_check_finds_a_flipped_byte_and_changes_nothing(damaged: DaemonProcess) -> None:
    """Exit 4, the file named, the way on named."""
    report = answered(damaged, "check", code=4)
    assert [one["kind"] for one in report["findings"]] == ["corrupt_blob"]
    assert Path(report["findings"][0]["path"]) in damaged.blobs()
    ended = run_cli(["check"], damaged.environ())
    assert ended.returncode == 4
    assert "corrupt_blob" in ended.stdout and "check --repair" in ended.stderr
    assert len(damaged.blobs()) == 3


def test_check_repair_quarantines_what_is_damaged(damaged: DaemonProcess) -> None:
    """With all after it, which nothing can reach any more; then all is well."""
    repaired = answered(damaged, "check", "--repair", code=4)
    assert repaired["repaired"] >= 1 and (repaired["blobs"], repaired["removed"]) == (2, 2)
    assert len(damaged.blobs()) == 1 and len(damaged.files("quarantine")) == 1
    (name,) = re.findall(r"WARNING blob (\S+) is taken out of use, with all after it: corrupt_blob", damaged.log_text())
    assert damaged.files("quarantine")[0].name.startswith(name)
    assert answered(damaged, "check")["findings"] == []
    assert answered(damaged, "stats")["disk"]["quarantined"] == 1
    with client_of(damaged) as client:
        hit = client.session(NAMESPACE, **SLOW).fetch(TOKENS)
        assert (hit.n_tokens, hit.reason) == (256, Reason.CORRUPT)
        assert_rows(hit.layers, LAYOUT, TOKENS[:256], bits=8)


def test_check_repair_rebuilds_a_lost_index_when_no_daemon_runs(tmp_path: Path) -> None:
    """From the headers of the blobs: everything is served again."""
    with DaemonProcess(tmp_path / "data") as daemon:
        fill(daemon)
        assert daemon.stop() == 0
        shutil.rmtree(daemon.data_dir / "index")
        found = answered(daemon, "check", code=4)
        assert found["offline"] is True
        assert sorted({one["kind"] for one in found["findings"]}) == ["row"]
        repaired = answered(daemon, "check", "--repair", code=4)
        assert repaired["repaired"] == 4  # the index itself, and three rows
        assert answered(daemon, "check")["findings"] == []
        daemon.start()
        with client_of(daemon) as client:
            hit = client.session(NAMESPACE, **SLOW).fetch(TOKENS)
            assert hit.n_tokens == 699
            assert_rows(hit.layers, LAYOUT, TOKENS[:-1], bits=8)
            assert client.stats()["namespaces"][0]["alias"] == "small-lm"


def test_a_check_without_daemon_and_directory_names_both(tmp_path: Path) -> None:
    """Nothing is created by looking."""
    absent = DaemonProcess(tmp_path / "data")
    ended = run_cli(["check"], absent.environ())
    assert ended.returncode == 1
    assert absent.listen in ended.stderr and str(absent.data_dir) in ended.stderr
    assert not absent.data_dir.exists()
