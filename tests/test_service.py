"""`kvstore service`: the files that it installs, the commands that it runs, and what it refuses."""

from __future__ import annotations

import json
import os
import plistlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvstore import __version__
from kvstore.cli import managers, service
from kvstore.cli.app import cli
from kvstore.cli.managers import Host, Launchd, Systemd, daemon_command
from kvstore.errors import KVStoreError, UnavailableError, VersionError
from tests.support.servers import wait_until
from tests.support.service_tools import ServiceTools

UID = 501
SYSTEMS = {"darwin": "launchd", "linux": "systemd"}
FILES = {
    "darwin": "home/Library/LaunchAgents/dev.kvstore.daemon.plist",
    "linux": "config/systemd/user/kvstore.service",
}
DOMAIN = f"gui/{UID}"
AGENT = f"{DOMAIN}/dev.kvstore.daemon"


@dataclass
class Desk:
    """A user's machine."""

    platform: str
    tools: ServiceTools
    folder: Path
    version: str = __version__  # of the daemon that answers

    @property
    def file(self) -> Path:
        """What `install` writes."""
        return self.folder / FILES[self.platform]

    def invoke(self, *words: str) -> Result:
        """`kvstore service ...`."""
        return CliRunner().invoke(cli, ["service", *words])

    def changes(self, before: str = "") -> list[str]:
        """The commands that bring the service to a file, after those that `before` stands for."""
        if self.platform == "linux":
            return [f"systemctl --user {verb}" for verb in ("daemon-reload", *on_unit("enable", "restart"))]
        commands = [f"launchctl enable {AGENT}", f"launchctl bootstrap {DOMAIN} {self.file}"]
        return [f"launchctl bootout {AGENT}", *commands] if before else commands


def on_unit(*verbs: str) -> list[str]:
    """The verbs, of our unit."""
    return [f"{verb} kvstore.service" for verb in verbs]


@pytest.fixture(params=list(SYSTEMS))
def desk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A machine of each system, with a `kvstore` that only sleeps, and no variable of kvstore set."""
    # A socket lies in the home, and its path must be short.
    tmp_path = Path(tempfile.mkdtemp(prefix="kvd-"))
    made = Desk(request.param, ServiceTools(tmp_path / "tools"), tmp_path)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / {"HOME": "home", "XDG_CONFIG_HOME": "config"}.get(name, "data")))
    monkeypatch.setenv("PATH", f"{made.tools.bin}:/usr/bin:/bin")
    for name in ("KVSTORE_CONFIG", "KVSTORE_DATA_DIR", "KVSTORE_LISTEN"):
        monkeypatch.delenv(name, raising=False)
    program = tmp_path / "bin dir" / "kvstore"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho serving\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    host = Host(made.platform, UID, tmp_path / "home", tmp_path / "config")
    monkeypatch.setattr(service, "this_host", lambda: host)

    def ask(config: object) -> dict[str, Any] | KVStoreError:
        return {"pid": 7, "version": made.version} if made.tools.is_running() else UnavailableError("nobody answers")

    monkeypatch.setattr(service, "_ask", ask)
    yield made
    made.tools.end()
    shutil.rmtree(tmp_path)


def test_install_writes_the_file_starts_the_daemon_and_is_idempotent(desk: Desk) -> None:
    """Another program is another file, and the service is started again; then nothing is done twice."""
    result = desk.invoke("install")
    assert result.exit_code == 0, result.output
    assert desk.tools.calls() == desk.changes() and desk.tools.is_running()
    content, stamp = desk.file.read_bytes(), desk.file.stat().st_mtime_ns
    again = desk.invoke("install")
    assert again.exit_code == 0 and again.stdout.startswith("already installed")
    assert desk.tools.calls() == [] and desk.file.stat().st_mtime_ns == stamp
    changed = desk.invoke("install", "--config", str(desk.folder / "my config.toml"))
    assert changed.exit_code == 2, "there is no such file"
    (desk.folder / "my config.toml").touch()
    assert json.loads(desk.invoke("install", "--config", f"{desk.folder}/my config.toml", "--json").stdout)["changed"]
    assert desk.tools.calls() == desk.changes("installed") and desk.file.read_bytes() != content


def test_install_starts_a_daemon_of_another_version_again(desk: Desk) -> None:
    """After an upgrade the file is the same, and what runs is the old one."""
    desk.invoke("install")
    desk.tools.calls()
    desk.version = "0.0.1"
    result = desk.invoke("install")
    assert result.exit_code == 0 and desk.tools.is_running()
    if desk.platform == "linux":
        assert desk.tools.calls() == desk.changes()
    else:
        assert desk.tools.calls() == [f"launchctl kickstart -k {AGENT}"]


def test_uninstall_stops_the_daemon_removes_the_file_and_is_idempotent(desk: Desk) -> None:
    """What is stored stays, and where it is, is said."""
    store = desk.folder / "data" / "kvstore"
    assert desk.invoke("install").exit_code == 0
    desk.tools.calls()
    store.mkdir(parents=True)
    result = desk.invoke("uninstall")
    assert (result.exit_code, result.stdout) == (0, f"removed {desk.file}\n"), result.output
    assert str(store) in result.stderr and store.exists()
    assert not desk.file.exists() and not desk.tools.is_running()
    if desk.platform == "linux":
        verbs = (*on_unit("disable --now"), "daemon-reload", *on_unit("reset-failed"))
        assert desk.tools.calls() == [f"systemctl --user {verb}" for verb in verbs]
    else:
        assert desk.tools.calls() == [f"launchctl bootout {AGENT}"]
    again = desk.invoke("uninstall")
    assert (again.exit_code, again.stdout, desk.tools.calls()) == (0, "the service is not installed\n", [])


@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_a_dry_run_prints_what_would_be_done_and_does_nothing(desk: Desk, verb: str) -> None:
    """The file as it would be written, and the commands."""
    if verb == "uninstall":
        desk.invoke("install")
        desk.tools.calls()
    before = desk.file.read_bytes() if desk.file.exists() else None
    printed = desk.invoke(verb, "--dry-run")
    planned = json.loads(desk.invoke(verb, "--dry-run", "--json").stdout)
    assert desk.tools.calls() == [] and printed.exit_code == 0
    assert (desk.file.read_bytes() if desk.file.exists() else None) == before
    if verb == "install":
        assert planned["commands"] == [f"write {desk.file}", *desk.changes()]
        desk.invoke("install")
        assert planned["file"] == desk.file.read_text()
    else:
        assert f"rm {desk.file}" in planned["commands"] and planned["file"] == ""
    assert all(command in printed.stdout for command in planned["commands"])


def test_status_says_what_is_installed_and_whether_it_answers(desk: Desk) -> None:
    """Exit status 1 where it is not installed, 3 where it does not answer."""
    assert desk.invoke("status").exit_code == 1
    desk.invoke("install")
    answers = desk.invoke("status")
    assert answers.exit_code == 0 and "running, pid " in answers.stdout and "answers at unix:" in answers.stdout
    desk.tools.fail()
    failed = desk.invoke("status")
    assert failed.exit_code == 3 and "stopped (exit status 5)" in failed.stdout
    parsed = json.loads(desk.invoke("status", "--json").stdout)
    assert parsed["manager"] == SYSTEMS[desk.platform]
    assert (parsed["installed"], parsed["running"], parsed["answers"]) == (True, False, False)
    assert desk.invoke("install").exit_code == 0 and desk.tools.is_running(), "it is started again"


def test_a_daemon_that_does_not_stay_is_a_failure_that_names_the_log(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit status is said; what it wrote is in the log."""
    monkeypatch.setattr(service, "_ask", lambda config: UnavailableError("nobody answers"))
    monkeypatch.setattr(service, "ANSWER_S", 0.0)
    result = desk.invoke("install")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "nobody answers" in result.stderr and "kvstore service logs" in result.stderr
    desk.tools.fail()
    for manager in (Systemd, Launchd):
        monkeypatch.setattr(manager, "installation", lambda self, content, **options: [])
    assert "ended with exit status 5" in desk.invoke("install").stderr


