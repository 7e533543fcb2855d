"""`kvstore top` beside a real daemon: on a terminal and through a pipe, over the daemon's end, until Ctrl-C."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.test_cli_live import NAMESPACE, SLOW, TOKENS, client_of, fill
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.servers import wait_until

TOP = [sys.executable, "-m", "kvstore", "top"]
ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with a hit and a miss behind it."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data") as running:
        fill(running)
        with client_of(running) as client:
            session = client.session(NAMESPACE, **SLOW)
            assert session.fetch([*TOKENS, 1]) and not session.fetch([5] * 500)
            wait_until(lambda: bool(client.stats()["since_start"]["hits"]), 30, running.log_text)
        yield running


class Terminal:
    """`kvstore top` on a terminal of 90 columns."""

    def __init__(self, daemon: DaemonProcess, command: Sequence[str] = TOP, **environ: str) -> None:
        self._leader, follower = pty.openpty()
        env = {**daemon.environ(), "TERM": "xterm-256color", "COLUMNS": "90", "LINES": "30", **environ}
        self.process = subprocess.Popen(command, env=env, stdin=follower, stdout=follower, stderr=follower)
        os.close(follower)
        os.set_blocking(self._leader, False)
        self.text, self._decoder = "", codecs.getincrementaldecoder("utf-8")()  # a read may end within a character

    def read(self) -> str:
        """All that was written so far."""
        with contextlib.suppress(OSError):  # nothing now, or the end
            while part := os.read(self._leader, 1 << 16):
                self.text += self._decoder.decode(part)
        return self.text

    def wait(self, words: str, after: int = 0) -> None:
        """Until the words were drawn, behind the first `after` characters."""
        wait_until(lambda: words in self.read()[after:], 60, lambda: self.text[-3000:])

    def end(self, number: signal.Signals) -> int:
        """A signal, and the exit code."""
        self.process.send_signal(number)
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
            time.sleep(0.02)
        self.read()
        os.close(self._leader)
        return self.process.wait(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_terminal_shows_the_screen_and_is_left_as_it_was(daemon: DaemonProcess, number: signal.Signals) -> None:
    """By Ctrl-C and by a kill: the first page is back, the cursor too, exit 0 and no traceback."""
    terminal = Terminal(daemon)
    for words in ("700/701", "0/500", "unknown_prefix"):  # a daemon may hear of a request after the first frame
        terminal.wait(words)
    assert terminal.end(number) == 0
    text = terminal.text
    assert text.index(ENTER) < text.index("serving") < text.rindex(LEAVE)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l") and "Traceback" not in text
    assert "700/701" in text and "0/500" in text and "unknown_prefix" in text
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.replace("\x1b[H", "\n")).replace("\r", "\n")
    assert max(map(len, drawn.split("\n"))) == 90, "COLUMNS"


# A signal at the end of the second frame, before rich writes what it has collected: the first is on the terminal.
SIGNALLED = """
import os, signal, sys
from rich.console import Console
from kvstore.cli import main, top_screen

frames = []
render, leave = top_screen.Screen.__rich_console__, Console._exit_buffer

def counted(screen, console, options):
    frames.append(1)
    yield from render(screen, console, options)

def signalled(console):
    if len(frames) == 2:
        frames.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
    leave(console)

top_screen.Screen.__rich_console__, Console._exit_buffer = counted, signalled
sys.argv = ["kvstore", "top"]
main()
"""


def test_a_signal_in_the_middle_of_a_frame_leaves_the_terminal_as_it_was(daemon: DaemonProcess) -> None:
    """What is written to leave the screen is not kept in a buffer."""
    terminal = Terminal(daemon, [sys.executable, "-c", SIGNALLED])
    terminal.wait(LEAVE)
    assert terminal.process.wait(60) == 0
    assert "Traceback" not in terminal.read()


def test_no_color_is_respected(daemon: DaemonProcess) -> None:
    """The screen has no colours then, and a terminal that cannot be drawn on gets lines."""
    terminal = Terminal(daemon, NO_COLOR="1")
    terminal.wait("small-lm")
    assert terminal.end(signal.SIGINT) == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", terminal.text)
    plain = Terminal(daemon, TERM="dumb")
    plain.wait("hits")
    assert plain.end(signal.SIGINT) == 0 and "\x1b" not in plain.text


def test_a_daemon_that_ends_is_said_to_and_is_found_again(daemon: DaemonProcess) -> None:
    """On the terminal and in the lines of a pipe; the lines go on and the next ones count from its start."""
    terminal = Terminal(daemon)
    terminal.wait("small-lm")
    command = [*TOP, "--json"]
    with subprocess.Popen(command, env=daemon.environ(), stdout=subprocess.PIPE, text=True) as piped:
        assert piped.stdout is not None
        first = json.loads(piped.stdout.readline())
        assert first["schema"] == 1 and first["lifetime"]["hits"] == 1 and first["at_s"] > 1e9
        daemon.kill()
        terminal.wait("trying again every second")
        while "error" not in (line := json.loads(piped.stdout.readline())):
            assert line["daemon"]["pid"] == first["daemon"]["pid"]
        assert daemon.listen in line["error"]
        before = len(terminal.read())
        daemon.start()
        while "error" in (line := json.loads(piped.stdout.readline())):
            pass
        assert line["daemon"]["pid"] != first["daemon"]["pid"]
        terminal.wait(str(line["daemon"]["pid"]), after=before)
        piped.send_signal(signal.SIGINT)
        assert piped.wait(60) == 0
    assert terminal.end(signal.SIGINT) == 0


def test_lines_go_through_a_pipe_as_they_are_made(daemon: DaemonProcess) -> None:
    """One a second, without a colour; a reader that goes away ends it."""
    with subprocess.Popen(
        TOP, env=daemon.environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as piped:
        assert piped.stdout is not None and piped.stderr is not None
        lines = [piped.stdout.readline() for _ in range(2)]
        piped.stdout.close()
        code, complaint = piped.wait(60), piped.stderr.read()
    assert all(re.match(r"\d\d:\d\d:\d\d  \d+ hits \d+ misses  ", line) for line in lines)
    assert (code, complaint) == (1, "")


def test_without_a_daemon_it_is_exit_3(tmp_path: Path) -> None:
    """An address at which nobody was is not waited for."""
    ended = run_cli(["top"], DaemonProcess(tmp_path / "data").environ())
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (3, "", 1)
