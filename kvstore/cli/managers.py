"""Service managers: launchd on macOS, systemd on Linux. Each keeps one file of ours and obeys a few commands.

Both files are templates in deploy/, which is part of the wheel. What is to be done is planned first, as a list of
steps: `--dry-run` prints the list, and a second installation of the same file has an empty one.
"""

from __future__ import annotations

import functools
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import kvstore
from kvstore.config import default_config_path
from kvstore.errors import KVStoreError

LABEL = "dev.kvstore.daemon"
UNIT = "kvstore.service"
WRITTEN = "# Written by `kvstore service install`, which replaces it. `kvstore service uninstall` removes it.\n\n"
COMMAND_S = 60.0
# launchctl bootout returns before the service is gone; until then bootstrap fails.
TRIES = 20
BETWEEN_TRIES_S = 0.5

Runner = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run_command(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it printed; KVStoreError if it cannot be started or does not end."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except OSError as error:
        raise KVStoreError(f"{argv[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise KVStoreError(f"{shlex.join(argv)} does not end") from error


@dataclass(frozen=True)
class Host:
    """The machine and the user that a service is for. Tests make one of another system."""

    platform: str
    uid: int
    home: Path
    config_home: Path  # $XDG_CONFIG_HOME
    run: Runner = run_command


def this_host() -> Host:
    """The machine and the user of this process."""
    return Host(sys.platform, os.geteuid(), Path.home(), default_config_path().parent.parent)


@dataclass(frozen=True)
class Step:
    """One thing to do: run `argv`, or write `content` to `path`, or remove `path`.

    `tries`: a command that fails is run again. `may_fail`: its failure means nothing.
    """

    argv: tuple[str, ...] = ()
    path: Path | None = None
    content: bytes | None = None
    tries: int = 1
    may_fail: bool = False

    def __str__(self) -> str:
        if self.path is None:
            return shlex.join(self.argv)
        return f"{'rm' if self.content is None else 'write'} {shlex.quote(str(self.path))}"

    def carry_out(self, run: Runner) -> None:
        """Do it. KVStoreError with the command's last words, OSError if the file cannot be written."""
        if self.path is not None:
            if self.content is None:
                self.path.unlink(missing_ok=True)
            else:
                _write(self.path, self.content)
            return
        for left in reversed(range(self.tries)):
            ended = run(self.argv)
            if ended.returncode == 0 or self.may_fail:
                return
            if left:
                time.sleep(BETWEEN_TRIES_S)
        said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        raise KVStoreError(f"{self} failed: {said[-1] if said else f'exit status {ended.returncode}'}")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(content)
    beside.chmod(0o644)
    beside.replace(path)


@dataclass(frozen=True)
class ServiceState:
    """What the manager says about the service. `detail`: how it ended, in the manager's words."""

    installed: bool
    running: bool
    pid: int = 0
    detail: str = ""


class Manager(ABC):
    """A service manager of one user."""

    name: str

    def __init__(self, host: Host) -> None:
        self.host = host

    @property
    @abstractmethod
    def path(self) -> Path:
        """The service's file."""

    @abstractmethod
    def render(self, argv: Sequence[str]) -> bytes:
        """The content of the file for a daemon that is started as `argv`."""

    @abstractmethod
    def require(self) -> None:
        """KVStoreError if the manager does not serve this user now."""

    @abstractmethod
    def state(self) -> ServiceState:
        """How the service stands."""

    @abstractmethod
    def installation(self, content: bytes, *, restart: bool = False) -> list[Step]:
        """The steps that bring the service to this content and start it; none if that is so already.

        `restart`: what runs is to be started again, whatever its file says.
        """

    @abstractmethod
    def removal(self) -> list[Step]:
        """The steps that stop the service and remove its file; none if it is not installed."""

    @abstractmethod
    def log_command(self, lines: int, *, follow: bool) -> list[str]:
        """The command that prints the end of the log."""

    def has(self, content: bytes) -> bool:
        """Whether the file has this content."""
        return self.path.is_file() and self.path.read_bytes() == content

    def _answer(self, *argv: str) -> str | None:
        """What a command prints; None if it fails."""
        ended = self.host.run(argv)
        return ended.stdout if ended.returncode == 0 else None


class Launchd(Manager):
    """A LaunchAgent: it runs while the user is logged in."""

    name = "launchd"

    @property
    def path(self) -> Path:
        """~/Library/LaunchAgents/dev.kvstore.daemon.plist."""
        return self.host.home / "Library" / "LaunchAgents" / f"{LABEL}.plist"

    @property
    def log_path(self) -> Path:
        """What the daemon writes to stderr."""
        return self.host.home / "Library" / "Logs" / "kvstore.log"

    @property
    def _domain(self) -> str:
        return f"gui/{self.host.uid}"

    @property
    def _target(self) -> str:
        return f"{self._domain}/{LABEL}"

    def render(self, argv: Sequence[str]) -> bytes:
        """The property list of deploy/ with the command and the log's place filled in."""
        agent = plistlib.loads(template(f"{LABEL}.plist"))
        agent |= {"ProgramArguments": list(argv), "StandardErrorPath": str(self.log_path)}
        return plistlib.dumps(agent, sort_keys=False)

    def require(self) -> None:
        """The domain gui/UID exists while the user is logged in on the screen, not for one who came over ssh alone."""
        if self._answer("launchctl", "print", self._domain) is None:
            raise KVStoreError(f"launchd has no domain {self._domain}: log in to this Mac's screen, then try again")

    def state(self) -> ServiceState:
        """From `launchctl print`: a few of its lines are `name = value`."""
        printed = self._answer("launchctl", "print", self._target)
        facts = dict(re.findall(r"^\s*([a-z ]+) = (.*?)\s*$", printed or "", re.MULTILINE))
        pid, ended = facts.get("pid", ""), facts.get("last exit code", "")
        number = int(pid) if pid.isdigit() else 0
        detail = f"exit status {ended}" if ended and ended != "(never exited)" and not number else ""
        return ServiceState(self.path.is_file() or printed is not None, bool(number), number, detail)

    def installation(self, content: bytes, *, restart: bool = False) -> list[Step]:
        """A service of another content is booted out first; one that was disabled is enabled."""
        loaded = self._answer("launchctl", "print", self._target) is not None
        if loaded and self.has(content):
            kill = ("-k",) if restart else ()
            is_done = self.state().running and not restart
            return [] if is_done else [Step(("launchctl", "kickstart", *kill, self._target))]
        stop = [Step(("launchctl", "bootout", self._target), may_fail=True)] if loaded else []
        return [
            Step(path=self.path, content=content),
            *stop,
            Step(("launchctl", "enable", self._target)),
            Step(("launchctl", "bootstrap", self._domain, str(self.path)), tries=TRIES if loaded else 1),
        ]

    def removal(self) -> list[Step]:
        """Boots it out, if it is loaded; the log stays."""
        loaded = self._answer("launchctl", "print", self._target) is not None
        stop = [Step(("launchctl", "bootout", self._target))] if loaded else []
        return [*stop, *([Step(path=self.path)] if self.path.exists() else [])]

    def log_command(self, lines: int, *, follow: bool) -> list[str]:
        """`tail` of the file. -F goes on when the file is replaced."""
        return ["tail", "-n", str(lines), *(["-F"] if follow else []), str(self.log_path)]


class Systemd(Manager):
    """A unit of the user's systemd: it runs while the user is logged in, or from boot on with `loginctl enable-linger`.

    Its log is the journal.
    """

    name = "systemd"

    @property
    def path(self) -> Path:
        """~/.config/systemd/user/kvstore.service."""
        return self.host.config_home / "systemd" / "user" / UNIT

    def render(self, argv: Sequence[str]) -> bytes:
        """The unit of deploy/ with the command filled in, quoted as systemd reads it, and another first line."""
        command = " ".join(_quoted(one) for one in argv)
        _, unit, body = template(UNIT).partition(b"[Unit]")
        return WRITTEN.encode() + unit + body.replace(b"@KVSTORE@ serve", command.encode())

    def require(self) -> None:
        """There is no user manager in a container, and none for who became this user by su."""
        ended = self.host.run(("systemctl", "--user", "show-environment"))
        if ended.returncode:
            said = ended.stderr.strip().splitlines()
            raise KVStoreError(f"systemd does not serve this user here: {said[0] if said else 'no user manager'}")

    def state(self) -> ServiceState:
        """From `systemctl --user show`."""
        names = ("ActiveState", "MainPID", "Result", "ExecMainStatus")
        shown = self._answer("systemctl", "--user", "show", UNIT, *(f"--property={name}" for name in names)) or ""
        facts = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        running = facts.get("ActiveState") in ("active", "reloading")
        detail = "" if running or facts.get("Result") == "success" else f"exit status {facts.get('ExecMainStatus')}"
        return ServiceState(self.path.is_file(), running, int(facts.get("MainPID") or 0), detail if shown else "")

    def installation(self, content: bytes, *, restart: bool = False) -> list[Step]:
        """Started again if its content has changed."""
        has = self.has(content)
        if (
            has
            and not restart
            and all(self._answer("systemctl", "--user", verb, UNIT) for verb in ("is-enabled", "is-active"))
        ):
            return []
        return [
            *([] if has else [Step(path=self.path, content=content)]),
            Step(("systemctl", "--user", "daemon-reload")),
            Step(("systemctl", "--user", "enable", UNIT)),
            Step(("systemctl", "--user", "restart", UNIT)),
        ]

    def removal(self) -> list[Step]:
        """Stops and disables it; systemd then forgets the unit, and that it may have failed."""
        if not self.path.exists():
            return []
        return [
            Step(("systemctl", "--user", "disable", "--now", UNIT)),
            Step(path=self.path),
            Step(("systemctl", "--user", "daemon-reload")),
            Step(("systemctl", "--user", "reset-failed", UNIT), may_fail=True),
        ]

    def log_command(self, lines: int, *, follow: bool) -> list[str]:
        """`journalctl` of the unit. --user-unit finds it where the journal of all users is one."""
        command = ["journalctl", "--user-unit", UNIT, "--lines", str(lines), "--output", "cat", "--no-pager"]
        return [*command, *(["--follow"] if follow else [])]


def manager_of(host: Host) -> Manager:
    """The service manager of a machine; KVStoreError where there is neither."""
    if host.platform == "darwin":
        return Launchd(host)
    if shutil.which("systemctl") is not None:
        return Systemd(host)
    raise KVStoreError(
        "there is neither launchd nor systemd here; let whatever starts your programs run: kvstore serve"
    )


def template(name: str) -> bytes:
    """A file of deploy/: out of the wheel, or of the checkout that this package is part of."""
    packaged = resources.files(kvstore) / "deploy" / name
    if packaged.is_file():
        return packaged.read_bytes()
    return (Path(kvstore.__path__[0]).parent / "deploy" / name).read_bytes()


def daemon_command(program: str, config_path: str | None, address: str | None) -> list[str]:
    """How the service starts the daemon: with the `kvstore` that was called, by the name it was called by.

    The link in a folder of PATH outlives an upgrade; the interpreter's own folder may not.
    """
    is_script = os.path.basename(program) == "kvstore" and os.access(program, os.X_OK) and os.path.isfile(program)
    start = [os.path.abspath(program)] if is_script else [sys.executable, "-m", "kvstore"]
    config = ["--config", os.path.abspath(os.path.expanduser(config_path))] if config_path else []
    return [*start, "serve", *config, *(["--address", address] if address else [])]


_plain = functools.partial(re.fullmatch, r"[A-Za-z0-9_@+=:,./-]+")


def _quoted(word: str) -> str:
    """A word of a systemd command line. % begins a specifier there, and $ a variable."""
    if _plain(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'
