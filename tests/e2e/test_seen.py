"""What people see of a real daemon: its log, `stats`, `doctor`, `set`; and counters that outlive a kill."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.blocks import Reason
from kvstore.telemetry.lifetime import FILE
from tests.e2e.test_cli_live import LAYOUT, NAMESPACE, SLOW, TOKENS, answered, client_of, fill, said
from tests.support.daemon import SERVE, DaemonProcess, run_cli, run_here
from tests.support.servers import wait_until
from tests.support.synthetic import make_layers

LIFETIME = Path("settings") / FILE


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon with three blocks."""
    with DaemonProcess(tmp_path / "data") as running:
        fill(running)
        yield running


def ask(daemon: DaemonProcess) -> None:
    """A whole hit, a hit of what two prompts share, a miss, and a miss that only matched; the speed is known."""
    with client_of(daemon) as client:
        session = client.session(NAMESPACE, **SLOW)
        session.computes(10.0)
        wait_until(lambda: bool(client.stats()["namespaces"][0]["prefill_tokens_per_s"]), 30, daemon.log_text)
        assert session.fetch([*TOKENS, 1]).n_tokens == 700
        assert session.fetch([*TOKENS[:300], *range(400)]).reason is Reason.UNKNOWN_PREFIX
        assert not session.fetch([5] * 500) and not session.match([6] * 500)

        def is_counted() -> bool:
            # Of a hit by path the worker says when it is read; a match counts when no fetch has followed.
            since = client.stats()["since_start"]
            return bool(since["saved_s"] > 50 and since["misses"] == 2)

        wait_until(is_counted, 30, daemon.log_text)


def test_stats_tell_what_was_served_and_saved_and_what_kept_more_from_it(daemon: DaemonProcess) -> None:
    """A hit of all that is shared is whole; matches count; what was not needed is not among what was refused."""
    ask(daemon)
    with client_of(daemon) as client:
        again = client.session(NAMESPACE, **SLOW).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)
        assert again.reason is Reason.ALREADY_STORED
    stats = answered(daemon, "stats")
    want = {"hits": 2, "shortened": 0, "misses": 2, "prompt_tokens": 2401, "hit_tokens": 1000, "stored_tokens": 700}
    for scope in ("since_start", "last_hour", "lifetime"):
        assert {name: stats[scope][name] for name in want} == want, scope
        assert 50 < stats[scope]["saved_s"] < 100, "a hundred seconds of prefill, less what the fetches took"
    assert (stats["miss_reasons"], stats["shortened_reasons"]) == ({"unknown_prefix": 2}, {})
    assert (stats["requests"]["hits"], stats["requests"]["partial_hits"]) == (2, 0)
    assert stats["since_start"]["reused_bytes"] == stats["since_start"]["written_bytes"] > 0
    (row,) = stats["namespaces"]
    assert row["traffic"]["hit_tokens"] == 1000 and row["prefill_tokens_per_s"] == 10
    asking = next(one for one in stats["sessions"] if one["traffic"]["hits"])
    assert asking["alias"] == "small-lm" and asking["pid"] > 0 and asking["last_hit_s"] > 0
    text = said(daemon, "stats")
    saved = f"{stats['lifetime']['saved_s']:.1f} s"
    for words in ("41.6 %", saved, "no stored prompt begins so", "stores not needed since start", "small-lm"):
        assert words in text, text
    assert "stores refused" not in text and "hits that were shortened" not in text


def test_scrapers_read_over_loopback_what_stats_prints(daemon: DaemonProcess) -> None:
    """In tokens, with the model as a label; a restart begins at 0. Off by default."""
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    daemon.restart(metrics_listen=f"localhost:{port}")
    ask(daemon)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        scraped = answer.read().decode()
    label = f'model="small-lm",namespace="{NAMESPACE.root.hex()[:12]}"'
    for text in (scraped, said(daemon, "stats", "--prometheus")):
        assert f"kvstore_prompt_tokens_total{{{label}}} 2401.0\n" in text
        assert f'kvstore_hit_tokens_total{{{label},tier="disk"}} 1000.0\n' in text
        assert 'kvstore_miss_total{reason="unknown_prefix"} 2.0\n' in text
        assert "kvstore_fetch_seconds_count 2.0\n" in text and "kvstore_serving 1.0\n" in text
    daemon.restart()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        assert 'kvstore_requests_total{outcome="hits"} 0.0' in answer.read().decode()


