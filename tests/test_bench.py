"""The bench: the runner, and every sub-verb at a tiny size with a daemon of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from kvstore.bench import concurrency, hard_model
from kvstore.bench.bare import bare_server
from kvstore.bench.cases import BenchError, Case, Measured, Report, measure
from kvstore.bench.scratch import ScratchDaemon
from kvstore.bench.shape import Shape, arrays_of, load, save
from kvstore.cli.app import cli
from kvstore.cli.bench import command
from kvstore.codecs.profiles import PROFILES
from kvstore.core import limits
from kvstore.errors import ConfigError, InvalidRequestError, UnavailableError
from tests.bench import store
from tests.support.limits import NAMES, OPEN_DEADLINES
from tests.support.models import write_tiny

TINY = ("--layers", "2", "--kv-heads", "2", "--head-dim", "64", "--seq-len", "300", "--rounds", "2")
SHAPE = Shape(2, 2, 64, 300, "bf16")


def invoke(*args: str) -> Result:
    """Run a sub-verb in this process; the daemon is in one of its own."""
    return CliRunner().invoke(cli, ["bench", *args])


def answer(*args: str) -> dict[str, Any]:
    """The JSON of a bench that succeeds, with what all of them promise."""
    result = invoke(*args, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    assert next(iter(found)) == "schema"
    assert found["bench"] == args[0]
    assert found["machine"]["cpus"] >= 1
    rows = {row["name"]: row for row in found["cases"]}
    for row in rows.values():
        assert 0 < row["p50_s"] <= row["p90_s"] <= row["p99_s"] <= row["max_s"]
        assert (row["bytes_per_s"] > 0) == (row["nbytes"] > 0)
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(row["p50_s"] / rows[row["ceiling"]]["p50_s"])
    return {**found, "cases": rows}


@pytest.fixture(autouse=True)
def leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a bench puts into the temporary directory is gone afterwards."""
    scratch = tmp_path / "t"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    yield
    assert list(scratch.iterdir()) == []


def test_cases_take_turns_and_warm_ups_do_not_count() -> None:
    """Forwards and backwards; `before` and `after` around each run, and what a run returns as seconds is believed."""
    seen: list[str] = []
    cases = [
        Case("a", lambda: seen.append("a"), before=lambda: seen.append("<"), after=lambda: seen.append(">")),
        Case("b", lambda: seen.append("b") or 2.5, "a"),
    ]
    a, b = measure(cases, rounds=3)
    assert "".join(seen) == "<a>b" + "b<a>" + "<a>b" + "b<a>"
    assert (len(a.seconds), b.seconds) == (3, (2.5, 2.5, 2.5))


