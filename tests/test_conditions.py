"""Every verb where something is wrong: one line on stderr, and the exit code that docs/operations.md says.

The verbs come from the command line itself, so that a new one is tested without a line here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import pytest

from kvstore.cli.app import EXIT_FAILURE, EXIT_UNREACHABLE, EXIT_USAGE
from kvstore.wire import handshake
from tests.support.daemon import SERVE, DaemonProcess
from tests.support.sessions import client_of
from tests.support.synthetic import make_layers, make_namespace
from tests.support.verbs import Ended, run_verbs
from tests.test_cli import leaf_commands
from tests.test_versions import LAYOUT, OTHER, TOKENS, NoCalls

# Root may go everywhere, unless it gives that up.
AS_ANYONE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
NO_ROOM = ["/bin/sh", "-c", 'ulimit -f 0; exec "$@"', "sh"]
# What a verb is given for what it requires, by how its help writes it; for anything else, a word that means nothing.
VALUES = {"NAMESPACE|daemon": "daemon", "KEY=VALUE": "log_level=info", "PATH": "/nonexistent"}
NO_VALUE = "ab"
# More words for verbs that would refuse to do nothing, or would do more than look.
MORE = {"evict": ["--all", "--dry-run"], "calibrate": ["--list"], "why": ["--last", "1"]}
# Verbs that need no daemon, with what makes them say something at once. All others ask it.
AT_HOME = {
    "bench": ["--help"],
    "config": ["--help"],
    "run": ["--help"],
    "serve": ["--help"],
    "service": ["--help"],
}
# Verbs that need a block, a request or a file that is there, and say so; import before it asks the daemon.
NEED = {"show", "why", "export", "import"}
FILE_FIRST = {"import"}
# Verbs that look at what is wrong, and have an answer without a daemon.
LOOKS = {"doctor", "check"}


def words_of(verb: str, command: click.Command) -> list[str]:
    """A command line of a verb that asks the daemon, with all that it requires."""
    words = verb.split()
    for param in command.params:
        if param.required:
            value = VALUES.get(param.metavar or "", NO_VALUE)
            words += [param.opts[0], value] if isinstance(param, click.Option) else [value]
    return words + MORE.get(verb, [])


COMMANDS = leaf_commands()
ASK = {verb: words_of(verb, one) for verb, one in COMMANDS.items() if verb.split()[0] not in AT_HOME}


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home whose path is short."""
    folder = Path(tempfile.mkdtemp(prefix="kvh-"))
    yield folder
    shutil.rmtree(folder)


def environ_of(home: Path, listen: str) -> Mapping[str, str]:
    """The environment of a command line that finds nothing but this address."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("KVSTORE_", "XDG_"))}
    places = {name: str(home / name.lower()) for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")}
    return {**clean, **places, "HOME": str(home), "KVSTORE_LISTEN": listen}


def asked(home: Path, listen: str, prefix: Sequence[str] = ()) -> dict[str, Ended]:
    """How every verb that asks the daemon ends."""
    ended = run_verbs([(words, "pipe") for words in ASK.values()], environ_of(home, listen), prefix)
    return dict(zip(ASK, ended, strict=True))


def assert_one_line(verb: str, ended: Ended) -> None:
    """On stderr, as ours, and nothing else."""
    assert re.fullmatch(r"kvstore: [^\n]+\n", ended.stderr), f"{verb}: {ended}"


def assert_all(found: Mapping[str, Ended], code: int, words: str) -> None:
    """One line with these words, nothing on stdout, and the code; verbs that look have their own answer."""
    for verb, ended in found.items():
        assert "Traceback" not in ended.stderr, f"{verb}: {ended}"
        if verb in FILE_FIRST:
            assert_one_line(verb, ended)
            assert ended.code and not ended.stdout, f"{verb}: {ended}"
            continue
        if verb in LOOKS:
            assert ended.code in (EXIT_FAILURE, EXIT_UNREACHABLE), f"{verb}: {ended}"
            assert ended.stderr.count("\n") + ("FIX" in ended.stdout) == 1, f"{verb}: {ended}"
            continue
        assert ended.code != EXIT_USAGE or code == EXIT_USAGE, f"put words for {verb} into MORE: {ended}"
        assert_one_line(verb, ended)
        assert re.search(words, ended.stderr), f"{verb}: {ended}"
        assert (ended.code, ended.stdout) == (code, ""), f"{verb}: {ended}"


def test_every_verb_is_in_one_of_the_tables() -> None:
    """A new verb asks the daemon, or says here that it does not."""
    assert AT_HOME.keys() <= {verb.split()[0] for verb in COMMANDS}
    assert ASK.keys() >= LOOKS and len(ASK) >= 8


def test_without_a_daemon_every_verb_says_so(home: Path) -> None:
    """No socket, no folder for one, a file in its place, a socket that nobody listens on."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(home / "stale"))
    stale.close()
    (home / "file").touch()
    jobs = [(name, verb) for name in ("none", "no/folder", "file", "stale") for verb in ASK]
    words = [([*ASK[verb], "--address", f"unix:{home}/{name}"], "pipe") for name, verb in jobs]
    ended = run_verbs(words, environ_of(home, f"unix:{home}/none"))
    for (_, verb), one in zip(jobs, ended, strict=True):
        assert_all({verb: one}, EXIT_UNREACHABLE, "no daemon|is not a socket")