def test_logs_are_those_of_the_manager(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal on Linux, a file on macOS; none is one line."""
    if desk.platform == "darwin":
        assert "the service is not installed" in desk.invoke("logs").stderr
        assert desk.invoke("logs").exit_code == 1
        log = desk.folder / "home" / "Library" / "Logs" / "kvstore.log"
        log.parent.mkdir(parents=True)
        log.write_text("one\ntwo\nthree\x1b[31m\n")
        assert desk.invoke("logs", "-n", "2").stdout == "two\nthree\\x1b[31m\n"
        return
    desk.invoke("install")

    def lines() -> list[str]:
        found: list[str] = json.loads(desk.invoke("logs", "--json").stdout)["lines"]
        return found

    wait_until(lambda: bool(lines()), 30, lambda: "the service says nothing")
    assert lines() == ["serving"]
    assert desk.tools.calls()[-1] == "journalctl --user-unit kvstore.service --lines 100 --output cat --no-pager"
    assert desk.invoke("logs", "--follow", "--json").exit_code == 2
    with monkeypatch.context() as patched:
        patched.setattr(Systemd, "log_command", lambda self, lines, follow: ["true"])
        assert desk.invoke("logs").stderr == "kvstore: the log is empty\n"
        desk.invoke("uninstall")
        for flags in ([], ["--json"], ["--follow"]):
            none = desk.invoke("logs", *flags)
            assert (none.exit_code, none.stdout) == (1, "")
            assert "the service is not installed" in none.stderr and "kvstore service install" in none.stderr


def test_nothing_is_installed_for_root_nor_without_a_manager(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, and no file; root may look at what would be done."""
    desk.tools.go_away()
    away = desk.invoke("install")
    assert away.exit_code == 1 and away.stderr.count("\n") == 1 and not desk.file.exists()
    host = Host(desk.platform, 0, desk.folder / "home", desk.folder / "config")
    monkeypatch.setattr(service, "this_host", lambda: host)
    for verb in ("install", "uninstall"):
        root = desk.invoke(verb)
        assert root.exit_code == 2 and "without sudo" in root.stderr
        assert desk.invoke(verb, "--dry-run").exit_code == 0
    monkeypatch.setattr(service, "this_host", lambda: Host("linux", UID, desk.folder, desk.folder))
    monkeypatch.setenv("PATH", "/nonexistent")
    for verb in ("install", "uninstall", "status", "logs"):
        nothing = desk.invoke(verb)
        assert (nothing.exit_code, nothing.stdout) == (1, "") and "neither launchd nor systemd" in nothing.stderr
        assert nothing.stderr.count("\n") == 1


def test_a_daemon_that_runs_already_is_not_fought_over_the_directory(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, with how to stop it; so is a directory that holds no store."""
    with monkeypatch.context() as patched:
        patched.setattr(service, "_ask", lambda config: {"pid": 4711, "version": __version__})
        held = desk.invoke("install")
        assert held.exit_code == 5 and "kill 4711" in held.stderr and not desk.file.exists()
        patched.setattr(service, "_ask", lambda config: VersionError("no"))
        assert desk.invoke("install").exit_code == 5 and not desk.file.exists()
    config = desk.folder / "config" / "kvstore" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'data_dir = "{desk.folder / "elsewhere"}"\n')
    missing = desk.invoke("install")
    assert missing.exit_code == 1 and "kvstore serve --create" in missing.stderr and not desk.file.exists()


def test_variables_that_the_service_will_not_see_are_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would hold in this shell alone."""
    monkeypatch.setenv("KVSTORE_LOG_LEVEL", "debug")
    assert "KVSTORE_LOG_LEVEL of this shell" in desk.invoke("install", "--dry-run").stderr


COMMAND = ["/opt/my bin/kvstore", "serve", "--config", '/a "b" 100%/$HOME/c.toml']


def test_the_installed_agent_is_the_shipped_one_with_two_places_filled_in(tmp_path: Path) -> None:
    """Compared as property lists."""
    agent = Launchd(Host("darwin", UID, tmp_path, tmp_path))
    shipped = plistlib.loads(managers.template("dev.kvstore.daemon.plist"))
    expected = {
        **shipped,
        "ProgramArguments": COMMAND,
        "StandardErrorPath": f"{tmp_path}/Library/Logs/kvstore.log",
    }
    assert plistlib.loads(agent.render(COMMAND)) == expected


def test_the_installed_unit_is_the_shipped_one_with_the_command_filled_in(tmp_path: Path) -> None:
    """Compared line by line; systemd reads it without a complaint, where there is one, and the same words out of it."""
    rendered = Systemd(Host("linux", UID, tmp_path, tmp_path)).render(COMMAND).decode()
    shipped = managers.template("kvstore.service").decode()
    lines, expected = (text.partition("[Unit]")[2].splitlines() for text in (rendered, shipped))
    changed = [(one, other) for one, other in zip(lines, expected, strict=True) if one != other]
    quoted = r'"/opt/my bin/kvstore" serve --config "/a \"b\" 100%%/$$HOME/c.toml"'
    assert changed == [(f"ExecStart={quoted}", "ExecStart=@KVSTORE@ serve")]
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd here")
    program = tmp_path / "bin dir" / "kvstore"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "kvstore.service"
    unit.write_bytes(Systemd(Host("linux", UID, tmp_path, tmp_path)).render([str(program), *COMMAND[1:]]))
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}  # else it looks at nothing
    command = [analyze, "verify", "--user", "--man=no", str(unit)]
    verify = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert (verify.returncode, verify.stderr) == (0, "")


def test_the_service_starts_the_program_by_the_name_it_was_called_by(tmp_path: Path) -> None:
    """A link in a folder of PATH, which outlives an upgrade; the interpreter where there is no script."""
    script = tmp_path / "real" / "kvstore"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    link = tmp_path / "kvstore"
    link.symlink_to(script)
    assert daemon_command(str(link), None, None) == [str(link), "serve"]
    module = [sys.executable, "-m", "kvstore", "serve"]
    assert daemon_command(str(tmp_path / "__main__.py"), None, None) == module
    assert daemon_command("/x", "/c.toml", "unix:/s") == [*module, "--config", "/c.toml", "--address", "unix:/s"]


def test_a_command_that_fails_is_tried_again_where_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """bootstrap, until launchd has let go of the old service; then its last words are the error."""
    monkeypatch.setattr(managers, "BETWEEN_TRIES_S", 0.0)
    ran: list[tuple[str, ...]] = []

    def run(argv: Any) -> subprocess.CompletedProcess[str]:
        ran.append(tuple(argv))
        return subprocess.CompletedProcess(argv, len(ran) < 3, "", "first\nBootstrap failed: 5\n")

    managers.Step(("launchctl", "bootstrap"), tries=3).carry_out(run)
    assert len(ran) == 3
    ran.clear()
    with pytest.raises(KVStoreError, match="launchctl bootstrap failed: Bootstrap failed: 5"):
        managers.Step(("launchctl", "bootstrap"), tries=2).carry_out(run)
    ran.clear()
    managers.Step(("launchctl", "bootstrap"), may_fail=True).carry_out(run)
    assert len(ran) == 1