def test_percentiles_are_times_that_were_measured() -> None:
    """The smallest that the share does not pass."""
    one = Measured(Case("a", lambda: None), tuple(float(n) for n in range(100, 0, -1)))
    assert [one.percentile(share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert Measured(one.case, (7.0,)).percentile(0.5) == 7


def test_a_ratio_is_between_medians() -> None:
    """Null without a ceiling."""
    a = Measured(Case("a", lambda: None), (1.0, 2.0, 9.0))
    b = Measured(Case("b", lambda: None, "a", nbytes=12), (9.0, 6.0, 1.0))
    rows = Report("x", {}, (a, b)).rows()
    assert [(row["ratio"], row["bytes_per_s"]) for row in rows] == [(None, 0), (3.0, 2.0)]


def test_cases_must_be_told_apart_and_their_ceilings_be_there() -> None:
    """A mistake in a bench, not in what it measures."""
    one = Case("a", lambda: None)
    with pytest.raises(AssertionError):
        measure([one, one], 1)
    with pytest.raises(AssertionError):
        measure([Case("b", lambda: None, "a")], 1)


def test_a_file_holds_the_arrays_of_a_shape(tmp_path: Path) -> None:
    """In order and bit for bit, as many bytes as the layout says, every layer another."""
    arrays = arrays_of(SHAPE.kv())
    assert save(tmp_path / "x.safetensors", arrays) == SHAPE.nbytes
    again = load(tmp_path / "x.safetensors")
    assert [(a == b).all().item() for a, b in zip(arrays, again, strict=True)] == [True] * 4
    assert not (arrays[0] == arrays[1]).all().item()


def test_the_bare_server_hands_out_as_many_bytes_as_asked_for() -> None:
    """Also such that are no multiple of a chunk, and none."""
    with bare_server() as bare:
        bare.empty(bytes(1000))
        for nbytes in (0, 5, (1 << 20) + 1):
            assert sum(map(len, bare.chunks(nbytes))) == nbytes


def test_a_scratch_daemon_is_gone_with_its_directory() -> None:
    """It answers, starts again over the same data, and leaves neither process nor files."""
    with ScratchDaemon() as daemon:
        with daemon.client() as client:
            assert client.stats()["daemon"]["pid"] == daemon.pid
        first = daemon.pid
        daemon.stop()
        assert daemon.start() > 0
        assert daemon.pid != first
        folder = daemon.folder
    assert not folder.exists()
    with daemon.client() as client, pytest.raises(UnavailableError):
        client.stats()


def test_transport_is_beside_memcpy_read_and_bare_stream() -> None:
    """Both ways of handing over."""
    rows = answer("transport", *TINY)["cases"]
    assert rows["fetch by path"]["ceiling"] == "plain read of one file"
    assert rows["fetch by stream"]["ceiling"] == "bare gRPC stream"
    assert {row["nbytes"] for row in rows.values()} == {SHAPE.nbytes}


def test_fetch_is_beside_loads_without_a_store_and_draws_a_plot(tmp_path: Path) -> None:
    """Packed and dense, raw and 8-bit; the same numbers as a picture."""
    pytest.importorskip("matplotlib")
    found = answer("fetch", *TINY, "--plot", str(tmp_path / "x.svg"))
    assert found["cases"]["8-bit, dense, stream"]["ceiling"] == "8-bit, packed, path"
    assert 0.5 < found["facts"]["affine8 bytes stored / raw"] < 0.7
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_store_tells_blocked_from_durable_and_what_a_second_conversation_adds() -> None:
    """Nothing is stored twice: each round has tokens of its own."""
    found = answer("store", *TINY)
    assert {"memcpy", "raw, blocked", "raw, durable", "8-bit, durable"} <= found["cases"].keys()
    assert 1.0 < found["facts"]["raw, durable: bytes on disk / raw"] < 1.1
    assert found["facts"]["second conversation: bytes on disk / bytes that are new"] > 0


def test_match_finds_whole_prompts_in_the_engine_and_over_rpc() -> None:
    """In every index; and how long a start takes."""
    rows = answer("match", *TINY, "--rows", "4,60")["cases"]
    assert rows["engine, 60 rows"]["ceiling"] == "hashing alone"
    assert rows["RPC, 4 rows"]["ceiling"] == "empty RPC"
    assert "open to serving, 60 rows" in rows


def test_match_refuses_sizes_that_hold_no_prompt() -> None:
    """And what is no list of numbers."""
    assert "are needed" in invoke("match", *TINY, "--rows", "1").stderr
    assert invoke("match", *TINY, "--rows", "many").exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_verb_that_is_ended_by_a_signal_takes_its_scratch_daemon_along(number: signal.Signals) -> None:
    """A closed terminal or a timeout leaves neither process nor files, as Ctrl-C does."""
    lines = (
        "import signal, time",
        "from kvstore.bench.scratch import ScratchDaemon",
        f"signal.signal({int(number)}, signal.SIG_DFL)",
        "with ScratchDaemon() as daemon:",
        "    print(daemon.pid, daemon.folder, flush=True)",
        "    while True:",
        "        time.sleep(0.1)",  # a signal just before a long sleep would be seen at its end
    )
    verb = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True)
    assert verb.stdout is not None
    with verb.stdout as said:
        pid, folder = said.readline().split()
    try:
        verb.send_signal(number)
        assert verb.wait(60) == 128 + number
        assert not Path(folder).exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
        verb.kill()


def test_a_scratch_daemon_whose_stop_is_interrupted_is_gone_with_its_directory() -> None:
    """By Ctrl-C twice: the second one comes while the first one's end waits for a daemon that does not stop."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise TimeoutError

    with ScratchDaemon() as daemon:
        pid = daemon.pid
        os.kill(pid, signal.SIGSTOP)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(TimeoutError):
                daemon.__exit__()
        finally:
            signal.signal(signal.SIGALRM, before)
        assert not daemon.folder.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_is_interrupted_as_it_starts_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to go on, ask a daemon that had gone, and print a traceback."""
    started: list[Any] = []

    def interrupted(worker: Any) -> NoReturn:
        started.append(worker)
        raise KeyboardInterrupt

    closed: list[Any] = []
    close = concurrency.Worker.close
    monkeypatch.setattr(concurrency.Worker, "seconds", interrupted)
    monkeypatch.setattr(concurrency.Worker, "close", lambda worker: (closed.append(worker), close(worker)))
    with pytest.raises(KeyboardInterrupt):
        concurrency.Worker(concurrency.WorkerJob("unix:/nowhere", SHAPE, "raw", 0))
    assert closed == started


def test_match_of_a_daemon_in_use_leaves_nothing_in_it() -> None:
    """Only prompts that it does not know."""
    with ScratchDaemon() as daemon, daemon.client() as client:
        rows = answer("match", *TINY, "--address", daemon.config.listen)["cases"]
        assert rows["Match, unknown namespace"]["ceiling"] == "empty RPC"
        assert client.stats()["disk"]["blobs"] == 0


def test_concurrency_measures_workers_and_health() -> None:
    """Worker processes end with the bench."""
    found = answer("concurrency", *TINY, "--workers", "2")
    assert found["cases"]["2 workers"]["nbytes"] == 2 * SHAPE.nbytes
    assert found["facts"]["slowest / fastest worker, worst round"] >= 1
    assert "health check meanwhile" in found["cases"]


def test_a_worker_that_ends_is_an_error_and_not_a_wait() -> None:
    """Its sequence was never stored."""
    with pytest.raises(BenchError), ScratchDaemon() as daemon:
        concurrency.Worker(concurrency.WorkerJob(daemon.config.listen, SHAPE, "raw", 0))


def test_ttft_restores_the_prompt_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold, with the store, and by a new connection to a daemon that was restarted."""
    patient = {name: value for name, value in OPEN_DEADLINES.items() if name in NAMES}
    monkeypatch.setattr(limits, "DEFAULT", replace(limits.DEFAULT, **patient))
    monkeypatch.setenv("KVSTORE_FETCH_TOTAL_MS", str(OPEN_DEADLINES["fetch_total_ms"]))
    model = write_tiny(tmp_path / "tiny")
    found = answer("ttft", "--model", str(model), "--seq-len", "300", "--rounds", "1")
    assert found["cases"].keys() == {"cold", "with the store", "after a restart"}
    assert found["facts"]["tokens restored / prompt"] == pytest.approx(299 / 300)
    assert "no model" in invoke("ttft", "--model", str(tmp_path / "none")).stderr


def test_a_bench_that_is_told_to_end_takes_its_daemon_along(tmp_path: Path) -> None:
    """SIGTERM in the middle of it: no process and no directory is left."""
    environ = {**os.environ, "TMPDIR": str(tmp_path / "t")}
    command_line = [sys.executable, "-m", "kvstore", "bench", "transport", *TINY, "--rounds", "100000"]
    with subprocess.Popen(command_line, env=environ, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "t").glob("kvs-*/plain.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)
        [lock] = (tmp_path / "t").glob("kvs-*/s.lock")
        daemon_pid = int(lock.read_text())
        process.terminate()
    assert process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(daemon_pid, 0)


def test_people_get_a_table() -> None:
    """With the ratio and what it is to."""
    text = invoke("transport", *TINY).stdout
    assert "fetch by stream" in text
    assert " x bare gRPC stream" in text


@pytest.mark.parametrize(
    "verb", [verb for verb in command.commands if verb not in ("match", "ttft", "codec", "quality", "eviction")]
)
def test_a_daemon_in_use_is_not_written_to(verb: str) -> None:
    """A usage error before anything is started."""
    result = invoke(verb, *TINY, "--address", "unix:/nowhere")
    assert (result.exit_code, "only `bench match`" in result.stderr) == (2, True)


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the name of the extra."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(ScratchDaemon, "start", lambda self: pytest.fail("a daemon was started"))
    result = invoke("fetch", *TINY, "--plot", str(tmp_path / "x.svg"))
    assert (result.exit_code, "kvstore[plot]" in result.stderr) == (2, True)


def test_a_plot_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """ConfigError with the path."""
    plot = pytest.importorskip("kvstore.bench.plot")
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError):
        plot.plot(Report("x", {}, (Measured(Case("a", lambda: None), (1.0,)),)), tmp_path / "no" / "x.svg")


def test_every_sub_verb_has_help_and_the_common_options() -> None:
    """As every verb."""
    assert isinstance(command, click.Group)
    for verb, sub in command.commands.items():
        flags = {flag for param in sub.params for flag in param.opts}
        assert {"--json", "--address", "--config"} <= flags, verb
        assert {"--rounds", "--plot"} <= flags or verb in ("quality", "eviction"), "every other one is timed"
        assert sub.help


def test_codec_tells_bytes_errors_and_times_of_every_profile() -> None:
    """Over sweeps too; what loses nothing has no error, and fewer bits have more of it."""
    found = answer_rows(
        "--layers", "1", "--heads", "2", "--head-dim", "64,128", "--seq-len", "300", "--dtype", "bfloat16"
    )
    assert {row["head_dim"] for row in found} == {64, 128}
    rows = {row["profile"]: row for row in found if row["head_dim"] == 128}
    assert {"raw", "affine8", "affine4", *PROFILES} == set(rows)
    assert rows["raw"]["of_dtype"] == 1 and rows["raw"]["of_float32"] == 0.5
    for name in ("raw", "exact"):
        assert rows[name]["max_error"] == 0
    errors = [rows[name]["mean_error"] for name in ("exact", "safe", "balanced", "compact", "tiny")]
    assert errors == sorted(errors)
    sizes = [rows[name]["nbytes"] for name in ("exact", "safe", "balanced", "compact", "tiny")]
    assert sizes == sorted(sizes, reverse=True)
    assert all(row["encode_s"] > 0 and row["decode_s"] > 0 and row["decode_peak_bytes"] > 0 for row in found)


def answer_rows(*args: str) -> list[dict[str, Any]]:
    """The rows of `bench codec --json`."""
    result = invoke("codec", *args, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    rows: list[dict[str, Any]] = json.loads(result.stdout)["rows"]
    return rows


def test_token_ids_may_come_from_files_of_numpy(tmp_path: Path) -> None:
    """For `bench quality` and `calibrate`; a file that has none is a sentence."""
    np.save(tmp_path / "ids.npy", np.array([[1, 2], [3, 4]], np.uint16))
    (tmp_path / "text.npy").write_text("no numbers")
    assert hard_model.tokens_of(None, [str(tmp_path / "ids.npy")], lambda paths: "") == [1, 2, 3, 4]
    for name in ("text.npy", "none.npy"):
        with pytest.raises(InvalidRequestError, match="token ids cannot be read"):
            hard_model.tokens_of(None, [str(tmp_path / name)], lambda paths: "")


def test_the_bench_of_stores_measures_every_figure_that_has_a_bar(tmp_path: Path) -> None:
    """At a tiny size, and with the flag that leaves so much memory and no more."""
    arguments = ["--seq-len", "256", "--rounds", "1", "--profile", "raw", "--available-gib", "1e6"]
    environ = {**os.environ, "BENCH_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, store.__file__, *arguments], env=environ, capture_output=True, text=True, check=False
    )
    assert ran.returncode in (0, 1), ran.stderr  # 1: a bar is missed, as it may be at this size
    untraced = {figure for figure, _, _ in store.BARS if not figure.startswith("traced")}
    assert {figure for figure in untraced if figure in ran.stdout} == untraced