def test_where_the_socket_may_not_be_reached_every_verb_says_so(home: Path) -> None:
    """Its folder is closed."""
    prefix = AS_ANYONE if os.geteuid() == 0 else []
    if prefix and shutil.which(prefix[0]) is None:
        pytest.skip("this is root, and nothing can take its rights away")
    folder = home / "private"
    folder.mkdir(mode=0)
    assert_all(asked(home, f"unix:{folder}/s", prefix), EXIT_UNREACHABLE, "ermission denied")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that serves."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data") as running:
        yield running


def test_a_stopped_daemon_is_not_responding(home: Path, daemon: DaemonProcess) -> None:
    """Which is something else than none: its directory is held, and it may come back."""
    daemon.signal(signal.SIGSTOP)
    try:
        found = asked(home, daemon.listen)
    finally:
        daemon.signal(signal.SIGCONT)
    assert_all(found, EXIT_UNREACHABLE, "not responding")


def test_a_daemon_of_another_version_is_named_as_one(home: Path, tmp_path: Path) -> None:
    """One of another protocol, and one that lacks the calls."""
    with DaemonProcess(tmp_path / "data", program=OTHER + SERVE) as other:
        assert_all(asked(home, other.listen), EXIT_FAILURE, handshake.REMEDY)
    with NoCalls() as older:
        assert_all(asked(home, older.address), EXIT_FAILURE, handshake.REMEDY)


@pytest.mark.parametrize("stdout", ["closed", "full"])
def test_an_answer_that_cannot_be_written_is_a_failure_of_every_verb(
    home: Path, daemon: DaemonProcess, stdout: str
) -> None:
    """A closed descriptor, a disk without room; with a daemon that answers."""
    # In JSON an answer is never empty.
    words = {verb: [*verb.split(), "--help"] if verb in NEED else [*one, "--json"] for verb, one in ASK.items()}
    for verb in COMMANDS:
        if (name := verb.split()[0]) in AT_HOME:
            words[verb] = [*verb.split(), *AT_HOME[name]]
    ended = run_verbs([(one, stdout) for one in words.values()], environ_of(home, daemon.listen))
    for verb, one in zip(words, ended, strict=True):
        assert_one_line(verb, one)
        assert one.code == EXIT_FAILURE and "the answer cannot be written" in one.stderr, f"{verb}: {one}"


def test_a_disk_without_room_is_one_line_of_every_verb_that_writes(home: Path, daemon: DaemonProcess) -> None:
    """No file may grow, as on a full disk: certificates, a pack, a page, a service, a daemon."""
    namespace = make_namespace(LAYOUT, "full")
    with client_of(daemon) as client:
        session = client.session(namespace, connect_ms=20_000, stall_ms=20_000, total_ms=60_000)
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
    writes = {
        "config cert": ["config", "cert", "--dir", str(home / "certificates")],
        "export": ["export", "full", "-o", str(home / "full.kvpack")],
        "stats": ["stats", "--html", str(home / "page.html")],
        "serve": ["serve", "--data-dir", str(home / "data"), "--create", "--address", f"unix:{home}/other"],
    }
    ended = run_verbs([(words, "pipe") for words in writes.values()], environ_of(home, daemon.listen), NO_ROOM)
    for verb, one in zip(writes, ended, strict=True):
        assert one.code == EXIT_FAILURE and "File too large" in one.stderr and "Traceback" not in one.stderr, one
        if verb != "serve":  # which logs what it does
            assert_one_line(verb, one)
        assert not one.stdout, one
