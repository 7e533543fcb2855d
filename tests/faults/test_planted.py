"""Files that somebody else put into a data directory: no crash, no wrong byte, no memory, and a reason for each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.engine import Engine, check_directory
from tests.faults import planted
from tests.faults.test_daemon_disk import KEPT, LAYOUT, NAMESPACE, PATIENT, client_of, fetched, stored
from tests.support.daemon import DaemonProcess
from tests.support.engine import blob_paths, find, options, put
from tests.support.synthetic import assert_rows

# The bombs are of 256 MiB and more, a header of 1 MiB may become objects of some tens.
GROWTH_MIB = 96


def peak_mib(pid: int) -> int:
    """The most memory that a process has had."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) >> 10


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A directory that a daemon has served from, and the most memory that the daemon has had."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        assert stored(daemon, KEPT) and fetched(daemon, KEPT) == len(KEPT)
        daemon.restart()
        assert fetched(daemon, KEPT) == len(KEPT) and daemon.process is not None
        peak = peak_mib(daemon.process.pid)
        assert daemon.stop() == 0
        yield tmp_path / "data", peak


def require_gone(data_dir: Path, prompts: dict[str, planted.Prompt], kept: set[Path]) -> None:
    """In the blob folders is what was there before, and what only its frames give away; nothing outside was touched."""
    taken_in = {prompts[name].path(data_dir) for name in planted.TAKEN_IN}
    assert set((data_dir / "blobs.noindex").glob("*/*.safetensors")) == kept | taken_in
    assert (data_dir.with_name("outside")).read_bytes() == b"not yours"
    assert all(path.stat().st_size for path in data_dir.parent.glob("outside-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: it reads the peak of memory from /proc")
@pytest.mark.parametrize("how", ["no index", "repair by the daemon"])
def test_what_is_planted_is_never_served_and_costs_no_memory(data_dir: tuple[Path, int], how: str) -> None:
    """By a start that must rebuild the index, or by a running daemon that is asked to repair."""
    place, before_mib = data_dir
    kept = blob_paths(place)
    prompts = planted.plant_all(place, NAMESPACE)
    if how == "no index":
        shutil.rmtree(place / "index")
    with DaemonProcess(place, profile="raw") as daemon:
        assert daemon.process is not None
        with client_of(daemon) as client:
            if how != "no index":
                # The start was after an orderly stop: it looked at nothing.
                found = client.check(repair=True)["findings"]
                reasons = {each["path"] for each in found if each["kind"] in ("corrupt_blob", "unknown_format")}
                assert len(reasons) == len(prompts) - len(planted.TAKEN_IN)
            session = client.session(NAMESPACE, **PATIENT)
            for name, prompt in prompts.items():
                for representation, transport in (("packed", "path"), ("packed", "stream"), ("dense", "stream")):
                    hit = session.fetch([*prompt.tokens, 1], representation, transport)
                    assert not hit, name
                    assert str(hit.reason) in ("unknown_prefix", "corrupt", "evicted"), (name, hit.reason)
            hit = session.fetch([*KEPT, 1], "packed", "stream")
            assert hit.n_tokens == len(KEPT)
            assert_rows(hit.layers, LAYOUT, KEPT)
        assert daemon.process.poll() is None
        assert peak_mib(daemon.process.pid) - before_mib < GROWTH_MIB
        require_gone(place, prompts, kept)
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log_text()


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: ru_maxrss has another unit elsewhere")
def test_an_offline_repair_of_what_is_planted_costs_no_memory(data_dir: tuple[Path, int]) -> None:
    """`check --repair`, with its own report of every file."""
    place, _ = data_dir
    kept = blob_paths(place)

    def repair() -> tuple[dict[str, object], int]:
        command = [sys.executable, "-m", "kvstore", "check", "--repair", "--json", "--data-dir", str(place)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            report = json.loads(process.stdout.read())
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode in (0, 4)
        return report, usage.ru_maxrss >> 10

    _, before_mib = repair()
    prompts = planted.plant_all(place, NAMESPACE)
    report, after_mib = repair()
    assert after_mib - before_mib < GROWTH_MIB
    corrupt = [each for each in report["findings"] if each["kind"] == "corrupt_blob"]  # type: ignore[attr-defined]
    assert len(corrupt) == len(prompts) - len(planted.TAKEN_IN)
    with Engine.open(place, options()):
        require_gone(place, prompts, kept)
    assert check_directory(place).findings == []


@pytest.mark.parametrize("durability", ["commit", "none"])
def test_a_start_after_a_kill_and_a_stop_pass_by_what_is_planted(tmp_path: Path, durability: str) -> None:
    """The sweep unlinks what has no row, a rebuild reads all of it, a stop that syncs files waits for no pipe."""
    with Engine.open(tmp_path / "data", options(durability=durability)) as engine:
        put(engine, NAMESPACE, KEPT)
        shutil.copytree(tmp_path / "data", tmp_path / "killed")
    place = tmp_path / "killed"
    kept = blob_paths(place)
    prompts = planted.plant_all(place, NAMESPACE)
    with Engine.open(place, options(durability=durability)) as engine:
        left = {path for path in (place / "blobs.noindex").glob("*/*.safetensors") if not path.is_dir()}
        taken_in = {prompts[name].path(place) for name in planted.TAKEN_IN}
        assert left == (kept if durability == "commit" else kept | taken_in)
        assert find(engine, NAMESPACE, KEPT).n_tokens == len(KEPT) and engine.stats().degraded == ""
        for path in (place / "blobs.noindex").glob("*/*.safetensors"):
            if path.is_dir():
                path.rmdir()
        (tmp_path / "outside").unlink()
        planted.plant_all(place, NAMESPACE)


REPLACEMENTS: dict[str, Callable[[Path, Path], None]] = {
    "FIFO": lambda _, path: os.mkfifo(path),
    "symlink to the blob itself": lambda copy, path: path.symlink_to(copy),
    "symlink to a device": lambda _, path: path.symlink_to("/dev/zero"),
    "folder": lambda _, path: path.mkdir(),
}


def test_what_is_planted_in_the_place_of_a_stored_blob_is_a_miss(tmp_path: Path) -> None:
    """At once, by every way of fetching; it is put in quarantine, and the blob is stored again."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        for number, (name, plant) in enumerate(REPLACEMENTS.items()):
            assert stored(daemon, KEPT)
            path = daemon.blobs()[number % 2]
            copy = tmp_path / f"copy {number}"
            path.rename(copy)
            plant(copy, path)
            with client_of(daemon) as client:
                session = client.session(NAMESPACE, **PATIENT)
                for representation, transport in (("packed", "path"), ("packed", "stream"), ("dense", "stream")):
                    hit = session.fetch([*KEPT, 1], representation, transport)
                    assert (hit.n_tokens if hit else 0) < len(KEPT) and str(hit.reason) == "corrupt", name
                    if hit:
                        assert_rows(hit.layers, LAYOUT, KEPT[: hit.n_tokens])
            assert os.path.lexists(tmp_path / "data" / "quarantine" / path.name)
        assert stored(daemon, KEPT) and fetched(daemon, KEPT) == len(KEPT)
        assert daemon.stop() == 0 and "Traceback" not in daemon.log_text()