def test_the_page_has_what_the_daemon_counted(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Its figures, the hour of the history, the model; exit 1 and one line where it cannot be written."""
    ask(daemon)
    page = tmp_path / "page.html"
    assert said(daemon, "stats", "--html", str(page)) == ""
    text = page.read_text()
    for words in ("41.6 %", "small-lm", "1,000 from the store, 1,401 computed", "unknown_prefix", "<svg"):
        assert words in text, words
    ended = run_cli(["stats", "--html", str(tmp_path / "none" / "page.html")], daemon.environ())
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1) and "none/page.html" in ended.stderr
    assert answered(daemon, "stats", "--html", str(page))["html"] == str(page)
    assert run_cli(["stats", "--html", "x", "--watch"], daemon.environ()).returncode == 2


WITHOUT_EXTRA = "import sys\nsys.modules['prometheus_client'] = None\n"


@pytest.mark.parametrize(
    ("listen", "program", "code", "words"),
    [
        ("0.0.0.0:9464", SERVE, 2, "metrics_listen: metrics are for this host only"),
        ("127.0.0.1:9464", WITHOUT_EXTRA + SERVE, 2, "kvstore[metrics]"),
        ("127.0.0.1:{taken}", SERVE, 1, "metrics_listen: cannot listen on"),
    ],
)
def test_metrics_that_cannot_be_served_end_the_start(
    tmp_path: Path, listen: str, program: str, code: int, words: str
) -> None:
    """Elsewhere than on this host, without the library, or where another process listens: one line each."""
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = listen.format(taken=taken.getsockname()[1])
        absent = DaemonProcess(tmp_path / "data", program=program, metrics_listen=listen)
        absent.start(wait=False)
        assert absent.process is not None and absent.process.wait(120) == code, absent.log_text()
    (line,) = [line for line in absent.log_text().splitlines() if line.startswith("kvstore: ")]
    assert words in line and "Traceback" not in absent.log_text()


def test_watching_prints_a_line_a_second_until_it_is_interrupted(daemon: DaemonProcess) -> None:
    """Exit 0 then; exit 3 and one line when the daemon goes."""
    command = [sys.executable, "-m", "kvstore", "stats", "--watch"]
    lines: list[str] = []
    for end in (lambda one: one.send_signal(signal.SIGINT), lambda _: daemon.kill()):
        with subprocess.Popen(
            command, env=daemon.environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as watching:
            assert watching.stdout is not None and watching.stderr is not None
            lines = [watching.stdout.readline() for _ in range(3)]
            end(watching)
            code, complaint = watching.wait(60), watching.stderr.read()
        assert all(re.match(r"\d\d:\d\d:\d\d  \d+ hits \d+ misses  ", line) for line in lines), lines
        assert (code, complaint) == (0, "") or (code == 3 and complaint.count("\n") == 1)
    assert code == 3


def test_the_log_has_a_line_a_request_with_the_id_that_the_worker_has(
    daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Also at DEBUG nothing of asyncio or grpc."""
    daemon.restart(log_level="debug")
    caplog.set_level("DEBUG", "kvstore.client.results")
    ask(daemon)
    wait_until(lambda: daemon.log_text().count(" miss ") == 2, 30, daemon.log_text)
    log = daemon.log_text()
    for pattern in (
        r"INFO stored small-lm \+700 tokens [0-9.]+ kB \d+ ms \[[0-9a-f]{6}\]",
        r"INFO hit small-lm 700/701 tokens [0-9.]+ kB \d+ ms \[[0-9a-f]{6}\]",
        r"INFO hit small-lm 300/700 tokens [0-9.]+ kB \d+ ms \[[0-9a-f]{6}\]",
        r"INFO miss small-lm 0/500 unknown_prefix \[[0-9a-f]{6}\]",
    ):
        assert re.search(pattern, log), log
    ids = re.findall(r"\[([0-9a-f]{6})\]", "\n".join(record.getMessage() for record in caplog.records))
    assert len(ids) == 3 and all(f"[{one}]" in log for one in ids)
    assert "asyncio" not in log and "selector" not in log


def test_worker_and_daemon_say_the_same_of_a_prompt_that_went_on(
    daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """The tail before it is stored again, in a longer block; it is no new token."""
    caplog.set_level("DEBUG", "kvstore.client.results")
    longer = list(range(720))
    with client_of(daemon) as client:
        assert client.session(NAMESPACE, **SLOW).store(longer, make_layers(LAYOUT, longer), wait=True).durable
    line = r"stored small-lm \+20 tokens [0-9.]+ kB \d+ ms"
    assert re.search(line, daemon.log_text())
    assert [record for record in caplog.records if re.match(line, record.getMessage())], caplog.text


def test_the_log_in_json_has_the_fields_of_a_request(tmp_path: Path) -> None:
    """An object a line, from the first to the last."""
    with DaemonProcess(tmp_path / "data", program=SERVE.replace('"serve"', '"serve", "--log-json"')) as daemon:
        fill(daemon)
        assert daemon.stop() == 0
        records = [json.loads(line) for line in daemon.log_text().splitlines()]
    (stored,) = [one for one in records if one["message"].startswith("stored ")]
    assert (stored["model"], stored["tokens"], stored["namespace"]) == ("small-lm", 700, NAMESPACE.root.hex())
    assert stored["level"] == "info" and stored["bytes"] > 0 and f"[{stored['request']}]" in stored["message"]


def test_a_kill_loses_no_more_than_a_minute_of_the_lifetime(daemon: DaemonProcess) -> None:
    """What was written is there after kill -9; what was since start begins anew, and an orderly stop loses nothing."""
    wait_until((daemon.data_dir / LIFETIME).exists, 30, daemon.log_text)
    daemon.kill()
    daemon.start()
    stats = answered(daemon, "stats")
    assert (stats["lifetime"]["stored_tokens"], stats["since_start"]["stored_tokens"]) == (700, 0)
    ask(daemon)
    daemon.restart()
    stats = answered(daemon, "stats")
    assert (stats["lifetime"]["hits"], stats["lifetime"]["misses"], stats["since_start"]["hits"]) == (2, 2, 0)
    assert stats["namespaces"][0]["traffic"]["hits"] == 2 and stats["namespaces"][0]["prefill_tokens_per_s"] == 10
    assert (daemon.data_dir / LIFETIME).stat().st_mode & 0o777 == 0o600


# The daemon's lifetime counters by a clock that the test sets.
CLOCKED = """
import functools, os, pathlib
from kvstore.server import daemon
clock = pathlib.Path(os.environ["KVSTORE_DATA_DIR"]).with_name("clock")
daemon.Lifetime = functools.partial(daemon.Lifetime, clock=lambda: float(clock.read_text()))
"""


def test_a_kill_at_any_second_of_a_minute_loses_that_minute_and_no_more(tmp_path: Path) -> None:
    """On a clock that the test sets: what is a minute old is on the disk, with its hour in the history."""
    clock = tmp_path / "clock"
    set_clock(clock, 0)
    with DaemonProcess(tmp_path / "data", program=CLOCKED + SERVE) as daemon:
        path = daemon.data_dir / LIFETIME
        fill(daemon)
        wait_until(lambda: path.exists() and written(path) == 0, 30, daemon.log_text)
        set_clock(clock, 59.9)
        miss(daemon, 1)
        assert written(path) == 0, "not a minute since the last time"
        daemon.kill()
        daemon.start()
        with client_of(daemon) as client:
            stats, (hour,) = client.stats(), client.history()["hours"]
        assert (stats["lifetime"]["stored_tokens"], stats["lifetime"]["misses"]) == (700, 0)
        assert (hour["traffic"]["stored_tokens"], hour["traffic"]["misses"]) == (700, 0)
        miss(daemon, 2)
        wait_until(lambda: written(path) >= 1, 30, daemon.log_text)  # by now there may be one, or both
        set_clock(clock, 59.9 + 60.1)
        wait_until(lambda: written(path) == 2, 30, daemon.log_text)
        daemon.kill()
        daemon.start()
        with client_of(daemon) as client:
            stats, hours = client.stats(), client.history()["hours"]
        assert stats["lifetime"]["misses"] == 2 == sum(hour["traffic"]["misses"] for hour in hours)
        assert sum(hour["miss_reasons"].get("unknown_prefix", 0) for hour in hours) == 2


def set_clock(path: Path, now_s: float) -> None:
    """Atomically, since the daemon reads it all the time."""
    path.with_suffix(".new").write_text(str(now_s))
    path.with_suffix(".new").replace(path)


def written(path: Path) -> int:
    """Misses of the lifetime, as the disk has them."""
    misses: int = json.loads(path.read_bytes())["total"]["misses"]
    return misses


def miss(daemon: DaemonProcess, count: int) -> None:
    """So many misses, counted."""
    with client_of(daemon) as client:
        before = client.stats()["since_start"]["misses"]
        session = client.session(NAMESPACE, **SLOW)
        assert not any(session.fetch([number + 5] * 500) for number in range(count))
        assert client.stats()["since_start"]["misses"] == before + count


def test_a_budget_that_is_lowered_evicts_at_once_and_ends_with_the_daemon(daemon: DaemonProcess) -> None:
    """The log says who and how much; the configuration is in force again after a restart."""
    lower = answered(daemon, "stats")["disk"]["used_bytes"] - 4096
    changed = answered(daemon, "set", "daemon", f"budget_bytes={lower}", "--yes")
    assert changed["before"] == str(2 * 10**9)
    assert answered(daemon, "stats")["disk"]["budget_bytes"] == lower and len(daemon.blobs()) < 3
    log = daemon.log_text()
    assert "budget_bytes was set to" in log and re.search(r"INFO evicted \d blocks [0-9.]+ kB budget: ", log), log
    assert "1.0 GB" in said(daemon, "set", "daemon", "budget_bytes=1GB")
    assert (
        said(daemon, "set", "daemon", "log_level=error") and answered(daemon, "stats")["daemon"]["log_level"] == "error"
    )
    daemon.restart()
    assert answered(daemon, "stats")["disk"]["budget_bytes"] == 2 * 10**9


def test_what_cannot_be_set_is_wrong_usage(daemon: DaemonProcess) -> None:
    """One line, exit 2, nothing changed. Namespaces have no settings of their own."""
    for assignment in ("profile=exact", "budget_bytes=soon", "log_level=loud", "no_such_key=1"):
        for target in ("daemon", "small-lm"):
            ended = run_here(["set", target, assignment], daemon.environ())
            assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), (assignment, ended.stderr)
    assert answered(daemon, "stats")["disk"]["budget_bytes"] == 2 * 10**9


def lines_of(report: dict[str, Any]) -> dict[str, str]:
    """What a doctor's report says to do, by name."""
    return {line["name"]: line["fix"] for line in report["lines"]}


def counted(daemon: DaemonProcess) -> dict[str, Any]:
    """All that a daemon counts of requests, stores and evictions, by name; and the hours of its history."""
    names = ("tokens", "requests", "miss_reasons", "store_reasons", "since_start", "last_hour", "lifetime", "recent")
    names += ("namespaces", "sessions", "labelled", "evictions", "fetch_s", "idle_s", "reuse_s")
    stats = answered(daemon, "stats")
    with client_of(daemon) as client:
        hours = client.history()["hours"]
    kept = {name: stats[name] for name in names if name in stats}
    return {**kept, "hours": [{**one, "used_bytes": 0} for one in hours]}


def test_the_doctor_finds_a_sound_daemon_sound_and_leaves_nothing_behind(daemon: DaemonProcess) -> None:
    """A line for each thing, all ok; what it stored is evicted, and its requests are not counted as a server's."""
    before, told = len(daemon.blobs()), counted(daemon)
    text = said(daemon, "doctor")
    assert all(line.startswith("ok   ") for line in text.splitlines()), text
    assert "round trip" in text and "64 tokens stored and fetched" in text
    assert len(daemon.blobs()) == before and len(answered(daemon, "stats")["namespaces"]) == 1
    report = answered(daemon, "doctor")
    assert report["ok"] is True and not any(lines_of(report).values())
    found = {line["name"]: line["found"] for line in report["lines"]}
    assert found["requests"].startswith("none since start"), "the first look at it is no request of a server"
    assert counted(daemon) == told, "nor is it in any counter"


# A daemon that logs to which table the begin and the end of each store go.
TELLING = """
import sys
from kvstore.telemetry.requests import Requests
from kvstore.telemetry.why import Why
def telling(of, name):
    kept = getattr(of, name)
    def told(self, *arguments, **named):
        keeps = getattr(self, "_keeps", None)
        print("TOLD", of.__name__, name, keeps if of is Why else id(self), file=sys.stderr, flush=True)
        return kept(self, *arguments, **named)
    setattr(of, name, told)
telling(Requests, "begun")
telling(Requests, "stored")
telling(Why, "stored")
"""


def test_the_end_of_a_doctors_store_is_noted_where_its_begin_was(tmp_path: Path) -> None:
    """Where nobody reads it, also of what is stored already; of a worker's store `kvstore why` learns."""
    with DaemonProcess(tmp_path / "data", program=TELLING + SERVE) as daemon:

        def told() -> list[tuple[str, ...]]:
            return [tuple(line.split()[1:]) for line in daemon.log_text().splitlines() if line.startswith("TOLD")]

        said(daemon, "doctor")
        wait_until(lambda: len(told()) == 3, 30, daemon.log_text)
        begun, *ended = sorted(told())
        assert ended == [("Requests", "stored", begun[-1]), ("Why", "stored", "False")]
        fill(daemon)
        wait_until(lambda: ("Why", "stored", "True") in told(), 30, daemon.log_text)


def test_the_doctor_tells_a_daemon_that_is_stopped_from_one_that_is_away(daemon: DaemonProcess) -> None:
    """By a signal: it holds the socket and says nothing; the cure names its process."""
    assert daemon.process is not None
    daemon.signal(signal.SIGSTOP)
    try:
        report = answered(daemon, "doctor", code=1)
    finally:
        daemon.signal(signal.SIGCONT)
    assert f"kill -CONT {daemon.process.pid}" in lines_of(report)["daemon"]
    assert "kvstore serve" not in lines_of(report)["daemon"]


def test_the_doctor_looks_at_the_metrics_that_it_is_told_of(daemon: DaemonProcess) -> None:
    """In the configuration of both: they answer. In its own only: the daemon has not read it."""
    pytest.importorskip("prometheus_client")
    path = daemon.listen.removeprefix("unix:") + ".metrics"
    daemon.config["metrics_listen"] = f"unix:{path}"
    assert "restart the daemon" in lines_of(answered(daemon, "doctor", code=1))["metrics"]
    daemon.restart()
    report = answered(daemon, "doctor")
    assert lines_of(report)["metrics"] == "" and not Path(path).stat().st_mode & 0o077
    found = {line["name"]: line["found"] for line in report["lines"]}
    assert "200 OK" in found["metrics"] and "none since start" in found["requests"] and "mlx" in found["libraries"]
    daemon.stop()
    assert not Path(path).exists(), "an orderly end leaves no socket"


def test_the_doctor_names_the_floor_and_how_to_lower_it(daemon: DaemonProcess) -> None:
    """Under it nothing is stored, and the round trip says why."""
    daemon.restart(free_floor_bytes=str(1 << 50))
    report = answered(daemon, "doctor", code=1)
    assert "free_floor_bytes" in lines_of(report)["free floor"]
    assert "free floor" in lines_of(report)["store"]
    assert said(daemon, "set", "daemon", "free_floor_bytes=1")
    wait_until(lambda: answered(daemon, "stats")["daemon"]["state"] == "serving", 30, daemon.log_text)
    assert not lines_of(answered(daemon, "doctor"))["free floor"]


def test_the_doctor_points_at_what_is_in_quarantine(daemon: DaemonProcess) -> None:
    """Nothing is wrong now: it is no fault, and no plain ok either."""
    (daemon.data_dir / "quarantine").mkdir(exist_ok=True)
    (daemon.data_dir / "quarantine" / "x").write_bytes(b"x")
    wait_until(lambda: answered(daemon, "stats")["disk"]["quarantined"] == 1, 30, daemon.log_text)
    assert re.search(
        "^SEE  blobs +1 damaged file in quarantine; .*kvstore check$", said(daemon, "doctor"), re.MULTILINE
    )


def test_the_doctor_without_a_daemon_says_how_to_start_one(tmp_path: Path) -> None:
    """And what would keep it from starting."""
    absent = DaemonProcess(tmp_path / "data")
    fixes = lines_of(answered(absent, "doctor", code=1))
    assert "kvstore serve" in fixes["daemon"] and "serve --create" in fixes["directory"]
    (absent.data_dir / "index").mkdir(parents=True)
    absent.data_dir.chmod(0o755)
    assert "chmod 700" in lines_of(answered(absent, "doctor", code=1))["permissions"]
    text = said(absent, "doctor", code=1)
    assert text.startswith(f"FIX  daemon        no daemon at {absent.listen}; start it with: kvstore serve\n")
