"""A new user's first ten minutes, with nothing but `--help`: the built wheel in an empty environment, and its command.

Every command line below stands in the help of the one before, or in what it printed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer

from tests.support.files import files_below
from tests.support.models import heldout_tokens, write_tiny
from tests.support.servers import NO_MEMORY, PATIENCE_S, ServerProcess, wait_until
from tests.support.service_tools import ServiceTools
from tests.support.wheel import ROOT, bare, build, install

pytest.importorskip("hatchling")
# `kvstore service` is not for root, so that root becomes someone else, in a namespace of its own.
AS_USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]


class User:
    """A home, an environment with the wheel, and a terminal that does not end."""

    def __init__(self, home: Path, command: Path, tools: ServiceTools) -> None:
        self.home, self.tools = home, tools
        self.prefix = AS_USER if os.geteuid() == 0 else []
        self.command = [*self.prefix, str(command)]
        places = {name: str(home / path) for name, path in XDG.items()}
        # A busy machine must not make a miss of a hit, nor a small disk refuse what is stored.
        slow = {"KVSTORE_FETCH_TOTAL_MS": "60000", "KVSTORE_FREE_FLOOR_BYTES": "1", "XDG_RUNTIME_DIR": str(home)}
        path = f"{tools.bin}:{command.parent}:{os.environ['PATH']}"
        self.environ = {**bare(), **places, **slow, "HOME": str(home), "PATH": path}

    def run(self, *words: str, code: int = 0) -> str:
        """What a command line prints, on both ends; it must exit with `code`."""
        ended = subprocess.run([*self.command, *words], env=self.environ, cwd=self.home, capture_output=True, text=True)
        assert ended.returncode == code and "Traceback" not in ended.stderr, f"{words}: {ended}"
        return ended.stdout + ended.stderr

    def daemon_pid(self) -> int:
        """The process that answers."""
        return int(json.loads(self.run("stats", "--json"))["daemon"]["pid"])


def first_line_of(user: User, verb: str) -> str:
    """Of a verb that does not end by itself."""
    with subprocess.Popen([*user.command, verb], env=user.environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    return line


XDG = {
    "XDG_CONFIG_HOME": ".config",
    "XDG_DATA_HOME": ".local/share",
    "XDG_STATE_HOME": ".local/state",
    "XDG_CACHE_HOME": ".cache",
}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """One with the wheel installed and nothing else; whatever runs in the home ends with the tests."""
    folder = tmp_path_factory.mktemp("user")
    (wheel,) = build(ROOT, folder, "wheel")
    home = Path(tempfile.mkdtemp(prefix="kvu-"))
    made = User(home, install(wheel, folder / "env") / "kvstore", ServiceTools(folder / "tools"))
    if made.prefix and subprocess.run([*AS_USER, "true"], capture_output=True).returncode:
        pytest.skip("this is root, and cannot become someone else")
    yield made
    made.tools.end()
    for address in (home / ".kvstore").glob("*.sock"):
        ended = subprocess.run(
            [*made.command, "stats", "--json", "--address", str(address)], env=made.environ, capture_output=True
        )
        if ended.returncode == 0:
            os.kill(json.loads(ended.stdout)["daemon"]["pid"], signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_tiny(tmp_path_factory.mktemp("models") / "small", dtype=mx.bfloat16)


def test_help_names_all_that_the_first_minutes_take(user: User) -> None:
    """Each verb has a line, and each option that is used below."""
    listed = user.run("--help")
    used = {"run": "--slow-hits", "stats": "--html", "top": "", "why": "--last", "ls": ""}
    used |= {"evict": "--all", "export": "--output", "import": "FILE"}
    for verb, option in used.items():
        assert re.search(rf"^  {verb} ", listed, re.MULTILINE) and option in user.run(verb, "--help")
    verbs = user.run("service", "--help")
    assert all(f"  {verb} " in verbs for verb in ("install", "uninstall", "status", "logs"))


def test_a_prompt_is_stored_hit_seen_moved_and_evicted(user: User, model: Path) -> None:
    """`run` starts the daemon; a later request is a hit, in the log, in `stats` and in `top`; `why` names a clock."""
    text = load_tokenizer(model).decode(heldout_tokens()[:600])
    request, *clocks = (
        [{"role": "system", "content": f"{said}{text}"}]
        for said in ("", "Current time is 15:09:20. ", "Current time is 15:10:47. ")
    )
    start = f"import os, sys; os.execvp({user.command[0]!r}, {[*user.command, 'run', '--slow-hits']!r} + sys.argv[1:])"
    launcher = ("-c", start, "mlx_lm.server")
    log = user.home.with_suffix(".log")
    with ServerProcess(model, log, user.environ, launcher=launcher, flags=NO_MEMORY) as server:
        assert "kvstore: no daemon at" in server.log_text() and "kvstore: connected to unix:" in server.log_text()

        def is_hit(messages: list[dict[str, str]]) -> bool:
            hits = [len(re.findall(r"kvstore: hit small \d+/\d+ tokens", server.log_text()))]
            server.chat(messages)
            hits.append(len(re.findall(r"kvstore: hit small \d+/\d+ tokens", server.log_text())))
            return hits[1] > hits[0]

        wait_until(lambda: is_hit(request), PATIENCE_S, server.log_text)
        told = user.run("stats")
        assert re.search(r"prompt tokens", told) and "small" in told
        stats = json.loads(user.run("stats", "--json"))
        assert stats["since_start"]["hit_tokens"] > 0 and stats["sessions"][0]["alias"] == "small"
        assert re.search(r"\d\d:\d\d:\d\d", first_line_of(user, "top"))
        wait_until(lambda: is_hit(clocks[0]), PATIENCE_S, server.log_text)  # servers store in the background
        server.chat(clocks[1])
        why = user.run("why", "--last", "1", "--model", str(model))
        assert "the time of day" in why and '"10:47.' in why and "cure" in why
        assert server.stop() == 0
    log.unlink()
    user.run("stats", "--html", "page.html")
    assert "<svg" in (user.home / "page.html").read_text()
    (user.home / "page.html").unlink()
    assert "small" in user.run("ls")
    assert "small.kvpack" in user.run("export", "small", "-o", "small.kvpack")
    assert "would free" in user.run("evict", "--all", "--dry-run")
    assert "freed" in user.run("evict", "--all", "--yes")
    assert "the store is empty" in user.run("ls")


def test_a_second_store_takes_what_was_exported(user: User) -> None:
    """A daemon on a directory of its own; it is made once, with --create."""
    address, directory = user.home / ".kvstore" / "second.sock", user.home / "second"
    words = ["serve", "--data-dir", str(directory), "--address", f"unix:{address}"]
    assert "--create" in user.run(*words, code=1)
    with subprocess.Popen([*user.command, *words, "--create"], env=user.environ, stderr=subprocess.DEVNULL) as daemon:
        try:
            wait_until(lambda: address.exists(), PATIENCE_S, lambda: "no second daemon")
            user.run("import", "small.kvpack", "--address", f"unix:{address}")
            assert "small" in user.run("ls", "--address", f"unix:{address}")
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(PATIENCE_S) == 0
        finally:
            daemon.kill()  # the block waits for its end
    shutil.rmtree(directory)
    (user.home / "small.kvpack").unlink()


def test_the_service_takes_over_and_goes_again(user: User) -> None:
    """The daemon that `run` started is in the way, and the message says how to stop it. Lifetime counters stay."""
    served = json.loads(user.run("stats", "--json"))["lifetime"]["hit_tokens"]
    said = user.run("service", "install", code=5)
    (pid,) = re.findall(r"kill (\d+)", said)
    os.kill(int(pid), signal.SIGTERM)
    wait_until(lambda: not (user.home / ".kvstore" / "kvstore.sock").exists(), PATIENCE_S, lambda: "it does not end")
    unit = user.home / ".config" / "systemd" / "user" / "kvstore.service"
    assert str(unit) in user.run("service", "install")
    assert f"ExecStart={user.command[-1]} serve\n" in unit.read_text()
    shipped = (ROOT / "deploy" / "kvstore.service").read_text().partition("[Unit]")[2]
    installed = unit.read_text().partition("[Unit]")[2]
    assert installed == shipped.replace("@KVSTORE@", user.command[-1])
    assert user.daemon_pid() != int(pid)
    assert json.loads(user.run("stats", "--json"))["lifetime"]["hit_tokens"] >= served > 0
    assert "already installed" in user.run("service", "install")
    assert "running, pid" in user.run("service", "status")
    assert "serving" in user.run("service", "logs")
    assert f"removed {unit}" in user.run("service", "uninstall")
    assert not unit.exists() and "not installed" in user.run("service", "status", code=1)
    user.run("stats", code=3)


def test_nothing_is_left_where_the_readme_says_to_delete(user: User) -> None:
    """Every file of the first minutes is under a path of the table under Uninstall."""
    table = (ROOT / "README.md").read_text().partition("## Uninstall")[2].partition("\n## ")[0]
    for path in re.findall(r"\| `~/([^`]+)` \|$", table, re.MULTILINE):
        shutil.rmtree(user.home / path, ignore_errors=True)
    assert files_below(user.home) == {}
